"""The promise of a long run: killed at any moment and resumed, it ends in the same bits as if nothing had happened.

Trainers run in processes of their own. This file is also the program that starts them: it imports torch once, before any
parallel operation, and forks one trainer for every line it is sent, so that an attempt costs a fraction of a second.
"""

import contextlib
import hashlib
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

# ---- the program that starts trainers ----------------------------------------------------------------------------------


def serve():
    """For each line of JSON, the arguments of `attempt`: fork a trainer, say its pid, and, when it has ended, how."""
    import torch

    torch.set_num_threads(1)
    for name in (
        "mlsae.train",
        "safetensors.torch",
        "transformers.models.llama.modeling_llama",
        "transformers.models.auto",
    ):
        importlib.import_module(name)  # here once, and not in every trainer
    for line in sys.stdin:
        task = json.loads(line)
        child = os.fork()
        if child == 0:
            attempt(**task)
        tell(pid=child)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        tell(ended=status)


def attempt(config, resume, reads, stop=None, vitals=False):
    """The trainer: one part of a run, telling of its steps and saves as they happen; during step `stop` it is asked to stop."""
    import torch

    from mlsae.checkpoint import RunDirectory
    from mlsae.config import TrainConfig
    from mlsae.errors import MlsaeError

    module = importlib.import_module("mlsae.train")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.fsync = lambda _: None  # a killed process loses nothing that it wrote: syncing costs time and shows nothing
    save, readings, step, validate = RunDirectory.save, module.Loop._readings, module.Loop._step, module.validate

    def told_save(self, checkpoint, keep):
        tell(save=checkpoint.step)
        save(self, checkpoint, keep)
        tell(saved=checkpoint.step)

    def told_step(self):
        number = self.trainer.steps + 1
        tell(step=number, **(measured() if vitals else {}))
        if number == stop:
            signal.raise_signal(signal.SIGTERM)
        torch.rand(1)  # a step that drew a number would go on from the same state
        return step(self)

    def told_validation(trainer, *rest):
        tell(validation=trainer.steps)
        return validate(trainer, *rest)

    def told_readings(self):
        with open(reads, "a") as file:
            for reading in readings(self):
                file.write(f"{self.position} {hashlib.sha256(reading.tokens.numpy().tobytes()).hexdigest()}\n")
                file.flush()
                yield reading

    RunDirectory.save, module.Loop._readings, module.Loop._step = told_save, told_readings, told_step
    module.validate = told_validation
    code = 1
    try:
        module.train(TrainConfig(**config), resume=resume, progress=False)
        code = 0
    except MlsaeError as error:
        tell(error=str(error))
        code = error.exit_code
    except Exception as error:
        tell(error=repr(error))
    finally:
        os._exit(code)


