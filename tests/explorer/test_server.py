"""The server: where it listens, deadlines for slow clients, malformed HTTP, and a clean end."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from explorer.sites import TOKEN, exchange, small_site
from mlsae.errors import ConfigError, ResourceError
from mlsae.explorer import server
from mlsae.explorer.exchange import Limits
from mlsae.explorer.server import Place, Running, serve, start

SHORT = Limits(head_seconds=0.6, receive_seconds=0.6, write_seconds=3.0, stall_seconds=0.6, idle_seconds=0.6)
NO_OFFENCE = re.compile(rb"Traceback|File \"|/home/|/work/|/tmp/|site-packages|\.py\b")
"""What no answer may hold."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The small site behind real sockets, with deadlines of half a second."""
    with start(lambda: small_site(tmp_path_factory.mktemp("site") / "static"), limits=SHORT) as running:
        yield running


def bearer(running: Running) -> dict[str, str]:
    return {"authorization": f"Bearer {running.token}"}


# ---- where it listens ------------------------------------------------------------------------------------------------


def listening_addresses(port: int) -> set[str]:
    """Local addresses on which this machine accepts connections to a port, as the kernel writes them."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and int(row[1].partition(":")[2], 16) == port}


def test_only_loopback_listens(running: Running):
    assert listening_addresses(running.port) == {"0100007F"}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "lab.example.org", "127.0.0.2", ""])
def test_other_addresses_are_refused_before_anything_is_made(host: str):
    with pytest.raises(ConfigError, match=r"host: .*--allow-remote"):
        start(lambda: pytest.fail("made"), Place(host=host, port=0))


def test_an_address_that_is_allowed_keeps_the_token_and_warns(tmp_path: Path):
    place = Place("0.0.0.0", 0, allow_remote=True, allow_hosts=("lab.example.org",))
    with start(lambda: small_site(tmp_path / "static"), place) as running:
        assert listening_addresses(running.port) == {"00000000"}
        for host, status in (("lab.example.org", 200), ("0.0.0.0", 421), ("evil.example", 421)):
            named = {"host": f"{host}:{running.port}"}
            assert httpx.get(running.url + "/overview", headers=bearer(running) | named).status_code == status
            assert httpx.get(running.url + "/overview", headers=named).status_code in (401, 421)
    words = server._words(place, running.url, TOKEN)
    assert len(words) == 2
    assert "other machines" in words[1]
    assert len(server._words(Place(), running.url, TOKEN)) == 1


@pytest.mark.parametrize("name", ["http://lab", "lab:80", "a b", "*", "", "lab/x", "lab\n"])
def test_a_name_to_allow_is_a_name(name: str):
    with pytest.raises(ConfigError, match="allow_host"):
        start(lambda: pytest.fail("made"), Place(port=0, allow_hosts=(name,)))


def test_a_port_in_use_is_said_before_anything_is_made(running: Running):
    with pytest.raises(ResourceError, match=rf"^port: {running.port} is in use; try --port 0$") as caught:
        start(lambda: pytest.fail("made"), Place(port=running.port))
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("port", [-1, 65536, 10**9])
def test_a_port_is_a_port(port: int):
    with pytest.raises(ConfigError, match=f"port: {port}; 0"):
        start(lambda: pytest.fail("made"), Place(port=port))


def test_an_address_of_another_machine_is_said():
    for host in ("203.0.113.7", "no-such-name.invalid"):
        with pytest.raises(ConfigError, match=f"host: '{host}' is no address of this machine"):
            start(lambda: pytest.fail("made"), Place(host, 0, allow_remote=True))


def test_the_port_is_free_again_when_making_fails():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]

    def fails():
        raise ValueError("no SAE")

    for _ in range(2):
        with pytest.raises(ValueError, match="no SAE"):
            start(fails, Place(port=port))


def test_every_launch_has_a_token_of_256_bits_of_its_own(tmp_path: Path):
    tokens = set()
    for _ in range(3):
        with start(lambda: small_site(tmp_path / "static")) as running:
            tokens.add(running.token)
    assert len(tokens) == 3
    assert all(re.fullmatch(r"[\w-]{43}", token) for token in tokens)


def test_a_thread_and_its_socket_end_with_it(tmp_path: Path):
    before = threading.active_count()
    with start(lambda: small_site(tmp_path / "static")) as running:
        assert httpx.get(running.url + "/health").json() == {"ok": True}
    assert threading.active_count() == before
    assert listening_addresses(running.port) == set()


# ---- a process -------------------------------------------------------------------------------------------------------

PROGRAM = """
import importlib.util, sys, types, webbrowser
from pathlib import Path
pages = sys.modules["mlsae.explorer"] = types.ModuleType("mlsae.explorer")  # whose own imports take seconds
pages.__path__ = [str(Path(importlib.util.find_spec("mlsae").origin).with_name("explorer"))]
from explorer.sites import small_site
from mlsae.explorer.server import Place, serve
from mlsae.stopping import interruptible
webbrowser.open = lambda url: print("opened", url, flush=True)
with interruptible("explore"):
    serve(lambda: small_site(Path(sys.argv[1])), Place(port=0), open_browser=True, tell=lambda line: print(line, flush=True))
