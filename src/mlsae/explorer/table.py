"""All latents as columns: filtered, sorted and cut into pages in milliseconds, and found by the tokens they go with."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from mlsae.analysis.example_file import read_peaks
from mlsae.analysis.latents import WordColumn, read_numbers, read_words
from mlsae.errors import ModelError
from mlsae.explorer.answers import QueryFlag, QueryIndex, QueryNumber
from mlsae.explorer.kept import named
from mlsae.explorer.statistics import Statistics

if TYPE_CHECKING:
    from mlsae.explorer.library import Library

COLUMNS = ("n_events", "rate", "centre_of_mass", "std", "effective_layers", "birth", "death", "max_cosine", "neighbour")
"""Of latents.parquet, that are sorted and filtered by; `rate` is called density here, and `max_cosine` may be absent."""
Sort = Literal[
    "latent", "n_events", "density", "centre_of_mass", "std", "effective_layers", "birth", "death", "max_cosine"
]
RANGES = {
    "centre": "centre_of_mass",
    "birth": "birth",
    "death": "death",
    "spread": "effective_layers",
    "density": "density",
}
"""The column that NAME_min and NAME_max of a request bound, both included."""
N_SHOWN = 3
"""Promoted tokens in a row."""

Bound = Annotated[QueryNumber | None, BeforeValidator(lambda text: None if text == "" else text)]
"""A number, or nothing at all as an empty field of a form sends."""


class SearchRequest(BaseModel):
    """The query of a search, in which everything is text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    centre_min: Bound = None
    centre_max: Bound = None
    birth_min: Bound = None
    birth_max: Bound = None
    death_min: Bound = None
    death_max: Bound = None
    spread_min: Bound = None
    """Of effective layers."""
    spread_max: Bound = None
    density_min: Bound = None
    """Of the share of tokens at which a latent is active at any layer."""
    density_max: Bound = None
    token: Annotated[str, Field(max_length=100)] = ""
    """In the token on which the latent is most active at some layer; upper and lower case are the same."""
    promoted: Annotated[str, Field(max_length=100)] = ""
    """In one of the tokens it promotes."""
    sort: Sort = "centre_of_mass"
    descending: QueryFlag = False
    offset: Annotated[QueryIndex, Field(le=10**10)] = 0
    limit: Annotated[QueryIndex, Field(ge=1, le=200)] = 50


@dataclass(frozen=True, eq=False)
class Table:
    """What latents.parquet says of all latents; depth in layer ids."""

    columns: dict[str, Float64[np.ndarray, " latent"]]
    """By the names of `Sort` and `neighbour`; NaN where undefined. Those that the file leaves out are not there."""
    promoted: WordColumn | None
    """The tokens that each promotes, if the file has any."""
    problem: str | None
    """Why it has none, if they are damaged."""
    _orders: dict[tuple[str, bool], Int32[np.ndarray, " latent"]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, statistics: Statistics) -> "Table":
        """From latents.parquet. Raises ModelError if it is of another SAE, or damaged."""
        found = read_numbers(path, COLUMNS, statistics.n_latents)
        if odd := [name for name in COLUMNS[:7] if name not in found]:
            raise ModelError(str(path), f"has no column {odd[0]}; analyze again")
        found["density"] = found.pop("rate")
        for name in ("birth", "death"):
            found[name] = np.where(found[name] < 0, np.nan, found[name])  # of a latent never active
        for name in ("centre_of_mass", "birth", "death"):
            found[name] = statistics.on_layers(found[name])
        found["latent"] = np.arange(statistics.n_latents, dtype=np.float64)
        try:
            return cls(found, read_words(path, "promoted", statistics.n_latents), None)
        except ModelError as error:
            return cls(found, None, f"{named(error)}: {error.problem}")

    def promoting(self, text: str) -> Bool[np.ndarray, " latent"]:
        """Which latents promote a token with this text in it."""
        if self.promoted is None:
            return np.zeros(len(self.columns["latent"]), bool)
        known = np.array([*_holding(text, self._lower), False])
        return known[self.promoted.codes].any(1)

    @cached_property
    def _lower(self) -> list[str]:
        return [] if self.promoted is None else [string.casefold() for string in self.promoted.strings]

    def words(self, latent: int, n: int = N_SHOWN) -> list[str]:
        """The tokens that a latent promotes most."""
        if self.promoted is None:
            return []
        return [self.promoted.strings[code] for code in self.promoted.codes[latent, :n].tolist() if code >= 0]

    def chosen(self, request: SearchRequest) -> Bool[np.ndarray, " latent"]:
        """Which latents lie within all ranges; one for which a number is undefined lies in none."""
        keep = np.ones(len(self.columns["latent"]), bool)
        for name, column in RANGES.items():
            low, high = (getattr(request, f"{name}_{end}") for end in ("min", "max"))
            if low is not None:
                keep &= self.columns[column] >= low
            if high is not None:
                keep &= self.columns[column] <= high
        return keep

    def sorted(self, keep: Bool[np.ndarray, " latent"], by: str, descending: bool) -> Int32[np.ndarray, " row"]:
        """The ids of the latents to keep, undefined numbers last and equal ones by id, whichever way."""
        if (by, descending) not in self._orders:
            key = self.columns.get(by, np.zeros(len(keep)))
            order = np.argsort(-key if descending else key, kind="stable")
            self._orders[by, descending] = order.astype(np.int32)
        order = self._orders[by, descending]
        return order[keep[order]]


