"""Each figure of the analysis: a function from numbers to a Figure, and the data behind it.

Layer axes are numbered by row (0 .. n_layers - 1) and labelled with the model's layer ids.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter
from torch import Tensor

from mlsae import files
from mlsae.analysis.drawing import (
    BLUE,
    GREY,
    INK,
    MAX_COLUMNS,
    ORANGE,
    VERMILION,
    band,
    binned,
    digits,
    direct_label,
    drawable,
    height_of,
    latents_by_layers,
    layer_axis,
    new_figure,
    plain_log,
    rendered,
    short_count,
    shortened,
    styled,
    tick_step,
)
from mlsae.analysis.layers import WEIGHTS
from mlsae.analyze import Analysis, PromptActivity

MAX_JSON_NUMBERS = 200_000
"""Numbers that a data file holds as JSON, about 5 MB; more go into a safetensors file."""
PROMPT_THRESHOLD = 1e-3
"""Activation above which a latent counts as active on a prompt (Lawson et al. 2024)."""
PARTS = {
    "within": "same latent, same token",
    "token": "same latent, other tokens",
    "latent": "different latents",
}
"""The terms of the depth variance, by their names in the decomposition, and what differs."""


@dataclass(frozen=True)
class Picture:
    """One figure, ready to be saved or put in a report."""

    name: str
    """File name without its ending."""
    title: str
    caption: str
    """How to read it, and what it shows here."""
    figure: Figure
    data: Mapping[str, Any]
    """The numbers drawn: plain JSON values, and tensors where there are many."""


def save(picture: Picture, directory: Path) -> list[Path]:
    """Write NAME.png, NAME.pdf and NAME.json (large tensors: NAME.safetensors); same picture, same bytes."""
    tensors = {name: value for name, value in picture.data.items() if isinstance(value, Tensor)}
    paths = [directory / f"{picture.name}.{ending}" for ending in ("png", "pdf", "json", "safetensors")]
    for path in paths[:2]:
        files.write_bytes(path, rendered(picture.figure, path.suffix[1:]))
    plain = {**picture.data, "title": picture.title, "caption": picture.caption}
    if sum(tensor.numel() for tensor in tensors.values()) > MAX_JSON_NUMBERS:
        files.save_tensors(paths[3], {name: tensor.contiguous() for name, tensor in tensors.items()})
        plain |= dict.fromkeys(tensors, f"tensor in {paths[3].name}")
    else:
        plain |= {name: tensor.tolist() for name, tensor in tensors.items()}
        files.remove(paths.pop())  # of an earlier, larger analysis
    files.write_json(paths[2], plain)
    return paths


def pictures(
    analysis: Analysis, evaluation: Mapping[str, Any] | None = None, metrics: Sequence[Mapping[str, Any]] = ()
) -> list[Picture]:
    """Every figure that these numbers allow, in the order of a report; `evaluation` is an Evaluation.to_dict()."""
    return [
        picture
        for picture in (training(metrics), quality(evaluation) if evaluation else None, *(f(analysis) for f in FIGURES))
        if picture is not None
    ]


# ---- heatmaps ------------------------------------------------------------------------------------------------------


def by_depth(centre_of_mass: Tensor, keep: Tensor) -> Tensor:
    """Ids of the latents to `keep`, by descending centre of mass; ties by id."""
    ids = keep.nonzero()[:, 0]
    return ids[centre_of_mass[ids].argsort(descending=True, stable=True)]


def prompt_text(prompt: PromptActivity) -> str:
    """The tokens in a row, masked ones in ⟦brackets⟧; spaced where the tokenizer keeps no spaces in single tokens."""
    between = "" if prompt.prompt.strip() in "".join(prompt.tokens) else " "
    pairs = zip(prompt.tokens, prompt.visible.tolist(), strict=True)
    return between.join(token if seen else f"⟦{token}⟧" for token, seen in pairs)


@styled
def heatmap(analysis: Analysis) -> Picture | None:
    """P(layer | latent) over all tokens, a column a latent; None if no latent was ever active."""
    statistics = analysis.statistics
    found = statistics.distribution()
    order = by_depth(found.centre_of_mass, found.used)
    if not len(order):
        return None
    rate = statistics.n_events[order].double() / statistics.n_tokens
    columns = found.probability[:, order]
    figure, shown = latents_by_layers(columns, rate, analysis.layers, "events\nper token")
    caption = (
        f"Each column is a latent{_averaged(columns, shown)}, sorted by centre of mass: late layers on the left. "
        "Colour is the share of its activation at each layer, so a column sums to 1. The strip above says how often"
        " the latents are active, which normalised columns hide (line: mean of neighbours; band: their 10–90 % "
        "range)."
    )
    data = {
        "layers": list(analysis.layers),
        "n_tokens": statistics.n_tokens,
        "n_latents": statistics.n_latents,
        "median_largest_share": float(columns.amax(0).median()),
        "latent": order,
        "centre_of_mass": found.centre_of_mass[order],
        "events_per_token": rate,
        "columns": shown,
    }
    return Picture("heatmap", "Where each latent is active", caption, figure, data)


@styled
def prompt_heatmap(analysis: Analysis) -> Picture | None:
    """The same for one prompt; None if it activates no latent at a visible position."""
    prompt = analysis.prompt
    mass = prompt.mass.double()
    probability = mass / mass.sum(0)
    centre = torch.arange(len(mass), dtype=torch.float64) @ probability
    order = by_depth(centre, mass.amax(0) > PROMPT_THRESHOLD)
    if not len(order):
        return None
    text = shortened(prompt_text(prompt), 1000)
    total, columns = mass.sum(0)[order], probability[:, order]
    figure, shown = latents_by_layers(columns, total, analysis.layers, "summed\nactivation")
    figure.suptitle(drawable(shortened(text, 100)), x=0.01, ha="left", fontsize=9)
    caption = (
        f"The same for the latents that one prompt activates{_averaged(columns, shown)}, sorted by their centre of "
        "mass on it. The strip is each latent's activation summed over the prompt. Positions in ⟦brackets⟧ are "
        f"masked: the SAE was not trained on them, and they are left out. The prompt: “{text}”."
    )
    data = {
        "prompt": prompt.prompt,
        "tokens": prompt.tokens,
        "visible": prompt.visible.tolist(),
        "masked_share": prompt.masked_share,
        "layers": list(analysis.layers),
        "share_at_one_layer": float((columns.amax(0) > 0.99).double().mean()),
        "latent": order,
        "centre_of_mass": centre[order],
        "activation": total,
        "columns": shown,
    }
    return Picture("prompt_heatmap", "Where one prompt's latents are active", caption, figure, data)


@styled
def prompt_positions(analysis: Analysis) -> Picture | None:
    """Activation of all latents by token and layer of the prompt; None if no position is visible."""
    prompt = analysis.prompt
    if not prompt.visible.any():
        return None
    seen = prompt.by_position.numpy().copy()
    seen[:, ~prompt.visible.numpy()] = np.nan
    figure = new_figure(height_of(len(seen)) + 0.6)
    axes = figure.subplots()
    image = axes.imshow(seen, cmap="magma_r", aspect="auto", vmin=0)
    axes.set_facecolor("#d9d9d9")
    axes.grid(False)
    step = -(-len(prompt.tokens) // 60)
    labels = [drawable(token.strip() or "␣")[:16] for token in prompt.tokens]
    axes.set_xticks(range(0, len(labels), step), labels[::step], rotation=90)
    axes.set_xlabel("token")
    layer_axis(axes.yaxis, analysis.layers)
    figure.colorbar(image, ax=axes, label="summed activation", pad=0.015, aspect=15)
    layer, position = np.unravel_index(np.nanargmax(seen), seen.shape)
    caption = (
        "Activation of all latents together at each token of the prompt, in the units of the SAE's input frame, "
        "where masked positions are grey."
    )
    data = {
        "tokens": prompt.tokens,
        "visible": prompt.visible.tolist(),
        "layers": list(analysis.layers),
        "largest": {
            "layer": analysis.layers[layer],
            "token": prompt.tokens[position],
            "activation": float(seen[layer, position]),
        },
        "median": float(np.nanmedian(seen)),
        "activation": prompt.by_position,
    }
    return Picture("prompt_positions", "The same prompt, token by token", caption, figure, data)


def _averaged(columns: Tensor, shown: Tensor) -> str:
    per_bin = columns.shape[1] / shown.shape[1]
    return "" if per_bin == 1 else f" (drawn as means of {per_bin:.2g} neighbours each)"


# ---- spread over layers --------------------------------------------------------------------------------------------


@styled
def centre_of_mass(analysis: Analysis) -> Picture | None:
    """Histogram of the latents' centres of mass; None if no latent was ever active or there is one layer."""
    layers, found = analysis.layers, analysis.statistics.distribution()
    centre = found.centre_of_mass[found.used].numpy()
    if not len(centre) or len(layers) < 2:
        return None
    density, edges = np.histogram(centre, bins=16 * len(layers), range=(0, len(layers) - 1), density=True)
    figure = new_figure(2.4)
    axes = figure.subplots()
    axes.stairs(density, edges, fill=True, color=BLUE)
    layer_axis(axes.xaxis, layers, "layer at the centre of mass")
    axes.set(xlim=(-0.1, len(layers) - 0.9), ylabel="density of latents (per layer)")
    caption = (
        "The centre of mass of a latent is the mean layer of its activation over all tokens. Peaks at whole layers "
        "would be latents that keep to one layer."
    )
    data = {
        "layers": list(layers),
        "n_latents": len(centre),
        "quartiles": [float(np.interp(np.quantile(centre, q), range(len(layers)), layers)) for q in (0.25, 0.5, 0.75)],
        "edges": edges.tolist(),
        "density": density.tolist(),
    }
    return Picture("centre_of_mass", "How deep the latents lie", caption, figure, data)


