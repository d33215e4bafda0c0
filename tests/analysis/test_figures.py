"""The figures: what they draw agrees with the analysis, keeps its sums, and is written the same way twice."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mlsae import files
from mlsae.analysis import drawing, figures
from mlsae.analysis.geometry import AdjacentSimilarity, ResidMeans
from mlsae.analysis.layers import WEIGHTS, LayerStatistics
from mlsae.analyze import Analysis, PromptActivity

torch.set_num_threads(1)

SPLICED = {"delta_ce": 0.25, "kl": 0.5}


@dataclass(frozen=True)
class Code:
    """The two fields of mlsae.sae.Code that the statistics read."""

    values: Tensor
    indices: Tensor


def statistics_of(n_layers: int, n_latents: int, n_tokens: int = 60) -> LayerStatistics:
    """Random codes in which low latents live at low layers; the last latent is never active."""
    generator = torch.Generator().manual_seed(n_layers)
    depth = torch.linspace(0, n_layers - 1, n_latents)
    near = (torch.arange(n_layers)[:, None] - depth).abs() < 1 + n_layers / 3
    dense = torch.rand(n_layers, n_tokens, n_latents, generator=generator) * near[:, None]
    dense[..., -1] = 0
    result = LayerStatistics(n_layers, n_latents)
    result.update(Code(*dense.topk(min(4, n_latents))))
    return result


def similarity_of(n_layers: int) -> AdjacentSimilarity:
    resid = torch.randn(n_layers, 20, 6, generator=torch.Generator().manual_seed(0)).cumsum(0)
    means = ResidMeans(n_layers, 6)
    means.update(resid)
    result = AdjacentSimilarity(means)
    result.update(resid)
    return result


def prompt_of(statistics: LayerStatistics, tokens: list[str]) -> PromptActivity:
    visible = torch.arange(len(tokens)) > 0
    by_position = 1 + torch.arange(statistics.n_layers * len(tokens), dtype=torch.float64).view(-1, len(tokens))
    return PromptActivity("".join(tokens[1:]), tokens, visible, statistics.totals.clone(), by_position)


def make_analysis(
    n_layers: int = 5, n_latents: int = 40, tokens: tuple[str, ...] = ("<s>", "When", " Mary")
) -> Analysis:
    """An analysis of invented numbers, by the classes that the real one is made of."""
    statistics, similarity = statistics_of(n_layers, n_latents), similarity_of(n_layers)
    prompt = prompt_of(statistics, list(tokens))
    layers = tuple(range(n_layers))
    return Analysis(layers, statistics, similarity.means, similarity, prompt, [0] * n_layers, 1.5)


def make_evaluation(n_layers: int = 5, *, spliced: bool = True) -> dict[str, Any]:
    """An evaluation.json of invented numbers."""
    more = SPLICED if spliced else {}
    names = ("mse", "cosine", "norm_ratio", "l0", "l1", "unused_fraction")
    ours = {**dict.fromkeys(names, 0.5), **more}
    theirs = {"fvu": 0.05, "mse": 0.5, **({"kl": 20.0} if spliced else {})}
    layers = [{"layer": i, "fvu": 0.1 + i / 100, **ours} for i in range(n_layers)]
    published = [{"layer": i, **theirs} for i in range(n_layers)]
    return {
        "n_tokens": 1000,
        "n_spliced_tokens": 500 * spliced,
        "layers": layers,
        "mean": {"fvu": 0.12, **ours},
        "all_layers": {"delta_ce": 0.75, "kl": 0.875} if spliced else {},
        "clean_ce": 3.5 if spliced else float("nan"),
        "dead_fraction": 0.0,
        "masked_by_norm": [0] * n_layers,
        "lawson2024": {"layers": published, "mean": theirs},
        "seconds": 2.0,
    }


def make_metrics(n: int = 30) -> list[dict[str, Any]]:
    """A metrics.jsonl of invented numbers; what was not finite is None, as in the file."""
    return [{"tokens": 10 * i, "fvu": 1 / (1 + i), "dead_fraction": None if i == 1 else 0.1} for i in range(n)]


def names_of(pictures: list[figures.Picture]) -> list[str]:
    return [picture.name for picture in pictures]


# ---- laws ----------------------------------------------------------------------------------------------------------


def test_heatmap_columns_are_distributions_in_order_of_descending_depth():
    analysis = make_analysis()
    data = figures.heatmap(analysis).data
    found = analysis.statistics.distribution()
    torch.testing.assert_close(data["columns"].sum(0), torch.ones(39, dtype=torch.float64))
    assert (data["centre_of_mass"].diff() <= 0).all()
    torch.testing.assert_close(data["columns"], found.probability[:, data["latent"]])  # few enough: none are averaged
    rates = analysis.statistics.n_events[data["latent"]] / analysis.statistics.n_tokens
    torch.testing.assert_close(data["events_per_token"].float(), rates)
    assert sorted(data["latent"].tolist()) == found.used.nonzero()[:, 0].tolist()


def test_latents_at_equal_depth_keep_their_order():
    order = figures.by_depth(torch.tensor([1.0, 2.0, 1.0, torch.nan]), torch.tensor([True, True, True, False]))
    assert order.tolist() == [1, 0, 2]


@pytest.mark.parametrize(("n_columns", "n_bins"), [(1, 5), (7, 7), (7, 3), (2304, 1000), (2001, 1000)])
def test_binned_means_keep_total_probability(n_columns: int, n_bins: int):
    columns = np.random.default_rng(0).random((4, n_columns))
    columns /= columns.sum(0)
    means = figures.binned(columns, n_bins)
    edges = np.linspace(0, n_columns, means.shape[1] + 1).round()
    assert means.shape[1] == min(n_bins, n_columns)
    np.testing.assert_allclose(means.sum(0), 1)
    np.testing.assert_allclose(means @ np.diff(edges), columns.sum(1))
    assert np.ptp(np.diff(edges)) <= 1


def test_binned_by_hand():
    np.testing.assert_array_equal(figures.binned(np.array([[1.0, 3.0, 5.0, 9.0]]), 2), [[2.0, 7.0]])


def test_wide_heatmap_is_averaged_and_says_so():
    analysis = make_analysis()
    statistics = LayerStatistics(5, 2500)
    statistics.totals += torch.rand(5, 2500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    statistics.n_events += 1
    statistics._tokens += 10
    picture = figures.heatmap(replace(analysis, statistics=statistics))
    assert picture.data["columns"].shape == (5, figures.MAX_COLUMNS)
    assert "means of 2.5 neighbours" in picture.caption
    assert "neighbours each" not in figures.heatmap(make_analysis()).caption


def test_heatmap_draws_layer_0_on_top_with_its_strip_aligned():
    figure = figures.heatmap(make_analysis()).figure
    figure.draw_without_rendering()
    strip, image = figure.axes[:2]
    assert image.get_ylim() == (4.5, -0.5)
    assert strip.get_xlim() == image.get_xlim() == (0, 39)
    np.testing.assert_allclose(strip.get_position().intervalx, image.get_position().intervalx)


def test_prompt_heatmap_drops_weak_latents_and_masked_positions_are_named():
    analysis = make_analysis()
    analysis.prompt.mass[:, 0] = 5e-4
    picture = figures.prompt_heatmap(analysis)
    assert 0 not in picture.data["latent"].tolist()
    torch.testing.assert_close(picture.data["columns"].sum(0), torch.ones(38, dtype=torch.float64))
    assert "⟦<s>⟧When Mary" in picture.caption
    assert picture.data["masked_share"] == analysis.prompt.masked_share


def test_spread_and_variance_are_the_numbers_of_the_analysis():
    analysis = make_analysis()
    summary = analysis.summary()
    spread, variance = figures.spread(analysis).data, figures.variance(analysis).data
    assert sum(spread["share_of_events"]) == pytest.approx(1)
    assert sum(spread["share_of_latents"]) == pytest.approx(1)
    assert spread["mean_effective_layers"] == pytest.approx(summary["distribution"]["effective_layers"]["mean"])
    active = summary["events"]["active_layers"]
    mean = sum((i + 1) * n for i, n in enumerate(active)) / sum(active)
    assert spread["mean_layers_per_event"] == pytest.approx(mean)
    assert variance == {"decomposition": summary["decomposition"], "lawson2024": summary["lawson2024"]}
    assert set(variance["decomposition"]) == set(WEIGHTS)


def test_centre_of_mass_has_16_bins_a_layer_and_area_1():
    data = figures.centre_of_mass(make_analysis()).data
    edges = np.array(data["edges"])
    assert len(edges) == 16 * 5 + 1
    assert (np.diff(edges) @ data["density"]) == pytest.approx(1)


# ---- files ---------------------------------------------------------------------------------------------------------


def test_saved_pictures_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(drawing.STYLE, "savefig.dpi", 40)  # fast
    for picture in figures.pictures(make_analysis(), make_evaluation(), make_metrics()):
        figures.save(picture, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3 * 9
    for path in tmp_path.glob("*.json"):
        assert json.loads(path.read_text())["caption"]
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    saved = json.loads((tmp_path / "heatmap.json").read_text())
    assert saved["columns"] == figures.heatmap(make_analysis()).data["columns"].tolist()


def test_saving_twice_gives_identical_bytes(tmp_path: Path):
    for folder in (tmp_path / "a", tmp_path / "b"):
        figures.save(figures.heatmap(make_analysis()), folder)
        figures.save(figures.similarity(make_analysis()), folder)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    drawings = [figures.rendered(figures.spread(make_analysis()).figure, "svg") for _ in range(2)]
    assert drawings[0] == drawings[1]


def test_large_data_goes_into_tensors_and_leaves_no_stale_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    picture = figures.heatmap(make_analysis())
    monkeypatch.setattr(figures, "rendered", lambda figure, kind: kind.encode())
    monkeypatch.setattr(figures, "MAX_JSON_NUMBERS", 10)
    paths = figures.save(picture, tmp_path)
    tensors = files.load_tensors(tmp_path / "heatmap.safetensors")
    torch.testing.assert_close(tensors["columns"], picture.data["columns"])
    assert json.loads((tmp_path / "heatmap.json").read_text())["columns"] == "tensor in heatmap.safetensors"
    assert sorted(paths) == sorted(tmp_path.iterdir())
    monkeypatch.setattr(figures, "MAX_JSON_NUMBERS", 10_000)
    assert sorted(figures.save(picture, tmp_path)) == sorted(tmp_path.iterdir())


def test_drawing_changes_no_setting():
    before = dict(drawing.mpl.rcParams)
    figures.rendered(figures.spread(make_analysis()).figure, "svg")
    assert dict(drawing.mpl.rcParams) == before


# ---- what is missing -----------------------------------------------------------------------------------------------


def test_one_layer_has_no_depth_to_draw():
    left = names_of(figures.pictures(make_analysis(n_layers=1)))
    assert left == ["heatmap", "spread", "prompt_heatmap", "prompt_positions"]


def test_no_active_latent_leaves_what_can_be_drawn():
    analysis = make_analysis()
    empty = LayerStatistics(5, 40)
    dark = replace(analysis.prompt, mass=torch.zeros(5, 40, dtype=torch.float64))
    left = figures.pictures(replace(analysis, statistics=empty, prompt=dark))
    assert names_of(left) == ["prompt_positions", "similarity"]
    hidden = replace(dark, visible=torch.zeros(3, dtype=torch.bool))
    assert figures.prompt_positions(replace(analysis, prompt=hidden)) is None


def test_quality_without_splice_or_published_values(tmp_path: Path):
    evaluation = make_evaluation(spliced=False)
    assert "delta_ce" not in figures.quality(evaluation).data
    evaluation["lawson2024"] = {}
    evaluation["layers"][-1]["fvu"] = None  # null in a file: a layer without variance
    figures.save(figures.quality(evaluation), tmp_path)
    assert json.loads((tmp_path / "quality.json").read_text())["fvu"][-1] is None


def test_training_without_records_is_no_figure():
    assert figures.training([]) is None
    assert figures.training([{"step": 1, "tokens": 10, "fvu": None}]) is None
    assert figures.training([{"step": 1, "tokens": 10, "fvu": 0.5}]) is not None


@pytest.mark.parametrize("n_layers", [1, 2, 12, 13, 30, 96])
def test_layer_ticks_are_few_and_named_by_layer_id(n_layers: int):
    axis = drawing.new_figure(2.0).subplots().xaxis
    drawing.layer_axis(axis, [10 + layer for layer in range(n_layers)])
    labels = [label.get_text() for label in axis.get_ticklabels()]
    assert labels[0] == "10"
    assert 1 <= len(labels) <= 12


def test_awkward_tokens_are_drawn_without_a_warning(tmp_path: Path):
    tokens = ("<s>", "$x_", "^$", "語", "\U0001f642", "", " ", "a" * 60, "<script>", "\\frac{")
    picture = figures.prompt_positions(make_analysis(tokens=tokens))
    figures.save(picture, tmp_path)
    assert drawing.drawable("é語$") == "é□$"
    assert json.loads((tmp_path / "prompt_positions.json").read_text())["tokens"] == list(tokens)
    figures.save(figures.prompt_heatmap(make_analysis(tokens=tokens)), tmp_path)


def test_prompt_text_of_a_tokenizer_without_spaces():
    prompt = replace(make_analysis().prompt, prompt="When Mary", tokens=["<s>", "When", "Mary"])
    assert figures.prompt_text(prompt) == "⟦<s>⟧ When Mary"
