"""One process, one port: bind it, print the URL with its token, serve with deadlines until a signal, and end cleanly."""

import asyncio
import errno
import functools
import re
import resource
import secrets
import socket
import threading
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import h11
import uvicorn
from pydantic_core import to_json
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from mlsae.errors import ConfigError, ResourceError
from mlsae.explorer.answers import shape
from mlsae.explorer.exchange import LIMITS, Limits, headers_of
from mlsae.explorer.guard import Guard

TOKEN_BYTES = 32
QUEUED, ACCEPTED = 1024, 16
"""Connections that wait for us, and of these how many are taken before those that are open are served again."""
STOP_SECONDS = 2
"""For answers under way when a signal comes."""
_NEAR = {"localhost": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
"""How this machine calls addresses that are several."""
_LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Place:
    """Where to listen, and by which names."""

    host: str = "127.0.0.1"
    port: int = 8001
    """0 takes any that is free."""
    allow_remote: bool = False
    """Whether `host` may be another address than loopback."""
    allow_hosts: tuple[str, ...] = ()
    """Names, beside those of loopback and `host`, by which browsers may call it."""


PLACE = Place()


class Running:
    """A server in a thread, for tests and notebooks; a context that stops it."""

    def __init__(self, server: "_Server", thread: threading.Thread, url: str, token: str):
        self.url = url
        """`http://127.0.0.1:8001`, without the token."""
        self.token = token
        self._server, self._thread = server, thread

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rpartition(":")[2])

    def stop(self) -> None:
        """Stop, and wait until it has."""
        self._server.should_exit = True
        self._thread.join()

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


def serve(
    make_app: Callable[[], ASGIApp],
    place: Place = PLACE,
    *,
    style_hash: str = "",
    limits: Limits = LIMITS,
    open_browser: bool = False,
    tell: Callable[[str], None] = print,
) -> None:
    """Serve what `make_app` returns until SIGINT or SIGTERM; the port is taken first, and the URL told once it answers.

    Raises:
        ConfigError: the address is not of this machine's loopback and not allowed, or cannot be.
        ResourceError: the port is in use or not to be had.
    """
    server, listening, url, token = _prepare(make_app, place, style_hash, limits)

    def started() -> None:
        for line in _words(place, url, token):
            tell(line)
        if open_browser:
            ticket = secrets.token_urlsafe(TOKEN_BYTES)  # of its own: others on this machine see a browser's arguments
            server.guard.add_ticket(ticket)
            threading.Thread(target=webbrowser.open, args=(f"{url}/?token={ticket}",), daemon=True).start()

    server.on_start = started
    with listening:
        server.run(sockets=[listening])


def start(
    make_app: Callable[[], ASGIApp],
    place: Place | None = None,
    *,
    style_hash: str = "",
    limits: Limits = LIMITS,
) -> Running:
    """The same in a thread, on any free port of loopback unless a place is given."""
    place = Place(port=0) if place is None else place
    server, listening, url, token = _prepare(make_app, place, style_hash, limits)
    ready = threading.Event()
    server.on_start = ready.set

    def run() -> None:
        try:
            with listening:
                server.run(sockets=[listening])
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="mlsae-explorer", daemon=True)
    thread.start()
    ready.wait()
    if not server.started:
        raise ResourceError("server", "did not start; the lines above say why")
    return Running(server, thread, url, token)


# ---- before it answers -----------------------------------------------------------------------------------------------


def _prepare(
    make_app: Callable[[], ASGIApp], place: Place, style_hash: str, limits: Limits
) -> tuple["_Server", socket.socket, str, str]:
    names = _names(place)
    listening = _listen(place)
    try:
        token = secrets.token_urlsafe(TOKEN_BYTES)
        guard = Guard(make_app(), token, hosts=names, style_hash=style_hash, limits=limits)
        server = _Server(guard, _with_descriptors(limits))
    except BaseException:
        listening.close()
        raise
    return server, listening, f"http://{_bracketed(_NEAR.get(place.host, place.host))}:{_port(listening)}", token


def _names(place: Place) -> list[str]:
    """Host names beside loopback's that requests may bear."""
    if place.host not in _LOCAL and not place.allow_remote:
        raise ConfigError(
            "host",
            f"'{place.host}' may be reached from other machines; keep 127.0.0.1 (ssh -L forwards it), or --allow-remote",
        )
    for name in place.allow_hosts:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+|[0-9A-Fa-f:]+", name):
            raise ConfigError(
                "allow_host", f"'{name}'; a name or address without scheme and port, as in lab.example.org"
            )
    own = () if place.host in (*_LOCAL, *_NEAR) else (place.host,)
    return [_bracketed(name) for name in (*own, *place.allow_hosts)]


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _port(listening: socket.socket) -> int:
    return listening.getsockname()[1]


