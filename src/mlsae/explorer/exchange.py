"""One request read within its limits, one response sent within its own, with the headers and plain pages of every refusal."""

import asyncio
import html
import re
from dataclasses import dataclass
from http import HTTPStatus

from pydantic_core import to_json
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlsae.explorer.answers import RESPONSE_BYTES, RETRY_AFTER_SECONDS, Refused, error_of, navigates

METHODS = ("GET", "HEAD", "POST", "PUT")
PRINTED = "the one that 'mlsae explore' printed when it started"
TELLING = {
    401: [(b"www-authenticate", b"Bearer")],
    405: [(b"allow", ", ".join(METHODS).encode())],
    503: [(b"retry-after", b"%d" % RETRY_AFTER_SECONDS)],
}

PAGE = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    '<meta name="color-scheme" content="light dark"><title>{title}</title></head>'
    "<body><h1>{title}</h1><p>{text}</p>{form}</body></html>"
)
FORM = (
    '<form action="/signin"><input type="hidden" name="to" value="{to}"><p><label>Token <input name="token" size="48" '
    'autocomplete="off" autofocus required></label> <button>Sign in</button></p></form>'
    '<p>Signed in already? <a href="{to}">Go on</a></p>'
)


@dataclass(frozen=True)
class Limits:
    """What one client may cost."""

    head_bytes: int = 256 << 10
    """Of a request line and headers: a prompt of 64 KB takes up to 192 KB in a URL."""
    body_bytes: int = 256 << 10
    """Of a request's body as it arrives."""
    response_bytes: int = RESPONSE_BYTES
    """Of an answer, but for files of the package."""
    connections: int = 2048
    """Open at once."""
    head_seconds: float = 10.0
    """Until a request's head is complete."""
    receive_seconds: float = 10.0
    """Until its body is."""
    write_seconds: float = 30.0
    """Until an answer is taken."""
    stall_seconds: float = 7.0
    """Without any of it being taken."""
    idle_seconds: float = 10.0
    """Between two requests on one connection."""


LIMITS = Limits()


# ---- in --------------------------------------------------------------------------------------------------------------


def header(scope: Scope, name: bytes) -> bytes | None:
    """A header's value; of one that is there twice both, which together equal nothing that is allowed."""
    values = [value for key, value in scope["headers"] if key == name]
    return b"\n".join(values) if values else None


def value_of(scope: Scope, name: bytes) -> bytes:
    """The same; empty if there is none."""
    value = header(scope, name)
    return b"" if value is None else value


def text_of(value: bytes | None) -> str | None:
    """A header's value to show."""
    return None if value is None else value.decode("latin-1")


async def read_body(scope: Scope, receive: Receive, limits: Limits) -> bytes | None:
    """The whole body, read up to its limits; None if the client has left."""
    limit, body = limits.body_bytes, bytearray()
    if (encoding := header(scope, b"content-encoding")) is not None:
        raise Refused(415, "Content-Encoding", text_of(encoding), "none")
    declared = header(scope, b"content-length")
    too_long = declared is not None and not (declared.isdigit() and len(declared) < 16 and int(declared) <= limit)
    try:
        async with asyncio.timeout(limits.receive_seconds):
            while not too_long and (message := await receive())["type"] == "http.request":
                body += message.get("body", b"")
                too_long = len(body) > limit
                if not (too_long or message.get("more_body", False)):
                    return bytes(body)
    except TimeoutError:
        raise Refused(408, "body", None, f"complete within {limits.receive_seconds:g} seconds") from None
    if too_long:
        raise Refused(413, "body", None, f"at most {limit:,} bytes")
    return None


# ---- out -------------------------------------------------------------------------------------------------------------


def headers_of(style_hash: str = "") -> list[tuple[bytes, bytes]]:
    """What every response carries; `style_hash` (`sha256-...`) admits the one inline style sheet that figures bring."""
    style = f"'self' '{style_hash}'" if style_hash else "'self'"
    policy = (
        f"default-src 'none'; script-src 'self'; style-src {style}; connect-src 'self'; img-src 'self' data:; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
    )
    return [
        (b"content-security-policy", policy.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"cross-origin-resource-policy", b"same-origin"),
        (b"cross-origin-opener-policy", b"same-origin"),
    ]


