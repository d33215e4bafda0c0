"""Training is the same whoever computes the ops: losses, gradients and what a checkpoint holds, beside float64."""

from functools import cache

import pytest
import torch

from mlsae.config import MLSAEConfig, TrainerConfig
from mlsae.ops import cpu
from mlsae.optimizer import WEIGHTS
from mlsae.sae import MLSAE
from mlsae.trainer import Trainer

torch.set_num_threads(1)
N_LAYERS, TOKENS, D_MODEL, N_LATENTS, K = 3, 90, 20, 330, 4
LEVELS = [level for level in cpu.built() if cpu.LEVELS.index(level) <= cpu.load("portable").level()]
IMPLS = ["reference", *LEVELS]


def batches(n, seed=0):
    """Sparse sums of a few directions, each layer with its own size and offset."""
    torch.manual_seed(seed)
    directions = torch.randn(60, D_MODEL)
    size, offset = 2.0 ** torch.arange(N_LAYERS)[:, None, None], torch.randn(N_LAYERS, 1, D_MODEL)
    weights = [torch.rand(N_LAYERS, TOKENS, 60) * (torch.rand(N_LAYERS, TOKENS, 60) < 0.08) for _ in range(n)]
    return [size * (w @ directions + 0.05 * torch.randn(N_LAYERS, TOKENS, D_MODEL) + offset) for w in weights]


def trainer_of(impl, monkeypatch, dtype=torch.float32, recipe="standard", groups=1, **knobs):
    """A trainer whose SAE is in float64 the same as in float32."""
    if impl in LEVELS:
        monkeypatch.setattr(cpu, "best_level", lambda: impl)
    torch.manual_seed(1)
    layers = tuple(range(N_LAYERS))
    shape = {"d_model": D_MODEL, "n_latents": N_LATENTS, "k": K, "layers": layers, "groups": groups}
    sae = MLSAE(MLSAEConfig(**shape, frame="vector" if recipe == "lawson2024" else "layer", recipe=recipe)).to(dtype)
    knobs = {"lr": 5e-4, "k_aux": 16, "dead_after_tokens": 3 * TOKENS, **knobs}
    config = TrainerConfig(recipe=recipe, impl="cpu" if impl in LEVELS else impl, **knobs)
    trainer = Trainer(sae, config, n_steps=200, step_tokens=TOKENS)
    trainer.initialise([x.to(dtype) for x in batches(4, seed=9)])
    return trainer


def losses_of(trainer, n_steps):
    dtype = trainer.sae.W_enc.dtype
    return torch.tensor([trainer.step(x.to(dtype)).loss for x in batches(n_steps)], dtype=torch.float64)


@cache
def exact_losses(recipe):
    return losses_of(trainer_of("reference", pytest.MonkeyPatch(), torch.float64, recipe), 200)


@pytest.mark.parametrize(
    ("impl", "recipe"), [*((impl, "standard") for impl in IMPLS), *((impl, "lawson2024") for impl in IMPLS[::4])]
)
def test_two_hundred_steps_lose_the_same(impl, recipe, monkeypatch):
    """AuxK on, latents dying and reviving, rows screened in int8 where the machine can; beside float64.

    The learning rate is low enough that rounding does not grow until a near tie goes the other way, which nobody could prevent.
    """
    exact = exact_losses(recipe)
    trainer = trainer_of(impl, monkeypatch, recipe=recipe)
    losses = losses_of(trainer, 200)
    assert exact[-1] < 0.7 * exact[0]
    assert trainer.dead().any()
    assert (losses - exact).abs().max() <= 1e-5


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("n_dead", [0, 60, 200])
@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_are_those_of_float64(impl, n_dead, groups, monkeypatch):
    """Tensor by tensor, with nothing dead, and with few and many dead beside k_aux, from one micro-batch and from two."""
    exact, ours = (trainer_of(name, monkeypatch, dtype, groups=groups) for name, dtype in
                   [("reference", torch.float64), (impl, torch.float32)])  # fmt: skip
    gradients = []
    for trainer in (exact, ours):
        trainer.sae.load_state_dict({name: tensor.float() for name, tensor in exact.sae.state_dict().items()})
        trainer.quiet[:: N_LATENTS // n_dead if n_dead else N_LATENTS + 1] = 10**6 if n_dead else 0
        for x in batches(2, seed=4):
            trainer.accumulate(x.to(trainer.sae.W_enc.dtype))
        gradients.append({name: getattr(trainer.sae, name).grad.double() for name in WEIGHTS})
    for name, want in gradients[0].items():
        assert (gradients[1][name] - want).abs().max() <= 1e-5 * want.abs().max(), name


def test_a_run_may_change_who_computes_it(monkeypatch):
    """Ten steps by each of two, on one state, are twenty by one."""
    whole = trainer_of("reference", monkeypatch)
    halves = [trainer_of("reference", monkeypatch), trainer_of("auto", monkeypatch)]
    for i, x in enumerate(batches(20)):
        whole.step(x)
        if i == 10:
            halves[1].sae.load_state_dict(halves[0].sae.state_dict())
            halves[1].load_state(halves[0].state())
        halves[i >= 10].step(x)
    for name in WEIGHTS:
        torch.testing.assert_close(getattr(halves[1].sae, name), getattr(whole.sae, name), rtol=0, atol=1e-5)
