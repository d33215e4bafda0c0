"""The promise of a long run: killed at any moment and resumed, it ends in the same bits as if nothing had happened.

Trainers run in processes of their own. This file is also the program that starts them: it imports torch once, before any
parallel operation, and forks one trainer for every line it is sent, so that an attempt costs a fraction of a second.
"""

import contextlib
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

STEPS, CONTEXT = 200, 16
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
    "device": "cpu",
}


# ---- the program that starts trainers ----------------------------------------------------------------------------------


def serve():
    """For each line of JSON {config, resume, events}: fork a trainer, say its pid, and, when it has ended, how."""
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


def attempt(config, resume, reads):
    """The trainer: one part of a run, telling of its steps and saves as they happen."""
    from mlsae.checkpoint import RunDirectory
    from mlsae.config import TrainConfig
    from mlsae.errors import MlsaeError

    module = importlib.import_module("mlsae.train")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.fsync = lambda descriptor: (
        None
    )  # a killed process loses nothing that it wrote: syncing costs time and shows nothing
    save, readings, step = RunDirectory.save, module.Loop._readings, module.Loop._step

    def told_save(self, checkpoint, keep):
        tell(save=checkpoint.step)
        save(self, checkpoint, keep)
        tell(saved=checkpoint.step)

    def told_step(self):
        tell(step=self.trainer.steps + 1)
        return step(self)

    def told_readings(self):
        with open(reads, "a") as file:
            for reading in readings(self):
                file.write(f"{self.position} {hashlib.sha256(reading.tokens.numpy().tobytes()).hexdigest()}\n")
                file.flush()
                yield reading

    RunDirectory.save, module.Loop._readings, module.Loop._step = told_save, told_readings, told_step
    code = 1
    try:
        module.train(TrainConfig(**config), resume=resume, progress=False)
        code = 0
    except MlsaeError as error:
        tell(error=str(error))
        code = error.exit_code
    finally:
        os._exit(code)


def tell(**event):
    os.write(1, json.dumps(event).encode() + b"\n")  # one write: lines of two processes do not mix


if __name__ == "__main__":
    serve()
    sys.exit()


# ---- the tests ---------------------------------------------------------------------------------------------------------

import pytest  # noqa: E402

from mlsae.files import read_json, read_jsonl  # noqa: E402

RECIPES = {
    "standard": {"accumulation_steps": 1},
    "standard, accumulating": {"accumulation_steps": 3, "steps": 60},
    "lawson2024": {"recipe": "lawson2024", "batch_size": 1, "steps": 60, "dead_after_tokens": 10 * CONTEXT},
    "lawson2024, accumulating": {"recipe": "lawson2024", "batch_size": 1, "accumulation_steps": 3, "steps": 60},
}


class Trainers:
    """The other end of `serve`."""

    def __init__(self, cache):
        environment = {
            **os.environ,
            "MLSAE_CACHE": str(cache),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-u", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def run(self, config, *, resume, reads, strike=None):
        """One attempt: (exit status, events). `strike(event)`, asked at every event, may return (seconds, signal)."""
        self.process.stdin.write(json.dumps({"config": config, "resume": resume, "reads": str(reads)}) + "\n")
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


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    trainers = Trainers(tmp_path_factory.mktemp("cache"))
    yield trainers
    trainers.process.stdin.close()
    trainers.process.wait()
    trainers.process.stdout.close()


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    from tiny import save_tiny_lm

    folder = tmp_path_factory.mktemp("resume")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(50)]
    (folder / "text").mkdir()
    for split, n_documents in {"train": 60, "validation": 4}.items():
        texts = [" ".join(draw.choices(words, k=draw.randint(3, 20))) for _ in range(n_documents)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / "text" / f"{split}.jsonl").write_text(lines)
    save_tiny_lm(folder / "lm", n_layers=2, d_model=16)
    return {"lm": str(folder / "lm"), "data": str(folder / "text")}


