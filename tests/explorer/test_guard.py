"""The guard: who is let in, what a request may hold, and what every response carries; on every route that an app has."""

import asyncio
import gzip
import logging
import re
import time
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path

import pytest

from explorer.sites import (
    BAD_HOSTS,
    BAD_ORIGINS,
    BEARER,
    COOKIE,
    GOOD_HOSTS,
    HOME,
    HOST,
    JSON,
    TOKEN,
    Answer,
    Ask,
    Guarded,
    forgeries,
    one_bit_off,
    requests_of,
    small_site,
)
from mlsae.explorer.exchange import Limits

OPEN = ("/health", "/signin")
"""What needs no token."""


@pytest.fixture
def small(tmp_path: Path) -> Guarded:
    return Guarded(small_site(tmp_path / "static"))


@pytest.fixture
def guarded_app(small: Guarded) -> Guarded:
    """The app whose every route is attacked."""
    return small


def refused(answer: Answer) -> bool:
    """Before any handler, in the one shape, and with the connection closed."""
    shape = re.fullmatch(rb'\{"error":\{"field":"[^"]+","given":(null|".*"),"allowed":".+"\}\}', answer.body)
    return not answer.passed and shape is not None and answer.header("connection") == "close"


# ---- E1, E2: names and origins ---------------------------------------------------------------------------------------


def test_every_route_is_found(small: Guarded):
    """What a framework adds by itself is not forgotten."""
    found = requests_of(small.app)
    assert {("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/static/page.css")} <= set(found)
    assert {("PUT", "/latents/3/note"), ("POST", "/steer.json"), ("GET", "/latents/3.json")} <= set(found)


def test_every_route_is_refused_under_every_other_name(guarded_app: Guarded):
    routes = requests_of(guarded_app.app)
    assert {"/static/page.css", "/health", "/signin"} <= {path for _, path in routes}
    asks = [
        Ask(method, path, [*(("host", host) for host in hosts), BEARER, *origin])
        for method, path in routes
        for hosts in BAD_HOSTS
        for origin in ([], [("origin", f"http://{hosts[0]}" if hosts else HOME)])
    ]
    assert len(BAD_HOSTS) >= 16
    for ask, answer in zip(asks, guarded_app.ask(asks), strict=True):
        assert (answer.status, refused(answer)) == (421, True), ask
    assert guarded_app.passed == []


def test_every_route_is_reached_under_the_three_names_with_any_port(guarded_app: Guarded):
    for host in GOOD_HOSTS:
        for method, path in requests_of(guarded_app.app):
            for origin in ([], [("origin", f"http://{host}")]):
                answer = guarded_app.one(method, path, ("host", host), BEARER, JSON, *origin)
                assert answer.passed or path == "/signin", (host, method, path)
                assert answer.status not in (401, 403, 421), (host, method, path)


def test_a_name_that_was_allowed_is_one_more_and_no_pattern(tmp_path: Path):
    app = Guarded(small_site(tmp_path / "static"), hosts=["lab.example.org", "[fe80::1]"])
    for host, status in [
        ("lab.example.org:8001", 200),
        ("LAB.example.org", 200),
        ("[fe80::1]:80", 200),
        ("localhost", 200),
        ("labxexample.org", 421),
        ("x.lab.example.org", 421),
    ]:
        assert app.one("GET", "/overview", ("host", host), BEARER).status == status


def test_no_other_origin_is_let_in_or_told_that_it_might_be(guarded_app: Guarded):
    asks = []
    for method, path in requests_of(guarded_app.app):
        for origin in BAD_ORIGINS:
            simple = [("host", HOST), BEARER, ("origin", origin)]
            preflight = [("host", HOST), ("origin", origin), ("access-control-request-method", method)]
            asks += [
                Ask(method, path, simple),
                Ask(method, path, [*simple, ("sec-fetch-dest", "document")]),
                Ask("OPTIONS", path, preflight),
            ]
    for ask, answer in zip(asks, guarded_app.ask(asks), strict=True):
        assert answer.status == 403, ask
        assert not [key for key, _ in answer.headers if key.startswith("access-control")], ask
    assert guarded_app.passed == []


