"""Examples on disk: one Parquet file sorted by latent, of which a single latent is read in milliseconds."""

import contextlib
from bisect import bisect_left, bisect_right
from collections.abc import Generator, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float16, Float32, Int64
from pydantic import TypeAdapter

from mlsae import files
from mlsae.analysis.example_rows import KINDS, About, Example, Rows, Text
from mlsae.errors import ConfigError, ModelError

MAX_GROUP_ROWS, MAX_GROUP_BYTES = 1 << 20, 1 << 28
"""Of a file that others may have written."""
PLACE = ("block", "document", "position")
"""Columns that imported examples leave empty."""
KEY = b"mlsae.examples"
"""Where in the file's metadata `About` stands."""
N_PLACES = 2**32
"""Places that are told apart: block x context_length + position, 4.3 billion tokens."""

_LISTS = {
    "tokens": pa.list_(pa.field("element", pa.int32())),
    "activations": pa.list_(pa.field("element", pa.float32())),
}
SCHEMA = pa.schema(
    {
        "latent": pa.int32(),
        "layer": pa.int16(),
        "kind": pa.dictionary(pa.int8(), pa.string()),
        "rank": pa.int16(),
        "value": pa.float32(),
        "quantile": pa.int8(),
        "block": pa.int64(),
        "document": pa.int64(),
        "position": pa.int32(),
        **_LISTS,
        "centre": pa.int16(),
    }
)


_ABOUT = TypeAdapter(About)


# ---- writing -------------------------------------------------------------------------------------------------------


class Writer:
    """Writes groups of rows, in the order they come."""

    def __init__(self, file: pq.ParquetWriter, about: About):
        self._file, self._about = file, about

    def write(self, rows: Rows, text: Text) -> None:
        """Add one group."""
        if not len(rows.latent):
            return
        window = self._about.settings.window
        tokens, inside, document = text.around(rows.place, window)
        activations = rows.windows.astype(np.float32)
        activations[:, window] = rows.value
        block, position = np.divmod(rows.place, text.length)
        ends = np.r_[0, inside.sum(1).cumsum()]
        columns = {
            "latent": rows.latent,
            "layer": np.array(self._about.layers)[rows.layer],
            "kind": pa.DictionaryArray.from_arrays(rows.kind.astype(np.int8), list(KINDS)),
            "rank": rows.rank,
            "value": rows.value,
            "quantile": pa.array(rows.quantile.astype(np.int8), mask=rows.kind == KINDS.index("top")),
            "block": block,
            "document": document,
            "position": position,
            "tokens": _lists("tokens", ends, tokens[inside]),
            "activations": _lists("activations", ends, activations[inside]),
            "centre": inside[:, :window].sum(1),
        }
        table = pa.Table.from_pydict(columns, schema=self._file.schema)
        self._file.write_table(table, row_group_size=MAX_GROUP_ROWS)

    def write_examples(self, examples: Sequence[Example]) -> None:
        """Add one group of examples that carry their own context: imported ones."""
        table = pa.Table.from_pylist([vars(example) for example in examples], schema=self._file.schema)
        self._file.write_table(table, row_group_size=MAX_GROUP_ROWS)


def _lists(name: str, ends: np.ndarray, entries: np.ndarray) -> pa.Array:
    kind = SCHEMA.field(name).type
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(entries, kind.value_type), type=kind)


@contextlib.contextmanager
def new_file(path: Path, about: About) -> Generator[Writer]:
    """A file to write groups of rows to; on a clean exit it takes the place of `path`, durably."""
    schema = SCHEMA.with_metadata({KEY: _ABOUT.dump_json(about)})
    options: dict[str, Any] = {"compression": "zstd", "write_statistics": ["latent"], "write_page_checksum": True}
    with files.replacing(path) as file, pq.ParquetWriter(file, schema, **options) as writer:
        yield Writer(writer, about)


# ---- reading -------------------------------------------------------------------------------------------------------


