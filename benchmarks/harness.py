"""Workers, rounds, statistics, tables: what every benchmark here shares.

Each contender is a process of its own, in its own Python, started once. It is sent one line per step and answers with one line of
JSON, and the contenders take turns: A B C A B C. A shared machine is never quiet, but two steps that follow each other meet much
the same noise, so what is compared is the ratio within a round, and its median over rounds is printed.

A worker runs this file inside a peer's environment too: it needs nothing but the standard library.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

OURS = "ours"
"""The contender that all others are compared with."""
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",  # everyone on the CPU
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false",
    "USE_TRITON": "0",  # official mlsae, where triton happens to be installed
    "SPARSIFY_DISABLE_TRITON": "1",
}
"""What every worker's environment says."""


class Absent(Exception):
    """A contender that cannot take part, and why."""


# ---- in the worker ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """What one step cost."""

    wall: float
    """Seconds."""
    cpu: float
    """CPU seconds of the worker, all its threads together."""
    others: float | None
    """CPU seconds that everything else on the machine used meanwhile; None where there is no /proc."""
    peak_mib: float | None
    """High-water mark of the worker's resident memory since it started, MiB."""
    value: float | None
    """The loss, or whatever else shows that the work was done."""


class Turns:
    """Counts 0, 1, 2, … once per line on stdin: what happens until the next count is asked for is one measured step.

    Our own loop draws from it, and so can a peer's: handed data that draws from here, the peer's loop runs as published and is
    measured from within.
    """

    def __init__(self) -> None:
        self.modifications: list[str] = []
        """What was changed to run this contender here: sentences for the reader."""
        self.versions: dict[str, str] = {"python": platform.python_version()}
        self.value: Any = None
        """The last step's loss; a tensor will do."""
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print must not mix with the answers
        self._before: tuple[float, float, float | None] | None = None
        self._count = 0

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if self._before is not None:
            self._say(**asdict(self._turn(*self._before)))
        else:
            self._say(
                start_mib=_memory("VmRSS"), modifications=self.modifications, versions=self.versions, pid=os.getpid()
            )
        if sys.stdin.readline().strip() != "step":
            os._exit(0)  # no peer saves its last checkpoint
        self._before = (time.perf_counter(), time.process_time(), _busy())
        self._count += 1
        return self._count - 1

    def _turn(self, wall: float, cpu: float, busy: float | None) -> Turn:
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        others = None if busy is None else max(0.0, (_busy() or busy) - busy - cpu)
        return Turn(wall, cpu, others, _memory("VmHWM"), None if self.value is None else float(self.value))

    def absent(self, why: object) -> None:
        """Tell the parent, in a line, that there will be no steps, or no more."""
        self._say(absent=(str(why).splitlines() or ["no reason given"])[0][:200])

    def _say(self, **message: Any) -> None:
        print(json.dumps(message), file=self._out, flush=True)


def serve(contender: Callable[[Turns], None]) -> NoReturn:
    """Be a worker: set the contender up, then step whenever asked."""
    turns = Turns()
    try:
        contender(turns)
    except (Absent, ImportError) as why:
        turns.absent(why)
    except Exception as error:
        traceback.print_exc()
        turns.absent(f"failed: {type(error).__name__}: {error}")
    os._exit(1)


def _memory(name: str) -> float | None:
    """A line of /proc/self/status, in MiB."""
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith(name + ":"):
                return int(line.split()[1]) / 1024
    return None


def _busy() -> float | None:
    """CPU seconds that the whole machine has used."""
    with contextlib.suppress(OSError), open("/proc/stat") as stat:
        ticks = [int(word) for word in stat.readline().split()[1:9]]
        return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # but idle and iowait
    return None


# ---- in the parent ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """How to start a contender."""

    name: str
    command: list[str]
    threads: int | None = None
    """None: as many as its torch takes by itself."""


@dataclass
class Start:
    """What a contender said before its first step."""

    start_mib: float | None
    """Resident memory then: libraries, data and weights."""
    modifications: list[str]
    versions: dict[str, str]
    pid: int


