"""Malicious files, and a watched process to load them in: what a file made happen is what an audit hook saw.

The process imports everything first, then reads one job a line and writes one outcome a line, so that hundreds of files
cost one start. A gadget is harmless: all it would do is to create the canary, a file that nobody else creates.
"""

import functools
import hashlib
import io
import json
import marshal
import os
import pickle
import random
import resource
import runpy
import select
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import mlsae
from mlsae.files import canonical_json

SECONDS, GROWTH_BYTES = 5.0, 256 << 20
"""What refusing a file may cost."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".joblib", ".npy", ".npz")

# ---- pickles ---------------------------------------------------------------------------------------------------------


class Call:
    """Unpickling this calls a function."""

    def __init__(self, function: Any, *arguments: Any):
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced

    def __call__(self) -> None:
        """Only so that a Call may stand for the function of another one."""


class Set(Call):
    """Unpickling this calls a function with the text and a state: the sixth field of a reduced object."""

    def __init__(self, function: Any, text: str):
        self.reduced = str, (text,), {"__name__": "state"}, None, None, function


def gadgets(canary: Path) -> dict[str, bytes]:
    """Files that create the canary when they are unpickled, by the way they do it."""
    shell, python = f"touch {canary}", f"open({str(canary)!r}, 'w').close()"
    script = canary.with_name("gadget.py")
    script.write_text(python)
    code = marshal.dumps(compile(python, "gadget", "exec"))
    call = Call(os.system, shell)
    plain = pickle.dumps(call)
    return {
        "os.system": plain,
        "opcodes": f"cos\nsystem\n(S'{shell}'\ntR.".encode(),
        "eval": pickle.dumps(Call(eval, python), 2),
        "exec": pickle.dumps([{"deep": (Call(exec, python),)}], 4),
        "subprocess": pickle.dumps(Call(subprocess.call, ["touch", str(canary)])),
        "run a file": pickle.dumps(Call(runpy.run_path, str(script))),
        "setstate": pickle.dumps(Call(functools.partial(os.system, shell))),
        "state setter": pickle.dumps(Set(exec, python)),
        "code object": pickle.dumps(Call(exec, Call(marshal.loads, code))),
        "torch zip": written(lambda file: torch.save({"W_enc": call}, file)),
        "torch legacy": written(lambda file: torch.save({"W": call}, file, _use_new_zipfile_serialization=False)),
        "numpy object": written(lambda file: np.save(file, np.array([call], dtype=object), allow_pickle=True)),
        "joblib": zlib.compress(plain),
        "zip": written(lambda file: _zip(file, {"archive/data.pkl": plain, "archive/version": b"3\n"})),
        "tar": written(lambda file: _tar(file, {"sys_info": pickle.dumps({}), "pickle": plain, "storages": plain})),
    }


def unsafely(data: bytes) -> None:
    """Load a gadget as a careless program would."""
    file = io.BytesIO(data)
    if data.startswith(b"\x93NUMPY"):
        np.load(file, allow_pickle=True)
    elif data.startswith(b"PK"):
        archive = zipfile.ZipFile(file)
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        pickle.loads(archive.read(name))
    elif data[257:262] == b"ustar":
        with tarfile.open(fileobj=file) as archive:
            pickle.load(archive.extractfile("pickle"))  # ty: ignore[invalid-argument-type]
    elif data.startswith(b"\x78"):
        pickle.loads(zlib.decompress(data))
    else:
        while file.tell() < len(data):  # torch's legacy files are several pickles end to end
            pickle.load(file)


def written(write: Callable[[io.BytesIO], object]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def _zip(file: io.BytesIO, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def _tar(file: io.BytesIO, members: dict[str, bytes]) -> None:
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


# ---- safetensors -----------------------------------------------------------------------------------------------------


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header, true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def lies(good: bytes) -> dict[str, bytes]:
    """Files that are a good one but for one lie about its first tensor or its own size."""
    size = 8 + int.from_bytes(good[:8], "little")
    text, data, header = good[8:size], good[size:], json.loads(good[8:size])
    first, second, *_ = (name for name in header if name != "__metadata__")
    entry, (begin, end) = header[first], header[first]["data_offsets"]

    def told(**changes: Any) -> bytes:
        return safetensors(header | {first: entry | changes}, data)

    def without(key: str) -> bytes:
        return safetensors(header | {first: {k: v for k, v in entry.items() if k != key}}, data)

    twice = text.rstrip(b" }") + b"}, " + json.dumps({first: entry}).encode()[1:]
    return {
        "nothing": b"",
        "seven bytes": good[:7],
        "header of nothing": safetensors(b"", data),
        "header 2^63": safetensors(text, data, 1 << 63),
        "header 2^64 - 1": safetensors(text, data, (1 << 64) - 1),
        "header longer than the file": safetensors(text, data, len(good)),
        "header one byte short": safetensors(text, data, len(text) - 1),
        "header a byte too long": safetensors(text, data, len(text) + 1),
        "cut short": good[:-1],
        "a byte more": good + b"\0",
        "a hole": safetensors(text, b"\0" * 8 + data),
        "overlap": told(data_offsets=header[second]["data_offsets"]),
        "backwards": told(data_offsets=[end, begin]),
        "offsets beyond the end": told(data_offsets=[len(data), len(data) + end - begin]),
        "offsets 2^64": told(data_offsets=[1 << 64, (1 << 64) + end - begin]),
        "three offsets": told(data_offsets=[begin, end, end]),
        "negative shape": told(shape=[-size for size in entry["shape"]]),
        "float shape": told(shape=[float(size) for size in entry["shape"]]),
        "shape of text": told(shape=["1"]),
        "huge shape": told(shape=[1 << 40, 1 << 40]),
        "overflowing shape": told(shape=[1 << 62, 4]),
        "no shape": without("shape"),
        "unknown dtype": told(dtype="F99"),
        "no dtype": without("dtype"),
        "twice the width": told(dtype="F64"),
        "half the width": told(dtype="BF16"),
        "another type of that width": told(dtype="I32", shape=[(end - begin) // 4, 1, 1]),
        "the same name twice": safetensors(twice, data),
        "byte-order mark": safetensors(b"\xef\xbb\xbf" + text, data),
        "not UTF-8": safetensors(text.replace(first[:1].encode(), b"\xff", 1), data),
        "a list": safetensors(b"[" + text + b"]", data),
        "deep": safetensors(b'{"a":' * 10_000 + b"1" + b"}" * 10_000, data),
        "metadata of numbers": safetensors(header | {"__metadata__": {"a": 1}}, data),
    }


def forge(step: Path) -> None:
    """Make a checkpoint's manifest fit its files, as anyone can who can write both."""
    manifest = json.loads((step / "manifest.json").read_text())
    for name, fact in manifest["files"].items():
        data = (step / name).read_bytes()
        fact.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    write_manifest(step, manifest)