@styled
def spread(analysis: Analysis) -> Picture | None:
    """Layers per event beside layers per latent: one token against all tokens; None if nothing was active."""
    statistics = analysis.statistics
    found = statistics.distribution()
    if not found.used.any():
        return None
    n_layers = np.arange(1, statistics.n_layers + 1)
    events = (statistics.active_layers.double() / statistics.active_layers.sum()).numpy()
    effective = found.effective_layers[found.used].numpy()
    latents = np.bincount(effective.round().astype(int), minlength=len(n_layers) + 1)[1:] / len(effective)
    means = float(events @ n_layers), float(effective.mean())
    figure = new_figure(2.6)
    left, right = figure.subplots(1, 2, sharey=True)
    _shares(left, events, means[0], ORANGE, "One token", "layers at which a latent is active", "share of events")
    _shares(right, latents, means[1], BLUE, "All tokens", "effective layers of a latent", "share of latents")
    caption = (
        "Left: an event is one latent active on one token; at how many layers is it active? Right: over all tokens,"
        " over how many layers is a latent's activation spread? Effective layers are exp(entropy of P(layer | "
        f"latent)), drawn rounded: 1 at a single layer, {len(n_layers)} if even over all."
    )
    data = {
        "n_events": int(statistics.n_events.sum()),
        "n_layers": n_layers.tolist(),
        "share_of_events": events.tolist(),
        "share_of_latents": latents.tolist(),
        "mean_layers_per_event": means[0],
        "mean_effective_layers": means[1],
    }
    return Picture("spread", "One token against all tokens", caption, figure, data)


