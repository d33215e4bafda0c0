"""A stand-in for the Hugging Face Hub on this machine: repositories to read and write, and every request recorded.

`HF_ENDPOINT` set to `HubServer.url` leads the libraries here. A plan decides, request by request, whether the network fails.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

Fault = int | Literal["close", "short", "stall"] | None
"""A status instead of the answer; no answer; half of it, then the end; half of it, then silence; None: the answer."""

_VERBS = "revision|tree|paths-info|preupload|commit|branch"
_API = re.compile(rf"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/({_VERBS})/([^/]+)/?(.*))?")
_FILE = re.compile(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_BATCH = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")
_OBJECT = re.compile(r"/lfs-storage/([0-9a-f]{64})")
WRITERS = ("preupload", "commit", "branch")
LARGE = (".safetensors", ".pt", ".png", ".bin")
"""Files whose bytes are uploaded apart from the commit that names them."""


class Repository:
    """Commits, each named by what it holds and follows, and branches. The first commit of `main` is a folder, as it is now."""

    def __init__(self, folder: Path | None = None, access: Literal["public", "gated", "private"] = "public"):
        self.access, self.commits, self.branches = access, dict[str, dict[str, bytes]](), dict[str, str]()
        found = sorted(path for path in folder.rglob("*") if path.is_file()) if folder is not None else []
        self.add("main", {path.relative_to(folder).as_posix(): path.read_bytes() for path in found})

    def add(self, branch: str, files: dict[str, bytes]) -> str:
        """A commit of these files, and no other, on a branch; returns its name."""
        parent = self.branches.get(branch, "")
        name = _sha1(json.dumps([parent, {path: _sha1(content) for path, content in files.items()}]).encode())
        self.commits[name], self.branches[branch] = files, name
        return name

    def commit_of(self, revision: str | None) -> str | None:
        """The commit that a branch, a commit or nothing names; None: there is none."""
        revision = "main" if revision is None else revision
        return revision if revision in self.commits else self.branches.get(revision)

    @property
    def commit(self) -> str:
        return self.branches["main"]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.commit]


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
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)


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
        self.large: dict[str, bytes] = {}
        """Uploaded files that a commit may name, by their SHA-256."""
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
        if request.path in ("/api/repos/create", "/api/validate-yaml"):
            return self._create(request) if request.path.endswith("create") else _validate(request)
        if asked := _BATCH.fullmatch(request.path):
            return self._batch(request) if self._may_write(request) else _refusal(403)
        if asked := _OBJECT.fullmatch(request.path):
            self.large[asked[1]] = request.body
            return Answer(200 if hashlib.sha256(request.body).hexdigest() == asked[1] else 400)
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
        if verb in WRITERS and not self._may_write(request):
            return _refusal(403 if given else 401)
        if verb == "branch":
            if revision in repository.branches:
                return _refusal(409)
            repository.branches[revision] = repository.commit
            return _json({})
        commit = repository.commit_of(revision)
        if commit is None:
            return _refusal(404, "RevisionNotFound")
        files = repository.commits[commit]
        if verb == "preupload":
            return _json({"files": [_preupload(file, files) for file in request.json["files"]]})
        if verb == "commit":
            return self._commit(request, name, repository, revision)
        if verb == "resolve":
            return _file(files, commit, path, request.headers.get("range"))
        if verb == "tree":
            depth = None if request.query.get("recursive") == ["true"] else 1
            found = [entry for entry in _entries(files) if (path or ".") in _parents(entry["path"])[:depth]]
            return _json(found) if found or not path else _refusal(404, "EntryNotFound")
        if verb == "paths-info":
            return _json([entry for entry in _entries(files) if entry["path"] in request.query["paths"]])
        siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
        access = {"gated": repository.access == "gated" and "manual", "private": repository.access == "private"}
        return _json({"id": name, "sha": commit, "siblings": siblings, "tags": [], **access})

    def _may_write(self, request: Request) -> bool:
        return request.headers.get("authorization") == f"Bearer {self.token}"

    def _create(self, request: Request) -> Answer:
        """A new, empty repository of the user `me` or an organisation they are in."""
        if not self._may_write(request):
            return _refusal(403 if "authorization" in request.headers else 401)
        asked = request.json
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        if (key := f"{asked.get('type', 'model')}s/{name}") in self.repositories:
            return Answer(409, json.dumps({"error": "exists", "url": f"{self.url}/{name}"}).encode())
        self.repositories[key] = Repository(access="private" if asked.get("visibility") == "private" else "public")
        self.repositories[key].add("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return _json({"url": f"{self.url}/{name}"})

    def _batch(self, request: Request) -> Answer:
        """Where to put the bytes of large files; nothing for those that are there."""

        def told(asked: dict[str, Any]) -> dict[str, Any]:
            there = asked["oid"] in self.large
            where = {"actions": {"upload": {"href": f"{self.url}/lfs-storage/{asked['oid']}"}}}
            return asked | ({} if there else where)

        return _json({"transfer": "basic", "objects": [told(asked) for asked in request.json["objects"]]})

    def _commit(self, request: Request, name: str, repository: Repository, branch: str) -> Answer:
        """All of the operations, or none."""
        header, *operations = (json.loads(line) for line in request.body.splitlines())
        files = dict(repository.commits[repository.branches[branch]])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile" and value["oid"] in self.large:
                files[value["path"]] = self.large[value["oid"]]
            else:
                return _refusal(400)
        assert header["value"]["summary"]
        commit = repository.add(branch, files)
        return _json({"commitUrl": f"{self.url}/{name}/commit/{commit}", "commitOid": commit, "pullRequestUrl": None})


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
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self._body(headers)
        is_form = headers.get("content-type") == "application/x-www-form-urlencoded"
        query = parse_qs(url.query) | (parse_qs(body.decode("latin-1")) if is_form else {})
        request = Request(self.command, unquote(url.path), query, headers, body)
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

    def _body(self, headers: Mapping[str, str]) -> bytes:
        if headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(headers.get("content-length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, answer: Answer, cut: bool) -> None:
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: len(answer.body) // 2] if cut else answer.body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Said by `HubServer.requests`."""