def write_manifest(step: Path, manifest: Any) -> None:
    """A manifest in the one spelling that is read, with the digest of its own fields."""
    fields = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(canonical_json(fields).encode()).hexdigest()
    (step / "manifest.json").write_text(canonical_json(fields | {"sha256": digest}))


# ---- sizes -----------------------------------------------------------------------------------------------------------


def sparse(path: Path, n_bytes: int, head: bytes = b"") -> None:
    """A file of any size that takes no space: `head`, then zeros."""
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(n_bytes)


def repeated(member: bytes, n: int, path: Path) -> None:
    """Compressed files end to end, which are one to their formats."""
    with open(path, "wb") as file:
        for _ in range(n):
            file.write(member)


def parquet_of_copies(path: Path, text: str, n: int) -> None:
    """One text, stored once, in `n` rows."""
    words = pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array([text]))
    pq.write_table(pa.table({"text": words}), path)


# ---- names -----------------------------------------------------------------------------------------------------------

X = "x.safetensors"
_DOTS = ("..", "../{x}", "../../{x}", "../../../{x}", "./../{x}", ".//..//{x}", "a/../../{x}", "a/b/../../../{x}")
_WHOLE = (
    "/",
    "/..",
    "/etc/passwd",
    "//etc/passwd",
    "/{x}",
    "{outside}",
    "{outside}/{x}",
    "/{outside}/{x}",
    "{root}/../{x}",
)
_HOME = ("~", "~/{x}", "~root/{x}", "~nobody-such/{x}", "$HOME/{x}", "${{HOME}}/{x}", "%HOME%/{x}")
_SIBLINGS = (
    "../root-sibling",
    "../root-sibling/{x}",
    "{root}-sibling/{x}",
    "link",
    "link/{x}",
    "link/../{x}",
    "a/link/../{x}",
    "loop/{x}",
)
_WINDOWS = (r"..\{x}", r"..\..\{x}", r"a\..\..\{x}", r"\{x}", r"\\server\share\{x}", "//server/share/{x}", r"C:\{x}")
_DRIVES = (
    "C:/{x}",
    "C:{x}",
    r"C:\..\{x}",
    r"\\?\C:\{x}",
    r"\\.\pipe\{x}",
    "CON",
    "NUL",
    "aux.{x}",
    "{x}::$DATA",
    "{x}:a:b",
)
_ENCODED = ("%2e%2e/{x}", "..%2f{x}", "%2e%2e%2f{x}", "..%5c{x}", "%252e%252e%252f{x}", "..%c0%af{x}", "..%00/{x}")
_NUL = ("\0", "{x}\0", "../{x}\0.json", "{x}\0/../../{x}", "\0../{x}")
_LONG = ("a" * 300 + "/{x}", "a" * 4096, "../" * 1365 + "{x}", "a/" * 2048 + "{x}", "../" + "a" * 4096)
_UNICODE = (
    "..\u2215{x}",
    "\uff0e\uff0e/{x}",
    "\u2025/{x}",
    "\u202e../{x}",
    "\ud800/{x}",
    "..\uff0f{x}",
    "e\u0301/../../{x}",
)
_CONTROL = ("\n../{x}", "\r../{x}", "\x1b[31m../{x}", " ../{x}", "../ {x}", ".. /{x}", "\t")
_SHELL = (
    "-rf",
    "--help",
    "$(touch {x})",
    "`touch {x}`",
    "|touch {x}",
    "; touch {x}",
    "*/{x}",
    "../*",
    "[a-z]/../../{x}",
)
_SCHEMES = ("file:///etc/passwd", "file://{outside}/{x}", "http://127.0.0.1/{x}", "zip://{outside}/{x}", "s3://a/{x}")
_DEVICES = ("/dev/zero", "/dev/stdin", "/proc/self/environ", "/proc/self/fd/0", "/proc/self/root/{outside}/{x}")
NAMES = (
    *(*_DOTS, *_WHOLE, *_HOME, *_SIBLINGS, *_WINDOWS, *_DRIVES, *_ENCODED, *_NUL),
    *(*_LONG, *_UNICODE, *_CONTROL, *_SHELL, *_SCHEMES, *_DEVICES),
)
"""Names that lead out of a folder, on some system, after some decoding, or that no file can have."""


