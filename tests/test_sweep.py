"""Several SAEs off one reading of the text: each is what it would be alone, whatever interrupts them."""

import importlib
import json
import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mlsae.cli import main
from mlsae.compare import CompareConfig
from mlsae.config import TrainConfig
from mlsae.errors import ConfigError, Interrupted, NumericsError, ResourceError
from mlsae.evaluate import evaluate
from mlsae.files import finite
from mlsae.lm import LanguageModel
from mlsae.lockstep import train_together
from mlsae.sweep import grid
from mlsae.train import train
from mlsae.untrusted import read_json, read_jsonl
from tiny import save_tiny_lm

training, sweeping = (
    importlib.import_module(f"mlsae.{name}") for name in ("train", "sweep")
)  # those of mlsae are functions
STEPS, BATCH, CONTEXT = 12, 4, 16
TINY = {
    "tokens": STEPS * BATCH * CONTEXT,
    "batch_size": BATCH // 2,
    "context_length": CONTEXT,
    "accumulation_steps": 2,
    "k": 4,
    "expansion_factor": 4.0,
    "init_tokens": 256,
    "lr": 3e-3,
    "log_every_steps": 1,
    "save_every_steps": 5,
    "device": "cpu",
    "data_seed": 5,
}
ARMS = {
    "few": {"k": 2},
    "many": {"k": 8, "expansion_factor": 8.0, "seed": 7},
    "apart": {"groups": 3, "lr": 1e-3},
    "vector": {"frame": "vector", "k_aux": 0},
}
WALL = ("elapsed_seconds", "tokens_per_second")


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MLSAE_CACHE", str(tmp_path_factory.getbasetemp() / "sweep-cache"))


