"""Training by several processes, of which one is killed at any moment: resumed, it ends in the bits of the run left alone."""

import importlib
import itertools
import os
import pickle
import random
import re
import shutil
import time
from dataclasses import dataclass, field
from multiprocessing.connection import wait

import pytest

from mlsae.checkpoint import RunDirectory
from mlsae.config import TrainConfig
from mlsae.errors import MlsaeError
from mlsae.untrusted import read_json, read_jsonl
from ranks import make_places, start_ranks, tell

WALL = ("elapsed_seconds", "tokens_per_second")
STEPS, CONTEXT, BATCH = 30, 16, 3
TINY = {
    "batch_size": BATCH,
    "context_length": CONTEXT,
    "accumulation_steps": 2,
    "k": 4,
    "n_latents": 151,
    "init_tokens": 256,
    "lr": 3e-3,
    "dead_after_tokens": 200,
    "log_every_steps": 1,
    "save_every_steps": 4,
    "validate_every_steps": 10,
    "validation_sequences": 5,
    "tokens": STEPS * 2 * BATCH * CONTEXT,
    "device": "cpu",
}
LAYOUTS = ((2, 2), (1, 2), (2, 1), (1, 3))
"""(dp, tp)."""
GONE = re.compile("ResourceError: torchrun: (another process of this job is gone|the processes do not find each other)")
"""What the others say."""
TORCHRUN = 5
"""Seconds after which torchrun would ask the others to end: while they look for each other they wait for whom may come."""
PATIENCE = 30
"""Seconds in which the others must have ended."""


def rank(config, dp, tp, resume):
    """One rank's part of a run, which tells of its steps and saves as they happen."""
    module = importlib.import_module("mlsae.train")  # the package's own `train` is the function
    os.fsync = lambda _: None  # a killed process loses nothing that it wrote: syncing costs time and shows nothing
    save, step = RunDirectory.save, module.Loop._step

    def told_save(self, checkpoint, keep):
        tell({"save": checkpoint.step})
        save(self, checkpoint, keep)
        tell({"saved": checkpoint.step})

    def told_step(self):
        tell({"step": self.trainer.steps + 1})
        return step(self)

    RunDirectory.save, module.Loop._step = told_save, told_step
    try:
        module.train(TrainConfig(**config), resume=resume, progress=False, dp=dp, tp=tp)
    except MlsaeError as error:
        return f"{type(error).__name__}: {error}"
    return "done"


@dataclass
class Blow:
    """SIGKILL of one rank, so many seconds after its n-th event of a kind."""

    victim: int
    kind: str
    nth: int
    delay: float

    @classmethod
    def drawn(cls, draw, n, kind):
        """A random one."""
        events, delay = {"start": (1, 0.5), "step": (STEPS, 0.03), "save": (5, 0.02)}[kind]
        return cls(draw.randrange(n), kind, draw.randint(1, events), draw.uniform(0, delay))


@dataclass
class Attempt:
    """How one attempt ended."""

    done: bool
    """Every rank came to the end of the run."""
    killed: bool
    inside: bool
    """The rank was inside a save."""
    said: list[str]
    """What each rank ended with, or that it died or hangs."""
    seconds: float
    """From the kill to the end of the last of the others."""


def attempt(config, layout, *, resume, blow=None):
    """Start the ranks of a layout, strike, and see how all end."""
    dp, tp = layout
    processes, pipes = start_ranks(dp * tp, rank, config, dp, tp, resume)
    numbers = {pipe: i for i, pipe in enumerate(pipes)}
    said, last, seen = ["hangs"] * len(pipes), "", itertools.count(1)
    until, struck = time.monotonic() + 120, None

    def strike():
        time.sleep(blow.delay)
        processes[blow.victim].kill()
        return time.monotonic()

    if blow is not None and blow.kind == "start":
        struck = strike()
        until = struck + PATIENCE
    while numbers and time.monotonic() < until:
        if struck is not None and time.monotonic() > struck + TORCHRUN:
            for i in numbers.values():
                processes[i].terminate()
        for pipe in wait(list(numbers), 1):
            i = numbers[pipe]
            try:
                message = pickle.loads(pipe.recv_bytes())
            except (EOFError, OSError):
                message = ("died",)
            if not isinstance(message, dict):
                said[i] = message if isinstance(message, str) else message[0]
                del numbers[pipe]
            elif blow is not None and i == blow.victim:
                last = next(iter(message))
                if struck is None and last == blow.kind and next(seen) == blow.nth:
                    struck = strike()
                    until = struck + PATIENCE
    ended = time.monotonic()
    for process in processes:
        process.join(1)
        process.kill()
    killed = struck is not None and "died" in said
    seconds = ended - struck if killed else 0.0
    return Attempt(set(said) == {"done"}, killed, killed and last == "save", said, seconds)