def lair(parent: Path) -> dict[str, str]:
    """A folder `root` with a way out, a sibling called nearly like it, and `x` everywhere but in it."""
    root, outside = parent / "root", parent / "outside"
    for folder in (root / "a" / "b", outside, parent / "root-sibling"):
        folder.mkdir(parents=True, exist_ok=True)
    for link in (root / "link", root / "a" / "link"):
        link.symlink_to(outside)
    (root / "loop").symlink_to("loop")
    return {"root": str(root), "outside": str(outside), "x": X}


def generated(n: int, seed: int) -> Iterator[str]:
    """Random joins of what such names are made of."""
    draw = random.Random(seed)
    pieces = [
        *("..", "/", "a", "b", "link", X, "../", "/../", "./", "//", "\\", "%2e", "%2f", "\0", "~", " ", "root-sibling")
    ]
    for _ in range(n):
        yield "".join(draw.choices([*pieces, "{root}", "{outside}", "\n", "x" * 260], k=draw.randint(1, 9)))


# ---- the watched process ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What loading one file came to."""

    kind: str
    """Class of the exception; "" if it loaded."""
    message: str
    """Text of the exception, or what was loaded."""
    ours: bool
    """The exception is an MlsaeError."""
    events: list[str]
    """What a file must never make happen."""
    seconds: float
    growth: int
    """Bytes by which resident memory rose at its peak."""

    @property
    def safe(self) -> bool:
        """Nothing ran, in little time and memory, and an error is one printable sentence of ours."""
        quick = self.seconds <= SECONDS and self.growth <= GROWTH_BYTES
        return not self.events and quick and (not self.kind or (self.ours and self.message.isprintable()))

    @property
    def refused(self) -> bool:
        return self.safe and bool(self.kind)


