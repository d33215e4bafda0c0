"""Search: what it finds, and in which order, is what a loop over latents.parquet and examples.parquet finds."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from mlsae.analysis.example_file import read_all
from mlsae.analysis.latents import columns, save_columns
from mlsae.analysis.layers import LayerStatistics
from mlsae.explorer.library import Library
from mlsae.explorer.statistics import Statistics
from mlsae.explorer.table import RANGES, SearchRequest, Table, search_view

NAMES = {"density": "rate"}


@pytest.fixture(scope="module")
def library(tiny_run: Path) -> Library:
    return Library.open(tiny_run)


@pytest.fixture(scope="module")
def rows(tiny_run: Path) -> list[dict[str, Any]]:
    return pq.read_table(tiny_run / "analysis" / "latents.parquet").to_pylist()


def number(row: dict[str, Any], name: str) -> float:
    x = row[NAMES.get(name, name)]
    return math.nan if x is None or (name in ("birth", "death") and x < 0) else x


def found(library: Library, **query: Any) -> list[int]:
    """All ids, by pages of 50."""
    ids: list[int] = []
    while True:
        page = search_view(library, SearchRequest(**{k: str(v) for k, v in query.items()}, offset=str(len(ids))))
        ids += [row["latent"] for row in page["rows"]]
        if not page["rows"]:
            assert page["total"] == len(ids)
            return ids


def test_rows_are_those_of_the_table(library: Library, rows):
    profile = LayerStatistics.load(library.analysis / "layers.safetensors").distribution().probability.numpy()
    page = search_view(library, SearchRequest(sort="latent", limit="200"))
    assert (page["total"], page["missing"]) == (128, [])
    for got, want in zip(page["rows"], rows, strict=True):
        for name in ("centre_of_mass", "std", "effective_layers", "density", "birth", "death", "max_cosine"):
            assert got[name] == pytest.approx(number(want, name), rel=1e-12, nan_ok=True), name
        assert [got[name] for name in ("latent", "n_events", "neighbour")] == [
            want[name] for name in ("latent", "n_events", "neighbour")
        ]
        assert got["promoted"] == want["promoted"][:3]
        wanted = np.rint(255 * np.nan_to_num(profile[:, got["latent"]].astype(np.float32))).tolist()
        assert got["profile"] == wanted


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize(
    "by", ["latent", "n_events", "density", "centre_of_mass", "std", "effective_layers", "birth", "death", "max_cosine"]
)
def test_order_is_by_number_then_id_and_the_undefined_last(library: Library, rows, by: str, descending: bool):
    sign = -1 if descending else 1

    def key(row: dict[str, Any]) -> tuple[bool, float, int]:
        x = number(row, by)
        return math.isnan(x), 0.0 if math.isnan(x) else sign * x, row["latent"]

    want = [row["latent"] for row in sorted(rows, key=key)]
    assert found(library, sort=by, descending=str(descending).lower()) == want


@pytest.mark.parametrize("seed", range(8))
def test_filters_keep_what_lies_within_all_of_them(library: Library, rows, seed: int):
    draw, query, want = np.random.default_rng(seed), {}, list(rows)
    for name in draw.choice(list(RANGES), 2, replace=False):
        numbers = [number(row, RANGES[name]) for row in rows]
        low, high = sorted(draw.choice([x for x in numbers if not math.isnan(x)], 2).tolist())  # itself included
        query |= {f"{name}_min": repr(low), f"{name}_max": repr(high)}
        want = [row for row in want if low <= number(row, RANGES[name]) <= high]
    assert found(library, **query, sort="latent") == [row["latent"] for row in want]


@pytest.mark.parametrize("text", ["e", "E", " ", "ab", "\\x", "no such token"])
def test_promoted_tokens_are_found_by_any_part(library: Library, rows, text: str):
    want = [row["latent"] for row in rows if any(text.casefold() in word.casefold() for word in row["promoted"])]
    assert found(library, promoted=text, sort="latent") == want


@pytest.mark.parametrize("text", ["e", "A", " ", "T", "zzz"])
def test_tokens_of_strongest_examples_are_found_by_any_part(library: Library, text: str):
    strings, want = library.load_tokenizer().strings, set()
    for example in (example for group in read_all(library.examples) for example in group):
        word = strings([example.tokens[example.centre]])[0]
        if (example.kind, example.rank) == ("top", 0) and text.casefold() in word.casefold():
            want.add(example.latent)
    assert found(library, token=text, sort="latent") == sorted(want)


def test_conditions_add_up(library: Library):
    one, other = (set(found(library, **query)) for query in ({"promoted": "a"}, {"token": "e", "spread_min": 1.5}))
    assert set(found(library, promoted="a", token="e", spread_min=1.5)) == one & other


def test_beyond_the_end_is_an_empty_page(library: Library):
    page = search_view(library, SearchRequest(offset="1000000"))
    assert (page["rows"], page["total"], page["offset"]) == ([], 128, 1000000)


def test_layers_of_a_subset_are_layer_ids(tiny_run: Path):
    """Worked by hand: rows 0, 1, 2 are layers 2, 5, 9, so a centre of mass of 1.5 lies at layer 7."""
    statistics = Statistics.read(tiny_run / "analysis" / "layers.safetensors", tuple(range(6)), 128)
    moved = dataclasses.replace(statistics, layers=(2, 5, 9, 11, 12, 20))
    assert moved.on_layers([0, 1, 1.5, 2]).tolist() == [2, 5, 7, 9]
    table = Table.read(tiny_run / "analysis" / "latents.parquet", moved)
    plain = Table.read(tiny_run / "analysis" / "latents.parquet", statistics)
    for name in ("birth", "death"):
        known = ~np.isnan(plain.columns[name])
        assert set(table.columns[name][known]) <= {2, 5, 9, 11, 12, 20}
        assert np.array_equal(np.isnan(table.columns[name]), ~known)
    assert np.array_equal(table.columns["std"], plain.columns["std"], equal_nan=True)


def test_a_latent_never_active_has_no_depth_and_lies_in_no_range(tmp_path: Path):
    sums = LayerStatistics(3, 2)
    sums.by_shard["totals"][0, 1, 0] = sums.by_shard["counts"][0, 1, 0] = sums.by_shard["n_events"][0, 0] = 1
    sums.by_shard["tokens"] += 4
    sums.save(tmp_path / "layers.safetensors")
    save_columns(tmp_path / "latents.parquet", columns(sums, None, None))
    statistics = Statistics.read(tmp_path / "layers.safetensors", (0, 1, 2), 2)
    table = Table.read(tmp_path / "latents.parquet", statistics)
    for name in ("birth", "death", "centre_of_mass"):
        assert np.array_equal(table.columns[name], [1, np.nan], equal_nan=True)
    assert table.chosen(SearchRequest(birth_min="-5")).tolist() == [True, False]
    assert table.sorted(np.ones(2, bool), "birth", descending=True).tolist() == [0, 1]
    assert (table.promoted, table.problem, table.words(0)) == (None, None, [])


def test_without_a_table_it_says_so(tiny_run: Path):
    page = search_view(Library.open(tiny_run, analysis=tiny_run / "nothing"), SearchRequest(token="a"))
    assert (page["rows"], page["total"]) == ([], 0)
    assert [item["what"] for item in page["missing"]] == ["analysis"]


@pytest.mark.parametrize(
    "query",
    [
        {"sort": "neighbour"},
        {"sort": "rate"},
        {"limit": "0"},
        {"limit": "201"},
        {"offset": "-1"},
        {"offset": "1.0"},
        {"centre_min": "nan"},
        {"centre_min": "1e400"},
        {"spread_max": "Infinity"},
        {"descending": "yes"},
        {"token": "x" * 101},
        {"latent": "7"},
    ],
)
def test_odd_requests_are_refused(query: dict[str, str]):
    with pytest.raises(ValidationError):
        SearchRequest(**query)


def test_empty_fields_of_a_form_are_no_conditions():
    assert SearchRequest(centre_min="", token="", promoted="") == SearchRequest()
