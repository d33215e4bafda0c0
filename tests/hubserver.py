"""A stand-in for the Hugging Face Hub on this machine: folders served as repositories, and every request recorded.

`HF_ENDPOINT` set to `HubServer.url` leads the libraries here. A plan decides, request by request, whether the network fails.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

Fault = int | Literal["close", "short", "stall"] | None
"""A status instead of the answer; no answer; half of it, then the end; half of it, then silence; None: the answer."""

_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?")
_FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass(frozen=True)
class Repository:
    """A folder, as it is when first asked for: one commit, named by what it holds, on one branch, `main`."""

    folder: Path
    access: Literal["public", "gated", "private"] = "public"

    @cached_property
    def files(self) -> dict[str, bytes]:
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in found}

    @cached_property
    def commit(self) -> str:
        return _sha1(json.dumps({path: _sha1(content) for path, content in self.files.items()}).encode())


@dataclass(frozen=True)
class Request:
    """What a client asked."""

    method: str
    path: str
    """Decoded, without the query."""
    query: Mapping[str, list[str]]
    """With the fields of a form."""
    headers: Mapping[str, str]
    """By their names in lower case."""


@dataclass(frozen=True)
class Answer:
    """What it gets."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class HubServer:
    """`with HubServer({"models/org/tiny": Repository(folder)}) as hub:` serves at `hub.url` until the block ends.

    Repositories, faults and the token that opens what is not public may be changed while it serves.
    """

    def __init__(self, repositories: dict[str, Repository] | None = None, token: str = "hf_good"):
        self.repositories = repositories or {}
        self.token = token
        self.faults: Callable[[Request], Fault] = lambda request: None
        """Asked about one request at a time."""
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self._http = _Http(("127.0.0.1", 0), _Handler)
        self._http.hub = self
        self.address = self._http.server_address[:2]
        self.url = f"http://127.0.0.1:{self.address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()

    def answer(self, request: Request) -> Answer:
        """The Hub's answer when nothing fails."""
        if asked := _API.fullmatch(request.path):
            kind, name, verb, revision, path = asked.groups()
        elif asked := _FILE.fullmatch(request.path):
            (kind, name, revision, path), verb = asked.groups("models"), "resolve"
        else:
            return _refusal(404)
        repository = self.repositories.get(f"{kind}/{name}")
        given = request.headers.get("authorization")
        closed = repository is not None and repository.access != "public" and given != f"Bearer {self.token}"
        if repository is None or (closed and repository.access == "private"):
            return _refusal(404 if given else 401, "RepoNotFound")
        if closed and verb not in (None, "revision"):  # the metadata of a gated repository is public
            return _refusal(403 if given else 401, "GatedRepo")
        if revision not in (None, "main", repository.commit):
            return _refusal(404, "RevisionNotFound")
        if verb == "resolve":
            return _file(repository, path, request.headers.get("range"))
        if verb == "tree":
            depth = None if request.query.get("recursive") == ["true"] else 1
            found = [entry for entry in _entries(repository) if (path or ".") in _parents(entry["path"])[:depth]]
            return _json(found) if found else _refusal(404, "EntryNotFound")
        if verb == "paths-info":
            return _json([entry for entry in _entries(repository) if entry["path"] in request.query["paths"]])
        siblings = [{"rfilename": path, "size": len(content)} for path, content in repository.files.items()]
        access = {"gated": repository.access == "gated" and "manual", "private": repository.access == "private"}
        return _json({"id": name, "sha": repository.commit, "siblings": siblings, "tags": [], **access})


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed, which is no error of ours."""


class _Handler(BaseHTTPRequestHandler):
    server: _Http  # ty: ignore[incompatible-mutable-override]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        hub, url = self.server.hub, urlsplit(self.path)
        form = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode("latin-1")
        query = parse_qs(url.query) | parse_qs(form)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, unquote(url.path), query, headers)
        hub.requests.append(request)
        with hub.lock:
            fault = hub.faults(request)
        self.close_connection = self.close_connection or isinstance(fault, str)
        if fault != "close":
            answer = _refusal(fault) if isinstance(fault, int) else hub.answer(request)
            self._send(answer, cut=fault in ("short", "stall"))
        if fault == "stall":
            hub.closing.wait()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _serve

    def _send(self, answer: Answer, cut: bool) -> None:
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: len(answer.body) // 2] if cut else answer.body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Said by `HubServer.requests`."""


def _file(repository: Repository, path: str, wanted: str | None) -> Answer:
    """A file, or the bytes of it that a `Range` header asks for."""
    commit, content = {"X-Repo-Commit": repository.commit}, repository.files.get(path)
    if content is None:
        return _refusal(404, "EntryNotFound", commit)
    headers = {"ETag": f'"{_sha1(content)}"', "Accept-Ranges": "bytes", **commit}
    if wanted is None:
        return Answer(200, content, headers)
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    start, stop = int(first), min(int(last) + 1 if last else len(content), len(content))
    if start >= stop:
        return _refusal(416)
    return Answer(206, content[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"})


def _entries(repository: Repository) -> list[dict[str, Any]]:
    """Every file and folder, as a tree listing shows them."""
    files = {
        path: {"type": "file", "oid": _sha1(content), "size": len(content)}
        for path, content in repository.files.items()
    }
    folders = {
        up: {"type": "directory", "oid": _sha1(up.encode()), "size": 0} for path in files for up in _parents(path)
    }
    return [{"path": path, **entry} for path, entry in sorted((folders | files).items()) if path != "."]


def _parents(path: str) -> list[str]:
    """The folders it is in, the nearest first and the whole repository, `.`, last."""
    return [str(up) for up in Path(path).parents]


def _json(value: Any) -> Answer:
    return Answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _refusal(status: int, code: str | None = None, headers: Mapping[str, str] = {}) -> Answer:
    """An error as the Hub words it."""
    why = {"X-Error-Code": code, "X-Error-Message": f"the Hub says {code}"} if code else {}
    return Answer(status, b'{"error": "refused"}', {**why, **headers})


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
