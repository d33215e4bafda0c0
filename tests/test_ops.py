"""The ops, by every implementation for the CPU, against an obvious dense definition in float64: outputs and every gradient."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mlsae import ops
from mlsae.ops import cpu, reference

torch.set_num_threads(1)
SIZES = [
    (41, 1271, 67, 13),
    (1, 5, 3, 5),
    (257, 33, 17, 1),
    (7, 64, 16, 64),
    (0, 9, 4, 2),
    (301, 1271, 67, 13),
    (259, 640, 576, 32),
]
"""Rows, latents, width, k; the last two are large enough to be screened in int8."""
LEVELS = (
    [level for level in cpu.built() if level in cpu.LEVELS[: cpu.load("portable").level() + 1]] if cpu.built() else []
)
"""The instruction sets that can be tested here."""
IMPLS = ["reference", *LEVELS]
PRECISIONS = [("reference", torch.float64, 1e-12), *((impl, torch.float32, 2e-5) for impl in IMPLS)]


@pytest.fixture
def impl(request, monkeypatch):
    """`reference`, or `cpu` at a level of instructions; all memory that it makes holds NaN, or absurd integers."""
    if request.param == "reference":
        return "reference"
    monkeypatch.setattr(cpu, "best_level", lambda: request.param)
    monkeypatch.setattr(torch, "empty", poisoned)
    return "cpu"


def poisoned(*size, empty=torch.empty, **kwargs):
    out = empty(*size, **kwargs)
    return out.fill_(torch.nan if out.is_floating_point() else 101)


def dense_encode(x, W_enc, k):
    """[row, n_latents], zero off the code."""
    pre_acts = x @ W_enc.T
    kept = torch.zeros_like(pre_acts).scatter(1, pre_acts.topk(k, dim=1).indices, 1)
    return (pre_acts * kept).relu()


def dense(values, indices, n_latents):
    return values.new_zeros(values.shape[0], n_latents).scatter_add(1, indices, values)


def encode(x, W_enc, k, impl="reference"):
    """The op on rows alone: one layer, no frame, no bias."""
    shift, divisor, bias = x.new_zeros(1, 1, 1), x.new_ones(1, 1, 1), x.new_zeros(x.shape[1])
    values, indices = ops.encode(x[None], shift, divisor, bias, W_enc, k, impl)
    return values[0], indices[0]


def op_encode(x, W_enc, k, impl="reference"):
    """The op's code, made dense so that the order of its k entries does not matter."""
    return dense(*encode(x, W_enc, k, impl), len(W_enc))


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


@pytest.mark.parametrize(("impl", "dtype", "tolerance"), PRECISIONS, indirect=["impl"])
@pytest.mark.parametrize("size", SIZES)
def test_encode_is_the_dense_definition(size, impl, dtype, tolerance):
    rows, n_latents, d_model, k = size
    x, W_enc, cotangent = encode_case(rows, n_latents, d_model)
    want = outputs_and_grads(lambda x, W: dense_encode(x, W, k), torch.float64, cotangent, x, W_enc)
    got = outputs_and_grads(lambda x, W: op_encode(x, W, k, impl), dtype, cotangent, x, W_enc)
    assert_all_close(got, want, tolerance)


@pytest.mark.parametrize(("impl", "dtype", "tolerance"), PRECISIONS, indirect=["impl"])
@pytest.mark.parametrize("size", SIZES)
def test_decode_is_the_dense_definition(size, impl, dtype, tolerance):
    rows, n_latents, d_model, k = size
    values, indices, W_dec, cotangent = decode_case(rows, n_latents, d_model, k)

    def definition(values, W_dec):
        return dense(values, indices, n_latents) @ W_dec

    def op(values, W_dec):
        return ops.decode(values, indices, W_dec, impl)

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


# ---- decode and error in one -----------------------------------------------------------------------------------------

FRAMES = {"layer": ((3, 1, -1), (3, 1, 1)), "vector": ((3, -2, 1), (3, -2, 1)), "none": ((1, 1, 1), (1, 1, 1))}
"""Shapes of shift and scale; -1 stands for d_model, -2 for the tokens."""


def error_case(n_tokens, n_latents, d_model, k, frame):
    """3 layers: values, W_dec, bias (what is differentiated), and indices, resid, shift, scale."""
    values, indices, W_dec, resid = decode_case(3 * n_tokens, n_latents, d_model, k)
    shapes = [[{-1: d_model, -2: n_tokens}.get(size, size) for size in shape] for shape in FRAMES[frame]]
    shift, scale = torch.randn(shapes[0]), torch.rand(shapes[1]) + 0.5
    values, indices, resid = (t.view(3, n_tokens, t.shape[1]) for t in (values, indices, resid))
    return (values, W_dec, torch.randn(d_model)), (indices, resid, shift, scale)


