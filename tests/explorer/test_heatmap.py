"""The heatmap's bytes: columns are means of the latents they stand for, in the order of depth."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from mlsae.analysis.layers import LayerStatistics
from mlsae.errors import ConfigError, DataError
from mlsae.explorer.heatmap import heatmap_bytes
from mlsae.explorer.library import Library


def parsed(data: bytes) -> tuple[dict[str, int], np.ndarray, np.ndarray]:
    """What a page's script makes of the bytes: the header by name, latents, values [layer, column]."""
    head = dict(
        zip(("n_layers", "n_columns", "start", "stop", "n"), np.frombuffer(data, "<u4", 5).tolist(), strict=True)
    )
    latents = np.frombuffer(data, "<i4", head["n_columns"], 20)
    values = np.frombuffer(data, "u1", offset=20 + 4 * head["n_columns"])
    return head, latents, values.reshape(head["n_layers"], head["n_columns"])


@pytest.fixture(scope="module")
def library(tiny_run: Path) -> Library:
    return Library.open(tiny_run)


@pytest.fixture(scope="module")
def want(tiny_run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Ids in order, and their P(layer | latent) in float64."""
    found = LayerStatistics.load(tiny_run / "analysis" / "layers.safetensors").distribution()
    centre = found.centre_of_mass.numpy()
    ids = sorted(np.flatnonzero(found.used.numpy()).tolist(), key=lambda latent: (centre[latent], latent))
    return np.array(ids), found.probability.numpy()[:, ids]


def test_with_room_for_all_every_latent_is_a_column(library: Library, want):
    ids, probability = want
    head, latents, values = parsed(heatmap_bytes(library, width=4096))
    assert head == {"n_layers": 6, "n_columns": len(ids), "start": 0, "stop": len(ids), "n": len(ids)}
    assert latents.tolist() == ids.tolist()
    assert np.abs(values - 255 * probability).max() <= 0.5 + 1e-4


@pytest.mark.parametrize(
    ("start", "stop", "width"), [(0, None, 7), (5, 60, 10), (3, 4, 100), (0, None, 1), (10, 33, 23)]
)
def test_a_column_is_the_mean_of_its_latents(library: Library, want, start: int, stop: int | None, width: int):
    ids, probability = want
    stop = len(ids) if stop is None else stop
    head, latents, values = parsed(heatmap_bytes(library, start, stop, width))
    assert head["n_columns"] == min(width, stop - start) == len(latents)
    edges = [start + i * (stop - start) // len(latents) for i in range(len(latents) + 1)]
    for column, (first, end) in enumerate(itertools.pairwise(edges)):
        assert end > first
        assert latents[column] in ids[first:end]
        assert np.abs(values[:, column] - 255 * probability[:, first:end].mean(1)).max() <= 0.5 + 1e-4


def test_a_column_of_one_latent_sums_to_one(library: Library):
    values = parsed(heatmap_bytes(library, width=4096))[2]
    assert np.abs(values.sum(0).astype(int) - 255).max() <= 3


@pytest.mark.parametrize(
    ("start", "stop", "width"), [(-1, 3, 5), (5, 5, 5), (6, 5, 5), (0, 10**6, 5), (0, None, 0), (0, None, 4097)]
)
def test_places_that_there_are_not_are_refused(library: Library, start: int, stop: int | None, width: int):
    with pytest.raises(ConfigError, match=r"^(start|width): .* given"):
        heatmap_bytes(library, start, stop, width)


def test_without_an_analysis_it_says_what_makes_one(tiny_run: Path):
    with pytest.raises(DataError, match="mlsae analyze"):
        heatmap_bytes(Library.open(tiny_run, analysis=tiny_run / "nothing"))
