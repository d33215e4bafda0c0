"""What a latent's page shows: its profile over layers with intervals, its contexts layer by layer, and its neighbours."""

import contextlib
from collections.abc import Generator, Iterable, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mlsae.analysis.depth import distribute
from mlsae.analysis.example_file import read_examples
from mlsae.analysis.example_rows import Example
from mlsae.analysis.latents import ENDS, read_row
from mlsae.errors import ConfigError, ModelError
from mlsae.explorer.kept import named
from mlsae.explorer.statistics import Statistics, read_interval

if TYPE_CHECKING:
    from mlsae.explorer.library import Library

N_SHOWN = 8
"""Examples of each kind and layer, where all layers are shown."""
MAX_SHOWN_TOKENS = 30_000
"""Of all contexts of an answer together: longer contexts are cut, around the token they are about."""
MAX_NEIGHBOURS = 200
ROWS_AT_ONCE = 4096
"""Decoder rows whose cosines are made together."""
NUMBERS = ("centre_of_mass", "effective_layers")
"""Of a neighbour."""


def latent_view(library: "Library", latent: int, layer: int | None = None) -> dict[str, Any]:
    """/latents/{latent}.json; with `layer`, all examples of that one and of no other.

    Raises ConfigError for a latent or layer that there is not.
    """
    library.checked_latent(latent)
    if layer is not None and layer not in library.layers:
        raise ConfigError("layer", f"{layer} is none of this SAE's; give one of {', '.join(map(str, library.layers))}")
    found = library.statistics
    missing: list[dict[str, Any]] = []
    row: Mapping[str, Any] = {}
    if library.table is not None and library.analysis is not None:
        with _noted(missing, "table"):
            row = read_row(library.analysis / "latents.parquet", latent, library.n_latents)
    page: dict[str, Any] = {
        "latent": latent,
        "layers": list(library.layers),
        "n_tokens": None if found is None else found.n_tokens,
        "alive": None if found is None else bool(found.used[latent]),
        "summary": None if found is None else _summary(found, latent, row),
        "profile": None if found is None else _profile(library, found, latent),
        **{name: _tokens(row, name) for name in ENDS},
        "nearest": _nearest(row),
    }
    with _noted(missing, "examples"):
        page["examples"] = _examples(library, latent, layer)
    notes = library.missing("sae", "analysis", "table", "words", "intervals", "examples", "tokenizer", "notes")
    return {"examples": [], **page, "note": library.notes.of(latent), "missing": [*notes, *missing]}


@contextlib.contextmanager
def _noted(missing: list[dict[str, Any]], what: str) -> Generator[None]:
    """Of a damaged file, a sentence in a list of what is missing."""
    try:
        yield
    except ModelError as error:
        missing.append({"what": what, "why": f"{named(error)}: {error.problem}", "command": None})


