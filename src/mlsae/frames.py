"""Invertible input frames: the named map between the residual stream and the space where the dictionary works.

    x = (resid - shift) / scale        recon = x_hat * scale + shift

`layer`   shift is the layer's mean vector, scale its root-mean-square deviation: two constants a layer (the standard recipe)
`vector`  shift and scale are each vector's own mean and unbiased standard deviation over its features (Lawson et al. 2024)
`none`    the identity
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mlsae.config import FrameName

VECTOR_EPS = 1e-5
"""Added to a vector's standard deviation on the way in, and not on the way out, as the published code does."""


class Frame(nn.Module):
    """The frame of one SAE. Only `layer` has state: `mean [layer, d_model]` and `scale [layer]`, fixed before training.

    Until it is fitted it is the identity.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, name: FrameName, n_layers: int, d_model: int):
        super().__init__()
        self.name = name
        if name == "layer":
            self.register_buffer("mean", torch.zeros(n_layers, d_model))
            self.register_buffer("scale", torch.ones(n_layers))

    def fit(self, mean: Float[Tensor, "layer d_model"], variance: Float[Tensor, " layer"]) -> None:
        """Fix the frame from each layer's mean vector and its variance (mean squared entry of `resid - mean`)."""
        if self.name == "layer":
            self.mean, self.scale = mean.to(self.mean), variance.sqrt().to(self.scale)

    def shift_and_scale(
        self, resid: Float[Tensor, "layer *batch d_model"], rows: list[int]
    ) -> tuple[Float[Tensor, "#layer *#batch #d_model"], Float[Tensor, "#layer *#batch 1"]]:
        """What to subtract and divide by, broadcasting over `resid`; `rows` says which of the SAE's layers it holds."""
        if self.name == "vector":
            return resid.mean(-1, keepdim=True), resid.std(-1, keepdim=True)
        flat = [1] * (resid.ndim - 2)
        if self.name == "layer" and len(self.mean):
            return self.mean[rows].view(len(rows), *flat, -1), self.scale[rows].view(len(rows), *flat, 1)
        return resid.new_zeros(1, *flat, 1), resid.new_ones(1, *flat, 1)

    def apply_to(
        self, resid: Float[Tensor, "layer *batch d_model"], shift: Tensor, scale: Tensor
    ) -> Float[Tensor, "layer *batch d_model"]:
        """`(resid - shift) / divisor(scale)`."""
        return (resid - shift) / self.divisor(scale)

    def divisor(self, scale: Float[Tensor, "#layer *#batch 1"]) -> Float[Tensor, "#layer *#batch 1"]:
        """What the way in divides by, where the way out multiplies by `scale`."""
        return scale + VECTOR_EPS if self.name == "vector" else scale
