"""The sparse ops against an obvious dense definition in float64: outputs, and every output's gradient."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mlsae import ops
from mlsae.ops import reference

torch.set_num_threads(1)
SIZES = [(41, 1271, 67, 13), (1, 5, 3, 5), (257, 33, 17, 1), (7, 64, 16, 64), (0, 9, 4, 2)]
"""Rows, latents, width, k."""


def dense_encode(x, W_enc, k):
    """[row, n_latents], zero off the code."""
    pre_acts = x @ W_enc.T
    kept = torch.zeros_like(pre_acts).scatter(1, pre_acts.topk(k, dim=1).indices, 1)
    return (pre_acts * kept).relu()


def dense(values, indices, n_latents):
    return values.new_zeros(values.shape[0], n_latents).scatter_add(1, indices, values)


def encode(x, W_enc, k, impl="auto"):
    """The op on rows alone: one layer, no frame, no bias."""
    shift, divisor, bias = x.new_zeros(1, 1, 1), x.new_ones(1, 1, 1), x.new_zeros(x.shape[1])
    values, indices = ops.encode(x[None], shift, divisor, bias, W_enc, k, impl)
    return values[0], indices[0]


def op_encode(x, W_enc, k):
    """The op's code, made dense so that the order of its k entries does not matter."""
    return dense(*encode(x, W_enc, k), len(W_enc))


def outputs_and_grads(fn, dtype, cotangent, *inputs):
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = fn(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, cotangent.to(dtype))


def assert_all_close(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        size = b.square().mean().sqrt().item() if b.numel() else 0.0
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * size)


def encode_case(rows, n_latents, d_model, dtype=torch.float32):
    torch.manual_seed(rows + n_latents)
    x, W_enc = torch.randn(rows, d_model), torch.randn(n_latents, d_model) / d_model**0.5
    return x.to(dtype), W_enc.to(dtype), torch.randn(rows, n_latents).to(dtype)


def decode_case(rows, n_latents, d_model, k):
    """k distinct latents a row, some of value 0."""
    torch.manual_seed(rows + n_latents)
    indices = torch.rand(rows, n_latents).argsort(1)[:, :k]
    return torch.randn(rows, k).relu(), indices, torch.randn(n_latents, d_model), torch.randn(rows, d_model)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("size", SIZES)
def test_encode_is_the_dense_definition(size, dtype, tolerance):
    rows, n_latents, d_model, k = size
    x, W_enc, cotangent = encode_case(rows, n_latents, d_model)
    want = outputs_and_grads(lambda x, W: dense_encode(x, W, k), torch.float64, cotangent, x, W_enc)
    got = outputs_and_grads(lambda x, W: op_encode(x, W, k), dtype, cotangent, x, W_enc)
    assert_all_close(got, want, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("size", SIZES)
def test_decode_is_the_dense_definition(size, dtype, tolerance):
    rows, n_latents, d_model, k = size
    values, indices, W_dec, cotangent = decode_case(rows, n_latents, d_model, k)

    def definition(values, W_dec):
        return dense(values, indices, n_latents) @ W_dec

    def op(values, W_dec):
        return ops.decode(values, indices, W_dec)

    want = outputs_and_grads(definition, torch.float64, cotangent, values, W_dec)
    got = outputs_and_grads(op, dtype, cotangent, values, W_dec)
    assert_all_close(got, want, tolerance)


def test_decode_counts_a_repeated_latent_twice():
    values, indices = torch.tensor([[1.0, 2.0]]), torch.tensor([[3, 3]])
    W_dec = torch.randn(4, 5)
    torch.testing.assert_close(ops.decode(values, indices, W_dec)[0], 3 * W_dec[3])


def test_latent_gradient_is_the_transposed_product():
    values, indices, _, rows = decode_case(41, 127, 67, 13)
    want = dense(values.double(), indices, 127).T @ rows.double()
    got, sums = reference.latent_gradient(values.double(), indices, rows.double(), 127)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sums, dense(values.double(), indices, 127).sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("entries", [1, 50, 4 * 127, 40 * 127, 41 * 127])
def test_chunk_boundaries_do_not_show(monkeypatch, entries):
    x, W_enc, cotangent = encode_case(41, 127, 67, torch.float64)
    want = outputs_and_grads(lambda x, W: dense_encode(x, W, 7), torch.float64, cotangent, x, W_enc)
    monkeypatch.setattr(reference, "CHUNK_ENTRIES", entries)
    got = outputs_and_grads(lambda x, W: op_encode(x, W, 7), torch.float64, cotangent, x, W_enc)
    assert_all_close(got, want, 1e-12)


def test_derivatives_are_those_of_the_op():
    x, W_enc, _ = encode_case(5, 11, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda x, W: op_encode(x, W, 3), (x.requires_grad_(), W_enc.requires_grad_()))
    values, indices, W_dec, _ = decode_case(5, 11, 4, 3)
    values, W_dec = (values + 0.1).double().requires_grad_(), W_dec.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v, W: ops.decode(v, indices, W), (values, W_dec))


@pytest.mark.parametrize("wanted", [0, 1])
def test_only_the_wanted_gradient_is_computed(wanted):
    inputs = list(encode_case(5, 11, 4)[:2])
    inputs[wanted].requires_grad_()
    encode(*inputs, 3)[0].sum().backward()
    assert inputs[wanted].grad is not None
    assert inputs[1 - wanted].grad is None


def test_rows_with_fewer_than_k_positive_entries():
    """Values are zero, never negative, latents still distinct, and zero values pass no gradient."""
    x = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    W_enc = torch.tensor([[1.0], [2.0], [-3.0], [-4.0]], requires_grad=True)
    values, indices = encode(x, W_enc, 3)
    assert [sorted(row) for row in values.tolist()] == [[0, 1, 2], [0, 3, 4], [0, 0, 0]]
    assert all(len(set(row)) == 3 for row in indices.tolist())
    assert not indices.requires_grad
    values.sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [3, -7, 0]
    assert W_enc.grad is not None
    assert W_enc.grad.flatten().tolist() == [1, 1, -1, -1]


class LargestTensor(TorchDispatchMode):
    """Records the largest output of any operation that runs under it, backward passes included."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_nothing_holds_all_pre_activations(monkeypatch):
    """Neither pass makes a [row, n_latents] tensor beyond a chunk, nor gathers [row, k, d_model] rows of weights."""
    rows, n_latents, d_model, k = 300, 400, 20, 8
    monkeypatch.setattr(reference, "CHUNK_ENTRIES", 16 * n_latents)
    x, W_enc, _ = encode_case(rows, n_latents, d_model)
    W_dec = torch.randn(n_latents, d_model, requires_grad=True)
    x.requires_grad_()
    W_enc.requires_grad_()
    with LargestTensor() as seen:
        ops.decode(*encode(x, W_enc, k), W_dec).sum().backward()
    assert seen.numel <= max(16 * n_latents, n_latents * d_model, rows * d_model)
    with LargestTensor() as seen:
        dense_encode(x.detach(), W_enc.detach(), k)
    assert seen.numel == rows * n_latents  # the recorder does record