print("done", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_at_once_and_well(tmp_path: Path, number: int):
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "static")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process, contextlib.ExitStack() as ending:
        ending.callback(process.kill)
        assert process.stdout is not None
        lines = sorted(process.stdout.readline().strip() for _ in range(2))
        url = re.fullmatch(r"(http://127\.0\.0\.1:\d+)/\?token=([\w-]{43})", lines[0])
        opened = re.fullmatch(r"opened (\S+)/\?token=([\w-]{43})", lines[1])
        assert url is not None
        assert opened is not None
        assert url[1] == opened[1]
        assert url[2] != opened[2], "the browser's arguments show the token"
        for place in (opened[0].split()[1], url[0]):
            with httpx.Client() as client:
                assert client.get(place).status_code == 303
                assert client.get(url[1] + "/overview").status_code == 200
        with httpx.Client(headers={"authorization": f"Bearer {url[2]}"}, base_url=url[1]) as client:
            client.get("/overview")  # a connection that stays open
            started = time.perf_counter()
            process.send_signal(number)
            rest, errors = process.communicate(timeout=10)
    assert (process.returncode, rest, errors) == (0, "done\n", "")
    assert time.perf_counter() - started < 3


def test_serving_tells_nothing_when_the_port_is_taken(running: Running):
    with pytest.raises(ResourceError, match="in use"):
        serve(lambda: pytest.fail("made"), Place(port=running.port), tell=lambda line: pytest.fail(line))


# ---- what goes over the wire -----------------------------------------------------------------------------------------


def test_an_answer_says_nothing_about_the_server(running: Running):
    answer = httpx.get(running.url + "/health")
    assert not {"server", "date", "x-powered-by"} & set(answer.headers)
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"


def test_answers_are_not_held_back(running: Running):
    """40 ms an answer, where Nagle's algorithm meets delayed acknowledgements."""
    with httpx.Client(base_url=running.url) as client:
        client.get("/health")
        seconds = []
        for _ in range(21):
            started = time.perf_counter()
            client.get("/health")
            seconds.append(time.perf_counter() - started)
    assert sorted(seconds)[10] < 0.03


def test_no_name_two_names_and_whole_urls_are_refused(running: Running):
    token = running.token.encode()
    for head in (
        b"GET /overview HTTP/1.1\r\n",
        b"GET /overview HTTP/1.0\r\n",
        b"GET /overview HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n",
        b"GET http://localhost/overview HTTP/1.1\r\nHost: evil.example\r\n",
        b"GET http://evil.example/overview HTTP/1.1\r\nHost: localhost\r\n",
        b"GET overview HTTP/1.1\r\nHost: localhost\r\n",
        b"GET @evil.example/?token=%s HTTP/1.1\r\nHost: localhost\r\n" % token,
    ):
        answer = exchange(running.port, head + b"Authorization: Bearer %s\r\n\r\n" % token)
        assert re.match(rb"HTTP/1.1 (400|421) ", answer), (head, answer)


def test_a_long_prompt_fits_into_a_url_and_more_does_not(running: Running):
    text = "€" * 21_333  # 64 KB, and three times that in a URL
    ask = f"GET /prompt.json?text={quote(text)} HTTP/1.0\r\nHost: localhost\r\nAuthorization: Bearer {running.token}\r\n\r\n"
    assert json.loads(exchange(running.port, ask.encode()).partition(b"\r\n\r\n")[2]) == {"text": text}
    assert exchange(running.port, b"GET /" + b"a" * (300 << 10)).startswith(b"HTTP/1.1 400 ")


def rss() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


POST = "POST /steer.json HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize("way", ["declared", "chunked", "declared too short"])
def test_a_gigabyte_is_not_read(running: Running, way: str):
    sent, before = 0, rss()
    head = {
        "declared": f"Content-Length: {1 << 30}\r\n\r\n",
        "chunked": "Transfer-Encoding: chunked\r\n\r\n",
        "declared too short": "Content-Length: 100\r\n\r\n",
    }[way]
    part = b" " * (1 << 16)

    def body() -> Iterator[bytes]:
        nonlocal sent
        yield (POST.format(running.token) + head).encode()
        for _ in range(1 << 14):
            sent += len(part)
            yield b"10000\r\n%s\r\n" % part if way == "chunked" else part

    started = time.perf_counter()
    answer = exchange(running.port, body())
    status = {"declared": 413, "chunked": 413, "declared too short": 422}[way]
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert time.perf_counter() - started < 2
    assert sent < 64 << 20, "what is in the kernel's buffers, not a gigabyte"
    assert rss() - before < 32 << 20


