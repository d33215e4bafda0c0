"""Invertible input frames: the named map between the residual stream and the space where the dictionary works.

    x = (resid - shift) / scale        recon = x_hat * scale + shift

`layer`   shift is the layer's mean vector, scale its root-mean-square deviation: two constants a layer (the standard recipe)
`vector`  shift and scale are each vector's own mean and unbiased standard deviation over its features (Lawson et al. 2024)
`none`    the identity

Before the frame there may be a tuned lens, an affine map of each layer: `resid` above is then its image, and its inverse the
last step.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mlsae.errors import ConfigError, ModelError
from mlsae.recipes import FrameName

VECTOR_EPS = 1e-5
"""Added to a vector's standard deviation on the way in, and not on the way out, as the published code does."""
MAX_CONDITION = 2.0**23
"""Condition number at which a map and its inverse leave nothing of a float32."""


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


class Lens(nn.Module):
    """An invertible affine map for each of `layers`: `y = x + x A^T + c`. Belrose et al. 2023 (arXiv 2303.08112), section 3.

    `weight [layer, d_model, d_model]` holds A and `bias [layer, d_model]` holds c; zero, as at first, they are the identity. They
    are fixed: nothing here asks for gradients, but both ways pass them on.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, layers: Sequence[int], d_model: int):
        super().__init__()
        self.layers = tuple(layers)
        """The model layers, by the outputs of whose blocks the first axis counts."""
        self.register_buffer("weight", torch.zeros(len(self.layers), d_model, d_model))
        self.register_buffer("bias", torch.zeros(len(self.layers), d_model))
        self._inverted: tuple[Tensor, int, Tensor] | None = None

    def apply_to(
        self, resid: Float[Tensor, "layer *batch d_model"], layers: Sequence[int] | None = None
    ) -> Float[Tensor, "layer *batch d_model"]:
        """Vectors of `layers` (None: all) through their maps."""
        rows = self._rows(resid, layers)
        return torch.stack(
            [x + nn.functional.linear(x, self.weight[row], self.bias[row]) for x, row in zip(resid, rows, strict=True)]
        )

    def invert(
        self, lensed: Float[Tensor, "layer *batch d_model"], layers: Sequence[int] | None = None
    ) -> Float[Tensor, "layer *batch d_model"]:
        """The vectors whose images these are: `(I + A)^-1 (y - c)`. Raises ModelError if a map has no usable inverse."""
        rows, inverses = self._rows(lensed, layers), self._inverses()
        return torch.stack(
            [nn.functional.linear(y - self.bias[row], inverses[row]) for y, row in zip(lensed, rows, strict=True)]
        )

    @property
    def condition_numbers(self) -> Float[Tensor, " layer"]:
        """Largest over smallest singular value of each `I + A`: how much the inverse may magnify a relative error."""
        return torch.linalg.cond(self._matrices())

    def check_invertible(self) -> None:
        """Refuse a map that float32 vectors cannot be brought back through: a condition number (1-norm) of 2^23 or more."""
        self._inverses()

    def _rows(self, resid: Tensor, layers: Sequence[int] | None) -> list[int]:
        named = self.layers if layers is None else tuple(layers)
        if unknown := [layer for layer in named if layer not in self.layers]:
            raise ConfigError("layers", f"{unknown[0]} has no translator; this lens has layers {self.layers}")
        if len(named) != resid.shape[0] or resid.shape[-1] != self.bias.shape[1]:
            needed = f"{len(named)} layers of {self.bias.shape[1]} entries"
            raise ConfigError("resid", f"{tuple(resid.shape)} given; the lens needs {needed}")
        return [self.layers.index(layer) for layer in named]

    def _matrices(self) -> Float[Tensor, "layer d_model d_model"]:
        return self.weight.cpu().double() + torch.eye(self.bias.shape[1], dtype=torch.float64)

    @torch.no_grad()
    def _inverses(self) -> Float[Tensor, "layer d_model d_model"]:
        """Every `(I + A)^-1`, computed once for as long as the weights stay as they are.

        In float64 on the CPU, then rounded: at a condition number of 3,000 vectors come back within 6e-5 of their norm, as by
        a float64 LU solve, which takes four times as long; after a float32 one within 5e-4.
        """
        known = self._inverted
        if known is not None and known[0] is self.weight and known[1] == self.weight._version:
            return known[2]
        inverses = torch.empty_like(self.weight)
        for row, (layer, matrix) in enumerate(zip(self.layers, self._matrices(), strict=True)):
            inverse, failed = torch.linalg.inv_ex(matrix)
            condition = float(torch.linalg.matrix_norm(matrix, 1) * torch.linalg.matrix_norm(inverse, 1))
            if failed or not condition < MAX_CONDITION:
                raise ModelError(
                    "lens", f"the translator of layer {layer} is singular (condition {condition:.1e}); train it anew"
                )
            inverses[row] = inverse
        self._inverted = (self.weight, self.weight._version, inverses)
        return inverses