@pytest.fixture(autouse=True)
def _groups(monkeypatch):
    """Micro-batches are read one by one, as those of a usual size are; nothing is lost if this machine loses power."""
    monkeypatch.setattr("mlsae.stream.READ_TOKENS", 1)
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(50)]
    (folder / "text").mkdir()
    for split, n_documents in {"train": 60, "validation": 8, "test": 12}.items():
        texts = [" ".join(draw.choices(words, k=draw.randint(3, 20))) for _ in range(n_documents)]
        (folder / "text" / f"{split}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    save_tiny_lm(folder / "lm", n_layers=3, d_model=16)
    return {"lm": str(folder / "lm"), "data": str(folder / "text")}


@pytest.fixture(scope="module")
def lm(places):
    return LanguageModel.from_pretrained(places["lm"], device="cpu", dtype="float32")


@pytest.fixture
def configs(places, tmp_path):
    """The arms' configs, in folders of a name."""

    def make(folder, arms=ARMS, **changes):
        base = {**places, **TINY, **changes}
        return {n: TrainConfig(**{**base, **own, "out": str(tmp_path / folder / n)}) for n, own in arms.items()}

    return make


@pytest.fixture(scope="module")
def alone(places, lm, tmp_path_factory):
    """Each arm's config trained by itself: the run directories, for each way of reading."""
    made = {}

    def make(read_tokens=1):
        if read_tokens not in made:
            out = tmp_path_factory.mktemp("alone")
            each = {n: TrainConfig(**{**places, **TINY, **own, "out": str(out / n)}) for n, own in ARMS.items()}
            made[read_tokens] = {n: Path(train(c, progress=False, lm=lm).directory) for n, c in each.items()}
        return made[read_tokens]

    return make


def differences(a: Path, b: Path) -> list[str]:
    """What two run directories do not have in common, bit for bit, but for times and the folder's own name."""
    found = [p for p in (x.name for x in a.glob("step-*")) if not (b / p).is_dir()]
    for path in sorted(p.relative_to(a) for p in a.rglob("*.safetensors")):
        if (b / path).is_file():
            mine, theirs = load_file(a / path), load_file(b / path)
            found += [
                f"{path} {name}" for name in mine.keys() | theirs.keys() if not torch.equal(mine[name], theirs[name])
            ]
    lines = [
        [{k: v for k, v in row.items() if k not in WALL} for row in read_jsonl(x / "metrics.jsonl")] for x in (a, b)
    ]
    return found + (["metrics.jsonl"] if lines[0] != lines[1] else [])


def compared(folders, runs):
    return {name: differences(folders[name], Path(runs[name].directory)) for name in folders}


# ---- one reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read_tokens", [1, 1024])
def test_an_arm_is_bit_for_bit_what_it_is_alone(configs, alone, lm, monkeypatch, read_tokens):
    """Weights, moments, random numbers, every checkpoint and every line of metrics; 1,024 tokens are many micro-batches."""
    monkeypatch.setattr("mlsae.stream.READ_TOKENS", read_tokens)
    runs = train_together(configs("beside"), progress=False, lm=lm).runs
    assert compared(alone(read_tokens), runs) == {name: [] for name in ARMS}
    assert len({tuple(run.sae.W_enc.shape) for run in runs.values()}) == 3


@pytest.mark.parametrize("n_arms", [1, 2, 4])
def test_the_language_model_reads_each_micro_batch_once_however_many_learn(configs, lm, monkeypatch, n_arms):
    """As often as for one, when all begin alike; each other beginning reads the initial sample for itself."""
    real, passes = LanguageModel.resid, []

    def resid(self, tokens, layers=None):
        if len(tokens) > 1:  # not the prompt of a fingerprint
            passes.append(tokens)
        return real(self, tokens, layers)

    monkeypatch.setattr(LanguageModel, "resid", resid)
    train(configs("alone")["few"], progress=False, lm=lm)
    by_one = len(passes)
    passes.clear()
    arms = {f"arm{i}": {"k": 2 + i, "seed": i, "expansion_factor": 2.0 + i} for i in range(n_arms)}
    train_together(configs("beside", arms), progress=False, lm=lm)
    assert len(passes) == by_one


def test_arms_that_read_less_end_sooner_and_the_others_go_on(configs, alone, lm):
    arms = {"short": {"tokens": 5 * BATCH * CONTEXT}, "long": {}, "odd": {"accumulation_steps": 3}}
    runs = train_together(configs("beside", arms), progress=False, lm=lm).runs
    assert {name: run.steps for name, run in runs.items()} == {"short": 5, "long": STEPS, "odd": 8}
    for name, config in configs("alone", arms).items():
        assert differences(Path(train(config, progress=False, lm=lm).directory), Path(runs[name].directory)) == []


# ---- interrupted -------------------------------------------------------------------------------------------------------


def strike(monkeypatch, what, at=6, arm="many"):
    """Something happens as one arm begins its step `at`."""
    real = training.Loop._readings

    def readings(self):
        if self.trainer.steps + 1 == at and self.run_directory.path.name == arm:
            what(self)
        return real(self)

    monkeypatch.setattr(training.Loop, "_readings", readings)


@pytest.mark.parametrize(("arm", "least"), [("few", 5), ("vector", 6)])
def test_asked_to_stop_every_arm_is_saved_and_goes_on_as_if_nothing_had_happened(
    configs, alone, lm, monkeypatch, arm, least
):
    """The first arm is told in its step; those that passed on before finish the one they are in."""
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        strike(patch, lambda loop: signal.raise_signal(signal.SIGINT), arm=arm)
        with pytest.raises(Interrupted, match=f"every arm saved, none before step {least}; --resume continues"):
            train_together(configs("beside"), progress=False, lm=lm)
    assert signal.getsignal(signal.SIGINT) == before
    stopped = {name: sorted(Path(c.out).glob("step-*"))[-1].name for name, c in configs("beside").items()}
    assert set(stopped.values()) <= {"step-00000005", "step-00000006"}
    runs = train_together(configs("beside"), resume=True, progress=False, lm=lm).runs
    folders = alone()
    for name, found in compared(folders, runs).items():
        assert found == [step for step in found if step == "step-00000010"], name  # the stop saved in its place


@pytest.mark.parametrize("at", [2, 6])
def test_killed_every_arm_goes_on_from_its_own_newest_checkpoint(configs, alone, lm, monkeypatch, at):
    """Killed after some arms have saved and others not; at step 2 none has, and it is begun anew."""

    def die(loop):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        strike(patch, die, at=at, arm="apart")
        real = training.Loop._save
        patch.setattr(
            training.Loop, "_save", lambda self: real(self) if self.run_directory.path.name != "few" else None
        )
        with pytest.raises(KeyboardInterrupt):
            train_together(configs("beside"), progress=False, lm=lm)
    saved = {name: len(list(Path(c.out).glob("step-*"))) for name, c in configs("beside").items()}
    assert saved == ({"few": 0, "many": 1, "apart": 1, "vector": 0} if at == 6 else dict.fromkeys(ARMS, 0))
    runs = train_together(configs("beside"), resume=at == 6, progress=False, lm=lm).runs
    assert compared(alone(), runs) == {name: [] for name in ARMS}


def test_one_arm_goes_on_alone_as_it_would_have_beside_the_others(configs, alone, lm, monkeypatch):
    with monkeypatch.context() as patch:
        strike(patch, lambda loop: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted):
            train_together(configs("beside"), progress=False, lm=lm)
    resumed = train(configs("beside")["apart"], resume=True, progress=False, lm=lm)
    assert resumed.steps == STEPS
    whole = load_file(alone()["apart"] / f"step-{STEPS:08d}" / "sae.safetensors")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.sae.state_dict().items())


