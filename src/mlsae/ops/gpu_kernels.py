"""The Triton kernels behind `gpu`, which imports them on first use because they import triton.

A program is one block of GPU threads. Matrices are contiguous, row after row; what may broadcast comes with its strides, of 0
where it does. Sums are in float32 and in a fixed order, without atomics: the same inputs give the same bits. `no_type_check`
keeps the tests' run-time type checker, which wraps every function, off functions that Triton reads as source.
"""

from typing import no_type_check

import triton
import triton.language as tl

EMPTY = tl.constexpr(-(1 << 31))
"""Below every ordered float: no entry."""
EMPTY_KEY = tl.constexpr(-(1 << 63) + (1 << 31))
"""Below the key of every entry, above that of no entry: a free slot (and, plus its number, unlike every other)."""
FULL_KEY = tl.constexpr((1 << 63) - 1)
"""Above every key: a slot that takes none."""
LAST_ID = tl.constexpr((1 << 31) - 1)


@triton.jit
@no_type_check
def encode(
    resid,
    shift,
    shift_strides,
    divisor,
    divisor_strides,
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
    """`x` and, in no order, the k largest entries of `x @ W.T`, rectified, for BLOCK_ROWS rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    _store_framed(
        resid,
        shift,
        shift_strides,
        divisor,
        divisor_strides,
        bias,
        x,
        x_rounded,
        rows,
        n_rows,
        n_tokens,
        d_model,
        BLOCK_FEATURES,
    )
    tl.debug_barrier()  # what was stored is read below, by other threads of this program

    factor = x if x_rounded is None else x_rounded
    slots, tile = tl.arange(0, SLOTS), tl.arange(0, BLOCK_LATENTS)
    best = tl.where(slots < k, EMPTY_KEY + slots.to(tl.int64), FULL_KEY)[None, :]
    best = tl.broadcast_to(best, (BLOCK_ROWS, SLOTS))
    worst = tl.min(best, 1)
    for first in range(0, n_latents, BLOCK_LATENTS):
        pre_acts = _products(factor, W, rows, first + tile, n_rows, n_latents, d_model, BLOCK_FEATURES, PRECISION)
        ordered = tl.where((first + tile < n_latents)[None, :], _ordered(pre_acts), EMPTY)
        best, worst = _keep_largest(best, worst, ordered, first, tile)

    at = rows[:, None] * k + slots[None, :]
    inside = (rows < n_rows)[:, None] & (slots < k)[None, :]
    value = _value(best)
    tl.store(values + at, tl.where(value <= 0, 0.0, value), mask=inside)  # NaN stays
    tl.store(indices + at, (best & LAST_ID) ^ LAST_ID, mask=inside)


@triton.jit
@no_type_check
def decode(values, indices, W, out, d_model, k, BLOCK_PAIRS: tl.constexpr, BLOCK_FEATURES: tl.constexpr):
    """One row's weighted sum of its k rows of W."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_FEATURES)
    total, _ = _weighted_rows(values, indices, row * k, row * k + k, W, columns, d_model, BLOCK_PAIRS, BLOCK_FEATURES)
    tl.store(out + row * d_model + columns, total, mask=columns < d_model)


@triton.jit
@no_type_check
def dots(indices, W, rows, out, d_model, k, BLOCK_PAIRS: tl.constexpr, BLOCK_FEATURES: tl.constexpr):
    """One row's product with each of its k rows of W."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_FEATURES)
    vector = tl.load(rows + row * d_model + columns, mask=columns < d_model, other=0.0).to(tl.float32)
    _store_dots(vector, indices, row, W, out, columns, d_model, k, BLOCK_PAIRS)


@triton.jit
@no_type_check
def decode_error(
    values,
    indices,
    W,
    bias,
    resid,
    shift,
    shift_strides,
    scale,
    scale_strides,
    error,
    squared,
    out,
    n_tokens,
    d_model,
    k,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    """One row's error, its squared sum and, if `out` is there to take them, its products with the row's k rows of W."""
    row = tl.program_id(0).to(tl.int64)
    layer, token = row // n_tokens, row % n_tokens
    columns = tl.arange(0, BLOCK_FEATURES)
    inside = columns < d_model
    recon, _ = _weighted_rows(values, indices, row * k, row * k + k, W, columns, d_model, BLOCK_PAIRS, BLOCK_FEATURES)
    if bias is not None:
        recon += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    recon *= tl.load(scale + layer * scale_strides[0] + token * scale_strides[1]).to(tl.float32)
    if shift is not None:
        at = layer * shift_strides[0] + token * shift_strides[1] + columns * shift_strides[2]
        recon += tl.load(shift + at, mask=inside, other=0.0).to(tl.float32)
    left = tl.load(resid + row * d_model + columns, mask=inside, other=0.0).to(tl.float32) - recon
    tl.store(error + row * d_model + columns, left, mask=inside)
    tl.store(squared + row, tl.sum(left * left, 0))
    if out is not None:
        _store_dots(left, indices, row, W, out, columns, d_model, k, BLOCK_PAIRS)


@triton.jit
@no_type_check
def sum_pieces(
    weights,
    row_of_pair,
    latents,
    starts,
    rows,
    pieces,
    sums,
    n_latents,
    d_model,
    PIECE: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    """Weighted sum of rows, and of weights, over one piece of a latent's run of pairs.

    Runs are cut at every multiple of PIECE, so that none keeps one program busy for long. Program p < n_latents takes latent p's
    first piece; program n_latents + i takes the one that begins at pair (i + 1) * PIECE, if need be in vain.
    """
    program = tl.program_id(0)
    cut = (program - n_latents + 1).to(tl.int64) * PIECE
    latent = program
    if program >= n_latents:
        latent = tl.load(latents + cut)
    begin, end = tl.load(starts + latent), tl.load(starts + latent + 1)
    if program >= n_latents:
        begin = cut
    end = tl.minimum(end, (begin // PIECE + 1) * PIECE)
    columns = tl.arange(0, BLOCK_FEATURES)
    total, weight = _weighted_rows(
        weights, row_of_pair, begin, end, rows, columns, d_model, BLOCK_PAIRS, BLOCK_FEATURES
    )
    tl.store(pieces + program.to(tl.int64) * d_model + columns, total, mask=columns < d_model)
    tl.store(sums + program, weight)


@triton.jit
@no_type_check
def add_pieces(starts, pieces, sums, n_latents, d_model, PIECE: tl.constexpr, BLOCK_FEATURES: tl.constexpr):
    """Add to one latent's first piece the others of its run, if there are any."""
    latent = tl.program_id(0)
    begin, end = tl.load(starts + latent), tl.load(starts + latent + 1)
    first, stop = begin // PIECE, (end - 1) // PIECE  # the pieces that begin at the cuts first + 1, ..., stop
    if stop > first:
        columns = tl.arange(0, BLOCK_FEATURES)
        inside = columns < d_model
        at = pieces + latent.to(tl.int64) * d_model + columns
        total, weight = tl.load(at, mask=inside, other=0.0).to(tl.float32), tl.load(sums + latent).to(tl.float32)
        for piece in range(n_latents + first, n_latents + stop):
            total += tl.load(pieces + piece * d_model + columns, mask=inside, other=0.0).to(tl.float32)
            weight += tl.load(sums + piece).to(tl.float32)
        tl.store(at, total, mask=inside)
        tl.store(sums + latent, weight)


@triton.jit
@no_type_check
def _store_framed(
    resid,
    shift,
    shift_strides,
    divisor,
    divisor_strides,
    bias,
    x,
    x_rounded,
    rows,
    n_rows,
    n_tokens,
    d_model,
    BLOCK_FEATURES: tl.constexpr,
):
    """`x = (resid - shift) / divisor - bias` for these rows, and again in the product's precision if that is another."""
    layers, tokens = rows // n_tokens, rows % n_tokens
    ours = rows < n_rows
    for start in range(0, d_model, BLOCK_FEATURES):
        columns = start + tl.arange(0, BLOCK_FEATURES)
        inside = ours[:, None] & (columns < d_model)[None, :]
        at = rows[:, None] * d_model + columns[None, :]
        framed = tl.load(resid + at, mask=inside, other=0.0).to(tl.float32)
        if shift is not None:
            row_at = layers * shift_strides[0] + tokens * shift_strides[1]
            shift_at = row_at[:, None] + (columns * shift_strides[2])[None, :]
            framed -= tl.load(shift + shift_at, mask=inside, other=0.0).to(tl.float32)
            divisor_at = layers * divisor_strides[0] + tokens * divisor_strides[1]
            by = tl.load(divisor + divisor_at, mask=ours, other=1.0).to(tl.float32)
            framed = tl.div_rn(framed, tl.broadcast_to(by[:, None], framed.shape))
        framed -= tl.load(bias + columns, mask=columns < d_model, other=0.0).to(tl.float32)[None, :]
        tl.store(x + at, framed, mask=inside)
        if x_rounded is not None:
            tl.store(x_rounded + at, framed, mask=inside)


@triton.jit
@no_type_check
def _products(x, W, rows, latents, n_rows, n_latents, d_model, BLOCK_FEATURES: tl.constexpr, PRECISION: tl.constexpr):
    """`x @ W.T` for these rows and latents: float32 [row, latent]."""
    total = tl.zeros((rows.shape[0], latents.shape[0]), tl.float32)
    for start in range(0, d_model, BLOCK_FEATURES):
        columns = start + tl.arange(0, BLOCK_FEATURES)
        inside = columns < d_model
        x_at = rows[:, None] * d_model + columns[None, :]
        W_at = latents.to(tl.int64)[None, :] * d_model + columns[:, None]
        left = tl.load(x + x_at, mask=(rows < n_rows)[:, None] & inside[None, :], other=0.0)
        right = tl.load(W + W_at, mask=(latents < n_latents)[None, :] & inside[:, None], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
@no_type_check
def _keep_largest(best, worst, ordered, first, tile):
    """The best keys so far and the worst of them, in each row, once a tile's entries have been seen.

    Each row's largest entry takes the place of its worst key, until no row has an entry that would. That is k rounds for the
    first tile but soon very few, and cheaper than sorting: the i-th tile holds about k / i of a row's best so far.
    """
    largest = tl.max(ordered, 1)
    while tl.max((largest > (worst >> 32)).to(tl.int32)) > 0:
        place = tl.min(tl.where(ordered == largest[:, None], tile[None, :], tile.shape[0]), 1)
        key = _key(largest, first + place)
        best = tl.where(best == worst[:, None], tl.maximum(key, worst)[:, None], best)
        worst = tl.min(best, 1)
        ordered = tl.where(tile[None, :] == place[:, None], EMPTY, ordered)
        largest = tl.max(ordered, 1)
    return best, worst


@triton.jit
@no_type_check
def _ordered(values):
    """int32 that compare as the float32 do, with NaN above all."""
    bits = values.to(tl.int32, bitcast=True)
    return tl.where(values == values, bits ^ ((bits >> 31) & LAST_ID), LAST_ID)


@triton.jit
@no_type_check
def _key(ordered, latents):
    """int64 that compare as the ordered floats and, where these tie, put the lower latent above."""
    return (ordered.to(tl.int64) << 32) | (latents ^ LAST_ID).to(tl.int64)


@triton.jit
@no_type_check
def _value(keys):
    """The float32 in a key."""
    ordered = (keys >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & LAST_ID)).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def _weighted_rows(
    weights, ids, begin, end, matrix, columns, d_model, BLOCK_PAIRS: tl.constexpr, BLOCK_FEATURES: tl.constexpr
):
    """`sum_p weights[p] * matrix[ids[p]]` and `sum_p weights[p]` over the pairs in [begin, end)."""
    total = tl.zeros((BLOCK_PAIRS, BLOCK_FEATURES), tl.float32)
    weight = tl.zeros((BLOCK_PAIRS,), tl.float32)
    for first in range(begin, end, BLOCK_PAIRS):
        pairs = first + tl.arange(0, BLOCK_PAIRS)
        ours = pairs < end
        w = tl.load(weights + pairs, mask=ours, other=0.0).to(tl.float32)
        at = tl.load(ids + pairs, mask=ours, other=0)[:, None] * d_model + columns[None, :]
        inside = ours[:, None] & (columns < d_model)[None, :]
        total += w[:, None] * tl.load(matrix + at, mask=inside, other=0.0).to(tl.float32)
        weight += w
    return tl.sum(total, 0), tl.sum(weight, 0)


@triton.jit
@no_type_check
def _store_dots(vector, indices, row, W, out, columns, d_model, k, BLOCK_PAIRS: tl.constexpr):
    """`out[row, i] = <vector, W[indices[row, i]]>`."""
    for first in range(0, k, BLOCK_PAIRS):
        pairs = first + tl.arange(0, BLOCK_PAIRS)
        ours = pairs < k
        at = tl.load(indices + row * k + pairs, mask=ours, other=0)[:, None] * d_model + columns[None, :]
        inside = ours[:, None] & (columns < d_model)[None, :]
        products = tl.load(W + at, mask=inside, other=0.0).to(tl.float32) * vector[None, :]
        tl.store(out + row * k + pairs, tl.sum(products, 1), mask=ours)
