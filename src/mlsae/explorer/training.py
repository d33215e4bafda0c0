"""How the training of a run goes, while it goes and afterwards."""

import contextlib
import math
import os
import shlex
import socket
import threading
import time
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from mlsae import untrusted
from mlsae.errors import ConfigError, MlsaeError
from mlsae.explorer.kept import Kept, signature

COLUMNS = ("step", "tokens", "loss", "fvu", "dead_fraction", "tokens_per_second")
"""Of a line of metrics.jsonl."""
MAX_POINTS = 2000
FRESH_SECONDS = 300
"""A run of another machine that wrote nothing for so long does not go on."""


class Training:
    """The config and metrics of a run; of None, nothing."""

    def __init__(self, run: Path | None):
        self.run = run
        self._config = Kept([run / "config.json"], lambda: untrusted.read_json(run / "config.json")) if run else None
        self._lock = threading.Lock()
        self._seen: object = None
        self._columns: dict[str, array] = {}
        self._forget()

    @property
    def config(self) -> dict[str, Any]:
        """The run's config.json; empty if there is none, or a damaged one."""
        found = None if self._config is None else self._config.get()
        return found if isinstance(found, dict) else {}

    @property
    def n_steps(self) -> int | None:
        """Steps that the config asks for; None if it does not say."""
        named = ("tokens", "batch_size", "accumulation_steps", "context_length")
        sizes = [x for x in map(self.config.get, named) if isinstance(x, int) and x > 0]
        return sizes[0] // math.prod(sizes[1:]) if len(sizes) == len(named) else None

    def is_running(self) -> bool:
        """Whether the process that holds the run is alive and has not written all of its steps."""
        if self.run is None or self._is_complete():
            return False
        try:
            with open(self.run / "run.lock", "rb") as file:
                holder = file.read(200).decode(errors="replace").split()
        except OSError:
            return False
        if len(holder) < 4 or not holder[1].isdecimal():
            return False
        if holder[3] == socket.gethostname():
            return _is_alive(int(holder[1]))
        try:
            return time.time() - (self.run / "metrics.jsonl").stat().st_mtime < FRESH_SECONDS
        except OSError:
            return False

    def resume_command(self) -> str | None:
        """What goes on with a run that stopped."""
        if self.run is None:
            return None
        folder = shlex.quote(str(self.run))
        return f"mlsae train --config {shlex.quote(str(self.run / 'config.json'))} --out {folder} --resume"

    def points(self, since_step: int = 0) -> list[dict[str, int | float]]:
        """At most MAX_POINTS lines of metrics.jsonl after a step, evenly thinned, the last of them included."""
        with self._lock:
            self._read_on()
            steps = np.array(self._columns["step"])
            later = np.flatnonzero(steps > since_step)
            if len(later) > MAX_POINTS:
                later = later[np.linspace(0, len(later) - 1, MAX_POINTS).round().astype(int)]
            return [self._point(i) for i in later.tolist()]

    @property
    def last_step(self) -> int:
        """The last step that has a line; 0 before any."""
        with self._lock:
            self._read_on()
            return int(self._last())

    def _is_complete(self) -> bool:
        return self.n_steps is not None and self.last_step >= self.n_steps

    def _point(self, i: int) -> dict[str, int | float]:
        point: dict[str, int | float] = {name: column[i] for name, column in self._columns.items()}
        return point | {"step": int(point["step"]), "tokens": int(point["tokens"])}

    def _last(self) -> float:
        return self._columns["step"][-1] if self._columns["step"] else 0.0

    def _forget(self) -> None:
        self._end, self._columns = 0, {name: array("d") for name in COLUMNS}

    def _read_on(self) -> None:
        if self.run is None or (seen := signature(path := self.run / "metrics.jsonl")) == self._seen:
            return
        if seen is None or seen[1] < self._end:
            self._forget()
        self._seen = seen
        with contextlib.suppress(MlsaeError, OSError):  # what was read stays
            lines = [] if seen is None else self._new_lines(path)
            for line in lines:
                if _number(line.get("step")) > 0 and _number(line.get("tokens")) >= 0:
                    for name, column in self._columns.items():
                        column.append(_number(line.get(name)))

    def _new_lines(self, path: Path) -> list[dict[str, Any]]:
        """Those written since; all there are, if some were taken back and others written in their place."""
        if self._end:
            with contextlib.suppress(ConfigError):
                lines, end = untrusted.read_jsonl_from(path, self._end)
                if not lines or _number(lines[0].get("step")) > self._last():
                    self._end = end
                    return lines
            self._forget()
        lines, self._end = untrusted.read_jsonl_from(path, 0)
        return lines


def training_view(training: Training, since_step: int = 0) -> dict[str, Any]:
    """/training.json."""
    return {
        "running": training.is_running(),
        "points": training.points(since_step),
        "last_step": training.last_step,
        "total_steps": training.n_steps,
    }


def _number(x: Any) -> float:
    """A finite number of JSON; NaN for anything else, and for a whole number too large to be one."""
    known = isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 2**1000
    return float(x) if known else math.nan


def _is_alive(pid: int) -> bool:
    if pid == 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
