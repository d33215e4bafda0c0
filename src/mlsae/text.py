"""Files, folders and Hub datasets become documents, one string each; every document is in exactly one split.

Data is a text file (textfiles.py has the formats), a folder of them, or a Hub dataset `ID` or `ID:CONFIG`. Where a
folder's files (`train-00.jsonl`, `validation/a.txt`) or a dataset name their splits, those are used. Everything else, a
lone `train` split included, is divided by a hash of the document: 96 % train, 2 % validation, 2 % test, so that a
document stays in its split wherever it stands.
"""

import hashlib
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from huggingface_hub.errors import HTTPError

from mlsae.errors import DataError, Interrupted, did_you_mean, printable
from mlsae.textfiles import FORMATS, Row, is_readable, no_column, rows

SPLITS = ("train", "validation", "test")
PATIENCE_SECONDS = 30 * 60
"""How long a network that keeps failing is tried again."""

_SPLIT_NAME = re.compile(r"(train|training|validation|valid|val|dev|test)(?![a-z])", re.IGNORECASE)
_ALIASES = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_T = TypeVar("_T")


class Part(NamedTuple):
    """A file or a split of a Hub dataset: something to read from its first row to its last."""

    name: str
    rows: Callable[[], Iterator[Row]]
    size: int
    """Weight in the progress of the whole, bytes or rows."""


# ---- the source ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextSource:
    """Where text comes from: a file, a folder, or a Hub dataset, and which part of it."""

    data: str
    """A file, a folder, or a Hub dataset `ID` or `ID:CONFIG`."""
    split: str = "train"
    """A split the data has; train, validation or test where it has none; or all."""
    text_column: str = "text"
    """Column or key that holds the text; a .txt file needs none."""
    skip_bad_rows: bool = False
    """Count rows without usable text instead of stopping."""
    streaming: bool = False
    """Read a Hub dataset row by row instead of downloading it first."""

    def documents(self) -> "Documents":
        """The documents in their order, read afresh."""
        return Documents(self)

    def fingerprint(self) -> str:
        """SHA-256 that changes when the text may: files' paths, sizes and times, or the Hub commit, and our fields."""
        if os.path.exists(self.data):
            files, divided = self._chosen(_files_by_split(Path(self.data)))
            found = [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in chain(*files)]
        else:
            found, divided = _hub_commit(self.data), None
        identity = (found, divided, _canonical(self.split), self.text_column, self.skip_bad_rows)
        return hashlib.sha256(repr(identity).encode()).hexdigest()

    def named_splits(self) -> tuple[str, ...]:
        """The splits that the data itself names; nothing is read, of a Hub dataset at most downloaded."""
        if os.path.exists(self.data):
            return tuple(name for name in _files_by_split(Path(self.data)) if name)
        return tuple(_hub_splits(self.data, self.streaming))

    def parts(self) -> tuple[list[Part], bool]:
        """What to read, and whether its documents are still to be divided by hash."""
        if os.path.exists(self.data):
            files, divided = self._chosen(_files_by_split(Path(self.data)))
            return [Part(str(f), partial(rows, f, self.text_column), f.stat().st_size) for f in chain(*files)], divided
        datasets, divided = self._chosen(_hub_splits(self.data, self.streaming))
        return [_hub_part(self.data, dataset, self.text_column) for dataset in datasets], divided

    def _chosen(self, splits: Mapping[str, _T]) -> tuple[list[_T], bool]:
        """The named parts that make up the split, and whether it is only a share of their documents."""
        if self.split == "all":
            return list(splits.values()), False
        named = {n if _canonical(n) in splits else _canonical(n): part for n, part in splits.items() if n}
        wanted = self.split if self.split in named else _canonical(self.split)
        divided = named.keys() <= {"train"}  # a lone train split leaves nothing held out, so it is divided too
        has = SPLITS if divided else tuple(named)
        if wanted not in has:
            choice = f"splits are {', '.join(map(printable, has))}, or all{did_you_mean(wanted, has)}"
            raise DataError("split", f"no split '{self.split}' in '{self.data}'; {choice}")
        return (list((named or splits).values()), True) if divided else ([named[wanted]], False)


def _canonical(split: str) -> str:
    return _ALIASES.get(split, split)


