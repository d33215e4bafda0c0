"""The sparse operations of a TopK SAE, and the visible choice of who computes them.

`impl` is an argument, decided at call time: `reference` is plain torch and the definition; `auto` takes the fastest there is.
"""

import logging
from functools import cache
from types import ModuleType
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from mlsae.config import Impl
from mlsae.errors import ConfigError
from mlsae.ops import autograd, cpu, gpu, reference

log = logging.getLogger("mlsae")

KERNELS: dict[str, ModuleType] = {"reference": reference, "cpu": cpu, "triton": gpu}


def encode(
    resid: Float[Tensor, "layer token d_model"],
    shift: Float[Tensor, "#layer #token #d_model"],
    divisor: Float[Tensor, "#layer #token 1"],
    bias: Float[Tensor, " d_model"],
    W_enc: Float[Tensor, "n_latents d_model"],
    k: int,
    impl: Impl = "auto",
) -> tuple[Float[Tensor, "layer token k"], Int[Tensor, "layer token k"]]:
    """The k largest entries of `((resid - shift) / divisor - bias) @ W_enc.T` in each row, rectified, and their latents.

    Differentiable in all but the indices. Of entries that tie, any may be kept; an entry of value 0 is not active.
    """
    kernels = choose(impl, resid, W_enc, bias)
    if resid.requires_grad:  # the frame's own derivatives are torch's
        return autograd.Encode.apply(kernels, (resid - shift) / divisor, None, None, bias, W_enc, k)
    return autograd.Encode.apply(kernels, resid, shift, divisor, bias, W_enc, k)


def decode(
    values: Float[Tensor, "row k"],
    indices: Int[Tensor, "row k"],
    W_dec: Float[Tensor, "n_latents d_model"],
    impl: Impl = "auto",
) -> Float[Tensor, "row d_model"]:
    """`sum_i values[:, i] * W_dec[indices[:, i]]`; differentiable in values and W_dec."""
    return autograd.Decode.apply(choose(impl, values, W_dec), values, indices, W_dec)


def decode_error(
    values: Float[Tensor, "layer token k"],
    indices: Int[Tensor, "layer token k"],
    W_dec: Float[Tensor, "n_latents d_model"],
    bias: Float[Tensor, " d_model"] | None,
    resid: Float[Tensor, "layer token d_model"],
    shift: Float[Tensor, "#layer #token #d_model"] | None,
    scale: Float[Tensor, "#layer #token 1"],
    impl: Impl = "auto",
) -> tuple[Float[Tensor, "layer token d_model"], Float[Tensor, " layer"]]:
    """`error = resid - ((values @ W_dec + bias) * scale + shift)` and its squared sum by layer.

    Differentiable in values, W_dec and bias.
    """
    return autograd.DecodeError.apply(
        choose(impl, resid, values, W_dec), values, indices, W_dec, bias, resid, shift, scale
    )


def choose(impl: Impl, *like: Tensor) -> Any:
    """The module of kernels that computes an op on tensors like these. Raises ConfigError if `impl` cannot."""
    if impl == "auto":
        impl = best_for(*like)
    elif reason := unfit(impl, *like):
        raise ConfigError("impl", f"'{impl}' cannot be used: {reason}; use auto or reference")
    _say_once(impl)
    return KERNELS[impl]


def best_for(*like: Tensor) -> Impl:
    """What `auto` is for tensors like these."""
    fit: list[Impl] = [name for name in ("cpu", "triton", "reference") if unfit(name, *like) is None]
    return fit[0]


def unfit(impl: str, *like: Tensor) -> str | None:
    """Why an implementation cannot work on tensors like these; None: it can."""
    reasons = [] if impl == "reference" else [KERNELS[impl].unfit(tensor) for tensor in like]
    return next((reason for reason in reasons if reason is not None), None)


@cache
def _say_once(impl: str) -> None:
    log.info("sparse ops: %s", impl)