@pytest.fixture(scope="module")
def whole(trainers, materials, tmp_path_factory):
    """A function that gives the uninterrupted run of some knobs: its config and its folder."""
    made = {}

    def call(name):
        if name not in made:
            out = tmp_path_factory.mktemp("whole") / "run"
            config = config_of(materials, out, **RECIPES[name])
            assert trainers.run(config, resume=False, reads=out.with_name("reads"))[0] == 0
            made[name] = config, out
        return made[name]

    return call


def config_of(materials, out, steps=STEPS, **changes):
    knobs = {**TINY, **changes}
    tokens = steps * knobs["batch_size"] * CONTEXT * knobs["accumulation_steps"]
    return {**materials, **knobs, "tokens": tokens, "out": str(out)}


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


def assert_same_run(out, whole):
    """Bit for bit, but for the wall clock and what is computed from its lines' lengths."""
    steps = [sorted(p.name for p in run.glob("step-*")) for run in (out, whole)]
    assert steps[0][-1] == steps[1][-1]
    for name in ("sae.safetensors", "state.safetensors"):
        assert (out / steps[0][-1] / name).read_bytes() == (whole / steps[1][-1] / name).read_bytes(), name
    for name in ("model.safetensors", "config.json"):
        assert (out / "sae" / name).read_bytes() == (whole / "sae" / name).read_bytes(), name
    positions = [read_json(run / steps[0][-1] / "state.json")["position"] for run in (out, whole)]
    assert positions[0] == positions[1]
    assert metrics(out) == metrics(whole)
    assert consumed(out) == consumed(whole)
    assert not list(out.rglob(".tmp-*"))
    assert not list(out.rglob(".trash-*"))
    assert not list(out.glob("damaged-*"))


def has_checkpoint(out):
    return any(out.glob("step-*"))


