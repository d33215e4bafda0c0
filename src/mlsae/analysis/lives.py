"""Pictures of latents over depth: where they begin and end, whether they go on, and how many layers they use."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from torch import Tensor

from mlsae.analysis.drawing import (
    BLUE,
    GREY,
    ORANGE,
    VERMILION,
    count_axis,
    counts_image,
    halo,
    interval_line,
    layer_axis,
    new_figure,
    percent_axis,
    plain_log,
    styled,
)
from mlsae.analysis.layers import LayerStatistics
from mlsae.analysis.picture import Picture
from mlsae.analysis.wording import NULL_NAMES, number, percent, plain
from mlsae.analyze import Analysis

_NULL_LINES = {"independent": "-", "shuffled_layers": ":"}


# ---- births, deaths, persistence -------------------------------------------------------------------------------------


@styled
def lives(analysis: Analysis) -> Picture | None:
    """First and last layers of latents and events, lengths of runs, and persistence; None for one layer or no event."""
    layers, statistics, summary = analysis.layers, analysis.statistics, analysis.summary()
    if len(layers) < 2 or not statistics.n_events.any():
        return None
    births = births_and_deaths(statistics)
    shares = {name: found.to_dict() for name, found in statistics.estimates(shapes_of_events).items()}
    persistence = summary["persistence"]
    by_chance = {
        null: {name: x.tolist() for name, x in shapes_of_events(found).items()}
        | {"persistence": summary["nulls"][null]["persistence"]}
        for null, found in analysis.nulls.items()
    }
    figure = new_figure(5.2)
    (matrix, goes_on), (runs, events) = figure.subplots(2, 2)

    edges = np.arange(len(layers) + 1) - 0.5
    counts_image(matrix, births.T.numpy(), edges, edges, "latents")
    layer_axis(matrix.xaxis, layers, "last layer", at_most=8)
    layer_axis(matrix.yaxis, layers, "first layer", at_most=8)
    matrix.set_title("Births and deaths of latents")

    _draw_persistence(goes_on, layers, persistence, by_chance)
    _draw_runs(runs, shares["runs"], by_chance)
    _draw_ends_of_events(events, layers, shares, by_chance)

    caption = (
        "Top left: latents by the first and the last layer that holds at least 1 % of their activations. Top right: of a "
        "layer's activations, the share whose latent is active on the same token at the next layer too. Bottom: runs of "
        "neighbouring layers at which a latent is active on one token, and the first and last layer of such an event. Bands "
        "are 95 % intervals over documents."
    )
    if by_chance:
        caption += " Grey: codes in which depth means nothing (bottom right: independent layers)."
    at_ends = births[0, -1] / births.sum()
    here = (
        f"Here {percent(at_ends)} of {number(births.sum())} latents are born at the first layer and die at the last. An "
        f"activation goes on to the next layer with probability {number(shares['mean_persistence'])}"
        f"{_range(persistence, layers)}{_chance(by_chance)}. "
        f"A run lasts {number(summary['events']['mean_run'])} layers on average."
    )
    data = {
        "layers": list(layers),
        "latents_by_first_and_last_layer": births,
        "persistence": persistence,
        **shares,
        "mean_run": summary["events"]["mean_run"],
        "chance": by_chance,
    }
    return Picture("lives", "Where latents begin, go on and end", caption, figure, data, here)


def _draw_persistence(axes: Axes, layers: Sequence[int], persistence: list[Any], by_chance: Mapping[str, Any]) -> None:
    x = range(len(layers) - 1)
    for null, found in by_chance.items():
        axes.plot(x, found["persistence"], color=GREY, label=NULL_NAMES[null], linestyle=_NULL_LINES[null])
    interval_line(axes, x, persistence, BLUE)
    layer_axis(axes.xaxis, layers[:-1], at_most=8)
    axes.set(title="P(active at the next layer | active here)")
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1] if by_chance else None)
    percent_axis(axes.yaxis)
    if by_chance:
        axes.legend(loc="upper right", fontsize=8)


def _draw_runs(axes: Axes, shares: list[Any], by_chance: Mapping[str, Any]) -> None:
    length = range(1, len(shares) + 1)
    for null, found in by_chance.items():
        axes.plot(length, _positive(found["runs"]), color=GREY, label=NULL_NAMES[null], linestyle=_NULL_LINES[null])
    interval_line(axes, length, _positive(shares), ORANGE)
    axes.set_yscale("log")
    plain_log(axes.yaxis)
    percent_axis(axes.yaxis)
    count_axis(axes.xaxis, len(shares), "length of a run (layers)")
    axes.set(title="Layers in a row", ylabel="share of runs")
    if by_chance:
        axes.legend(loc="upper right", fontsize=8)


def _draw_ends_of_events(
    axes: Axes, layers: Sequence[int], shares: Mapping[str, Any], by_chance: Mapping[str, Any]
) -> None:
    x = range(len(layers))
    for name, colour, label in (("first_layer", BLUE, "first"), ("last_layer", VERMILION, "last")):
        if "independent" in by_chance:
            dashes = "-" if name == "first_layer" else ":"
            axes.plot(x, by_chance["independent"][name], color=GREY, linestyle=dashes, linewidth=1.2)
        interval_line(axes, x, shares[name], colour, label=label)
    layer_axis(axes.xaxis, layers, at_most=8)
    percent_axis(axes.yaxis)
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
    axes.set(title="First and last layers of events", ylabel="share of events")
    axes.legend(loc="upper center", ncols=2, fontsize=8)


def births_and_deaths(statistics: LayerStatistics) -> Float[Tensor, "birth death"]:
    """Number of used latents by the first and the last layer that holds at least 1 % of their activations."""
    found, n_layers = statistics.distribution(), statistics.n_layers
    at = (found.birth * n_layers + found.death)[found.birth >= 0]
    return at.bincount(minlength=n_layers**2).view(n_layers, n_layers).double()


def shapes_of_events(statistics: LayerStatistics) -> dict[str, Float[Tensor, "*layer"]]:
    """Shares of runs by length (entry i: i + 1 layers) and of events by first and by last layer; persistence of all."""
    names = ("runs", "first_layer", "last_layer")
    shares = {name: (counts := getattr(statistics, name).double()) / counts.sum() for name in names}
    return shares | {"mean_persistence": statistics.persisted[:-1].sum().double() / statistics.counts[:-1].sum()}


def _positive(shares: list[Any]) -> list[Any]:
    """Shares with NaN in place of 0, which a log axis cannot show."""
    return [share if plain(share) > 0 else np.nan for share in shares]


def _range(persistence: list[Any], layers: Sequence[int]) -> str:
    known = [(plain(value), i) for i, value in enumerate(persistence) if np.isfinite(plain(value))]
    if not known:
        return ""
    low, high = (f"{number(persistence[i])} (layer {layers[i]})" for _, i in (min(known), max(known)))
    return f", from {low} to {high}"


def _chance(by_chance: Mapping[str, Any]) -> str:
    if "independent" not in by_chance:
        return ""
    return f"; were layers independent, {number(by_chance['independent']['mean_persistence'])}"


# ---- layers in use ---------------------------------------------------------------------------------------------------


@styled
def latents(analysis: Analysis) -> Picture | None:
    """How many layers latents use against how often they are active; None for one layer or no event."""
    statistics = analysis.statistics
    n_layers, used = statistics.n_layers, statistics.n_events > 0
    if n_layers < 2 or not used.any():
        return None
    log_rate = (statistics.n_events.double() / statistics.n_tokens).log10()
    low, high = (int((4 * end).floor()) for end in (log_rate[used].min(), log_rate[used].max()))
    group = (4 * log_rate).floor().where(used, low).int() - low  # a quarter of a decade each
    mean = statistics.estimates(lambda some: {"mean": mean_layers_in_use(some, group)})["mean"].to_dict()
    by_chance = None
    if "shuffled_layers" in analysis.nulls:
        by_chance = mean_layers_in_use(analysis.nulls["shuffled_layers"], group).tolist()
    in_use = statistics.distribution().n_active_layers
    n_quarters = high + 1 - low
    x_edges, y_edges = np.linspace(low / 4, (high + 1) / 4, 4 * n_quarters + 1), np.arange(n_layers + 1) + 0.5
    counts, *_ = np.histogram2d(log_rate[used].numpy(), in_use[used].numpy(), (x_edges, y_edges))

    figure = new_figure(3.0)
    axes = figure.subplots()
    counts_image(axes, counts, 10**x_edges, y_edges, "latents")
    middle = 10 ** ((np.arange(n_quarters) + low + 0.5) / 4)
    if by_chance is not None:
        axes.plot(middle, by_chance, color=GREY, linewidth=1.2, label=f"{NULL_NAMES['shuffled_layers']}: mean")
    interval_line(axes, middle.tolist(), mean, BLUE, label="mean", path_effects=halo())
    axes.set_xscale("log")
    plain_log(axes.xaxis)
    axes.set(xlabel="events per token", xlim=(10 ** x_edges[0], 10 ** x_edges[-1]), ylim=(0.5, n_layers + 0.5))
    count_axis(axes.yaxis, n_layers, "layers in use")
    figure.legend(loc="outside upper left", ncols=2, fontsize=8)
    caption = (
        "Layers that hold at least 1 % of a latent's activations, against how often it is active at any layer; the line is "
        "the mean of each quarter of a decade, with its 95 % interval over documents."
    )
    if by_chance is not None:
        caption += " Grey: the same events at layers drawn by chance, the most that so few of them could reach."
    overall = analysis.summary()["distribution"]["n_active_layers"]["mean"]
    at_all = (in_use[used] == n_layers).double().mean().item()
    here = (
        f"Here {number(used.sum())} latents use {number(overall)} of {n_layers} layers on average; {percent(at_all)} use all and "
        f"{percent((in_use[used] == 1).double().mean())} one."
    )
    data = {
        "log10_rate_edges": x_edges.tolist(),
        "n_layers": list(range(1, n_layers + 1)),
        "latents": torch.from_numpy(counts),
        "mean_rate": middle.tolist(),
        "mean_layers_in_use": mean,
        "chance": by_chance,
    }
    return Picture("latents", "How many layers latents use", caption, figure, data, here)


def mean_layers_in_use(statistics: LayerStatistics, group: Int[Tensor, " latent"]) -> Float[Tensor, " group"]:
    """Mean number of layers in use over the active latents of each group; NaN where there are none."""
    active, n_groups = statistics.n_events > 0, int(group.max()) + 1
    in_use = statistics.distribution().n_active_layers[active].double()
    return group[active].bincount(in_use, n_groups) / group[active].bincount(minlength=n_groups)