def test_a_preflight_without_an_origin_and_unknown_methods_are_refused(guarded_app: Guarded):
    for method in ("OPTIONS", "TRACE", "CONNECT", "DELETE", "PATCH", "get", "PROPFIND"):
        answer = guarded_app.one(method, "/overview", BEARER)
        assert (answer.status, refused(answer)) == (405, True)
        assert answer.header("allow") == "GET, HEAD, POST, PUT"


def test_what_an_app_says_to_other_origins_is_not_sent():
    async def lax(scope, receive, send):
        headers = [(b"Access-Control-Allow-Origin", b"*"), (b"content-security-policy", b"default-src *"), (b"x", b"y")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"."})

    answer = Guarded(lax).one("GET", "/overview", BEARER)  # ty: ignore[invalid-argument-type]
    assert "access-control-allow-origin" not in dict(answer.headers)
    (policy,) = [value for key, value in answer.headers if key == "content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert answer.header("x") == "y"


@pytest.mark.parametrize(
    ("site", "dest", "method", "status"),
    [
        ("cross-site", "document", "GET", 200),  # a link that is followed
        ("same-site", "document", "GET", 200),
        ("cross-site", "document", "HEAD", 403),
        ("cross-site", "iframe", "GET", 403),
        ("same-site", "image", "GET", 403),
        ("cross-site", "empty", "GET", 403),
        ("same-site", "script", "GET", 403),
        ("cross-site", "", "GET", 403),
        ("no-such-site", "document", "GET", 403),
        ("same-origin", "empty", "GET", 200),
        ("none", "document", "GET", 200),
    ],
)
def test_another_site_may_only_link_here(small: Guarded, site: str, dest: str, method: str, status: int):
    answer = small.one(method, "/overview", BEARER, ("sec-fetch-site", site), ("sec-fetch-dest", dest))
    assert answer.status == status
    assert answer.passed == (status == 200)


# ---- E3: forged changes ----------------------------------------------------------------------------------------------


def test_only_our_own_pages_and_scripts_with_the_token_change_anything(small: Guarded):
    cases = forgeries()
    assert len(cases) >= 40
    for method, path in (("POST", "/steer.json"), ("PUT", "/latents/3/note")):
        for status, headers in cases:
            answer = small.one(method, path, *headers, body=b'{"text": "a"}')
            assert answer.status == status, headers
            assert answer.passed == (status == 200), headers


# ---- E4: the token ---------------------------------------------------------------------------------------------------


def test_nothing_but_health_and_sign_in_answers_without_the_token(guarded_app: Guarded):
    for method, path in requests_of(guarded_app.app):
        answer = guarded_app.one(method, path, JSON, ("origin", HOME))
        assert (path in OPEN) == (answer.status != 401), (method, path)
        assert path in OPEN or refused(answer)
    assert set(guarded_app.passed) <= set(OPEN)
    for near in ("/health/", "/Health", "/health/../overview", "/signin/", "//signin", "/static/../health"):
        assert guarded_app.one("GET", near).status == 401, near


WRONG = ["", TOKEN[:-1], TOKEN + "k", TOKEN.upper(), TOKEN[::-1], "\xff", f"{TOKEN} x", *one_bit_off(TOKEN)]


@pytest.mark.parametrize("token", WRONG)
def test_a_token_that_is_nearly_right_is_wrong(small: Guarded, token: str):
    for way in [
        [("authorization", f"Bearer {token}")],
        [("cookie", f"mlsae-8001={token}")],
        [("cookie", f"mlsae-8001={token}"), ("authorization", f"Bearer {token}")],
    ]:
        answer = small.one("GET", "/overview", *way)
        assert (answer.status, refused(answer), answer.header("www-authenticate")) == (401, True, "Bearer")
    assert small.one("GET", f"/overview?token={token.encode('ascii', 'ignore').decode()}").status == 401
    assert small.passed == []


def test_the_cookie_of_another_port_is_not_ours_and_junk_beside_ours_is_no_matter(small: Guarded):
    for cookie, status in [
        (COOKIE, 200),
        (f"a=b; {COOKIE}; c", 200),
        (f"mlsae-8001=junk; {COOKIE}", 200),
        (f"mlsae-8002={TOKEN}", 401),
        (f"xmlsae-8001={TOKEN}", 401),
        (f'mlsae-8001="{TOKEN}"', 401),
        (TOKEN, 401),
    ]:
        assert small.one("GET", "/overview", ("cookie", cookie)).status == status, cookie


def test_the_url_signs_in_once_and_its_token_leaves_the_url(guarded_app: Guarded):
    first = guarded_app.one("GET", f"/latents/3?layer=2&token={TOKEN}&token=cat")
    assert (first.status, first.passed) == (303, False)
    assert first.header("location") == f"{HOME}/latents/3?layer=2&token=cat"
    assert first.header("set-cookie") == f"{COOKIE}; HttpOnly; SameSite=Strict; Path=/"
    assert first.header("referrer-policy") == "no-referrer"
    assert guarded_app.one("GET", f"/latents/3?token={TOKEN}").status == 401  # whoever found the URL later
    mine = guarded_app.one("GET", f"/latents/3?token={TOKEN}", ("cookie", COOKIE))
    assert (mine.status, mine.header("location"), mine.header("set-cookie")) == (303, f"{HOME}/latents/3", None)


def test_looking_at_the_head_does_not_use_the_url_up(small: Guarded):
    assert small.one("HEAD", f"/overview?token={TOKEN}").status == 401
    assert small.one("POST", f"/overview?token={TOKEN}", JSON).status == 401
    assert small.one("GET", f"/overview?token={TOKEN}").status == 303


def test_a_word_searched_for_is_no_token(small: Guarded):
    answer = small.one("GET", "/search.json?token=cat", ("cookie", COOKIE))
    assert (answer.status, b'"token":"cat"' in answer.body) == (200, True)


def test_a_ticket_signs_in_once_and_leaves_the_printed_url_fresh(small: Guarded):
    small.guard.add_ticket("ticket")
    assert small.one("GET", "/?token=ticket").header("set-cookie") is not None
    assert small.one("GET", "/?token=ticket").status == 401
    assert small.one("GET", "/overview", ("authorization", "Bearer ticket")).status == 401
    assert small.one("GET", f"/?token={TOKEN}").status == 303


@pytest.mark.parametrize(
    ("to", "place"),
    [
        ("", "/"),
        ("&to=/latents/3%3Flayer%3D2", "/latents/3?layer=2"),
        ("&to=https://evil.example", "/"),
        ("&to=//evil.example/", "//evil.example/"),  # a path of ours: the whole address is sent
        ("&to=/%0d%0aset-cookie:a=b", "/"),
    ],
)
def test_signing_in_leads_to_a_page_of_ours(small: Guarded, to: str, place: str):
    for _ in range(2):  # as often as one likes
        answer = small.one("GET", f"/signin?token={TOKEN}{to}")
        assert (answer.status, answer.header("location")) == (303, HOME + place)
        assert answer.header("set-cookie") == f"{COOKIE}; HttpOnly; SameSite=Strict; Path=/"


class _Tags(HTMLParser):
    def __init__(self, page: bytes):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page.decode())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