class Worker:
    """The parent's end of one contender. Raises Absent, once it has to, whenever there is no answer."""

    def __init__(self, launch: Launch, folder: Path):
        self.launch = launch
        self._log = folder / f"{launch.name.replace(' ', '-')}.log"
        here = folder / launch.name.replace(" ", "-")
        here.mkdir()  # whatever a peer writes, it writes here
        threads = (
            {} if launch.threads is None else dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), launch.threads)
        )
        environment = {**os.environ, **ENVIRONMENT, **{name: str(n) for name, n in threads.items()}}
        try:
            with self._log.open("w") as log:
                self._process = subprocess.Popen(
                    launch.command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=environment,
                    cwd=here,
                )
        except OSError as error:
            raise Absent(f"{launch.command[0]}: {error.strerror}") from error
        try:
            self.start = Start(**self._answer())
        except BaseException:
            self.close()
            raise

    def step(self) -> Turn:
        """One step, measured by the worker itself."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it is gone; the missing answer says so
        return Turn(**self._answer())

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Absent(f"ended with exit status {self._process.wait()}: {self._last_words()}")
        message = json.loads(line)
        if "absent" in message:
            raise Absent(message["absent"])
        return message

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


@dataclass
class Contest:
    """What the contenders of one piece of work did."""

    turns: dict[str, list[Turn]] = field(default_factory=dict)
    """Measured rounds of every contender that was there to the end, warm-up left out."""
    starts: dict[str, Start] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    """Why each of the others was not."""

    def ratio(self, of: str, to: str, what: str = "cpu") -> float | None:
        """Median over rounds of one contender's cost in units of another's; None unless both took part."""
        if of not in self.turns or to not in self.turns:
            return None
        return median_ratio([getattr(t, what) for t in self.turns[of]], [getattr(t, what) for t in self.turns[to]])

    def peak_mib(self, name: str) -> float | None:
        """Peak resident memory of a contender."""
        return self.turns[name][-1].peak_mib if name in self.turns else None

    def added_mib(self, name: str) -> float | None:
        """What its steps took at their peak, above what was resident before the first."""
        peak, start = self.peak_mib(name), self.starts[name].start_mib if name in self.starts else None
        return None if peak is None or start is None else peak - start


def compete(launches: Sequence[Launch], rounds: int, warmup: int = 1, pause: float = 0.05) -> Contest:
    """Let contenders take turns. One that is missing or breaks is noted and left out; the others go on.

    Args:
        warmup: rounds before the measured ones: caches, lazy initialisation, what a peer does at its first step.
        pause: seconds before every step, in which the threads of the step before stop spinning.
    """
    contest, workers = Contest(), dict[str, Worker]()
    with tempfile.TemporaryDirectory(prefix="mlsae-bench-") as folder, contextlib.ExitStack() as stack:
        for launch in launches:
            try:
                workers[launch.name] = worker = Worker(launch, Path(folder))
            except Absent as why:
                contest.absent[launch.name] = str(why)
                continue
            stack.callback(worker.close)
            contest.starts[launch.name], contest.turns[launch.name] = worker.start, []
        for number in range(warmup + rounds):
            for name, worker in list(workers.items()):
                time.sleep(pause)
                try:
                    turn = worker.step()
                except Absent as why:
                    contest.absent[name] = f"{why} (round {number})"
                    del workers[name], contest.turns[name], contest.starts[name]
                    continue
                if number >= warmup:
                    contest.turns[name].append(turn)
    return contest


# ---- statistics ------------------------------------------------------------------------------------------------------


def median_ratio(of: Sequence[float], to: Sequence[float]) -> float:
    """Median of the ratios of what happened in the same round."""
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def median(turns: Sequence[Turn], what: str) -> float:
    """Median over rounds of a cost."""
    return statistics.median(getattr(turn, what) for turn in turns)


@dataclass(frozen=True)
class Line:
    """A least-squares fit of `y = intercept + slope * x`."""

    slope: float
    intercept: float
    r2: float
    """Share of y's variance that the line explains."""


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """The least-squares line through some points."""
    slope, intercept = statistics.linear_regression(x, y)
    mean = statistics.fmean(y)
    left = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    return Line(slope, intercept, 1 - left / sum((b - mean) ** 2 for b in y))


@dataclass(frozen=True)
class Goal:
    """A promise, and what was measured."""

    claim: str
    bound: float
    measured: float | None
    """None: a contender that it is about was absent."""
    at_least: bool = True
    """Whether the bound is a lower one."""

    @property
    def met(self) -> bool | None:
        """None: not measured."""
        if self.measured is None:
            return None
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def __str__(self) -> str:
        verdict = {None: "not measured", True: "met", False: "NOT MET"}[self.met]
        measured = "" if self.measured is None else f"  measured {self.measured:.3g}"
        return f"  {verdict:12s}  {self.claim} {'>=' if self.at_least else '<='} {self.bound:g}{measured}"


# ---- printing --------------------------------------------------------------------------------------------------------


