"""Pictures of angles: between the residual stream of adjacent layers, between latents, and of latents with embeddings."""

from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from scipy.special import betainc
from torch import Tensor

from mlsae.analysis.directions import COSINE_LIMIT, NEAR_DUPLICATE, Chance, DepthGaps, Maxima, Pairs
from mlsae.analysis.drawing import (
    BLUE,
    GREY,
    ORANGE,
    band,
    counts_image,
    direct_label,
    halo,
    layer_axis,
    new_figure,
    plain_log,
    styled,
    whiskers,
)
from mlsae.analysis.picture import Picture
from mlsae.analysis.wording import number, percent
from mlsae.analyze import Analysis

# ---- the residual stream ---------------------------------------------------------------------------------------------


@styled
def similarity(analysis: Analysis) -> Picture | None:
    """Cosine of adjacent layers, norms, and how far each layer's vectors lie from 0; None for a single layer."""
    layers, cosines, means = analysis.layers, analysis.similarity.to_dict(), analysis.means.to_dict()
    if len(layers) < 2:
        return None
    norm, gamma = means["norm"], means["gamma"]
    figure = new_figure(2.5)
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.35, 1, 1])
    for name, colour in (("raw", GREY), ("centred", BLUE)):
        band(left, range(len(layers) - 1), cosines[name], colour)
        whiskers(left, range(len(layers) - 1), cosines[name]["ci95"])
    direct_label(left, [("raw", cosines["raw"]["mean"], GREY), ("centred", cosines["centred"]["mean"], BLUE)])
    pairs = [f"{a}→{b}" for a, b in pairwise(layers)]
    step = -(-len(pairs) // 4) if len(pairs) > 5 else 1
    left.set_xticks(range(0, len(pairs), step), pairs[::step])
    left.set(xlabel="pair of layers", ylabel="cosine similarity", ylim=(min(0, left.get_ylim()[0]), 1.02))
    band(middle, range(len(layers)), norm, BLUE)
    middle.set_yscale("log")
    plain_log(middle.yaxis)
    middle.set_ylabel("norm of the residual vector")
    right.plot(np.where(np.isfinite(gamma), gamma, np.nan), "o-", color=BLUE)
    right.set(ylabel="γ: offset over spread", ylim=(0, 1.1 * max([x for x in gamma if np.isfinite(x)], default=1)))
    for axes in (middle, right):
        layer_axis(axes.xaxis, layers, at_most=6)
    caption = (
        "Left: cosine between a token's residual vector at one layer and at the next; “centred” subtracts each "
        "layer's mean vector first. Lines are means over tokens, bands one standard deviation, upright lines the 95 % "
        "interval of the mean over documents. Middle: length of the vectors. Right: γ, the length of a layer's mean vector "
        "over the spread about it; an offset that layers share lifts raw cosines to γ²/(1 + γ²) by itself."
    )
    mean = cosines["centred"]["mean"]
    low, high = (
        f"{number(mean[i])} (layers {pairs[i]})" if np.isfinite(mean[i]) else "–"
        for i in (int(np.argmin(mean)), int(np.argmax(mean)))
    )
    here = (
        f"Here the centred cosine runs from {low} to {high}; the mean norm is {number(norm['mean'][0])} at layer {layers[0]} "
        f"and {number(norm['mean'][-1])} at layer {layers[-1]}, and γ runs from {number(min(gamma))} to {number(max(gamma))}."
    )
    data = {"layers": list(layers), "pairs": pairs, "cosine": cosines, "norm": norm, "gamma": gamma}
    return Picture("similarity", "How much changes from layer to layer", caption, figure, data, here)


# ---- latents with each other -----------------------------------------------------------------------------------------


@styled
def directions(analysis: Analysis) -> Picture | None:
    """Cosines of all pairs of decoder rows, their maxima, and cosine against distance in depth; None if not compared."""
    pairs = analysis.pairs
    if pairs is None or not pairs.histogram.any():
        return None
    depth = pairs.depth if len(analysis.layers) > 1 else None
    figure = new_figure(2.4 if depth is None else 4.9)
    panels = figure.subplots(1 if depth is None else 2, 2, squeeze=False)
    edges = np.linspace(-1, 1, len(pairs.histogram) + 1)
    expected = isotropic_cosines(analysis.means.d_model, edges) * int(pairs.histogram.sum())
    _all_cosines(panels[0, 0], pairs, edges, expected)
    maxima = _maxima(panels[0, 1], pairs.max_cosine, pairs.chance, BLUE)
    panels[0, 1].set(xlabel="largest cosine with another latent", ylabel="latents")
    data: dict[str, Any] = {
        **pairs.to_dict(),
        "edges": edges.tolist(),
        "isotropic": expected.tolist(),
        "maxima": maxima,
    }
    found, chance = Maxima.of(pairs.max_cosine), pairs.chance
    caption = (
        "Top left: cosines of all pairs of decoder rows, and of as many random directions. Top right: each latent's largest; "
        "grey, mean and one standard deviation for random directions, uniform or with the decoder's mean and covariance."
    )
    here = (
        f"Here a latent's largest cosine with another is {number(found.mean)} on average, against "
        f"{number(chance.isotropic.mean)} for uniform directions and {number(chance.covariance.mean)} with the same covariance; "
        f"{percent(found.near_duplicates)} have another above {NEAR_DUPLICATE}."
    )
    if depth is not None:
        _against_depth(panels[1, 0], panels[1, 1], depth)
        data["depth_histogram"] = depth.histogram
        caption += (
            " Bottom: cosine against the distance between the latents' centres of mass; right, the mean of each distance on "
            "its own scale, with two standard deviations of what permuted centres give."
        )
        here += f" {_first_and_last(depth)}"
    return Picture("directions", "Directions of the latents", caption, figure, data, here)


def isotropic_cosines(d_model: int, edges: Float[np.ndarray, " edge"]) -> Float[np.ndarray, " bin"]:
    """Share of the cosines of independent uniform directions between `edges`: (1 + cos) / 2 ~ Beta((d-1)/2, (d-1)/2)."""
    half = (d_model - 1) / 2
    return np.diff(betainc(half, half, (1 + edges) / 2)) if d_model > 1 else np.full(len(edges) - 1, np.nan)


def _all_cosines(axes: Axes, pairs: Pairs, edges: np.ndarray, expected: np.ndarray) -> None:
    axes.stairs(pairs.histogram.numpy(), edges, fill=True, color=BLUE)
    axes.stairs(
        np.where(expected >= 0.5, expected, np.nan), edges, color=GREY, linewidth=1.2, label="random directions"
    )
    axes.set_yscale("log")
    axes.set(
        xlim=(-1, 1), ylim=(0.5, 30.0 * int(pairs.histogram.max())), xlabel="cosine of two latents", ylabel="pairs"
    )
    plain_log(axes.yaxis)
    axes.legend(loc="upper right", fontsize=8)


def _maxima(axes: Axes, largest: Float[Tensor, " latent"], chance: Chance, colour: str) -> dict[str, list[float]]:
    """A histogram of maxima under what random directions give."""
    counts, edges = np.histogram(largest.double().numpy(), bins=60)
    axes.stairs(counts, edges, fill=True, color=colour)
    top = 1.45 * max(1, counts.max())
    rows = ((0.93, chance.isotropic, "o", "random, uniform"), (0.81, chance.covariance, "s", "same covariance"))
    for height, found, mark, label in rows:
        axes.errorbar(
            found.mean, height * top, xerr=found.std, fmt=mark, color=GREY, capsize=3, linewidth=1.2, label=label
        )
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=8, borderpad=0.1, borderaxespad=0.1)
    axes.set_ylim(0, top)
    return {"edges": edges.tolist(), "latents": counts.tolist()}


