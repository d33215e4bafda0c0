"""Pictures of spread over depth: of events, of latents, and of the layer's variance; beside what chance gives."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from torch import Tensor

from mlsae.analysis.drawing import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    VERMILION,
    count_axis,
    digits,
    layer_axis,
    new_figure,
    percent_axis,
    styled,
    whiskers,
)
from mlsae.analysis.layers import WEIGHTS, LayerStatistics
from mlsae.analysis.picture import Picture
from mlsae.analysis.wording import NULL_NAMES, ends, number, percent, plain
from mlsae.analyze import Analysis
from mlsae.intervals import Estimate

PARTS = {
    "within": "same latent, same token",
    "token": "same latent, other tokens",
    "latent": "different latents",
}
"""The terms of the depth variance, by their names in the decomposition, and what differs."""
_PART_COLOURS = (ORANGE, VERMILION, BLUE)
_KIND_CHANGED_BY = {"independent": "events", "shuffled_layers": "latents"}
"""The histogram that each null is drawn beside: it leaves the other as it is."""


# ---- events and latents ----------------------------------------------------------------------------------------------


@styled
def spread(analysis: Analysis) -> Picture | None:
    """Layers per event beside layers per latent: one token against all tokens; None if nothing was active."""
    statistics = analysis.statistics
    if not statistics.n_events.any():
        return None
    summary, shares = analysis.summary(), statistics.estimates(shares_by_layers)
    means = _means(summary)
    by_chance = {
        kind: {
            "null": null,
            "share": shares_by_layers(found)[kind].tolist(),
            "mean": _means(summary["nulls"][null])[kind],
        }
        for null, found in analysis.nulls.items()
        if (kind := _KIND_CHANGED_BY.get(null))
    }
    figure = new_figure(2.6)
    panels = figure.subplots(1, 2, sharey=True)
    words = (
        ("events", ORANGE, "One token", "layers at which a latent is active", "share of events"),
        ("latents", BLUE, "All tokens", "effective layers of a latent", "share of latents"),
    )
    for axes, (kind, colour, title, xlabel, ylabel) in zip(panels, words, strict=True):
        _histogram(axes, shares[kind], colour, means[kind], by_chance.get(kind))
        axes.set(title=title, ylabel=ylabel)
        count_axis(axes.xaxis, statistics.n_layers, xlabel)
    panels[0].set_ylim(0, 1.2 * panels[0].get_ylim()[1])  # the words stand above the bars
    panels[0].set_yticks([tick for tick in panels[0].get_yticks() if 0 <= tick <= 1])
    caption = (
        "Left: an event is one latent active on one token; at how many layers is it active? Right: over all tokens,"
        " over how many layers is a latent's activation spread? Effective layers are exp(entropy of P(layer | "
        f"latent)), drawn rounded: 1 at a single layer, {statistics.n_layers} if even over all. Upright lines are 95 % "
        "intervals over documents, with the bias of rare latents removed."
    )
    if by_chance:
        caption += (
            " Grey: codes in which each layer's tokens are in an order of their own (left), so that meeting at several "
            "layers is chance, and in which each token's layers are (right), so that no latent has a home."
        )
    chance = {kind: f" ({number(null['mean'])} by chance)" for kind, null in by_chance.items()}
    here = (
        f"Here an event is at {number(means['events'])} layers on average{chance.get('events', '')}, and "
        f"{percent(summary['events']['at_one_layer'])} of {number(statistics.n_events.sum())} events are at one; a latent over "
        f"all tokens spreads over {number(means['latents'])} effective layers on average{chance.get('latents', '')}."
    )
    data = {
        "n_events": int(statistics.n_events.sum()),
        "n_layers": list(range(1, statistics.n_layers + 1)),
        "share_of_events": shares["events"].value.tolist(),
        "share_of_events_ci95": _ends(shares["events"]),
        "share_of_latents": shares["latents"].value.tolist(),
        "share_of_latents_ci95": _ends(shares["latents"]),
        "mean_layers_per_event": means["events"],
        "mean_effective_layers": means["latents"],
        "chance": by_chance,
    }
    return Picture("spread", "One token against all tokens", caption, figure, data, here)


def shares_by_layers(statistics: LayerStatistics) -> dict[str, Float[Tensor, " layer"]]:
    """Events by the number of layers they are at, and used latents by their effective layers, rounded; entry i: i + 1."""
    effective = statistics.distribution().effective_layers
    latents = effective[~effective.isnan()].round().long().bincount(minlength=statistics.n_layers + 1)[1:]
    counts = {"events": statistics.active_layers.double(), "latents": latents.double()}
    return {kind: count / count.sum() for kind, count in counts.items()}


def _means(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The means of both histograms in a summary, before rounding."""
    return {
        "events": summary["events"]["mean_active_layers"],
        "latents": summary["distribution"]["effective_layers"]["mean"],
    }


