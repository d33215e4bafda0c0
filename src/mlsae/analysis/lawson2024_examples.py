"""The published data sets of activating contexts (`-examples`): an SQLite table, or the same columns in Parquet, in and out.

For each latent and layer the strongest tokens with a window of eight: four before, the token, three after. A published window can
be empty or of other text, because positions are counted through the batch and a start below 0 is not caught; those are left out.
"""

import contextlib
import json
import sqlite3
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from mlsae import files, untrusted
from mlsae.analysis.example_file import new_file, read_about, read_all
from mlsae.analysis.example_rows import About, Example, Settings
from mlsae.analysis.lawson2024_dists import PARTS, opened, row_groups
from mlsae.errors import ConfigError, ModelError, ResourceError, printable
from mlsae.reporting import bar
from mlsae.tokens import Tokenizer

COLUMNS = {"latent": int, "layer": int, "token_id": int, "token": str, "act": float}
LISTS = {"token_ids": int, "tokens": str, "acts": float}
"""Columns that hold a JSON list."""
NAMES = (*COLUMNS, *LISTS)
TABLE = """CREATE TABLE examples (id INTEGER PRIMARY KEY, latent INTEGER, layer INTEGER, token_id INTEGER, token TEXT, act REAL,
token_ids JSON, tokens JSON, acts JSON)"""
KEPT, WINDOW = 32, 4
"""Examples of a latent at a layer, and tokens to either side, as published."""
MAX_WINDOW = 64
"""Tokens of a window to read."""
MAX_ACT = 3e38
"""Of a float32."""
MAX_CELL_BYTES = 1 << 16
AT_ONCE = 4096
"""Examples to a group of rows."""


@dataclass(frozen=True)
class Imported:
    """What became of the rows of a published file."""

    n_examples: int
    n_left_out: int
    """Rows whose window is empty or does not hold the token."""

    def to_dict(self) -> dict[str, int]:
        """By name."""
        return asdict(self)


# ---- reading ---------------------------------------------------------------------------------------------------------


def import_examples(
    source: str | Path,
    path: str | Path,
    *,
    n_latents: int,
    layers: Sequence[int],
    tokenizer: Tokenizer,
    context_length: int = 2048,
    progress: bool = True,
) -> Imported:
    """Make a file of examples, which `read_examples` opens, of a published one: an SQLite file, or a folder with `data/`.

    The result has no places in a text and no sample, so it cannot be merged.

    Args:
        n_latents: of the SAE.
        layers: the model layers it reads: published rows count them.
        tokenizer: of the language model; refused if its tokens are others.
        context_length: positions in a sequence of the text.

    Raises ModelError where the source is damaged, or of another SAE or tokenizer.
    """
    source, path = Path(source), Path(path)
    about = About(
        Settings(len(layers), n_latents, context_length, n_top=KEPT, n_sampled=0, window=WINDOW, seed=0),
        tuple(layers),
        tokenizer.fingerprint,
    )
    n_examples = n_rows = 0
    with _source(source) as (total, found), new_file(path, about) as file:
        each = bar(((1, row) for row in found), total=total, desc="examples", progress=progress, unit="rows")
        rows = (_parsed(source, row, about) for row in each)
        group: list[Example] = []
        for cell, members in groupby(rows, key=lambda row: (row["latent"], row["layer"])):
            members = list(members)
            kept = [row for row in members if row["centre"] is not None]
            n_rows += len(members)
            if len(members) > KEPT:
                problem = f"latent {cell[0]}, layer {cell[1]}: {len(members)} examples; at most {KEPT} are kept"
                raise ModelError(str(source), problem)
            _check_tokens(source, kept[:1], tokenizer)
            group += [_example(row, rank, about) for rank, row in enumerate(kept)]
            if len(group) >= AT_ONCE:
                file.write_examples(group)
                n_examples, group = n_examples + len(group), []
        if group:
            file.write_examples(group)
    n_examples += len(group)
    return Imported(n_examples, n_rows - n_examples)


def _example(row: dict[str, Any], rank: int, about: About) -> Example:
    return Example(
        latent=row["latent"],
        layer=about.layers[row["layer"]],
        kind="top",
        rank=rank,
        value=float(row["act"]),
        quantile=None,
        block=None,
        position=None,
        document=None,
        tokens=row["token_ids"],
        activations=[float(act) for act in row["acts"]],
        centre=row["centre"],
    )


def _parsed(source: Path, cells: Sequence[Any], about: About) -> dict[str, Any]:
    """A row with its lists, and `centre`: where in them the token is, None if nowhere."""
    row = dict(zip(NAMES, cells, strict=True))
    for name in LISTS:
        row[name] = untrusted.parse_json(row[name], source) if isinstance(row[name], str) else None
    if (odd := _odd_column(row, about)) is not None:
        given = printable(str(cells[NAMES.index(odd)]))[:80]
        raise ModelError(str(source), f"column '{odd}' holds {given}; it is damaged, or of an SAE of other sizes")
    pairs, token = list(zip(row["token_ids"], row["acts"], strict=True)), (row["token_id"], row["act"])
    row["centre"] = None if token not in pairs else pairs.index(token)
    if pairs[WINDOW : WINDOW + 1] == [token]:
        row["centre"] = WINDOW  # also where an earlier one is the same, in the same activation
    return row


def _odd_column(row: dict[str, Any], about: About) -> str | None:
    """The first column that holds what it cannot."""
    for name, kind in COLUMNS.items():
        if not _is(row[name], kind):
            return name
    for name, kind in LISTS.items():
        if not _is_list(row[name], kind) or len(row[name]) != len(row["token_ids"]):
            return name
    limits = {"latent": about.settings.n_latents, "layer": about.settings.n_layers}
    outside = [name for name, limit in limits.items() if row[name] >= limit] + (["act"] if row["act"] <= 0 else [])
    return outside[0] if outside else None


