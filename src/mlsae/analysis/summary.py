"""The depth statistics in a few numbers, each with its interval over documents: what summary.json holds."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mlsae.analysis.depth import Moments
from mlsae.analysis.layers import SHAPES, WEIGHTS, LayerStatistics


def summarise(statistics: LayerStatistics) -> dict[str, Any]:
    """Headline numbers as `{"value", "ci95"}` by group and name, beside the histograms behind them."""
    found = nested({name: estimate.to_dict() for name, estimate in statistics.estimates(headlines).items()})
    for name, moments in statistics.distribution().summary().to_dict().items():
        if isinstance(moments, dict):
            found["distribution"][name] = {**moments, **found["distribution"][name]}
        else:
            found["distribution"][name] = moments
    found["events"] |= {name: getattr(statistics, name).tolist() for name in SHAPES}
    return found


def headlines(statistics: LayerStatistics) -> dict[str, Tensor]:
    """Every number that gets an interval, by `group.name`; NaN where undefined."""
    numbers = {
        f"decomposition.{weight}.{name}": value
        for weight in WEIGHTS
        for name, value in statistics.decomposition(weight).to_dict().items()
    }
    numbers |= {f"lawson2024.{name}": value for name, value in statistics.lawson2024().to_dict().items()}
    for name, moments in vars(statistics.distribution().summary()).items():
        if isinstance(moments, Moments):
            numbers[f"distribution.{name}.mean"] = moments.mean
    n_events = statistics.n_events.sum().double()  # whole numbers are divided in float32
    layers = torch.arange(statistics.n_layers, dtype=torch.float64)
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()} | {
        "events.mean_active_layers": _mean(statistics.active_layers, layers + 1),
        "events.mean_effective_layers": statistics.effective_layers.sum() / n_events,
        "events.mean_longest_run": _mean(statistics.longest_run, layers + 1),
        "events.mean_run": _mean(statistics.runs, layers + 1),
        "events.mean_birth": _mean(statistics.first_layer, layers),
        "events.mean_death": _mean(statistics.last_layer, layers),
        "events.at_one_layer": statistics.active_layers[0] / n_events,
        "persistence": statistics.persisted[:-1].sum(1) / statistics.counts[:-1].sum(1).double(),
    }


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1}` as `{"a": {"b": 1}}`."""
    found: dict[str, Any] = {}
    for name, value in flat.items():
        *groups, last = name.split(".")
        group = found
        for part in groups:
            group = group.setdefault(part, {})
        group[last] = value
    return found


def by_latent(statistics: LayerStatistics) -> dict[str, Float[Tensor, " latent"]]:
    """What is reported with an interval for every single latent; NaN for one that was never active."""
    found = statistics.distribution()
    return {
        "centre_of_mass": found.centre_of_mass,
        "std": found.std,
        "effective_layers": found.effective_layers,
        "event_effective_layers": statistics.effective_layers / statistics.n_events,
        "rate": statistics.n_events.double() / statistics.n_tokens,
    }


def _mean(histogram: Int[Tensor, " bin"], x: Float[Tensor, " bin"]) -> Float[Tensor, ""]:
    return (histogram * x).sum() / histogram.sum()