# ---- many runs -------------------------------------------------------------------------------------------------------


def metrics(out):
    return [{k: v for k, v in line.items() if k not in WALL} for line in read_jsonl(out / "metrics.jsonl")]


def facts(out):
    """All that a finished run says of itself, but for the wall clock and what is computed from its lines' lengths."""
    last = max(out.glob("step-*"))
    return {
        "last checkpoint": last.name,
        **{file.name: file.read_bytes() for file in [*last.glob("*.safetensors"), *(out / "sae").iterdir()]},
        "state.json": {k: v for k, v in read_json(last / "state.json").items() if k != "metrics_bytes"},
        "metrics": metrics(out),
        "left over": [p.name for name in (".tmp-*", ".trash-*", "damaged-*") for p in out.rglob(name)],
    }


def differences(out, whole):
    """What tells two finished runs of one layout apart."""
    ours, theirs = facts(out), facts(whole)
    return [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]


def far_apart(out, whole):
    """The lines of two finished runs of different layouts that are not the same but for rounding."""
    pairs = zip(metrics(out), metrics(whole), strict=True)
    return [a["step"] for a, b in pairs if a != {k: pytest.approx(v, rel=1e-5, abs=1e-5) for k, v in b.items()}]


@dataclass
class Tally:
    """What became of many runs of which a rank was killed again and again."""

    kills: int = 0
    inside: int = 0
    """Kills of a rank inside a save."""
    early: int = 0
    """Kills before the first checkpoint."""
    resumes: int = 0
    changed: int = 0
    """Resumes on another layout."""
    runs: int = 0
    slowest: float = 0.0
    """Seconds from a kill to the end of the others, at most."""
    stuck: list[str] = field(default_factory=list)
    """Runs that did not go on or did not end, and ranks that said nothing of the one that was gone."""
    inexact: list[str] = field(default_factory=list)
    """Runs that ended otherwise than the run that was left alone."""


def soak(folder, *, kills, seed):
    """Kill a rank of runs of every layout, two or three times each, every third time going on with another layout."""
    places = make_places(folder)
    tally, draw, whole = Tally(), random.Random(seed), {}

    def config_of(out):
        return {**TINY, **places, "out": str(out)}

    def reference(layout):
        if layout not in whole:
            whole[layout] = folder / f"whole{len(whole)}"
            done = attempt(config_of(whole[layout]), layout, resume=False)
            assert done.done, done.said
        return whole[layout]

    layouts = itertools.cycle(LAYOUTS)
    while tally.kills < kills:
        first = layout = next(layouts)
        out, kinds = folder / f"soak{tally.runs}", iter(("save", draw.choice(("start", "step")), "save"))
        same, done = True, False
        while not done:
            resume = any(out.glob("step-*"))
            kind = next(kinds, None) if tally.kills < kills else None
            blow = None if kind is None else Blow.drawn(draw, layout[0] * layout[1], kind)
            found = attempt(config_of(out), layout, resume=resume, blow=blow)
            done = found.done
            tally.resumes += resume
            tally.kills += found.killed
            tally.inside += found.inside
            tally.early += found.killed and not any(out.glob("step-*"))
            tally.slowest = max(tally.slowest, found.seconds)
            odd = [each for each in found.said if each not in ("done", "died") and not GONE.match(each)]
            if not done and (odd or not found.killed):
                tally.stuck.append(f"run {tally.runs} {layout}: {[each[-300:] for each in odd]} after {blow}")
                break
            if not done and tally.runs % 3 == 2:
                layout = draw.choice([each for each in LAYOUTS if each != layout])
                tally.changed, same = tally.changed + 1, False
        if done:
            odd = differences(out, reference(first)) if same else far_apart(out, reference(first))
            tally.inexact += [f"run {tally.runs} from {first} to {layout}: {odd}"] if odd else []
            shutil.rmtree(out)
        tally.runs += 1
    return tally


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_rank_killed_at_any_moment_costs_no_bit(tmp_path, kills):
    tally = soak(tmp_path, kills=kills, seed=kills)
    assert (tally.stuck, tally.inexact) == ([], [])
    assert tally.kills >= kills
    assert tally.slowest < PATIENCE