def _validate(request: Request) -> Answer:
    """Whether a model card has metadata that the Hub takes; of licences it knows two."""
    (found,) = re.findall(r"\A---\n(.*?)\n---\n", request.json["content"], re.S)
    bad = [line for line in found.splitlines() if re.fullmatch(r"license: (?!mit$|cc-by-4.0$).*", line)]
    errors = [{"message": f"{line} is not one of the licences"} for line in bad]
    return Answer(400 if errors else 200, json.dumps({"errors": errors, "warnings": []}).encode())


def _preupload(asked: dict[str, Any], files: Mapping[str, bytes]) -> dict[str, Any]:
    path = asked["path"]
    mode = "lfs" if path.endswith(LARGE) else "regular"
    return {
        "path": path,
        "uploadMode": mode,
        "shouldIgnore": False,
        "oid": _oid(files[path], mode) if path in files else None,
    }


def _oid(content: bytes, mode: str) -> str:
    """As git names a blob, or LFS a large file."""
    if mode == "lfs":
        return hashlib.sha256(content).hexdigest()
    return _sha1(b"blob %d\0" % len(content) + content)


def _file(files: Mapping[str, bytes], commit_name: str, path: str, wanted: str | None) -> Answer:
    """A file, or the bytes of it that a `Range` header asks for."""
    commit, content = {"X-Repo-Commit": commit_name}, files.get(path)
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


def _entries(files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """Every file and folder, as a tree listing shows them."""
    leaves = {path: {"type": "file", "oid": _sha1(content), "size": len(content)} for path, content in files.items()}
    folders = {
        up: {"type": "directory", "oid": _sha1(up.encode()), "size": 0} for path in leaves for up in _parents(path)
    }
    return [{"path": path, **entry} for path, entry in sorted((folders | leaves).items()) if path != "."]


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
