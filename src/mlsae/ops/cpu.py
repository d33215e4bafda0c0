"""The ops on a CPU, in C++ (`cpu.cpp`): the same functions as `reference`, for float32.

The library is built when the package is installed, if there is a compiler, once for every instruction set in LEVELS; the best one
that the machine runs is loaded at the first call. `encode` multiplies in int8 where the machine can (AVX-512 VNNI) to find the
few latents that may be among the k largest, proves that no other is, and takes the products of those few in float32; elsewhere,
and for rows without a proof, it multiplies all in float32. Threads are torch's number, and do not change a bit of the result.
"""

import ctypes
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import mlsae.ops.reference as reference

LEVELS = ("portable", "avx2", "avx512", "avx512vnni")
"""Instruction sets, from the one every machine has upward."""
HUGE_NORM = 1e18
"""Rows as long as this are not screened: their products may overflow."""
MIN_SCREENED = 256
"""Rows, and latents, from which int8 screening pays for the packing of the latents."""


def unfit(like: Tensor) -> str | None:
    """Why these kernels cannot work on tensors like this one; None: they can."""
    if like.device.type != "cpu":
        return f"the tensor is on {like.device.type}"
    if like.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return "only float32 is done, without autocast"
    return missing()


def missing() -> str | None:
    """Why there is no library to load; None: there is one."""
    if "portable" in built():
        return None
    return (
        "its library was not built, for want of a C++ compiler when mlsae was installed; install one, and mlsae again"
    )


@cache
def built() -> tuple[str, ...]:
    """The levels that have a library."""
    return tuple(level for level in LEVELS if library_path(level).exists())


@cache
def best_level() -> str:
    """The best level that is built and that this machine runs."""
    runs = LEVELS[: load("portable").level() + 1]
    return [level for level in built() if level in runs][-1]


def screens() -> bool:
    """Whether that level can screen in int8."""
    return bool(_library().screens())


def library_path(level: str) -> Path:
    """Where the build puts a level's library."""
    return Path(__file__).with_name(f"cpu_{level}.lib")


@cache
def load(level: str) -> Any:
    """The library of one level."""
    return ctypes.CDLL(str(library_path(level)))


# ---- the ops, as in reference.py -------------------------------------------------------------------------------------


def encode(
    resid: Float[Tensor, "layer token d_model"],
    shift: Tensor | None,
    divisor: Tensor | None,
    bias: Float[Tensor, " d_model"],
    W_enc: Float[Tensor, "n_latents d_model"],
    k: int,
) -> tuple[Float[Tensor, "layer token k"], Int[Tensor, "layer token k"], Float[Tensor, "layer token d_model"]]:
    """The k largest entries of `x @ W_enc.T` in each row, rectified, their latents, and x. Ties go to the lowest latent."""
    x = _frame(resid, shift, divisor, bias)
    values, indices, _ = top_k(x.flatten(0, 1), W_enc, k)
    return values.view(*x.shape[:2], k), indices.view(*x.shape[:2], k), x


def decode(
    values: Float[Tensor, "row k"], indices: Int[Tensor, "row k"], W: Float[Tensor, "n_latents d_model"]
) -> Float[Tensor, "row d_model"]:
    """`sum_i values[:, i] * W[indices[:, i]]`."""
    _check(indices, len(W))
    out = torch.empty(len(values), W.shape[1])
    _run("decode", values, indices, W, *indices.shape, W.shape[1], out)
    return out


def dots(
    indices: Int[Tensor, "row k"], W: Float[Tensor, "n_latents d_model"], rows: Float[Tensor, "row d_model"]
) -> Float[Tensor, "row k"]:
    """`<W[indices[t, i]], rows[t]>`."""
    _check(indices, len(W))
    out = torch.empty(indices.shape)
    _run("dots", indices, W, rows, *indices.shape, W.shape[1], out)
    return out