def _shares(axes: Axes, shares: np.ndarray, mean: float, colour: str, title: str, xlabel: str, ylabel: str) -> None:
    axes.bar(np.arange(1, len(shares) + 1), shares, color=colour, width=0.85)
    axes.axvline(mean, color=INK, linewidth=1, linestyle="--")
    side, shift = ("left", 5) if mean < (len(shares) + 1) / 2 else ("right", -5)
    place: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "ha": side}
    axes.annotate(f"mean {digits(mean)}", (mean, 0.94), (shift, 0), fontsize=8, **place)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f} %"))
    axes.yaxis.set_tick_params(labelleft=True)
    step = tick_step(len(shares))
    axes.set_xticks(range(1, len(shares) + 1) if step == 1 else [1, *range(step, len(shares) + 1, step)])
    axes.grid(False, axis="x")


@styled
def variance(analysis: Analysis) -> Picture | None:
    """The depth variance in three parts, for each way of weighting; None where depth does not vary."""
    split = {weight: analysis.statistics.decomposition(weight) for weight in WEIGHTS}
    if not all(found.total > 0 for found in split.values()):
        return None
    published = analysis.statistics.lawson2024()
    figure = new_figure(2.3)
    axes = figure.subplots()
    for row, weight in enumerate(WEIGHTS):
        _stacked_bar(axes, row, [getattr(split[weight], part) / split[weight].total for part in PARTS])
        axes.text(1.01, row, f"{digits(split[weight].total)} layers²", va="center", fontsize=8)
    axes.set_yticks(range(len(WEIGHTS)), [f"by {weight}" for weight in WEIGHTS])
    axes.set(ylim=(len(WEIGHTS) - 0.5, -0.5), xlim=(0, 1), xlabel="share of the layer's variance (its value: right)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.0f} %"))
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    handles = [
        Patch(color=c, label=f"{part}: {words}") for c, (part, words) in zip(_PART_COLOURS, PARTS.items(), strict=True)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, fontsize=8, handlelength=1, columnspacing=1.2)
    note = f"rel_f {digits(published.rel_f)}, rel_t {digits(published.rel_t)}; by event, "
    note += f"ours: {digits(split['event'].rel_f)}, {digits(split['event'].rel_t)}"
    figure.supxlabel(f"Published estimator (lawson2024): {note}", x=0.01, ha="left", fontsize=8, color=GREY)
    caption = (
        "Draw an active (layer, token, latent) at random: why does its layer vary? The three parts add up to its "
        "variance. By mass: drawn in proportion to activation; by event: each latent on each token counts once; by "
        "count: each active layer of it counts once. The published estimator stands below for comparison with "
        "published results only: it is a second moment about layer 0, not a variance."
    )
    data = {"decomposition": {w: found.to_dict() for w, found in split.items()}, "lawson2024": published.to_dict()}
    return Picture("variance", "Why the layer varies", caption, figure, data)


