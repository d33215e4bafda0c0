"""The ops on a GPU, in Triton: what is allocated, and how many programs of which size run the kernels of `gpu_kernels`."""

import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

import mlsae.ops.reference as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_K = 512
"""Above it the k best entries of a block of rows no longer fit a processor's registers, and `reference` encodes."""
PROGRAMS = 128
"""About as many as a large GPU has processors: a grid of fewer leaves some idle."""
PIECE = 256
"""Pairs of one latent that one program sums: a latent active everywhere costs no more time than others."""


def unfit(like: Tensor) -> str | None:
    """Why these kernels cannot work on tensors like this one; None: they can."""
    if like.dtype not in DTYPES:
        return f"it has no kernels for {like.dtype}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return _missing(interpreted=True)
    if like.device.type != "cuda":
        return f"the tensors are on {like.device.type}, not on a CUDA device"
    if torch.cuda.get_device_capability(like.device) < (8, 0):
        return "the GPU is older than Ampere (compute capability 8.0)"
    return _missing(interpreted=False)


@cache
def _missing(interpreted: bool) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    compilers = (Path(folder, name) for folder in os.get_exec_path() for name in ("gcc", "clang"))
    if not interpreted and "CC" not in os.environ and not any(path.exists() for path in compilers):
        return "triton finds no C compiler"
    return None


