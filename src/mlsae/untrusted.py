"""Reading files that someone else, or a crash, may have written: bounded, checked before use, and refused in one sentence.

JSON, YAML, safetensors and, where a format has nothing else, pickles by way of another process (unpickler.py); rows of text are
read in textfiles.py.
"""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from yaml.constructor import ConstructorError

from mlsae import unpickler
from mlsae.errors import ConfigError, ModelError, ResourceError, printable
from mlsae.files import canonical_json, free_bytes, json_digest

if TYPE_CHECKING:
    from torch import Tensor, dtype

_DTYPES = {"torch.float32": "F32", "torch.float64": "F64", "torch.int64": "I64", "torch.uint8": "U8"}
MAX_JSON_BYTES = 1 << 20
MAX_JSON_DEPTH = 32
MAX_HEADER_BYTES = 8 << 20
"""Of a safetensors file: a few hundred bytes a tensor."""
MAX_JSONL_BYTES = 256 << 20
LEGACY_PICKLE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How torch.save began its files before they were zip files."""
PICKLE_SECONDS, PICKLE_BYTES_A_SECOND = 300, 10e6
"""Time for another process to start and to read and write a file."""
PICKLE_READER = "import sys; sys.path.insert(0, sys.argv.pop()); from mlsae.unpickler import main; main()"
"""What that process does."""
_BAD_PICKLE = "holds more than tensors, or is damaged"


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


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a safetensors file, of which nothing else is read."""
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def load_tensors(
    path: Path, expected: "Mapping[str, tuple[dtype, tuple[int, ...]]] | None" = None, beside: str = ""
) -> "dict[str, Tensor]":
    """The tensors of a safetensors file. With `expected`, names, dtypes and shapes must be exactly those, checked first.

    Those whose names are not expected and match `beside`, a regular expression, are left in the file.
    """
    with _opened(path) as file:
        names = [name for name in file.keys() if name in (expected or ()) or not re.fullmatch(beside, name)]  # noqa: SIM118
        slices = {name: file.get_slice(name) for name in names}
        if expected is not None:
            _check_slices(path, slices, expected)
        return {name: file.get_tensor(name) for name in slices}


@contextlib.contextmanager
def tensor_slices(path: Path, expected: "Mapping[str, tuple[dtype, tuple[int, ...]]]") -> "Generator[dict[str, Any]]":
    """The tensors of a safetensors file, of which only what is asked for is read: `slices[name][:, 3:5]`.

    Names, dtypes and shapes must be exactly those expected.
    """
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        _check_slices(path, slices, expected)
        yield slices


def load_pickled_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> "dict[str, Tensor]":
    """The tensors of these names and shapes, as float32, that `torch.save` wrote, for a format that has no other file."""
    tensors, values = unpickled(path, max_bytes=8 * sum(math.prod(shape) for shape in shapes.values()) + MAX_JSON_BYTES)
    if odd := sorted((tensors.keys() | values.keys()) ^ shapes.keys()):
        raise ModelError(str(path), f"'{printable(odd[0])}' is missing or unknown; it is not of this config")
    for name, shape in shapes.items():
        if not (name in tensors and tensors[name].is_floating_point()):
            raise ModelError(str(path), f"'{name}' is no tensor of floating-point numbers")
        if tuple(tensors[name].shape) != shape:
            raise ModelError(
                str(path), f"tensor '{name}' has shape {list(tensors[name].shape)}; config.json needs {list(shape)}"
            )
    return {name: tensor.float() for name, tensor in tensors.items()}


def unpickled(path: Path, *, max_bytes: int) -> "tuple[dict[str, Tensor], dict[str, Any]]":
    """What `torch.save` wrote: the tensors, and the JSON values beside them, both by name; `a.b` of dictionaries in others.

    This process does not read the pickle: another one does (unpickler.py), without network, in bounded time and memory, and what
    it hands over is a safetensors file. Ask for it only where somebody said that the file may be read.

    Args:
        max_bytes: of the file, unpacked, and of its tensors.

    Raises:
        ModelError: it is no such file, is larger, or holds anything else; or the other process failed.
        ResourceError: the disk has no room for the tensors.
    """
    size = _check_pickle(path, max_bytes)
    with tempfile.TemporaryDirectory(prefix="mlsae-") as folder:
        if (free := free_bytes(Path(folder))) < size:
            raise ResourceError(folder, f"disk full: {size} bytes needed, {free} free; free some, or set TMPDIR")
        _unpickle(path, Path(folder), max_bytes)
        try:
            answer = read_json(Path(folder) / unpickler.ANSWER)
        except ConfigError as error:
            raise ModelError(str(path), f"holds plain values that cannot be read ({error.problem})") from error
        if "refused" in answer:
            raise ModelError(str(path), printable(answer["refused"]))
        return load_tensors(Path(folder) / unpickler.TENSORS), answer["values"]


