"""Losses and their gradients against the NumPy oracle, and the laws that the equations imply."""

import numpy as np
import pytest
import torch

import oracle
from mlsae.config import MLSAEConfig
from mlsae.losses import AUX, RECONSTRUCTION, all_scalars, aux_framed, aux_residual, per_dimension
from mlsae.recipes import RECIPES
from mlsae.sae import MLSAE

torch.set_num_threads(1)
FRAMES = ("layer", "vector", "none")


def random_resid(rng, n_layers, n_tokens, d_model):
    """Layers of different size and offset, as in a language model."""
    size = 2.0 ** np.arange(n_layers)[:, None, None]
    return size * (rng.normal(size=(n_layers, n_tokens, d_model)) + 2 * rng.normal(size=(n_layers, 1, d_model)))


def random_case(seed):
    """A sae, its oracle problem, vectors, a dead set; every eighth seed has nothing dead, every eighth all."""
    rng = np.random.default_rng(seed)
    recipe = ("standard", "lawson2024")[seed % 3 == 2]
    groups = int(rng.choice([1, 2])) if recipe == "standard" else 1
    n_layers, n_tokens, d_model = groups * int(rng.integers(1, 4)), int(rng.integers(2, 9)), int(rng.integers(3, 9))
    n, frame = int(rng.integers(6, 20)), FRAMES[seed % len(FRAMES)] if recipe == "standard" else "vector"
    resid = random_resid(rng, n_layers, n_tokens, d_model)
    mean, variance = oracle.layer_statistics(random_resid(rng, n_layers, 50, d_model))
    dead = rng.random((groups, n)) < (0.0, 1.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.4)[seed % 8]
    if dead.any():
        dead[:, 0] = True
    problem = oracle.Problem(
        k=int(rng.integers(1, 6)),
        n_layers=n_layers,
        group_of=oracle.even_groups(n_layers, groups),
        frame=frame,
        mean=mean,
        scale=np.sqrt(variance),
        variance=variance,
        lawson2024=recipe == "lawson2024",
        k_aux=int(rng.choice([0, 1, 3, 100], p=[0.15, 0.25, 0.3, 0.3])),
        alpha=float(rng.uniform(0.01, 2)),
    )
    torch.manual_seed(seed)
    config = {"d_model": d_model, "n_latents": n * groups, "groups": groups, "k": problem.k}
    sae = MLSAE(MLSAEConfig(**config, layers=tuple(range(n_layers)), frame=frame, recipe=recipe)).double()
    sae.b_pre.data.normal_(0, 0.3)
    sae.frame.fit(torch.from_numpy(mean), torch.from_numpy(variance))
    return sae, problem, resid, dead


@pytest.mark.parametrize("seed", range(200))
def test_losses_and_gradients_are_the_equations(seed):
    sae, problem, resid, dead = random_case(seed)
    rules = RECIPES["lawson2024" if problem.lawson2024 else "standard"]
    want = oracle.losses(problem, oracle.weights_of(sae), resid, dead)

    x = torch.from_numpy(resid)
    code = sae.encode(x)
    error, squared = sae.error(x, code)
    fraction = RECONSTRUCTION[rules.variance](x, squared, torch.from_numpy(problem.variance)).mean()
    flags = torch.from_numpy(dead).flatten()
    aux = problem.alpha * AUX[rules.aux](sae, x, code, error, flags, problem.k_aux, "auto")
    (fraction + aux).backward()

    assert float(fraction.detach()) == pytest.approx(want.recon_loss, rel=1e-10)
    assert float(aux.detach()) == pytest.approx(want.aux_loss, rel=1e-10, abs=1e-14)
    np.testing.assert_allclose((x - error).detach().numpy(), want.recon, rtol=1e-10, atol=1e-12)
    for name, grad in want.grads.items():
        weight = getattr(sae, name)
        got, size = weight.grad.numpy(), np.abs(grad).max()
        np.testing.assert_allclose(got, oracle.like(grad, weight), rtol=1e-9, atol=1e-11 * size, err_msg=name)


def test_the_generated_cases_hold_every_kind_of_dead_set():
    """No, all, fewer dead than k_aux, more dead than k_aux, and AuxK off, in both recipes."""
    kinds = set()
    for seed in range(200):
        _, problem, _, dead = random_case(seed)
        n_dead = int(dead.sum(1).max())
        size = "none" if n_dead == 0 else "all" if dead.all() else "fewer" if n_dead < problem.k_aux else "more"
        kinds.add((problem.lawson2024, "off" if problem.k_aux == 0 else size))
    assert kinds == {(law, kind) for law in (False, True) for kind in ("none", "all", "fewer", "more", "off")}


