"""One text file becomes rows: .txt, .jsonl, .csv, .parquet and .arrow, and .zst or .gz of these, in bounded memory.

A file may be damaged, cut short or hostile: what cannot be read is a DataError with file, line and byte and the rows
read so far, and a compressed file may hold no more than text could. The most held in memory is a line or a passage.
"""

import csv
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlsae.errors import DataError, printable

SEPARATOR_LINE = "<|endoftext|>"
SEPARATOR_WITHIN = 1_000_000
"""Characters of a .txt file in which a separator line must stand if it is to be cut at separators."""
MIN_PASSAGE, MAX_PASSAGE = 2_000, 20_000
"""Characters after which a .txt file without separators is cut at a blank line, and at any line end."""
MAX_LINE_BYTES = 64 << 20
MAX_EXPANSION, MAX_EXPANDED_BYTES = 200, 20 * 10**9
"""A compressed file may hold this many times its own size (text shrinks 3 to 5 times), and this many bytes."""
SMALL_BYTES, SLACK_BYTES = 1 << 20, 64 << 20
"""Whatever its ratio, a compressed file may hold this much, and a part of one that much."""


ROWS = 16
"""Rows of a table decoded at once, of which each may be long."""


class Row(NamedTuple):
    """One row of a source and where it stands."""

    place: str
    columns: Mapping[str, Any]
    fraction: float | None
    """Share of its file or dataset that is read once this row is; None: unknown."""


class _Damage(Exception):
    """The file cannot be read on from here; says where and why."""


def rows(path: Path, column: str) -> Iterator[Row]:
    """The rows of one file; a .txt file's passages stand in a column of the name asked for."""
    import pyarrow as pa
    from zstandard import ZstdError

    n_rows = 0
    try:
        with open(path, "rb", buffering=0) as file, _Input(path, file) as source:
            for row in _READERS[format_of(path)](source, column):
                n_rows += 1
                yield row
    except (_Damage, OSError, zlib.error, ZstdError, pa.ArrowException, csv.Error, UnicodeDecodeError) as error:
        problem = f"{printable(str(error))}; {n_rows} rows read so far; repair the file or get it again"
        raise DataError(str(path), problem) from error


def format_of(path: Path) -> str:
    """The suffix that tells how a file is read, without that of its compression."""
    name = path.with_suffix("") if path.suffix.lower() in _DECOMPRESSORS else path
    return name.suffix.lower()


def is_readable(path: Path) -> bool:
    """True for a file name in one of `FORMATS`."""
    return format_of(path) in _READERS


def no_column(name: str, place: str, column: str, columns: Iterable[str]) -> DataError:
    """The error for a text column that is not there."""
    others = ", ".join(f"'{printable(str(other))}'" for other in columns) or "none"
    return DataError(name, f"{place}: no column '{column}'; columns are {others}; use --text-column")


class _Input:
    """One open file: its bytes, expanded if they are compressed, and how far they are read."""

    def __init__(self, path: Path, file: io.FileIO):
        self.path, self.file = path, file
        self.size = max(path.stat().st_size, 1)
        expand = _DECOMPRESSORS.get(path.suffix.lower())
        self.stream = io.BufferedReader(_Expanded(self, expand) if expand else file, 1 << 20)

    def __enter__(self) -> "_Input":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    @property
    def fraction(self) -> float:
        """Share of the file's own bytes read so far."""
        return self.file.tell() / self.size

    def check_expansion(self, n_bytes: int, n_read: int | None = None) -> None:
        """Refuse a file of which `n_bytes` were expanded (from `n_read`) and that is far more than text can shrink."""
        of_what_was_read = max(SLACK_BYTES, MAX_EXPANSION * (self.size if n_read is None else n_read))
        if n_bytes > min(MAX_EXPANDED_BYTES, max(SMALL_BYTES, MAX_EXPANSION * self.size), of_what_was_read):
            limit = f"at most {MAX_EXPANSION} times its size and {MAX_EXPANDED_BYTES / 1e9:g} GB are read"
            raise DataError(str(self.path), f"expands to {n_bytes} bytes or more; {limit}; expand it yourself first")

    def lines(self) -> Iterator[tuple[str, str]]:
        """The place of each line, in words, and the line: UTF-8 without NUL."""
        number, offset = 0, 0
        while line := self.stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            yield f"line {number}, byte {offset}", _decoded(line, number, offset)
            offset += len(line)


def _decoded(line: bytes, number: int, offset: int) -> str:
    if len(line) > MAX_LINE_BYTES:
        raise _Damage(f"line {number}, byte {offset}: longer than {MAX_LINE_BYTES} bytes")
    if (nul := line.find(b"\0")) >= 0:
        raise _Damage(f"line {number}, byte {offset + nul}: NUL, so this is no plain text")
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise _Damage(f"line {number}, byte {offset + error.start}: not UTF-8") from error


