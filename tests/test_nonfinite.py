"""NaN and infinity: wherever they turn up, the run ends in that step, before the update, and nothing of them is kept."""

import importlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import train_command
from mlsae import losses
from mlsae.cli import main
from mlsae.config import MLSAEConfig, TrainerConfig
from mlsae.errors import NumericsError
from mlsae.formats.weights import nonfinite
from mlsae.sae import MLSAE
from mlsae.trainer import Trainer
from mlsae.untrusted import tensors_metadata

module = importlib.import_module("mlsae.train")  # the name itself is the function

NAN, INF = float("nan"), float("inf")
SPOILED = 6
"""The step that goes wrong: neither it nor the one before is saved of itself."""
FLAGS = ("--save-every-steps", "4", "--k-aux", "4", "--dead-after-tokens", "64")


def a_vector(layer, entry, value):
    """One entry of the last visible vector of a layer."""

    def spoil(loop, reading, patch):
        resid = reading.resid.clone()
        resid[layer, -1, int(reading.visible[-1].nonzero()[-1]), entry] = value
        return replace(reading, resid=resid, vectors=resid[:, reading.visible])

    return spoil


def a_tensor(find, value, at=0):
    """One entry of a weight, a moment or a statistic."""

    def spoil(loop, reading, patch):
        find(loop.trainer).data.view(-1)[at] = value
        return reading

    return spoil


def a_gradient(name, value):
    """The first row of what a backward pass gives."""

    def spoil(loop, reading, patch):
        getattr(loop.trainer.sae, name).register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), value))
        return reading

    return spoil


def a_loss(table, rule, value):
    """What is minimised, or its AuxK part."""

    def spoil(loop, reading, patch):
        real = table[rule]
        patch.setitem(table, rule, lambda *arguments: real(*arguments) * value)
        return reading

    return spoil


def moments(name, kind):
    return lambda trainer: trainer.optimizer.moments[name][kind]


SITES = {  # what is spoiled: how, and what the message names
    "a vector": (a_vector(1, 3, NAN), "loss"),
    "an infinite vector": (a_vector(1, 3, INF), "loss"),
    "the first layer's": (a_vector(0, 0, -INF), "loss"),
    "the last layer's": (a_vector(2, -1, NAN), "loss"),
    "W_enc": (a_tensor(lambda t: t.sae.W_enc, NAN, at=40), "W_enc"),
    "W_enc's last": (a_tensor(lambda t: t.sae.W_enc, INF, at=-1), "W_enc"),
    "W_dec": (a_tensor(lambda t: t.sae.W_dec, NAN, at=500), "W_dec"),
    "W_dec's last": (a_tensor(lambda t: t.sae.W_dec, -INF, at=-1), "W_dec"),
    "b_pre": (a_tensor(lambda t: t.sae.b_pre, NAN), "b_pre"),
    "frame.mean": (a_tensor(lambda t: t.sae.frame.mean, NAN), "frame.mean"),
    "frame.scale": (a_tensor(lambda t: t.sae.frame.scale, INF), "frame.scale"),
    "norm_limit": (a_tensor(lambda t: t.sae.norm_limit, NAN), "norm_limit"),
    "variance": (a_tensor(lambda t: t.variance, NAN), "variance"),
    "first moment": (a_tensor(moments("W_enc", "exp_avg"), NAN, at=99), "adam.W_enc.exp_avg"),
    "second moment": (a_tensor(moments("W_dec", "exp_avg_sq"), INF, at=7), "adam.W_dec.exp_avg_sq"),
    "moment of b_pre": (a_tensor(moments("b_pre", "exp_avg"), NAN), "adam.b_pre.exp_avg"),
    "W_enc's gradient": (a_gradient("W_enc", NAN), "gradient of W_enc"),
    "W_dec's gradient": (a_gradient("W_dec", INF), "gradient of W_dec"),
    "b_pre's gradient": (a_gradient("b_pre", -INF), "gradient of b_pre"),
    "the loss": (a_loss(losses.RECONSTRUCTION, "per_dimension", NAN), "loss"),
    "AuxK": (a_loss(losses.AUX, "residual", INF), "loss"),
}


@pytest.fixture(scope="module")
def plain(lm_folder, corpus, tmp_path_factory):
    """The run in which nothing goes wrong, every step of it saved."""
    out = tmp_path_factory.mktemp("plain") / "run"
    every = ("--save-every-steps", "1", "--keep-checkpoints", "100", *FLAGS[2:])
    assert main(train_command(*every, lm=lm_folder, data=corpus, out=out)) == 0
    return out


