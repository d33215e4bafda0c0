"""The optimizer step against the NumPy oracle, and the laws that training must keep."""

import itertools
import math

import numpy as np
import pytest
import torch

import oracle
from mlsae.config import MLSAEConfig, TrainerConfig
from mlsae.errors import ConfigError, MlsaeError, NumericsError
from mlsae.optimizer import WEIGHTS
from mlsae.sae import MLSAE
from mlsae.trainer import Trainer

torch.set_num_threads(1)
N_LAYERS, D_MODEL, N_LATENTS, K = 3, 6, 20, 3
TOKENS = 12


def resid_batches(n, seed=0, n_layers=N_LAYERS, tokens=TOKENS, dtype=torch.float64):
    """n micro-batches of vectors that lie near a few directions, with each layer's own size and offset."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(10, D_MODEL))
    size, offset = 2.0 ** np.arange(n_layers)[:, None, None], rng.normal(size=(n_layers, 1, D_MODEL))
    weight = rng.exponential(size=(n, n_layers, tokens, 10)) * (rng.random((n, n_layers, tokens, 10)) < 0.3)
    noise = 0.1 * rng.normal(size=(n, n_layers, tokens, D_MODEL))
    return list(torch.from_numpy(size * (weight @ directions + noise + offset)).to(dtype))


def make_sae(seed=0, frame="layer", groups=1, n_layers=N_LAYERS, dtype=torch.float64, **changes):
    torch.manual_seed(seed)
    shape = {"d_model": D_MODEL, "n_latents": N_LATENTS * groups, "k": K, "mask_norm_factor": None}
    config = MLSAEConfig(**{**shape, "layers": tuple(range(n_layers)), "frame": frame, "groups": groups, **changes})
    return MLSAE(config).to(dtype)


def make_trainer(seed=0, *, n_steps=None, step_tokens=None, sae=None, recipe="standard", **knobs):
    """A trainer that has already seen its initial sample."""
    sae = sae or make_sae(seed, "vector" if recipe == "lawson2024" else "layer", recipe=recipe)
    trainer = Trainer(sae, TrainerConfig(recipe=recipe, **knobs), n_steps=n_steps, step_tokens=step_tokens)
    trainer.initialise(resid_batches(4, seed=99, n_layers=len(sae.layers), dtype=sae.W_enc.dtype))
    return trainer


def oracle_of(trainer, **changes):
    """The oracle at the trainer's starting point; only the initial weights are taken from it."""
    sae = trainer.sae
    sample = torch.cat(resid_batches(4, seed=99, n_layers=len(sae.layers)), 1).numpy()
    mean, variance = oracle.layer_statistics(sample)
    np.testing.assert_allclose(trainer.variance.numpy(), variance, rtol=1e-12)
    problem = oracle.Problem(
        k=K,
        n_layers=len(sae.layers),
        group_of=oracle.even_groups(len(sae.layers), sae.config.groups),
        frame=sae.config.frame,
        mean=mean,
        scale=np.sqrt(variance),
        variance=variance,
        lawson2024=trainer.config.recipe == "lawson2024",
        k_aux=trainer.k_aux,
    )
    training = oracle.Training(problem, oracle.weights_of(sae), dead_after=trainer.dead_after, **changes)
    training.quiet = trainer.quiet.numpy().reshape(training.quiet.shape).copy()
    return training


def watch_gradients(trainer):
    """A dict that holds what the optimizer was last given."""
    grads = {}

    def keep(*_):
        grads.update({name: getattr(trainer.sae, name).grad.numpy().copy() for name in WEIGHTS})

    trainer.optimizer.adam.register_step_pre_hook(keep)
    return grads


def assert_close(got, want, what, tolerance=1e-10):
    """Every entry within `tolerance` of the tensor's largest."""
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(np.abs(want).max(), 1e-12), err_msg=what)


