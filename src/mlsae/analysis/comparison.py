"""Figures of several SAEs side by side: quality against sparsity and size, at each layer, and off a dictionary's own layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from mlsae.analysis.drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    VERMILION,
    digits,
    layer_axis,
    new_figure,
    short_count,
    styled,
)
from mlsae.analysis.figures import Picture

LINES = (BLUE, VERMILION, GREEN, ORANGE, "#CC79A7", "#56B4E9", INK, GREY)
"""Colours of lines, in the order that tells neighbours apart."""
MARKS = "osD^vP*X"
LEGEND_CHARACTERS = 105
"""Room for names in one row above a figure."""
MAX_NUMBERS = 144
"""Cells of a matrix beyond which their numbers are not written into them."""


@dataclass(frozen=True)
class Point:
    """One SAE in a comparison."""

    line: str
    """What is joined by a line, by the name it has in the legend."""
    x: int | float
    """Where it stands on the horizontal axis."""
    evaluation: Mapping[str, Any]
    """What was measured: the names of evaluation.json."""


def interval(value: Any) -> tuple[float, float, float]:
    """A number and the ends of its interval, NaN where there is none."""
    low, high = value.get("ci95", (None, None)) if isinstance(value, Mapping) else (None, None)
    value = value["value"] if isinstance(value, Mapping) else value
    found = [np.nan if number is None else float(number) for number in (value, low, high)]
    return found[0], found[1], found[2]


@styled
def frontier(points: Sequence[Point], *, name: str, title: str, x_label: str, about: str) -> Picture:
    """Mean FVU and mean rise in cross-entropy against one number of the SAEs, lines joining those of a kind."""
    measures = {"fvu": "variance unexplained (FVU)"}
    if any(np.isfinite(interval(point.evaluation["mean"].get("delta_ce"))[0]) for point in points):
        measures["delta_ce"] = "Δ cross-entropy (nats per token)"
    lines = list(dict.fromkeys(point.line for point in points))
    figure = new_figure(2.9)
    panels = figure.subplots(1, len(measures), squeeze=False)[0]
    data: dict[str, Any] = {"x": x_label}
    for axes, (measure, label) in zip(panels, measures.items(), strict=True):
        data[measure] = {}
        for i, line in enumerate(lines):
            these = [point for point in points if point.line == line]
            apart = 2 ** (0.04 * (i - (len(lines) - 1) / 2))
            data[measure][line] = _curve(axes, these, measure, i, apart)
        whole_numbers(axes, [point.x for point in points])
        axes.set(xlabel=x_label, ylabel=label)
        axes.set_ylim(0 if measure == "fvu" else min(0, axes.get_ylim()[0]), None)
    if len(lines) > 1 or lines[0]:
        _legend(figure, dict(zip(lines, panels[0].get_legend_handles_labels()[0], strict=True)))
    caption = (
        f"{about} Mean over layers on held-out text; bars are 95 % intervals over documents; lines are set a little "
        "apart. Lower is better. Right, where it was measured: the rise in cross-entropy when one layer is replaced by "
        "its reconstruction."
    )
    return Picture(name, title, caption, figure, data)


def _legend(figure: Figure, handles: Mapping[str, Any]) -> None:
    """The lines' names above the panels, in as many columns as there is room for."""
    columns = max(1, min(len(handles), LEGEND_CHARACTERS // (max(map(len, handles)) + 7)))
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=columns, fontsize=8)


def _curve(axes: Axes, points: Sequence[Point], measure: str, i: int, apart: float) -> list[list[float]]:
    """One line through the mean of the SAEs at each x, drawn at `apart` times x so that lines do not hide each other.

    Returns x, value and interval of each SAE.
    """
    rows = sorted([point.x, *interval(point.evaluation["mean"].get(measure))] for point in points)
    x, value, low, high = np.array(rows).T
    style: dict[str, Any] = {"color": LINES[i % len(LINES)], "marker": MARKS[i % len(MARKS)]}
    places = sorted(set(x))
    means = [value[x == place].mean() for place in places]
    axes.plot(apart * np.array(places), means, label=points[0].line, **style)
    if len(places) < len(x):
        axes.plot(apart * x, value, linestyle="", alpha=0.5, **style)
    known = np.isfinite(low) & np.isfinite(high)
    ends = np.abs(np.stack([value - low, high - value])[:, known])
    axes.errorbar(apart * x[known], value[known], ends, linestyle="", color=style["color"], elinewidth=1, capsize=2)
    return [[float(number) for number in row] for row in rows]


def whole_numbers(axes: Axes, values: Sequence[int | float]) -> None:
    """A log axis with a tick at each of a few values."""
    places = sorted({float(f"{value:.2g}") for value in values})
    axes.set_xscale("log", base=2)
    if len(places) <= 10:
        axes.xaxis.set_major_locator(FixedLocator(places))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(short_count))
    axes.margins(x=0.08)


