"""The overview: the numbers of evaluate and analyze, and histograms that count every latent once."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mlsae import MLSAE
from mlsae.analysis.layers import LayerStatistics
from mlsae.config import MLSAEConfig
from mlsae.explorer.library import Library
from mlsae.explorer.overview import overview_view


@pytest.fixture(scope="module")
def page(tiny_run: Path) -> dict:
    return overview_view(Library.open(tiny_run))


def test_numbers_are_those_of_the_files(page: dict, tiny_run: Path):
    summary = json.loads((tiny_run / "analysis" / "summary.json").read_text())
    statistics = page["statistics"]
    assert statistics["n_tokens"] == summary["n_tokens"]
    for name in ("decomposition", "events", "nulls", "lawson2024"):
        assert statistics[name] == summary[name]
    assert statistics["n_alive"] == summary["distribution"]["n_used"]
    assert page["similarity"] == json.loads((tiny_run / "analysis" / "similarity.json").read_text())
    assert page["evaluation"] == json.loads((tiny_run / "evaluation.json").read_text())
    assert page["missing"] == []


def test_facts_are_those_of_the_config(page: dict, tiny_run: Path):
    config = MLSAE.from_pretrained(tiny_run).config
    assert page["sae"] == {
        "name": tiny_run.name,
        "lm": config.lm,
        "n_latents": 128,
        "k": 4,
        "d_model": 32,
        "expansion_factor": 4.0,
        "layers": [0, 1, 2, 3, 4, 5],
        "frame": "layer",
        "groups": 1,
        "recipe": "standard",
        "lens": False,
    }
    assert page["training"]["finished"]
    assert page["training"]["config"]["tokens"] == 2048


def test_histograms_count_every_latent_that_was_ever_active_once(page: dict, tiny_run: Path):
    table = pq.read_table(tiny_run / "analysis" / "latents.parquet")
    for name, found in page["statistics"]["histograms"].items():
        x = table[name].drop_null().to_numpy()
        counts, _ = np.histogram(x, found["edges"])
        assert found["counts"] == counts.tolist()
        assert (found["edges"][0], found["edges"][-1]) == {"centre_of_mass": (0, 5), "effective_layers": (1, 6)}[name]
        assert sum(found["counts"]) == page["statistics"]["n_alive"] == len(x)


def test_an_sae_of_one_layer_has_a_histogram_too(tmp_path: Path):
    config = MLSAEConfig(d_model=8, n_latents=5, k=2, layers=(3,), frame="none", mask_norm_factor=None)
    MLSAE(config).save_pretrained(tmp_path / "sae")
    sums = LayerStatistics(1, 5)
    sums.by_shard["totals"][0, 0, :3] = 1.5
    (tmp_path / "analysis").mkdir()
    sums.save(tmp_path / "analysis" / "layers.safetensors")
    (tmp_path / "analysis" / "summary.json").write_text('{"n_tokens": 4, "layers": [3]}')
    library = Library.open(tmp_path / "sae", analysis=tmp_path / "analysis")
    statistics = overview_view(library)["statistics"]
    assert statistics["histograms"] == {
        "centre_of_mass": {"edges": [2.5, 3.5], "counts": [3]},
        "effective_layers": None,
    }
    assert statistics["decomposition"] is None
    assert {item["what"] for item in library.missing()} >= {"table", "intervals", "examples", "similarity"}


def test_without_an_analysis_there_are_no_statistics(tiny_run: Path):
    page = overview_view(Library.open(tiny_run, analysis=tiny_run / "nothing"))
    assert (page["statistics"], page["similarity"]) == (None, None)
    assert [item["what"] for item in page["missing"]] == ["analysis"]