def malformed(seed: int) -> bytes:
    """A request that is well formed but for some bytes, or not at all."""
    draw = random.Random(seed)
    good = [
        b"GET /overview HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\n\r\n",
        b"GET /latents/3.json?layer=2 HTTP/1.1\r\nHost: localhost\r\nCookie: mlsae-80={}\r\n\r\n",
        b"GET /static/page.css HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\nRange: bytes=0-3\r\n\r\n",
        POST.encode() + b'Content-Length: 13\r\n\r\n{"text": "a"}',
        POST.encode() + b'Transfer-Encoding: chunked\r\n\r\nd\r\n{"text": "a"}\r\n0\r\n\r\n',
    ]
    request = bytearray(draw.choice(good).replace(b"{}", b"TOKEN"))
    pieces = [
        b"\x00",
        b"\r",
        b"\n",
        b"\r\n\r\n",
        b"\xff\xfe",
        b"%00",
        b"%ff",
        b"../",
        b"//",
        b":",
        b" ",
        b"\t",
        b"HTTP/9.9",
        b";",
    ]
    pieces += [
        b"Content-Length: 5\r\n",
        b"Transfer-Encoding: gzip\r\n",
        b"Expect: 100-continue\r\n",
        b"Upgrade: websocket\r\n",
    ]
    pieces += [
        b"Connection: upgrade\r\n",
        b"Host: x\r\n",
        b"Range: bytes=" + b"0-0," * 500 + b"1-1\r\n",
        b"ffffffffffffffff",
        b"-1",
    ]
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(request) + 1)
        kind = draw.randrange(4)
        if kind == 0:
            request[at:at] = draw.choice(pieces)
        elif kind == 1:
            del request[at : at + draw.randint(1, 9)]
        elif kind == 2 and at < len(request):
            request[at] ^= 1 << draw.randrange(8)
        else:
            line = bytes(request).find(b"\r\n", at)  # a header of its own where a line ends
            request[line + 2 : line + 2] = draw.choice(pieces)
    return bytes(request)


def fuzz(running: Running, seeds: range) -> None:
    def attack(seed: int) -> tuple[int, bytes, bytes]:
        request = malformed(seed).replace(b"TOKEN", running.token.encode())
        return seed, request, exchange(running.port, request, seconds=5)

    with ThreadPoolExecutor(32) as pool:
        for seed, request, answer in pool.map(attack, seeds):
            statuses = re.findall(rb"HTTP/1\.1 (\d\d\d)", answer)
            assert not [status for status in statuses if status[:1] == b"5"], (seed, request, answer)
            assert not NO_OFFENCE.search(answer), (seed, request, answer)


def test_malformed_http_is_answered_or_closed(running: Running):
    fuzz(running, range(500))
    assert httpx.get(running.url + "/health").json() == {"ok": True}


@pytest.mark.slow
def test_much_malformed_http_is_answered_or_closed(running: Running):
    fuzz(running, range(500, 3000))
    assert httpx.get(running.url + "/health").json() == {"ok": True}