def latent_gradient(
    weights: Float[Tensor, "row k"], indices: Int[Tensor, "row k"], rows: Float[Tensor, "row d_model"], n_latents: int
) -> tuple[Float[Tensor, "n_latents d_model"], Float[Tensor, " n_latents"]]:
    """For each latent, the weighted sum of the rows it is active in, and the sum of weights."""
    starts = torch.empty(n_latents + 1, dtype=torch.int64)
    order = torch.empty(indices.numel(), dtype=torch.int32)
    weights = weights.contiguous()
    pairs = [indices.contiguous(), weights, indices.numel(), n_latents, starts, order]
    sort = _library().sort_pairs
    sort.restype = ctypes.c_int64
    if sort(*map(_argument, pairs)) < 0:
        raise IndexError(f"a latent id is outside 0..{n_latents - 1}")
    gradient, sums = torch.empty(n_latents, rows.shape[1]), torch.empty(n_latents)
    _run("latent_gradient", starts, order, weights, indices.shape[1], rows, n_latents, rows.shape[1], gradient, sums)
    return gradient, sums


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
    """`error = resid - (decode(values, indices, W_dec) + bias) * scale - shift`, its squared sum by layer, and `dots` with it."""
    _check(indices, len(W_dec))
    error, squared = torch.empty(resid.shape), torch.empty(resid.shape[:2], dtype=torch.float64)
    dots = torch.empty(values.shape) if want_dots else None
    shifts = (None, 0, 0, 0) if shift is None else _broadcast(shift)
    sizes = (*values.shape, resid.shape[-1])
    _run(
        "decode_error",
        values,
        indices,
        W_dec,
        bias,
        resid,
        *shifts,
        *_broadcast(scale)[:3],
        *sizes,
        error,
        squared,
        dots,
    )
    return error, squared.sum(1).float(), dots


# ---- top k -----------------------------------------------------------------------------------------------------------


def top_k(
    x: Float[Tensor, "row d_model"], W_enc: Float[Tensor, "n_latents d_model"], k: int
) -> tuple[Float[Tensor, "row k"], Int[Tensor, "row k"], Int[Tensor, " row"]]:
    """Values, latents, and how many products of each row were taken in float32 (n_latents: all of them)."""
    n = len(W_enc)
    values, indices = torch.empty(len(x), k), torch.empty(len(x), k, dtype=torch.int64)
    rescored = torch.empty(len(x), dtype=torch.int32)
    redo = torch.ones(len(x), dtype=torch.bool)
    screened = screens() and min(len(x), n) >= MIN_SCREENED and not reference.is_dense(indices, n)
    if screened:
        _screen(x, W_enc, values, indices, redo, rescored)
    rescored[redo] = n
    if redo.all():
        _multiply(x, W_enc, values, indices)
    elif redo.any():
        again = torch.empty(int(redo.sum()), k), torch.empty(int(redo.sum()), k, dtype=torch.int64)
        _multiply(x[redo], W_enc, *again)
        values[redo], indices[redo] = again
    return values, indices, rescored


