"""The plan of a run is what the run turns out to take."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from mlsae import costs, devices, files, gpus
from mlsae.cli import main
from mlsae.config import LMShape, MLSAEConfig, TrainConfig
from mlsae.errors import ConfigError
from mlsae.estimate import (
    PlanConfig,
    capacity,
    fits,
    flops_of,
    largest_batch,
    largest_expansion,
    memory_of,
    smallest_tp,
    traffic_of,
)
from mlsae.hub import count_parameters
from mlsae.lm import LanguageModel
from mlsae.plan import _laid_out as laid_out
from mlsae.plan import _lm_size as lm_size
from mlsae.plan import _run as run_of
from mlsae.plan import here, plan
from mlsae.resolving import resolve
from mlsae.sae import MLSAE
from mlsae.trainer import Trainer
from tiny import save_tiny_lm, tiny_config, tiny_hf_model

LLAMA_8B = {"d_model": 4096, "n_layers": 32, "d_vocab": 128_256, "n_lm_parameters": 8_030_261_248}
MILLION = {**LLAMA_8B, "n_latents": 2**20, "tokens": 10**9}


def planned(**changes):
    """A run and its layout, by the config's keys; those of the 8B model with a million latents unless said otherwise."""
    config = PlanConfig(**{**MILLION, **changes})
    gpu = gpus.GPUS[config.gpu]
    return laid_out(config, run_of(config, lm_size(config), gpu, "bfloat16", "bfloat16"))


# ---- against what is -------------------------------------------------------------------------------------------------


def test_the_state_is_weights_gradients_and_moments_to_the_byte():
    sae = MLSAE(MLSAEConfig(d_model=16, n_latents=48, k=4, layers=(0, 1)))
    trainer = Trainer(sae)
    trainer.accumulate(torch.randn(2, 32, 16))
    matrices = (sae.W_enc, sae.W_dec)
    held = sum(weight.nbytes + weight.grad.nbytes for weight in matrices if weight.grad is not None)
    held += sum(x.nbytes for name, x in trainer.state().items() if "W_" in name and "exp" in name)
    assert held == costs.state_bytes(48, 16)
    assert costs.clock_bytes(48) == 2 * trainer.quiet.nbytes


def test_a_checkpoint_and_the_sae_are_on_disk_what_was_planned(trained):
    """Its tensors to a few hundred bytes of counters; headers and JSON beside them."""
    config = json.loads((trained / "config.json").read_text())
    step = max(trained.glob("step-*"))
    tensors = [load_file(path) for path in step.glob("*.safetensors")]
    held = sum(tensor.nbytes for each in tensors for tensor in each.values())
    n_latents, n_layers = config["n_latents"], len(config["layers"])
    wanted = costs.checkpoint_bytes(n_latents, 32, config["groups"], n_layers, frame=True, lens=False)
    assert wanted == pytest.approx(held, abs=300)
    on_disk = sum(path.stat().st_size for path in step.iterdir())
    assert 0 <= on_disk - wanted <= 48 * 1024  # headers, manifest and state.json
    sae = sum(tensor.nbytes for tensor in load_file(trained / "sae" / "model.safetensors").values())
    assert costs.sae_bytes(n_latents, 32, config["groups"]) == pytest.approx(sae, abs=4 * n_layers * 40)


@pytest.mark.parametrize("groups", [1, 2])
def test_what_training_refuses_for_memory_or_disk_is_what_is_planned(monkeypatch, groups):
    """One byte less than the plan's state, or its checkpoints' weights and moments, is refused; as many are enough."""
    config = PlanConfig(d_model=64, n_layers=4, d_vocab=100, n_lm_parameters=10**6, groups=groups, n_latents=512)
    found = plan(config)
    state = sum(found.memory[name] for name in ("SAE weights", "gradients", "Adam's moments"))
    assert state == costs.state_bytes(512, 64)
    train = resolve(TrainConfig(lm="-", data="-", out="-", n_latents=512, groups=groups), LMShape("lm", 4, 64, None))
    monkeypatch.setattr(files, "free_bytes", lambda path: 10**12)
    monkeypatch.setattr(devices, "free_memory", lambda device: state)
    devices.check_fits(train, 64, torch.device("cpu"))
    monkeypatch.setattr(devices, "free_memory", lambda device: state - 1)
    with pytest.raises(ConfigError):
        devices.check_fits(train, 64, torch.device("cpu"))


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2", "llama", "gemma2", "opt", "mixtral"])
def test_parameters_are_counted_from_the_config_as_in_the_model(architecture):
    whole, blocks = count_parameters(tiny_config(architecture))
    hf = tiny_hf_model(architecture)
    assert whole == sum(weight.numel() for weight in hf.parameters())
    tables = {id(layer.weight): layer.weight for layer in (hf.get_input_embeddings(), hf.get_output_embeddings())}
    rest = whole - sum(table.numel() for table in tables.values())
    experts = sum(weight.numel() for name, weight in hf.named_parameters() if ".experts." in name)
    assert blocks == rest - experts // 2  # two of four are chosen
    assert (experts > 0) == (architecture == "mixtral")


