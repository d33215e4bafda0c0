"""Measure the explorer: how fast its pages are, how much memory it takes, and what it does when many ask at once.

    python benchmarks/explorer.py                           pages and memory of a made-up run, 196,608 latents x 28 layers
    python benchmarks/explorer.py --run DIR                 of this run
    python benchmarks/explorer.py --lm-run DIR              also prompts, steering and crowds, where a language model is

Each server is a `mlsae explore` of its own; pages are timed in a real Chromium through Playwright, if both are there
(MLSAE_CHROMIUM names it). Exits with 1 if a wrong answer was given, or a 5xx that is not 503.
"""

import argparse
import asyncio
import bisect
import contextlib
import json
import multiprocessing
import os
import random
import re
import selectors
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import bigrun
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


# ---- pages -----------------------------------------------------------------------------------------------------------

CLICK = """([selector, place]) => { const at = document.querySelector(selector), box = at.getBoundingClientRect();
  at.addEventListener("click", () => sessionStorage.setItem("clicked", Date.now()), { capture: true, once: true });
  return [box.x + place[0] * box.width, box.y + place[1] * box.height]; }"""
"""The place to click on, which will note when it was."""
DRAWN = """(selector) => new Promise((done) => { const look = () => requestAnimationFrame(document.querySelector(selector)
  ? () => setTimeout(() => done(Date.now())) : look); look(); })"""
"""When the frame after the first with such an element was drawn."""
LATENT_DRAWN = "html[data-ready] .chart svg"


def pages(site: Site, rounds: int) -> Iterator[Row]:
    """In a browser: the first page from navigation to the frame after it is ready, and clicks to the frame after it is drawn."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise harness.Absent("pip install playwright") from error
    chromium = os.environ.get("MLSAE_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise harness.Absent("no Chromium; install one or set MLSAE_CHROMIUM")
    home = f"http://127.0.0.1:{site.port}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])

        def tab() -> Any:
            context = browser.new_context(viewport={"width": 1280, "height": 900})
            context.add_cookies([{"name": f"mlsae-{site.port}", "value": site.token, "url": home}])
            return context.new_page()

        def ready(page: Any, path: str) -> float:
            page.goto(home + path, wait_until="commit")
            return page.evaluate(DRAWN, "html[data-ready]") - page.evaluate("performance.timeOrigin")

        def clicked(page: Any, path: str, selector: str, place: tuple[float, float]) -> float:
            ready(page, path)
            page.wait_for_load_state("networkidle")
            page.wait_for_selector(selector)
            x, y = page.evaluate(CLICK, [selector, place])
            page.mouse.move(x, y)
            if "canvas" in selector:  # which says what is under the mouse once it knows
                page.wait_for_selector(".readout b")
            page.wait_for_timeout(50)
            with page.expect_navigation(url="**/latents/*", wait_until="commit"):
                page.mouse.click(x, y)
            return page.evaluate(DRAWN, LATENT_DRAWN) - page.evaluate("+sessionStorage.getItem('clicked')")

        page = tab()
        yield Row("first page ever asked for, ready", [ready(page, "/overview")], "ms")
        cold = []
        for _ in range(rounds):
            fresh = tab()
            cold.append(ready(fresh, "/overview"))
            fresh.context.close()
        yield Row("first page interactive, cold cache", cold, "ms", 1000)
        yield Row("first page interactive, warm cache", [ready(page, "/overview") for _ in range(rounds)], "ms", 1000)
        places = [(0.1 + 0.8 * i / rounds, 0.4) for i in range(rounds)]
        seconds = [clicked(page, "/overview", "canvas.map", place) for place in places]
        yield Row("click on the heat map to latent drawn", seconds, "ms", 150)
        rows = [f"tbody tr:nth-child({i % 40 + 1}) a" for i in range(rounds)]
        seconds = [clicked(page, "/search?sort=density&descending=true", row, (0.5, 0.5)) for row in rows]
        yield Row("click on a row of the search to latent drawn", seconds, "ms", 150)
        browser.close()


def numbers(site: Site, rounds: int) -> Iterator[Row]:
    """Without a browser: what the pages ask for."""
    n = site.get("/overview.json")["sae"]["n_latents"]
    ids = [i * n // rounds for i in range(rounds)]
    for name, targets in {
        "/overview": ["/overview"] * rounds,
        "/heatmap.bin, 1,280 columns": ["/heatmap.bin?width=1280"] * rounds,
        "/latents/ID": [f"/latents/{i}" for i in ids],
        "/search.json, sorted and filtered": [
            f"/search.json?sort=density&centre_min=2&offset={i}" for i in range(rounds)
        ],
        "/latents/ID/neighbours.json": [f"/latents/{i}/neighbours.json" for i in ids],
    }.items():
        site.timed("GET", targets[0])
        yield Row(name, [1000 * site.timed("GET", target) for target in targets], "ms")


# ---- memory ----------------------------------------------------------------------------------------------------------

HOLD = """
import sys, torch, transformers
from mlsae import MLSAE, LanguageModel
sae = MLSAE.from_pretrained(sys.argv[1]).eval().requires_grad_(False)
lm = LanguageModel.from_pretrained(sys.argv[2]) if len(sys.argv) > 2 else None
if lm is not None:
    sae.encode(lm.resid(lm.tokenize("a dog ran home"), sae.layers))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS")))
