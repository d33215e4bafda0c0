"""The report: one HTML file that says what was trained, how good it is and what its layers show, figures inside.

Every sentence with a number is made from that number (report.html.j2 has the words); what was not measured is left out.
"""

import base64
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mlsae import files
from mlsae.analysis.drawing import rendered
from mlsae.analysis.figures import Picture, pictures, save
from mlsae.analysis.heatmaps import by_depth
from mlsae.analysis.summary import by_latent
from mlsae.analysis.wording import NULL_NAMES, duration, number, percent, plain, signed
from mlsae.analyze import Analysis
from mlsae.evaluate import Evaluation
from mlsae.intervals import Estimate

COLUMNS = {
    "fvu": "FVU",
    "lens_fvu": "FVU behind the lens",
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
DECIMALS = {"fvu": 3, "lens_fvu": 3, "cosine": 3, "norm_ratio": 3, "l0": 1, "l1": 1, "delta_ce": 3, "kl": 3}
"""Places after the point in a table, so that points stand below each other; the others have significant digits."""
SHORT_COLUMNS = ("fvu", "lens_fvu", "cosine", "l0", "delta_ce", "kl")
"""Those of the terminal's table."""
MAX_ROWS = 12
"""Layers in the terminal's table."""
SECTIONS = {
    "layers": ("What the layers show", ("heatmap", "spread", "variance", "centre_of_mass", "lives", "latents")),
    "prompt": ("One prompt", ("prompt_heatmap", "prompt_positions")),
    "directions": ("What the latents point at", ("directions", "vocabulary")),
    "stream": ("The residual stream itself", ("similarity",)),
}
"""Headings of the pictures of an analysis, by their anchors."""
N_SAMPLED, N_TOKENS = 10, 5
"""Latents in the sample, and tokens that each is shown with."""


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
    drawn = {picture.name: picture for picture in pictures(analysis, measured, metrics)}
    sections = {
        anchor: (heading, [name for name in names if name in drawn]) for anchor, (heading, names) in SECTIONS.items()
    }
    page = _environment().get_template("report.html.j2").render(
        title=title,
        notes=list(notes),
        trained=trained(run) if run else [],
        settings=run or {},
        table=table(measured) if measured else None,
        evaluation=measured,
        worst=extremes(measured) if measured else {},
        summary=analysis.summary(),
        headlines=headline_table(analysis, drawn),
        latents=sample(analysis),
        sections={anchor: section for anchor, section in sections.items() if section[1] or anchor == "layers"},
        pictures={name: {"picture": picture, "source": data_uri(picture)} for name, picture in drawn.items()},
        commands=commands(run),
    )  # fmt: skip
    files.write_text(path, page)
    return [path, *(file for picture in drawn.values() for file in save(picture, path.parent / "figures"))]


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
        "Tuned lens": run.get("lens"),
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


def headline_table(analysis: Analysis, drawn: Mapping[str, Picture]) -> list[list[str]]:
    """A header, and rows of words: a number, what it is with its interval, and what it is by chance."""
    variance, lives = ({} if name not in drawn else drawn[name].data for name in ("variance", "lives"))
    summary, chance = analysis.summary(), {"shares": variance.get("chance", {}), "lives": lives.get("chance", {})}
    columns = [_headlines(summary, variance.get("shares", {}), lives)]
    for null, found in summary["nulls"].items():
        columns.append(_headlines(found, chance["shares"].get(null, {}), chance["lives"].get(null, {})))
    rows = [[words, *(column[words] for column in columns)] for words, here in columns[0].items() if here != "–"]
    return [["", "here [95 % interval]", *(NULL_NAMES[null] for null in summary["nulls"])], *rows] if rows else []


def _headlines(found: Mapping[str, Any], shares: Mapping[str, Any], lives: Mapping[str, Any]) -> dict[str, str]:
    """From a summary, its own or a null's, and what two pictures add to it."""
    by_mass, by_event, published = shares.get("mass", {}), found["decomposition"]["event"], found["lawson2024"]
    return {
        "Depth variance within one latent on one token, by mass": percent(by_mass.get("within")),
        "… of one latent over tokens": percent(by_mass.get("token")),
        "… between latents": percent(by_mass.get("latent")),
        "rel_f, by event": number(by_event["rel_f"]),
        "rel_f as published (lawson2024)": number(published["rel_f"]),
        "rel_t, by event": number(by_event["rel_t"]),
        "rel_t as published (lawson2024)": number(published["rel_t"]),
        "Layers per event, mean": number(found["events"]["mean_active_layers"]),
        "Effective layers of a latent, mean": number(found["distribution"]["effective_layers"]["mean"]),
        "Activations whose latent is active at the next layer too": percent(lives.get("mean_persistence")),
    }


def sample(analysis: Analysis) -> list[list[str]]:
    """A header, and rows of words on a few of the more active half of latents, evenly spread over depth."""
    statistics, words = analysis.statistics, analysis.words
    n_events = statistics.n_events
    if not n_events.any():
        return []
    order = by_depth(statistics.distribution().centre_of_mass, n_events >= n_events[n_events > 0].median())
    chosen = [int(order[round(place)]) for place in np.linspace(len(order) - 1, 0, min(N_SAMPLED, len(order)))]
    found = {name: estimate[chosen] for name, estimate in statistics.estimates(by_latent).items()}
    row_of, layer_of = range(len(analysis.layers)), analysis.layers
    ends = (torch.from_numpy(np.interp(x, row_of, layer_of)) for x in vars(found["centre_of_mass"]).values())
    found["centre_of_mass"] = Estimate(*ends)
    head = ["latent", "layer (centre of mass)", "effective layers", "active on"]
    rows = [
        [str(j), number(layer), number(spread), percent(plain(rate))]
        for j, layer, spread, rate in zip(
            chosen, *(found[name].to_dict() for name in ("centre_of_mass", "effective_layers", "rate")), strict=True
        )
    ]
    contexts = [analysis.context(j) for j in chosen]
    if any(contexts):
        head.append("most active, at layer")
        for row, context in zip(rows, contexts, strict=True):
            row.append("–" if context is None else "{}: {}⟦{}⟧{}".format(*context))
    if words is not None:
        head.append("promotes")
        for row, j in zip(rows, chosen, strict=True):
            promoted = words.logits.promoted[j, :N_TOKENS].tolist()
            row.append(" ".join(f"“{words.strings[token]}”" for token in promoted))
    return [head, *rows]


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