def test_an_arm_that_fails_is_named_and_the_others_are_saved(configs, alone, lm, monkeypatch):
    with monkeypatch.context() as patch:
        strike(patch, lambda loop: loop.trainer.sae.W_enc.data.fill_(float("nan")))
        with pytest.raises(NumericsError, match=r"arm 'many'"):
            train_together(configs("beside"), progress=False, lm=lm)
    steps = {name: sorted(Path(c.out).glob("step-*"))[-1].name for name, c in configs("beside").items()}
    assert steps.pop("many") == "step-00000005"
    assert steps == {"few": "step-00000007", "apart": "step-00000006", "vector": "step-00000006"}
    train_together(configs("beside"), resume=True, progress=False, lm=lm)
    for name, folder in alone().items():
        mine = load_file(Path(configs("beside")[name].out) / "sae" / "model.safetensors")
        assert all(torch.equal(t, mine[n]) for n, t in load_file(folder / "sae" / "model.safetensors").items())


# ---- refused -----------------------------------------------------------------------------------------------------------

UNLIKE = {
    "data_seed": {"data_seed": 6},
    "context_length": {"context_length": 8},
    "batch_size": {"batch_size": 1},
    "layers": {"layers": (0,)},
    "mask_norm_factor": {"mask_norm_factor": 0.0},
    "init_tokens": {"init_tokens": 300},
    "recipe": {"recipe": "lawson2024", "mask_first_position": True, "mask_norm_factor": 10.0},
}


@pytest.mark.parametrize("key", UNLIKE)
def test_arms_that_would_read_otherwise_are_refused(configs, lm, tmp_path, key):
    with pytest.raises(ConfigError, match="arms read one stream") as caught:
        train_together(configs("beside", {"a": {}, "b": UNLIKE[key]}), progress=False, lm=lm)
    assert caught.value.field == key
    assert list(tmp_path.iterdir()) == []


def test_a_text_read_only_as_far_as_needed_is_read_as_far_by_all(configs, lm):
    with pytest.raises(ConfigError, match=r"^tokens: "):
        train_together(configs("beside", {"a": {}, "b": {"tokens": 400}}, streaming=True), progress=False, lm=lm)


def test_two_arms_in_one_folder_are_refused(configs, lm):
    config = configs("beside")["few"]
    with pytest.raises(ConfigError, match="out: two arms have one run directory"):
        train_together({"a": config, "b": config}, progress=False, lm=lm)


def test_what_cannot_be_is_said_of_the_arm(configs, lm, tmp_path):
    with pytest.raises(ConfigError, match=r"k: 65 exceeds .* \(arm 'b'\)"):
        train_together(configs("beside", {"a": {}, "b": {"k": 65}}), progress=False, lm=lm)
    with pytest.raises(ResourceError, match="no checkpoint in any of its arms"):
        train_together(configs("beside"), resume=True, progress=False, lm=lm)
    assert list(tmp_path.iterdir()) == []


def test_memory_is_reckoned_for_all_arms_together(configs, lm, monkeypatch):
    entries = [16 * 16 * n for n in (4, 8, 12, 4)]
    monkeypatch.setattr("mlsae.devices.free_memory", lambda device: 32 * sum(entries) - 1)
    with pytest.raises(ConfigError, match=r"arms: 4 SAEs at once need about .* GB free; train fewer at once"):
        train_together(configs("beside"), progress=False, lm=lm)
    monkeypatch.setattr("mlsae.devices.free_memory", lambda device: 32 * sum(entries))
    monkeypatch.setattr("mlsae.files.free_bytes", lambda path: 3 * 24 * sum(entries) - 1)
    with pytest.raises(ResourceError, match="out: checkpoints of 4 SAEs need"):
        train_together(configs("beside"), progress=False, lm=lm)