def test_perfect_and_mean_reconstructions_lose_0_and_1():
    resid = torch.from_numpy(random_resid(np.random.default_rng(0), 3, 20, 5))
    mean = resid.mean(1, keepdim=True)
    variance = (resid - mean).square().mean((1, 2))
    assert per_dimension(resid, torch.zeros(3).double(), variance).tolist() == [0, 0, 0]
    about_mean = (resid - mean).square().sum((1, 2))
    torch.testing.assert_close(per_dimension(resid, about_mean, variance), torch.ones(3).double())
    about_scalar_mean = (resid - resid.mean((1, 2), keepdim=True)).square().sum((1, 2))
    n = resid[0].numel()  # the published variance is unbiased
    torch.testing.assert_close(all_scalars(resid, about_scalar_mean, variance), torch.full((3,), (n - 1) / n).double())


def test_fractions_by_hand():
    resid, squared = torch.tensor([[[0.0, 4.0], [2.0, 6.0]]]), torch.tensor([4.0])
    assert per_dimension(resid, squared, torch.ones(1)).tolist() == [1.0]
    assert all_scalars(resid, squared, torch.ones(1)).tolist() == pytest.approx([3 / 20])


def aux_inputs(groups=1, n_layers=2, frame="layer", n_tokens=6):
    torch.manual_seed(3)
    layers = tuple(range(n_layers))
    config = MLSAEConfig(d_model=5, n_latents=12 * groups, groups=groups, k=3, layers=layers, frame=frame)
    sae = MLSAE(config).double()
    sae.b_pre.data.normal_(0, 0.3)
    resid = torch.from_numpy(random_resid(np.random.default_rng(1), n_layers, n_tokens, 5))
    code = sae.encode(resid)
    return sae, resid, code, sae.error(resid, code)[0]


def test_aux_is_exactly_zero_without_gradient_when_nothing_is_dead_or_it_is_off():
    sae, resid, code, error = aux_inputs()
    dead = torch.zeros(12, dtype=torch.bool)
    for aux in (aux_residual(sae, resid, code, error, dead, 4), aux_residual(sae, resid, code, error, ~dead, 0)):
        assert float(aux) == 0
        assert not aux.requires_grad


def test_aux_does_not_reach_the_reconstruction():
    """The error is a constant: only dead rows of the weights, and b_pre by way of pre_acts, receive gradient."""
    sae, resid, code, error = aux_inputs()
    dead = torch.arange(12) % 3 == 0
    aux_residual(sae, resid, code, error, dead, 2).backward()
    for weight in (sae.W_enc, sae.W_dec):
        assert weight.grad is not None
        assert not weight.grad[~dead].any()
        assert weight.grad[dead].any()


def test_published_aux_pulls_on_the_reconstruction_when_nothing_is_dead():
    sae, resid, code, error = aux_inputs(frame="vector")
    aux = aux_framed(sae, resid, code, error, torch.zeros(12, dtype=torch.bool), 4)
    aux.backward()
    assert float(aux.detach()) > 0
    assert sae.W_dec.grad is not None
    assert sae.W_dec.grad.any()


def test_aux_is_scale_free():
    """Ten times the residual stream through a ten times wider frame gives the same ratio."""
    values = []
    for size in (1.0, 10.0):
        sae, resid, _, _ = aux_inputs()
        sae.frame.fit(size * resid.mean(1), size**2 * resid.var((1, 2)))
        code = sae.encode(size * resid)
        error, _ = sae.error(size * resid, code)
        values.append(float(aux_residual(sae, size * resid, code, error, torch.arange(12) < 5, 3).detach()))
    assert values[1] == pytest.approx(values[0], rel=1e-12)


def test_a_group_without_dead_latents_adds_nothing_to_aux():
    """Groups are separate SAEs, and AuxK of an SAE without dead latents is exactly 0."""
    sae, resid, code, error = aux_inputs(groups=2)
    dead = torch.arange(24) < 12
    both = aux_residual(sae, resid, code, error, dead, 3).detach()
    problem = oracle.Problem(3, 2, [0, 1], "none", variance=np.ones(2), k_aux=3, alpha=1.0)
    want = oracle.losses(problem, oracle.weights_of(sae), resid.numpy(), dead.view(2, 12).numpy())
    assert float(both) == pytest.approx(want.aux_loss, rel=1e-10)


def test_aux_of_a_single_token_is_finite():
    """One unmasked token has no spread of errors to explain; that must not stop a run."""
    sae, resid, code, error = aux_inputs(n_tokens=1)
    aux = aux_residual(sae, resid, code, error, torch.arange(12) < 5, 3)
    assert torch.isfinite(aux)
