"""A latent's page: every number is analyze's, every context is one of its examples, and neighbours are brute force's."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mlsae import files
from mlsae.analysis.example_file import read_examples
from mlsae.analysis.example_rows import Example
from mlsae.analysis.latents import columns, save_columns
from mlsae.analysis.layers import LayerStatistics
from mlsae.errors import ConfigError
from mlsae.explorer import latents
from mlsae.explorer.latents import latent_view, nearest, neighbours_view
from mlsae.explorer.library import Library
from mlsae.untrusted import load_tensors

INTERVALS = ("centre_of_mass", "std", "effective_layers", "event_effective_layers")


@pytest.fixture(scope="module")
def library(tiny_run: Path) -> Library:
    return Library.open(tiny_run)


@pytest.fixture(scope="module")
def sums(tiny_run: Path) -> LayerStatistics:
    return LayerStatistics.load(tiny_run / "analysis" / "layers.safetensors")


@pytest.fixture(scope="module")
def pages(library: Library) -> list[dict[str, Any]]:
    return [latent_view(library, latent) for latent in range(128)]


def close(got: Any, want: Any) -> bool:
    """Equal to 1e-6, NaN and None being the same."""
    got, want = (np.array([np.nan if x is None else x for x in xs], float) for xs in (got, want))
    return np.allclose(got, want, rtol=1e-6, atol=1e-9, equal_nan=True)


def test_summaries_are_the_rows_of_the_table(pages, tiny_run: Path):
    rows = pq.read_table(tiny_run / "analysis" / "latents.parquet").to_pylist()
    assert any(page["summary"]["centre_of_mass"]["ci95"] for page in pages)
    for page, row in zip(pages, rows, strict=True):
        summary = page["summary"]
        assert (page["latent"], summary["n_events"], page["alive"]) == (
            row["latent"],
            row["n_events"],
            row["n_events"] > 0,
        )
        assert close([summary["density"]], [row["rate"]])
        for name in INTERVALS:
            assert close([summary[name]["value"]], [row[name]]), name
            assert close(summary[name]["ci95"] or [None] * 2, [row[f"{name}_low"], row[f"{name}_high"]]), name
        for name in ("entropy", "n_active_layers", "bimodality"):
            assert close([summary[name]], [row[name]]), name
        for name in ("birth", "death"):
            assert summary[name] == (None if row[name] < 0 else row[name])
        for name in ("promoted", "suppressed"):
            assert [word["string"] for word in page[name]] == row[name]
            assert close([word["logit"] for word in page[name]], row[f"{name}_logits"])
        assert page["nearest"] == {"latent": row["neighbour"], "cosine": row["max_cosine"]}


def test_profiles_are_those_of_the_sums(pages, sums: LayerStatistics, tiny_run: Path):
    depth, ends = sums.distribution(), load_tensors(tiny_run / "analysis" / "profile.safetensors")
    assert any(x["ci95"] for page in pages for x in page["profile"]["probability"])
    for latent, page in enumerate(pages):
        profile = page["profile"]
        assert close([x["value"] for x in profile["probability"]], depth.probability[:, latent].tolist())
        assert close(profile["density"], sums.density()[:, latent].tolist())
        assert close(profile["mean_activation"], (sums.totals / sums.counts)[:, latent].tolist())
        assert close(profile["persistence"], sums.persistence()[:, latent].tolist())
        for layer, x in enumerate(profile["probability"]):
            low, high = (ends[name][layer, latent].item() for name in ("low", "high"))
            assert x["ci95"] == (None if np.isnan(low) else [low, high])


# ---- contexts --------------------------------------------------------------------------------------------------------


def test_contexts_are_the_examples(pages, library: Library):
    assert sum(len(page["examples"]) for page in pages) > 128
    for latent, page in enumerate(pages):
        known = read_examples(library.examples, latent)
        assert [at["layer"] for at in page["examples"]] == sorted({x.layer for x in known})
        for at in page["examples"]:
            for kind in ("top", "sampled"):
                want = [x for x in known if x.layer == at["layer"] and x.kind == kind]
                for got, example in zip(at[kind], want, strict=True):
                    same(got, example, library)


def same(got: dict[str, Any], want: Example, library: Library) -> None:
    assert (got["value"], got["centre"], got["quantile"]) == (want.value, want.centre, want.quantile)
    assert got["tokens"] == library.load_tokenizer().strings(want.tokens)
    assert close(got["activations"], want.activations)
    assert got["activations"][got["centre"]] == pytest.approx(got["value"], abs=1e-6)


def test_one_layer_has_all_its_examples_and_no_others(library: Library, monkeypatch):
    monkeypatch.setattr(latents, "N_SHOWN", 2)
    latent = int(library.statistics.density.sum(0).argmax())
    few, (layer, *_) = latent_view(library, latent), library.layers
    (alone,) = latent_view(library, latent, layer)["examples"]
    known = read_examples(library.examples, latent, layer)
    assert alone["layer"] == layer
    assert len(alone["top"]) + len(alone["sampled"]) == len(known) == 9
    (first, *_) = [at for at in few["examples"] if at["layer"] == layer]
    assert first["top"] == alone["top"][:2]
    assert first["sampled"] == [alone["sampled"][0], alone["sampled"][-1]]  # from all over the sample


def test_long_contexts_are_cut_around_their_token(library: Library, monkeypatch):
    latent = int(library.statistics.density.sum(0).argmax())
    whole = latent_view(library, latent)
    n_shown = sum(len(at[kind]) for at in whole["examples"] for kind in ("top", "sampled"))
    monkeypatch.setattr(latents, "MAX_SHOWN_TOKENS", 6 * n_shown)
    short = latent_view(library, latent)
    for before, after in zip(whole["examples"], short["examples"], strict=True):
        for one, other in zip(before["top"], after["top"], strict=True):
            first = one["centre"] - other["centre"]
            assert len(other["tokens"]) <= 7
            assert other["tokens"] == one["tokens"][first : first + len(other["tokens"])]
            assert other["activations"] == one["activations"][first : first + len(other["tokens"])]
            assert other["tokens"][other["centre"]] == one["tokens"][one["centre"]]
            assert first == max(0, one["centre"] - 3)


# ---- what is not there -----------------------------------------------------------------------------------------------


def test_latents_and_layers_that_there_are_not_are_refused(library: Library):
    for latent in (-1, 128):
        with pytest.raises(ConfigError, match="give 0 to 127"):
            latent_view(library, latent)
        with pytest.raises(ConfigError, match="give 0 to 127"):
            neighbours_view(library, latent)
    with pytest.raises(ConfigError, match="layer: 6 is none of this SAE's; give one of 0, 1, 2, 3, 4, 5"):
        latent_view(library, 0, 6)
    for n in (0, 201):
        with pytest.raises(ConfigError, match=f"n: {n} given"):
            neighbours_view(library, 0, n)


def test_a_latent_that_was_never_active_has_a_page(tiny_run: Path, tmp_path: Path):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("step-*")))
    sums = LayerStatistics.load(run / "analysis" / "layers.safetensors")
    for part in sums.by_shard.values():
        if part.ndim > 1 and part.shape[-1] == 128:
            part[..., 7] = 0
    sums.save(run / "analysis" / "layers.safetensors")
    save_columns(run / "analysis" / "latents.parquet", columns(sums, None, None))
    page = json.loads(json.dumps(files.finite(latent_view(Library.open(run), 7))))
    assert (page["alive"], page["summary"]["n_events"], page["summary"]["birth"]) == (False, 0, None)
    assert page["summary"]["centre_of_mass"] == {"value": None, "ci95": None}
    assert page["profile"]["density"] == [0] * 6
    assert page["profile"]["mean_activation"] == [None] * 6
    assert (page["promoted"], page["nearest"]) == ([], None)
    assert "words" in {item["what"] for item in page["missing"]}


def test_without_an_analysis_a_page_says_what_makes_one(tiny_run: Path):
    library = Library.open(tiny_run, analysis=tiny_run / "nothing")
    page = latent_view(library, 5)
    assert (page["summary"], page["profile"], page["examples"], page["promoted"]) == (None, None, [], [])
    assert "mlsae analyze" in page["missing"][0]["command"]
    assert len(neighbours_view(library, 5)["neighbours"]) == 20


# ---- neighbours ------------------------------------------------------------------------------------------------------


def test_neighbours_are_those_of_brute_force(library: Library, pages):
    rows = torch.nn.functional.normalize(library.sae.W_dec.double())
    cosines = rows @ rows.T
    cosines.fill_diagonal_(-2)
    for latent in (0, 64, 127):
        found = neighbours_view(library, latent, 5)
        want = cosines[latent].sort(descending=True, stable=True)
        assert found["latent"] == latent
        assert [x["latent"] for x in found["neighbours"]] == want.indices[:5].tolist()
        assert [x["cosine"] for x in found["neighbours"]] == pytest.approx(want.values[:5].tolist(), abs=1e-12)
        first = found["neighbours"][0]
        assert first["latent"] == pages[latent]["nearest"]["latent"]
        assert first["cosine"] == pytest.approx(pages[latent]["nearest"]["cosine"], abs=1e-6)
        for name in ("centre_of_mass", "effective_layers"):
            assert close([first[name]], [pages[first["latent"]]["summary"][name]["value"]])
    assert len(neighbours_view(library, 0, 200)["neighbours"]) == 127


def test_neighbours_do_not_depend_on_length_or_on_blocks(monkeypatch):
    W_dec = torch.randn(50, 8)
    W_dec[30] = 2 * W_dec[10]
    W_dec[40] = 0
    want = nearest(W_dec, 10, 49)
    assert want[0][0] == 30
    assert want[1][0] == pytest.approx(1)
    assert dict(zip(*want, strict=True))[40] == 0
    monkeypatch.setattr(latents, "ROWS_AT_ONCE", 7)
    scaled = W_dec * torch.rand(50, 1).add(0.5)
    got = nearest(scaled, 10, 49)
    assert got[0] == want[0]
    assert got[1] == pytest.approx(want[1], abs=1e-6)


def test_equal_neighbours_come_by_id_and_a_lone_latent_has_none():
    W_dec = torch.eye(6)[[0, 1, 1, 2, 1, 1]]
    assert nearest(W_dec, 2, 3) == ([1, 4, 5], [1.0, 1.0, 1.0])
    assert nearest(torch.ones(1, 4), 0, 5) == ([], [])
