"""The derivatives of the ops, written once, for whichever kernels compute them.

`kernels` is one of the modules `reference`, `cpu` and `gpu`, which hold the same functions. All gradients are sums over the pairs
that are active: a rectified value, and whatever the top k left out, passes none.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import mlsae.ops.reference as reference

Grads = tuple[Tensor | None, ...]


def suited(kernels: Any, indices: Tensor, W: Tensor) -> Any:
    """The kernels, or, for a code with so many latents active that dense products are best, torch."""
    return reference if reference.is_dense(indices, len(W)) else kernels


class Encode(torch.autograd.Function):
    """`values, indices = encode(...)`, differentiable in resid (where it has no frame), bias and W_enc."""

    @staticmethod
    def forward(
        ctx: Any, kernels: Any, resid: Tensor, shift: Any, divisor: Any, bias: Tensor, W_enc: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        values, indices, x = kernels.encode(resid, shift, divisor, bias, W_enc, k)
        ctx.kernels = suited(kernels, indices, W_enc)
        ctx.save_for_backward(x, W_enc, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Grads:
        x, W_enc, values, indices = ctx.saved_tensors
        _, of_resid, _, _, of_bias, of_W, _ = ctx.needs_input_grad
        grad_pre_acts = (grads[0] * (values > 0)).flatten(0, 1)
        indices = indices.flatten(0, 1)
        grad_resid = grad_bias = grad_W = None
        if of_resid:
            grad_resid = ctx.kernels.decode(grad_pre_acts, indices, W_enc).view_as(x)
        if of_bias or of_W:
            grad_W, sums = ctx.kernels.latent_gradient(grad_pre_acts, indices, x.flatten(0, 1), len(W_enc))
            grad_bias = -(sums @ W_enc)
        return None, grad_resid, None, None, grad_bias, grad_W if of_W else None, None


class Decode(torch.autograd.Function):
    """`decode(values, indices, W)`, differentiable in values and W."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
        ctx.kernels = suited(kernels, indices, W)
        ctx.save_for_backward(values, indices, W)
        return ctx.kernels.decode(values, indices, W)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Grads:
        values, indices, W = ctx.saved_tensors
        grad_values = ctx.kernels.dots(indices, W, grads[0]) if ctx.needs_input_grad[1] else None
        grad_W = ctx.kernels.latent_gradient(values, indices, grads[0], len(W))[0] if ctx.needs_input_grad[3] else None
        return None, grad_values, None, grad_W


class DecodeError(torch.autograd.Function):
    """`error, squared = decode_error(...)`, differentiable in values, W_dec and bias.

    A loss of `squared` alone needs only the products that the forward pass took of each error with its own decoder rows; one
    that also looks at `error` takes them again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Any,
        values: Tensor,
        indices: Tensor,
        W_dec: Tensor,
        bias: Tensor | None,
        resid: Tensor,
        shift: Tensor | None,
        scale: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.kernels, want_dots = suited(kernels, indices, W_dec), ctx.needs_input_grad[1]
        error, squared, ctx.dots = ctx.kernels.decode_error(
            values, indices, W_dec, bias, resid, shift, scale, want_dots
        )
        ctx.save_for_backward(values, indices, W_dec, scale, error)
        ctx.set_materialize_grads(False)
        return error, squared

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Grads:
        values, indices, W_dec, scale, error = ctx.saved_tensors
        (grad_error, grad_squared), dots = grads, ctx.dots
        if grad_error is None:  # d loss / d decoded = rows * weight, with weight [layer, token, 1]
            rows, weight = error, -2 * grad_squared[:, None, None] * scale
        else:
            twice = 0.0 if grad_squared is None else 2 * grad_squared[:, None, None]
            rows, weight, dots = grad_error + twice * error, -scale, None
        weight = weight.expand(*values.shape[:2], 1)
        rows, indices = rows.flatten(0, 1), indices.flatten(0, 1)
        grad_values = grad_W = grad_bias = None
        if ctx.needs_input_grad[1]:
            dots = ctx.kernels.dots(indices, W_dec, rows).view_as(values) if dots is None else dots
            grad_values = dots * weight
        if ctx.needs_input_grad[3]:
            grad_W = ctx.kernels.latent_gradient((values * weight).flatten(0, 1), indices, rows, len(W_dec))[0]
        if ctx.needs_input_grad[4]:
            grad_bias = weight.flatten() @ rows
        return None, grad_values, None, grad_W, grad_bias, None, None, None
