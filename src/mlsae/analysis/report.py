"""The report: one HTML file that says what was trained, how good it is and what its layers show, figures inside.

Every sentence with a number is made from that number (report.html.j2 has the words); what was not measured is left out.
"""

import base64
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mlsae import files
from mlsae.analysis.drawing import rendered
from mlsae.analysis.figures import Picture, pictures, save
from mlsae.analyze import Analysis
from mlsae.evaluate import Evaluation

COLUMNS = {
    "fvu": "FVU",
    "mse": "MSE",
    "cosine": "cosine",
    "norm_ratio": "norm ratio",
    "l0": "L0",
    "l1": "L1",
    "unused_fraction": "unused",
    "delta_ce": "ΔCE",
    "kl": "KL",
}
"""Metrics of a layer, in the order of the tables, with their headings."""
DECIMALS = {"fvu": 3, "cosine": 3, "norm_ratio": 3, "l0": 1, "l1": 1, "delta_ce": 3, "kl": 3}
"""Places after the point in a table, so that points stand below each other; the others have significant digits."""
SHORT_COLUMNS = ("fvu", "cosine", "l0", "delta_ce", "kl")
"""Those of the terminal's table."""
MAX_ROWS = 12
"""Layers in the terminal's table."""


# ---- the two outputs -----------------------------------------------------------------------------------------------


def write_report(
    path: str | Path,
    *,
    title: str,
    analysis: Analysis,
    run: Mapping[str, Any] | None = None,
    evaluation: Evaluation | Mapping[str, Any] | None = None,
    metrics: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
) -> list[Path]:
    """Write one self-contained HTML file, and figures/ beside it; returns the paths, the report first.

    Args:
        run: the fields of the training config and of `Run.to_dict()` in one mapping; absent ones are left out.
        metrics: the records of metrics.jsonl.
        notes: sentences to print under the title.
    """
    path = Path(path)
    measured = None if evaluation is None else as_dict(evaluation)
    drawn = pictures(analysis, measured, metrics)
    page = _environment().get_template("report.html.j2").render(
        title=title,
        notes=list(notes),
        trained=trained(run) if run else [],
        settings=run or {},
        table=table(measured) if measured else None,
        evaluation=measured,
        worst=extremes(measured) if measured else {},
        summary=analysis.summary(),
        pictures={picture.name: {"picture": picture, "source": data_uri(picture)} for picture in drawn},
        commands=commands(run),
    )  # fmt: skip
    files.write_text(path, page)
    return [path, *(file for picture in drawn for file in save(picture, path.parent / "figures"))]


def plain_table(evaluation: Evaluation | Mapping[str, Any]) -> str:
    """The quality of at most MAX_ROWS layers, of their mean and of all layers replaced at once, in fixed-width text."""
    measured = as_dict(evaluation)
    layers = measured["layers"]
    columns = [name for name in SHORT_COLUMNS if name in layers[0]]
    rows = [(number(row["layer"]), row) for row in thinned(layers)] + [("mean", measured["mean"])]
    rows += [("all", measured["all_layers"])] if measured["all_layers"] else []
    cells = [["layer", *(COLUMNS[name] for name in columns)]]
    cells += [[label, *(_cell(name, row) for name in columns)] for label, row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    if len(layers) > MAX_ROWS:
        lines.append(f"({MAX_ROWS} of {len(layers)} layers shown; the mean is over all of them)")
    return "\n".join(lines)


def thinned(rows: Sequence[Any]) -> list[Any]:
    """At most MAX_ROWS of the rows, evenly spread, the first and the last among them."""
    if len(rows) <= MAX_ROWS:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (MAX_ROWS - 1))] for i in range(MAX_ROWS)]


# ---- what the page holds -------------------------------------------------------------------------------------------


def as_dict(evaluation: Evaluation | Mapping[str, Any]) -> Mapping[str, Any]:
    """The names of evaluation.json, whichever form they came in."""
    return evaluation.to_dict() if isinstance(evaluation, Evaluation) else evaluation