def _against_depth(density: Axes, means: Axes, depth: DepthGaps) -> None:
    histogram = depth.histogram.numpy()
    n_gaps, n_cosines = histogram.shape
    gaps = np.linspace(0, depth.max_gap, n_gaps + 1)
    cosines = np.linspace(-COSINE_LIMIT, COSINE_LIMIT, n_cosines // 4 + 1)
    shown = histogram.reshape(n_gaps, -1, 4).sum(2)  # a cosine axis of 512 has more rows than the picture
    counts_image(density, shown, gaps, cosines, "pairs")
    middle, mean, spread = (gaps[1:] + gaps[:-1]) / 2, depth.mean.numpy(), 2 * depth.chance_std.numpy()
    density.plot(middle, mean, color=BLUE, linewidth=1.2, path_effects=halo(2.4))
    density.set(ylabel="cosine of two latents", ylim=(-COSINE_LIMIT, COSINE_LIMIT))
    means.fill_between(
        middle, depth.chance_mean - spread, depth.chance_mean + spread, color=GREY, alpha=0.35, linewidth=0
    )
    means.axhline(depth.chance_mean, color=GREY, linewidth=1)
    means.plot(middle, mean, "o-", color=BLUE, markersize=2.5, linewidth=1.2)
    means.set(ylabel="mean cosine", xlim=(0, depth.max_gap))
    certain = np.concatenate([mean, depth.chance_mean - spread, depth.chance_mean + spread])
    certain = certain[np.tile(depth.n_pairs.numpy() >= 1e-3 * depth.n_pairs.sum().item(), 3)]
    certain = certain[np.isfinite(certain)]
    if len(certain) and np.ptp(certain) > 0:  # the last gaps have few pairs, and would hide all others
        means.set_ylim(certain.min() - 0.15 * np.ptp(certain), certain.max() + 0.15 * np.ptp(certain))
    for axes in (density, means):
        axes.set_xlabel("distance in depth (layers)")


def _first_and_last(depth: DepthGaps) -> str:
    known = (~depth.mean.isnan() & (depth.chance_std > 0)).nonzero()[:, 0]
    if not len(known):
        return "There are too few pairs to compare their depths."
    ends, width = (int(known[0]), int(known[-1])), depth.max_gap / len(depth.mean)
    away = (((depth.mean[i] - depth.chance_mean) / depth.chance_std[i]).item() for i in ends)
    first, last = (
        f"{number(depth.mean[i].item())}, {abs(z):.1f} standard deviations {'above' if z > 0 else 'below'}"
        for i, z in zip(ends, away)
    )
    return (
        f"By chance pairs have a mean cosine of {number(depth.chance_mean)}; those less than {number(width, 2)} layers apart "
        f"have {first}; those {number(width * ends[1], 2)} or more apart {last}."
    )


# ---- latents with embeddings -----------------------------------------------------------------------------------------


@styled
def vocabulary(analysis: Analysis) -> Picture | None:
    """Each latent's largest cosine with an embedding, input and output; None if neither was compared."""
    words = analysis.words
    named = {} if words is None else {"input": words.input, "output": words.output}
    compared = {name: matches for name, matches in named.items() if matches is not None and len(matches.cosines)}
    if not compared:
        return None
    figure = new_figure(2.4)
    panels = figure.subplots(1, len(compared), squeeze=False, sharey=True)[0]
    data: dict[str, Any] = {}
    parts = []
    for axes, (name, matches), colour in zip(panels, compared.items(), (BLUE, ORANGE), strict=False):
        largest = matches.cosines[:, 0]
        data[name] = {**matches.to_dict(), **_maxima(axes, largest, matches.chance, colour)}
        axes.set(xlabel=f"largest cosine with an {name} embedding", ylabel="latents")
        mean, chance = Maxima.of(largest).mean, matches.chance.isotropic.mean
        parts.append(f"{number(mean)} with {name} embeddings, where uniform directions have {number(chance)}")
    caption = (
        "The largest cosine of each latent's direction with any token's embedding, read (input) or predicted (output); grey, "
        "mean and one standard deviation for random directions, uniform or with the latents' mean and covariance."
    )
    here = f"Here a latent's largest cosine is, on average, {' and '.join(parts)}."
    return Picture("vocabulary", "Directions that are words", caption, figure, data, here)