def test_the_operations_planned_are_those_that_torch_counts(tmp_path):
    """Of the language model but for attention's masked half, which tiles leave out, norms and biases; of the encoder exactly."""
    folder = save_tiny_lm(tmp_path / "lm", d_model=128)
    lm = LanguageModel.from_pretrained(folder, device="cpu", dtype="float32")
    config = PlanConfig(lm=str(folder), expansion_factor=2.0, context_length=16, k=4, tokens=10**5)
    flops = flops_of(run_of(config, lm_size(config), gpus.GPUS["h100"], "float32", "float32"))
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counted:
        resid = lm.resid(tokens)
    assert counted.get_total_flops() == pytest.approx(32 * flops["language model"], rel=0.03)
    sae = MLSAE(MLSAEConfig(d_model=128, n_latents=256, k=4, layers=(0, 1, 2)))
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        sae.encode(resid, impl="reference")
    assert counted.get_total_flops() == 32 * flops["encoder"]


# ---- by hand -----------------------------------------------------------------------------------------------------------


def test_a_small_run_by_hand():
    """Ten latents of width 4 over two layers, two tokens each on two of two tp ranks."""
    assert costs.parameters(10, 1, 4) == 84
    assert costs.state_bytes(10, 4, 0.5) == 640
    assert costs.flops_per_token(10, 1, 3, 2, 4) == 2 * (2 * 10 * 4) + 2 * (10 * 3 * 4)
    assert costs.lm_flops(1000, 2, 4, 16) == 2000 + 2 * 2 * 16 * 4
    assert costs.code_payload(2, 2, 3) == 2 * 2 * 3 * (4 + 4)
    assert costs.sums_payload(2, 2, 4) == 2 * 2 * 4 * 4
    assert costs.gradient_payload(10, 4, 0.5) == 2 * 5 * 4 * 4
    assert costs.reduced_wire(100, 4) == 150
    assert costs.gathered_wire(100, 4) == 300
    assert costs.token_bytes(10, 65_536) == 20
    assert costs.token_bytes(10, 65_537) == 40


def test_a_steps_traffic_by_hand():
    """Two forward passes of one sequence of two tokens for each of two dp ranks, latents on two tp ranks."""
    sizes = {
        "d_model": 4,
        "n_layers": 2,
        "d_vocab": 10,
        "n_lm_parameters": 1000,
        "n_latents": 10,
        "k": 3,
        "tokens": 100,
    }
    config = PlanConfig(**sizes, context_length=2, batch_size=2, accumulation_steps=2, dp=2, tp=2)
    handed, sent = traffic_of(
        laid_out(config, run_of(config, lm_size(config), gpus.GPUS["h100"], "float32", "float32"))
    )
    code, sums, gradients, clock = 2 * 2 * 3 * 8, 2 * 2 * 4 * 4, 2 * 5 * 4 * 4, (10 + 1 + 2) * 4
    assert handed == {"tp": 2 * (code + sums), "dp": gradients + 2 * clock}
    assert sent == {"tp": 2 * (code + sums), "dp": gradients + 2 * clock}  # in rings of two


def test_a_ring_of_one_sends_nothing_and_no_dead_latents_cost_nothing():
    assert costs.reduced_wire(100, 1) == costs.gathered_wire(100, 1) == 0
    assert costs.aux_flops(0, 1, 256, 2, 4) == costs.aux_bytes(10, 4, 1.0, 2, 2, 0, 1) == 0


# ---- laws ----------------------------------------------------------------------------------------------------------------


def test_the_bound_is_the_tightest_and_time_goes_with_tokens():
    one, two = (plan(PlanConfig(**{**MILLION, "gpus": 16, "batch_size": 4, "tokens": n})) for n in (10**9, 2 * 10**9))
    assert one.bound_tokens_per_second == min(one.tokens_per_second.values()) == one.tokens_per_second[one.bound]
    assert two.hours_at_least == pytest.approx(2 * one.hours_at_least)
    assert one.hours_expected == pytest.approx(one.hours_at_least / 0.4)
    faster = plan(PlanConfig(**{**MILLION, "gpus": 16, "batch_size": 4, "gpu_flops": 2 * 989.5}))
    assert faster.tokens_per_second["compute"] == pytest.approx(2 * one.tokens_per_second["compute"])