class Watched:
    """Another process that loads what it is told to; a new one is started when it dies."""

    def __init__(self, root: Path, lm: Path):
        self.root, self.lm, self.canary = root, lm, root / "canary"
        self._process: subprocess.Popen[str] | None = None

    def load(self, reader: str, *arguments: Any, timeout: float = 30.0) -> Outcome:
        """What one of READERS makes of a path or text; a process that dies or hangs is a kind of outcome too."""
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([reader, *map(str, arguments)]) + "\n")
        process.stdin.flush()
        ready, *_ = select.select([process.stdout], [], [], timeout)
        if line := process.stdout.readline() if ready else "":
            return Outcome(**json.loads(line))
        self.close()
        return Outcome("died" if ready else "hung", f"code {process.returncode}", False, [], timeout, 0)

    def _start(self) -> "subprocess.Popen[str]":
        online = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
        places = {"PYTHONPATH": os.pathsep.join(sys.path), "MLSAE_CACHE": "cache", "HF_HOME": "hf", "HOME": "."}
        one_thread = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}
        with open(self.root / "stderr", "a") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-c", "import hostile, sys; hostile.serve(*sys.argv[1:])", str(self.lm)],
                cwd=self.root,
                env=online | places | one_thread,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n", (self.root / "stderr").read_text()[-2000:]
        return self._process

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process = None


def serve(lm: str) -> None:
    """Be the watched process: import and load everything good once, then answer jobs."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_DATA, (6 << 30, 6 << 30))  # a bomb must not take the machine with it
    import datasets  # noqa: F401
    import matplotlib.font_manager  # noqa: F401 - looks for fonts
    import zstandard  # noqa: F401

    torch.set_num_threads(1)
    READERS["lm"](lm)
    hook = _Hook(Path.cwd())
    sys.addaudithook(hook)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        outcome = _outcome(hook, *json.loads(line))
        answers.write(json.dumps(asdict(outcome)) + "\n")
        answers.flush()


def _outcome(hook: "_Hook", reader: str, *arguments: str) -> Outcome:
    from mlsae.errors import MlsaeError

    canary, before = Path("canary"), set(sys.modules)
    canary.unlink(missing_ok=True)
    kind, ours, rss, started = "", False, _memory("VmRSS", reset=True), time.monotonic()
    try:
        with hook.watching():
            message = str(READERS[reader](*arguments))
    except BaseException as error:
        kind, message, ours = type(error).__name__, str(error), isinstance(error, MlsaeError)
    seconds, growth = time.monotonic() - started, _memory("VmHWM") - rss
    strangers = {name: getattr(sys.modules.get(name), "__file__", None) for name in set(sys.modules) - before}
    events = [*hook.events, *(f"imported {name}" for name, file in strangers.items() if file and not _trusted(file))]
    return Outcome(kind, message, ours, events + ["canary"] * canary.exists(), seconds, growth)


def _memory(field: str, *, reset: bool = False) -> int:
    """A line of /proc/self/status in bytes; `reset` starts the peak (VmHWM) anew."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


_TRUSTED = tuple({os.path.realpath(p) + os.sep for p in (sys.prefix, sys.base_prefix, mlsae.__path__[0])})
_ALWAYS = ("subprocess.", "socket.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.", "pickle.")
_LOCAL = {"socket.__new__", "socket.gethostname"}
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")
_CLASS_MAKERS = ("collections/__init__.py", "dataclasses.py", "typing.py", "annotationlib.py", "/ast.py")
"""Files of Python's own that compile what a class says of itself, when a module is imported late."""


def _trusted(file: str) -> bool:
    """Python's own code, an installed package's, or ours; libraries import some of it late."""
    return file.startswith("<frozen ") or os.path.realpath(file).startswith(_TRUSTED)


class _Hook:
    """Keeps the events that loading a file must not cause; no network is reached."""

    def __init__(self, root: Path):
        self.events: list[str] = []
        self._root, self._on = os.path.realpath(root), False

    @contextmanager
    def watching(self) -> Iterator[None]:
        self.events, self._on = [], True
        try:
            yield
        finally:
            self._on = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._on and (found := self._forbidden(event, arguments)):
            self.events.append(found)
            if event.startswith("socket."):
                raise OSError("no network here")

    def _forbidden(self, event: str, arguments: tuple[Any, ...]) -> str:
        if event.startswith(_ALWAYS) and event not in _LOCAL:
            return f"{event} {arguments!r}"[:200]
        if event == "exec" and not _trusted(file := arguments[0].co_filename) and not _makes_a_class(file):
            return f"exec of code from {file} by {_caller()}"
        if event == "compile" and not _trusted(file := os.fsdecode(arguments[1] or "")) and not _makes_a_class(file):
            return f"compile of {file} by {_caller()}"
        if event == "open" and isinstance(arguments[0], str | bytes):
            return self._opened(os.path.realpath(os.fsdecode(arguments[0])), arguments[2] or 0)
        if event in _CHANGES and not self._inside(os.path.realpath(os.fsdecode(arguments[0]))):
            return f"{event} {arguments!r}"[:200]
        return ""

    def _opened(self, path: str, flags: int) -> str:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not self._inside(path) and path != os.devnull:
            return f"wrote {path}"
        pickled = path.endswith(PICKLES) and os.path.basename(path) not in ("tokens.bin", "document_starts.bin")
        return f"read {path}" if pickled and not _trusted(path) else ""

    def _inside(self, path: str) -> bool:
        return path.startswith(self._root + os.sep)