def _histogram(axes: Axes, shares: Estimate, colour: str, mean: Any, by_chance: Mapping[str, Any] | None) -> None:
    x = range(1, len(shares.value) + 1)
    axes.bar(x, shares.value.numpy(), color=colour, width=0.85)
    whiskers(axes, x, _ends(shares))
    percent_axis(axes.yaxis)
    axes.yaxis.set_tick_params(labelleft=True)
    axes.grid(False, axis="x")
    lines = [(0.94, plain(mean), f"mean {digits(plain(mean))}", INK)]
    if by_chance is not None:
        axes.stairs(by_chance["share"], np.arange(len(x) + 1) + 0.5, baseline=None, color=GREY, linewidth=1.2)
        lines.append(
            (0.85, by_chance["mean"], f"{NULL_NAMES[by_chance['null']]}: mean {digits(by_chance['mean'])}", GREY)
        )
    for height, at, text, ink in lines:
        axes.axvline(at, color=ink, linewidth=1, linestyle="--", ymax=height + 0.04)
        side, shift = ("left", 4) if at < (len(x) + 1) / 2 else ("right", -4)
        place: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "ha": side}
        box = {"facecolor": "white", "linewidth": 0, "pad": 1}
        axes.annotate(text, (at, height), (shift, 0), color=ink, fontsize=8, va="center", bbox=box, **place)


# ---- the depth variance ----------------------------------------------------------------------------------------------


@styled
def variance(analysis: Analysis) -> Picture | None:
    """The depth variance in three parts, for each way of weighting; None where depth does not vary."""
    summary = analysis.summary()
    split, published = summary["decomposition"], summary["lawson2024"]
    if not all(plain(split[weight]["total"]) > 0 for weight in WEIGHTS):
        return None
    found = analysis.statistics.estimates(shares_of_variance)
    shares = {w: dict(zip(PARTS, found[w].to_dict(), strict=True)) for w in WEIGHTS}
    by_chance = {
        null: {w: dict(zip(PARTS, x.tolist(), strict=True)) for w, x in shares_of_variance(by_null).items()}
        for null, by_null in analysis.nulls.items()
    }
    figure = new_figure(2.5 + 0.45 * len(by_chance))
    axes = figure.subplots()
    ticks: list[tuple[float, str]] = []
    for row, weight in enumerate(WEIGHTS):
        size = 0.36 if by_chance else 0.7
        _stacked_bar(axes, row, list(shares[weight].values()), size)
        axes.text(1.01, row, f"{digits(plain(split[weight]['total']))} layers²", va="center", fontsize=8)
        ticks.append((row, f"by {weight}"))
        for i, (null, parts) in enumerate(by_chance.items()):
            place = row + size / 2 + 0.13 + 0.2 * i
            _stacked_bar(axes, place, list(parts[weight].values()), 0.17, alpha=0.45)
            ticks.append((place, NULL_NAMES[null]))
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    for label, (_, name) in zip(axes.get_yticklabels(), ticks, strict=True):
        if name in NULL_NAMES.values():
            label.set(fontsize=7, color=GREY)
    axes.set(xlim=(0, 1), ylim=(ticks[-1][0] + (0.15 if by_chance else 0.5), -0.4))
    axes.set_xlabel("share of the layer's variance (its value: right)")
    percent_axis(axes.xaxis)
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    handles = [
        Patch(color=c, label=f"{part}: {words}") for c, (part, words) in zip(_PART_COLOURS, PARTS.items(), strict=True)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, fontsize=8, handlelength=1, columnspacing=1.2)
    published_note, our_note = (
        ", ".join(f"{name} {number(found[name])}" for name in ("rel_f", "rel_t"))
        for found in (published, split["event"])
    )
    note = f"Published estimator (lawson2024): {published_note}\nOurs, by event: {our_note}"
    figure.supxlabel(note, x=0.01, ha="left", fontsize=8, color=GREY)
    caption = (
        "Draw an active (layer, token, latent) at random: why does its layer vary? The three parts add up to its "
        "variance. By mass: drawn in proportion to activation; by event: each latent on each token counts once; by "
        "count: each active layer of it counts once. In brackets: 95 % intervals over documents. The published estimator "
        "stands below for comparison with published results only: it is a second moment about layer 0, not a variance."
    )
    if by_chance:
        caption += (
            " Thin bars: codes in which depth means nothing. With independent layers a latent keeps its layers and their "
            "meeting on one token is chance; with shuffled layers an event keeps how many it has, and no latent has a home."
        )
    data = {"decomposition": split, "lawson2024": published, "shares": shares, "chance": by_chance}
    return Picture("variance", "Why the layer varies", caption, figure, data, _why(shares["mass"], split["mass"]))


def shares_of_variance(statistics: LayerStatistics) -> dict[str, Float[Tensor, " part"]]:
    """Each of PARTS as a share of the total, by weight; NaN where there is no variance."""
    terms = {weight: statistics.decomposition(weight).to_dict() for weight in WEIGHTS}
    parts = {
        weight: torch.tensor([found[part] for part in PARTS], dtype=torch.float64) for weight, found in terms.items()
    }
    return {weight: parts[weight] / terms[weight]["total"] for weight in WEIGHTS}