def _is(value: Any, kind: type) -> bool:
    if kind is str:
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        return False
    return abs(value) <= MAX_ACT if kind is float else 0 <= value < 2**31


def _is_list(values: Any, kind: type) -> bool:
    return isinstance(values, list) and len(values) <= MAX_WINDOW and all(_is(value, kind) for value in values)


def _check_tokens(source: Path, rows: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> None:
    for row in rows:
        if row["tokens"] != (ours := tokenizer.pieces(row["token_ids"])):
            odd = next(i for i, pair in enumerate(zip(row["tokens"], ours, strict=True)) if pair[0] != pair[1])
            problem = (
                f"token {row['token_ids'][odd]} is {row['tokens'][odd]!r} there and {ours[odd]!r} to this tokenizer"
            )
            raise ModelError(str(source), f"{printable(problem)}; give the language model that it was made with")


@contextlib.contextmanager
def _source(path: Path) -> Generator[tuple[int, Iterator[Sequence[Any]]]]:
    """The number of rows and the rows of NAMES, by latent and layer, the strongest first."""
    if not path.is_dir():
        with _database(path) as connection:
            order = f"SELECT {', '.join(NAMES)} FROM examples ORDER BY latent, layer, act DESC, id"
            (total,) = connection.execute("SELECT COUNT(*) FROM examples").fetchone()
            yield total, connection.execute(order)
        return
    parts = sorted(path.glob(PARTS))
    if not parts:
        raise ModelError(str(path), f"holds no {PARTS}; name a copy of a data set of examples, or an SQLite file")
    rows: list[tuple[Any, ...]] = []
    for part in parts:
        with opened(part) as file:
            for table in row_groups(file):
                if not {*NAMES} <= {*table.column_names} <= {*NAMES, "id"}:
                    raise ModelError(str(part), "has other columns than examples have")
                rows += zip(*(table[name].to_pylist() for name in NAMES), strict=True)
    try:
        rows.sort(key=lambda row: (row[0], row[1], -row[4]))
    except TypeError as error:
        raise ModelError(str(path), f"its latents, layers or activations are no numbers ({error})") from error
    yield len(rows), iter(rows)


@contextlib.contextmanager
def _database(path: Path) -> Generator[sqlite3.Connection]:
    """An SQLite file that others wrote, read only: its table must be a plain one of our columns."""
    if not path.is_file():
        raise ModelError(str(path), "no such file")
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
        ) as connection:
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_CELL_BYTES)
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA cell_size_check = ON")
            pages, size = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
            if path.stat().st_size < pages * size:
                raise sqlite3.DatabaseError(f"{path.stat().st_size} of {pages * size} bytes are there")
            made = connection.execute(
                "SELECT sql FROM sqlite_schema WHERE type = 'table' AND name = 'examples'"
            ).fetchone()
            names = [row[1] for row in connection.execute("PRAGMA table_info(examples)")]
            if made is None or not made[0].upper().startswith("CREATE TABLE") or not {*NAMES, "id"} <= {*names}:
                raise ModelError(str(path), f"holds no table 'examples' with columns {', '.join(('id', *NAMES))}")
            yield connection
    except sqlite3.Error as error:
        raise ModelError(str(path), f"is not a whole SQLite file of examples ({error})") from error


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_examples(source: str | Path, path: str | Path, tokenizer: Tokenizer, *, progress: bool = True) -> int:
    """An SQLite file of the published columns, of the strongest examples in a file of ours; returns how many.

    Windows are of four tokens to both sides, as far as the document goes: published ones lack the last.

    Raises ModelError where the tokenizer is another than the examples were made with.
    """
    path, about = Path(path), read_about(source)
    if tokenizer.fingerprint != about.tokenizer_fingerprint:
        raise ModelError(str(source), "its tokens are of another tokenizer; give the language model it was made with")
    if about.settings.window < WINDOW:
        raise ConfigError("window", f"{about.settings.window} tokens to a side in {source}; {WINDOW} are written")
    parts, n_written = ((len({example.latent for example in part}), part) for part in read_all(source)), 0
    insert = f"INSERT INTO examples ({', '.join(NAMES)}) VALUES ({', '.join('?' * len(NAMES))})"
    piece, text = cache(lambda i: tokenizer.pieces([i])[0]), cache(lambda i: tokenizer.text([i]))
    with files.replacing(path) as file, _new_database(Path(file.name)) as connection:
        for part in bar(parts, total=about.settings.n_latents, desc="examples", progress=progress, unit="latents"):
            rows = [
                _row(example, about, piece, text) for example in part if example.kind == "top" and example.rank < KEPT
            ]
            connection.executemany(insert, rows)
            n_written += len(rows)
    return n_written


def _row(example: Example, about: About, piece: Callable[[int], str], text: Callable[[int], str]) -> tuple[Any, ...]:
    near = slice(max(0, example.centre - WINDOW), example.centre + WINDOW + 1)
    ids = example.tokens[near]
    token_id = example.tokens[example.centre]
    lists: Iterable[Any] = (ids, [piece(i) for i in ids], example.activations[near])
    layer = about.layers.index(example.layer)
    one = (example.latent, layer, token_id, text(token_id), example.value)
    return (*one, *(json.dumps(values, allow_nan=False) for values in lists))


@contextlib.contextmanager
def _new_database(path: Path) -> Generator[sqlite3.Connection]:
    """A database in a file that is synced and renamed by whoever opened it, and so needs no journal."""
    try:
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("PRAGMA journal_mode = OFF")
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute(TABLE)
            yield connection
    except sqlite3.Error as error:
        raise ResourceError(str(path), f"cannot be written ({error}); free some space and run again") from error