def measured():
    """Resident memory and open files of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"mb": pages * os.sysconf("SC_PAGE_SIZE") / 1e6, "descriptors": len(os.listdir("/proc/self/fd"))}


def tell(**event):
    os.write(1, json.dumps(event).encode() + b"\n")  # one write: lines of two processes do not mix


if __name__ == "__main__":
    serve()
    sys.exit()


# ---- runs, whole and in parts --------------------------------------------------------------------------------------------

import pytest  # noqa: E402

from mlsae.untrusted import read_json, read_jsonl  # noqa: E402

CONTEXT, KEEP = 16, 2
KILLED, STOPPED = -signal.SIGKILL, 75
WALL = ("elapsed_seconds", "tokens_per_second")
TINY = {
    "batch_size": 2,
    "context_length": CONTEXT,
    "accumulation_steps": 1,
    "k": 4,
    "expansion_factor": 2,
    "init_tokens": 200,
    "lr": 3e-3,
    "log_every_steps": 1,
    "save_every_steps": 7,
    "keep_checkpoints": KEEP,
    "validation_sequences": 4,
    "device": "cpu",
}
STANDARD = {"mask_norm_factor": 1.1}  # so that there is something to mask and count
LAWSON = {"recipe": "lawson2024", "dead_after_tokens": 10 * CONTEXT}
RECIPES = {
    "standard": {"steps": 60, **STANDARD},
    "standard, accumulating": {"steps": 60, "accumulation_steps": 3, "validate_every_steps": 5, **STANDARD},
    "lawson2024": {"steps": 60, **LAWSON},
    "lawson2024, accumulating": {"steps": 60, "accumulation_steps": 3, "validate_every_steps": 5, **LAWSON},
}
"""Each reads its text more than once: shuffled anew for every pass, or, in lawson2024, as it stands."""


class Trainers:
    """The other end of `serve`, with a language model and a text to train on."""

    def __init__(self, folder):
        from tiny import save_tiny_lm

        self.folder, self._whole = folder, {}
        self.materials = {"lm": str(save_tiny_lm(folder / "lm", n_layers=2, d_model=16)), "data": str(folder / "text")}
        draw = random.Random(0)
        words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(50)]
        (folder / "text").mkdir()
        for split, n_documents in {"train": 20, "validation": 4}.items():
            texts = [" ".join(draw.choices(words, k=draw.randint(3, 20))) for _ in range(n_documents)]
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            (folder / "text" / f"{split}.jsonl").write_text(lines)
        ours = {"MLSAE_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, "-u", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **ours},
            text=True,
        )

    def run(self, config, out, *, resume, strike=None, **how):
        """One attempt: (exit status, events). `strike(event)`, asked at every event, may return (seconds, signal)."""
        task = {"config": {**config, "out": str(out)}, "resume": resume, "reads": str(out.with_name("reads")), **how}
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        events = []
        child, struck = None, False
        while True:
            event = json.loads(self.process.stdout.readline())
            child = event.get("pid", child)
            if "ended" in event:
                return event["ended"], events
            events.append(event)
            if strike is not None and not struck and (blow := strike(event)) is not None:
                time.sleep(blow[0])
                with contextlib.suppress(ProcessLookupError):  # it was faster
                    os.kill(child, blow[1])
                struck = True

    def whole(self, recipe, **changes):
        """The config and the folder of an uninterrupted run, made when first asked for."""
        key = json.dumps([recipe, changes])
        if key not in self._whole:
            knobs = {**self.materials, **TINY, **RECIPES[recipe], **changes}
            knobs["tokens"] = knobs.pop("steps") * knobs["batch_size"] * CONTEXT * knobs["accumulation_steps"]
            out = self.folder / f"whole{len(self._whole)}" / "run"
            out.parent.mkdir()
            status, events = self.run(knobs, out, resume=False)
            assert status == 0, events
            self._whole[key] = knobs, out
        return self._whole[key]

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    trainers = Trainers(tmp_path_factory.mktemp("resume"))
    yield trainers
    trainers.close()


def metrics(out):
    return [{k: v for k, v in line.items() if k not in WALL} for line in read_jsonl(out / "metrics.jsonl")]


def consumed(out):
    """The batches that count: of each attempt, those before the position at which the next one took up."""
    stream = []
    for line in out.with_name("reads").read_text().splitlines():
        position, _, digest = line.partition(" ")
        stream = [(p, d) for p, d in stream if p < int(position)]
        stream.append((int(position), digest))
    return stream


def checkpoints(out):
    return sorted(out.glob("step-*"))


def facts(out):
    """All that a finished run says of itself, but for the wall clock and what is computed from its lines' lengths."""
    last = checkpoints(out)[-1]
    weights = [last / "sae.safetensors", last / "state.safetensors", *sorted((out / "sae").iterdir())]
    return {
        "last checkpoint": last.name,
        **{file.name: file.read_bytes() for file in weights},
        "state.json": {k: v for k, v in read_json(last / "state.json").items() if k != "metrics_bytes"},
        "metrics": metrics(out),
        "consumed": consumed(out),
        "left over": [p.name for name in (".tmp-*", ".trash-*", "damaged-*") for p in out.rglob(name)],
    }