@pytest.mark.parametrize("path", ['/latents/3?layer=2&x="><script>', "//evil.example/", "/\\evil.example", "/ü"])
def test_a_page_that_needs_the_token_asks_for_it_and_then_shows_itself(small: Guarded, path: str):
    answer = small.one("GET", path, ("sec-fetch-dest", "document"))
    assert (answer.status, answer.passed, answer.header("content-type")) == (401, False, "text/html; charset=utf-8")
    tags = _Tags(answer.body).tags
    assert [tag for tag, _ in tags if tag in ("form", "script")] == ["form"]
    places = {a["value"] for tag, a in tags if a.get("name") == "to"} | {a["href"] for tag, a in tags if tag == "a"}
    assert places == {path if path.startswith("/latents") else "/"}
    signed = small.one("GET", "/signin")
    assert (signed.status, b"<form" in signed.body) == (200, True)
    assert small.one("GET", "/signin?token=wrong").status == 401
    assert small.one("POST", "/signin?token=" + TOKEN, JSON).status == 405


def test_browsers_get_a_page_and_scripts_json(small: Guarded):
    page = [("sec-fetch-dest", "document")], [("accept", "text/html,*/*")]
    for headers in page:
        answer = small.one("GET", "/overview", ("host", 'e<b>"'), *headers)
        assert (answer.status, answer.header("content-type")) == (421, "text/html; charset=utf-8")
        assert b"e&lt;b&gt;" in answer.body
    for headers in ([], [("sec-fetch-dest", "empty"), ("accept", "text/html")]):
        assert refused(small.one("GET", "/overview", *headers))