def encode(
    resid: Float[Tensor, "layer token d_model"],
    shift: Tensor | None,
    divisor: Tensor | None,
    bias: Float[Tensor, " d_model"],
    W_enc: Float[Tensor, "n_latents d_model"],
    k: int,
) -> tuple[Float[Tensor, "layer token k"], Int[Tensor, "layer token k"], Float[Tensor, "layer token d_model"]]:
    """The k largest entries of `x @ W_enc.T` in each row, rectified, their latents, and `x = (resid - shift) / divisor - bias`.

    Of entries that tie, the lowest latents are kept. Under autocast the product's factors, and nothing else, are rounded.
    """
    if k > MAX_K:
        return reference.encode(resid, shift, divisor, bias, W_enc, k)
    n_layers, n_tokens, d_model = resid.shape
    n_rows = n_layers * n_tokens
    x = _empty(resid, torch.promote_types(resid.dtype, bias.dtype), *resid.shape)
    values, indices = (_empty(x, dtype, n_layers, n_tokens, k) for dtype in (x.dtype, torch.int64))
    factor_dtype = _factor_dtype(x, W_enc)
    x_rounded = None if factor_dtype == x.dtype else _empty(x, factor_dtype, *x.shape)
    sizes = _encode_sizes(n_rows, k, factor_dtype)
    _run(
        "encode",
        -(-n_rows // sizes["BLOCK_ROWS"]),
        resid.contiguous(),
        shift,
        _strides(shift, resid),
        divisor,
        _strides(divisor, resid),
        bias.contiguous(),
        W_enc.to(factor_dtype).contiguous(),
        x,
        x_rounded,
        values,
        indices,
        n_rows,
        n_tokens,
        len(W_enc),
        d_model,
        k,
        **sizes,
    )
    return values, indices, x


def decode(
    values: Float[Tensor, "row k"], indices: Int[Tensor, "row k"], W: Float[Tensor, "n_latents d_model"]
) -> Float[Tensor, "row d_model"]:
    """`sum_i values[:, i] * W[indices[:, i]]`."""
    (n_rows, k), d_model = values.shape, W.shape[1]
    out = _empty(values, values.dtype, n_rows, d_model)
    tensors = values.contiguous(), indices.contiguous(), W.contiguous(), out
    _run("decode", n_rows, *tensors, d_model, k, **_gather_sizes(d_model))
    return out


def dots(
    indices: Int[Tensor, "row k"], W: Float[Tensor, "n_latents d_model"], rows: Float[Tensor, "row d_model"]
) -> Float[Tensor, "row k"]:
    """`<W[indices[t, i]], rows[t]>`: the gradient of `decode` in its values."""
    (n_rows, k), d_model = indices.shape, W.shape[1]
    out = _empty(rows, rows.dtype, n_rows, k)
    tensors = indices.contiguous(), W.contiguous(), rows.contiguous(), out
    _run("dots", n_rows, *tensors, d_model, k, **_gather_sizes(d_model))
    return out


def latent_gradient(
    weights: Float[Tensor, "row k"], indices: Int[Tensor, "row k"], rows: Float[Tensor, "row d_model"], n_latents: int
) -> tuple[Float[Tensor, "n_latents d_model"], Float[Tensor, " n_latents"]]:
    """For each latent, the weighted sum of the rows it is active in, which is a weight matrix's gradient, and of the weights."""
    k, d_model = indices.shape[1], rows.shape[1]
    latents, order = torch.sort(indices.flatten().int(), stable=True)  # half the bits, half the time
    starts = torch.searchsorted(latents, torch.arange(n_latents + 1, dtype=torch.int32, device=latents.device))
    n_pieces = n_latents + max(0, len(order) - 1) // PIECE
    pieces = _empty(rows, torch.float32, n_pieces, d_model)
    sums = _empty(rows, torch.float32, n_pieces)
    row_of_pair = order.div(k, rounding_mode="floor")
    pairs = weights.flatten()[order], row_of_pair, latents
    sizes = _gather_sizes(d_model)
    _run("sum_pieces", n_pieces, *pairs, starts, rows.contiguous(), pieces, sums, n_latents, d_model, PIECE, **sizes)
    del sizes["BLOCK_PAIRS"]
    _run("add_pieces", n_latents, starts, pieces, sums, n_latents, d_model, PIECE, **sizes)
    return pieces[:n_latents].to(rows.dtype), sums[:n_latents].to(weights.dtype)


def decode_error(
    values: Float[Tensor, "layer token k"],
    indices: Int[Tensor, "layer token k"],
    W_dec: Float[Tensor, "n_latents d_model"],
    bias: Float[Tensor, " d_model"] | None,
    resid: Float[Tensor, "layer token d_model"],
    shift: Tensor | None,
    scale: Tensor,
    want_dots: bool,
) -> tuple[Float[Tensor, "layer token d_model"], Float[Tensor, " layer"], Float[Tensor, "layer token k"] | None]:
    """`error = resid - (decode(values, indices, W_dec) + bias) * scale - shift`, its squared sum by layer, and, if they are
    wanted, `dots(indices, W_dec, error)`."""
    (n_layers, n_tokens, k), d_model = values.shape, W_dec.shape[1]
    error = _empty(values, values.dtype, *resid.shape)
    squared = _empty(values, torch.float32, n_layers, n_tokens)
    products = _empty(values, values.dtype, *values.shape) if want_dots else None
    _run(
        "decode_error",
        n_layers * n_tokens,
        values.contiguous(),
        indices.contiguous(),
        W_dec.contiguous(),
        None if bias is None else bias.contiguous(),
        resid.contiguous(),
        shift,
        _strides(shift, resid),
        scale,
        _strides(scale, resid),
        error,
        squared,
        products,
        n_tokens,
        d_model,
        k,
        **_gather_sizes(d_model),
    )
    return error, squared.sum(1).to(error.dtype), products


def _run(kernel: str, n_programs: int, *args: Any, **sizes: int | str) -> None:
    """Run a kernel of that name on the device of its first argument."""
    if n_programs:
        from mlsae.ops import gpu_kernels  # imports triton

        with torch.cuda.device_of(args[0]):
            getattr(gpu_kernels, kernel)[(n_programs,)](*args, **sizes)


def _encode_sizes(n_rows: int, k: int, dtype: torch.dtype) -> dict[str, Any]:
    """A tile of 64 rows and 128 latents, in chunks of 128 bytes of features; fewer rows where they are few or k is large."""
    slots = max(16, 1 << (k - 1).bit_length())
    rows = min(64, 8192 // slots)
    while rows > 16 and n_rows < rows * PROGRAMS:
        rows //= 2
    registers_for_two = dtype.itemsize == 2 and slots <= 64  # programs on one processor, of which one multiplies
    return {
        "BLOCK_ROWS": rows,
        "BLOCK_LATENTS": 128,
        "BLOCK_FEATURES": 128 // dtype.itemsize,
        "SLOTS": slots,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        "num_warps": 4 if registers_for_two else 8,
        "num_stages": 3,
    }


def _gather_sizes(d_model: int) -> dict[str, Any]:
    """Whole rows, about 4096 entries of them at a time."""
    features = 1 << (d_model - 1).bit_length()
    pairs = min(32, max(1, 4096 // features))
    return {"BLOCK_PAIRS": pairs, "BLOCK_FEATURES": features, "num_warps": 4 if features <= 2048 else 8}


def _factor_dtype(x: Tensor, W: Tensor) -> torch.dtype:
    """What autocast, if it is on, makes of the product's factors."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return torch.promote_types(x.dtype, W.dtype)


def _strides(part: Tensor | None, whole: Tensor) -> tuple[int, ...]:
    """Strides at which `part` broadcasts over `whole`."""
    return (0, 0, 0) if part is None else part.expand_as(whole).stride()


def _empty(like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """Fresh memory, every entry of which a kernel writes; tests fill it with NaN."""
    return torch.empty(shape, dtype=dtype, device=like.device)