"""


def memory(site: Site, run: Path, *, with_lm: bool) -> Iterator[Row]:
    """After everything was opened, less that of a process that holds the models and nothing else."""
    n = site.get("/overview.json")["sae"]["n_latents"]
    targets = ["/overview", "/heatmap.bin?width=4096", "/training.json", "/search.json?promoted=dog&token=a&sort=std"]
    for i in range(0, n, n // 50):
        targets += [f"/latents/{i}", f"/latents/{i}.json?layer=0", f"/latents/{i}/neighbours.json"]
        targets += [f"/latents/{i}/{name}.json" for name in ("coactive", "logits") if with_lm]
    if with_lm:
        edits = [{"latent": 3, "op": "add"}]
        for text in (STORY * 10, *TEXTS):
            for name in ("prompt", "logits", "steer"):
                site.ask("POST", f"/{name}.json", {"text": text} | ({} if name == "prompt" else {"edits": edits}))
    for target in targets:
        site.ask("GET", target)
    lm = [json.loads((run / "sae/config.json").read_text())["lm"]] if with_lm else []
    command = [sys.executable, "-c", HOLD, str(run / "sae"), *lm]
    held = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **harness.ENVIRONMENT}
    )
    least, models = int(held.stdout) / 1024, "LM and SAE" if with_lm else "SAE"
    yield Row(f"memory, all opened, beyond torch, transformers, {models}", [site.memory() - least], "MiB", 300)
    yield Row(f"  of which torch, transformers, {models}", [least], "MiB")


# ---- prompts ---------------------------------------------------------------------------------------------------------


def prompts(site: Site, rounds: int) -> Iterator[Row]:
    """One who asks alone; every text is a new one."""
    first = site.timed("POST", "/prompt.json", {"text": STORY})
    yield Row("first prompt, the language model loaded for it", [first], "s")
    texts = _texts(site, 64, rounds)
    yield Row("prompt of 64 tokens", [site.timed("POST", "/prompt.json", {"text": text}) for text in texts], "s", 1)
    edits = [{"latent": 7, "op": "add", "dose": 2.0}]
    for name, more in (
        ("one latent added everywhere", {"edits": edits}),
        ("all layers reconstructed", {"reconstruct": True}),
    ):
        asked = [{"text": text, "n_new": 20, **more} for text in texts]
        yield Row(
            f"steer 64 tokens for 20 more, {name}", [site.timed("POST", "/steer.json", each) for each in asked], "s"
        )
    asked = [{"text": text, "edits": edits} for text in texts]
    yield Row("logits of 64 positions", [site.timed("POST", "/logits.json", each) for each in asked], "s")


def _texts(site: Site, n_tokens: int, n: int) -> list[str]:
    """Different texts of so many tokens, or one or two fewer, of which none was asked for before."""
    words = (STORY * (1 + n_tokens // 16)).split()

    def length(n_words: int) -> int:
        text = " ".join([str(n), *words[:n_words]])
        return len(json.loads(site.ask("POST", "/prompt.json", {"text": text})[1])["tokens"])

    n_words = bisect.bisect_right(range(len(words)), n_tokens, key=length) - 1
    return [" ".join([str(i), *words[:n_words]]) for i in range(n)]


# ---- crowds ----------------------------------------------------------------------------------------------------------


@dataclass
class Crowd:
    """What became of requests that were sent at once."""

    answers: list[tuple[int, bytes]] = field(default_factory=list)
    """In the order of asking."""
    seconds: list[float] = field(default_factory=list)


def crowd(port: int, requests: Sequence[bytes]) -> Crowd:
    """Send all of them at once, each over a connection of its own, and read whatever comes until all are closed."""
    selector, began = selectors.DefaultSelector(), time.perf_counter()
    found = Crowd([(0, b"")] * len(requests), [0.0] * len(requests))
    parts: list[bytearray] = [bytearray() for _ in requests]
    sockets = []
    for i, request in enumerate(requests):
        each = socket.create_connection(("127.0.0.1", port))
        each.sendall(request)
        each.setblocking(False)
        selector.register(each, selectors.EVENT_READ, i)
        sockets.append(each)
    left = len(sockets)
    while left and (ready := selector.select(120)):
        for key, _ in ready:
            try:
                part = sockets[key.data].recv(1 << 20)
            except ConnectionResetError:
                part = b""
            parts[key.data] += part
            if not part:
                selector.unregister(key.fileobj)
                sockets[key.data].close()
                found.answers[key.data] = parsed(bytes(parts[key.data]))
                found.seconds[key.data] = time.perf_counter() - began
                left -= 1
    return found


def probe(site: Site, until: Future[Any], pause: float, *, fresh: bool = False) -> list[float]:
    """Seconds until each /health was answered, asked for at a steady rate, over one connection or ever a new one."""
    seconds, connection = [], site.connect()
    request = site.request("GET", "/health", keep=not fresh)
    while not until.done():
        began = time.perf_counter()
        if fresh:
            connection.close()
            connection = site.connect()
        connection.sendall(request)
        said = b""
        while not said.endswith(b'{"ok":true}'):
            said += (part := connection.recv(1 << 16))
            if not part or not said.startswith(b"HTTP/1.1 200"[: len(said)]):
                raise RuntimeError(f"/health was refused: {said[:300]!r}")
        seconds.append(time.perf_counter() - began)
        time.sleep(max(0.0, pause - seconds[-1]))
    connection.close()
    return seconds


def crowds(site: Site, rounds: int, n: int) -> Iterator[Row]:
    """POSTs of 4 prompts at once, each answer compared with the one to that prompt alone."""
    references = [json.loads(site.ask("POST", "/prompt.json", {"text": text})[1]) for text in TEXTS]
    bodies = [json.dumps({"text": text}).encode() for text in TEXTS]
    requests = [site.request("POST", "/prompt.json", bodies[i % 4], keep=False) for i in range(n)]
    before, statuses, wrong = site.memory(), Counter[int](), 0
    waits: dict[bool, list[float]] = {True: [], False: []}
    seconds, peak = [], before
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(os.getpid).result()
        for number in range(2 * rounds):
            done = pool.submit(crowd, site.port, requests)
            waits[number % 2 == 1] += probe(site, done, 0.005, fresh=number % 2 == 1)
            found, peak = done.result(), max(peak, site.memory())
            statuses.update(status for status, _ in found.answers)
            wrong += sum(
                status == 200 and json.loads(body) != references[i % 4]
                for i, (status, body) in enumerate(found.answers)
            )
            seconds.append(max(found.seconds))
    said = ", ".join(f"{times} x {status}" for status, times in sorted(statuses.items()))
    yield Row(f"{n:,} POSTs at once: wrong answers", [wrong], "", 0, law=True)
    yield Row(f"  5xx but 503, or none ({said})", [_broken(statuses) + statuses[0]], "", 0, law=True)
    for fresh, name in ((False, "one connection"), (True, "new connections")):
        yield Row(
            f"  /health meanwhile, 99th percentile, {name}", [1000 * x for x in waits[fresh]], "ms", 200, statistic=p99
        )
    yield Row("  until all are answered", seconds, "s")
    yield Row("  memory that it grew by", [peak - before], "MiB", 200)
    alone = [site.timed("POST", "/prompt.json", {"text": TEXTS[0]}) for _ in range(rounds)]
    yield Row("  one request afterwards", alone, "s", 5)


def _broken(statuses: Counter[int]) -> int:
    return sum(times for status, times in statuses.items() if status >= 500 and status != 503)


# ---- a long job ------------------------------------------------------------------------------------------------------


def long_jobs(site: Site, disconnects: int) -> Iterator[Row]:
    """The pulse while the language model works, and what is left of jobs that nobody waits for any more."""
    job = {"text": _texts(site, 128, 1)[0], "n_new": 64, "reconstruct": True}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(os.getpid).result()
        body = json.dumps(job).encode()
        requests = [site.request("POST", "/steer.json", body, keep=False)] * 4
        began = time.perf_counter()
        done = pool.submit(crowd, site.port, requests)
        waits = probe(site, done, 0.05)
        seconds = time.perf_counter() - began
    if any(status != 200 for status, _ in done.result().answers):
        raise RuntimeError(f"steering failed: {done.result().answers[0][1][:300]!r}")
    yield Row(f"/health at 20 Hz in {seconds:.1f} s of inference", [1000 * x for x in waits], "ms", 200, statistic=max)
    threads, freed = site.threads(), []
    for _ in range(disconnects):
        with site.connect() as connection:
            connection.sendall(site.request("POST", "/steer.json", body))
            while site.get("/progress.json")["running"] is None:
                pass
        began = time.perf_counter()
        while (state := site.get("/progress.json"))["running"] is not None or state["queued"]:
            pass
        freed.append(time.perf_counter() - began)
    yield Row(f"{disconnects} leave in the middle: until the place is free", freed, "s", 1, statistic=max)
    yield Row("  threads that are left", [site.threads() - threads], "", 0)


# ---- fuzz ------------------------------------------------------------------------------------------------------------

HOSTILE = [
    *("-1", "0", "1", "3", "999999999", "1e3", "NaN", "Infinity", "true", "null", "", " ", "a", "01", "1.0", "0x1")
]
HOSTILE += [
    *("%00", "%FF", "%C3%28", "..%2f..%2fetc%2fpasswd", "%E2%80%AE", "%F0%9F%91%A9", "'%22%3Cscript%3E", "{{7*7}}")
]
HOSTILE += ["9" * 400, "x" * 3000, "%ED%A0%80", "7:all:add:2", "7:3:ablate", "1:0:clamp:1e9", "::::", "centre_of_mass"]
VALUES: list[Any] = [
    0,
    1,
    -1,
    2**63,
    1.5,
    1e308,
    True,
    None,
    "",
    "a",
    "7",
    [],
    {},
    [[[]]],
    "\ud800",
    "\x00",
    "x" * 9000,
]
PAGES = [
    "/",
    "/overview",
    "/search",
    "/prompt",
    "/steer",
    "/logits",
    "/health",
    "/signin",
    "/progress.json",
    "/overview.json",
]
PAGES += [
    "/heatmap.bin",
    "/training.json",
    "/search.json",
    "/prompt.json",
    "/compare.json",
    "/steer.json",
    "/logits.json",
]
PAGES += [f"/latents/{{}}{rest}" for rest in ("", ".json", "/neighbours.json", "/note", "/note.json", "/logits.json")]
PAGES += [
    "/latents/{}/coactive.json",
    "/static/js/main.js",
    "/static/{}",
    "/{}",
    "//evil.example/{}",
    "/openapi.json",
    "/docs",
]
FIELDS = [
    "text",
    "other",
    "latent",
    "layer",
    "pos",
    "top",
    "edit",
    "edits",
    "reconstruct",
    "n_new",
    "start",
    "stop",
    "width",
]
FIELDS += [
    "since_step",
    "sort",
    "descending",
    "offset",
    "limit",
    "token",
    "promoted",
    "centre_min",
    "density_max",
    "n",
    "note",
]
WORKING = ("prompt.json", "compare.json", "steer.json", "logits.json", "coactive.json")


def fuzz(site: Site, n: int) -> Iterator[Row]:
    """Requests of the right shape and of hostile ones, to every route."""
    began = time.perf_counter()
    answers, slowest = asyncio.run(_fuzz(site, n))
    statuses = Counter(status for _, status, _ in answers)
    told = [what for what, _, body in answers if b"Traceback" in body or b"/site-packages/" in body]
    said = ", ".join(f"{times} x {status}" for status, times in sorted(statuses.items()))
    yield Row(f"{n:,} fuzzed requests: 5xx but 503, or no answer", [_broken(statuses) + statuses[0]], "", 0, law=True)
    yield Row("  answers that tell of the machine", [len(told)], "", 0, law=True)
    yield Row(f"  slowest ({said}; {time.perf_counter() - began:.0f} s)", [slowest], "s", 5)
    for what, status, body in answers:
        if _broken(Counter([status])) or status == 0 or what in told:
            print(f"    {status} {what[:200]!r}: {body[:200]!r}")


async def _fuzz(site: Site, n: int, at_once: int = 4) -> tuple[list[tuple[bytes, int, bytes]], float]:
    rng, answers, slowest = random.Random(0), list[tuple[bytes, int, bytes]](), 0.0
    requests = iter([_any_request(site, rng) for _ in range(n)])

    async def client() -> None:
        nonlocal slowest
        for request in requests:
            began = time.perf_counter()
            reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
            writer.write(request)
            try:
                answer = await asyncio.wait_for(reader.read(-1), 30)
            except (TimeoutError, ConnectionResetError):
                answer = b""
            writer.close()
            slowest = max(slowest, time.perf_counter() - began)
            answers.append((request, *parsed(answer)))

    await asyncio.gather(*(client() for _ in range(at_once)))
    return answers, slowest


def _any_request(site: Site, rng: random.Random) -> bytes:
    def hostile() -> str:
        return rng.choice(HOSTILE)

    place = rng.choice(PAGES).format(hostile())
    heavy = place.endswith(WORKING)
    fields = rng.sample(FIELDS, rng.randrange(4))
    if heavy:
        fields = ["text", *fields]
    changes = place.endswith("note")
    if rng.random() < (0.5 if heavy or changes else 0.05):
        body: Any = {name: rng.choice(VALUES) for name in fields}
        if heavy and rng.random() < 0.7:
            body["text"] = rng.choice(TEXTS)
            body |= {"other": TEXTS[1]} if "compare" in place else {}
            body |= {"n_new": 1} if "steer" in place else {}
        if changes and rng.random() < 0.5:
            body = {"note": rng.choice(VALUES)}
        data = json.dumps(rng.choice([body, body, body, [body], rng.choice(VALUES)])).encode()
        if rng.random() < 0.1:
            data = bytes(rng.randrange(256) for _ in range(rng.randrange(200)))
        return site.request("PUT" if changes else "POST", place, data, keep=False)
    values = {name: hostile() for name in fields}
    if heavy and rng.random() < 0.7:
        values = {name: value for name, value in values.items() if name in ("latent", "edit", "pos", "top")}
        values |= {"text": "a%20dog%20ran"} | ({"other": "a%20cat"} if "compare" in place else {})
        values |= {"n_new": "1"} if "steer" in place else {}
    query = "&".join(f"{name}={value}" for name, value in values.items())
    target = (place + ("?" + query if query else "")).replace(" ", "%20")
    return site.request(rng.choice(["GET"] * 9 + ["HEAD"]), target, keep=False)


# ---- all of it -------------------------------------------------------------------------------------------------------


def main() -> int:
    """Print the table; 1 if a law was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run to look at (default: one is made up, in a minute)")
    parser.add_argument(
        "--lm-run", type=Path, metavar="DIR", help="run whose language model is here (default: left out)"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each time (default 9)")
    parser.add_argument("--crowd", type=int, default=1000, help="requests at once (default 1000)")
    parser.add_argument("--disconnects", type=int, default=100, help="clients that leave (default 100)")
    parser.add_argument("--fuzz", type=int, default=10_000, help="fuzzed requests (default 10000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every measurement here")
    options = parser.parse_args()
    machine = harness.machine()
    print(f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']}\n", flush=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="mlsae-explorer-") as folder:
        made = options.run is None and {"pages", "numbers", "memory"} & {*options.only}
        run = bigrun.make(Path(folder) / "run") if made else options.run
        for title, part in parts(options, run):
            print(title, flush=True)
            try:
                for row in part:
                    print(f"  {row}", flush=True)
                    rows.append(row)
            except harness.Absent as why:
                print(f"  left out: {why}")
    if options.json is not None:
        measured = [{**asdict(row), "statistic": row.statistic.__name__, "measured": row.measured} for row in rows]
        options.json.write_text(json.dumps({"machine": machine, "rows": measured}, indent=1) + "\n")
    return int(any(row.law and row.met is False for row in rows))


PARTS = ("pages", "numbers", "memory", "prompts", "crowds", "jobs", "fuzz")


def parts(options: argparse.Namespace, run: Path | None) -> Iterator[tuple[str, Iterator[Row]]]:
    """What is asked for, each beside its server."""
    lm_run: Path | None = options.lm_run

    def of(name: str, at: Path | None, rows: Callable[[Site], Iterator[Row]]) -> Iterator[tuple[str, Iterator[Row]]]:
        if name in options.only and at is not None:
            with serving(at) as site:
                yield f"{name}, {at.name}", rows(site)

    yield from of("pages", run, lambda site: pages(site, options.rounds))
    yield from of("numbers", run, lambda site: numbers(site, options.rounds))
    yield from of("memory", run, lambda site: memory(site, run, with_lm=False))
    yield from of("memory", lm_run, lambda site: memory(site, lm_run, with_lm=True))
    yield from of("prompts", lm_run, lambda site: prompts(site, options.rounds))
    yield from of("crowds", lm_run, lambda site: crowds(site, min(3, options.rounds), options.crowd))
    yield from of("jobs", lm_run, lambda site: long_jobs(site, options.disconnects))
    with tempfile.TemporaryDirectory(prefix="mlsae-fuzz-") as folder:
        fuzzed = None if (at := lm_run or run) is None else _twin(at, Path(folder) / at.name)
        yield from of("fuzz", fuzzed, lambda site: fuzz(site, options.fuzz))


def _twin(run: Path, twin: Path) -> Path:
    """The same run, but for the notes that are made on it."""
    twin.mkdir()
    for path in run.resolve().iterdir():
        if path.name != "notes.json":
            (twin / path.name).symlink_to(path)
    return twin


if __name__ == "__main__":
    sys.exit(main())
