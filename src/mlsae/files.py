"""The one door to the disk: every durable write, lock, checksum, and read of a file we may not have written.

A write is old or new, never a mix: bytes go to a hidden file or folder beside the target, are synced, and renamed once.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import pickle
import re
import shutil
import socket
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import yaml
from yaml.constructor import ConstructorError

from mlsae.errors import ConfigError, ModelError, ResourceError, printable

if TYPE_CHECKING:
    from torch import Tensor, dtype

log = logging.getLogger(__name__)

_DTYPES = {"torch.float32": "F32", "torch.float64": "F64", "torch.int64": "I64", "torch.uint8": "U8"}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
PAUSES = (1, 2, 4)
"""Seconds between attempts to write to a full disk."""
MAX_JSON_BYTES = 1 << 20
MAX_JSON_DEPTH = 32
MAX_HEADER_BYTES = 8 << 20
"""Of a safetensors file: a few hundred bytes a tensor."""
MAX_JSONL_BYTES = 256 << 20
_BAD_PICKLE = (AttributeError, IndexError, KeyError, TypeError, ValueError)
"""What torch's unpickler raises, beside its own errors, over bytes that make no sense."""


# ---- writing -------------------------------------------------------------------------------------------------------


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, durably: after a crash it holds the old bytes or the new ones."""
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path) -> Generator[BinaryIO]:
    """A hidden file beside `path` to fill bit by bit; on a clean exit it is synced and takes its place, durably."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".tmp-{path.name}-{os.getpid()}")
        try:
            with open(staged, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(staged, path)
        finally:
            staged.unlink(missing_ok=True)
        sync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by UTF-8 text, durably."""
    write_bytes(path, text.encode())


def canonical_json(value: Any) -> str:
    """The one spelling of a JSON value: sorted keys, two spaces, no NaN."""
    return json.dumps(value, sort_keys=True, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by JSON, durably. Keys keep their order; NaN and infinity become null, which JSON has."""
    write_text(path, json.dumps(finite(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_sealed(path: Path, fields: Mapping[str, Any]) -> None:
    """Replace `path` by canonical JSON with a digest of itself under `sha256`, durably: one flipped bit will show."""
    write_text(path, canonical_json({**fields, "sha256": json_digest(fields)}))


def json_digest(value: Any) -> str:
    """Hex SHA-256 of a JSON value, in its one spelling."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def finite(value: Any) -> Any:
    """The same nested value with every non-finite float replaced by None."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def save_tensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: dict[str, str] | None = None) -> None:
    """Replace `path` by a safetensors file, durably."""
    from safetensors.torch import save

    write_bytes(path, save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata))


@contextlib.contextmanager
def staged_directory(target: Path) -> Generator[Path]:
    """A hidden folder beside `target` to fill; on a clean exit it is synced and renamed to `target`, else removed."""
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_name(f".tmp-{target.name}-{os.getpid()}")
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        try:
            yield staged
            for path in sorted(staged.rglob("*")):
                sync_directory(path)  # files too: fsync wants any descriptor
            sync_directory(staged)
            remove(target)
            os.rename(staged, target)
            sync_directory(target.parent)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


@contextlib.contextmanager
def new_file(path: Path) -> Generator[BinaryIO]:
    """A file inside a staged folder (which makes it durable) to fill bit by bit, for what is too large for memory."""
    with open(path, "wb") as file:
        yield file


def remove(path: Path) -> None:
    """Delete a file or folder in two steps, so that a crash leaves it whole or under a name the next start sweeps."""
    if not path.exists() and not path.is_symlink():
        return
    trash = path.with_name(f".trash-{path.name}-{os.getpid()}")
    os.rename(path, trash)
    if trash.is_dir() and not trash.is_symlink():
        shutil.rmtree(trash)
    else:
        trash.unlink()


def remove_if_empty(directory: Path) -> None:
    """Delete a folder that nobody put anything into."""
    with contextlib.suppress(OSError):
        directory.rmdir()


def rename(source: Path, target: Path) -> None:
    """Rename durably within one folder."""
    os.rename(source, target)
    sync_directory(target.parent)


def sweep(directory: Path) -> None:
    """Remove what an interrupted write left behind."""
    for path in [*directory.glob(".tmp-*"), *directory.glob(".trash-*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def sync_directory(path: Path) -> None:
    """fsync a folder (its entries) or a file (its bytes)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path, needed: int | None = None) -> Generator[None]:
    """Turn an OSError into the one sentence a user can act on, about the outermost path; `needed` bytes were to be written."""
    try:
        yield
    except (OSError, ResourceError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        if cause.errno in DISK_FULL:
            needs = "" if needed is None else f"{_size(needed)} needed, "
            problem = f"disk full: {needs}{_size(free_bytes(path))} free; free some space and run again"
        else:
            problem = f"{cause.strerror or cause}; choose a folder you can write to"
        raise ResourceError(str(path), problem) from cause


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes >= 1e5 else f"{n_bytes / 1e3:.1f} kB"


def on_full_disk(write: Callable[[], None]) -> None:
    """Call `write`, and again after each of PAUSES if the disk is full: on a shared one, space often comes back."""
    for pause in PAUSES:
        try:
            write()
        except ResourceError as error:
            if not (isinstance(error.__cause__, OSError) and error.__cause__.errno in DISK_FULL):
                raise
            log.warning("%s (trying again in %d s)", error, pause)
            time.sleep(pause)
        else:
            return
    write()


def probe_writable(directory: Path) -> None:
    """Refuse, before any work, a folder that cannot be made or written to. Leaves nothing behind."""
    with disk_errors(directory):
        if directory.exists() and not directory.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        missing = [p for p in [directory, *directory.parents] if not p.exists()]
        probe = directory / f".tmp-probe-{os.getpid()}"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
        finally:
            for path in [probe, *missing]:
                with contextlib.suppress(OSError):
                    path.unlink() if path == probe else path.rmdir()


def free_bytes(path: Path) -> int:
    """Bytes free on the file system that holds (or would hold) `path`."""
    with disk_errors(path):
        existing = next(p for p in [path.absolute(), *path.absolute().parents] if p.exists())
        return shutil.disk_usage(existing).free


def cache_directory() -> Path:
    """Where converted models and packed tokens are kept: $MLSAE_CACHE, else ~/.cache/mlsae."""
    return Path(os.environ.get("MLSAE_CACHE") or Path.home() / ".cache" / "mlsae")


def contained(root: Path, name: str) -> Path:
    """`root / name`, refused unless it stays inside `root`."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # too long, a circle of links, no file name
        if "\0" not in name and (path := (root / name).resolve()).is_relative_to(root.resolve()):
            return path
    raise ResourceError(str(root), f"{name!r} leads outside the folder; use a plain name")


class RunLock:
    """One writer per run directory: an flock the kernel frees when the process ends, so it is never stale."""

    def __init__(self, directory: Path):
        path = directory / "run.lock"
        with disk_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+")  # noqa: SIM115 - held as long as the lock
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or path.stat().st_ino != os.fstat(self._file.fileno()).st_ino:
                raise BlockingIOError  # its holder removed it between open and flock: a lock on that file is no lock
        except OSError as error:
            holder = self._holder()
            self._file.close()
            raise ResourceError(str(directory), f"in use by {holder}; wait for it or choose another --out") from error
        try:
            with disk_errors(directory):
                self._file.truncate(0)
                self._file.write(
                    f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
                )
                self._file.flush()
        except ResourceError:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._file.close()
            raise

    def _holder(self) -> str:
        """Who holds the lock; asked again for a second, because it is taken a moment before a name is written."""
        for _ in range(50):
            self._file.seek(0)
            if holder := self._file.read().strip():
                return holder
            time.sleep(0.02)
        return "another process"

    def release(self) -> None:
        """Give the directory to the next writer."""
        self._file.close()


class JsonLines:
    """An append-only file with one JSON object a line, whose length can be noted and returned to."""

    def __init__(self, path: Path):
        self._path = path
        with disk_errors(path):
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - open as long as the run

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line, or nothing of it."""
        line, length = json.dumps(finite(record), allow_nan=False).encode() + b"\n", self._file.tell()

        def write() -> None:
            with disk_errors(self._path, len(line)):
                if self._file.write(line) < len(line):
                    self._file.truncate(length)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        on_full_disk(write)

    def sync(self) -> int:
        """Make what was written durable; returns the length in bytes."""
        with disk_errors(self._path):
            os.fsync(self._file.fileno())
            return self._file.tell()

    def truncate(self, length: int) -> None:
        """Forget every line written after `length` was noted; a file that is shorter already stays as it is."""
        with disk_errors(self._path):
            self._file.truncate(min(length, self._path.stat().st_size))
            self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


# ---- reading -------------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """A JSON file of bounded size and depth without duplicate keys; anything else is refused with file and place."""
    return parse_json(_read_small(path, max_bytes), path)


def read_sealed(path: Path) -> dict[str, Any]:
    """The fields that `write_sealed` wrote. Raises ResourceError if a bit of the file is not as it was written."""
    try:
        value = read_json(path)
    except ConfigError as error:
        raise ResourceError(str(path), f"failed its checksum ({path.name}: {error.problem})") from error
    fields = {key: item for key, item in value.items() if key != "sha256"} if isinstance(value, dict) else {}
    sealed = canonical_json({**fields, "sha256": json_digest(fields)})
    if path.read_text() != sealed:
        raise ResourceError(str(path), f"failed its checksum ({path.name})")
    return fields


def parse_json(text: str, path: Path) -> Any:
    """The value of a JSON text; `path` names it in errors."""
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except RecursionError:
        raise ConfigError(str(path), f"nested deeper than {MAX_JSON_DEPTH} levels; not one of our files") from None
    except json.JSONDecodeError as error:
        raise ConfigError(str(path), f"line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from error
    except ValueError as error:
        raise ConfigError(str(path), str(error)) from error
    if _depth(value) > MAX_JSON_DEPTH:
        raise ConfigError(str(path), f"nested deeper than {MAX_JSON_DEPTH} levels; not one of our files")
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML (or JSON) mapping without duplicate keys, tags or anchors to code; `1e8` and `2e-4` are numbers."""
    text = _read_small(path, MAX_JSON_BYTES)
    try:
        value = yaml.load(text, _PlainYaml)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(str(path), f"{place}{error.problem or error.context}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(str(path), f"not YAML ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(str(path), f"line 1, column 1: holds {_kind(value)}; write one 'key: value' a line")
    return value


def tensors_metadata(path: Path) -> dict[str, str]:
    """What `save_tensors` was given beside the tensors."""
    with _opened(path) as file:
        return file.metadata() or {}


def load_tensors(
    path: Path, expected: "Mapping[str, tuple[dtype, tuple[int, ...]]] | None" = None
) -> "dict[str, Tensor]":
    """The tensors of a safetensors file. With `expected`, names, dtypes and shapes must be exactly those, checked first."""
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        if expected is not None:
            found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
            wanted = {name: (_DTYPES[str(kind)], shape) for name, (kind, shape) in expected.items()}
            _check_tensors(path, found, wanted)
        return {name: file.get_tensor(name) for name in slices}


def load_pickled_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> "dict[str, Tensor]":
    """The tensors of these names and shapes, as float32, that `torch.save` wrote, for a format that has no other file.

    It is read by torch's restricted unpickler, which makes tensors and calls nothing else, after a look at its sizes.
    """
    import torch

    limit = 8 * sum(math.prod(shape) for shape in shapes.values()) + MAX_JSON_BYTES
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(max(entry.file_size, entry.compress_size) for entry in archive.infolist())
        if size > limit:
            raise ModelError(str(path), f"holds {size} bytes; its config allows {limit}")
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, OSError, EOFError, RuntimeError, *_BAD_PICKLE) as error:
        raise ModelError(str(path), f"holds more than tensors, or is damaged ({type(error).__name__})") from error
    found = tensors if isinstance(tensors, dict) else {}
    if odd := sorted(map(str, found.keys() ^ shapes.keys())) or ([] if found else ["a dictionary"]):
        raise ModelError(str(path), f"'{printable(odd[0])}' is missing or unknown; it is not of this config")
    for name, shape in shapes.items():
        if not (isinstance(found[name], torch.Tensor) and found[name].is_floating_point()):
            raise ModelError(str(path), f"'{name}' is no tensor of floating-point numbers")
        if tuple(found[name].shape) != shape:
            raise ModelError(
                str(path), f"tensor '{name}' has shape {list(found[name].shape)}; config.json needs {list(shape)}"
            )
    return {name: tensor.float() for name, tensor in found.items()}


@contextlib.contextmanager
def _opened(path: Path) -> Generator[Any]:
    """A safetensors file whose header was checked."""
    from safetensors import SafetensorError, safe_open

    check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, RuntimeError, MemoryError) as error:
        raise ModelError(str(path), f"not a readable safetensors file ({error})") from error


def check_header(path: Path) -> None:
    """Refuse a safetensors header of more bytes than there are or should be, or with a name twice, before a library reads it."""
    if not path.is_file():
        raise ModelError(str(path), "no such file; name a folder that save_pretrained wrote")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= min(size - 8, MAX_HEADER_BYTES) else b""
    if not header:
        raise ModelError(str(path), f"not a safetensors file (header of {length} bytes in a file of {size})")
    try:
        parse_json(header.decode(), path)
    except (ConfigError, UnicodeDecodeError) as error:
        raise ModelError(str(path), f"not a readable safetensors file ({error})") from error


def _check_tensors(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if missing := sorted(wanted.keys() - found.keys()):
        raise ModelError(str(path), f"tensor '{missing[0]}' is missing; the file is not whole")
    if unknown := sorted(found.keys() - wanted.keys()):
        raise ModelError(str(path), f"tensor '{unknown[0]}' is unknown; the file was not written for this config")
    for name, (kind, shape) in wanted.items():
        if found[name][1] != shape:
            raise ModelError(
                str(path), f"tensor '{name}' has shape {list(found[name][1])}; config.json needs {list(shape)}"
            )
        if found[name][0] != kind:
            raise ModelError(str(path), f"tensor '{name}' is {found[name][0]}; it must be {kind}")


def _read_small(path: Path, max_bytes: int, *, empty: bool = False) -> str:
    if not path.is_file():
        raise ConfigError(str(path), "no such file")
    if path.stat().st_size > max_bytes:
        raise ConfigError(str(path), f"{path.stat().st_size} bytes; at most {max_bytes} are read")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), f"byte {error.start}: not UTF-8") from error
    if text.startswith("\ufeff"):
        raise ConfigError(str(path), "line 1, column 1: starts with a byte-order mark; save it as plain UTF-8")
    if not text.strip() and not empty:
        raise ConfigError(str(path), "line 1, column 1: the file is empty")
    return text


def _no_constant(name: str) -> Any:
    raise ValueError(f"holds {name}, which is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise ValueError(f"key '{twice}' stands twice")
    return found


def _depth(value: Any) -> int:
    """Levels of nesting, counted level by level: a hostile file must not exhaust the stack."""
    depth, level = 0, [value]
    while level := [x for x in level if isinstance(x, dict | list)]:
        depth += 1
        level = [x for container in level for x in (container.values() if isinstance(container, dict) else container)]
    return depth


def _kind(value: Any) -> str:
    return {list: "a list", str: "a text", type(None): "nothing"}.get(type(value), f"a {type(value).__name__}")


class _PlainYaml(yaml.SafeLoader):
    """Plain data only: no duplicate keys, and floats as YAML 1.2 writes them (PyYAML alone reads 1e8 as a string)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        seen: set[str] = set()
        for (key_node, _), key in zip(node.value, map(str, keys), strict=True):
            if key in seen:
                raise ConstructorError(None, None, f"key '{key}' stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_PlainYaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_jsonl(path: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """The records of a file that `JsonLines` wrote, or those in its last bytes; a line cut short by a crash is left out."""
    size = path.stat().st_size if path.is_file() else 0
    if last_bytes is None or size <= last_bytes:
        text = _read_small(path, MAX_JSONL_BYTES, empty=True)
    else:
        with open(path, "rb") as file:
            file.seek(size - last_bytes)
            text = file.read().partition(b"\n")[2].decode()
    records = [parse_json(line, path) for line in text.split("\n")[:-1] if line]
    if odd := [record for record in records if not isinstance(record, dict)]:
        raise ConfigError(str(path), f"holds {_kind(odd[0])} where a line is an object; not a file of ours")
    return records