def _check_pickle(path: Path, max_bytes: int) -> int:
    """The bytes of a file that `torch.save` wrote, by the sizes it says it has. A zip file is unpacked to more than it is."""
    if not path.is_file():
        raise ModelError(str(path), "no such file")
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(len(LEGACY_PICKLE))
    if start.startswith(b"PK") and size <= max_bytes:
        try:
            with zipfile.ZipFile(path) as archive:
                size = max(size, sum(max(entry.file_size, entry.compress_size) for entry in archive.infolist()))
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
            raise ModelError(str(path), f"{_BAD_PICKLE} ({type(error).__name__})") from error
    elif start != LEGACY_PICKLE and size <= max_bytes:
        raise ModelError(str(path), f"{_BAD_PICKLE}: torch.save did not write it")
    if size > max_bytes:
        raise ModelError(str(path), f"holds {size} bytes; at most {max_bytes} are read")
    return size


def _unpickle(path: Path, folder: Path, max_bytes: int) -> None:
    """Have another process read the file and answer in a folder; no variables or open files of ours are passed on to it."""
    package = str(Path(__file__).parents[1])
    command = [
        sys.executable,
        "-I",
        "-B",
        "-c",
        PICKLE_READER,
        str(path.resolve()),
        str(folder),
        str(max_bytes),
        package,
    ]
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS") if name in os.environ}
    seconds = PICKLE_SECONDS + max_bytes / PICKLE_BYTES_A_SECOND
    quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout"), subprocess.DEVNULL)
    try:
        with open(folder / "errors.txt", "w+") as errors:
            done = subprocess.run(command, env=kept, cwd=folder, timeout=seconds, check=False, stderr=errors, **quiet)
            errors.seek(0)
            kinds = re.findall(r"^(?:\w+\.)*(\w+Error)\b", errors.read(MAX_JSON_BYTES), re.MULTILINE)
    except subprocess.TimeoutExpired:
        raise ModelError(
            str(path), f"was not read within {seconds:.0f} s; torch.save did not write it like this"
        ) from None
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise ModelError(str(path), f"the process that read it was ended by {name}; it is damaged, or memory ran out")
    if done.returncode:
        raise ModelError(str(path), f"{_BAD_PICKLE} ({kinds[-1] if kinds else 'it asked for more than memory'})")


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


def _check_slices(
    path: Path, slices: Mapping[str, Any], expected: "Mapping[str, tuple[dtype, tuple[int, ...]]]"
) -> None:
    found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    wanted = {name: (_DTYPES[str(kind)], shape) for name, (kind, shape) in expected.items()}
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


def read_jsonl_from(path: Path, start: int) -> tuple[list[dict[str, Any]], int]:
    """The records that `JsonLines` wrote after a byte, and the byte where they end; a line cut short is left for later."""
    if path.stat().st_size - start > MAX_JSONL_BYTES:
        raise ConfigError(str(path), f"{path.stat().st_size} bytes; at most {MAX_JSONL_BYTES} are read")
    with open(path, "rb") as file:
        file.seek(start)
        whole, newline, _ = file.read(MAX_JSONL_BYTES).rpartition(b"\n")
    try:
        lines = whole.decode().split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), f"byte {start + error.start}: not UTF-8") from error
    return _objects(lines, path), start + len(whole) + len(newline)


def read_jsonl(path: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """The records of a file that `JsonLines` wrote, or those in its last bytes; a line cut short by a crash is left out."""
    size = path.stat().st_size if path.is_file() else 0
    if last_bytes is None or size <= last_bytes:
        text = _read_small(path, MAX_JSONL_BYTES, empty=True)
    else:
        with open(path, "rb") as file:
            file.seek(size - last_bytes)
            text = file.read().partition(b"\n")[2].decode()
    return _objects(text.split("\n")[:-1], path)


def _objects(lines: list[str], path: Path) -> list[dict[str, Any]]:
    records = [parse_json(line, path) for line in lines if line]
    if odd := [record for record in records if not isinstance(record, dict)]:
        raise ConfigError(str(path), f"holds {_kind(odd[0])} where a line is an object; not a file of ours")
    return records