class Documents(Iterator[str]):
    """The documents of a source, once through, counted on the way.

    Raises DataError at the end if there was none.
    """

    def __init__(self, source: TextSource):
        self.source = source
        self.n_rows = 0
        """Rows read so far, of every split."""
        self.n_skipped_rows = 0
        """Rows passed over for want of usable text."""
        self.fraction_read = 0.0
        """Share of the source read so far; stays 0 where its size is unknown."""
        self._documents = self._read()

    def __next__(self) -> str:
        return next(self._documents)

    def _read(self) -> Iterator[str]:
        parts, divided = self.source.parts()
        total, before, n_documents = sum(part.size for part in parts), 0, 0
        for part in parts:
            for row in part.rows():
                self.n_rows += 1
                if row.fraction is not None:
                    self.fraction_read = (before + row.fraction * part.size) / max(total, 1)
                text = self._text(part, row)
                if text is not None and (not divided or split_of(text) == _canonical(self.source.split)):
                    n_documents += 1
                    yield text
            before += part.size
        if not n_documents:
            self._refuse_empty()

    def _text(self, part: Part, row: Row) -> str | None:
        """The row's text; None if there is none to be used and such rows are only counted."""
        column = self.source.text_column
        if column not in row.columns and (self.n_rows == 1 or not self.source.skip_bad_rows):
            raise no_column(part.name, row.place, column, row.columns)
        text = row.columns.get(column)
        problem = _problem(text)
        if problem is None:
            return text
        if not self.source.skip_bad_rows:
            raise DataError(part.name, f"{row.place}: {problem}; repair the row, or pass it over with --skip-bad-rows")
        self.n_skipped_rows += 1
        return None

    def _refuse_empty(self) -> None:
        usable = self.n_rows - self.n_skipped_rows
        if not usable:
            bad = f" ({self.n_skipped_rows} bad rows skipped)" if self.n_skipped_rows else ""
            raise DataError(self.source.data, f"0 rows in split '{self.source.split}'{bad}; give it some text")
        share = f"0 of its {usable} documents fall into split '{self.source.split}'"
        raise DataError(self.source.data, f"{share}; give more documents, or --split all")


def split_of(text: str) -> str:
    """The split of a document in data that names none: train for 96 of 100, validation for 2, test for 2."""
    slot = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
    return "train" if slot < 96 else "validation" if slot < 98 else "test"


def _problem(text: Any) -> str | None:
    """Why this value is not a document, or None."""
    if not isinstance(text, str):
        return f"the text is {'null' if text is None else f'of type {type(text).__name__}'}, not a string"
    if "\0" in text:
        return "the text holds a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "the text holds a lone surrogate"
    return None


# ---- files ---------------------------------------------------------------------------------------------------------


def _files_by_split(data: Path) -> dict[str, list[Path]]:
    """The readable files under a path by the split their names say; a file on its own names none."""
    if data.is_file() and is_readable(data):
        return {"": [data]}
    if data.is_file():
        raise DataError("data", f"'{data}' is in no format we read; allowed are {FORMATS}; convert it to .jsonl, say")
    splits: dict[str, list[Path]] = {}
    for file in sorted(data.rglob("*")):
        inside = file.relative_to(data)
        hidden = any(name.startswith(".") for name in inside.parts)
        if file.is_file() and is_readable(file) and not hidden:
            splits.setdefault(_split_named(inside), []).append(file)
    if not splits:
        raise DataError("data", f"no text files in '{data}'; allowed are {FORMATS}; check the folder")
    return splits


def _split_named(inside: Path) -> str:
    """The split that a file's name begins with, or else the nearest folder's; "" if none does."""
    found = next((match for name in reversed(inside.parts) if (match := _SPLIT_NAME.match(name))), None)
    return _canonical(found[1].lower()) if found else ""


# ---- the Hub -------------------------------------------------------------------------------------------------------


def _hub_splits(data: str, streaming: bool) -> dict[str, Any]:
    """The splits of a Hub dataset, downloaded unless streaming."""
    found: Any = _ask_hub(_datasets().load_dataset, data, streaming=streaming)
    return {str(name): dataset for name, dataset in found.items()}


def _hub_commit(data: str) -> str:
    """The commit of a Hub dataset that would be read now."""
    builder = _ask_hub(_datasets().load_dataset_builder, data)
    return f"{data}@{builder.hash}"


