"""An explorer in a process of its own, a client that costs little, and the rows of a table of what was measured of it."""

import bisect
import contextlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness

STORY = "Once upon a time there was a little dog. It ran to the park and saw a big cat. "
TEXTS = (
    "The dog ran to the park.",
    "Once upon a time",
    "A cat sat on the mat and slept.",
    "She was very happy that day",
)


# ---- what was measured -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A promise, and what was measured of it."""

    claim: str
    values: list[float]
    unit: str
    target: float | None = None
    """An upper bound; None: there is none."""
    law: bool = False
    """Whether to break it is a bug on any machine."""
    statistic: Callable[[Sequence[float]], float] = field(default=statistics.median, repr=False)
    load: str = field(default_factory=lambda: f"{os.getloadavg()[0]:.1f}")
    """Of the machine, when it was measured."""

    @property
    def measured(self) -> float:
        """What counts of the values: their median, unless said otherwise."""
        return self.statistic(self.values)

    @property
    def met(self) -> bool | None:
        """None: nothing was promised."""
        return None if self.target is None else self.measured <= self.target

    def __str__(self) -> str:
        n = "" if len(self.values) == 1 else f"  (n = {len(self.values)}, to {max(self.values):.4g})"
        target = "" if self.target is None else f"<= {self.target:g}"
        verdict = {None: "", True: "met", False: "BROKEN" if self.law else "NOT MET"}[self.met]
        return f"{self.claim:66}{self.measured:10.4g} {self.unit:4}{n:24}{target:>9}  {verdict:8} load {self.load}"


def p99(values: Sequence[float]) -> float:
    """Of so many values that one in a hundred is larger, or else the largest."""
    return sorted(values)[max(0, -(-99 * len(values) // 100) - 1)]


# ---- a server, and a client that costs little ------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """An explorer that is running."""

    pid: int
    port: int
    token: str

    def memory(self) -> float:
        """Resident, MiB."""
        return _status(self.pid, "VmRSS") / 1024

    def threads(self) -> int:
        """How many it has."""
        return _status(self.pid, "Threads")

    def request(self, method: str, target: str, body: bytes = b"", *, keep: bool = True) -> bytes:
        """As it is sent, signed in as a script."""
        more = (
            b""
            if method in ("GET", "HEAD")
            else b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
        )
        close = b"" if keep else b"connection: close\r\n"
        head = f"{method} {target} HTTP/1.1\r\nhost: 127.0.0.1:{self.port}\r\nauthorization: Bearer {self.token}\r\n"
        return head.encode("utf-8", "surrogateescape") + more + close + b"\r\n" + body

    def connect(self) -> socket.socket:
        """A connection of its own."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=120)

    def ask(self, method: str, target: str, body: Any = None) -> tuple[int, bytes]:
        """Status and body of one answer, over a connection of its own."""
        data = b"" if body is None else json.dumps(body).encode()
        with self.connect() as connection:
            connection.sendall(self.request(method, target, data, keep=False))
            return parsed(b"".join(iter(lambda: connection.recv(1 << 20), b"")))

    def get(self, target: str) -> Any:
        """The JSON of an answer."""
        return json.loads(self.ask("GET", target)[1])

    def timed(self, method: str, target: str, body: Any = None) -> float:
        """Seconds that an answer took; it has to be a good one."""
        began = time.perf_counter()
        status, said = self.ask(method, target, body)
        seconds = time.perf_counter() - began
        if status != 200:
            raise RuntimeError(f"{target}: {status} {said[:300]!r}")
        return seconds


def parsed(answer: bytes) -> tuple[int, bytes]:
    """Status and body; status 0 if the connection ended without an answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return (int(head.split(maxsplit=2)[1]), body) if head.startswith(b"HTTP/1.1 ") else (0, answer)


@contextlib.contextmanager
def serving(run: Path) -> Generator[Site]:
    """`mlsae explore` of a run, as a process."""
    command = [sys.executable, "-m", "mlsae", "explore", str(run), "--port", "0"]
    environment = {**os.environ, **harness.ENVIRONMENT, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if found := re.search(r"http://127\.0\.0\.1:(\d+)/\?token=(\S+)", line):
                    yield Site(process.pid, int(found[1]), found[2])
                    return
            raise harness.Absent(f"mlsae explore ended with {process.wait()}")
        finally:
            process.terminate()


def _status(pid: int, name: str) -> int:
    """A number of /proc/PID/status."""
    found = re.search(rf"^{name}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    assert found is not None
    return int(found[1])


def texts_of(site: Site, n_tokens: int, n: int) -> list[str]:
    """Different texts of so many tokens, or one or two fewer, of which none was asked for before."""
    words = (STORY * (1 + n_tokens // 16)).split()

    def length(n_words: int) -> int:
        text = " ".join([str(n), *words[:n_words]])
        return len(json.loads(site.ask("POST", "/prompt.json", {"text": text})[1])["tokens"])

    n_words = bisect.bisect_right(range(len(words)), n_tokens, key=length) - 1
    return [" ".join([str(i), *words[:n_words]]) for i in range(n)]
