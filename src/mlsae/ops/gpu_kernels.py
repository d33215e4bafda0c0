"""The Triton kernels behind `gpu`, which imports them on first use because they import triton.

Matrices are contiguous, one row after the other; whatever may broadcast comes with its strides, of 0 where it does. Sums are
taken in float32 and in one fixed order, without atomics: the same inputs give the same bits. `no_type_check` keeps the tests'
run-time type checker, which wraps every function, away from functions that Triton reads as source.
"""

from typing import no_type_check

import triton
import triton.language as tl

EMPTY = tl.constexpr(-(1 << 31))
"""Below every ordered float: an entry that is none."""
MAX_INT32 = tl.constexpr((1 << 31) - 1)
FULL = tl.constexpr((1 << 63) - 1)
"""Above every key: a slot that takes none."""


@triton.jit
@no_type_check
def encode(
    resid,
    shift,
    shift_layer,
    shift_token,
    shift_feature,
    divisor,
    divisor_layer,
    divisor_token,
    bias,
    W,
    x,
    x_rounded,
    values,
    indices,
    n_rows,
    n_tokens,
    n_latents,
    d_model,
    k,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_LATENTS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`x`, and each row's k largest entries of `x @ W.T`, for BLOCK_ROWS rows, over one tile of latents after the other.

    A row's best so far lie in k of its SLOTS, in no order, as keys (see `_key`); a new entry takes the place of the smallest.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    for start in range(0, d_model, BLOCK_FEATURES):
        columns = start + tl.arange(0, BLOCK_FEATURES)
        inside = (rows < n_rows)[:, None] & (columns < d_model)[None, :]
        at = rows[:, None] * d_model + columns[None, :]
        framed = tl.load(resid + at, mask=inside, other=0.0).to(tl.float32)
        if shift is not None:
            layers, tokens = (rows // n_tokens)[:, None], (rows % n_tokens)[:, None]
            shift_at = layers * shift_layer + tokens * shift_token + columns[None, :] * shift_feature
            divisor_at = layers * divisor_layer + tokens * divisor_token + tl.zeros_like(columns)[None, :]
            framed -= tl.load(shift + shift_at, mask=inside, other=0.0).to(tl.float32)
            framed = tl.div_rn(framed, tl.load(divisor + divisor_at, mask=inside, other=1.0).to(tl.float32))
        framed -= tl.load(bias + columns, mask=columns < d_model, other=0.0).to(tl.float32)[None, :]
        tl.store(x + at, framed, mask=inside)
        if x_rounded is not None:
            tl.store(x_rounded + at, framed, mask=inside)
    tl.debug_barrier()  # x is read back below, by other threads of this program

    slots = tl.arange(0, SLOTS)
    best = tl.where(slots < k, (EMPTY.to(tl.int64) << 32) + slots, FULL)