class Reply:
    """The `send` of one request. A file of the package may be of any size and be kept, if asked again whether it changed."""

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]], limit: int, *, is_file: bool = False):
        self.begun = False
        self.complete = False
        self.too_long = False
        self._send, self._headers, self._is_file = send, headers, is_file
        self._names = {name for name, _ in headers}
        self._left = limit
        self._start: Message | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message  # goes with the first part of the body, which shows whether it is too long
            return
        self._left -= len(message.get("body", b""))
        self.too_long |= self._left < 0 and not self._is_file
        if self.too_long:
            return
        if self._start is not None:
            self.begun = True
            await self._send({**self._start, "headers": self._checked(self._start.get("headers", ()))})
            self._start = None
        self.complete = not message.get("more_body", False)
        await self._send(message)

    def _checked(self, given: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Ours, and those of the app's that do not contradict them: no other origin is ever let in."""
        kept = [(key, value) for key, value in given if key.lower() not in self._names]
        kept = [(key, value) for key, value in kept if not key.lower().startswith(b"access-control-")]
        cached = any(key.lower() == b"cache-control" for key, _ in kept)
        caching = [] if cached else [(b"cache-control", b"no-cache" if self._is_file else b"no-store")]
        return [*self._headers, *caching, *kept]

    async def answer(self, status: int, kind: bytes, body: bytes, *more: tuple[bytes, bytes]) -> None:
        """A whole response; of an app's that has not begun, nothing remains."""
        self._left, self.too_long = len(body), False
        headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *more]
        await self({"type": "http.response.start", "status": status, "headers": headers})
        await self({"type": "http.response.body", "body": body})

    async def redirect(self, place: bytes, cookie: bytes) -> None:
        """To another page of the explorer, with a cookie unless it is empty."""
        await self.answer(303, b"text/plain", b"", (b"location", place), *([(b"set-cookie", cookie)] if cookie else []))

    async def page(self, status: int, title: str, text: str, *more: tuple[bytes, bytes], form_to: str = "") -> None:
        """A plain page of one sentence; with `form_to`, a form for the token, after which that place is shown."""
        place = form_to if re.fullmatch(r"/(?![/\\])[!-~]*", form_to) else "/"  # //host would be another site
        form = FORM.format(to=html.escape(place)) if form_to else ""
        body = PAGE.format(title=html.escape(title), text=html.escape(text), form=form).encode()
        await self.answer(status, b"text/html; charset=utf-8", body, *more)


async def run(app: ASGIApp, scope: Scope, body: bytes, receive: Receive, reply: Reply) -> None:
    """Run an app on a request that has been read; a client that leaves cancels it."""
    gone = asyncio.Event()
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replay() -> Message:
        for message in messages:
            return message
        await gone.wait()
        return {"type": "http.disconnect"}

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()
        if not reply.complete:
            work.cancel()

    work = asyncio.ensure_future(app(scope, replay, reply))
    watching = asyncio.ensure_future(watch())
    try:
        await asyncio.wait([work])
    finally:
        watching.cancel()
        work.cancel()
    if not work.cancelled():
        work.result()
    elif not gone.is_set():
        raise Refused(503, "server", None, "ask again; this request was cancelled")


async def refuse(scope: Scope, error: Exception, reply: Reply) -> None:
    """The error's one shape, or a page for a person; what the app has begun is cut short."""
    if reply.begun:
        return
    status, body = error_of(error)
    more = [(b"connection", b"close"), *TELLING.get(status, [])]  # the rest of a body is not read
    if not navigates(scope):
        await reply.answer(status, b"application/json", to_json(body), *more)
    elif status == HTTPStatus.UNAUTHORIZED:
        asked = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        await reply.page(
            status, "Sign in", f"This page needs the token, {PRINTED}.", *more, form_to=asked.decode("latin-1")
        )
    else:
        fault = body["error"]
        text = f"{fault['field']}: {fault['given'] or 'refused'}; allowed: {fault['allowed']}"
        await reply.page(status, HTTPStatus(status).phrase, text, *more)
