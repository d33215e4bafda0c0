"""One row for every latent, in a Parquet file that any table reader opens: where it lives, how often, what it says."""

import contextlib
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Float64, Int, Int32
from torch import Tensor

from mlsae import files
from mlsae.analysis.directions import Pairs
from mlsae.analysis.layers import LayerStatistics
from mlsae.analysis.summary import by_latent
from mlsae.analysis.vocabulary import Words
from mlsae.errors import ModelError

ENDS = ("promoted", "suppressed")
"""Columns of tokens, strongest first; NAME_logits beside them."""
WORDS = (*ENDS, "input_tokens", "output_tokens")
"""Columns of lists of tokens; those of NAME_logits hold lists of numbers, and the others numbers."""
GROUP_ROWS = 4096
"""Latents whose rows are read together."""
MAX_WORDS, MAX_ROW_BYTES = 64, 4096
"""Tokens in an entry and bytes in a row, of a file that others may have written."""


@dataclass(frozen=True)
class WordColumn:
    """Some tokens for every latent."""

    codes: Int32[np.ndarray, "latent top"]
    """Which of `strings`, strongest first; -1: there are no more."""
    strings: list[str]
    """Different ones, as a person reads them."""


# ---- writing -------------------------------------------------------------------------------------------------------


def save_latents(path: Path, statistics: LayerStatistics, pairs: Pairs | None, words: Words | None) -> None:
    """Write the table; a column NAME with an interval has NAME_low and NAME_high beside it. Undefined numbers are null."""
    save_columns(path, columns(statistics, pairs, words))


def save_columns(path: Path, table: dict[str, pa.Array]) -> None:
    """Write columns of that kind, in groups of rows that are read apart."""
    with files.replacing(path) as file:
        pq.write_table(pa.table(table), file, compression="zstd", row_group_size=GROUP_ROWS, write_page_checksum=True)


def columns(statistics: LayerStatistics, pairs: Pairs | None, words: Words | None) -> dict[str, pa.Array]:
    """The table's columns in order."""
    found = statistics.distribution()
    table = {"latent": pa.array(range(statistics.n_latents), pa.int32()), "n_events": _numbers(statistics.n_events)}
    for name, estimate in statistics.estimates(by_latent).items():
        table |= {name: _numbers(estimate.value), f"{name}_low": _numbers(estimate.low)}
        table[f"{name}_high"] = _numbers(estimate.high)
    for name in ("entropy", "n_active_layers", "birth", "death", "bimodality"):
        table[name] = _numbers(getattr(found, name))
    if pairs is not None:
        table |= {"max_cosine": _numbers(pairs.max_cosine), "neighbour": _numbers(pairs.neighbour)}
    if words is not None:
        for name in ENDS:
            table[name] = _strings(getattr(words.logits, name), words)
            table[f"{name}_logits"] = _lists(getattr(words.logits, f"{name}_logits"))
        for name, matches in (("input", words.input), ("output", words.output)):
            if matches is not None:
                table[f"{name}_tokens"] = _strings(matches.tokens, words)
                table[f"{name}_cosine"] = _numbers(matches.cosines[:, 0])
    return table


def _numbers(x: Tensor) -> pa.Array:
    return pa.array(x.numpy(), from_pandas=True)  # NaN is null


def _strings(tokens: Int[Tensor, "latent top"], words: Words) -> Any:
    return pa.array([[words.strings[token] for token in row] for row in tokens.tolist()], pa.list_(pa.string()))


def _lists(x: Float[Tensor, "latent top"]) -> Any:
    return pa.array(list(x.float().numpy()), pa.list_(pa.float32()))


# ---- reading -------------------------------------------------------------------------------------------------------


def read_numbers(path: Path, names: Iterable[str], n_latents: int) -> dict[str, Float64[np.ndarray, " latent"]]:
    """Those of these columns that there are, by latent; NaN where a number is undefined.

    Raises ModelError if this is no table of so many latents, or a damaged one.
    """
    with _opened(path, n_latents) as file:
        there = [name for name in names if name in file.schema_arrow.names]
        table = file.read(columns=list(dict.fromkeys(["latent", *there])), use_threads=False)
        if not np.array_equal(table["latent"].to_numpy(), np.arange(n_latents)):
            raise ValueError("its latents are not in order")
        return {name: table[name].to_numpy().astype(np.float64) for name in there}


