"""What every figure shares: one style, and the parts that figures are drawn from.

Matplotlib is used through its objects alone: no pyplot, and its settings are as they were once a function returns.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from mlsae.analysis.wording import ends, plain

BLUE, ORANGE, GREEN, VERMILION, GREY, INK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8a8a8a", "#222222"
"""Okabe and Ito's colours, which colour-blind readers can tell apart."""
FONT = "DejaVu Sans"
"""It comes with matplotlib, so a figure is the same on every machine."""
STYLE: Any = {
    "font.family": FONT,
    "font.size": 9,
    **dict.fromkeys(["axes.labelsize", "axes.titlesize", "legend.fontsize"], 9),
    **dict.fromkeys(["xtick.labelsize", "ytick.labelsize"], 8),
    **dict.fromkeys(["text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor"], INK),
    **dict.fromkeys(["axes.edgecolor", "xtick.color", "ytick.color"], GREY),
    **dict.fromkeys(["axes.spines.top", "axes.spines.right"], False),
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    "text.parse_math": False,  # a token may be a dollar sign
    "image.interpolation": "none",
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
    "svg.hashsalt": "mlsae",  # without it element ids are random
}
styled = mpl.rc_context(STYLE)
WIDTH = 7.2
"""Inches: 720 pixels on a page."""
MAX_COLUMNS = 1000
"""Columns of a heatmap, fewer than its pixels: each is drawn whole, and averaging leaves nothing to alias."""


# ---- whole figures -------------------------------------------------------------------------------------------------


def rendered(figure: Figure, kind: str) -> bytes:
    """The figure as a png, pdf or svg file, without the time it was made."""
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        if isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
            figure.draw_without_rendering()  # laid out once: that is slow, and every kind of file is to look the same
            figure.set_layout_engine("none")
        figure.savefig(buffer, format=kind, metadata=undated)
    return buffer.getvalue()


def latents_by_layers(columns: Tensor, strip: Tensor, layers: Sequence[int], strip_label: str) -> tuple[Figure, Tensor]:
    """Sorted columns under a strip with one positive number a column; also returns the columns as drawn."""
    shown = binned(columns.numpy(), MAX_COLUMNS)
    figure = new_figure(height_of(len(layers)) + 1.0)
    grid = figure.subplots(2, 2, sharex="col", width_ratios=[1, 0.02], height_ratios=[0.5, height_of(len(layers))])
    (above, corner), (below, colours) = grid
    corner.remove()
    draw_strip(above, strip.numpy(), strip_label)
    bright = max(float(np.quantile(shown, 0.998)), 1e-9)
    extent = (0.0, float(columns.shape[1]), len(layers) - 0.5, -0.5)
    image = below.imshow(shown, cmap="magma_r", aspect="auto", vmin=0, vmax=bright, extent=extent)
    below.grid(False)
    below.set_xlabel(f"latents, sorted by centre of mass (n = {columns.shape[1]:,})")
    below.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    below.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True))
    layer_axis(below.yaxis, layers)
    figure.colorbar(image, cax=colours, label="P(layer | latent)", extend="max" if shown.max() > bright else "neither")
    return figure, columns.new_tensor(shown)


def draw_strip(axes: Axes, values: np.ndarray, label: str) -> None:
    """A line of local means on a log axis, with the 10-90 % range of the values around it."""
    groups = np.array_split(values, min(100, len(values)))
    edges = np.cumsum([0, *map(len, groups)])
    low, mean, high = (
        [f(group) for group in groups] for f in (lambda g: np.quantile(g, 0.1), np.mean, lambda g: np.quantile(g, 0.9))
    )
    axes.stairs(high, edges, baseline=low, fill=True, color=BLUE, alpha=0.25, linewidth=0)
    axes.stairs(mean, edges, baseline=None, color=BLUE, linewidth=1.2)
    axes.set_yscale("log")
    axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    axes.yaxis.set_major_formatter(FuncFormatter(power_of_ten))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", length=0, labelbottom=False)


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


# ---- parts -----------------------------------------------------------------------------------------------------------


def binned(columns: np.ndarray, n_bins: int) -> np.ndarray:
    """Means over runs of neighbouring columns, as equal in length as can be; all columns if they are no more."""
    n_bins = min(n_bins, columns.shape[-1])
    edges = np.linspace(0, columns.shape[-1], n_bins + 1).round().astype(int)
    return np.add.reduceat(columns, edges[:-1], axis=-1) / np.diff(edges)


def drawable(text: str) -> str:
    """The text with a box for each character that the figures' font lacks."""
    known = get_font(findfont(FONT)).get_charmap()
    return "".join(c if ord(c) in known else "□" for c in text)