def state(run, step):
    return {name: load_file(run / f"step-{step:08d}" / f"{name}.safetensors") for name in ("sae", "state")}


def different(a, b):
    """Names of the tensors that are not the same, but for one that starts anew at each line of metrics.jsonl."""
    names = [(part, name) for part in a for name in a[part] | b[part] if name != "largest_norm"]
    return [name for part, name in names if not torch.equal(a[part].get(name), b[part].get(name))]


@pytest.mark.parametrize("log_every", ["1", "100"])
@pytest.mark.parametrize("site", SITES)
def test_it_ends_in_that_step_before_the_update(
    plain, lm_folder, corpus, tmp_path, capsys, monkeypatch, site, log_every
):
    """The state before the step is saved if it is sound; resumed without what was wrong, the run ends in the same bits."""
    spoil, named = SITES[site]
    out = tmp_path / "run"
    command = train_command(*FLAGS, "--log-every-steps", log_every, lm=lm_folder, data=corpus, out=out)
    with monkeypatch.context() as patch:
        real = module.Loop._readings

        def readings(loop):
            for reading in real(loop):
                yield spoil(loop, reading, patch) if loop.trainer.steps + 1 == SPOILED else reading

        patch.setattr(module.Loop, "_readings", readings)
        assert main(command) == 5
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {named}: ")
    assert f"step {SPOILED};" in shown
    assert "(documents " in shown
    saved = [int(path.name[5:]) for path in sorted(out.glob("step-*"))]
    sound = named == "loss" or named.startswith("gradient")
    assert saved == ([4, SPOILED - 1] if sound else [4])
    for step in saved:
        assert different(state(out, step), state(plain, step)) == []
    assert main([*command, "--resume"]) == 0
    assert different(state(out, 15), state(plain, 15)) == []


def test_nothing_is_made_of_what_is_not_finite():
    """A sum would not do: infinities cancel, and large numbers add up to one."""
    whole = {"a": torch.tensor([3e38, 3e38]), "empty": torch.empty(0), "ids": torch.tensor([1])}
    assert nonfinite(whole) is None
    for value in (NAN, INF, -INF):
        assert nonfinite(whole | {"b": torch.tensor([[0.0, value]])}) == "b"
    assert nonfinite(whole | {"b": torch.tensor([INF, -INF])}) == "b"
    assert nonfinite({"norm_limit": torch.tensor([INF, 2.0])}) is None
    assert nonfinite({"norm_limit": torch.tensor([0.0, 2.0])}) == "norm_limit"


def test_a_scaler_that_is_not_finite_stops_the_step():
    """float16 skips a step whose gradient overflows, so its own factor must be looked at."""
    trainer = Trainer(
        MLSAE(MLSAEConfig(d_model=16, n_latents=32, k=4)), TrainerConfig(precision="float16", init_tokens=64)
    )
    vectors = torch.randn(3, 64, 16)
    trainer.step(vectors)
    before = {name: tensor.clone() for name, tensor in trainer.sae.state_dict().items()}
    trainer.optimizer.load_state({**trainer.optimizer.state(), "scaler": torch.tensor([INF, 0.0], dtype=torch.float64)})
    with pytest.raises(NumericsError, match="scaler: not finite before step 2"):
        trainer.step(vectors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.sae.state_dict().items())


# ---- loading -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def spoiled_sae(trained, tmp_path):
    """A finished run whose SAE's weights hold one NaN."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    path = run / "sae" / "model.safetensors"
    tensors, metadata = load_file(path), tensors_metadata(path)
    tensors["W_enc"][3, 5] = NAN
    save_file(tensors, path, metadata)
    return run


@pytest.mark.parametrize("command", ["evaluate", "analyze"])
def test_one_nan_in_the_weights_is_refused_by_every_command(spoiled_sae, capsys, command):
    assert main([command, str(spoiled_sae), "--quiet"]) == 6
    assert "tensor 'W_enc' holds NaN or infinity" in capsys.readouterr().err


def test_weights_with_nan_open_to_be_looked_at_and_are_not_repaired(spoiled_sae):
    sae = MLSAE.from_pretrained(spoiled_sae, allow_nonfinite=True)
    assert sae.W_enc[3, 5].isnan()
    assert int(sae.W_enc.isnan().sum()) == 1
