"""The definition of every op, in plain torch. Nothing here ever holds more than a chunk of `[row, n_latents]`.

A row is one residual vector, a pair one (row, latent) of the k active in that row. Where k is small beside n_latents, sums over
pairs are `embedding_bag`s, for the weights' gradients over pairs sorted by latent; where it is not, as for AuxK on a few dead
latents, a chunk of the code is made dense and multiplied.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

CHUNK_ENTRIES = 1 << 23
"""Pre-activations, or entries of a dense code, held at a time (32 MiB in float32)."""
DENSE_SHARE = 8
"""A code with more than one latent in this many active is multiplied as a dense one."""


def encode(
    resid: Float[Tensor, "layer token d_model"],
    shift: Tensor | None,
    divisor: Tensor | None,
    bias: Float[Tensor, " d_model"],
    W_enc: Float[Tensor, "n_latents d_model"],
    k: int,
) -> tuple[Float[Tensor, "layer token k"], Int[Tensor, "layer token k"], Float[Tensor, "layer token d_model"]]:
    """The k largest entries of `x @ W_enc.T` in each row, rectified, their latents, and `(resid - shift) / divisor - bias`, x."""
    x = resid - bias if shift is None or divisor is None else resid.sub(shift).div_(divisor).sub_(bias)
    values, indices = top_k(x.flatten(0, 1), W_enc, k)
    return values.view(*x.shape[:2], k), indices.view(*x.shape[:2], k), x


def top_k(
    x: Float[Tensor, "row d_model"], W_enc: Float[Tensor, "n_latents d_model"], k: int
) -> tuple[Float[Tensor, "row k"], Int[Tensor, "row k"]]:
    """`encode` for rows that already are in the SAE's frame."""
    values = x.new_empty(len(x), k)
    indices = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    if torch.is_autocast_enabled(x.device.type):  # which knows nothing of products into memory that is there
        dtype = torch.get_autocast_dtype(x.device.type)
        x, W_enc = x.to(dtype), W_enc.to(dtype)
    parts = chunks(len(x), len(W_enc))
    pre_acts = x.new_empty(len(x[parts[0]]) if parts else 0, len(W_enc))
    for rows in parts:
        here = pre_acts[: len(x[rows])]
        torch.mm(x[rows], W_enc.T, out=here)
        top = here.topk(k, dim=-1, sorted=False)
        values[rows], indices[rows] = top.values.relu(), _lowest_of_ties(here, top.values, top.indices)
    return values, indices


def _lowest_of_ties(
    pre_acts: Float[Tensor, "row n_latents"], values: Float[Tensor, "row k"], indices: Int[Tensor, "row k"]
) -> Int[Tensor, "row k"]:
    """The latents of the k largest, where those of equal value beyond the k-th are the highest: torch takes any."""
    least = values.amin(1, keepdim=True)
    tied = ((pre_acts >= least).sum(1) > values.shape[1]) & (least[:, 0] > 0)
    if tied.any():
        order = (
            values[tied].sort(dim=-1, descending=True, stable=True).indices
        )  # where in the row each rank's value goes
        best = pre_acts[tied].sort(dim=-1, descending=True, stable=True).indices[:, : values.shape[1]]
        indices[tied] = torch.empty_like(best).scatter_(1, order, best)
    return indices


def decode(
    values: Float[Tensor, "row k"], indices: Int[Tensor, "row k"], W: Float[Tensor, "n_latents d_model"]
) -> Float[Tensor, "row d_model"]:
    """`sum_i values[:, i] * W[indices[:, i]]`."""
    if not is_dense(indices, len(W)):
        return embedding_bag(indices, W, per_sample_weights=values, mode="sum")
    out = values.new_empty(len(values), W.shape[1])
    for rows in chunks(len(values), len(W)):
        out[rows] = to_dense(values[rows], indices[rows], len(W)) @ W
    return out


def dots(
    indices: Int[Tensor, "row k"], W: Float[Tensor, "n_latents d_model"], rows: Float[Tensor, "row d_model"]
) -> Float[Tensor, "row k"]:
    """`<W[indices[t, i]], rows[t]>`: the gradient of `decode` in its values."""
    if not is_dense(indices, len(W)):  # by torch's own backward of embedding_bag, which gathers nothing
        with torch.enable_grad():
            weights = rows.new_ones(indices.shape).requires_grad_()
            bag = embedding_bag(indices, W.detach(), per_sample_weights=weights, mode="sum")
            return torch.autograd.grad(bag, weights, rows)[0]
    out = rows.new_empty(indices.shape)
    for part in chunks(len(rows), len(W)):
        out[part] = (rows[part] @ W.T).gather(1, indices[part])
    return out


def latent_gradient(
    weights: Float[Tensor, "row k"], indices: Int[Tensor, "row k"], rows: Float[Tensor, "row d_model"], n_latents: int
) -> tuple[Float[Tensor, "n_latents d_model"], Float[Tensor, " n_latents"]]:
    """For each latent, the weighted sum of the rows it is active in, a weight matrix's gradient, and the sum of weights."""
    if is_dense(indices, n_latents):
        gradient, sums = rows.new_zeros(n_latents, rows.shape[1]), rows.new_zeros(n_latents)
        for part in chunks(len(rows), n_latents):
            dense = to_dense(weights[part], indices[part], n_latents)
            gradient.addmm_(dense.T, rows[part])
            sums += dense.sum(0)
        return gradient, sums
    latents, order = torch.sort(indices.flatten(), stable=True)
    starts = torch.searchsorted(latents, torch.arange(n_latents, device=latents.device))
    row_of_pair = order.div(indices.shape[1], rounding_mode="floor")
    weights = weights.flatten()[order]
    gradient = embedding_bag(row_of_pair, rows, starts, per_sample_weights=weights, mode="sum")
    pairs = torch.arange(len(order), device=order.device)
    return gradient, embedding_bag(pairs, weights[:, None], starts, mode="sum").squeeze(1)


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
    recon = decode(values.flatten(0, 1), indices.flatten(0, 1), W_dec).view_as(resid)
    recon = (recon if bias is None else recon.add_(bias)).mul_(scale)
    error = torch.sub(resid, recon if shift is None else recon.add_(shift), out=recon)
    squared = error.square().sum((1, 2))
    if not want_dots:
        return error, squared, None
    return error, squared, dots(indices.flatten(0, 1), W_dec, error.flatten(0, 1)).view_as(values)


def to_dense(values: Float[Tensor, "row k"], indices: Int[Tensor, "row k"], n_latents: int) -> Tensor:
    """A code as `[row, n_latents]`: for a chunk of rows only."""
    return values.new_zeros(len(values), n_latents).scatter_add_(1, indices, values)


def chunks(n_rows: int, n_latents: int) -> list[slice]:
    """Runs of rows whose dense code has at most CHUNK_ENTRIES entries, or of one row."""
    size = max(1, CHUNK_ENTRIES // n_latents)
    return [slice(start, start + size) for start in range(0, n_rows, size)]


def is_dense(indices: Tensor, n_latents: int) -> bool:
    return indices.shape[-1] * DENSE_SHARE > n_latents
