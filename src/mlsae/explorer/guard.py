"""The one middleware: what reaches a route. It denies by default, before any handler runs.

A loopback address is no boundary: any page in the user's browser can send requests to it, and cookies are shared by every port
of a host.
"""

import logging
import re
from collections.abc import Iterable
from hmac import compare_digest
from urllib.parse import parse_qs

from starlette.types import ASGIApp, Receive, Scope, Send

from mlsae.explorer.answers import Refused
from mlsae.explorer.exchange import (
    LIMITS,
    METHODS,
    PRINTED,
    Limits,
    Reply,
    header,
    headers_of,
    read_body,
    refuse,
    run,
    text_of,
    value_of,
)

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

log = logging.getLogger(__name__)


class Guard:
    """An ASGI app around another one. `hosts` are names allowed beside those of loopback."""

    def __init__(
        self, app: ASGIApp, token: str, *, hosts: Iterable[str] = (), style_hash: str = "", limits: Limits = LIMITS
    ):
        self.app = app
        self.headers = headers_of(style_hash)
        self._limits = limits
        self._token = token.encode()
        self._names = (*LOOPBACK, *hosts)
        self._host = re.compile(rf"(?:{'|'.join(map(re.escape, self._names))})(?::[0-9]{{1,5}})?".encode(), re.I)
        self._tickets = {self._token: True}

    def add_ticket(self, ticket: str) -> None:
        """One more secret that signs in once as `?token=`, as the printed one does."""
        self._tickets[ticket.encode()] = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            is_file = scope["path"].startswith("/static")
            reply = Reply(send, self.headers, self._limits.response_bytes, is_file=is_file)
            try:
                await self._let_in(scope, receive, reply)
            except Refused as refused:
                await refuse(scope, refused, reply)
            except Exception as error:  # the outermost frame
                log.exception("%s %s", scope["method"], scope["path"].encode("unicode_escape").decode())
                await refuse(scope, error, reply)

    async def _let_in(self, scope: Scope, receive: Receive, reply: Reply) -> None:
        self._check_sender(scope)
        if scope["path"] == "/signin":
            await self._sign_in(scope, reply)
            return
        if scope["path"] != "/health":
            if (place := self._used_ticket(scope)) is not None:
                await reply.redirect(*place)
                return
            self._check_token(scope)
            self._check_change(scope)
        if (body := await read_body(scope, receive, self._limits)) is not None:
            await run(self.app, scope, body, receive, reply)
        if reply.too_long:
            raise Refused(422, "answer", None, f"at most {self._limits.response_bytes:,} bytes; ask for less")

    def _check_sender(self, scope: Scope) -> None:
        """Host, then Origin and Sec-Fetch-Site, then the method."""
        host, origin, site = (header(scope, name) for name in (b"host", b"origin", b"sec-fetch-site"))
        if host is None or not self._host.fullmatch(host):
            raise Refused(421, "Host", text_of(host), f"{', '.join(self._names)}; --allow-host adds a name")
        if origin is not None and origin.lower() != _home(scope).lower():
            raise Refused(403, "Origin", text_of(origin), "the explorer's own pages")
        followed = scope["method"] == "GET" and header(scope, b"sec-fetch-dest") == b"document"
        if site not in (None, b"same-origin", b"none", *((b"same-site", b"cross-site") if followed else ())):
            raise Refused(403, "Sec-Fetch-Site", text_of(site), "same-origin, or a link that is followed")
        if scope["method"] not in METHODS:
            raise Refused(405, "method", scope["method"], ", ".join(METHODS))
        if not scope["path"].startswith("/"):
            raise Refused(400, "path", scope["path"], "a path that begins with /")

    def _check_token(self, scope: Scope) -> None:
        bearer = header(scope, b"authorization")
        if bearer is not None:
            kind, _, given = bearer.partition(b" ")
            known = kind.lower() == b"bearer" and compare_digest(given, self._token)
        else:
            mine = _cookie_name(scope) + b"=" + self._token
            cookies = re.split(rb"[;\n] *", value_of(scope, b"cookie"))
            known = any(compare_digest(cookie, mine) for cookie in cookies)
        if not known:
            raise Refused(401, "token", None, PRINTED)

    def _check_change(self, scope: Scope) -> None:
        """Against forged changes: JSON, and from our own page or from a script that a browser lent no cookie."""
        if scope["method"] in ("GET", "HEAD"):
            return
        own = header(scope, b"origin") is not None or header(scope, b"sec-fetch-site") == b"same-origin"
        script = header(scope, b"authorization") is not None and header(scope, b"cookie") is None
        if not (own or script):
            raise Refused(403, "Origin", None, "the explorer's own pages; scripts send a Bearer token and no cookie")
        if (kind := header(scope, b"content-type")) != b"application/json":
            raise Refused(415, "Content-Type", text_of(kind), "application/json")

    def _used_ticket(self, scope: Scope) -> tuple[bytes, bytes] | None:
        """Where to go and the cookie, once the secret in the URL has signed in; used up, it only leaves the URL."""
        pairs = scope["query_string"].split(b"&")
        given = [pair.removeprefix(b"token=") for pair in pairs if pair.startswith(b"token=")]
        ticket = next((known for known in self._tickets for one in given if compare_digest(one, known)), None)
        if ticket is None or scope["method"] != "GET":
            return None
        fresh, self._tickets[ticket] = self._tickets[ticket], False
        if not fresh:
            self._check_token(scope)
        kept = b"&".join(pair for pair in pairs if pair != b"token=" + ticket)
        return _home(scope) + scope["raw_path"] + (b"?" + kept if kept else b""), self._cookie(scope) if fresh else b""

    async def _sign_in(self, scope: Scope, reply: Reply) -> None:
        if scope["method"] != "GET":
            raise Refused(405, "method", scope["method"], "GET")
        fields = {key: values[-1] for key, values in parse_qs(scope["query_string"].decode("latin-1")).items()}
        to = place if re.fullmatch("/[!-~]*", place := fields.get("to", "/")) else "/"
        if "token" not in fields:
            await reply.page(200, "Sign in", f"Give the token, {PRINTED}.", form_to=to)
        elif not compare_digest(fields["token"].strip().encode(), self._token):
            await reply.page(401, "Sign in", f"That is not the token, {PRINTED}.", form_to=to)
        else:
            await reply.redirect(_home(scope) + to.encode(), self._cookie(scope))

    def _cookie(self, scope: Scope) -> bytes:
        return _cookie_name(scope) + b"=" + self._token + b"; HttpOnly; SameSite=Strict; Path=/"


def _home(scope: Scope) -> bytes:
    """The origin of our own pages, as this client calls us."""
    return scope["scheme"].encode() + b"://" + value_of(scope, b"host")


def _cookie_name(scope: Scope) -> bytes:
    """Cookies are shared by every port of a host: the name has the port that the browser sees, so that two explorers coexist."""
    port = re.search(rb":([0-9]+)$", value_of(scope, b"host"))
    return b"mlsae-" + (port[1] if port else b"80")