_PART_COLOURS = (ORANGE, VERMILION, BLUE)


def _stacked_bar(axes: Axes, row: int, shares: Sequence[float]) -> None:
    start = 0.0
    for share, colour in zip(shares, _PART_COLOURS, strict=True):
        axes.barh(row, share, left=start, color=colour, height=0.7, edgecolor="white", linewidth=0.8)
        if share > 0.04:
            ink = INK if colour == ORANGE else "white"
            axes.text(start + share / 2, row, f"{100 * share:.0f} %", ha="center", va="center", color=ink, fontsize=8)
        start += share


# ---- curves --------------------------------------------------------------------------------------------------------


@styled
def similarity(analysis: Analysis) -> Picture | None:
    """Cosine of adjacent layers, and norms; None for a single layer."""
    layers, cosines, norm = analysis.layers, analysis.similarity.to_dict(), analysis.means.to_dict()["norm"]
    if len(layers) < 2:
        return None
    figure = new_figure(2.7)
    left, right = figure.subplots(1, 2)
    for name, colour in (("raw", GREY), ("centred", BLUE)):
        band(left, range(len(layers) - 1), cosines[name], colour)
    direct_label(left, [("raw", cosines["raw"]["mean"], GREY), ("centred", cosines["centred"]["mean"], BLUE)])
    pairs = [f"{a}→{b}" for a, b in pairwise(layers)]
    step = -(-len(pairs) // 6)
    left.set_xticks(range(0, len(pairs), step), pairs[::step])
    left.set(xlabel="pair of layers", ylabel="cosine similarity", ylim=(min(0, left.get_ylim()[0]), 1.02))
    band(right, range(len(layers)), norm, BLUE)
    right.set_yscale("log")
    plain_log(right)
    layer_axis(right.xaxis, layers)
    right.set_ylabel("norm of the residual vector")
    caption = (
        "Left: cosine between a token's residual vector at one layer and at the next; “centred” subtracts each "
        "layer's mean vector first. Right: length of the vectors. Lines are means over tokens, bands one standard "
        "deviation."
    )
    data = {"layers": list(layers), "pairs": pairs, "cosine": cosines, "norm": norm}
    return Picture("similarity", "How much changes from layer to layer", caption, figure, data)


@styled
def quality(evaluation: Mapping[str, Any]) -> Picture:
    """FVU of every layer, and what replacing it costs where that was measured."""
    rows, published = evaluation["layers"], evaluation["lawson2024"].get("layers", [])
    layers = [int(row["layer"]) for row in rows]
    curves = {"fvu": _column(rows, "fvu"), "fvu_lawson2024": _column(published, "fvu")}
    measured = "delta_ce" in rows[0]
    figure = new_figure(2.5)
    left, *rest = figure.subplots(1, 1 + measured, squeeze=False)[0]
    lines = [("standard", curves["fvu"], BLUE), ("lawson2024", curves["fvu_lawson2024"], GREY)][: 1 + bool(published)]
    for _, values, colour in lines:
        left.plot(values, "o-", color=colour)
    direct_label(left, lines)
    layer_axis(left.xaxis, layers)
    left.set(ylabel="variance unexplained (FVU)", ylim=(0, None))
    caption = (
        "Share of each layer's variance that the SAE leaves unexplained: 0 is perfect, 1 no better than the mean "
        "vector. In grey the published definition, with another denominator."
    )
    for axes in rest:
        curves["delta_ce"] = _column(rows, "delta_ce")
        _draw_delta_ce(axes, curves["delta_ce"], layers, _plain(evaluation["all_layers"].get("delta_ce")))
        caption += " Right: the rise in cross-entropy when a layer, or every layer, is replaced by its reconstruction."
    data = {"layers": layers, **curves, "all_layers": dict(evaluation["all_layers"])}
    return Picture("quality", "Quality at each layer", caption, figure, data)


def _draw_delta_ce(axes: Axes, values: list[float], layers: Sequence[int], together: float) -> None:
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.plot(values, "o-", color=BLUE)
    if np.isfinite(together):
        axes.axhline(together, color=VERMILION, linestyle="--", linewidth=1.2)
        place: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "fontsize": 8}
        axes.annotate(f"all layers at once: {digits(together)}", (0.02, together), (0, 4), color=VERMILION, **place)
    axes.margins(y=0.15)
    layer_axis(axes.xaxis, layers)
    axes.set_ylabel("Δ cross-entropy (nats per token)")