def print_contest(contest: Contest, n_items: int, unit: str, value: str = "loss") -> None:
    """A table of one contest; `n_items` `unit`s are worked on in a step, and `value` is what `Turn.value` holds."""
    width = max((len(name) for name in contest.turns), default=0) + 2
    ratio = f"x {OURS}"
    print(
        f"{'':{width}s}{'CPU s':>9s}{'wall s':>9s}{unit + '/s':>12s}{ratio + ' CPU':>12s}{ratio + ' wall':>13s}"
        f"{'peak MiB':>10s}{'start MiB':>11s}{'others %':>10s}{value:>13s}"
    )
    for name, turns in contest.turns.items():
        cpu, wall = median(turns, "cpu"), median(turns, "wall")
        print(
            f"{name:{width}s}{cpu:9.3f}{wall:9.3f}{n_items / wall:12,.0f}"
            f"{_cell(contest.ratio(name, OURS), 12, '.2f')}{_cell(contest.ratio(name, OURS, 'wall'), 13, '.2f')}"
            f"{_cell(contest.peak_mib(name), 10, '.0f')}{_cell(contest.starts[name].start_mib, 11, '.0f')}"
            f"{_cell(_others_percent(turns), 10, '.0f')}{_cell(turns[-1].value, 13, '.5g')}",
            flush=True,
        )
    for name, why in contest.absent.items():
        print(f"  {name} absent: {why}")


def print_sizes(contest: Contest, sizes: str) -> None:
    """A table of one contender at many sizes."""
    print(f"{sizes:22s}{'CPU s':>9s}{'wall s':>9s}{'start MiB':>11s}{'steps add MiB':>15s}{'others %':>10s}")
    for name, turns in contest.turns.items():
        print(
            f"{name:22s}{median(turns, 'cpu'):9.3f}{median(turns, 'wall'):9.3f}"
            f"{_cell(contest.starts[name].start_mib, 11, '.0f')}{_cell(contest.added_mib(name), 15, '.1f')}"
            f"{_cell(_others_percent(turns), 10, '.0f')}",
            flush=True,
        )
    for name, why in contest.absent.items():
        print(f"  {name} absent: {why}")


def print_modifications(contests: Sequence[Contest]) -> None:
    """What was changed about each contender, and what it ran on, once."""
    seen: dict[str, Start] = {}
    for contest in contests:
        seen |= contest.starts
    if seen:
        print("\nCode that was run, and every modification:")
    for name, start in seen.items():
        print(f"  {name}: {', '.join(f'{library} {version}' for library, version in start.versions.items())}")
        for modification in start.modifications:
            print(f"    - {modification}")


def print_goals(goals: Sequence[Goal]) -> None:
    """Every goal, what was measured, and whether it is met."""
    if goals:
        print("\nGoals:")
        print("\n".join(map(str, goals)), flush=True)


def _cell(value: float | None, width: int, form: str) -> str:
    return f"{'-':>{width}s}" if value is None else f"{value:{width}{form}}"


def _others_percent(turns: Sequence[Turn]) -> float | None:
    """Share of the machine's CPU time that went elsewhere while a contender stepped."""
    if any(turn.others is None for turn in turns):
        return None
    return 100 * sum(turn.others or 0.0 for turn in turns) / sum(turn.wall for turn in turns) / (os.cpu_count() or 1)


# ---- command line ----------------------------------------------------------------------------------------------------


def parser(doc: str | None, contenders: Sequence[str], default: Sequence[str]) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--contenders", nargs="+", choices=contenders, default=list(default), metavar="NAME", help=", ".join(contenders)
    )
    options.add_argument("--without", nargs="+", choices=contenders, default=[], metavar="NAME", help="leave these out")
    options.add_argument("--rounds", type=int, default=3, help="measured rounds (default 3)")
    options.add_argument("--threads", type=int, help="CPU threads of a contender (default: what its torch takes)")
    options.add_argument("--json", type=Path, metavar="FILE", help="also write every measurement here")
    options.add_argument("--worker", help=argparse.SUPPRESS)
    options.add_argument("--worker-work", type=json.loads, default={}, help=argparse.SUPPRESS)
    return options


def chosen(options: argparse.Namespace) -> list[str]:
    """The contenders asked for."""
    return [name for name in options.contenders if name not in options.without]


def print_header(options: argparse.Namespace) -> None:
    """The machine and the method, in a line each."""
    threads = "torch's own number of threads" if options.threads is None else f"{options.threads} threads"
    print(f"{machine()['cpu']}, {machine()['cores']} cores, load {machine()['load']}; {threads} each")
    print(f"{options.rounds} rounds after warm-up; ratios are medians of the ratios within a round, to {OURS}")


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {"cpu": cpu, "cores": os.cpu_count(), "load": f"{os.getloadavg()[0]:.2f}", "platform": platform.platform()}


def write_json(
    options: argparse.Namespace, works: Mapping[str, Any], contests: Mapping[str, Contest], goals: Any
) -> None:
    """Everything that was measured, if it was asked for."""
    if options.json is not None:
        asked = {name: value for name, value in vars(options).items() if not name.startswith(("json", "worker"))}
        results = {name: {"work": works[name], **asdict(contest)} for name, contest in contests.items()}
        verdicts = [{**asdict(goal), "met": goal.met} for goal in goals]
        options.json.parent.mkdir(parents=True, exist_ok=True)
        written = {"machine": machine(), "options": asked, "results": results, "goals": verdicts}
        options.json.write_text(json.dumps(written, indent=1, default=str) + "\n")
