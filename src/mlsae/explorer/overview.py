"""What the first page shows: what was trained, how good it is, and where in depth all of its latents are."""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64

if TYPE_CHECKING:
    from mlsae.explorer.library import Library
    from mlsae.explorer.statistics import Statistics

BINS_A_LAYER, MAX_BINS = 4, 120


def overview_view(library: "Library") -> dict[str, Any]:
    """/overview.json."""
    training = library.training
    config = training.config
    return {
        "sae": _facts(library),
        "training": {
            "finished": library.config is not None and not training.is_running(),
            "config": config if config else None,
        },
        "evaluation": library.evaluation,
        "statistics": _statistics(library),
        "similarity": library.similarity,
        "missing": library.missing("sae", "evaluation", "analysis", "similarity", "table"),
    }


def _facts(library: "Library") -> dict[str, Any]:
    """What the SAE's config says; before there is one, what the run's does."""
    config = library.config
    known = library.training.config if config is None else config.to_dict()
    named = ("n_latents", "k", "d_model", "expansion_factor", "layers", "frame", "groups", "recipe")
    facts = {name: known.get(name) for name in named}
    return {"name": library.name, "lm": library.lm_name, **facts, "lens": known.get("lens") is not None}


def _statistics(library: "Library") -> dict[str, Any] | None:
    """The analysis in a few numbers, and histograms over the latents that were ever active."""
    found, summary = library.statistics, library.summary
    if found is None or summary is None:
        return None
    table = library.table
    effective = None if table is None else table.columns["effective_layers"]
    n_layers = len(found.layers)
    spread = None if effective is None else _histogram(effective[found.used], 1.0, max(float(n_layers), 2.0))
    return {
        "n_tokens": found.n_tokens,
        "n_alive": int(found.used.sum()),
        **{name: summary.get(name) for name in ("decomposition", "events", "nulls", "lawson2024")},
        "histograms": {"centre_of_mass": _depths(found), "effective_layers": spread},
    }


def _depths(found: "Statistics") -> dict[str, Any]:
    n_layers = len(found.layers)
    if n_layers == 1:  # nothing between two layers
        return {
            "edges": [found.layers[0] - 0.5, found.layers[0] + 0.5],
            "counts": [int(found.used.sum())],
        }
    histogram = _histogram(found.centre_of_mass[found.used], 0.0, n_layers - 1.0)
    return {**histogram, "edges": np.asarray(found.on_layers(histogram["edges"])).tolist()}


def _histogram(x: Float64[np.ndarray, " latent"], low: float, high: float) -> dict[str, Any]:
    """Counts of what is a number; bins of equal width."""
    bins = min(MAX_BINS, max(20, round(BINS_A_LAYER * (high - low))))
    counts, edges = np.histogram(x[np.isfinite(x)], bins, (low, high))
    return {"edges": edges.tolist(), "counts": counts.tolist()}