def differences(out, whole):
    """What tells two finished runs apart."""
    ours, theirs = facts(out), {**facts(whole), "left over": []}
    return [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]


# ---- killed ------------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What became of many runs that were killed again and again."""

    kills: int = 0
    inside: int = 0
    """Kills inside a save: it had begun, and its end was never told."""
    early: int = 0
    """Kills before the first checkpoint."""
    resumes: int = 0
    runs: int = 0
    stuck: list[str] = field(default_factory=list)
    """Runs that did not go on or did not end, and what they said."""
    inexact: list[str] = field(default_factory=list)
    """Runs that ended in other bits, and in which."""
    seconds: float = 0.0

    def judge(self, recipe, out, whole, status, events):
        """Count a run that came to its end: in the bits it should, in others, or not as it should."""
        if status != 0:
            self.stuck.append(f"run {self.runs} ({recipe}): exit {status}, {events[-1]}")
        elif found := differences(out, whole):
            self.inexact.append(f"run {self.runs} ({recipe}): {', '.join(found)}")
        else:
            shutil.rmtree(out.parent)
        self.runs += 1

    @property
    def exact(self):
        """Runs that ended as if nothing had happened."""
        return self.runs - len(self.stuck) - len(self.inexact)


AIMS = {"pid": (1, 0.2), "step": (40, 0.008), "save": (5, 0.006)}
"""What a kill may follow: the n-th event of a kind in an attempt, n at most so much, by at most so many seconds."""


def aimed(draw, kind):
    """A strike that falls somewhere after an event of a kind."""
    nth, delay, seen = draw.randint(1, AIMS[kind][0]), draw.uniform(0, AIMS[kind][1]), itertools.count(1)
    return lambda event: (delay, signal.SIGKILL) if kind in event and next(seen) == nth else None


def soak(trainers, folder, *, kills, seed):
    """Kill runs of every recipe, each until it outruns its killer, and resume them; a quarter of the kills fall inside a save."""
    tally, draw, began = Tally(), random.Random(seed), time.monotonic()

    def enough():
        return tally.kills >= kills and (tally.inside >= kills / 4 or tally.kills >= 2 * kills)

    recipes = itertools.cycle(RECIPES)
    while not enough():
        config, reference = trainers.whole(recipe := next(recipes))
        out = folder / f"soak{tally.runs}" / "run"
        out.parent.mkdir()
        status, kinds = KILLED, ("pid", "step")  # the first kill is an early one
        while status == KILLED:
            resume = any(checkpoints(out))
            strike = None if enough() else aimed(draw, draw.choice(kinds))
            status, events = trainers.run(config, out, resume=resume, strike=strike)
            kinds = ("save", "save", "step", "pid")
            tally.resumes += resume
            tally.kills += status == KILLED
            tally.early += status == KILLED and not any(checkpoints(out))
            last = [event for event in events if event.keys() & {"save", "saved"}][-1:]
            tally.inside += status == KILLED and "save" in str(last) and "saved" not in str(last)
        tally.judge(recipe, out, reference, status, events)
    tally.seconds = time.monotonic() - began
    return tally