def trained(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was trained, as label and words; a row whose numbers are absent is left out."""
    layers = run.get("layers") or []
    rows = {
        "Language model": run.get("lm"),
        "Text": run.get("data"),
        "Layers": f"{', '.join(map(str, layers))} ({len(layers)} in all)" if layers else None,
        "Latents": _some(run.get("n_latents"), number),
        "Active per vector": _some(run.get("k"), "k = {}".format),
        "Input frame": run.get("frame"),
        "Recipe": run.get("recipe"),
        "Tokens": _some(run.get("tokens"), number),
        "Passes over the text": _some(run.get("passes"), number),
        "Steps": _some(run.get("steps"), number),
        "Time": _some(run.get("seconds"), duration),
        "Masked": masked(run) if "mask_special_tokens" in run else None,
        "Masked by norm": _some(run.get("masked_by_norm"), left_out),
    }
    return [(label, str(words)) for label, words in rows.items() if words is not None]


def masked(run: Mapping[str, Any]) -> str:
    """Which positions the SAE was not trained on."""
    factor = run.get("mask_norm_factor")
    kinds = {
        "special tokens": run.get("mask_special_tokens"),
        "the first position": run.get("mask_first_position"),
        f"vectors over {number(factor)} × their layer's median norm": factor,
    }
    return ", ".join(name for name, on in kinds.items() if on) or "nothing"


def left_out(vectors: Sequence[int]) -> str:
    """How many vectors were left out for their norm, given the number at each layer."""
    return f"{number(sum(vectors))} vectors, at most {number(max(vectors))} at one layer" if any(vectors) else "none"


def table(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The table of all layers: headings, ours and published apart, and rows of words."""
    ours = [name for name in COLUMNS if name in evaluation["layers"][0]]
    published = evaluation["lawson2024"]
    theirs = [name for name in COLUMNS if name in published.get("mean", {})]
    pairs = zip(evaluation["layers"], published.get("layers") or [{}] * len(evaluation["layers"]), strict=True)
    rows = [(number(row["layer"]), row, other) for row, other in pairs]
    rows += [("mean", evaluation["mean"], published.get("mean", {}))]
    rows += [("all at once", evaluation["all_layers"], {})] if evaluation["all_layers"] else []
    cells = [[a, *(_cell(name, b) for name in ours), *(_cell(name, c) for name in theirs)] for a, b, c in rows]
    return {"ours": [COLUMNS[name] for name in ours], "theirs": [COLUMNS[name] for name in theirs], "rows": cells}


def extremes(evaluation: Mapping[str, Any]) -> dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """The layers with the lowest and the highest value of a metric, where there are two to compare."""
    found = {}
    for name in ("fvu", "delta_ce"):
        rows = [row for row in evaluation["layers"] if math.isfinite(plain(row.get(name)))]
        if len(rows) > 1:
            rows.sort(key=lambda row: plain(row[name]))
            found[name] = rows[0], rows[-1]
    return found


def commands(run: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What to type next, and what it does; words in capitals are for the reader to fill in."""
    run = run or {}
    folder = run.get("directory") or run.get("out")
    named = {"SAE": folder, "LM": run.get("lm"), "TEXT": run.get("data")}
    sae, lm, data = (shlex.quote(str(value)) if value else name for name, value in named.items())
    return [
        ("Measure on more text", f"mlsae evaluate {sae} --lm {lm} --data {data} --tokens 1e6"),
        ("Sharpen the figures with more text", f"mlsae analyze {sae} --lm {lm} --data {data} --out DIR --tokens 1e7"),
        ("Use it in Python", f"sae = mlsae.MLSAE.from_pretrained({str(folder or 'SAE')!r})"),
    ]


def data_uri(picture: Picture) -> str:
    """The figure inside an address: sharp SVG, or PNG where it holds an array of pixels."""
    pixels = any(axes.images for axes in picture.figure.axes)
    kind, media = ("png", "image/png") if pixels else ("svg", "image/svg+xml")
    return f"data:{media};base64,{base64.b64encode(rendered(picture.figure, kind)).decode()}"


# ---- numbers in words ----------------------------------------------------------------------------------------------


def plain(value: Any) -> float:
    """A number without its interval; NaN where there is none."""
    value = value["value"] if isinstance(value, Mapping) else value
    return math.nan if value is None else float(value)


def number(value: Any, digits: int = 3) -> str:
    """A number to so many significant digits, or a dash where there is none; an interval follows in brackets."""
    if isinstance(value, Mapping):
        return f"{number(value['value'], digits)} [{', '.join(number(end, digits) for end in value['ci95'])}]"
    value = plain(value)
    if not math.isfinite(value):
        return "–"
    if value == int(value):
        text = f"{int(value):,}"
    elif 1e-3 <= abs(value) < 1e6:
        text = f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"
    else:
        text = f"{value:.{digits - 1}e}"
    return text.replace("-", "−")


def signed(value: Any) -> str:
    """The same with its sign."""
    return ("+" if plain(value) > 0 else "") + number(value)


def percent(share: Any) -> str:
    """A share as a percentage of about two digits, or a dash; only 0 and 1 themselves read 0 % and 100 %."""
    share = plain(share)
    if not math.isfinite(share):
        return "–"
    if 0 < share < 1e-4 or 0.9995 < share < 1:
        return "< 0.01 %" if share < 0.5 else "> 99.9 %"
    return f"{100 * share:.2g} %" if 0 < share < 0.0995 else f"{100 * share:.{int(0.99 < share < 1)}f} %"


def duration(seconds: int | float) -> str:
    """Hours, minutes and seconds, the two largest that matter."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{number(seconds, 2)} s"


def _cell(name: str, row: Mapping[str, Any]) -> str:
    if name not in row:
        return ""
    if name == "unused_fraction":
        return percent(row[name])
    if name in DECIMALS and math.isfinite(plain(row[name])) and not isinstance(row[name], Mapping):
        return f"{row[name]:,.{DECIMALS[name]}f}".replace("-", "−")
    return number(row[name])


def _some(value: Any, words: Any) -> str | None:
    return None if value is None or value == [] else words(value)


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {f.__name__: f for f in (number, percent, signed, plain, duration)}
    return environment