def test_what_the_server_itself_refuses_has_the_one_shape_and_the_headers(running: Running):
    answer = exchange(running.port, b"\x16\x03\x01\x00\xa5\x01\x00\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"content-security-policy: default-src 'none'" in head
    assert list(json.loads(body)["error"]) == ["field", "given", "allowed"]


# ---- E13: slow clients -----------------------------------------------------------------------------------------------

N_SLOW = 20


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def seconds_to_answer(running: Running) -> float:
    """How long a normal client waits."""
    started = time.perf_counter()
    assert exchange(running.port, b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n").endswith(b'{"ok":true}')
    return time.perf_counter() - started


def closed_within(client: socket.socket, until: float) -> bool:
    """Whether the other side closes; what it says is read."""
    try:
        while time.perf_counter() < until:
            client.settimeout(max(0.01, until - time.perf_counter()))
            if not client.recv(1 << 16):
                return True
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return False


def trickle(clients: list[socket.socket], stop: threading.Event) -> None:
    """A byte to each of them, again and again: no pause is as long as a deadline."""
    while not stop.wait(0.1):
        for client in clients:
            with contextlib.suppress(OSError):  # closed, which is what is wanted
                client.send(b"a")


SLOW = {
    "silent": b"",
    "head": b"GET /overview HTTP/1.1\r\nHost: localhost\r\nX: ",
    "head after an answer": b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /health HTTP/1.1\r\nX: ",
    "idle after an answer": b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "body": (POST + "Content-Length: 9999\r\n\r\n").encode(),
    "chunks": (POST + "Transfer-Encoding: chunked\r\n\r\n5;").encode(),
}


SILENT = ("silent", "idle after an answer")


@pytest.mark.parametrize("kind", SLOW)
def test_slow_senders_are_closed_and_others_are_served(running: Running, kind: str):
    httpx.get(running.url + "/health")
    before, stop = descriptors(), threading.Event()
    clients = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(N_SLOW)]
    started = time.perf_counter()
    for client in clients:
        client.sendall(SLOW[kind].replace(b"{}", running.token.encode()))
    sender = threading.Thread(target=trickle, args=([] if kind in SILENT else clients, stop))
    sender.start()
    assert seconds_to_answer(running) < 1
    assert [closed_within(client, started + 3) for client in clients] == [True] * N_SLOW
    assert time.perf_counter() - started > 0.4, "closed before the deadline"
    stop.set()
    sender.join()
    for client in clients:
        client.close()
    assert seconds_to_answer(running) < 1
    while descriptors() > before and time.perf_counter() < started + 9:
        time.sleep(0.05)
    assert descriptors() <= before


def big_file(running: Running, n_bytes: int) -> bytes:
    """The request for a file of a size."""
    routes = running._server.guard.app.routes  # ty: ignore[unresolved-attribute]
    mount = next(route for route in routes if getattr(route, "path", "") == "/static")
    (Path(mount.app.directory) / "big").write_bytes(bytes(n_bytes))
    return f"GET /static/big HTTP/1.0\r\nHost: localhost\r\nAuthorization: Bearer {running.token}\r\n\r\n".encode()


def asking(port: int, ask: bytes) -> socket.socket:
    """A client with little room of its own that has asked."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(5)
    client.connect(("127.0.0.1", port))
    client.sendall(ask)
    return client


def connections(running: Running) -> int:
    return len(running._server.server_state.connections)


@pytest.mark.parametrize("reads", [0, 64])
def test_slow_readers_are_closed_and_others_are_served(running: Running, reads: int):
    ask, before = big_file(running, 32 << 20), descriptors()
    clients = [asking(running.port, ask) for _ in range(N_SLOW)]
    started = time.perf_counter()
    assert seconds_to_answer(running) < 1
    assert connections(running) >= N_SLOW
    while connections(running) and time.perf_counter() < started + SHORT.write_seconds - 0.2:
        time.sleep(0.1)
        for client in clients if reads else []:
            with contextlib.suppress(ConnectionError):
                client.recv(reads)
    assert not connections(running), "not after a stall, or not even then"
    for client in clients:
        client.close()
    while descriptors() > before and time.perf_counter() < started + 9:
        time.sleep(0.05)
    assert descriptors() <= before


def test_an_answer_that_fits_into_our_own_buffer_is_not_kept_for_ever(tmp_path: Path):
    with start(lambda: small_site(tmp_path / "static"), limits=SHORT) as running:
        for listening in running._server.servers[0].sockets:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that the kernel's does not hold it
        with asking(running.port, big_file(running, 50 << 10)):
            assert seconds_to_answer(running) < 1
            started = time.perf_counter()
            while connections(running) and time.perf_counter() < started + SHORT.write_seconds:
                time.sleep(0.05)
            assert not connections(running)


def test_a_steady_reader_gets_all_though_it_takes_longer_than_a_stall(running: Running):
    with asking(running.port, big_file(running, 8 << 20)) as client:
        started, n_bytes = time.perf_counter(), 0
        while part := client.recv(1 << 16):
            n_bytes += len(part)
            behind = started + n_bytes / (8 << 20) - time.perf_counter()  # a second in all
            time.sleep(max(0, behind))
    assert n_bytes > 8 << 20
    assert time.perf_counter() - started > SHORT.stall_seconds


def test_a_reader_that_takes_too_long_in_all_is_cut_off(running: Running):
    with asking(running.port, big_file(running, 32 << 20)) as client:
        started, n_bytes = time.perf_counter(), 0
        with contextlib.suppress(ConnectionError):
            while part := client.recv(1 << 16):
                n_bytes += len(part)
                time.sleep(max(0, started + n_bytes / (4 << 20) - time.perf_counter()))
    assert n_bytes < 32 << 20
    assert SHORT.write_seconds * 0.9 < time.perf_counter() - started < SHORT.write_seconds + 2


def test_too_many_connections_are_told_so(tmp_path: Path):
    with start(lambda: small_site(tmp_path / "static"), limits=Limits(connections=5)) as running:
        held = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(5)]
        while connections(running) < 5:
            time.sleep(0.01)
        assert exchange(running.port, b"").startswith(b"HTTP/1.1 503 ")
        for client in held:
            client.close()
        while connections(running):
            time.sleep(0.01)
        assert httpx.get(running.url + "/health").json() == {"ok": True}