@pytest.mark.parametrize("kills", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_ends_in_the_same_bits(trainers, tmp_path, kills):
    """At start-up, in a step, in a save. Until there is a checkpoint, the same command starts it anew."""
    tally = soak(trainers, tmp_path, kills=kills, seed=kills)
    assert (tally.stuck, tally.inexact) == ([], []), tally
    assert tally.kills >= kills, tally
    assert tally.inside >= kills // 4, tally
    assert tally.early >= tally.runs // 4, tally
    assert tally.runs >= kills // 10, tally


def asked(trainers, folder, *, signals, seed):
    """Ask runs of every recipe to stop, by either signal, in a step or a validation, until each is done: a Tally of that."""
    tally, draw, began = Tally(), random.Random(seed), time.monotonic()
    recipes = itertools.cycle(RECIPES)
    while tally.kills < signals:
        config, reference = trainers.whole(recipe := next(recipes), validate_every_steps=2)
        out = folder / f"asked{tally.runs}" / "run"
        out.parent.mkdir()
        status, asks = STOPPED, 0
        while status == STOPPED:
            kind, nth, seen = draw.choice(("step", "validation")), draw.randint(1, 6), itertools.count(1)
            blow = (draw.uniform(0, 0.004), draw.choice((signal.SIGINT, signal.SIGTERM)))
            strike = lambda event: blow if kind in event and next(seen) == nth else None  # noqa: B023, E731
            resume = any(checkpoints(out))
            status, events = trainers.run(config, out, resume=resume, strike=strike if asks < 10 else None)
            asks, tally.resumes = asks + 1, tally.resumes + resume
            tally.kills += status == STOPPED
            last = [event for event in events if event.keys() & {"step", "validation"}][-1:]
            tally.inside += status == STOPPED and "validation" in str(last)
        tally.judge(recipe, out, reference, status, events)
    tally.seconds = time.monotonic() - began
    return tally


@pytest.mark.parametrize("signals", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_asked_to_stop_at_any_moment_it_saves_and_ends_in_the_same_bits(trainers, tmp_path, signals):
    """A step is finished, a validation given up: the exit code says that it can be resumed, and it can."""
    tally = asked(trainers, tmp_path, signals=signals, seed=signals)
    assert (tally.stuck, tally.inexact) == ([], []), tally
    assert tally.kills >= signals, tally
    assert tally.inside >= signals // 5, tally


def test_killed_before_its_first_checkpoint_it_starts_again_as_if_new(trainers, tmp_path):
    """`--resume` says that there is nothing to resume; the start it asks for must not keep the dead run's lines."""
    config, reference = trainers.whole("standard")
    out = tmp_path / "run"
    blow = lambda event: (0.0, signal.SIGKILL) if event.get("step") == 5 else None  # noqa: E731
    assert trainers.run(config, out, resume=False, strike=blow)[0] == KILLED
    assert not checkpoints(out)
    status, events = trainers.run(config, out, resume=True)
    assert status == 4
    assert "start without --resume" in events[-1]["error"]
    assert trainers.run(config, out, resume=False)[0] == 0
    assert differences(out, reference) == []


@pytest.mark.parametrize("delay", [0.0, 0.0005, 0.002])
def test_killed_right_after_its_last_checkpoint_the_sae_is_there_once_resumed(trainers, tmp_path, delay):
    """Between the last checkpoint and the last byte of `sae` no step is left to take, but something to write."""
    config, reference = trainers.whole("lawson2024")
    out = tmp_path / "run"
    blow = lambda event: (delay, signal.SIGKILL) if event.get("saved") == 60 else None  # noqa: E731
    trainers.run(config, out, resume=False, strike=blow)
    assert trainers.run(config, out, resume=True)[0] == 0
    assert differences(out, reference) == []


# ---- stopped -----------------------------------------------------------------------------------------------------------


def points():
    """(recipe, changes, step of the stop): all 20 steps for each accumulation, 25 of a long run in either order of reading."""
    for accumulation, stop in itertools.product((1, 2, 5, 8), range(1, 21)):
        default = accumulation in (1, 5) and stop in (1, 2, 7, 8, 13, 20)  # a save is due after step 7
        yield "standard", {"accumulation_steps": accumulation, "steps": 22}, stop, default
    for recipe, stop in itertools.product(("standard", "lawson2024"), range(2, 60, 2)[-25:]):
        yield recipe, {"steps": 60}, stop, stop % 10 == 0


@pytest.mark.parametrize(
    ("recipe", "changes", "stop"),
    [pytest.param(*point, marks=() if default else pytest.mark.slow) for *point, default in points()],
)
def test_stopped_after_any_step_it_ends_in_the_same_bits(trainers, tmp_path, recipe, changes, stop):
    """Checkpoint, metrics and the tokens read: none twice, none passed over."""
    config, reference = trainers.whole(recipe, **changes)
    out = tmp_path / "run"
    assert trainers.run(config, out, resume=False, stop=stop)[0] == STOPPED
    assert checkpoints(out)[-1].name == f"step-{stop:08d}"
    assert trainers.run(config, out, resume=True)[0] == 0
    assert differences(out, reference) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_stopped_five_times_in_a_chain_it_ends_in_the_same_bits(trainers, tmp_path, recipe):
    """A step in which the stop is asked for is finished and saved; the exit code says resumable."""
    config, reference = trainers.whole(recipe)
    out, n_steps = tmp_path / "run", RECIPES[recipe]["steps"]
    for stop in (1, 2, 7, 31, 40):
        status, events = trainers.run(config, out, resume=stop != 1, stop=stop)
        assert status == STOPPED, events
        assert events[-2:] == [
            {"saved": stop},
            {"error": f"train: stopped after step {stop} of {n_steps}; --resume continues"},
        ]
    status, events = trainers.run(config, out, resume=True)
    assert status == 0, events
    assert differences(out, reference) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_reads_its_text_more_than_once(trainers, recipe):
    """So that what is said of resumed runs holds past the end of the text."""
    config, _ = trainers.whole(recipe)
    assert config["tokens"] > 1.1 * (Path(config["data"]) / "train.jsonl").stat().st_size  # a token is a byte at most


# ---- other misfortunes ---------------------------------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_costs_steps_and_not_bits(trainers, tmp_path):
    config, reference = trainers.whole("standard")
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    shutil.copy(reference.with_name("reads"), tmp_path)
    newest = checkpoints(out)[-1]
    with open(newest / "state.safetensors", "r+b") as file:
        file.seek(3000)
        file.write(b"\x55")
    status, events = trainers.run(config, out, resume=True)
    assert status == 0, events
    shutil.rmtree(out / f"damaged-{newest.name}")
    assert differences(out, reference) == []


CHANGES = {"k": 8, "accumulation_steps": 2, "seed": 7, "lr": 1e-3, "layers": (0,), "recipe": "lawson2024"}


@pytest.mark.parametrize("key", CHANGES)
def test_resuming_with_another_config_is_refused(trainers, tmp_path, key):
    config, reference = trainers.whole("standard")
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "run.lock"}
    status, events = trainers.run({**config, key: CHANGES[key]}, out, resume=True)
    assert status == 4
    assert f"{key} " in events[-1]["error"]
    assert " -> " in events[-1]["error"]
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "run.lock"}