def _why(shares: Mapping[str, Any], split: Mapping[str, Any]) -> str:
    here = (
        f"Here, by mass, {percent(shares['within'])} is one latent's spread on one token, {percent(shares['token'])} is the "
        f"same latent at other layers on other tokens, and {percent(shares['latent'])} is different latents at different "
        "layers"
    )
    if (ratio := plain(split["rel_t"])) > 0:
        here += f"; a latent's variance over all tokens is {number(1 / ratio)} times its variance on one token"
    return f"{here}."


def _stacked_bar(axes: Axes, row: int | float, shares: Sequence[Any], height: float, alpha: int | float = 1) -> None:
    start = 0.0
    for share, colour in zip(shares, _PART_COLOURS, strict=True):
        value, (low, high) = plain(share), ends(share)
        axes.barh(row, value, left=start, color=colour, height=height, edgecolor="white", linewidth=0.8, alpha=alpha)
        ink = "white" if colour != ORANGE and alpha == 1 else INK
        text = f"{100 * value:.0f} %"
        if np.isfinite(low) and value > 0.14:
            text += f" [{100 * low:.0f}–{100 * high:.0f}]"
        if value > 0.04:
            size = 8 if alpha == 1 else 6.5
            axes.text(start + value / 2, row, text, ha="center", va="center", color=ink, fontsize=size)
        start += value


# ---- depth -----------------------------------------------------------------------------------------------------------


@styled
def centre_of_mass(analysis: Analysis) -> Picture | None:
    """Histograms of the latents' centres of mass and of their distance to a whole layer; None for one layer or no latent."""
    layers, found = analysis.layers, analysis.statistics.distribution()
    centre = found.centre_of_mass[found.used].numpy()
    if not len(centre) or len(layers) < 2:
        return None
    bins: dict[str, Any] = {"bins": 16 * len(layers), "range": (0, len(layers) - 1), "density": True}
    density, edges = np.histogram(centre, **bins)
    off_density, off_edges = np.histogram(np.abs(centre - centre.round()), bins=20, range=(0, 0.5), density=True)
    off = analysis.statistics.estimates(distance_to_a_layer)["mean"].to_dict()
    figure = new_figure(2.5)
    left, right = figure.subplots(1, 2, width_ratios=[2.4, 1])
    left.stairs(density, edges, fill=True, color=BLUE)
    chance = None
    if "shuffled_layers" in analysis.nulls:
        null = analysis.nulls["shuffled_layers"].distribution()
        chance, _ = np.histogram(null.centre_of_mass[null.used].numpy(), **bins)
        left.stairs(chance, edges, color=GREY, linewidth=1)
        left.set_ylim(0, _with_room(density.max(), chance.max()))
        left.plot(
            [], [], color=GREY, linewidth=1, label=f"{NULL_NAMES['shuffled_layers']} (peak {digits(chance.max())})"
        )
        left.legend(loc="upper right", fontsize=8)
    layer_axis(left.xaxis, layers, "layer at the centre of mass")
    left.set(xlim=(-0.1, len(layers) - 0.9), ylabel="density of latents (per layer)")
    right.stairs(off_density, off_edges, fill=True, color=BLUE)
    right.axhline(2, color=GREY, linewidth=1.2, linestyle="--", label="uniform")
    right.legend(loc="upper right", fontsize=8)
    right.set_ylim(0, 1.3 * max(2, off_density.max()))
    right.set(xlim=(0, 0.5), xlabel="distance to the nearest layer", ylabel="density (per layer)")
    right.set_xticks([0, 0.25, 0.5])
    caption = (
        "The centre of mass of a latent is the mean layer of its activation over all tokens. Peaks at whole layers "
        "would be latents that keep to one layer; right, how far from a whole layer each latent lies."
    )
    quartiles = [float(np.interp(np.quantile(centre, q), range(len(layers)), layers)) for q in (0.25, 0.5, 0.75)]
    here = (
        f"Here the middle half of {number(len(centre))} latents lies between layers {number(quartiles[0])} and "
        f"{number(quartiles[2])}; the median is {number(quartiles[1])}. They lie {number(off)} layers from a whole layer on "
        "average, where 0.25 would be no preference."
    )
    data = {
        "layers": list(layers),
        "n_latents": len(centre),
        "quartiles": quartiles,
        "edges": edges.tolist(),
        "density": density.tolist(),
        "chance_density": None if chance is None else chance.tolist(),
        "mean_distance_to_a_layer": off,
        "distance_edges": off_edges.tolist(),
        "distance_density": off_density.tolist(),
    }
    return Picture("centre_of_mass", "How deep the latents lie", caption, figure, data, here)


def distance_to_a_layer(statistics: LayerStatistics) -> dict[str, Float[Tensor, ""]]:
    """Mean of |mu - round(mu)| over used latents, mu their centre of mass; 0.25 if it is uniform over depth."""
    centre = statistics.distribution().centre_of_mass
    return {"mean": (centre - centre.round()).abs().nanmean()}


def _with_room(real: float, by_chance: float) -> float:
    """Where an axis ends that shows the real thing well, even where chance is far above it."""
    return 1.08 * max(real, min(by_chance, 2.5 * real))


def _ends(estimate: Estimate) -> list[list[float]]:
    return torch.stack([estimate.low, estimate.high], dim=-1).tolist()
