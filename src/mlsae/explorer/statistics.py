"""Where and how often every latent is active: the sums of an analysis as small arrays, read a layer at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int32
from torch import Tensor

from mlsae.analysis.layers import LayerStatistics
from mlsae.errors import ModelError
from mlsae.untrusted import tensor_slices


@dataclass(frozen=True, eq=False)
class Ordered:
    """The latents that were ever active, by centre of mass, early layers first; of equal ones the lower id first."""

    latent: Int32[np.ndarray, " place"]
    probability: Float32[np.ndarray, "layer place"]
    """P(layer | latent) of each."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """What an analysis says of every latent, in arrays of [layer, n_latents] that together take 4 bytes an entry each.

    The row of a layer is its place in `layers`; statistics of depth are in rows, and `on_layers` takes them to layer ids.
    """

    path: Path
    """layers.safetensors, of which the rest is read when asked for."""
    layers: tuple[int, ...]
    n_tokens: int
    probability: Float32[np.ndarray, "layer latent"]
    """P(layer | latent); NaN for a latent that was never active."""
    centre_of_mass: Float64[np.ndarray, " latent"]
    """sum_l l P(l | latent), in rows; NaN for one never active."""

    @classmethod
    def read(cls, path: Path, layers: tuple[int, ...], n_latents: int) -> "Statistics":
        """From the file that `LayerStatistics.save` wrote. Raises ModelError if it is of another SAE, or damaged."""
        with tensor_slices(path, _expected(len(layers), n_latents)) as sums:
            n_tokens = int(sums["tokens"][0])
            mass = torch.zeros(n_latents, dtype=torch.float64)
            for row in range(len(layers)):
                total = sums["totals"][0, row]
                if not (total >= 0).all():
                    raise ModelError(str(path), "holds sums of activations below 0; analyze again")
                mass += total
            if n_tokens < 0 or not mass.isfinite().all():
                raise ModelError(str(path), "holds sums that are no numbers; analyze again")
            probability = np.empty((len(layers), n_latents), np.float32)
            centre = torch.zeros(n_latents, dtype=torch.float64)
            for row in range(len(layers)):
                share = sums["totals"][0, row] / mass
                probability[row], centre = share.numpy(), centre + row * share
        return cls(path, layers, n_tokens, probability, centre.numpy())

    @property
    def n_latents(self) -> int:
        """Size of the dictionary."""
        return len(self.centre_of_mass)

    @property
    def used(self) -> Bool[np.ndarray, " latent"]:
        """Which latents were ever active."""
        return ~np.isnan(self.centre_of_mass)

    @cached_property
    def density(self) -> Float32[np.ndarray, "layer latent"]:
        """Share of tokens at which each latent is active at each layer; NaN before any token."""
        return self._by_layer(lambda sums, row: sums["counts"][0, row].double() / self.n_tokens)

    @cached_property
    def mean_activation(self) -> Float32[np.ndarray, "layer latent"]:
        """Mean activation over the tokens at which it is active at each layer; NaN where there is none."""
        return self._by_layer(lambda sums, row: sums["totals"][0, row] / sums["counts"][0, row])

    @cached_property
    def ordered(self) -> Ordered:
        """The latents in the order of the heatmap."""
        ids = np.flatnonzero(self.used)
        ids = ids[np.argsort(self.centre_of_mass[ids], kind="stable")]
        return Ordered(ids.astype(np.int32), np.ascontiguousarray(self.probability[:, ids]))

    def of(self, latent: int) -> dict[str, Tensor]:
        """One latent's sums, by the names and with the axes of LayerStatistics: exact, and nothing else is read."""
        with self._sums() as sums:
            by_layer = {name: sums[name][0, :, latent : latent + 1] for name in ("totals", "counts", "persisted")}
            one = {name: sums[name][0, latent : latent + 1] for name in ("n_events", "effective_layers")}
        return by_layer | one

    def on_layers(self, rows: Any) -> Any:
        """Places on the layer axis, whole or between two, as layer ids; NaN stays NaN."""
        if self.layers == tuple(range(len(self.layers))):
            return rows
        return np.interp(rows, range(len(self.layers)), self.layers)

    def _by_layer(self, numbers: Callable[[Any, int], Tensor]) -> Float32[np.ndarray, "layer latent"]:
        found = np.empty_like(self.probability)
        with self._sums() as sums:
            for row in range(len(self.layers)):
                found[row] = numbers(sums, row).numpy()
        return found

    def _sums(self) -> Any:
        return tensor_slices(self.path, _expected(len(self.layers), self.n_latents))


def check_intervals(path: Path, n_layers: int, n_latents: int) -> Path:
    """The path of a file of intervals of profiles. Raises ModelError if it is of another SAE, or damaged."""
    with _intervals(path, n_layers, n_latents):
        return path


def read_interval(
    path: Path, latent: int, n_layers: int, n_latents: int
) -> tuple[Float32[np.ndarray, " layer"], Float32[np.ndarray, " layer"]]:
    """Both ends of the intervals of one latent's P(layer | latent); NaN where unknown."""
    with _intervals(path, n_layers, n_latents) as ends:
        low, high = (ends[name][:, latent : latent + 1].numpy()[:, 0] for name in ("low", "high"))
        return low, high


def _intervals(path: Path, n_layers: int, n_latents: int) -> Any:
    return tensor_slices(path, dict.fromkeys(("low", "high"), (torch.float32, (n_layers, n_latents))))


def _expected(n_layers: int, n_latents: int) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
    with torch.device("meta"):
        sums = LayerStatistics(n_layers, n_latents).by_shard
    return {name: (part.dtype, tuple(part.shape)) for name, part in sums.items()}
