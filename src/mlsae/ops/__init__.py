"""The three sparse operations of a TopK SAE, and the visible choice of who computes them.

`impl` is an argument, decided at call time: `reference` is plain torch and the definition; `auto` takes the fastest there is.
"""

from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from mlsae.ops import reference

Impl = Literal["auto", "reference"]


def encode_topk(
    x: Float[Tensor, "row d_model"], W_enc: Float[Tensor, "n_latents d_model"], k: int, impl: Impl = "auto"
) -> tuple[Float[Tensor, "row k"], Int[Tensor, "row k"]]:
    """The k largest entries of `x @ W_enc.T` in each row, rectified, and their latent ids; differentiable in x and W_enc."""
    return reference.encode_topk(x, W_enc, k)


def sparse_decode(
    values: Float[Tensor, "row k"],
    indices: Int[Tensor, "row k"],
    W_dec: Float[Tensor, "n_latents d_model"],
    impl: Impl = "auto",
) -> Float[Tensor, "row d_model"]:
    """`sum_i values[:, i] * W_dec[indices[:, i]]`; differentiable in values and W_dec."""
    return reference.sparse_decode(values, indices, W_dec)
