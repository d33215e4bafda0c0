"""Figures of SAEs that differ in one thing: where their latents live against k and size, and what a tuned lens changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlsae.analysis.comparison import LINES, MARKS, interval, whole_numbers
from mlsae.analysis.drawing import GREY, layer_axis, new_figure, styled
from mlsae.analysis.figures import Picture

KINDS = ("lens", "per-layer", "random-model")
"""Arms that are made otherwise than the main one: behind a tuned lens, of one dictionary a layer, on an untrained model."""


@dataclass(frozen=True)
class Arm:
    """One SAE of a reproduction: what it is, how good, and where its latents live."""

    name: str
    """Its folder's name."""
    k: int
    expansion_factor: float
    """Latents of one dictionary as a multiple of d_model."""
    evaluation: Mapping[str, Any]
    """The names of evaluation.json."""
    summary: Mapping[str, Any]
    """The names of summary.json."""
    similarity: Mapping[str, Any]
    """Mean cosine of adjacent layers, `raw` and `centred`, with intervals; behind the lens, if it has one."""

    def differs_in(self, main: "Arm") -> str | None:
        """`k` or `expansion_factor` if that alone differs from the main arm's, `kind` if it is made otherwise, else None."""
        if self.name in KINDS:
            return "kind"
        return next((x for x in ("k", "expansion_factor") if getattr(self, x) != getattr(main, x)), None)


CURVES = {
    "std of a latent's layers": {
        "all tokens": lambda s: s["distribution"]["std"]["mean"],
        "one token": lambda s: root(s["decomposition"]["event"]["within"]),
    },
    "effective layers": {
        "all tokens": lambda s: s["distribution"]["effective_layers"]["mean"],
        "one token": lambda s: s["events"]["mean_effective_layers"],
    },
    "variance: one token / all": {
        "within / (within + token)": lambda s: s["decomposition"]["mass"]["rel_t"],
        "as published": lambda s: s["lawson2024"]["rel_t"],
    },
}
"""What is drawn against k and size: a panel each, its lines and where in summary.json they are."""


@styled
def depth_curves(arms: Sequence[Arm], x: str, x_label: str) -> Picture:
    """Spread over layers, of a latent over all tokens and on one, and their ratio, against `k` or `expansion_factor`."""
    figure = new_figure(2.9)
    arms = sorted(arms, key=lambda arm: getattr(arm, x))
    places = [getattr(arm, x) for arm in arms]
    data: dict[str, Any] = {x: places}
    for axes, (label, lines) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        data[label] = {}
        for i, (line, number_of) in enumerate(lines.items()):
            found = np.array([interval(number_of(arm.summary)) for arm in arms])
            style: dict[str, Any] = {"color": GREY if line == "as published" else LINES[i], "marker": MARKS[i]}
            axes.plot(places, found[:, 0], label=line, **style)
            known = np.isfinite(found).all(1)
            ends = np.abs(found[known, 1:] - found[known, :1]).T
            axes.errorbar(np.array(places)[known], found[known, 0], ends, linestyle="", capsize=2, color=style["color"])
            data[label][line] = found.tolist()
        whole_numbers(axes, places)
        axes.set(xlabel=x_label.partition(" (")[0] if len(x_label) > 30 else x_label, title=label)
        axes.title.set_fontsize(8)
        axes.set_ylim(0, None)
        axes.legend(fontsize=7)
    caption = (
        "How far a latent spreads over layers: over all tokens (std, exp(entropy) of P(layer | latent), the mean over latents) "
        "and on one token (root mean variance, and mean exp(entropy), of an event). Right, the two variances as a ratio; the "
        "published ratio, in grey, is of second moments about layer 0. Bars are 95 % intervals over documents."
    )
    name = "depth_k" if x == "k" else "depth_size"
    return Picture(name, f"Spread over layers against {'k' if x == 'k' else 'size'}", caption, figure, data)


@styled
def lens_kl(quality: Mapping[str, Any]) -> Picture:
    """How near each layer's prediction is to the model's own, read directly and through the tuned lens."""
    figure = new_figure(2.5)
    axes = figure.subplots()
    rows = quality["layers"]
    lines = [("logit lens", "logit_lens_kl", GREY), ("tuned lens", "tuned_lens_kl", LINES[0])]
    curves = [(line, [float(row[name]) for row in rows], colour) for line, name, colour in lines]
    for line, values, colour in curves:
        axes.plot(values, "o-", color=colour, label=line)
    axes.legend()
    layer_axis(axes.xaxis, [int(row["layer"]) for row in rows])
    axes.set(ylabel="KL to the model's prediction (nats)", ylim=(0, None))
    condition = [float(row["condition_number"]) for row in rows]
    caption = (
        f"KL divergence from the model's own prediction of the next token, on {quality['n_tokens']:,} tokens of held-out text. "
        f"The maps' condition numbers reach {max(condition):.3g}."
    )
    data = {"layers": [row["layer"] for row in rows], "condition_number": condition}
    data |= {name: values for (_, values, _), (_, name, _) in zip(curves, lines, strict=True)}
    return Picture("lens", "What the tuned lens was fitted to", caption, figure, data)


@styled
def similarity_behind(arms: Sequence[Arm]) -> Picture:
    """Cosine of adjacent layers in the residual stream and behind the tuned lens."""
    figure = new_figure(2.6)
    data: dict[str, Any] = {}
    for axes, name in zip(figure.subplots(1, 2, sharey=True), ("raw", "centred"), strict=True):
        for i, arm in enumerate(arms):
            found = np.array([interval(x) for x in arm.similarity[name]])
            label = "behind the lens" if arm.name == "lens" else "residual stream"
            axes.plot(found[:, 0], color=LINES[i], marker=MARKS[i], markersize=3, label=label)
            axes.fill_between(range(len(found)), found[:, 1], found[:, 2], color=LINES[i], alpha=0.2, linewidth=0)
            data[f"{name}, {label}"] = found.tolist()
        layers = [int(layer) for layer in arms[0].summary["layers"]]
        layer_axis(axes.xaxis, layers[:-1], "layer, with the next")
        axes.set(title=name, ylabel="cosine similarity")
        axes.legend(fontsize=8)
    caption = (
        "Mean cosine of a token's vectors at one layer and at the next, as they are and about each layer's mean; bands are 95 % "
        "intervals over documents."
    )
    return Picture("similarity_lens", "What the lens changes between layers", caption, figure, data)


def root(value: Any) -> dict[str, Any]:
    """The square root of a number and of the ends of its interval."""
    found = np.sqrt(np.clip(interval(value), 0, None))
    return {"value": float(found[0]), "ci95": [float(end) for end in found[1:]]}