def new_figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), layout="constrained")


def height_of(n_layers: int) -> float:
    """Inches for so many rows of a heatmap."""
    return min(3.6, max(1.5, 0.11 * n_layers))


def layer_axis(axis: Any, layers: Sequence[int], label: str = "layer", *, at_most: int = 12) -> None:
    """Ticks at whole layers, few of them, named by layer id."""
    step = tick_step(len(layers), at_most)
    axis.set_ticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axis.set_label_text(label)


def count_axis(axis: Any, n_layers: int, label: str) -> None:
    """Ticks at numbers of layers, from 1."""
    step = tick_step(n_layers)
    axis.set_ticks(range(1, n_layers + 1) if step == 1 else [1, *range(step, n_layers + 1, step)])
    axis.set_label_text(label)


def tick_step(n_layers: int, at_most: int = 12) -> int:
    """A round distance that leaves few ticks."""
    return next(step for step in (1, 2, 5, 10, 20, 50, 100, n_layers) if n_layers <= at_most * step)


def percent_axis(axis: Any) -> None:
    """Shares as percentages."""
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g} %"))


def whiskers(axes: Axes, x: Iterable[int | float], ends: Iterable[Sequence[float]], colour: str = INK) -> None:
    """An upright line from end to end of each interval; none where there is no interval."""
    rows = [(at, low, high) for at, (low, high) in zip(x, ends, strict=True) if np.isfinite(low) and np.isfinite(high)]
    if rows:
        axes.vlines(*np.array(rows).T, color=colour, linewidth=1.1, zorder=3)


def interval_line(axes: Axes, x: Sequence[int | float], values: Iterable[Any], colour: str, **style: Any) -> None:
    """A line of numbers in a band of their intervals, where they have them; `style` is of the line."""
    values = list(values)
    low, high = np.array([ends(value) for value in values]).reshape(-1, 2).T
    axes.fill_between(x, low, high, color=colour, alpha=0.3, linewidth=0)
    axes.plot(x, [plain(value) for value in values], marker="o", color=colour, **style)


def halo(width: float = 3.0) -> Any:
    """A white edge around a line that crosses a dark image."""
    return [withStroke(linewidth=width, foreground="white")]


def counts_image(axes: Axes, counts: np.ndarray, x_edges: np.ndarray, y_edges: np.ndarray, label: str) -> None:
    """Counts [x, y] as colours on a log scale with their colour bar, nothing where there are none."""
    axes.grid(False)
    norm = LogNorm(1, max(2, counts.max()))
    shown = np.ma.masked_equal(counts.T, 0)
    image = axes.pcolormesh(x_edges, y_edges, shown, cmap="magma_r", norm=norm, rasterized=True)
    colours = figure_of(axes).colorbar(image, ax=axes, label=label, pad=0.02, aspect=18)
    plain_log(colours.ax.yaxis)


def figure_of(axes: Axes) -> Figure:
    """The figure that axes are in."""
    assert isinstance(axes.figure, Figure)
    return axes.figure


def band(axes: Axes, x: Sequence[int], moments: Mapping[str, list[float]], colour: str) -> None:
    """A line of means in a band of one standard deviation."""
    mean, std = np.array(moments["mean"]), np.array(moments["std"])
    axes.fill_between(x, np.maximum(mean - std, -1), mean + std, color=colour, alpha=0.2, linewidth=0)
    axes.plot(x, mean, "o-", color=colour)


def direct_label(axes: Axes, lines: Sequence[tuple[str, Sequence[float], str]]) -> None:
    """The name of each line right of its last point, the higher line's a little higher."""
    top = max(values[-1] for _, values, _ in lines)
    for name, values, colour in lines:
        if not np.isfinite(values[-1]):
            continue
        place: dict[str, Any] = {"textcoords": "offset points", "va": "bottom" if values[-1] == top else "top"}
        axes.annotate(name, (len(values) - 1, values[-1]), (6, 0), color=colour, fontsize=8, **place)


def plain_log(axis: Any) -> None:
    """A log axis with plain numbers, at 1, 2 and 5 where it spans few decades."""
    low, high = axis.get_view_interval()
    few = high < 1000 * low
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if few else power_of_ten(x)))
    axis.set_minor_formatter(NullFormatter())


def digits(value: float) -> str:
    """Three significant digits, or a dash where there is no number."""
    return f"{value:#.3g}".rstrip(".") if np.isfinite(value) else "–"


def power_of_ten(value: float, _: object = None) -> str:
    """A power of ten in superscript."""
    return "10" + f"{np.log10(value):.0f}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def short_count(value: float, _: object = None) -> str:
    """12,000,000 as 12M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
