"""The definition of every op, in plain torch. Nothing here ever holds more than a chunk of `[row, n_latents]`.

A row is one residual vector. The weight gradients are sums over the (row, latent) pairs that are active, k a row: sorted by
latent they are one `embedding_bag`, which is what makes the backward pass cost a fraction of the encoder's one product.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

CHUNK_ENTRIES = 1 << 22
"""Pre-activations held at a time (16 MiB in float32)."""


def encode_topk(
    x: Float[Tensor, "row d_model"], W_enc: Float[Tensor, "n_latents d_model"], k: int
) -> tuple[Float[Tensor, "row k"], Int[Tensor, "row k"]]:
    """The k largest entries of `x @ W_enc.T` in each row, rectified, and their latent ids; differentiable in x and W_enc."""
    return _EncodeTopK.apply(x, W_enc, k)


def sparse_decode(
    values: Float[Tensor, "row k"], indices: Int[Tensor, "row k"], W_dec: Float[Tensor, "n_latents d_model"]
) -> Float[Tensor, "row d_model"]:
    """`sum_i values[:, i] * W_dec[indices[:, i]]`; differentiable in values and W_dec."""
    return _SparseDecode.apply(values, indices, W_dec)


def latent_gradient(
    weights: Float[Tensor, "row k"], indices: Int[Tensor, "row k"], rows: Float[Tensor, "row d_model"], n_latents: int
) -> Float[Tensor, "n_latents d_model"]:
    """For each latent, the sum of the rows it is active in, weighted: the gradient of either weight matrix."""
    latents, order = torch.sort(indices.flatten(), stable=True)
    starts = torch.searchsorted(latents, torch.arange(n_latents, device=latents.device))
    row_of_pair = order.div(indices.shape[1], rounding_mode="floor")
    return embedding_bag(row_of_pair, rows, starts, per_sample_weights=weights.flatten()[order], mode="sum")


def _weighted_sum(weights: Tensor, indices: Tensor, matrix: Tensor) -> Tensor:
    return embedding_bag(indices, matrix, per_sample_weights=weights, mode="sum")


class _EncodeTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values = x.new_empty(x.shape[0], k)
        indices = torch.empty(x.shape[0], k, dtype=torch.int64, device=x.device)
        chunk = max(1, CHUNK_ENTRIES // W_enc.shape[0])
        for start in range(0, x.shape[0], chunk):
            rows = slice(start, start + chunk)
            pre_acts = x[rows] @ W_enc.T
            top = pre_acts.topk(k, dim=-1, sorted=False)
            values[rows], indices[rows] = top.values.relu(), top.indices
        ctx.save_for_backward(x, W_enc, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None]:
        x, W_enc, values, indices = ctx.saved_tensors
        grad_pre_acts = grads[0] * (values > 0)
        grad_x = _weighted_sum(grad_pre_acts, indices, W_enc) if ctx.needs_input_grad[0] else None
        grad_W = latent_gradient(grad_pre_acts, indices, x, len(W_enc)) if ctx.needs_input_grad[1] else None
        return grad_x, grad_W, None


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, W_dec)
        return _weighted_sum(values, indices, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, None, Tensor | None]:
        values, indices, W_dec = ctx.saved_tensors
        (grad_recon,) = grads
        grad_values = _rows_dot(indices, W_dec, grad_recon) if ctx.needs_input_grad[0] else None
        grad_W = latent_gradient(values, indices, grad_recon, len(W_dec)) if ctx.needs_input_grad[2] else None
        return grad_values, None, grad_W


def _rows_dot(indices: Tensor, W_dec: Tensor, grad_recon: Tensor) -> Tensor:
    """`<W_dec[indices[t, i]], grad_recon[t]>`, by torch's own backward of embedding_bag, which gathers nothing."""
    with torch.enable_grad():
        weights = grad_recon.new_ones(indices.shape).requires_grad_()
        return torch.autograd.grad(_weighted_sum(weights, indices, W_dec.detach()), weights, grad_recon)[0]
