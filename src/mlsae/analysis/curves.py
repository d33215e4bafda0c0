"""Pictures of training and of quality: curves over tokens and over layers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from mlsae.analysis.drawing import (
    BLUE,
    GREY,
    MAX_COLUMNS,
    ORANGE,
    VERMILION,
    binned,
    digits,
    direct_label,
    layer_axis,
    new_figure,
    plain_log,
    short_count,
    styled,
    whiskers,
)
from mlsae.analysis.picture import Picture
from mlsae.analysis.wording import ends, number, percent, plain


@styled
def quality(evaluation: Mapping[str, Any]) -> Picture:
    """FVU of every layer, and what replacing it costs where that was measured."""
    rows, published = evaluation["layers"], evaluation["lawson2024"].get("layers", [])
    layers = [int(row["layer"]) for row in rows]
    curves: dict[str, Any] = {"fvu": _column(rows, "fvu"), "fvu_lawson2024": _column(published, "fvu")}
    curves["fvu_ci95"] = _ends(rows, "fvu")
    measured = "delta_ce" in rows[0]
    figure = new_figure(2.5)
    left, *rest = figure.subplots(1, 1 + measured, squeeze=False)[0]
    lines = [("standard", curves["fvu"], BLUE), ("lawson2024", curves["fvu_lawson2024"], GREY)][: 1 + bool(published)]
    for _, values, colour in lines:
        left.plot(values, "o-", color=colour)
    whiskers(left, range(len(rows)), curves["fvu_ci95"], BLUE)
    direct_label(left, lines)
    layer_axis(left.xaxis, layers)
    left.set(ylabel="variance unexplained (FVU)", ylim=(0, None))
    caption = (
        "Share of each layer's variance that the SAE leaves unexplained: 0 is perfect, 1 no better than the mean "
        "vector. Upright lines are 95 % intervals over documents. In grey the published definition, with another "
        "denominator."
    )
    for axes in rest:
        curves |= {"delta_ce": _column(rows, "delta_ce"), "delta_ce_ci95": _ends(rows, "delta_ce")}
        _draw_delta_ce(axes, curves["delta_ce"], layers, plain(evaluation["all_layers"].get("delta_ce")))
        whiskers(axes, range(len(rows)), curves["delta_ce_ci95"], BLUE)
        caption += " Right: the rise in cross-entropy when a layer, or every layer, is replaced by its reconstruction."
    data = {"layers": layers, **curves, "all_layers": dict(evaluation["all_layers"])}
    here = f"Here FVU is {number(evaluation['mean'].get('fvu'))}, mean over layers"
    if measured:
        here += f", and one layer replaced costs {number(evaluation['mean'].get('delta_ce'))} nats, mean over layers"
    return Picture("quality", "Quality at each layer", caption, figure, data, here + ".")


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
        plain_log(above.yaxis)
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
    first, last, dead_last = float(fvu[0]), float(smooth[-1]), float(dead[-1])
    here = f"Here FVU went from {number(first)} in the first report to {number(last)} in the last"
    here += f"{f' {window}' if window > 1 else ''} over {number(tokens[-1])} tokens"
    here += f"; at the end {percent(dead_last)} of the latents were dead." if dead_last >= 0 else "."
    series = {"tokens": tokens.tolist(), "fvu": fvu.tolist(), "dead_fraction": dead.tolist()}
    data = {"first_fvu": first, "last_fvu": last, "window": window, **series, "validation_fvu": held_out}
    return Picture("training", "Training", caption, figure, data, here)


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [plain(row.get(name)) for row in rows]


def _ends(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [ends(row.get(name)) for row in rows]