@pytest.mark.parametrize(("name", "seed"), [("standard", 0), ("lawson2024, accumulating", 1)])
def test_killed_five_times_at_random_it_ends_in_the_same_bits(trainers, whole, tmp_path, name, seed):
    """Half of the kills are aimed inside a save; the others fall anywhere after the first checkpoint."""
    config, reference = whole(name)
    out, draw = tmp_path / "run", random.Random(seed)
    n_steps = len(metrics(reference))
    statuses = []
    for kill in range(5):
        last = max((int(p.name[5:]) for p in out.glob("step-*")), default=7)
        target = min(last + draw.randrange(1, n_steps // 5), n_steps - 8)
        kind = ("save", "step")[kill % 2]

        def strike(event, kind=kind, target=target):
            if event.get(kind, 0) > target and (kind == "save" or has_checkpoint(out)):
                return draw.random() * 0.008, signal.SIGKILL
            return None

        status, _ = trainers.run(
            {**config, "out": str(out)}, resume=has_checkpoint(out), reads=tmp_path / "reads", strike=strike
        )
        statuses.append(status)
    assert statuses == [-signal.SIGKILL] * 5
    status, events = trainers.run({**config, "out": str(out)}, resume=True, reads=tmp_path / "reads")
    assert status == 0, events
    assert_same_run(out, reference)


@pytest.mark.parametrize("name", RECIPES)
def test_stopped_at_many_steps_in_a_chain_it_ends_in_the_same_bits(trainers, whole, tmp_path, name):
    """SIGTERM while a step is taken: that step is finished and saved, the exit code says resumable."""
    config, reference = whole(name)
    out, stops = tmp_path / "run", [1, 2, 7, 40]
    for stop in stops:
        blow = lambda event, stop=stop: (0.0, signal.SIGTERM) if event.get("step") == stop else None  # noqa: E731
        status, events = trainers.run(
            {**config, "out": str(out)}, resume=stop != 1, reads=tmp_path / "reads", strike=blow
        )
        assert status == 75, events
        saved = int(sorted(out.glob("step-*"))[-1].name[5:])
        assert stop <= saved <= stop + 2
        assert events[-1] == {
            "error": f"train: stopped after step {saved} of {len(metrics(reference))}; --resume continues"
        }
        assert events[-2] == {"saved": saved}
    status, events = trainers.run({**config, "out": str(out)}, resume=True, reads=tmp_path / "reads")
    assert status == 0, events
    assert_same_run(out, reference)


def test_killed_before_its_first_checkpoint_it_starts_again_as_if_new(trainers, whole, tmp_path):
    """`--resume` says that there is nothing to resume; the start it asks for must not keep the dead run's lines."""
    config, reference = whole("standard")
    out = tmp_path / "run"
    blow = lambda event: (0.0, signal.SIGKILL) if event.get("step") == 5 else None  # noqa: E731
    assert trainers.run({**config, "out": str(out)}, resume=False, reads=tmp_path / "reads", strike=blow)[0] == -9
    assert not has_checkpoint(out)
    status, events = trainers.run({**config, "out": str(out)}, resume=True, reads=tmp_path / "reads")
    assert status == 4
    assert "start without --resume" in events[-1]["error"]
    assert trainers.run({**config, "out": str(out)}, resume=False, reads=tmp_path / "reads")[0] == 0
    assert_same_run(out, reference)


@pytest.mark.parametrize("delay", [0.0, 0.0005, 0.002])
def test_killed_right_after_its_last_checkpoint_the_sae_is_there_once_resumed(trainers, whole, tmp_path, delay):
    """Between the last checkpoint and the last byte of `sae` no step is left to take, but something to write."""
    config, reference = whole("lawson2024")
    out = tmp_path / "run"
    last = len(metrics(reference))
    blow = lambda event: (delay, signal.SIGKILL) if event.get("saved") == last else None  # noqa: E731
    trainers.run({**config, "out": str(out)}, resume=False, reads=tmp_path / "reads", strike=blow)
    assert trainers.run({**config, "out": str(out)}, resume=True, reads=tmp_path / "reads")[0] == 0
    assert_same_run(out, reference)


def test_a_damaged_newest_checkpoint_costs_steps_and_not_bits(trainers, whole, tmp_path):
    config, reference = whole("standard")
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    shutil.copy(reference.with_name("reads"), tmp_path)
    newest = sorted(out.glob("step-*"))[-1]
    with open(newest / "state.safetensors", "r+b") as file:
        file.seek(3000)
        file.write(b"\x55")
    status, events = trainers.run({**config, "out": str(out)}, resume=True, reads=tmp_path / "reads")
    assert status == 0, events
    shutil.rmtree(out / f"damaged-{newest.name}")
    assert_same_run(out, reference)


CHANGES = {"k": 8, "accumulation_steps": 2, "seed": 7, "lr": 1e-3, "layers": (0,), "recipe": "lawson2024"}


@pytest.mark.parametrize("key", CHANGES)
def test_resuming_with_another_config_is_refused(trainers, whole, tmp_path, key):
    config, reference = whole("standard")
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "run.lock"}
    changed = {**config, "out": str(out), key: CHANGES[key]}
    status, events = trainers.run(changed, resume=True, reads=tmp_path / "reads")
    assert status == 4
    assert f"{key} " in events[-1]["error"]
    assert " -> " in events[-1]["error"]
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "run.lock"}


def test_a_second_process_is_refused_while_the_first_trains(trainers, whole, tmp_path):
    """The first is not disturbed."""
    from mlsae.checkpoint import RunDirectory
    from mlsae.errors import ResourceError

    config, reference = whole("standard")
    out, refused = tmp_path / "run", []

    def look(event):
        if event.get("saved") in (7, 14):
            with pytest.raises(ResourceError, match="in use by pid"):
                RunDirectory(Path(out), read_json(out / "config.json"), resume=True)
            refused.append(event["saved"])

    assert trainers.run({**config, "out": str(out)}, resume=False, reads=tmp_path / "reads", strike=look)[0] == 0
    assert refused == [7, 14]
    assert_same_run(out, reference)
