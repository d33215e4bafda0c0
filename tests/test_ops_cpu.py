"""The CPU kernels beyond what all implementations share: the int8 certificate, ties, NaN, threads, and who is chosen."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsae import ops
from mlsae.errors import ConfigError
from mlsae.ops import cpu, reference

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason="the kernels are not built")
screening = pytest.mark.skipif(
    cpu.missing() is not None or not cpu.screens(), reason="this machine has no AVX-512 VNNI"
)


def assert_is_top(x, W, values, indices):
    """Each row's values are its products, rectified, and no latent left out has a larger one: in float64, up to rounding."""
    exact = x.double() @ W.double().T
    slack = 1e-5 * x.double().norm(dim=1, keepdim=True) * W.double().norm(dim=1).max() + 1e-30
    chosen = exact.gather(1, indices)
    assert all(len(set(row)) == len(row) for row in indices.tolist())
    assert ((values - chosen.clamp_min(0)).abs() <= slack).all()
    left = exact.scatter(1, indices, -torch.inf).amax(1, keepdim=True)
    assert (chosen.amin(1, keepdim=True) >= left - 2 * slack).all()


def rows_of_kind(kind, n_rows, n_latents, d):
    torch.manual_seed(len(kind))
    x, W = torch.randn(n_rows, d), torch.randn(n_latents, d) / d**0.5
    if kind == "outlying dimensions":
        x[:, 3] *= 500
        x[::7, 5] *= 1e4
    elif kind == "outlying rows":
        x[::3] *= 10.0 ** torch.arange(-20, 20).repeat(20)[: len(x[::3]), None]
    elif kind == "latents of all sizes":
        W *= 10.0 ** torch.linspace(-6, 6, n_latents)[:, None]
    elif kind == "near copies":
        W = W[:1] + 1e-5 * W
    elif kind == "zeros":
        x[::2], W[1::2] = 0, 0
    elif kind == "one-hot":
        x = torch.eye(d)[torch.arange(n_rows) % d]
    elif kind == "tiny":
        x, W = 1e-42 * x, 1e-33 * W
    elif kind == "huge":
        x, W = 1e17 * x, 1e17 * W
    elif kind == "all negative":
        x, W = x.abs(), -W.abs()
    return x, W


KINDS = [
    "normal",
    "outlying dimensions",
    "outlying rows",
    "latents of all sizes",
    "near copies",
    "zeros",
    "one-hot",
    "tiny",
    "huge",
    "all negative",
]


@screening
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(300, 1500, 64, 7), (257, 2300, 100, 32), (256, 256, 16, 1)])
def test_screened_rows_are_the_exact_top_k(kind, size):
    *shape, k = size
    x, W = rows_of_kind(kind, *shape)
    values, indices, rescored = cpu.top_k(x, W, k)
    assert_is_top(x, W, values, indices)
    assert (rescored >= k).all()


@screening
@settings(max_examples=60, deadline=None)
@given(
    st.integers(256, 400), st.integers(256, 2500), st.integers(1, 200), st.integers(1, 32), st.sampled_from(KINDS),
    st.integers(0, 10**6),
)  # fmt: skip
def test_no_generated_case_escapes_the_certificate(n_rows, n_latents, d, k, kind, seed):
    torch.manual_seed(seed)
    x, W = rows_of_kind(kind, n_rows, n_latents, max(d, 6))
    values, indices, _ = cpu.top_k(x, W, k)
    assert_is_top(x, W, values, indices)


@screening
def test_screening_is_what_ran_and_leaves_few_to_rescore():
    """Otherwise the tests above would prove nothing of it."""
    x, W = rows_of_kind("normal", 512, 4096, 128)
    _, _, rescored = cpu.top_k(x, W, 32)
    assert rescored.min() >= 32
    assert rescored.float().mean() < 0.1 * 4096
    x, W = rows_of_kind("outlying dimensions", 512, 4096, 128)
    assert cpu.top_k(x, W, 32)[2].float().mean() < 0.2 * 4096


@screening
def test_rows_without_a_proof_are_multiplied_in_float32():
    """2,000 latents within int8's error of each other leave too many in doubt."""
    x, W = rows_of_kind("near copies", 300, 2000, 64)
    values, indices, rescored = cpu.top_k(x, W, 32)
    assert (rescored == 2000).all()
    assert_is_top(x, W, values, indices)


@pytest.mark.parametrize("n_rows", [3, 300])
def test_ties_go_to_the_lowest_latents(n_rows):
    """Integers are multiplied exactly, so that equal products are equal."""
    W = torch.randint(-2, 3, (40, 8)).float().repeat(20, 1)
    x = torch.randint(-2, 3, (n_rows, 8)).float()
    values, indices, _ = cpu.top_k(x, W, 25)
    order = torch.sort(-(x @ W.T), dim=1, stable=True).indices[:, :25]
    assert torch.equal(indices.sort(1).values, order.sort(1).values)
    assert torch.equal(values, (x @ W.T).gather(1, indices).relu())