def test_state_falls_with_tp_and_vectors_with_dp():
    alone, by_latents, by_tokens = (
        memory_of(planned(dp=dp, tp=tp, batch_size=8)) for dp, tp in ((1, 1), (1, 4), (4, 1))
    )
    for name, less in {"gradients": (4, 1), "residual vectors": (1, 4), "language model": (1, 1)}.items():
        assert alone[name] == less[0] * by_latents[name] == less[1] * by_tokens[name]


def test_the_layout_chosen_has_the_fewest_tp_ranks_that_fit():
    run = planned(gpus=16, batch_size=4)
    assert (run.dp, run.tp) == (2, 8)
    assert fits(run)
    assert not fits(planned(dp=4, tp=4, batch_size=4))


def test_what_is_said_to_fit_fits_and_the_next_does_not():
    run = planned(dp=1, tp=1, batch_size=1)
    assert not fits(run)
    tp = smallest_tp(run)
    assert tp is not None
    assert [fits(planned(dp=1, tp=n, batch_size=1)) for n in (tp - 1, tp)] == [False, True]
    factor = largest_expansion(run)
    sizes = [planned(dp=1, tp=1, batch_size=1, n_latents=4096 * n) for n in (factor, factor + 1)]
    assert [fits(each) for each in sizes] == [True, False]
    crowded = planned(dp=2, tp=8, batch_size=64)
    n = largest_batch(crowded)
    assert [fits(planned(dp=2, tp=8, batch_size=each)) for each in (n, n + 2)] == [True, False]
    said = str(plan(PlanConfig(**{**MILLION, "dp": 1, "tp": 1, "batch_size": 1})))
    assert f"it does not fit\n  smallest tp that fits: {tp}\n" in said
    assert f"largest expansion_factor that fits at tp 1: {factor}" in said


def test_a_language_model_that_is_too_large_is_to_be_spread_out():
    found = plan(PlanConfig(**{**MILLION, "gpu": "rtx-4090", "n_lm_parameters": 70 * 10**9}))
    assert not found.fits
    assert "the language model alone takes 14" in found.advice[0]
    assert "lm_device_map" in found.advice[0]


def test_ranks_without_a_sequence_are_said():
    assert plan(PlanConfig(**{**MILLION, "dp": 8, "tp": 8, "batch_size": 2})).advice == [
        "6 of 8 dp ranks get no sequence; raise batch_size to 8"
    ]


def test_what_the_user_knows_better_takes_the_data_sheets_place():
    found = gpus.given(gpus.GPUS["a100-40gb"], 24.0, 100.0, None, 10.0, "bfloat16")
    assert (found.memory, found.bfloat16, found.link) == (24 * 10**9, 1e14, 1e10)
    assert (found.bandwidth, found.float32) == (1555e9, 19.5e12)
    assert capacity(found) == int(0.95 * 24e9)


def test_this_cpu_is_measured_and_has_the_memory_that_is_free():
    found = here()
    assert found.memory == pytest.approx(devices.free_memory(torch.device("cpu")), rel=0.5)
    assert 1e8 < found.float32 < 1e15
    assert 1e8 < found.bandwidth < 1e13


# ---- refused, and the command --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_vocab": None}, "lm: missing; give --lm, or all of --d-model --n-layers --d-vocab --n-lm-parameters"),
        ({"lm": "gpt2"}, "lm: given together with its shape; give one of them"),
        ({"n_lm_parameters": 1000}, "n_lm_parameters: 1000 is less than the embeddings; count those too"),
        ({"gpus": 8, "dp": 3, "tp": 2}, "gpus: 8; dp 3 with tp 2 makes 6"),
        ({"gpus": 8, "tp": 3}, "gpus: 8 does not divide by 3; choose a multiple"),
        ({"layers": (40,)}, "layers: 40 is out of range; the language model has layers 0-31"),
    ],
)
def test_what_cannot_be_planned_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        plan(PlanConfig(**{**MILLION, **changes}))


def test_the_command_reads_the_config_and_no_weights(tmp_path, capsys):
    tiny_config("llama").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace("{", '{"architectures": ["LlamaForCausalLM"],', 1)
    )
    (tmp_path / "model.safetensors").touch()
    out = tmp_path / "plan.json"
    assert main(["plan", "--lm", str(tmp_path), "--tokens", "1e6", "--json", str(out), "--gpu", "l40s"]) == 0
    shown, found = capsys.readouterr().out, json.loads(out.read_text())
    assert "512 latents (x16)" in shown
    assert found["lm_parameters"] == count_parameters(tiny_config("llama"))[0]
    assert found["fits"]
    assert found["memory_bytes"] == sum(found["memory"].values())