def _summary(found: Statistics, latent: int, row: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers over all tokens, with intervals from the row of latents.parquet; None where undefined."""
    sums = found.of(latent)
    depth = distribute(sums["totals"], sums["counts"])
    numbers = {name: getattr(depth, name) for name in ("centre_of_mass", "std", "effective_layers")}
    numbers["event_effective_layers"] = sums["effective_layers"] / sums["n_events"]
    n_events = int(sums["n_events"])
    with_intervals: dict[str, Any] = {}
    for name, x in numbers.items():
        value, ends = x.item(), [row.get(f"{name}_low"), row.get(f"{name}_high")]
        if name == "centre_of_mass":
            value, *ends = (None if end is None else float(found.on_layers(end)) for end in (value, *ends))
        with_intervals[name] = {"value": value, "ci95": None if None in ends or n_events == 0 else ends}
    birth, death = (None if not n_events else found.layers[int(x)] for x in (depth.birth, depth.death))
    return {
        "n_events": n_events,
        "density": n_events / found.n_tokens if found.n_tokens else None,
        **with_intervals,
        "entropy": depth.entropy.item(),
        "n_active_layers": int(depth.n_active_layers),
        "birth": birth,
        "death": death,
        "bimodality": depth.bimodality.item(),
    }


def _profile(library: "Library", found: Statistics, latent: int) -> dict[str, Any]:
    """By layer: P(layer | latent) with intervals, share of tokens, mean activation where active, and persistence."""
    sums = found.of(latent)
    totals, counts, persisted = (sums[name][:, 0].double() for name in ("totals", "counts", "persisted"))
    ends: list[Any] = [None] * len(totals)
    if library.intervals is not None:
        low, high = read_interval(library.intervals, latent, *found.probability.shape)
        ends = [
            list(pair) if np.isfinite(pair).all() else None for pair in zip(low.tolist(), high.tolist(), strict=True)
        ]
    shares = (totals / totals.sum()).tolist()
    return {
        "probability": [{"value": share, "ci95": ci95} for share, ci95 in zip(shares, ends, strict=True)],
        "density": (counts / found.n_tokens).tolist(),
        "mean_activation": (totals / counts).tolist(),
        "persistence": (persisted[:-1] / counts[:-1]).tolist(),
    }


def _tokens(row: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    strings = row.get(name) or []
    logits = row.get(f"{name}_logits") or []
    logits = [*logits, *[None] * len(strings)]  # a table of an older version has none
    return [{"string": string, "logit": logit} for string, logit in zip(strings, logits, strict=False)]


def _nearest(row: Mapping[str, Any]) -> dict[str, Any] | None:
    cosine, neighbour = row.get("max_cosine"), row.get("neighbour")
    if cosine is None or neighbour is None or neighbour < 0:
        return None
    return {"latent": int(neighbour), "cosine": cosine}


# ---- contexts --------------------------------------------------------------------------------------------------------


def _examples(library: "Library", latent: int, layer: int | None) -> list[dict[str, Any]]:
    """The strongest contexts and some of the sample, by layer; layers without any are left out."""
    if library.examples is None:
        return []
    by_layer = groupby(read_examples(library.examples, latent, layer), key=lambda example: example.layer)
    chosen = {
        at: {kind: _some([x for x in group if x.kind == kind], layer is None) for kind in ("top", "sampled")}
        for at, group in ((at, list(group)) for at, group in by_layer)
    }
    shown = [example for kinds in chosen.values() for group in kinds.values() for example in group]
    reach = max(1, MAX_SHOWN_TOKENS // max(len(shown), 1) // 2)
    strings = _strings_of(library, (token for example in shown for token in _cut(example, reach)[0]))
    return [
        {"layer": at, **{kind: [_shown(example, reach, strings) for example in kinds[kind]] for kind in kinds}}
        for at, kinds in chosen.items()
    ]


def _some(examples: list[Example], few: bool) -> list[Example]:
    """The first of the strongest; of a sample, some from all quantiles."""
    n = N_SHOWN if few else MAX_SHOWN_TOKENS // 16
    if len(examples) <= n:
        return examples
    if examples[0].kind == "top":
        return examples[:n]
    return [examples[i] for i in np.linspace(0, len(examples) - 1, n).round().astype(int).tolist()]


def _cut(example: Example, reach: int) -> tuple[list[int], list[float], int]:
    """Tokens and activations up to `reach` to either side of the token itself, and where it is among them."""
    first = max(0, example.centre - reach)
    at = slice(first, example.centre + reach + 1)
    return example.tokens[at], example.activations[at], example.centre - first


def _shown(example: Example, reach: int, strings: Mapping[int, str]) -> dict[str, Any]:
    tokens, activations, centre = _cut(example, reach)
    return {
        "value": example.value,
        "tokens": [strings[token] for token in tokens],
        "activations": [round(x, 6) if x else 0 for x in activations],
        "centre": centre,
        "document": example.document,
        "quantile": example.quantile,
    }


def _strings_of(library: "Library", tokens: Iterable[int]) -> dict[int, str]:
    ids = sorted(set(tokens))
    return dict(zip(ids, library.strings(ids), strict=True))


# ---- decoder rows ----------------------------------------------------------------------------------------------------


def neighbours_view(library: "Library", latent: int, n: int = 20) -> dict[str, Any]:
    """/latents/{latent}/neighbours.json: the latents whose decoder rows have the largest cosines with this one's.

    Raises ConfigError for a latent that there is not, or n out of range; ModelError while there is no SAE.
    """
    library.checked_latent(latent)
    if not 1 <= n <= MAX_NEIGHBOURS:
        raise ConfigError("n", f"{n} given; 1 to {MAX_NEIGHBOURS}")
    ids, cosines = nearest(library.needed_sae().W_dec.detach(), latent, n)
    columns = {} if library.table is None else library.table.columns
    shown = {name: columns[name][ids].tolist() for name in NUMBERS if name in columns}
    found = [
        {"latent": other, "cosine": cosine, **{name: shown[name][i] if name in shown else None for name in NUMBERS}}
        for i, (other, cosine) in enumerate(zip(ids, cosines, strict=True))
    ]
    return {"latent": latent, "neighbours": found}


@torch.no_grad()
def nearest(W_dec: Float[Tensor, "latent d_model"], latent: int, n: int) -> tuple[list[int], list[float]]:
    """The n rows with the largest cosines with one of them, which is left out, and these, made again in float64.

    A row of zeros has cosine 0 with every other. Of equal ones the lower id comes first.
    """
    row = W_dec[latent] / W_dec[latent].norm().clamp_min(torch.finfo(W_dec.dtype).tiny)
    cosines = W_dec.new_empty(len(W_dec))
    for start in range(0, len(W_dec), ROWS_AT_ONCE):
        rows = W_dec[start : start + ROWS_AT_ONCE]
        norms = torch.linalg.vector_norm(rows, dim=1).clamp_min_(torch.finfo(rows.dtype).tiny)
        cosines[start : start + ROWS_AT_ONCE] = (rows @ row) / norms
    cosines[latent] = -torch.inf
    ids = cosines.topk(min(n, len(W_dec) - 1)).indices
    exact = torch.nn.functional.cosine_similarity(W_dec[ids].double(), W_dec[latent].double()[None], dim=1)
    order = np.lexsort((ids.cpu().numpy(), -exact.cpu().numpy()))
    return ids[order].tolist(), exact[order].tolist()