# ---- the whole sweep ---------------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_once_and_named(configs):
    base = configs("s", {"a": {}})["a"]
    found = grid(base, [2, 4], [1.0, 1.5], [3])
    assert list(found) == ["k2-x1-seed3", "k2-x1.5-seed3", "k4-x1-seed3", "k4-x1.5-seed3"]
    for name, config in found.items():
        assert Path(config.out) == Path(base.out) / name
        assert f"k{config.k}-x{config.expansion_factor:g}-seed{config.seed}" == name
        assert config.data_seed == 5
    assert list(grid(base, None, None, None)) == ["k4-x4-seed42"]
    by_number = base.replaced(n_latents=40, expansion_factor=None)
    assert list(grid(by_number, None, None, None)) == ["k4-n40-seed42"]
    for field, values in {"k": [2, 2], "expansion_factor": [1.0, 1.0], "seed": [0, 0]}.items():
        with pytest.raises(ConfigError, match=f"^{field}: {values[0]:g} is given twice"):
            grid(base, **{"k": None, "expansion_factor": None, "seed": None, field: values})
    with pytest.raises(ConfigError, match="k: no value given"):
        grid(base, [], None, None)


def test_a_sweep_from_the_shell_trains_evaluates_and_tells(places, lm, tmp_path, capsys):
    """Its numbers are those of `evaluate` on each arm; run again it measures nothing twice."""
    flags = {k: v for k, v in {**TINY, **places, "tokens": 256, "evaluate_tokens": 256}.items() if k != "k"}
    words = [w for k, v in flags.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    command = ["sweep", *words, "--k", "2", "4", "--seed", "1", "2", "--out", str(tmp_path / "s"), "--quiet"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    done = read_json(tmp_path / "s" / "sweep.json")
    assert [arm["name"] for arm in done["arms"]] == [f"k{k}-x4-seed{s}" for k in (2, 4) for s in (1, 2)]
    assert len({arm["weights"] for arm in done["arms"]}) == 4
    assert shown.splitlines()[: 1 + len(done["arms"])] == (tmp_path / "s" / "sweep.txt").read_text().splitlines()
    for arm in done["arms"]:
        folder = tmp_path / "s" / arm["name"]
        assert read_json(folder / "evaluation.json") == arm["evaluation"]
        again = evaluate(folder, lm, places["data"], tokens=256, progress=False).to_dict()
        assert finite(again["mean"]) == arm["evaluation"]["mean"]
        assert arm["config"]["data_seed"] == 5
    assert {p.suffix for p in (tmp_path / "s" / "figures").iterdir()} == {".png", ".pdf", ".json"}
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "s").glob("*/evaluation.json")}
    assert main(command) == 4
    assert main([*command, "--resume"]) == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "s").glob("*/evaluation.json")} == stamps


def test_stopped_while_it_evaluates_it_says_how_to_go_on_and_that_works(places, tmp_path, capsys, monkeypatch):
    flags = {k: v for k, v in {**TINY, **places, "tokens": 256, "evaluate_tokens": 256}.items() if k != "k"}
    words = [w for k, v in flags.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    command = ["sweep", *words, "--k", "2", "4", "--out", str(tmp_path / "s"), "--quiet"]
    real, calls = sweeping.evaluate, []

    def stopped(*what, **how):
        calls.append(None)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(*what, **how)

    with monkeypatch.context() as patch:
        patch.setattr(sweeping, "evaluate", stopped)
        assert main(command) == 75
    assert capsys.readouterr().err == "error: sweep: stopped; nothing half-made is left; --resume continues\n"
    assert main(command) == 4
    assert main([*command, "--resume"]) == 0
    assert len(read_json(tmp_path / "s" / "sweep.json")["arms"]) == 2


@pytest.mark.parametrize("name", ["sweep", "compare", "reproduce"])
def test_stopped_before_there_is_a_checkpoint_the_same_command_begins_anew(places, lm, tmp_path, monkeypatch, name):
    """And after that, it goes on with --resume, whichever command it is."""
    module, out = importlib.import_module(f"mlsae.{name}"), str(tmp_path)
    config = TrainConfig(**{**TINY, **places}, out=out).replaced(n_latents=None)
    work = {
        "sweep": lambda: module.sweep(config, lm=lm),
        "compare": lambda: module.compare(config=two_arms(places, out), lm=lm),
        "reproduce": lambda: module.reproduce(config, lens=False, rival=False, random_model=False, lm=lm),
    }[name]

    def stopped(*what, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train_together", stopped)
    with pytest.raises(KeyboardInterrupt):
        work()
    (tmp_path / "arm" / "step-00000005").mkdir(parents=True)
    with pytest.raises(Interrupted, match=f"^{name}: stopped; nothing half-made is left; --resume continues$"):
        work()


def two_arms(places, out):
    return CompareConfig.of(
        {**TINY, **places, "k": [4], "out": out, "arms": [{"name": "a"}, {"name": "b", "groups": 3}]}
    )