def test_a_second_process_is_refused_while_the_first_trains(trainers, tmp_path):
    """The first is not disturbed."""
    from mlsae.checkpoint import RunDirectory
    from mlsae.errors import ResourceError

    config, reference = trainers.whole("standard")
    out, refused = tmp_path / "run", []

    def look(event):
        if event.get("saved") in (7, 14):
            with pytest.raises(ResourceError, match="in use by pid"):
                RunDirectory(Path(out), read_json(out / "config.json"), resume=True)
            refused.append(event["saved"])

    assert trainers.run(config, out, resume=False, strike=look)[0] == 0
    assert refused == [7, 14]
    assert differences(out, reference) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_thousand_steps_leak_neither_memory_nor_files(trainers, tmp_path):
    import numpy as np

    steps, stood = 10_000, set()
    changes = {"save_every_steps": 25, "validate_every_steps": 25, "tokens": steps * 2 * CONTEXT}
    config = {**trainers.whole("standard")[0], **changes}
    out = tmp_path / "run"
    look = lambda event: stood.add(len(checkpoints(out))) if event.get("step", 0) % 5 == 0 else None  # noqa: E731
    status, events = trainers.run(config, out, resume=False, strike=look, vitals=True)
    assert status == 0, events[-1]
    told = [event for event in events if event.get("step", 0) > steps / 5]
    assert len(told) == 0.8 * steps
    assert np.polyfit([e["step"] / 1000 for e in told], [e["mb"] for e in told], 1)[0] <= 1
    assert len({e["descriptors"] for e in told}) == 1
    assert max(stood) in (KEEP, KEEP + 1)