def _screen(
    x: Tensor, W_enc: Tensor, values: Tensor, indices: Tensor, redo: Bool[Tensor, " row"], rescored: Tensor
) -> None:
    """Fill the rows that int8 screening can prove, and leave `redo` true for the others."""
    n, d = W_enc.shape
    padded_n, padded_d = -(-n // 64) * 64, -(-d // 16) * 16
    packed = torch.empty(padded_n * padded_d, dtype=torch.uint8)
    scale, norm, lost = torch.empty(3, padded_n)
    _run("pack", W_enc, n, d, packed, scale, norm, lost)
    if (norm[:n] < HUGE_NORM).all():
        k = values.shape[1]
        _run("screen", x, len(x), d, packed, scale, norm, lost, W_enc, n, k, values, indices, redo, rescored)


def _multiply(x: Tensor, W_enc: Tensor, values: Tensor, indices: Tensor) -> None:
    """Fill all rows from their float32 pre-activations, a chunk at a time."""
    n, k = len(W_enc), values.shape[1]
    parts = reference.chunks(len(x), n)
    pre_acts = torch.empty(min(len(x), parts[0].stop if parts else 0), n)
    for rows in parts:
        here = pre_acts[: len(x[rows])]
        torch.mm(x[rows], W_enc.T, out=here)
        _run("top_rows", here, len(here), n, k, values[rows], indices[rows])


def _frame(resid: Tensor, shift: Tensor | None, divisor: Tensor | None, bias: Tensor) -> Tensor:
    if shift is None or divisor is None:
        return resid - bias
    x = torch.empty(resid.shape)
    _run("frame", resid, *_broadcast(shift), *_broadcast(divisor)[:3], bias, *resid.shape, x)
    return x


# ---- the optimizer ---------------------------------------------------------------------------------------------------


def project(
    weight: Float[Tensor, "row d_model"], gradient: Float[Tensor, "row d_model"], unit: bool
) -> tuple[Float[Tensor, " row"], float]:
    """What of each row's gradient lies along the row (0 if not `unit`), and the norm of all the rest."""
    along, squared = torch.empty(len(weight)), torch.empty(len(weight), dtype=torch.float64)
    _run("project", weight, gradient, *weight.shape, int(unit), along, squared)
    return along, float(squared.sum().sqrt())


def adam_(
    weight: Float[Tensor, "row d_model"],
    gradient: Float[Tensor, "row d_model"],
    moments: dict[str, Tensor],
    along: Float[Tensor, " row"],
    *,
    unit: bool,
    factor: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One step of Adam down `(gradient - along * weight) * factor`; rows end with unit norm if `unit`. Changes `moments` too."""
    assert weight.is_contiguous(), "a copy would be changed in its place"
    moments["step"] += 1
    corrections = [1 - beta ** float(moments["step"]) for beta in betas]
    rates = (factor, lr / corrections[0], *betas, corrections[1] ** 0.5, eps)
    means = moments["exp_avg"], moments["exp_avg_sq"]
    _run("adam", weight, gradient, *means, along, *weight.shape, int(unit), *rates)


# ---- where in depth latents are active -------------------------------------------------------------------------------


def depth_sums(
    values: Float[Tensor, "layer token k"],
    indices: Int[Tensor, "layer token k"],
    shard: Int[Tensor, " token"],
    sequence: Int[Tensor, " token"],
    sums: Mapping[str, Tensor],
    firsts: Float[Tensor, "sequence n_latents"],
    moments: Float[Tensor, "sequence 3"],
) -> None:
    """Add a code's events to the sums of analysis.layers, in one thread; ids, shards and sequences must be in range."""
    twice = torch.zeros((), dtype=torch.int64)
    code = values.double(), indices, shard, sequence, *values.shape, firsts.shape[1]
    _run("depth", *code, *(sums[name] for name in DEPTH_SUMS), firsts, moments, twice)
    assert not twice, "a vector names the same latent twice"


DEPTH_SUMS = (
    *("totals", "shares", "counts", "persisted", "within", "effective_layers", "n_events"),
    *("active_layers", "longest_run", "runs", "first_layer", "last_layer"),
)


# ---- calling the library ---------------------------------------------------------------------------------------------


def _library() -> Any:
    return load(best_level())


def _run(name: str, *arguments: Tensor | int | float | None) -> None:
    """Call a function of the library from as many threads as torch uses; they share the blocks of work by a counter."""
    function, following = getattr(_library(), name), ctypes.c_int64(0)
    contiguous = [a.contiguous() if isinstance(a, Tensor) else a for a in arguments]
    passed = [*map(_argument, contiguous), ctypes.byref(following)]
    helpers = [_threads(os.getpid()).submit(function, *passed) for _ in range(torch.get_num_threads() - 1)]
    function(*passed)
    wait(helpers)


@cache
def _threads(pid: int) -> ThreadPoolExecutor:
    """Threads of this process: a fork has none of its parent's."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="mlsae")


def _argument(value: Tensor | int | float | None) -> Any:
    if value is None or isinstance(value, Tensor):
        return ctypes.c_void_p(None if value is None else value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_double(value)


def _broadcast(tensor: Tensor) -> tuple[Any, ...]:
    """A tensor and its steps along (layer, token, feature), 0 where it is the same all along an axis."""
    tensor = tensor.contiguous()
    return tensor, *(0 if size == 1 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _check(indices: Tensor, n_latents: int) -> None:
    if indices.numel() and not (indices.min() >= 0 and indices.max() < n_latents):
        raise IndexError(f"a latent id is outside 0..{n_latents - 1}")