def read_words(path: Path, name: str, n_latents: int) -> WordColumn | None:
    """A column of tokens; None if there is none. Raises ModelError as `read_numbers` does."""
    with _opened(path, n_latents, [name]) as file:
        if name not in file.schema_arrow.names:
            return None
        codes, known = [np.empty((0, 0), np.int32)], dict[str | None, int]()
        for group in range(file.num_row_groups):  # each has a dictionary of its own
            column = file.read_row_group(group, columns=[name], use_threads=False)[name].combine_chunks()
            sizes, entries = column.value_lengths().fill_null(0).to_numpy().astype(np.int64), column.flatten()
            if not pa.types.is_dictionary(entries.type):
                raise ValueError(f"its column {name} holds {entries.type}")
            if sizes.max(initial=0) > MAX_WORDS:
                raise ValueError(f"it names {sizes.max()} tokens for one latent")
            ids = [known.setdefault(word, len(known)) for word in entries.dictionary.to_pylist()]
            part = np.full((len(sizes), sizes.max(initial=0)), -1, np.int32)
            row = np.repeat(np.arange(len(sizes)), sizes)
            place = np.arange(len(row)) - np.repeat(sizes.cumsum() - sizes, sizes)
            part[row, place] = np.array([*ids, -1], np.int32)[entries.indices.fill_null(-1).to_numpy()]
            codes.append(part)
        width = max(part.shape[1] for part in codes)
        codes = [np.pad(part, [(0, 0), (0, width - part.shape[1])], constant_values=-1) for part in codes]
        return WordColumn(np.concatenate(codes), [str(word) for word in known])


def read_row(path: Path, latent: int, n_latents: int) -> dict[str, Any]:
    """Every column of one latent; None where undefined. Raises ModelError as `read_numbers` does."""
    with _opened(path, n_latents, WORDS) as file:
        group, first = 0, 0
        while latent >= first + (rows := file.metadata.row_group(group).num_rows):
            group, first = group + 1, first + rows
        row = file.read_row_group(group, use_threads=False).slice(latent - first, 1).to_pylist()[0]
        if row.get("latent") != latent:
            raise ValueError("its latents are not in order")
        return row


@contextlib.contextmanager
def _opened(path: Path, n_latents: int, words: Sequence[str] = ()) -> Generator[pq.ParquetFile]:
    """A table that others may have written or damaged; whatever shows that while it is read is a ModelError.

    `words` stay numbers of a dictionary: one long string that every row names must not fill memory.
    """
    if not path.is_file():
        raise ModelError(str(path), "no such file; `mlsae analyze` writes it")
    wanted = {f"{name}.list.element" for name in words}
    try:
        about = pq.read_metadata(path)
        codes = [leaf for i in range(about.num_columns) if (leaf := about.schema.column(i).path) in wanted]
        with pq.ParquetFile(path, metadata=about, page_checksum_verification=True, read_dictionary=codes) as file:
            size = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
            if about.num_rows != n_latents or "latent" not in file.schema_arrow.names:
                raise ValueError(f"it has {about.num_rows} rows, the SAE {n_latents} latents")
            for column in file.schema_arrow:
                if not _fits(column):
                    raise ValueError(f"its column {column.name} holds {column.type}")
            if size > n_latents * MAX_ROW_BYTES + (1 << 20):
                raise ValueError(f"its {n_latents} rows hold {size} bytes")
            yield file
    except (pa.ArrowException, ValueError, TypeError, LookupError, OSError, MemoryError) as error:
        raise ModelError(str(path), f"is not a whole table of latents ({str(error).splitlines()[0]})") from error


def _fits(column: pa.Field) -> bool:
    """Whether a column is of the type that its name says."""
    kind, entry = column.type, column.type.value_type if pa.types.is_list(column.type) else None
    if column.name in WORDS:
        return entry is not None and pa.types.is_string(getattr(entry, "value_type", entry))
    if column.name.endswith("_logits"):
        return entry is not None and pa.types.is_floating(entry)
    return any((pa.types.is_integer(kind), pa.types.is_floating(kind)))