def _listen(place: Place) -> socket.socket:
    """A socket that listens at a place."""
    if not 0 <= place.port <= 65535:
        raise ConfigError("port", f"{place.port}; 0 (any) to 65535")
    host = "127.0.0.1" if place.host == "localhost" else place.host  # and not ::1 on some machines
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, place.port), family=family, backlog=QUEUED)
    except socket.gaierror as error:
        raise ConfigError("host", f"'{place.host}' is no address of this machine ({error.strerror})") from error
    except PermissionError as error:
        raise ResourceError("port", f"{place.port} needs more rights; try --port 0") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ResourceError("port", f"{place.port} is in use; try --port 0") from error
        raise ConfigError("host", f"'{place.host}' is no address of this machine ({error.strerror})") from error


def _with_descriptors(limits: Limits) -> Limits:
    """The same limits, with no more connections than files that this process may have open, once it has asked for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.connections + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        limits = replace(limits, connections=min(limits.connections, max(soft - 256, soft // 2)))
    return limits


def _words(place: Place, url: str, token: str) -> list[str]:
    lines = [f"{url}/?token={token}"]
    if place.host not in _LOCAL:
        names = ", ".join(_names(place)) or "none but those of loopback: give --allow-host"
        lines.append(
            f"warning: other machines can reach this; only the token keeps them out, and nothing is encrypted (names: {names})"
        )
    return lines


# ---- while it answers ------------------------------------------------------------------------------------------------


class _Server(uvicorn.Server):
    """Uvicorn's, which calls `on_start` when it answers, and for which a signal is the usual end."""

    def __init__(self, guard: Guard, limits: Limits):
        protocol: Any = functools.partial(Protocol, limits=limits)
        super().__init__(
            uvicorn.Config(
                guard,
                http=protocol,
                ws="none",
                loop="asyncio",
                backlog=ACCEPTED,
                lifespan="on",
                log_config=None,
                log_level="error",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                date_header=False,
                timeout_keep_alive=limits.idle_seconds,  # ty: ignore[invalid-argument-type]
                timeout_graceful_shutdown=STOP_SECONDS,
                h11_max_incomplete_event_size=limits.head_bytes,
            )
        )
        self.guard = guard
        self.on_start: Callable[[], None] = lambda: None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(QUEUED)  # asyncio takes as many at once as it has let wait
        if self.started:
            self.on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._captured_signals.clear()  # which would be raised again at the end


class Protocol(H11Protocol):
    """Uvicorn's, with deadlines for whoever sends a request's head or takes an answer slowly.

    An app sees a request only once its head is complete, and an answer is off its hands before it is taken: only here is
    there a place to wait no longer.
    """

    def __init__(self, *args: Any, limits: Limits, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.limits = limits
        self._head: asyncio.TimerHandle | None = None
        self._taking: asyncio.TimerHandle | None = None
        self._answering: object = None
        self._until = 0.0
        self._untaken = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else 40 ms an answer
        transport.set_write_buffer_limits(high=0)  # pause_writing: as soon as anything is not taken
        self._watch_head()
        if len(self.connections) > self.limits.connections:
            self._say(503, shape("server", None, f"at most {self.limits.connections} connections; ask again"))

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head, self._taking):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def _watch_head(self) -> None:
        """Begin or end waiting for the rest of a head."""
        if self.conn.their_state is not h11.IDLE and self._head is not None:
            self._head.cancel()
            self._head = None
        elif self.conn.their_state is h11.IDLE and self._head is None:
            self._head = self.loop.call_later(self.limits.head_seconds, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._answering is not self.cycle:  # a file pauses for every part of it
            self._answering = self.cycle
            self._until = self.loop.time() + self.limits.write_seconds
        self._await_taking()

    def _await_taking(self) -> None:
        self._untaken = self.transport.get_write_buffer_size()
        soon = min(self._until, self.loop.time() + self.limits.stall_seconds)
        self._taking = self.loop.call_at(soon, self._check_taking)

    def _check_taking(self) -> None:
        if self.transport.get_write_buffer_size() >= self._untaken or self.loop.time() >= self._until:
            self.transport.abort()
        else:
            self._await_taking()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None

    def send_400_response(self, msg: str) -> None:
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()  # in the middle of an answer
        else:
            self._say(400, shape("request", None, "HTTP/1.1, and a head of at most 256 KB"))

    def _say(self, status: int, body: Any) -> None:
        """Answer without an app, and close."""
        data = to_json(body)
        fields = [
            *headers_of(),
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(data)),
            (b"connection", b"close"),
        ]
        head = b"".join(b"%s: %s\r\n" % field for field in fields)
        self.transport.write(b"HTTP/1.1 %d %s\r\n%s\r\n%s" % (status, STATUS_PHRASES[status], head, data))
        self.transport.close()
