"""The child process that reads a pickle for `untrusted.unpickled`: no network, no other process, no file but its answer.

    python -I -B -c "..." PICKLE FOLDER MAX_BYTES        writes FOLDER/answer.json and FOLDER/tensors.safetensors

Here is the one `torch.load` of the project. Torch's restricted unpickler makes tensors and calls nothing else; should it once
be talked into more, the process it does it in has nothing to reach.
"""

import contextlib
import ctypes
import math
import os
import resource
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlsae import files
from mlsae.errors import ModelError, out_of_memory

if TYPE_CHECKING:
    from torch import Tensor

ANSWER, TENSORS = "answer.json", "tensors.safetensors"
MAX_ENTRIES, MAX_DEPTH = 100_000, 32
SPARE_BYTES = 512 << 20
"""Memory beyond what the tensors take: an unpickler, and threads."""
NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000
"""Linux: CLONE_NEWUSER and CLONE_NEWNET."""
FORBIDDEN = (
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "pty.",
    "ctypes.dlopen",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.chown",
    "os.truncate",
)
"""What Python tells of (PEP 578) and reading tensors does not need."""
TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    """Read the pickle and answer; what is not foreseen ends the process with an error."""
    path, folder, max_bytes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    without_network()
    write_answer(folder, max_bytes, lambda: loaded(path, max_bytes))


def write_answer(folder: Path, max_bytes: int, load: Callable[[], Any]) -> None:
    """What was loaded, or why it is refused."""
    answer: dict[str, Any] = {}
    try:
        tensors, values = flattened(load(), max_bytes)
        files.save_tensors(folder / TENSORS, {name: tensor.clone() for name, tensor in tensors.items()})
        answer["values"] = values
    except ModelError as error:
        answer["refused"] = error.problem
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        answer["refused"] = f"needs more memory than a file of {max_bytes} bytes should"
    files.write_json(folder / ANSWER, answer)


def without_network() -> None:
    """Leave the machine's network for an empty one, where the kernel lets us: before there is a second thread."""
    with contextlib.suppress(OSError, AttributeError):  # not on Linux; `guarded` is then all there is
        unshare = ctypes.CDLL(None).unshare
        if unshare(NEW_NETWORK):
            unshare(NEW_USER | NEW_NETWORK)


def loaded(path: Path, max_bytes: int) -> Any:
    """What the unpickler makes of the file, in bounded memory."""
    import torch

    status = Path("/proc/self/statm")
    if status.exists():
        used = int(status.read_text().split()[0]) * resource.getpagesize()
        limit = used + 6 * max_bytes + SPARE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with guarded():
        return torch.load(path, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def guarded() -> Generator[None]:
    """While open, nothing is written or started, and no network asked for."""
    on = True

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if on and (event.startswith(FORBIDDEN) or (event == "open" and (arguments[2] or 0) & TO_WRITE)):
            os._exit(3)  # an error could be caught by what caused it

    sys.addaudithook(refuse)
    try:
        yield
    finally:
        on = False


def flattened(value: Any, max_bytes: int) -> "tuple[dict[str, Tensor], dict[str, Any]]":
    """The tensors, and the JSON values beside them, of dictionaries in dictionaries, by dotted names.

    Raises ModelError for anything else, and for tensors of more bytes together, which a small file may ask for by strides of 0.
    """
    import torch

    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    left, n_bytes = iter(range(MAX_ENTRIES)), 0
    for name, leaf in _leaves(value, "", left):
        if name in tensors or name in values:
            raise ModelError("pickle", f"'{name[:80]}' stands twice")
        if not isinstance(leaf, torch.Tensor):
            values[name] = _json(name, leaf, left)
            continue
        if leaf.layout != torch.strided or leaf.device.type != "cpu" or leaf.is_quantized:
            raise ModelError("pickle", f"'{name[:80]}' is no dense tensor")
        n_bytes += leaf.numel() * leaf.element_size()
        if n_bytes > max_bytes:
            raise ModelError("pickle", f"'{name[:80]}' makes it more than {max_bytes} bytes of tensors")
        tensors[name] = leaf.detach()
    return tensors, values


def _leaves(value: Any, name: str, left: Iterator[int]) -> Iterator[tuple[str, Any]]:
    """What is in no dictionary of its own; what is shared is walked as often as it is named, and so counted."""
    if not isinstance(value, dict):
        raise ModelError("pickle", f"holds {_kind(value)} where a dictionary of tensors should be")
    if name.count(".") >= MAX_DEPTH:
        raise ModelError("pickle", f"'{name[:80]}' is nested deeper than {MAX_DEPTH} levels")
    for key, item in value.items():
        _count(left)
        if not isinstance(key, str | int):
            raise ModelError("pickle", f"holds {_kind(key)} where a name should be")
        if isinstance(item, dict):
            yield from _leaves(item, f"{name}{key}.", left)
        else:
            yield f"{name}{key}", item


def _json(name: str, value: Any, left: Iterator[int], depth: int = 1) -> Any:
    """The value, tuples as lists."""
    _count(left)
    if value is None or type(value) in (str, bool, int) or (type(value) is float and math.isfinite(value)):
        return value
    if type(value) in (list, tuple) and depth < MAX_DEPTH:
        return [_json(name, item, left, depth + 1) for item in value]
    raise ModelError("pickle", f"'{name[:80]}' is {_kind(value)}, neither a tensor nor a plain value")


def _count(left: Iterator[int]) -> None:
    if next(left, None) is None:
        raise ModelError("pickle", f"holds more than {MAX_ENTRIES} entries")


def _kind(value: Any) -> str:
    return f"{value}" if type(value) is float else f"a {type(value).__name__}"
