"""The encoders of SAEs trained elsewhere: a bias for each latent, or a threshold for each instead of the k largest.

Plain torch, a chunk of `[row, n_latents]` at a time; the SAEs that are trained here have neither, and kernels of their own.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mlsae.ops import reference

Pairs = tuple[Float[Tensor, "row width"], Int[Tensor, "row width"]]


def encode(
    x: Float[Tensor, "row d_model"],
    W_enc: Float[Tensor, "n_latents d_model"],
    b_enc: Float[Tensor, " n_latents"] | None,
    threshold: Float[Tensor, " n_latents"] | None,
    k: int,
) -> Pairs:
    """Of `x @ W_enc.T + b_enc` in each row: the k largest, rectified, or those above both their threshold and zero.

    With thresholds a row is as wide as the fullest one needs; the rest of it is latent 0 with value 0, which is not active.
    Differentiable in x and the weights, not in what is selected.
    """
    with torch.no_grad():
        parts = [
            _largest(x[rows] @ W_enc.T if b_enc is None else torch.addmm(b_enc, x[rows], W_enc.T), threshold, k)
            for rows in reference.chunks(len(x), len(W_enc))
        ]
        width = max((values.shape[1] for values, _ in parts), default=1)
        values, indices = (
            torch.cat([widened(tensors[i], width) for tensors in parts])
            if parts
            else x.new_zeros(0, width, dtype=(x.dtype, torch.int64)[i])
            for i in range(2)
        )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, W_enc, b_enc)):
        again = torch.einsum("rwd,rd->rw", W_enc[indices], x)
        values = (again if b_enc is None else again + b_enc[indices]) * (values > 0)
    return values, indices


def widened(tensor: Tensor, width: int) -> Tensor:
    """With zeros added at the end of every row."""
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1]))


def _largest(pre_acts: Float[Tensor, "row n_latents"], threshold: Tensor | None, k: int) -> Pairs:
    if threshold is None:
        top = pre_acts.topk(k, dim=-1)
        return top.values.relu(), top.indices
    active = (pre_acts > threshold.clamp_min(0)).nonzero()
    counts = torch.bincount(active[:, 0], minlength=len(pre_acts))
    place = torch.arange(len(active), device=pre_acts.device) - (counts.cumsum(0) - counts)[active[:, 0]]
    values = pre_acts.new_zeros(len(pre_acts), max(1, int(counts.max())))
    indices = torch.zeros_like(values, dtype=torch.int64)
    indices[active[:, 0], place] = active[:, 1]
    values[active[:, 0], place] = pre_acts[active[:, 0], active[:, 1]]
    return values, indices