def read_examples(path: str | Path, latent: int, layer: int | None = None) -> list[Example]:
    """The examples of a latent, at one of the model's layers or at all: by layer, the strongest first, then the sample.

    Raises:
        ConfigError: there is no such latent or layer.
        ModelError: this is no file of examples, or it is damaged.
    """
    with _opened(path) as (file, about):
        if not 0 <= latent < about.settings.n_latents:
            raise ConfigError("latent", f"{latent}; {path} holds latents 0 to {about.settings.n_latents - 1}")
        if layer is not None and layer not in about.layers:
            raise ConfigError("layer", f"{layer}; {path} holds layers {', '.join(map(str, about.layers))}")
        table = _read(file, _groups_with(file.metadata, latent))
        chosen = table["latent"].to_numpy() == latent
        if layer is not None:
            chosen &= table["layer"].to_numpy() == layer
        return _examples(table.filter(pa.array(chosen)))


def read_about(path: str | Path) -> About:
    """What a file of examples says of itself."""
    with _opened(path) as (_, about):
        return about


def read_rows(path: str | Path) -> Iterator[Rows]:
    """All rows of a file, a group at a time, as they were given to `Writer.write`, less what stood beyond the text."""
    with _opened(path) as (file, about):
        for group in range(file.num_row_groups):
            yield _rows(_read(file, [group]), about)


def read_all(path: str | Path) -> Iterator[list[Example]]:
    """All examples of a file, a group of rows at a time."""
    with _opened(path) as (file, _):
        for group in range(file.num_row_groups):
            yield _examples(_read(file, [group]))


def read_peaks(path: str | Path) -> Iterator[tuple[Int64[np.ndarray, " peak"], Int64[np.ndarray, " peak"]]]:
    """Latents, and the token on which each is most active at a layer, for all layers; a group of rows at a time."""
    with _opened(path) as (file, _):
        for group in range(file.num_row_groups):
            table = _read(file, [group])
            kind = table["kind"].combine_chunks()
            strongest = np.array([name == KINDS[0] for name in kind.dictionary.to_pylist()], bool)
            first = (table["rank"].to_numpy() == 0) & strongest[kind.indices.to_numpy()]
            sizes = _sizes(table, "tokens")
            at = sizes.cumsum() - sizes + table["centre"].to_numpy()
            latent, token = table["latent"].to_numpy(), _entries(table, "tokens")[at]
            yield latent[first].astype(np.int64), token[first].astype(np.int64)


@contextlib.contextmanager
def _opened(path: str | Path) -> Generator[tuple[pq.ParquetFile, About]]:
    """A Parquet file that others may have written or damaged; whatever shows that while it is read is a ModelError."""
    if not Path(path).is_file():
        raise ModelError(str(path), "no such file; `mlsae analyze` writes it")
    try:
        now = Path(path).stat()
        about = _metadata(Path(path), (now.st_mtime_ns, now.st_size, now.st_ino))
        with pq.ParquetFile(path, metadata=about, page_checksum_verification=True) as file:
            yield file, _about(file.schema_arrow)
    except (pa.ArrowException, ValueError, OSError, MemoryError) as error:
        raise ModelError(str(path), f"is not a whole file of examples ({str(error).splitlines()[0]})") from error


@lru_cache(maxsize=1)
def _metadata(path: Path, changed: tuple[int, int, int]) -> pq.FileMetaData:
    """Kept until the file changes: of a large one it takes longer to read than a latent."""
    return pq.read_metadata(path)


def _about(schema: pa.Schema) -> About:
    if not schema.equals(SCHEMA) or KEY not in (schema.metadata or {}):
        raise ValueError("it has other columns")
    try:
        about = _ABOUT.validate_json(schema.metadata[KEY])
    except ConfigError as error:
        raise ValueError(str(error)) from error
    if len(set(about.layers)) != about.settings.n_layers:
        raise ValueError("its layers are not n_layers different ones")
    return about


