"""The real app when many ask at once and when they leave: every answer is right or a refusal, and nothing is left behind."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from explorer.sites import BEARER, HOME, HOST, JSON, Ask, Guarded, requests_of
from mlsae.explorer import Running, open_explorer
from mlsae.explorer.app import create_app
from mlsae.explorer.inference import Busy, Worker
from mlsae.explorer.library import Library
from mlsae.lm import LanguageModel

TEXTS = ("the cat sat", "on a mat", "a dog ran home", "x")
N_AT_ONCE, N_LEAVING, N_NEW = 200, 5, 40


@pytest.fixture(scope="module")
def site(tiny_run: Path) -> Iterator[Running]:
    with open_explorer(tiny_run) as running:
        yield running


@pytest.fixture(scope="module")
def client(site: Running) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {site.token}"}
    with httpx.Client(base_url=site.url, headers=headers, timeout=30) as client:
        client.post("/prompt.json", json={"text": "loads the model"}).raise_for_status()
        yield client


def sent(site: Running, path: str, body: Any) -> socket.socket:
    """A connection over which a request was sent, and nothing was read."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\nAuthorization: Bearer {site.token}\r\nConnection: close\r\n"
    connection = socket.create_connection(("127.0.0.1", site.port), timeout=30)
    connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def received(connection: socket.socket) -> tuple[int, bytes, Any]:
    """Status, head and JSON of an answer."""
    with connection:
        head, _, body = b"".join(iter(lambda: connection.recv(1 << 20), b"")).partition(b"\r\n\r\n")
    return int(head.split()[1]), head.lower(), json.loads(body)


def until(true: Callable[[], bool]) -> None:
    """Wait for something that comes at once, or never."""
    for _ in range(3000):
        if true():
            return
        time.sleep(0.01)
    pytest.fail("it never came")


def test_many_at_once_get_their_own_answer_or_a_refusal(site: Running, client: httpx.Client):
    alone = [client.post("/prompt.json", json={"text": text}).json() for text in TEXTS]
    assert len({len(answer["tokens"]) for answer in alone}) == len(TEXTS)
    connections = [sent(site, "/prompt.json", {"text": TEXTS[i % len(TEXTS)]}) for i in range(N_AT_ONCE)]
    answers = [received(connection) for connection in connections]
    assert {status for status, _, _ in answers} <= {200, 503}
    assert all(body == alone[i % len(TEXTS)] for i, (status, _, body) in enumerate(answers) if status == 200)
    assert all(
        b"retry-after: " in head and body["error"]["field"] == "queue"
        for status, head, body in answers
        if status == 503
    )
    assert sum(status == 200 for status, _, _ in answers) >= 17, "one runs and sixteen wait"
    assert client.post("/prompt.json", json={"text": TEXTS[0]}).json() == alone[0]
    assert client.get("/progress.json").json() == {"queued": 0, "running": None, "lm": "ready"}


# ---- when the queue is full ------------------------------------------------------------------------------------------

POST = [("host", HOST), BEARER, JSON]


def full(monkeypatch: pytest.MonkeyPatch, is_full: Callable[[], bool]) -> None:
    monkeypatch.setattr(Worker, "is_full", property(lambda worker: is_full()))


def test_exactly_what_the_worker_computes_is_refused_at_the_door(tiny_run: Path, monkeypatch: pytest.MonkeyPatch):
    reached = []

    async def run(worker: Worker, *asked: Any) -> None:
        reached.append(asked)
        raise Busy

    monkeypatch.setattr(Worker, "run", run)
    app = Guarded(create_app(Library.open(tiny_run)))
    computed, refused = set(), set()
    for is_full, found in ((False, computed), (True, refused)):
        full(monkeypatch, lambda is_full=is_full: is_full)
        for method, path in requests_of(app.app):
            for fields in ({}, {"text": "a"}, {"text": "a", "other": "b"}):
                query = "&".join(f"{name}={value}" for name, value in fields.items())
                ask = Ask(method, f"{path}?{query}", [*POST, ("origin", HOME)], [json.dumps(fields).encode()])
                (answer,) = app.ask([ask])
                if answer.status == 503:
                    assert json.loads(answer.body)["error"]["field"] == "queue"
                    assert answer.header("retry-after") is not None
                    found.add((method, path))
        if not is_full:
            reached.clear()
    assert len(computed) == 10
    assert refused == computed
    assert reached == []


def test_who_comes_after_a_crowd_is_answered_before_it(tiny_run: Path, monkeypatch: pytest.MonkeyPatch):
    full(monkeypatch, lambda: True)
    app, done = Guarded(create_app(Library.open(tiny_run))), []

    async def asked(ask: Ask) -> None:
        await app._ask(ask)
        done.append(ask.path)

    async def crowd() -> None:
        crowd = [asked(Ask("POST", "/prompt.json", POST, [b"{}"])) for _ in range(200)]
        await asyncio.gather(*crowd, asked(Ask("GET", "/health", [("host", HOST)])))

    asyncio.run(crowd())
    assert len(done) == 201
    assert done.index("/health") < 20


def test_a_place_that_becomes_free_is_given_to_who_stands_in_line(tiny_run: Path, monkeypatch: pytest.MonkeyPatch):
    looks = iter([True, *[False] * 9])
    full(monkeypatch, lambda: next(looks))
    answer = Guarded(create_app(Library.open(tiny_run))).one("POST", "/prompt.json", BEARER, JSON, body=b"{}")
    assert answer.status == 422, "its text is missing: it was looked at"


# ---- who leaves ------------------------------------------------------------------------------------------------------


def test_those_who_leave_free_their_places_and_end_their_jobs(
    site: Running, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
):
    passes, logits = [0], LanguageModel.logits

    def counted(*args: Any, **kwargs: Any) -> Any:
        passes[0] += 1
        time.sleep(0.005)  # as a larger model
        return logits(*args, **kwargs)

    monkeypatch.setattr(LanguageModel, "logits", counted)
    job = {"text": "the cat sat", "n_new": N_NEW, "reconstruct": True}

    def progress() -> dict[str, Any]:
        return client.get("/progress.json").json()

    def is_idle() -> bool:
        return progress()["running"] is None and progress()["queued"] == 0

    received(sent(site, "/steer.json", job))
    whole, threads = passes[0], threading.active_count()
    for _ in range(N_LEAVING):
        running = sent(site, "/steer.json", job)
        until(lambda: (progress()["running"] or {}).get("what") == "steer")
        waiting = [sent(site, "/steer.json", job) for _ in range(3)]
        until(lambda: progress()["queued"] == 3)
        for connection in (*waiting, running):
            connection.close()
        until(is_idle)
    assert whole > N_NEW
    assert passes[0] - whole < N_LEAVING * whole, "jobs went on to their end, or those in the queue were begun"
    assert threading.active_count() <= threads
    assert received(sent(site, "/steer.json", job))[0] == 200
