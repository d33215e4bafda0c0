"""A small site with routes of every kind the explorer has, the attacks on such sites, and ways to send them."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from pydantic import BaseModel, ConfigDict
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from mlsae.errors import ConfigError
from mlsae.explorer.answers import Dose, Index, QueryFlag, QueryIndex, QueryNumber, json_response, parse, shape_errors
from mlsae.explorer.guard import Guard

TOKEN = "t0ken-" + "k" * 37
HOST = "127.0.0.1:8001"
HOME = f"http://{HOST}"
COOKIE = f"mlsae-8001={TOKEN}"
N_LATENTS = 32

# ---- the site --------------------------------------------------------------------------------------------------------


class Edit(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    latent: Index
    dose: Dose = 1.0


class Steer(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    text: str
    edits: list[Edit] = []


def small_site(static: Path) -> FastAPI:
    """Pages, twins, a binary, bodies, files, documentation, and routes that go wrong."""
    app = FastAPI()
    shape_errors(app)
    static.mkdir(exist_ok=True)
    (static / "page.css").write_text("body { color: red }")

    def known(latent: int) -> int:
        if latent >= N_LATENTS:
            raise ConfigError("latent", f"{latent} is out of range; 0 to {N_LATENTS - 1}")
        return latent

    @app.get("/")
    async def root() -> Response:
        return RedirectResponse("/overview")

    @app.get("/health")
    async def health() -> Response:
        return json_response({"ok": True})

    @app.get("/overview")
    async def overview() -> Response:
        return HTMLResponse("<h1>Overview</h1>")

    @app.get("/heatmap.bin")
    async def heatmap(start: QueryIndex = 0, stop: QueryIndex = 9, width: QueryIndex = 9) -> Response:
        return Response(bytes(min(stop, 4096)), media_type="application/octet-stream")

    @app.get("/latents/{latent}.json")
    async def latent_json(latent: QueryIndex, layer: QueryIndex | None = None) -> Response:
        return json_response({"latent": known(latent), "layer": layer, "density": [float("nan"), 0.5]})

    @app.get("/latents/{latent}")
    async def latent_page(latent: QueryIndex) -> Response:
        return HTMLResponse(f"<h1>{known(latent)}</h1>")

    @app.put("/latents/{latent}/note")
    async def note(latent: QueryIndex, request: Request) -> Response:
        return json_response({"note": parse(Steer, await request.body()).text})

    @app.get("/search.json")
    async def search(
        token: str = "",
        centre_min: QueryNumber | None = None,
        descending: QueryFlag = False,
        limit: Annotated[QueryIndex, Query(le=200)] = 50,
    ) -> Response:
        return json_response({"token": token, "centre_min": centre_min, "descending": descending, "limit": limit})

    @app.get("/prompt.json")
    async def prompt(text: str = "") -> Response:
        return json_response({"text": text})

    @app.post("/steer.json")
    async def steer(request: Request) -> Response:
        asked = parse(Steer, await request.body())
        return json_response({"latents": [known(edit.latent) for edit in asked.edits], "n": len(asked.text)})

    @app.get("/long.json")
    async def long() -> Response:
        return Response(b"x" * ((2 << 20) + 1))

    @app.get("/endless")
    async def endless() -> Response:
        async def parts() -> AsyncIterator[bytes]:
            for _ in range(40):
                yield b"x" * (1 << 16)

        return StreamingResponse(parts())

    app.mount("/static", StaticFiles(directory=static))
    return app


def requests_of(app: FastAPI) -> list[tuple[str, str]]:
    """Method and path of every route that an app has, those that come with the framework included, and of the sign-in."""
    found = [("GET", "/signin")]
    for route in app.routes:
        path = re.sub(r"\{[^}]*\}", "3", getattr(route, "path", ""))
        if isinstance(route, Mount):
            found += [("GET", f"{path}/page.css"), ("GET", f"{path}/missing"), ("GET", f"{path}/../../secret")]
        else:
            found += [(method, path) for method in sorted(getattr(route, "methods", None) or ())]
    return found


class Guarded:
    """A guarded app that counts what gets past the guard."""

    def __init__(self, app: FastAPI, **settings: Any):
        self.app = app
        self.passed: list[str] = []
        self.guard = Guard(self._counted, TOKEN, **settings)

    async def _counted(self, scope: Any, receive: Any, send: Any) -> None:
        self.passed.append(scope["path"])
        await self.app(scope, receive, send)

    def ask(self, asks: "Sequence[Ask]") -> "list[Answer]":
        """The answers to requests, one after the other."""

        async def all_of_them() -> list[Answer]:
            return [await self._ask(ask) for ask in asks]

        return asyncio.run(all_of_them())

    def one(self, method: str, path: str, *headers: tuple[str, str], body: bytes = b"") -> "Answer":
        """The answer to one request with a right Host unless another is given, and nothing else."""
        given = headers if any(key == "host" for key, _ in headers) else (("host", HOST), *headers)
        return self.ask([Ask(method, path, given, [body])])[0]

    async def _ask(self, ask: "Ask") -> "Answer":
        path, _, query = ask.path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": ask.method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(key.encode(), value.encode("latin-1")) for key, value in ask.headers],
            "client": ("127.0.0.1", 5),
            "server": ("127.0.0.1", 8001),
        }
        answer, parts, before = Answer(), iter(ask.body), len(self.passed)
        finished = asyncio.Event()
        following = next(parts, None)

        async def receive() -> Any:
            nonlocal following
            if following is None and answer.received_all:
                await finished.wait()
                return {"type": "http.disconnect"}
            part, following = following, next(parts, None)
            answer.received_all = following is None
            answer.n_received += len(part or b"")
            return {"type": "http.request", "body": part or b"", "more_body": following is not None}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = [(key.decode().lower(), value.decode("latin-1")) for key, value in message["headers"]]
            else:
                answer.body += message.get("body", b"")
                if not message.get("more_body", False):
                    answer.complete = True
                    finished.set()

        await self.guard(scope, receive, send)
        answer.passed = len(self.passed) > before
        return answer


@dataclass(frozen=True)
class Ask:
    """A request: headers as they are sent, and the parts of its body."""

    method: str
    path: str
    headers: Sequence[tuple[str, str]]
    body: Iterable[bytes] = (b"",)


@dataclass
class Answer:
    """What came back, and whether the app behind the guard was reached."""

    status: int = 0
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    complete: bool = False
    passed: bool = False
    n_received: int = 0
    received_all: bool = False

    def header(self, name: str) -> str | None:
        """A header's value."""
        return dict(self.headers).get(name)