def _makes_a_class(file: str) -> bool:
    return file.startswith("<") and (caller := _caller()).endswith(_CLASS_MAKERS) and _trusted(caller)


def _caller() -> str:
    """The file whose call the hook was told of."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return frame.f_code.co_filename


# ---- what loads files ------------------------------------------------------------------------------------------------


def _digest(tensors: Any) -> str:
    """A few letters that tell tensors apart, by name, type, shape and value."""
    facts = [
        (n, str(t.dtype), tuple(t.shape), t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for n, t in tensors
    ]
    return hashlib.sha256(repr(sorted(facts)).encode()).hexdigest()[:16]


def _read_sae(folder: str) -> str:
    from mlsae import MLSAE

    return _digest(MLSAE.from_pretrained(folder).state_dict().items())


def _read_lm(folder: str) -> str:
    from mlsae import LanguageModel

    lm = LanguageModel.from_pretrained(folder, device="cpu")
    words = "".join(lm.tokenizer.strings(range(lm.d_vocab))) + lm.tokenizer.fingerprint
    return f"{type(lm.hf).__name__} {_digest(lm.hf.state_dict().items())} {words}"


def _read_shape(name: str, revision: str | None = None) -> Any:
    from mlsae.lm import read_shape

    return read_shape(name, revision)


def _read_text(data: str) -> int:
    from mlsae.text import TextSource

    return sum(1 for _ in TextSource(data, "all").documents())


def _pack(data: str, cache: str) -> str:
    from mlsae.data import pack
    from mlsae.text import TextSource
    from mlsae.tokens import Tokenizer
    from tiny import byte_tokenizer

    blocks = pack(TextSource(data, "all"), Tokenizer(byte_tokenizer()), 16, cache=Path(cache), progress=False)
    return _digest(
        [("tokens", blocks.tokens(np.arange(len(blocks)))), ("starts", torch.tensor(blocks.document_starts))]
    )


def _resume(run: str) -> str:
    """Train on from a checkpoint, in a folder like the good run."""
    from mlsae import TrainConfig, train
    from mlsae.untrusted import read_json

    config = TrainConfig(**read_json(Path("good/run/config.json")))
    train(config.replaced(out=run), resume=True, progress=False)
    return _read_sae(run)


def _read_statistics(path: str) -> str:
    from mlsae.analysis.layers import LayerStatistics

    return _digest(LayerStatistics.load(Path(path)).by_shard.items())


def _read_config(path: str) -> Any:
    from mlsae.config import load_config

    return load_config(Path(path))


def _read_metrics(path: str) -> Any:
    from mlsae.untrusted import read_jsonl

    return read_jsonl(Path(path))


def _unpickle(path: str) -> str:
    from mlsae.untrusted import unpickled

    tensors, values = unpickled(Path(path), max_bytes=1 << 20)
    return f"{_digest(tensors.items())} {values}"


def _run_command(*arguments: str) -> str:
    """What a command prints on the terminal: `code: stderr`."""
    from mlsae.cli import main

    with redirect_stderr(io.StringIO()) as stderr, redirect_stdout(io.StringIO()):
        code = main(list(arguments))
    return f"{code}: {stderr.getvalue()}"


READERS: dict[str, Callable[..., Any]] = {
    "sae": _read_sae,
    "lm": _read_lm,
    "shape": _read_shape,
    "text": _read_text,
    "pack": _pack,
    "resume": _resume,
    "statistics": _read_statistics,
    "config": _read_config,
    "metrics": _read_metrics,
    "unpickled": _unpickle,
    "command": _run_command,
    "unsafely": lambda path: unsafely(Path(path).read_bytes()),
}