def snapshot(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def adam(trainer):
    return {name: value for name, value in trainer.state().items() if name.startswith("adam")}


def assert_same(got, want):
    """Bit for bit."""
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


STANDARD = [
    ("standard", frame, groups, accumulation, k_aux)
    for frame, (groups, accumulation, k_aux) in itertools.product(
        ("layer", "vector", "none"), [(1, 1, 2), (1, 3, 60), (3, 1, 60), (3, 3, 0)]
    )
]
PUBLISHED = [("lawson2024", "vector", 1, *layout) for layout in [(1, 0), (1, 2), (3, 60), (3, 2)]]


@pytest.mark.parametrize(("recipe", "frame", "groups", "accumulation", "k_aux"), STANDARD + PUBLISHED)
def test_fifty_steps_are_the_equations(recipe, frame, groups, accumulation, k_aux):
    """Losses, gradients, weights and dead latents of every step; micro-batches are of unequal length."""
    published = recipe == "lawson2024"
    sae = make_sae(1, frame, groups, recipe=recipe)
    knobs = {"k_aux": k_aux, "lr": 3e-3, "dead_after_tokens": 8 * TOKENS, "warmup_fraction": 0.2, "decay_fraction": 0.4}
    trainer = make_trainer(sae=sae, recipe=recipe, n_steps=50, step_tokens=TOKENS, **knobs)
    trainer.quiet[::4] = 10 * TOKENS  # dead from the start in every group, unless the first step wakes them
    reference = oracle_of(trainer, base_lr=3e-3, warmup=10, decay=20, n_steps=50)
    grads, ever_dead, ever_revived = watch_gradients(trainer), 0, 0

    batches = resid_batches(50 * accumulation, seed=5)
    for step in range(50):
        parts = [x[:, : TOKENS - 2 * i] for i, x in enumerate(batches[step * accumulation :][:accumulation])]
        was_dead = int(trainer.dead().sum())
        for part in parts:
            trainer.accumulate(part)
        report = trainer.update()
        results = reference.step([part.numpy() for part in parts])

        share = np.array([part.shape[1] for part in parts]) / sum(part.shape[1] for part in parts)
        aux = share @ [r.aux_loss for r in results]
        assert report.aux_loss / 32 == pytest.approx(aux, rel=1e-10, abs=1e-14)
        assert report.loss == pytest.approx(share @ [r.recon_loss for r in results] + aux, rel=1e-10)
        sse = [((part.numpy() - r.recon) ** 2).mean((1, 2)) for part, r in zip(parts, results, strict=True)]
        assert_close(report.layer_fvu, share @ sse / reference.problem.variance, "layer_fvu")
        for name in WEIGHTS:
            assert_close(grads[name], oracle.like(reference.grads[name], grads[name]), f"grad {name} at {step}")
            got = getattr(sae, name).detach().numpy()
            assert_close(got, oracle.like(reference.w[name], got), f"{name} at {step}")
        np.testing.assert_array_equal(trainer.quiet.numpy(), reference.quiet.flatten())
        assert report.dead_fraction == pytest.approx((reference.quiet >= reference.dead_after).mean(), abs=1e-6)
        total = np.sqrt(sum((g**2).sum() for g in reference.grads.values()))
        assert report.grad_norm == pytest.approx(total, rel=1e-10)
        now_dead = int(trainer.dead().sum())
        ever_dead, ever_revived = ever_dead + (now_dead > was_dead), ever_revived + (now_dead < was_dead)
        if not published:
            assert (sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-12
    assert ever_dead
    assert ever_revived


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoder_rows_are_unit_norm_after_every_step(dtype):
    trainer = make_trainer(sae=make_sae(dtype=dtype), lr=0.1)
    for resid in resid_batches(20, dtype=dtype):
        trainer.step(resid)
        assert (trainer.sae.W_dec.norm(dim=1) - 1).abs().max() <= 1e-6


def test_a_zero_decoder_row_stays_zero_and_stops_nothing():
    trainer = make_trainer()
    trainer.sae.W_enc.data[4], trainer.sae.W_dec.data[4] = 0, 0
    for resid in resid_batches(3):
        trainer.step(resid)
    assert not trainer.sae.W_dec[4].any()
    assert trainer.sae.W_dec.isfinite().all()


def test_a_step_in_parts_is_the_step():
    """With v_l fixed and AuxK off, how a step is split changes nothing but rounding."""
    whole, split = make_trainer(k_aux=0, lr=1e-2), make_trainer(k_aux=0, lr=1e-2)
    for resid in resid_batches(10):
        one = whole.step(resid)
        for part in resid.split((1, 4, 7), dim=1):
            split.accumulate(part)
        two = split.update()
        assert two.loss == pytest.approx(one.loss, rel=1e-10)
        assert two.tokens == one.tokens
        for name in WEIGHTS:
            assert_close(getattr(split.sae, name).detach().numpy(), getattr(whole.sae, name).detach().numpy(), name)


def test_groups_train_as_separate_saes():
    """L groups are L single-layer SAEs: the gradient of each is 1/L of its own, which Adam does not see."""
    grouped = make_trainer(sae=make_sae(groups=N_LAYERS), k_aux=0, lr=1e-2, adam_eps=1e-30)
    singles = [make_trainer(sae=make_sae(n_layers=1), k_aux=0, lr=1e-2, adam_eps=1e-30) for _ in range(N_LAYERS)]
    for row, single in enumerate(singles):
        mine = slice(row * N_LATENTS, (row + 1) * N_LATENTS)
        single.variance = grouped.variance[row : row + 1]
        single.sae.frame.mean, single.sae.frame.scale = grouped.sae.frame.mean[[row]], grouped.sae.frame.scale[[row]]
        with torch.no_grad():
            single.sae.W_enc.copy_(grouped.sae.W_enc[mine])
            single.sae.W_dec.copy_(grouped.sae.W_dec[mine])
            single.sae.b_pre.copy_(grouped.sae.b_pre[row])
    for resid in resid_batches(5):
        report = grouped.step(resid)
        alone = [single.step(resid[[row]]).loss for row, single in enumerate(singles)]
        assert report.loss == pytest.approx(np.mean(alone), rel=1e-6)


@pytest.mark.parametrize("recipe", ["standard", "lawson2024"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_loss_changes_no_weight(recipe, value):
    """Saved weights must be those of the last good step (lawson2024 normalises W_dec before it knows: D7)."""
    trainer = make_trainer(recipe=recipe)
    good, bad = resid_batches(2)
    trainer.step(good)
    trainer.sae.normalize_decoder_()
    before, moments = snapshot(trainer.sae.state_dict()), snapshot(adam(trainer))
    bad[1, 3, 2] = value
    with pytest.raises(NumericsError, match="loss"):
        trainer.step(bad)
    exact = before if recipe == "standard" else {k: v for k, v in before.items() if k != "W_dec"}
    assert_same({k: trainer.sae.state_dict()[k] for k in exact}, exact)
    torch.testing.assert_close(trainer.sae.W_dec.detach(), before["W_dec"], rtol=0, atol=1e-15)
    assert_same(adam(trainer), moments)
    assert (trainer.steps, trainer.tokens) == (1, TOKENS)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_non_finite_gradient_changes_nothing_and_is_named(name):
    trainer = make_trainer()
    good, bad = resid_batches(2)
    trainer.step(good)
    before = snapshot(trainer.sae.state_dict()) | snapshot(adam(trainer))
    getattr(trainer.sae, name).register_hook(lambda grad: grad * math.nan)
    with pytest.raises(NumericsError, match=f"gradient of {name}"):
        trainer.step(bad)
    assert_same(trainer.sae.state_dict() | adam(trainer), before)


def test_a_step_without_tokens_is_refused():
    trainer = make_trainer()
    with pytest.raises(ConfigError, match="no unmasked token"):
        trainer.update()
    with pytest.raises(ConfigError, match="no unmasked token"):
        trainer.step(torch.zeros(N_LAYERS, 0, D_MODEL).double())


def test_a_first_step_without_tokens_is_refused():
    trainer = Trainer(make_sae())
    with pytest.raises(MlsaeError, match="token"):
        trainer.step(torch.zeros(N_LAYERS, 0, D_MODEL).double())


def test_an_empty_micro_batch_counts_for_nothing():
    one, two = make_trainer(), make_trainer()
    resid = resid_batches(1)[0]
    one.step(resid)
    two.accumulate(resid[:, :0])
    two.accumulate(resid)
    two.update()
    assert_same(two.sae.state_dict(), one.sae.state_dict())


@pytest.mark.parametrize("recipe", ["standard", "lawson2024"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resuming_is_never_having_stopped(recipe, dtype):
    knobs = {"lr": 1e-2, "dead_after_tokens": 50, "n_steps": 20, "step_tokens": TOKENS, "recipe": recipe}
    frame = "vector" if recipe == "lawson2024" else "layer"
    trainer = make_trainer(sae=make_sae(0, frame, recipe=recipe, dtype=dtype), **knobs)
    batches = resid_batches(20, dtype=dtype)
    for resid in batches[:10]:
        trainer.step(resid)
    state, weights = snapshot(trainer.state()), snapshot(trainer.sae.state_dict())

    fresh = make_sae(7, frame, recipe=recipe, dtype=dtype)
    config = TrainerConfig(recipe=recipe, lr=1e-2, dead_after_tokens=50)
    resumed = Trainer(fresh, config, n_steps=20, step_tokens=TOKENS)
    fresh.load_state_dict(weights)
    resumed.load_state(state)
    assert_same(resumed.state(), state)
    for resid in batches[10:]:
        assert resumed.step(resid) == trainer.step(resid)
        assert_same(resumed.sae.state_dict(), trainer.sae.state_dict())
    assert_same(resumed.state(), trainer.state())


def test_learning_rate_rises_holds_and_falls():
    trainer = make_trainer(lr=0.02, warmup_fraction=0.25, decay_fraction=0.5, n_steps=8)
    rates = [trainer.step(resid).lr for resid in resid_batches(8)]
    assert rates == pytest.approx([0.01, 0.02, 0.02, 0.02, 0.02, 0.015, 0.01, 0.005])
    assert rates == pytest.approx([oracle.learning_rate(step, 0.02, 2, 4, 8) for step in range(8)])


def test_learning_rate_past_the_schedule_is_never_negative():
    """A negative rate would climb the loss."""
    trainer = make_trainer(lr=0.02, warmup_fraction=0.0, decay_fraction=0.5, n_steps=2)
    assert min(trainer.step(resid).lr for resid in resid_batches(4)) >= 0


def test_0_is_a_value_and_not_a_blank():
    """No AuxK and no warm-up are settings; the recipe's own would show here."""
    trainer = make_trainer(k_aux=0, lr=0.02, warmup_fraction=0.0, decay_fraction=0.0, n_steps=1000)
    trainer.quiet[:] = 10**9  # all dead: any AuxK would have a loss
    report = trainer.step(resid_batches(1)[0])
    assert (report.aux_loss, report.lr) == (0, 0.02)


@pytest.mark.parametrize(("recipe", "groups"), [("standard", 1), ("standard", 3), ("lawson2024", 1)])
def test_default_learning_rate(recipe, groups):
    """2e-4 / sqrt(n / 2^14) of one dictionary, and the published 1e-4; constant without a schedule."""
    sae = make_sae(frame="vector" if recipe == "lawson2024" else "layer", groups=groups, recipe=recipe)
    trainer = make_trainer(sae=sae, recipe=recipe)
    want = 1e-4 if recipe == "lawson2024" else oracle.scaled_lr(N_LATENTS)
    assert [trainer.step(resid).lr for resid in resid_batches(3)] == pytest.approx([want] * 3, rel=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("tokens", "accumulation"), [(1, 1), (7, 1), (5, 3), (20, 2)])
def test_a_silenced_latent_is_dead_after_its_tokens(tokens, accumulation, groups):
    """Timed in tokens whatever the layout; a layer or micro-batch more does not make time run faster."""
    threshold, layers, step_tokens = 60, 2, tokens * accumulation
    sae = make_sae(groups=groups, n_layers=layers)
    trainer = make_trainer(sae=sae, k_aux=0, lr=1e-12, dead_after_tokens=threshold)
    latent = sae.config.n_latents - 1  # read by the last layer, in every layout
    loud = resid_batches(1, seed=3, n_layers=layers)[0]
    toward = sae.frame.apply_to(loud, *sae.frame.shift_and_scale(loud, [0, 1]))[-1, 0] - sae.biases[-1].detach()
    sae.W_enc.data[latent] = 100 * toward
    trainer.step(loud)
    assert trainer.quiet[latent] == 0
    sae.W_enc.data[latent] = 0
    batches = iter(resid_batches(100, n_layers=layers, tokens=tokens))

    def step():
        for _ in range(accumulation):
            trainer.accumulate(next(batches))
        trainer.update()

    for seen in range(step_tokens, threshold + step_tokens, step_tokens):
        assert not trainer.dead()[latent]
        step()
        assert trainer.quiet[latent] == seen
    assert trainer.dead()[latent]


def test_a_step_that_fails_keeps_what_was_counted_before_it():
    """Validation may move the clock between two steps (lawson2024, D8); undoing a step must not undo that."""
    sae = MLSAE(MLSAEConfig(d_model=6, n_latents=24, k=3, layers=(0, 1), frame="vector", recipe="lawson2024"))
    trainer, resid = Trainer(sae), torch.randn(2, 16, 6)
    trainer.step(resid)
    trainer.tick(sae.encode(resid), 16)
    before = trainer.quiet.clone()
    with pytest.raises(NumericsError):
        trainer.step(resid * torch.nan)
    assert torch.equal(trainer.quiet, before)