def test_the_token_is_in_no_log(small: Guarded, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    small.one("GET", f"/overview?token={TOKEN}")
    small.one("GET", f"/signin?token={TOKEN}")
    small.one("POST", "/steer.json", BEARER, JSON, body=b"{")

    async def broken(scope, receive, send):
        raise RuntimeError("once")

    Guarded(broken).one("HEAD", f"/overview?token={TOKEN}", BEARER)  # ty: ignore[invalid-argument-type]
    assert "HEAD /overview" in caplog.text
    assert TOKEN not in caplog.text


# ---- E5: bodies ------------------------------------------------------------------------------------------------------

SIGNED = [("host", HOST), BEARER, JSON]
LIMIT = Limits().body_bytes


def steered(small: Guarded, *headers: tuple[str, str], body) -> Answer:
    return small.ask([Ask("POST", "/steer.json", [*SIGNED, *headers], body)])[0]


@pytest.mark.parametrize("path", ["/steer.json", "/health"])
@pytest.mark.parametrize("declared", [None, "10", str(10 << 20), str(1 << 30)])
def test_no_more_of_a_body_is_read_than_its_limit(small: Guarded, path: str, declared: str | None):
    headers = [*SIGNED, *([("content-length", declared)] if declared else [])]
    tracemalloc.start()
    started = time.perf_counter()
    answer = small.ask([Ask("POST", path, headers, (b"x" * (1 << 16) for _ in range(1 << 14)))])[0]
    seconds, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (answer.status, refused(answer)) == (413, True)
    assert answer.n_received <= (LIMIT + (1 << 16) if declared in (None, "10") else 0)
    assert peak < 4 << 20
    assert seconds < 1


@pytest.mark.parametrize(("size", "status"), [(LIMIT, 200), (LIMIT + 1, 413)])
def test_the_limit_itself_is_allowed(small: Guarded, size: int, status: int):
    body = b'{"text": "%s"}' % (b"a" * (size - 12))
    assert steered(small, body=[body[:100], body[100:]]).status == status


@pytest.mark.parametrize("length", ["-1", "1e9", "5\n5", "٣", "", "9" * 5000, "0x10"])
def test_a_length_that_is_none_is_refused(small: Guarded, length: str):
    length = length.encode().decode("latin-1")
    assert (answer := steered(small, ("content-length", length), body=[b"{}"])).status == 413, answer.body


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate", "identity", "", "gzip, identity"])
def test_coded_bodies_are_refused_unread(small: Guarded, coding: str):
    answer = steered(small, ("content-encoding", coding), body=[gzip.compress(b" " * (1 << 20))])
    assert (answer.status, refused(answer), answer.n_received) == (415, True, 0)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 10_000 + b"]" * 10_000,
        b'{"text":' * 10_000 + b"1" + b"}" * 10_000,
        b"{" + b",".join(b'"%d":0' % i for i in range(20_000)) + b"}",
    ],
)
def test_deep_and_wide_bodies_are_answered_at_once(small: Guarded, body: bytes):
    started = time.perf_counter()
    assert steered(small, body=[body]).status == 422
    assert time.perf_counter() - started < 1


def test_a_body_that_does_not_come_is_not_waited_for(tmp_path: Path):
    app = Guarded(small_site(tmp_path / "static"), limits=Limits(receive_seconds=0.05))

    async def asked() -> tuple[list, float]:
        sent = []

        async def receive():
            await asyncio.sleep(0.02)
            return {"type": "http.request", "body": b" ", "more_body": True}

        async def send(message):
            sent.append(message)

        headers = [(key.encode(), value.encode()) for key, value in SIGNED]
        common = {"type": "http", "method": "POST", "scheme": "http", "headers": headers, "query_string": b""}
        started = time.perf_counter()
        await app.guard({**common, "path": "/steer.json", "raw_path": b"/steer.json"}, receive, send)
        return sent, time.perf_counter() - started

    sent, seconds = asyncio.run(asked())
    assert (sent[0]["status"], app.passed) == (408, [])
    assert 0.05 <= seconds < 1


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_every_response_carries_the_headers(tmp_path: Path):
    app = Guarded(small_site(tmp_path / "static"), style_hash="sha256-abc=")
    policy = (
        "default-src 'none'; script-src 'self'; style-src 'self' 'sha256-abc='; connect-src 'self'; img-src 'self' data:; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
    )
    routes = [*requests_of(app.app), ("GET", "/no/such/page"), ("GET", "/long.json"), ("POST", "/overview")]
    for headers in ([BEARER, JSON], [("origin", "null")], [], [("host", "evil")]):
        for method, path in routes:
            answer = app.one(method, path, *headers)
            found = dict(answer.headers)
            assert len(found) == len(answer.headers), "a header twice"
            assert found["content-security-policy"] == policy
            assert found["x-content-type-options"] == "nosniff"
            assert found["referrer-policy"] == "no-referrer"
            assert found["cross-origin-resource-policy"] == "same-origin"
            assert found["cache-control"] == ("no-cache" if path.startswith("/static") else "no-store")


