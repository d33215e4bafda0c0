"""The training loop on a tiny language model: what it writes, what it may not depend on, and how it stops."""

import importlib
import itertools
import json
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from mlsae import stream
from mlsae.config import TrainConfig
from mlsae.data import pack
from mlsae.errors import ConfigError, DataError, Interrupted, MlsaeError, ModelError, NumericsError
from mlsae.lm import LanguageModel
from mlsae.stopping import StopFlag
from mlsae.text import TextSource
from mlsae.tokens import Tokenizer
from mlsae.train import train
from mlsae.untrusted import read_json, read_jsonl
from tiny import save_tiny_lm

torch.set_num_threads(1)
module = importlib.import_module("mlsae.train")  # the package's own `train` is the function
WALL = ("elapsed_seconds", "tokens_per_second")
STEPS, BATCH, CONTEXT = 20, 4, 16
TINY = {
    "tokens": STEPS * BATCH * CONTEXT,
    "batch_size": BATCH,
    "context_length": CONTEXT,
    "accumulation_steps": 1,
    "k": 4,
    "expansion_factor": 4,
    "init_tokens": 256,
    "lr": 3e-3,
    "log_every_steps": 1,
    "save_every_steps": 8,
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    """One cache of packed tokens for this file, and not the user's."""
    monkeypatch.setenv("MLSAE_CACHE", str(tmp_path_factory.getbasetemp() / "train-cache"))


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """A tiny LM's folder, a JSONL corpus, and the loaded LM."""
    folder = tmp_path_factory.mktemp("train")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(50)]
    for split, n_documents in {"train": 80, "validation": 12}.items():
        texts = [" ".join(draw.choices(words, k=draw.randint(3, 20))) for _ in range(n_documents)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / "text").mkdir(exist_ok=True)
        (folder / "text" / f"{split}.jsonl").write_text(lines)
    save_tiny_lm(folder / "lm", n_layers=3, d_model=16)
    return {"lm": str(folder / "lm"), "data": str(folder / "text")}


@pytest.fixture(scope="session")
def lm(places):
    return LanguageModel.from_pretrained(places["lm"], device="cpu", dtype="float32")


@pytest.fixture
def run(places, lm, tmp_path):
    """A function that trains into a new folder, or in the one named, and gives back the Run."""
    made = iter(range(100))

    def call(resume=False, out=None, with_lm=lm, **changes):
        config = TrainConfig(**{**places, **TINY, **changes, "out": str(out or tmp_path / f"run{next(made)}")})
        return train(config, resume=resume, progress=False, lm=with_lm)

    return call


def metrics(run):
    """The lines of metrics.jsonl less the clock."""
    folder = run if isinstance(run, Path) else Path(run.directory)
    return [{k: v for k, v in line.items() if k not in WALL} for line in read_jsonl(folder / "metrics.jsonl")]