@styled
def by_layer(points: Sequence[Point], *, x_label: str) -> Picture:
    """FVU of every layer, a panel for each x and a line for each kind."""
    places = sorted({point.x for point in points})
    lines = list(dict.fromkeys(point.line for point in points))
    n_columns = min(3, len(places))
    n_rows = -(-len(places) // n_columns)
    figure = new_figure(0.5 + 2.2 * n_rows)
    panels = figure.subplots(n_rows, n_columns, squeeze=False, sharey=True).flat
    layers = [int(row["layer"]) for row in points[0].evaluation["layers"]]
    data: dict[str, Any] = {"layers": layers}
    for place, axes in zip(places, panels, strict=False):
        data[f"{place:g}"] = {}
        for point in (point for point in points if point.x == place):
            found = np.array([interval(row["fvu"]) for row in point.evaluation["layers"]])
            i, x = lines.index(point.line), range(len(layers))
            style: dict[str, Any] = {"color": LINES[i % len(LINES)], "marker": MARKS[i % len(MARKS)]}
            axes.plot(x, found[:, 0], label=point.line, markersize=3, linewidth=1.2, **style)
            axes.fill_between(x, found[:, 1], found[:, 2], color=style["color"], alpha=0.2, linewidth=0)
            data[f"{place:g}"][point.line] = found.tolist()
        layer_axis(axes.xaxis, layers)
        axes.set(title=f"{x_label} {place:g}", ylim=(0, None))
        axes.yaxis.set_tick_params(labelleft=True)
    for axes in panels:
        axes.remove()
    figure.supylabel("variance unexplained (FVU)", fontsize=9)
    _legend(
        figure,
        dict(pair[::-1] for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True)),
    )
    caption = (
        "FVU of each layer on held-out text, bands its 95 % interval over documents: 0 is perfect, 1 the mean vector."
    )
    return Picture("by_layer", "Quality at each layer", caption, figure, data)


@styled
def off_layer(matrix: Mapping[str, Any], *, name: str = "off_layer") -> Picture:
    """FVU of each dictionary (rows) on the vectors of each layer (columns); `matrix` is an OffLayer.to_dict()."""
    fvu = np.array(matrix["fvu"], dtype=float)
    rows, layers = matrix["rows"], matrix["layers"]
    figure = new_figure(1.2 + min(5.0, max(1.2, 0.26 * len(rows))))
    axes = figure.subplots()
    image = axes.imshow(fvu, cmap="magma_r", aspect="auto", vmin=0, vmax=1)
    axes.grid(False)
    layer_axis(axes.xaxis, layers, "evaluated on layer")
    step = -(-len(rows) // 32)
    shown = sorted({*range(0, len(rows), step), len(rows) - 1})
    axes.set_yticks(shown, [rows[i] for i in shown])
    axes.set_ylabel("dictionary trained on")
    if fvu.size <= MAX_NUMBERS:
        for (row, column), value in np.ndenumerate(fvu):
            ink = "white" if value > 0.5 else INK
            axes.text(column, row, digits(float(value)), ha="center", va="center", fontsize=7, color=ink)
    figure.colorbar(image, ax=axes, label="FVU", pad=0.015, aspect=15, extend="max" if fvu.max() > 1 else "neither")
    caption = (
        "Variance that each dictionary leaves unexplained at each layer, its own or not, in that layer's frame: 1 is no better "
        "than the layer's mean vector. The last row, where there is one, is the multi-layer SAE."
    )
    return Picture(name, "Dictionaries away from their layer", caption, figure, dict(matrix))
