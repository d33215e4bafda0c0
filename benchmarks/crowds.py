"""Many who ask the explorer at once, who leave in the middle of its work, and who send it nonsense."""

import asyncio
import json
import multiprocessing
import os
import random
import selectors
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from served import TEXTS, Row, Site, p99, parsed, texts_of

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
    job = {"text": texts_of(site, 128, 1)[0], "n_new": 64, "reconstruct": True}
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
    yield Row(f"  slowest ({said}; {time.perf_counter() - began:.0f} s)", [slowest[0]], "s", 5)
    print(f"    the slowest: {slowest[1][:60]!r} ... {slowest[1][-60:]!r}")
    for what, status, body in answers:
        if _broken(Counter([status])) or status == 0 or what in told:
            print(f"    {status} {what[:200]!r}: {body[:200]!r}")


async def _fuzz(site: Site, n: int, at_once: int = 4) -> tuple[list[tuple[bytes, int, bytes]], tuple[float, bytes]]:
    rng, answers, slowest = random.Random(0), list[tuple[bytes, int, bytes]](), (0.0, b"")
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
            slowest = max(slowest, (time.perf_counter() - began, request))
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