def _read(file: pq.ParquetFile, groups: Sequence[int]) -> pa.Table:
    """Groups of rows, refused if they are too large or do not make sense."""
    for group in map(file.metadata.row_group, groups):
        if group.num_rows > MAX_GROUP_ROWS or group.total_byte_size > MAX_GROUP_BYTES:
            raise ValueError(f"{group.num_rows} rows of {group.total_byte_size} bytes stand in one group")
    table = file.read_row_groups(list(groups), use_threads=False).combine_chunks()
    tokens, activations = (_sizes(table, name) for name in _LISTS)
    centre = table["centre"].to_numpy()
    holes = any(table[name].null_count for name in SCHEMA.names if name not in ("quantile", *PLACE))
    if holes or (tokens != activations).any() or ((centre < 0) | (centre >= tokens)).any():
        raise ValueError("its contexts are not whole")
    return table


def _groups_with(metadata: pq.FileMetaData, latent: int) -> range:
    """The groups of rows that may hold a latent: they are sorted by it."""

    def bound(group: int, name: str) -> int:
        statistics = metadata.row_group(group).column(SCHEMA.names.index("latent")).statistics
        if statistics is None or not statistics.has_min_max:
            raise ValueError("it does not say which latents are where")
        return getattr(statistics, name)

    groups = range(metadata.num_row_groups)
    first = bisect_left(groups, latent, key=lambda group: bound(group, "max"))
    return range(first, bisect_right(groups, latent, lo=first, key=lambda group: bound(group, "min")))


def _sizes(table: pa.Table, name: str) -> Int64[np.ndarray, " row"]:
    """The length of every row's list."""
    return table[name].combine_chunks().value_lengths().to_numpy().astype(np.int64)


def _entries(table: pa.Table, name: str) -> np.ndarray:
    """The lists of all rows, one after another."""
    return table[name].combine_chunks().flatten().to_numpy()


def _examples(table: pa.Table) -> list[Example]:
    columns = {name: table[name].to_pylist() for name in SCHEMA.names if name not in _LISTS}
    ends = _sizes(table, "tokens").cumsum().tolist()
    for name in _LISTS:
        entries = _entries(table, name).tolist()
        columns[name] = [entries[start:end] for start, end in pairwise([0, *ends])]
    return [Example(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]


def _rows(table: pa.Table, about: About) -> Rows:
    settings, width = about.settings, 2 * about.settings.window + 1
    if any(table[name].null_count for name in PLACE):
        raise ValueError("its examples, imported ones, have no places in a text; they cannot be merged")
    latent, layer, rank, block, position, centre = (
        table[name].to_numpy().astype(np.int64) for name in ("latent", "layer", "rank", "block", "position", "centre")
    )
    value, sizes = table["value"].to_numpy(), _sizes(table, "tokens")
    row = np.repeat(np.arange(len(latent)), sizes)
    column = np.arange(len(row)) - np.repeat(sizes.cumsum() - sizes + centre, sizes) + settings.window
    known = layer[:, None] == np.array(about.layers)
    right = [
        known.any(1),
        latent < settings.n_latents,
        position < settings.context_length,
        value > 0,
        np.isfinite(value),
    ]
    right += [x >= 0 for x in (latent, block, position)] + [block < N_PLACES // settings.context_length]
    if not np.logical_and.reduce(right).all() or ((column < 0) | (column >= width)).any():
        raise ValueError("it names places, layers or latents that there are not")
    windows = np.zeros((len(latent), width), np.float16)
    windows[row, column] = to_half(_entries(table, "activations"))
    kind = np.array([KINDS.index(kind) for kind in table["kind"].to_pylist()], np.int64)
    quantile = table["quantile"].fill_null(0).to_numpy().astype(np.int64)
    place = block * settings.context_length + position
    return Rows(latent, known.argmax(1), kind, rank, quantile, place, value, windows)


def to_half(x: Float32[np.ndarray, "*axes"]) -> Float16[np.ndarray, "*axes"]:
    """Half precision, with the largest there is for what is larger."""
    return np.minimum(x, np.finfo(np.float16).max).astype(np.float16)