@dataclass(frozen=True, eq=False)
class Peaks:
    """On which tokens each latent is most active: the strongest example of every layer."""

    latent: Int32[np.ndarray, " pair"]
    code: Int32[np.ndarray, " pair"]
    """Which of `tokens`."""
    tokens: Int64[np.ndarray, " token"]
    """Ids, each once."""

    @classmethod
    def read(cls, path: Path) -> "Peaks":
        """From examples.parquet, a group of rows at a time. Raises ModelError if it is damaged."""
        parts = [np.zeros(0, np.int64)]
        for latent, token in read_peaks(path):
            if len(token) and (token.min() < 0 or latent.min() < 0):
                raise ModelError(str(path), "names tokens or latents below 0; analyze again")
            parts.append(np.unique(latent << 32 | token))
        pairs = np.concatenate(parts)
        tokens, code = np.unique(pairs & 0xFFFFFFFF, return_inverse=True)
        return cls((pairs >> 32).astype(np.int32), code.astype(np.int32), tokens)

    def going_with(
        self, text: str, strings: Callable[[Sequence[int]], list[str]], n_latents: int
    ) -> Bool[np.ndarray, " latent"]:
        """Which latents are most active, at some layer, on a token with this text in it."""
        found = np.zeros(n_latents, bool)
        known = np.array(_holding(text, (string.casefold() for string in strings(self.tokens.tolist()))), bool)
        if known.any():
            latent = self.latent[known[self.code]]
            found[latent[latent < n_latents]] = True
        return found


def search_view(library: "Library", request: SearchRequest) -> dict[str, Any]:
    """/search.json: a page of the latents that fit a request."""
    table, statistics = library.table, library.statistics
    shown = {"offset": request.offset, "limit": request.limit, "sort": request.sort, "descending": request.descending}
    rows: list[int] = []
    total = 0
    if table is not None:
        keep = table.chosen(request)
        if request.promoted:
            keep &= table.promoting(request.promoted)
        if request.token:
            peaks = library.peaks()
            keep &= (
                np.zeros_like(keep)
                if peaks is None
                else peaks.going_with(request.token, library.strings, library.n_latents)
            )
        ids = table.sorted(keep, request.sort, request.descending)
        total, rows = len(ids), ids[request.offset : request.offset + request.limit].tolist()
    names = ["sae", "analysis", "table", "words"] + (["examples", "tokenizer"] if request.token else [])
    return {
        "total": total,
        **shown,
        "rows": [] if table is None or statistics is None else _rows(table, statistics, rows),
        "missing": library.missing(*names),
    }


def _rows(table: Table, statistics: Statistics, ids: list[int]) -> list[dict[str, Any]]:
    columns = {name: column[ids].tolist() for name, column in table.columns.items()}
    whole = [name for name in ("latent", "n_events", "neighbour") if name in columns]
    profile = np.rint(255 * np.nan_to_num(statistics.probability[:, ids])).astype(int).T.tolist()
    rows = []
    for i, latent in enumerate(ids):
        row: dict[str, Any] = {"max_cosine": None, "neighbour": None}
        row |= {name: column[i] for name, column in columns.items()}
        row |= {name: None if np.isnan(row[name]) else int(row[name]) for name in whole}
        rows.append(row | {"promoted": table.words(latent), "profile": profile[i]})
    return rows


def _holding(text: str, strings: Iterable[str]) -> list[bool]:
    text = text.casefold()
    return [text in string for string in strings]
