"""Pictures of activation by layer: of every latent over much text, and of one prompt.

Layer axes are numbered by row (0 .. n_layers - 1) and labelled with the model's layer ids.
"""

import numpy as np
import torch
from torch import Tensor

from mlsae.analysis.drawing import (
    drawable,
    height_of,
    latents_by_layers,
    layer_axis,
    new_figure,
    shortened,
    styled,
)
from mlsae.analysis.picture import Picture
from mlsae.analysis.wording import number, percent
from mlsae.analyze import Analysis, PromptActivity

PROMPT_THRESHOLD = 1e-3
"""Activation above which a latent counts as active on a prompt (Lawson et al. 2024)."""


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
    largest = float(columns.amax(0).median())
    here = (
        f"Here {number(len(order))} of {number(statistics.n_latents)} latents were active in "
        f"{number(statistics.n_tokens)} tokens. Half of them have at least {percent(largest)} of their activation at one "
        f"layer; spread evenly over all {len(columns)} layers it would be {percent(1 / len(columns))}."
    )
    data = {
        "layers": list(analysis.layers),
        "n_tokens": statistics.n_tokens,
        "n_latents": statistics.n_latents,
        "median_largest_share": largest,
        "latent": order,
        "centre_of_mass": found.centre_of_mass[order],
        "events_per_token": rate,
        "columns": shown,
    }
    return Picture("heatmap", "Where each latent is active", caption, figure, data, here)


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
    at_one = float((columns.amax(0) > 0.99).double().mean())
    here = (
        f"Here {number(len(order))} latents are active, and {percent(at_one)} of them have more than 99 % of their "
        "activation on this prompt at one layer. Masked positions would hold "
        f"{percent(prompt.masked_share)} of all activation."
    )
    data = {
        "prompt": prompt.prompt,
        "tokens": prompt.tokens,
        "visible": prompt.visible.tolist(),
        "masked_share": prompt.masked_share,
        "layers": list(analysis.layers),
        "share_at_one_layer": at_one,
        "latent": order,
        "centre_of_mass": centre[order],
        "activation": total,
        "columns": shown,
    }
    return Picture("prompt_heatmap", "Where one prompt's latents are active", caption, figure, data, here)


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
    largest, median = float(seen[layer, position]), float(np.nanmedian(seen))
    caption = (
        "Activation of all latents together at each token of the prompt, in the units of the SAE's input frame, "
        "where masked positions are grey."
    )
    here = (
        f"Here activation is largest at layer {analysis.layers[layer]} on “{prompt.tokens[position]}” ({number(largest)}); the "
        f"median is {number(median)}."
    )
    data = {
        "tokens": prompt.tokens,
        "visible": prompt.visible.tolist(),
        "layers": list(analysis.layers),
        "largest": {
            "layer": analysis.layers[layer],
            "token": prompt.tokens[position],
            "activation": largest,
        },
        "median": median,
        "activation": prompt.by_position,
    }
    return Picture("prompt_positions", "The same prompt, token by token", caption, figure, data, here)


def _averaged(columns: Tensor, shown: Tensor) -> str:
    per_bin = columns.shape[1] / shown.shape[1]
    return "" if per_bin == 1 else f" (drawn as means of {per_bin:.2g} neighbours each)"