def test_an_answer_that_is_too_long_is_an_error_and_a_file_is_not(tmp_path: Path):
    app = Guarded(small_site(tmp_path / "static"))
    (tmp_path / "static" / "long.js").write_bytes(b" " * ((2 << 20) + 1))
    assert app.one("GET", "/heatmap.bin?stop=4096", BEARER).status == 200
    answer = app.one("GET", "/long.json", BEARER)
    assert (answer.status, answer.complete) == (422, True)
    assert b"at most 2,097,152 bytes" in answer.body
    assert len(app.one("GET", "/static/long.js", BEARER).body) == (2 << 20) + 1
    cut = app.one("GET", "/endless", BEARER)  # had begun: cut short, which a client sees by the missing end
    assert (cut.status, cut.complete, len(cut.body)) == (200, False, 2 << 20)


def test_a_bug_is_logged_and_answered_without_a_word_of_it(caplog: pytest.LogCaptureFixture):
    async def broken(scope, receive, send):
        raise RuntimeError("/home/me/secret.py")

    answer = Guarded(broken).one("GET", "/overview", BEARER)  # ty: ignore[invalid-argument-type]
    assert (answer.status, answer.complete) == (500, True)
    assert b"secret" not in answer.body
    assert "secret" in caplog.text


def leaving(seconds: float, app) -> tuple[list, int]:
    """What is sent to a client that leaves after a time, and how many tasks are left."""
    guarded = Guarded(app)

    async def asked() -> tuple[list, int]:
        messages = iter([{"type": "http.request", "body": b"", "more_body": False}])
        sent = []

        async def receive():
            for message in messages:
                return message
            await asyncio.sleep(seconds)
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        headers = [(key.encode(), value.encode()) for key, value in SIGNED]
        common = {"type": "http", "method": "GET", "scheme": "http", "headers": headers, "query_string": b""}
        await guarded.guard({**common, "path": "/overview", "raw_path": b"/overview"}, receive, send)
        await asyncio.sleep(0.01)
        return sent, len(asyncio.all_tasks()) - 1

    return asyncio.run(asked())


def test_work_for_a_client_that_leaves_is_cancelled():
    ended = []

    async def slow(scope, receive, send):
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    assert leaving(0.02, slow) == ([], 0)
    assert ended == [True]


def test_work_after_a_whole_answer_is_not_cancelled():
    ended = []

    async def lingering(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"."})
        await asyncio.sleep(0.1)
        ended.append(True)

    sent, left = leaving(0.02, lingering)
    assert (len(sent), left, ended) == (2, 0, [True])


def test_nobody_waits_for_a_client_that_stays():
    async def quick(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"."})

    sent, left = leaving(60, quick)
    assert (len(sent), left) == (2, 0)


def test_an_app_sees_the_body_once_and_then_that_the_client_left():
    seen = []

    async def reader(scope, receive, send):
        seen.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"."})
        seen.append(await receive())

    leaving(0.02, reader)
    assert [message["type"] for message in seen] == ["http.request", "http.disconnect"]


def test_only_http_passes(small: Guarded):
    async def asked() -> list:
        sent = []

        async def send(message):
            sent.append(message)

        await small.guard({"type": "websocket", "path": "/overview", "headers": []}, asyncio.sleep, send)
        return sent

    assert (asyncio.run(asked()), small.passed) == ([], [])