def dense_error(values, W_dec, bias, indices, resid, shift, scale):
    recon = (dense(values.flatten(0, 1), indices.flatten(0, 1), len(W_dec)) @ W_dec).view_as(resid)
    error = resid - ((recon + bias) * scale + shift)
    return error, error.square().sum((1, 2))


@pytest.mark.parametrize("cotangents", ["squared", "error", "both"])
@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("size", [(41, 1271, 67, 13), (1, 5, 3, 5), (9, 700, 576, 32), (0, 9, 4, 2)])
@pytest.mark.parametrize(("impl", "dtype", "tolerance"), PRECISIONS, indirect=["impl"])
def test_decode_error_is_the_dense_definition(impl, dtype, tolerance, size, frame, cotangents):
    """Outputs and gradients of a loss of the squares alone, of the error alone, and of both."""
    inputs, others = error_case(*size, frame)
    weights = torch.randn(3, size[0], size[2]), torch.randn(3)

    def loss(error, squared):
        parts = [(error * weights[0].to(error)).sum(), (squared * weights[1].to(error)).sum()]
        return sum(part for part, name in zip(parts, ("error", "squared")) if cotangents in (name, "both"))

    def run(fn, dtype):
        differentiated = [t.detach().to(dtype).requires_grad_() for t in inputs]
        outputs = fn(*differentiated, *(t if t.dtype == torch.int64 else t.to(dtype) for t in others))
        return *(t.detach() for t in outputs), *torch.autograd.grad(loss(*outputs), differentiated)

    def op(values, W_dec, bias, indices, resid, shift, scale):
        return ops.decode_error(values, indices, W_dec, bias, resid, shift, scale, impl)

    assert_all_close(run(op, dtype), run(dense_error, torch.float64), tolerance)


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("impl", IMPLS, indirect=True)
def test_encode_frames_its_rows(impl, frame):
    """`(resid - shift) / divisor - bias`, by the bias's gradient too; in screened sizes as in others."""
    for n_tokens in (9, 100):
        (_, W_enc, bias), (_, resid, shift, scale) = error_case(n_tokens, 700, 67, 5, frame)
        x = ((resid.double() - shift) / scale - bias).flatten(0, 1)
        want = dense_encode(x, W_enc.double(), 5)
        bias.requires_grad_()
        values, indices = ops.encode(resid, shift, scale, bias, W_enc, 5, impl)
        torch.testing.assert_close(
            dense(values.flatten(0, 1), indices.flatten(0, 1), 700).double(), want, rtol=1e-4, atol=1e-4
        )
        values.sum().backward()
        assert_all_close([bias.grad], [-((want > 0).double() @ W_enc.double()).sum(0)], 1e-4)


@pytest.mark.parametrize("impl", IMPLS, indirect=True)
def test_a_latent_out_of_range_is_refused(impl):
    """Where the definition refuses it: a kernel would read what is not its own."""
    values, indices, W_dec, _ = decode_case(4, 40, 5, 3)
    for wrong in (-1, 40):
        indices[2, 1] = wrong
        with pytest.raises((IndexError, RuntimeError)):
            ops.decode(values, indices, W_dec, impl)


@pytest.mark.parametrize("impl", IMPLS, indirect=True)
def test_inputs_may_lie_in_memory_as_they_like(impl):
    """Transposed, strided, and expanded from one number, as the gradient of a sum is: no kernel reads what is not there."""
    values, indices, W_dec, rows = decode_case(40, 300, 24, 6)
    values, W = values.T.contiguous().T.requires_grad_(), W_dec.T.contiguous().T.requires_grad_()
    ops.decode(values, indices.T.contiguous().T, W, impl).sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, W_dec.sum(1)[indices], rtol=1e-5, atol=1e-5)
    assert W.grad is not None
    torch.testing.assert_close(W.grad, dense(values, indices, 300).sum(0)[:, None].expand_as(W).detach())
    wide = torch.stack([rows, rows], 2)[..., 0]
    scale = torch.full((1, 1, 1), 2.0).expand(1, 40, 1)
    error, _ = ops.decode_error(values[None], indices[None], W, None, wide[None], None, scale, impl)
    torch.testing.assert_close(error[0], rows - 2 * (dense(values, indices, 300) @ W_dec))