def weights(run):
    return load_file(Path(run.directory) / "sae" / "model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- what a run is ---------------------------------------------------------------------------------------------------


def test_a_run_writes_what_is_documented(run, places):
    done = run(with_lm=None)
    folder = Path(done.directory)
    names = {"config.json", "metrics.jsonl", "run.lock", "sae", "step-00000016", "step-00000020"}
    assert {p.name for p in folder.iterdir()} == names
    assert {p.name for p in (folder / "sae").iterdir()} == {"config.json", "model.safetensors"}
    lines = read_jsonl(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[0].keys() >= {"step", "tokens", "loss", "fvu", "dead_fraction", "lr", "grad_norm", "tokens_per_second"}
    assert all(a["tokens"] < b["tokens"] <= b["step"] * BATCH * CONTEXT for a, b in itertools.pairwise(lines))
    config = read_json(folder / "config.json")
    assert None not in [config[key] for key in ("layers", "n_latents", "lr", "precision", "dead_after_tokens", "k_aux")]
    assert TrainConfig(**config).layers == (0, 1, 2)
    assert (done.steps, done.tokens) == (STEPS, TINY["tokens"])
    assert done.passes == pytest.approx(STEPS * BATCH / len(blocks_of(places)))
    assert done.sae.config.lm == places["lm"]
    assert equal(dict(done.sae.state_dict()), weights(done))


def blocks_of(places):
    """All the blocks of the training part, as a run reads them."""
    tokenizer = Tokenizer(AutoTokenizer.from_pretrained(places["lm"]))
    return pack(TextSource(places["data"], "train"), tokenizer, CONTEXT, progress=False)


def test_training_lowers_fvu(run):
    lines = metrics(run())
    assert sum(line["fvu"] for line in lines[-4:]) < 0.9 * sum(line["fvu"] for line in lines[:4])
    assert all(0 < fvu < 2 for line in lines for fvu in line["layer_fvu"])


def test_the_same_seed_gives_the_same_bits_and_another_does_not(run, lm):
    runs = [run(), run(), run(seed=43), run(with_lm=None)]
    assert equal(weights(runs[0]), weights(runs[1]))
    assert equal(weights(runs[0]), weights(runs[3]))
    assert metrics(runs[0]) == metrics(runs[1]) == metrics(runs[3])
    assert not equal(weights(runs[0]), weights(runs[2]))
    assert not torch.equal(weights(runs[0])["W_enc"], weights(runs[2])["W_enc"])


def test_global_random_numbers_do_not_matter(run):
    torch.manual_seed(5)
    first = run()
    torch.rand(7)
    assert equal(weights(first), weights(run()))


# ---- what must not depend on what --------------------------------------------------------------------------------------


def test_validation_and_checkpoints_change_nothing(run):
    plain = run()
    watched = run(validate_every_steps=1, save_every_steps=1)
    assert equal(weights(plain), weights(watched))
    steps, validations = metrics(watched)[::2], metrics(watched)[1::2]
    assert steps == metrics(plain)
    assert [(line["step"], line["tokens"]) for line in validations] == [(s["step"], s["tokens"]) for s in steps]
    assert all(0 < line["validation_fvu"] < 2 for line in validations)


def test_every_validation_is_written_down(run):
    """Steps that are validated need not be steps that are logged; what was measured may not be thrown away."""
    lines = metrics(run(validate_every_steps=3, log_every_steps=7))
    assert [line["step"] for line in lines if "validation_fvu" in line] == [3, 6, 9, 12, 15, 18]


def visible_in(lm, blocks, n):
    """Unmasked tokens of the first n blocks of the stream: an initial sample that ends there for every batch size."""
    return int(lm.keep_mask(blocks.read(0, n, seed=42)).sum())


@pytest.mark.parametrize("n_sequences", [4, 5, 1000])
def test_validation_reads_each_sequence_once_whatever_the_batch(run, lm, places, n_sequences):
    """With a last batch that is not full, no sequence is read twice and none beyond those asked for."""
    run(tokens=64)
    still = {"tokens": 64, "lr": 1e-12, "validate_every_steps": 1, "init_tokens": visible_in(lm, blocks_of(places), 16)}
    values = [
        metrics(run(**still, batch_size=b, accumulation_steps=4 // b, validation_sequences=n_sequences))[1][
            "validation_fvu"
        ]
        for b in (1, 4)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_lawson2024_validation_moves_its_clock(run):
    """Defect D8, kept in that recipe: latents count as quiet in validation's forward passes too."""
    recipe = {"recipe": "lawson2024", "batch_size": 1, "tokens": 10 * CONTEXT, "save_every_steps": 10}
    plain, watched = run(**recipe), run(**recipe, validate_every_steps=5, validation_sequences=3)
    quiet = [load_file(Path(r.directory) / "step-00000010" / "state.safetensors")["quiet"] for r in (plain, watched)]
    assert not torch.equal(*quiet)
    assert (quiet[1] <= quiet[0] + 2 * 3).all()
    silent = quiet[0] == 10  # never active in ten steps
    assert (quiet[1][silent] >= 1).all()
    assert equal(weights(plain), weights(watched))  # nothing is dead yet, so only the clock moved


def test_a_subset_of_layers_means_model_layers(run, lm, places):
    """Given in any order: the frame's means are those of the named layers, and FVU is that of the all-layers frame."""
    off = {"mask_norm_factor": 0.0, "tokens": 64, "init_tokens": 10**6}
    every, some = run(**off), run(**off, layers=(2, 0))
    assert some.sae.layers == (2, 0)
    assert torch.equal(some.sae.frame.mean, every.sae.frame.mean[[2, 0]])
    tokens = blocks_of(places).read(0, len(blocks_of(places)), seed=42)
    resid = lm.resid(tokens)[:, lm.keep_mask(tokens)]
    torch.testing.assert_close(every.sae.frame.mean, resid.mean(1), rtol=1e-4, atol=1e-5)


def test_one_layer_is_that_layer_and_zero_is_one(run):
    every = run(mask_norm_factor=0.0, tokens=64).sae.frame.mean
    for layer in (0, 2):
        assert torch.equal(run(mask_norm_factor=0.0, tokens=64, layers=(layer,)).sae.frame.mean[0], every[layer])


def test_one_group_is_the_default_and_groups_are_apart(run):
    """With a group per layer each layer's part trains as an SAE of that layer alone does, but for the shared noise of Adam."""
    assert equal(weights(run()), weights(run(groups=1)))
    grouped = run(groups=3)
    assert weights(grouped)["b_pre"].shape == (3, 16)
    assert weights(grouped)["W_enc"].shape == (3 * 64, 16)


def test_accumulation_splits_a_step_and_does_not_change_it(run, lm, places):
    run(tokens=64)
    sample = visible_in(lm, blocks_of(places), 16)
    late = {"init_tokens": sample, "dead_after_tokens": 10**6}  # what is dead may change within a step
    whole, halves = (run(batch_size=b, accumulation_steps=4 // b, **late) for b in (4, 2))
    for a, b in zip(metrics(whole), metrics(halves), strict=True):
        assert (a["step"], a["tokens"]) == (b["step"], b["tokens"])
        assert a["fvu"] == pytest.approx(b["fvu"], rel=1e-3)
    for name, value in weights(whole).items():
        torch.testing.assert_close(value, weights(halves)[name], rtol=1e-2, atol=1e-3)


# ---- text ------------------------------------------------------------------------------------------------------------


def test_without_repeat_a_run_stops_when_the_text_ends(run, places):
    done = run(tokens=10**6, repeat=False, dead_after_tokens=10**5, save_every_steps=10**6)
    assert done.steps == len(blocks_of(places)) // BATCH
    assert done.passes <= 1
    assert metrics(done)[-1]["step"] == done.steps
    assert equal(dict(done.sae.state_dict()), weights(done))


def test_text_shorter_than_one_step_is_refused_and_not_a_run_of_no_steps(run, tmp_path):
    with pytest.raises(MlsaeError, match="step"):
        run(tokens=10**6, batch_size=5000, repeat=False)
    assert list(tmp_path.iterdir()) == []


def test_several_passes_are_announced(run, caplog, places):
    run(tokens=64)
    assert "passes" not in caplog.text
    n_blocks = len(blocks_of(places))
    done = run(tokens=(n_blocks * 2 + 4) * 8, context_length=CONTEXT, batch_size=n_blocks // 2, save_every_steps=100)
    assert "passes" not in caplog.text
    done = run(tokens=n_blocks * CONTEXT * 3, batch_size=n_blocks // 2, save_every_steps=100)
    assert f"the text holds {n_blocks * CONTEXT} tokens: training will take" in caplog.text
    assert "passes" in caplog.text
    assert done.passes > 2


def poison_masked(monkeypatch, value):
    """What the language model puts out at masked positions becomes `value`."""
    real = LanguageModel.resid

    def resid(self, tokens, layers=None):
        out = real(self, tokens, layers)
        out[:, ~self.keep_mask(tokens)] = value
        return out

    monkeypatch.setattr(LanguageModel, "resid", resid)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_masked_positions_never_contribute(run, monkeypatch, value):
    """Special tokens and first positions, poisoned: training is finite, and bit for bit the same."""
    plain = run()
    poison_masked(monkeypatch, value)
    poisoned = run()
    assert equal(weights(plain), weights(poisoned))
    assert metrics(plain) == metrics(poisoned)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_lawson2024_zeroes_is_zero(run, monkeypatch, value):
    """Zero, not zero times what stood there."""
    recipe = {"recipe": "lawson2024", "batch_size": 1, "tokens": 10 * CONTEXT, "mask_first_position": True}
    plain = run(**recipe)
    poison_masked(monkeypatch, value)
    assert equal(weights(plain), weights(run(**recipe)))


def test_vectors_beyond_the_norm_limit_are_counted_and_left_out(run, monkeypatch):
    """One vector a sequence of layer 1 is made huge after the limits are fixed: counted there, and the loss does not move."""
    real, calls = LanguageModel.resid, []

    def resid(self, tokens, layers=None):
        out = real(self, tokens, layers)
        if len(tokens) == 1:  # the prompt of a fingerprint
            return out
        calls.append(len(tokens))
        if len(calls) > 8:
            place = self.keep_mask(tokens).float().argmax(1)
            out[1, torch.arange(len(tokens)), place] = 1e6
        return out

    monkeypatch.setattr(stream, "READ_TOKENS", 1)  # each forward pass is a step's
    plain = run()
    monkeypatch.setattr(LanguageModel, "resid", resid)
    done = run()
    n_huge = sum(calls[8:])
    assert n_huge > 40
    assert done.masked_by_norm == [0, n_huge, 0]
    assert metrics(done)[-1]["masked_by_norm"] == [0, n_huge, 0]
    assert metrics(done)[-1]["tokens"] == metrics(plain)[-1]["tokens"] - n_huge
    assert all(line["fvu"] < 2 for line in metrics(done))


def test_an_infinite_vector_is_beyond_every_limit_and_costs_nothing_but_itself(run, monkeypatch):
    """As float16 models have them: it is masked and counted, and what is remembered of it can be saved."""
    real = LanguageModel.resid

    def resid(self, tokens, layers=None):
        out = real(self, tokens, layers)
        out[1, 0, 5, 0] = torch.inf
        return out

    run()  # whose initial sample is finite
    start = module.Loop.run
    monkeypatch.setattr(
        module.Loop, "run", lambda loop: (monkeypatch.setattr(LanguageModel, "resid", resid), start(loop))[1]
    )
    done = run()
    assert done.steps == STEPS
    assert done.masked_by_norm[1] > 0
    assert max(line["norm_ratio"] for line in metrics(done)) > 1e30


def test_lawson2024_runs_end_to_end(run):
    done = run(
        recipe="lawson2024",
        batch_size=None,
        accumulation_steps=2,
        tokens=80 * CONTEXT,
        validate_every_steps=10,
        validation_sequences=4,
    )
    lines = [line for line in metrics(done) if "fvu" in line]
    assert done.steps == len(lines) == 40
    assert done.sae.config.frame == "vector"
    assert lines[-1]["tokens"] == 80 * CONTEXT  # masked vectors are kept, as zeros
    assert [line["step"] for line in metrics(done) if "validation_fvu" in line] == [10, 20, 30, 40]
    assert sum(line["fvu"] for line in lines[-8:]) < sum(line["fvu"] for line in lines[:8])


def test_short_batches_are_read_together_and_learned_from_one_by_one(run, monkeypatch):
    """Fewer forward passes, the same steps on the same tokens; what is left is the rounding of larger products."""
    real, sizes = LanguageModel.resid, []

    def resid(self, tokens, layers=None):
        sizes.append(tokens.numel())
        return real(self, tokens, layers)

    monkeypatch.setattr(LanguageModel, "resid", resid)
    together, n_passes = run(), len(sizes)
    assert max(sizes) <= max(stream.READ_TOKENS, min(sizes))
    monkeypatch.setattr(stream, "READ_TOKENS", 1)
    sizes.clear()
    alone = run()
    assert n_passes < len(sizes)
    for one, other in zip(metrics(together), metrics(alone), strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


# ---- stopping ----------------------------------------------------------------------------------------------------------


def poison_step(monkeypatch, step):
    """NaN at one visible position of one layer in the n-th training step."""
    real = module.Loop._readings

    def readings(self):
        for reading in real(self):
            if self.trainer.steps + 1 == step:
                resid = reading.resid.clone()
                resid[1, -1, int(reading.visible[-1].nonzero()[-1]), 3] = float("nan")
                reading = replace(reading, resid=resid, vectors=resid[:, reading.visible])
            yield reading

    monkeypatch.setattr(module.Loop, "_readings", readings)


RECIPES = {
    "standard": {},
    "accumulating": {"batch_size": 2, "accumulation_steps": 2},
    "lawson2024": {"recipe": "lawson2024", "batch_size": 1, "accumulation_steps": 2, "tokens": 20 * 2 * CONTEXT},
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("step", [5, 9])
def test_a_step_that_is_not_finite_is_undone_and_the_state_before_it_stands(run, monkeypatch, tmp_path, step, recipe):
    """Step 9 follows a regular checkpoint, step 5 does not. Resumed without the poison, it is as if it had never been."""
    with monkeypatch.context() as patch:
        poison_step(patch, step)
        with pytest.raises(NumericsError, match=f"loss: nan at step {step};") as caught:
            run(out=tmp_path / "poisoned", **RECIPES[recipe])
    assert caught.value.exit_code == 5
    assert sorted(p.name for p in (tmp_path / "poisoned").glob("step-*"))[-1] == f"step-{step - 1:08d}"
    resumed, plain = run(out=tmp_path / "poisoned", resume=True, **RECIPES[recipe]), run(**RECIPES[recipe])
    assert equal(weights(resumed), weights(plain))
    assert metrics(resumed) == metrics(plain)


def test_a_first_step_that_is_not_finite_leaves_no_directory(run, monkeypatch, tmp_path):
    poison_step(monkeypatch, 1)
    with pytest.raises(NumericsError, match="loss: nan at step 1;"):
        run()
    assert list(tmp_path.iterdir()) == []


def test_a_start_over_a_run_that_ended_before_its_first_checkpoint_begins_its_metrics_anew(run, monkeypatch, tmp_path):
    """There is nothing to resume, so it is started again: lines of the first attempt are not part of this run."""

    def end(self):
        if self.trainer.steps == 4:
            raise KeyboardInterrupt
        yield from real(self)

    real = module.Loop._readings
    with monkeypatch.context() as patch:
        patch.setattr(module.Loop, "_readings", end)
        with pytest.raises(KeyboardInterrupt):
            run(out=tmp_path / "again")
    again = run(out=tmp_path / "again")
    assert [line["step"] for line in metrics(again)] == list(range(1, STEPS + 1))
    assert metrics(again) == metrics(run())


@pytest.mark.parametrize("ends", ["before save_pretrained", "within save_pretrained"])
def test_a_run_that_ended_while_it_wrote_its_last_sae_has_it_once_resumed(run, monkeypatch, tmp_path, ends):
    """The last checkpoint is there, so no step is left; `sae` must all the same be that checkpoint's."""
    real = module.MLSAE.save_pretrained

    def end(self, directory, **options):
        if (tmp_path / "run" / f"step-{STEPS:08d}").exists():
            if ends.startswith("within"):
                (tmp_path / "run" / "sae" / "config.json").unlink()
            raise KeyboardInterrupt
        real(self, directory, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module.MLSAE, "save_pretrained", end)
        with pytest.raises(KeyboardInterrupt):
            run(out=tmp_path / "run")
    resumed = run(out=tmp_path / "run", resume=True)
    assert resumed.steps == STEPS
    assert equal(weights(resumed), weights(run()))
    assert resumed.sae.config.n_latents == 64


def test_a_start_that_fails_keeps_no_file_open(run, monkeypatch):
    """Whatever fails between the opening of metrics.jsonl and the first step."""

    def sample(self):
        raise DataError("data", "none")

    monkeypatch.setattr(module.Loop, "_sample", sample)
    try:
        run()
    except DataError as error:
        frames = list(itertools.takewhile(bool, iterate_frames(error.__traceback__)))
        loop = next(f.f_locals["self"] for f in frames if isinstance(f.f_locals.get("self"), module.Loop))
    assert not hasattr(loop, "metrics")  # not opened yet


def iterate_frames(traceback):
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def test_stopped_before_the_first_step_leaves_no_directory(run, tmp_path, monkeypatch):
    def resid(self, tokens, layers=None):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(LanguageModel, "resid", resid)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize(
    "recipe", [{}, {"recipe": "lawson2024", "batch_size": 1, "dead_after_tokens": 64, "tokens": 12 * CONTEXT}]
)
def test_stopped_in_a_validation_it_saves_and_validates_once_resumed(run, tmp_path, monkeypatch, recipe, at):
    """A validation can take long, so it is given up, with what it did to the clock, and done again from its start."""
    knobs = {**recipe, "validate_every_steps": 3, "validation_sequences": 6, "save_every_steps": 3}
    real, batches = module.validate, itertools.count()
    with monkeypatch.context() as patch:

        def validate(trainer, lm, blocks, *rest):
            real_read = blocks.read

            def read(*arguments, **options):
                if next(batches) == at:
                    signal.raise_signal(signal.SIGTERM)
                return real_read(*arguments, **options)

            if trainer.steps == 6:
                patch.setattr(blocks, "read", read)
            return real(trainer, lm, blocks, *rest)

        patch.setattr(module, "validate", validate)
        with pytest.raises(Interrupted, match="stopped after step 6 of"):
            run(**knobs, out=tmp_path / "stopped")
    resumed, plain = run(**knobs, out=tmp_path / "stopped", resume=True), run(**knobs)
    last = sorted(path.name for path in Path(plain.directory).glob("step-*"))[-1]
    for name in ("sae.safetensors", "state.safetensors"):
        same = [Path(r.directory) / last / name for r in (resumed, plain)]
        assert same[0].read_bytes() == same[1].read_bytes()
    assert metrics(resumed) == metrics(plain)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves_and_resumes_as_if_nothing_happened(run, tmp_path, monkeypatch, number):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        real = module.Loop._readings

        def readings(self):
            if self.trainer.steps == 4:
                signal.raise_signal(number)
            yield from real(self)

        patch.setattr(module.Loop, "_readings", readings)
        with pytest.raises(Interrupted, match=f"stopped after step 5 of {STEPS}; --resume continues"):
            run(out=tmp_path / "stopped")
    assert signal.getsignal(number) == before
    assert (tmp_path / "stopped" / "step-00000005").exists()
    resumed, plain = run(out=tmp_path / "stopped", resume=True), run()
    assert equal(weights(resumed), weights(plain))
    assert metrics(resumed) == metrics(plain)


def test_asked_to_stop_in_the_last_step_it_is_simply_done(run, monkeypatch):
    real = module.Loop._readings

    def readings(self):
        if self.trainer.steps == STEPS - 1:
            signal.raise_signal(signal.SIGINT)
        yield from real(self)

    monkeypatch.setattr(module.Loop, "_readings", readings)
    assert run().steps == STEPS


def test_a_second_signal_of_either_kind_ends_the_process():
    """As the flag's own words say; the first one asks."""
    with StopFlag() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == [signal.SIG_DFL, signal.SIG_DFL]


def test_a_finished_run_resumed_is_finished_still(run, tmp_path):
    first = run(out=tmp_path / "run")
    before, lines = weights(first), metrics(first)
    again = run(out=tmp_path / "run", resume=True)
    assert (again.steps, again.passes) == (first.steps, first.passes)
    assert equal(weights(again), before)
    assert metrics(again) == lines


# ---- refusals ----------------------------------------------------------------------------------------------------------

REFUSED = {
    "layers": (ConfigError, {"layers": (3,)}, "layers: 3 is out of range"),
    "tokens": (ConfigError, {"tokens": 10}, "10 tokens is less than one step"),
    "k": (ConfigError, {"k": 65}, "k: 65 exceeds n_latents 64"),
    "dead": (ConfigError, {"dead_after_tokens": 10}, "less than one step"),
    "device": (ConfigError, {"device": "cuda:99"}, "device: 'cuda:99' is not here"),
    "precision": (ConfigError, {"precision": "float16"}, "not supported on CPU"),
    "context": (ConfigError, {"context_length": 65}, "65 exceeds the model's 64"),
    "text": (DataError, {"data": "/nowhere/at/all.jsonl"}, "nowhere"),
    "column": (DataError, {"text_column": "words"}, "no .*'words'"),
    "lm": (ModelError, {"lm": "/nowhere/lm"}, "nowhere"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_work_is_refused_and_leaves_no_directory(run, tmp_path, kind, lm):
    error, changes, message = REFUSED[kind]
    with pytest.raises(error, match=message):
        run(with_lm=None if kind == "lm" else lm, **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 300, "file/run"])
def test_an_output_that_cannot_be_is_refused_before_anything_is_loaded(run, tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(MlsaeError, match=r"File name too long|Not a directory") as caught:
        run(out=tmp_path / name, with_lm=None)
    assert caught.value.exit_code == 4


def test_a_language_model_can_be_used_again(run, lm):
    before = {name: value.clone() for name, value in lm.hf.state_dict().items()}
    first = run()
    assert equal(weights(first), weights(run()))
    assert equal(before, dict(lm.hf.state_dict()))