@styled
def training(metrics: Sequence[Mapping[str, Any]]) -> Picture | None:
    """FVU and dead latents over the tokens seen in training; None without records."""
    steps = [row for row in metrics if row.get("fvu") is not None]
    if not steps:
        return None
    tokens, fvu, dead = (np.array(_column(steps, name)) for name in ("tokens", "fvu", "dead_fraction"))
    figure = new_figure(3.2)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    window = max(1, len(fvu) // 50)
    smooth = np.convolve(fvu, np.ones(window) / window, "valid")
    above.plot(binned(tokens, MAX_COLUMNS), binned(fvu, MAX_COLUMNS), color=BLUE, alpha=0.3, linewidth=0.8)
    above.plot(binned(tokens[window // 2 :][: len(smooth)], MAX_COLUMNS), binned(smooth, MAX_COLUMNS), color=BLUE)
    held_out = [(row["tokens"], row["validation_fvu"]) for row in metrics if row.get("validation_fvu") is not None]
    if held_out:
        above.plot(*zip(*held_out, strict=True), "o", color=VERMILION, label="held-out text")
        above.legend()
    if fvu.max() > 8 * fvu.min() > 0:
        above.set_yscale("log")
        plain_log(above)
    else:
        above.set_ylim(0, None)
    above.set_ylabel("FVU (mean over layers)")
    below.plot(binned(tokens, MAX_COLUMNS), binned(dead, MAX_COLUMNS), color=ORANGE)
    below.set(ylabel="dead latents", xlabel="tokens seen in training")
    below.set_ylim(0, None if np.nan_to_num(dead).max() > 0 else 0.1)
    below.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
    below.xaxis.set_major_formatter(FuncFormatter(short_count))
    figure.align_ylabels()
    caption = (
        f"Fraction of variance unexplained: thin, each report; bold, the mean of {window} of them. Below, the share "
        "of latents that have not been active for long."
    )
    ends = {"first_fvu": float(fvu[0]), "last_fvu": float(smooth[-1]), "window": window}
    series = {"tokens": tokens.tolist(), "fvu": fvu.tolist(), "dead_fraction": dead.tolist()}
    data = {**ends, **series, "validation_fvu": held_out}
    return Picture("training", "Training", caption, figure, data)


FIGURES: tuple[Callable[[Analysis], Picture | None], ...] = (
    heatmap, spread, variance, centre_of_mass, prompt_heatmap, prompt_positions, similarity,
)  # fmt: skip
"""The figures of an Analysis, in the order of a report."""


def _plain(value: Any) -> float:
    """A number without its interval, NaN where there is none."""
    value = value["value"] if isinstance(value, Mapping) else value
    return float("nan") if value is None else float(value)


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [_plain(row.get(name)) for row in rows]
