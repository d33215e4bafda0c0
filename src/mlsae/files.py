"""The one door to the disk: every durable write, lock and checksum. What is read is in untrusted.py.

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
import shutil
import socket
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mlsae.errors import ResourceError

if TYPE_CHECKING:
    from torch import Tensor, dtype

log = logging.getLogger(__name__)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
PAUSES = (1, 2, 4)
"""Seconds between attempts to write to a full disk."""
PIECE_BYTES = 16 << 20
"""Of a tensor, what is copied at a time on its way to the disk."""
SAFETENSORS = {
    "torch.int64": "I64",
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.int32": "I32",
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}
"""The format's name of each type, in the order in which tensors stand in a file."""


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
    """Replace `path` by a safetensors file, durably, without a copy of the tensors in memory."""
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    save_in_pieces(path, kinds, lambda name: [tensors[name]], metadata)


def save_in_pieces(
    path: Path,
    kinds: "Mapping[str, tuple[dtype, tuple[int, ...]]]",
    pieces: "Callable[[str], Iterable[Tensor]]",
    metadata: dict[str, str] | None = None,
) -> None:
    """The same of tensors that are not there whole: `pieces(name)` gives the entries of one in order, some at a time.

    Byte by byte what the safetensors library writes: eight bytes of length, a JSON header, and the tensors, wide types first.
    """
    order = sorted(kinds, key=lambda name: (list(SAFETENSORS).index(str(kinds[name][0])), name))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name in order:
        kind, shape = kinds[name]
        start, end = end, end + math.prod(shape) * kind.itemsize
        header[name] = {"dtype": SAFETENSORS[str(kind)], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        written = sum(_write_entries(file, piece) for name in order for piece in pieces(name))
        if written != end:
            raise AssertionError(f"{path}: pieces of {written} bytes where {end} were announced")


def _write_entries(file: BinaryIO, tensor: "Tensor") -> int:
    """Write a tensor's bytes, and say how many they were."""
    import torch

    entries = tensor.detach().reshape(-1)
    for part in entries.split(PIECE_BYTES // entries.itemsize) if len(entries) else ():
        file.write(part.cpu().contiguous().view(torch.uint8).numpy())
    return entries.nbytes


def save_pickle(path: Path, values: Mapping[str, Any]) -> None:
    """Replace `path` by what `torch.load` reads, durably: for the formats of others that have no other file."""
    import torch

    def whole(value: Any) -> Any:  # a view would take all that it is a view of with it
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().cpu().clone(memory_format=torch.contiguous_format)

    with replacing(path) as file:
        torch.save({name: whole(value) for name, value in values.items()}, file)


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


def probe_empty(directory: Path) -> None:
    """Refuse, before any work, a folder that holds something, or cannot be made or written to."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ResourceError(str(directory), "is there and not empty; name a new folder")
    probe_writable(directory)


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


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