class _Expanded(io.RawIOBase):
    """The bytes inside a compressed file; refuses a bomb, and an end that comes too early."""

    def __init__(self, source: _Input, new_decompressor: Callable[[], Any]):
        self._source, self._new = source, new_decompressor
        self._decompressor = new_decompressor()
        self._waiting, self._ready, self._n_bytes = b"", memoryview(b""), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and self._expand():
            pass
        n = min(len(buffer), len(self._ready))
        buffer[:n], self._ready = self._ready[:n], self._ready[n:]
        return n

    def _expand(self) -> bool:
        """Expand a little more; False at the end. Small bites, because 4 kB of a bomb can become 128 MB."""
        bite = self._waiting or self._source.file.read(4096)
        if not bite and self._decompressor.eof:
            return False
        if not bite:
            raise _Damage("the compressed data ends too early")
        if self._decompressor.eof:  # a file may be several compressed ones end to end
            self._decompressor = self._new()
        self._ready = memoryview(self._decompressor.decompress(bite))
        self._waiting = self._decompressor.unused_data
        self._n_bytes += len(self._ready)
        self._source.check_expansion(self._n_bytes, self._source.file.tell())
        return True


def _zstd() -> Any:
    import zstandard

    # zstandard's stream_reader takes a file cut short for its end; this object says whether the end was seen.
    return zstandard.ZstdDecompressor().decompressobj()


def _gzip() -> Any:
    return zlib.decompressobj(wbits=31)  # 31: with a gzip header


# ---- formats -------------------------------------------------------------------------------------------------------


def _txt_rows(source: _Input, column: str) -> Iterator[Row]:
    """Passages between separator lines or, in a file that shows none at its start, of some thousand characters."""
    separated, lines = _find_separator(source.lines())
    passage: list[str] = []
    length, place = 0, ""
    for here, line in lines:
        blank, separator = not line.strip(), separated and line.strip() == SEPARATOR_LINE
        full = length >= MAX_LINE_BYTES if separated else length >= (MIN_PASSAGE if blank else MAX_PASSAGE)
        if separator or full:
            yield from _passage(passage, Row(place, {}, source.fraction), column)
            passage, length = [], 0
        if not separator and (passage or not blank):
            place = place if passage else here
            passage.append(line)
            length += len(line)
    yield from _passage(passage, Row(place, {}, source.fraction), column)


def _find_separator(lines: Iterator[tuple[str, str]]) -> tuple[bool, Iterator[tuple[str, str]]]:
    """Whether a separator line stands near the start, and the lines from the start again."""
    head, length = [], 0
    for place, line in lines:
        head.append((place, line))
        length += len(line)
        if line.strip() == SEPARATOR_LINE:
            return True, itertools.chain(head, lines)
        if length > SEPARATOR_WITHIN:
            break
    return False, itertools.chain(head, lines)


def _passage(lines: list[str], row: Row, column: str) -> Iterator[Row]:
    if text := "".join(lines).rstrip():
        yield row._replace(columns={column: text})


def _jsonl_rows(source: _Input, column: str) -> Iterator[Row]:
    for place, line in source.lines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _Damage(f"{place}: not JSON ({getattr(error, 'msg', 'nested too deep')})") from error
        if not isinstance(row, dict):
            raise _Damage(f"{place}: not a JSON object with the text under '{column}'")
        yield Row(place, row, source.fraction)


def _csv_rows(source: _Input, column: str) -> Iterator[Row]:
    csv.field_size_limit(MAX_LINE_BYTES)  # the default refuses documents over 128 kB
    for number, row in enumerate(csv.DictReader(line for _, line in source.lines()), 1):
        yield Row(f"row {number}", row, source.fraction)


def _parquet_rows(source: _Input, column: str) -> Iterator[Row]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(source.path) as file:
        _check_column(source, column, file.schema_arrow)
        batches = file.iter_batches(batch_size=ROWS, columns=[column])
        yield from _column_rows(source, column, batches, file.metadata.num_rows)


def _arrow_rows(source: _Input, column: str) -> Iterator[Row]:
    """What `datasets` keeps: an Arrow stream."""
    import pyarrow as pa

    with pa.memory_map(str(source.path)) as file, pa.ipc.open_stream(file) as stream:
        _check_column(source, column, stream.schema)
        table = stream.read_all()  # a view of the map, not a copy
        yield from _column_rows(source, column, table.select([column]).to_batches(ROWS), table.num_rows)


def _check_column(source: _Input, column: str, schema: Any) -> None:
    if column not in schema.names:
        raise no_column(str(source.path), "schema", column, schema.names)


def _column_rows(source: _Input, column: str, batches: Iterable[Any], total: int) -> Iterator[Row]:
    """The values of the only column of Arrow batches."""
    n_rows, n_bytes = 0, 0
    for batch in batches:
        n_bytes += batch.nbytes
        source.check_expansion(n_bytes)
        for value in batch.column(0).to_pylist():
            n_rows += 1
            yield Row(f"row {n_rows}", {column: value}, n_rows / total)


_DECOMPRESSORS: dict[str, Callable[[], Any]] = {".zst": _zstd, ".gz": _gzip}
_READERS: dict[str, Callable[[_Input, str], Iterator[Row]]] = {
    ".txt": _txt_rows,
    ".jsonl": _jsonl_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}
FORMATS = f"{', '.join(_READERS)}, also .zst or .gz of them"
"""What can be read, in words."""