# ---- attacks ---------------------------------------------------------------------------------------------------------

BEARER = ("authorization", f"Bearer {TOKEN}")
JSON = ("content-type", "application/json")

GOOD_HOSTS = [*("127.0.0.1", "localhost", "[::1]", "LOCALHOST", "LocalHost:80"), HOST, "localhost:65535", "[::1]:8001"]
BAD_HOSTS: list[list[str]] = [
    [],
    [HOST, HOST],
    [HOST, "evil.example"],
    ["127.0.0.1.evil.example:8001"],
    ["localhost.evil.example"],
    ["evil-localhost:8001"],
    ["127.0.0.1@evil.example"],
    ["user:word@127.0.0.1:8001"],
    ["0x7f000001:8001"],
    ["2130706433"],
    ["127.1:8001"],
    ["[::ffff:127.0.0.1]:8001"],
    ["localhost.:8001"],
    ["0.0.0.0:8001"],
    ["127.0.0.1:8001\n"],
    ["127x0x0x1:8001"],
    ["evil.example"],
    [""],
]
BAD_ORIGINS = [
    "http://evil.example",
    "null",
    "http://127.0.0.1:9999",
    "file://",
    "http://127.0.0.1:8001.evil.example",
    "https://127.0.0.1:8001",
    "http://localhost:8001",
    "http://127.0.0.1",
    "127.0.0.1:8001",
    "http://127.0.0.1:8001/",
    "",
]


def forgeries() -> list[tuple[int, tuple[tuple[str, str], ...]]]:
    """The status that a POST with each set of headers must get: what a page elsewhere can have sent, and near misses."""
    cookie = ("cookie", COOKIE)
    cases: list[tuple[int, tuple[tuple[str, str], ...]]] = []
    kinds = [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonp",
        "",
    ]
    kinds += ["application/json; charset=utf-8", "text/json", "application/json,text/plain", " application/json"]
    for kind in kinds:
        cases.append((415, (cookie, ("origin", HOME), ("content-type", kind))))
        cases.append((403, (cookie, ("sec-fetch-site", "cross-site"), ("content-type", kind))))
    cases.append((415, (cookie, ("origin", HOME))))
    cases.append((415, (BEARER,)))
    cases.append((415, (cookie, ("origin", HOME), JSON, JSON)))
    for origin in BAD_ORIGINS:
        cases.append((403, (cookie, JSON, ("origin", origin))))
        cases.append((403, (cookie, JSON, ("origin", origin), ("sec-fetch-site", "same-origin"))))
    cases.append((403, (cookie, JSON, ("origin", HOME), ("origin", HOME))))
    for site in ("cross-site", "same-site", "", "SAME-ORIGIN", "same-origin, cross-site", "none of these"):
        for dest in ("document", "empty", "iframe"):
            more = (("sec-fetch-site", site), ("sec-fetch-dest", dest), ("origin", HOME))
            cases.append((403, (cookie, JSON, *more)))
    cases.append((403, (cookie, JSON)))
    cases.append((403, (cookie, JSON, ("sec-fetch-site", "none"))))
    cases.append((403, (BEARER, cookie, JSON)))
    cases.append((403, (BEARER, ("cookie", "other=1"), JSON)))
    cases.append((403, (BEARER, JSON, ("origin", "http://evil.example"))))
    cases.append((403, (BEARER, JSON, ("sec-fetch-site", "cross-site"))))
    cases.append((401, (("origin", HOME), JSON)))
    cases.append((401, (("authorization", "Basic " + TOKEN), JSON)))
    cases.append((401, (BEARER, BEARER, JSON)))
    cases.append((401, (cookie, ("authorization", "Bearer "), ("origin", HOME), JSON)))
    cases.append((200, (cookie, JSON, ("origin", HOME))))
    cases.append((200, (cookie, JSON, ("sec-fetch-site", "same-origin"))))
    cases.append((200, (BEARER, JSON)))
    cases.append((200, (BEARER, cookie, JSON, ("origin", HOME))))
    return cases


def one_bit_off(token: str) -> list[str]:
    """The token with one bit of one character changed, at its beginning, middle and end."""
    places = (0, len(token) // 2, len(token) - 1)
    return [token[:i] + chr(ord(token[i]) ^ 1) + token[i + 1 :] for i in places]


def exchange(port: int, data: bytes | Iterable[bytes], *, seconds: float = 5, at_most: int = 1 << 22) -> bytes:
    """All that a server sends in answer to raw bytes until it closes; TimeoutError if it does not in time."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as client:
        try:
            for part in [data] if isinstance(data, bytes) else data:
                client.sendall(part)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has heard enough
        try:
            while len(answer) < at_most and (part := client.recv(1 << 16)):
                answer += part
        except ConnectionResetError:
            pass
    return answer