def _datasets() -> Any:
    """The library, told to ask nobody but the Hub, to count no downloads, and to leave trying again to us."""
    import datasets
    import datasets.config

    settings: Any = datasets.config
    settings.USE_PARQUET_EXPORT = settings.HF_UPDATE_DOWNLOAD_COUNTS = False
    settings.STREAMING_READ_MAX_RETRIES = settings.STREAMING_OPEN_MAX_RETRIES = 1
    return datasets


def _ask_hub(ask: Callable[..., _T], data: str, **options: Any) -> _T:
    """Call a function of `datasets` with an id and its config; what goes wrong is one sentence."""
    if not _HUB_ID.fullmatch(data) or is_readable(Path(data)):
        raise DataError("data", f"'{data}': no such file or folder; check the path")
    name, _, config = data.partition(":")
    patience = _Patience(data)
    while True:
        try:
            return ask(name, config or None, **options)
        except (OSError, ValueError, RuntimeError, HTTPError) as error:
            if isinstance(error, ConnectionError) or not _may_pass(error):  # no network at all is said at once
                raise DataError("data", _hub_problem(data, error)) from error
            patience.wait(error, "before its first row")


def _hub_problem(data: str, error: Exception) -> str:
    """Why the Hub has nothing for us, in words."""
    from datasets.exceptions import DatasetNotFoundError

    reason = printable(str(error).partition("\n")[0])
    if "gated" in reason:
        return f"'{data}' is gated; accept its terms on the Hub, then run 'hf auth login'"
    if isinstance(error, DatasetNotFoundError):
        return f"'{data}' not found as a file, a folder, or a dataset on the Hub; check the name"
    if "OfflineMode" in reason or "ffline mode" in reason:
        download = f"'hf download --repo-type dataset {data.partition(':')[0]}'"
        return f"'{data}' is not in the local cache and offline mode is on; run {download} while online"
    if isinstance(error, ConnectionError):
        return f"'{data}' is no file or folder, and the Hub cannot be reached; check the name and the network"
    if "onfig name is missing" in reason:
        names = ", ".join(re.findall(r"'([^']+)'", str(error).partition("Example")[0]))
        return f"'{data}' has several configurations; add one, as in '{data}:CONFIG'; they are {printable(names)}"
    return f"'{data}' cannot be loaded ({reason})"


def _hub_part(data: str, dataset: Any, column: str) -> Part:
    size = getattr(dataset, "num_rows", None)  # a streamed dataset does not know
    if dataset.column_names and column in dataset.column_names:
        dataset = dataset.select_columns([column])
    return Part(data, partial(_hub_rows, data, dataset, size), size or 1)


def _hub_rows(data: str, dataset: Any, size: int | None) -> Iterator[Row]:
    """Its rows; when the network fails, reopened at the same row."""
    n_rows, failed_at, patience = 0, -1, _Patience(data)
    while True:
        try:
            for row in dataset.skip(n_rows) if n_rows else dataset:
                n_rows += 1
                yield Row(f"row {n_rows}", row, n_rows / size if size else None)
            return
        except (OSError, HTTPError) as error:
            if not _may_pass(error):
                raise DataError(
                    data, f"cannot be read on: {printable(str(error))}; {n_rows} rows read so far"
                ) from error
            if n_rows > failed_at:  # it had got on since
                failed_at, patience = n_rows, _Patience(data)
            patience.wait(error, f"after row {n_rows}")


def _may_pass(error: Exception) -> bool:
    """Whether trying again may help: a broken connection, too many requests, a server in trouble."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in (408, 429) or status >= 500
    return isinstance(error, ConnectionError | TimeoutError | HTTPError)


class _Patience:
    """Pauses that grow, for up to half an hour from when it was made."""

    def __init__(self, data: str):
        self._data, self._since, self._pause = data, time.monotonic(), 1.0

    def wait(self, error: Exception, where: str) -> None:
        """Sleep, or give up."""
        waited = time.monotonic() - self._since
        if waited >= PATIENCE_SECONDS:
            problem = f"the network failed for {waited:.0f} s {where}; run the same command again"
            raise Interrupted(self._data, problem) from error
        time.sleep(self._pause * random.uniform(0.5, 1))
        self._pause = min(2 * self._pause, 60.0)
