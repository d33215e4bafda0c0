"""The figures: what they draw agrees with the analysis, keeps its sums, and is written the same way twice."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlsae import untrusted
from mlsae.analysis import cosines, drawing, figures, heatmaps, lives, picture, spread
from mlsae.analysis.depth import distribute
from mlsae.analysis.directions import COSINE_LIMIT, chance, compare_pairs
from mlsae.analysis.geometry import AdjacentSimilarity, ResidMeans
from mlsae.analysis.layers import WEIGHTS, LayerStatistics, PlainCode
from mlsae.analysis.nulls import NullStatistics
from mlsae.analysis.vocabulary import LogitLens, TokenMatches, Words
from mlsae.analyze import Analysis, PromptActivity
from mlsae.data import PackInfo, TokenBlocks

torch.set_num_threads(1)

SPLICED = {"delta_ce": 0.25, "kl": 0.5}


def code_of(n_layers: int, n_latents: int, n_tokens: int = 60) -> PlainCode:
    """A random code in which low latents live at low layers; the last latent is never active."""
    generator = torch.Generator().manual_seed(n_layers)
    depth = torch.linspace(0, n_layers - 1, n_latents)
    near = (torch.arange(n_layers)[:, None] - depth).abs() < 1 + n_layers / 3
    dense = torch.rand(n_layers, n_tokens, n_latents, generator=generator) * near[:, None]
    dense[..., -1] = 0
    return PlainCode(*dense.topk(min(4, n_latents)))


def statistics_of(n_layers: int, n_latents: int, n_shards: int = 6) -> LayerStatistics:
    result = LayerStatistics(n_layers, n_latents, n_shards)
    result.update(code_of(n_layers, n_latents), shard=torch.arange(60) % n_shards)
    return result


def nulls_of(n_layers: int, n_latents: int) -> dict[str, LayerStatistics]:
    result = NullStatistics(n_layers, n_latents)
    result.update(code_of(n_layers, n_latents), 0)
    return result.statistics


def similarity_of(n_layers: int) -> AdjacentSimilarity:
    resid = torch.randn(n_layers, 20, 6, generator=torch.Generator().manual_seed(0)).cumsum(0)
    means = ResidMeans(n_layers, 6)
    means.update(resid)
    result = AdjacentSimilarity(means, 5)
    result.update(resid, torch.arange(20) % 5)
    return result


def rows_of(n_latents: int) -> torch.Tensor:
    return torch.randn(n_latents, 6, generator=torch.Generator().manual_seed(1))


def words_of(n_latents: int, token: str = " the") -> Words:
    """Every latent promotes token 0, suppresses token 1, and is nearest to token 0, which is " the"."""
    ids, cosine = torch.tensor([[0, 1]]).expand(n_latents, 2), torch.linspace(0, 1, n_latents)[:, None].expand(-1, 2)
    matches = TokenMatches(ids, cosine, chance(rows_of(n_latents), torch.eye(6)))
    return Words(LogitLens(ids, cosine, ids.flip(1), cosine, matches.chance), matches, matches, {0: token, 1: "\n"})


def blocks_of() -> TokenBlocks:
    info = PackInfo(1, 4, "uint16", 1, 0, 0, 3, True, "", {}, "")
    return TokenBlocks(np.arange(4, dtype=np.uint16)[None], np.array([0]), info)


def prompt_of(statistics: LayerStatistics, tokens: list[str]) -> PromptActivity:
    visible = torch.arange(len(tokens)) > 0
    by_position = 1 + torch.arange(statistics.n_layers * len(tokens), dtype=torch.float64).view(-1, len(tokens))
    return PromptActivity("".join(tokens[1:]), tokens, visible, statistics.totals.clone(), by_position)


def make_analysis(
    n_layers: int = 5, n_latents: int = 40, tokens: tuple[str, ...] = ("<s>", "When", " Mary")
) -> Analysis:
    """An analysis of invented numbers, by the classes that the real one is made of."""
    statistics, similarity = statistics_of(n_layers, n_latents), similarity_of(n_layers)
    centre = statistics.distribution().centre_of_mass
    return Analysis(
        layers=tuple(range(n_layers)),
        statistics=statistics,
        nulls=nulls_of(n_layers, n_latents),
        means=similarity.means,
        similarity=similarity,
        pairs=compare_pairs(rows_of(n_latents), centre, max_gap=4.0),
        words=words_of(n_latents),
        examples=None,
        blocks=blocks_of(),
        prompt=prompt_of(statistics, list(tokens)),
        masked_by_norm=[0] * n_layers,
        seconds=1.5,
    )


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
    order = heatmaps.by_depth(torch.tensor([1.0, 2.0, 1.0, torch.nan]), torch.tensor([True, True, True, False]))
    assert order.tolist() == [1, 0, 2]


@pytest.mark.parametrize(("n_columns", "n_bins"), [(1, 5), (7, 7), (7, 3), (2304, 1000), (2001, 1000)])
def test_binned_means_keep_total_probability(n_columns: int, n_bins: int):
    columns = np.random.default_rng(0).random((4, n_columns))
    columns /= columns.sum(0)
    means = drawing.binned(columns, n_bins)
    edges = np.linspace(0, n_columns, means.shape[1] + 1).round()
    assert means.shape[1] == min(n_bins, n_columns)
    np.testing.assert_allclose(means.sum(0), 1)
    np.testing.assert_allclose(means @ np.diff(edges), columns.sum(1))
    assert np.ptp(np.diff(edges)) <= 1


def test_binned_by_hand():
    np.testing.assert_array_equal(drawing.binned(np.array([[1.0, 3.0, 5.0, 9.0]]), 2), [[2.0, 7.0]])


def test_wide_heatmap_is_averaged_and_says_so():
    analysis = make_analysis()
    statistics = LayerStatistics(5, 2500)
    sums = statistics.by_shard
    sums["totals"] += torch.rand(5, 2500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums["n_events"] += 1
    sums["tokens"] += 10
    picture = figures.heatmap(replace(analysis, statistics=statistics))
    assert picture.data["columns"].shape == (5, drawing.MAX_COLUMNS)
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
    assert spread["mean_effective_layers"] == summary["distribution"]["effective_layers"]["mean"]
    active = summary["events"]["active_layers"]
    mean = sum((i + 1) * n for i, n in enumerate(active)) / sum(active)
    assert spread["mean_layers_per_event"]["value"] == pytest.approx(mean)
    assert {name: variance[name] for name in ("decomposition", "lawson2024")} == {
        name: summary[name] for name in ("decomposition", "lawson2024")
    }
    for weight in WEIGHTS:
        parts = {part: share["value"] for part, share in variance["shares"][weight].items()}
        terms = summary["decomposition"][weight]
        assert parts == pytest.approx({part: terms[part]["value"] / terms["total"]["value"] for part in parts})
        for shares in (parts, *(found[weight] for found in variance["chance"].values())):
            assert sum(shares.values()) == pytest.approx(1)
        # with shares of the total, rel_f's interval is that of what is not between latents
        low, high = variance["shares"][weight]["latent"]["ci95"]
        assert [1 - high, 1 - low] == pytest.approx(terms["rel_f"]["ci95"])


def test_centre_of_mass_has_16_bins_a_layer_and_area_1():
    data = figures.centre_of_mass(make_analysis()).data
    edges = np.array(data["edges"])
    assert len(edges) == 16 * 5 + 1
    assert (np.diff(edges) @ data["density"]) == pytest.approx(1)


def test_an_interval_drawn_is_that_of_the_summary_and_none_without_documents():
    analysis = make_analysis()
    persistence = analysis.summary()["persistence"]
    assert figures.lives(analysis).data["persistence"] == persistence
    assert all(np.isfinite(layer["ci95"]).all() for layer in persistence)
    alone = replace(analysis, statistics=analysis.statistics.whole())
    assert " [" in figures.spread(analysis).here
    assert " [" not in figures.spread(alone).here
    n_whiskers = [len(figures.spread(a).figure.axes[0].collections) for a in (analysis, alone)]
    assert n_whiskers == [1, 0]


def test_whiskers_reach_from_end_to_end_where_there_is_an_interval():
    axes = drawing.new_figure(2.0).subplots()
    drawing.whiskers(axes, [3, 4], [(1.0, 2.0), (np.nan, np.nan)])
    assert [segment.tolist() for segment in axes.collections[0].get_segments()] == [[[3, 1], [3, 2]]]


def test_births_and_deaths_by_hand():
    values = torch.zeros(5, 3, 2)
    values[1:4, :, 0] = 1  # latent 0 on layers 1 to 3 of every token
    values[4, 0, 1] = 1  # latent 1 at the last layer of one
    statistics = LayerStatistics(5, 3)
    statistics.update(PlainCode(values, torch.arange(2).expand(5, 3, 2)))
    births = lives.births_and_deaths(statistics)
    assert births.nonzero().tolist() == [[1, 3], [4, 4]]
    assert births.sum() == 2  # the third was never active
    shapes = {name: x.tolist() for name, x in lives.shapes_of_events(statistics).items()}
    assert shapes["runs"] == [0.25, 0, 0.75, 0, 0]
    assert shapes["first_layer"] == [0, 0.75, 0, 0, 0.25]
    assert shapes["last_layer"] == [0, 0, 0, 0.75, 0.25]
    assert shapes["mean_persistence"] == pytest.approx(6 / 9)  # of nine activations below the last layer, six go on


def test_lives_are_drawn_from_first_layer_up_and_last_layer_right():
    axes = figures.lives(make_analysis()).figure.axes[0]
    (mesh,) = axes.collections
    found = figures.lives(make_analysis()).data["latents_by_first_and_last_layer"]
    assert torch.equal(torch.from_numpy(mesh.get_array().filled(0)), found)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("last layer", "first layer")
    assert found.sum() == 39
    assert not found.tril(-1).any()  # nothing dies before it is born


def test_layers_in_use_are_counted_and_averaged_as_they_are():
    statistics = make_analysis().statistics
    data = figures.latents(make_analysis()).data
    found = statistics.distribution()
    assert data["latents"].sum() == 39
    counts = found.n_active_layers[found.used].bincount(minlength=6)[1:]
    assert data["latents"].sum(0).tolist() == counts.tolist()
    group = torch.arange(40) % 7
    means = lives.mean_layers_in_use(statistics, group)
    brute = [
        np.mean([found.n_active_layers[j].item() for j in range(40) if group[j] == g and found.used[j]])
        for g in range(7)
    ]
    assert means.tolist() == pytest.approx(brute)


def test_distance_to_a_layer_by_hand():
    statistics = LayerStatistics(5, 3)
    statistics.by_shard["totals"] += torch.tensor([[1.0, 0, 0], [0, 3, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]])
    assert distribute(statistics.totals, statistics.counts).centre_of_mass[:2].tolist() == [0, 1.25]
    assert spread.distance_to_a_layer(statistics)["mean"].item() == 0.125


def test_cosines_of_random_directions_are_uniform_on_the_sphere_and_have_variance_1_over_d():
    edges = np.linspace(-1, 1, 9)
    np.testing.assert_allclose(cosines.isotropic_cosines(3, edges), 1 / 8)  # Archimedes: a zone's area is its height
    fine = np.linspace(-1, 1, 20_001)
    for d in (2, 6, 300):
        share, middle = cosines.isotropic_cosines(d, fine), (fine[1:] + fine[:-1]) / 2
        assert share.sum() == pytest.approx(1)
        assert share @ middle**2 == pytest.approx(1 / d, rel=1e-4)


def test_directions_are_the_pairs_of_the_analysis():
    analysis = make_analysis()
    found = figures.directions(analysis)
    assert found.data["histogram"] == analysis.pairs.histogram.tolist()
    assert sum(found.data["histogram"]) == 40 * 39 // 2
    assert sum(found.data["maxima"]["latents"]) == 40
    *_, density, means, _ = found.figure.axes  # the last is the colour bar
    assert density.get_ylim() == (-COSINE_LIMIT, COSINE_LIMIT)
    for axes in (density, means):
        drawn = axes.lines[-1].get_ydata()
        np.testing.assert_array_equal(drawn, analysis.pairs.depth.mean)
    assert density.collections[0].get_array().sum() == analysis.pairs.depth.histogram.sum()


# ---- files ---------------------------------------------------------------------------------------------------------


def test_saved_pictures_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(drawing.STYLE, "savefig.dpi", 40)  # fast
    for found in figures.pictures(make_analysis(), make_evaluation(), make_metrics()):
        figures.save(found, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3 * 13
    for path in tmp_path.glob("*.json"):
        assert json.loads(path.read_text())["caption"].startswith("Here")
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    saved = json.loads((tmp_path / "heatmap.json").read_text())
    assert saved["columns"] == figures.heatmap(make_analysis()).data["columns"].tolist()


def test_saving_twice_gives_identical_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(drawing.STYLE, "savefig.dpi", 40)  # fast
    for folder in (tmp_path / "a", tmp_path / "b"):
        figures.save(figures.heatmap(make_analysis()), folder)
        figures.save(figures.similarity(make_analysis()), folder)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    drawings = [drawing.rendered(figures.spread(make_analysis()).figure, "svg") for _ in range(2)]
    assert drawings[0] == drawings[1]


def test_large_data_goes_into_tensors_and_leaves_no_stale_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn = figures.heatmap(make_analysis())
    monkeypatch.setattr(picture, "rendered", lambda figure, kind: kind.encode())
    monkeypatch.setattr(picture, "MAX_JSON_NUMBERS", 10)
    paths = figures.save(drawn, tmp_path)
    tensors = untrusted.load_tensors(tmp_path / "heatmap.safetensors")
    torch.testing.assert_close(tensors["columns"], drawn.data["columns"])
    assert json.loads((tmp_path / "heatmap.json").read_text())["columns"] == "tensor in heatmap.safetensors"
    assert sorted(paths) == sorted(tmp_path.iterdir())
    monkeypatch.setattr(picture, "MAX_JSON_NUMBERS", 10_000)
    assert sorted(figures.save(drawn, tmp_path)) == sorted(tmp_path.iterdir())


def test_drawing_changes_no_setting():
    before = dict(drawing.mpl.rcParams)
    drawing.rendered(figures.spread(make_analysis()).figure, "svg")
    assert dict(drawing.mpl.rcParams) == before


# ---- what is missing -----------------------------------------------------------------------------------------------


def test_one_layer_has_no_depth_to_draw():
    left = names_of(figures.pictures(make_analysis(n_layers=1)))
    assert left == ["heatmap", "spread", "prompt_heatmap", "prompt_positions", "directions", "vocabulary"]


def test_no_active_latent_leaves_what_can_be_drawn():
    analysis = make_analysis()
    empty = LayerStatistics(5, 40)
    dark = replace(analysis.prompt, mass=torch.zeros(5, 40, dtype=torch.float64))
    left = figures.pictures(replace(analysis, statistics=empty, nulls={}, prompt=dark))
    assert names_of(left) == ["prompt_positions", "directions", "vocabulary", "similarity"]
    hidden = replace(dark, visible=torch.zeros(3, dtype=torch.bool))
    assert figures.prompt_positions(replace(analysis, prompt=hidden)) is None


def test_what_was_not_asked_for_is_not_drawn():
    bare = replace(make_analysis(), nulls={}, pairs=None, words=None)
    drawn = {found.name: found for found in figures.pictures(bare)}
    assert {"directions", "vocabulary"} & drawn.keys() == set()
    assert [found.data["chance"] for found in drawn.values() if "chance" in found.data] == [{}, {}, {}, None]
    assert not [name for name, found in drawn.items() if "chance" in found.here or "Grey:" in found.caption]
    other_width = replace(make_analysis().words, input=None)
    assert list(figures.vocabulary(replace(bare, words=other_width)).data) == ["output"]


@pytest.mark.parametrize(("n_layers", "n_latents"), [(2, 3), (5, 1), (30, 40)])
def test_few_and_many_layers_and_latents_are_drawn_without_a_warning(n_layers: int, n_latents: int):
    drawn = figures.pictures(make_analysis(n_layers, n_latents))
    assert ("directions" in names_of(drawn)) == (n_latents > 1)
    for found in drawn:
        found.figure.draw_without_rendering()


def test_a_latent_of_the_last_layer_alone_never_goes_on():
    values = torch.zeros(5, 60, 4)
    values[-1, :, 0] = 1
    statistics, nulls = LayerStatistics(5, 40), NullStatistics(5, 40)
    code = PlainCode(values, torch.arange(4).expand(5, 60, 4))
    statistics.update(code)
    nulls.update(code, 0)
    found = figures.lives(replace(make_analysis(), statistics=statistics, nulls=nulls.statistics))
    assert "with probability –; were layers independent, –." in found.here
    found.figure.draw_without_rendering()


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
    figures.save(figures.prompt_positions(make_analysis(tokens=tokens)), tmp_path)
    assert drawing.drawable("é語$") == "é□$"
    assert json.loads((tmp_path / "prompt_positions.json").read_text())["tokens"] == list(tokens)
    figures.save(figures.prompt_heatmap(make_analysis(tokens=tokens)), tmp_path)


def test_prompt_text_of_a_tokenizer_without_spaces():
    prompt = replace(make_analysis().prompt, prompt="When Mary", tokens=["<s>", "When", "Mary"])
    assert heatmaps.prompt_text(prompt) == "⟦<s>⟧ When Mary"