@pytest.mark.parametrize("size", [(9, 70), (300, 700)])
def test_what_is_not_finite_reaches_the_values(size):
    x, W = torch.randn(size[0], 20), torch.randn(size[1], 20)
    for value in (torch.nan, torch.inf):
        bad = x.clone()
        bad[4, 3] = value
        values, _, _ = cpu.top_k(bad, W, 5)
        assert not values[4].isfinite().all()
        assert values[torch.arange(size[0]) != 4].isfinite().all()
        worse = W.clone()
        worse[6, 2] = torch.nan
        assert cpu.top_k(x, worse, 5)[0].isnan().any(1).all()


def test_threads_and_splits_change_no_bit(monkeypatch):
    """Each row and each latent is one thread's work from beginning to end."""
    x, W = rows_of_kind("normal", 700, 1300, 72)

    def everything():
        values, indices, _ = cpu.top_k(x, W, 16)
        gradient, sums = cpu.latent_gradient(values, indices, x, 1300)
        return values, indices, gradient, sums, cpu.decode(values, indices, W), cpu.dots(indices, W, x)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = everything()
    for n_threads in (2, 3, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n_threads: n)
        assert all(torch.equal(a, b) for a, b in zip(alone, everything(), strict=True))


@pytest.mark.parametrize("level", cpu.built())
def test_project_and_adam_are_torchs(level, monkeypatch):
    """Five steps from the same start: torch.optim.Adam on the projected, scaled gradient, then unit rows."""
    if cpu.LEVELS.index(level) > cpu.load("portable").level():
        pytest.skip("this machine has no such instructions")
    monkeypatch.setattr(cpu, "best_level", lambda: level)
    torch.manual_seed(0)
    ours = torch.nn.functional.normalize(torch.randn(37, 67))
    ours[5] = 0
    theirs = ours.double().requires_grad_()
    adam = torch.optim.Adam([theirs], lr=0.01, betas=(0.8, 0.95), eps=1e-9)
    moments = {"step": torch.tensor(0.0), "exp_avg": torch.zeros(37, 67), "exp_avg_sq": torch.zeros(37, 67)}
    for _ in range(5):
        gradient = torch.randn(37, 67)
        gradient[5] = 0
        rows = theirs.detach()
        theirs.grad = 0.3 * (gradient.double() - (gradient * rows).sum(1, keepdim=True) * rows)
        along, norm = cpu.project(ours, gradient, unit=True)
        assert 0.3 * norm == pytest.approx(float(theirs.grad.norm()), rel=1e-5)
        cpu.adam_(ours, gradient, moments, along, unit=True, factor=0.3, lr=0.01, betas=(0.8, 0.95), eps=1e-9)
        adam.step()
        with torch.no_grad():
            theirs /= theirs.norm(dim=1, keepdim=True).clamp_min(1e-300)
        torch.testing.assert_close(ours.double(), theirs.detach(), rtol=0, atol=1e-6)
    assert not ours[5].any()
    assert float(moments["step"]) == 5


# ---- who is chosen ---------------------------------------------------------------------------------------------------


def test_auto_takes_the_kernels_for_float32_on_a_cpu_and_the_definition_otherwise():
    assert ops.choose("auto", torch.zeros(1)) is cpu
    assert ops.choose("auto", torch.zeros(1).double()) is reference
    assert ops.choose("reference", torch.zeros(1)) is reference
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.choose("auto", torch.zeros(1)) is reference


def test_tensors_of_two_kinds_are_left_to_torch():
    """A kernel would read float64 as if it were float32."""
    assert ops.choose("auto", torch.zeros(1), torch.zeros(1).double()) is reference
    with pytest.raises(ConfigError, match="only float32 is done"):
        ops.choose("cpu", torch.zeros(1), torch.zeros(1).double())


def test_an_unfit_choice_is_refused_with_its_reason():
    with pytest.raises(ConfigError, match=r"impl: 'cpu' cannot be used: only float32 is done.*use auto or reference"):
        ops.choose("cpu", torch.zeros(1).double())


def test_without_a_compiler_auto_is_the_definition(monkeypatch):
    monkeypatch.setattr(cpu, "built", lambda: ())
    assert ops.choose("auto", torch.zeros(1)) is reference
    with pytest.raises(ConfigError, match="for want of a C\\+\\+ compiler"):
        ops.choose("cpu", torch.zeros(1))


def test_the_choice_is_said_once(caplog):
    ops._say_once.cache_clear()
    with caplog.at_level("INFO", logger="mlsae"):
        ops.choose("auto", torch.zeros(1))
        ops.choose("auto", torch.zeros(1))
    assert [record.getMessage() for record in caplog.records] == ["sparse ops: cpu"]


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_fork_has_threads_of_its_own():
    """A forked worker of a data loader inherits no thread, and must not wait for one."""
    import os

    x, W = torch.randn(300, 20), torch.randn(700, 20)
    want = cpu.top_k(x, W, 5)[0]
    pid = os.fork()
    if pid == 0:
        os._exit(0 if torch.equal(cpu.top_k(x, W, 5)[0], want) else 1)
    assert os.waitpid(pid, 0)[1] == 0
