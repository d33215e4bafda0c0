"""Where in depth each latent is active: sums over tokens that are updated with sparse codes, merge and save.

An *event* is one latent active on one token, at one layer or several. `LayerStatistics` adds up events and nothing
larger, apart for each shard of documents, and everything reported is derived from its sums.
Counts are int64, sums float64, on the CPU: on one machine the same codes give the same bits, wherever they were computed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from mlsae.analysis.depth import Decomposition, Distribution, Lawson2024Ratios, decompose, distribute
from mlsae.analysis.events import Events, find_events
from mlsae.config import Impl
from mlsae.errors import ConfigError, DataError, ModelError, NumericsError, did_you_mean
from mlsae.files import save_tensors
from mlsae.intervals import MIN_SHARDS, Estimate, check_shards, jackknife
from mlsae.ops import cpu
from mlsae.reporting import bar
from mlsae.untrusted import load_tensors

WEIGHTS = ("mass", "event", "count")
"""What an active (layer, token, latent) weighs: z; z / sum_l z, so that every event counts once; or 1."""
SHAPES = ("active_layers", "longest_run", "runs", "first_layer", "last_layer")
"""Histograms of events (of runs: every one) over numbers of layers, and over layers."""
SUMS_OF = {"mass": "totals", "event": "shares", "count": "counts"}
"""The sums of each of WEIGHTS."""
ENTRIES_AT_ONCE = 200_000
"""Of the code, sorted and summed together in NumPy: what fits into a processor's cache is faster."""
Sums = dict[str, Tensor]
"""Sums by name, each with a leading axis of shards."""


@runtime_checkable
class SparseCode(Protocol):
    """What is read of a code: the k active latents of the vectors of every layer at the same tokens."""

    @property
    def values(self) -> Float[Tensor, "layer token k"]:
        """Activations z, >= 0; zeros are not counted."""

    @property
    def indices(self) -> Int[Tensor, "layer token k"]:
        """Latent ids in [0, n_latents), distinct within a vector."""


@dataclass(frozen=True)
class PlainCode:
    """A code that holds nothing else."""

    values: Float[Tensor, "layer token k"]
    indices: Int[Tensor, "layer token k"]


def checked(
    code: SparseCode, n_layers: int, n_latents: int
) -> tuple[Float[Tensor, "layer token k"], Int[Tensor, "layer token k"]]:
    """Values and ids on the CPU, refused where they would be counted wrongly and silently."""
    values, indices = code.values.detach().cpu(), code.indices.cpu()
    if values.ndim != 3:
        raise DataError("code", f"has shape {list(values.shape)}; give [layer, token, k], batch and pos flattened")
    if len(values) != n_layers:
        raise ModelError("code", f"has {len(values)} layers; these statistics have n_layers={n_layers}")
    if ((indices < 0) | (indices >= n_latents)).any():
        raise ModelError("code", f"names latents outside [0, {n_latents}); check which SAE it is from")
    if not values.isfinite().all():
        raise NumericsError("code", "values hold NaN or infinity; check the SAE's weights and the residual stream")
    return values, indices


class LayerStatistics:
    """Sums over tokens of where in depth each latent was active. All of them merge by addition; layer i is row i.

    Per (layer, latent): `totals` sum z, `shares` sum z / sum_l z, `counts` number of z > 0, `persisted` those of them
    that are active at the next layer too. Per latent: `n_events`; `effective_layers`, summed over its events; `within`,
    a row for each of WEIGHTS: the sum over events of sum_l w (l - mean layer of the event)^2. Events by shape:
    `active_layers`, `longest_run` and `runs` (entry i: i + 1 layers), `first_layer` and `last_layer`.

    With `n_shards`, documents are dealt into so many and everything is summed apart for each, for intervals; the
    attributes above are the sums over all shards, and `by_shard` holds the parts, (4 n_layers + 5) n_latents numbers each.
    """

    def __init__(self, n_layers: int, n_latents: int, n_shards: int = 1):
        self.n_layers, self.n_latents, self.n_shards = n_layers, n_latents, n_shards
        self.by_shard = self._zeros(n_shards)
        self._whole: dict[str, Tensor] = {}

    def __getattr__(self, name: str) -> Tensor:
        """A sum over all shards."""
        if name.startswith("__") or name not in self.__dict__.get("by_shard", {}):
            raise AttributeError(f"LayerStatistics has no '{name}'")
        if name not in self._whole:
            self._whole[name] = self.by_shard[name].sum(0)
        return self._whole[name]

    @property
    def n_tokens(self) -> int:
        """Tokens seen, each at every layer."""
        return int(self.tokens)

    def update(
        self,
        code: SparseCode,
        sequence: Int[Tensor, " token"] | None = None,
        shard: Int[Tensor, " token"] | None = None,
        *,
        impl: Impl = "auto",
    ) -> None:
        """Add the code of some tokens at all layers.

        Args:
            sequence: the sequence that each token belongs to; None if they are all of one. Only `lawson2024` needs
                it: it averages over sequences, so a sequence must arrive whole. With `keep [batch, pos]` marking the
                tokens that were kept, it is `keep.nonzero()[:, 0]`.
            shard: the shard of documents that each token belongs to; None: the first.
            impl: `reference` is NumPy; otherwise C++, where it was built.
        """
        values, indices = checked(code, self.n_layers, self.n_latents)
        n_tokens = values.shape[1]
        sequence = torch.zeros(n_tokens, dtype=torch.int64) if sequence is None else sequence.cpu()
        if len(sequence) != n_tokens:
            raise DataError("sequence", f"names the sequence of {len(sequence)} tokens; the code holds {n_tokens}")
        shards, owner = check_shards(shard, n_tokens, self.n_shards).unique(return_inverse=True)
        _, sequence, length = sequence.unique(return_inverse=True, return_counts=True)
        # These tokens are added up apart first: rounding then grows with the updates, not with the entries.
        sums = self._zeros(len(shards))
        sums["tokens"] += owner.bincount(minlength=len(shards))
        firsts, moments = (torch.zeros(len(length), size, dtype=torch.float64) for size in (self.n_latents, 3))
        add = self._add_reference if impl == "reference" or cpu.missing() is not None else cpu.depth_sums
        add(values, indices, owner, sequence, sums, firsts, moments)
        self._add_published(sums, firsts, moments, length, owner.new_zeros(len(length)).scatter_(0, sequence, owner))
        for name, total in self.by_shard.items():
            total.index_add_(0, shards, sums[name])
        self._whole = {}

    def merge(self, other: "LayerStatistics") -> "LayerStatistics":
        """The statistics of both sets of tokens, as new statistics."""
        mine, theirs = ((x.n_layers, x.n_latents, x.n_shards) for x in (self, other))
        if mine != theirs:
            raise ModelError(
                "other",
                f"holds (n_layers, n_latents, n_shards) = {theirs}, this one {mine}; merge statistics of the same SAE",
            )
        merged = LayerStatistics(*mine)
        for name, total in merged.by_shard.items():
            total += self.by_shard[name] + other.by_shard[name]
        return merged

    def whole(self) -> "LayerStatistics":
        """The same tokens in one shard."""
        return self._with({name: parts.sum(0) for name, parts in self.by_shard.items()})

    def without(self, shard: int) -> "LayerStatistics":
        """The statistics of all documents but those of one shard; exactly 0 where that one held all there was."""
        return self._with({name: getattr(self, name) - parts[shard] for name, parts in self.by_shard.items()})

    def estimates(
        self, numbers: "Callable[[LayerStatistics], dict[str, Float[Tensor, '*stat']]]"
    ) -> dict[str, Estimate]:
        """Named numbers derived from these statistics, with their intervals over documents (see intervals.py)."""
        value = numbers(self)
        without = [numbers(self.without(int(shard))) for shard in self.by_shard["tokens"].nonzero()[:, 0]]
        return {
            name: jackknife(x, torch.stack([part[name] for part in without]) if without else x.new_empty(0, *x.shape))
            for name, x in value.items()
        }

    def profile_interval(
        self, *, latents_at_once: int = 4096, progress: bool = False
    ) -> tuple[Float[Tensor, "layer latent"], Float[Tensor, "layer latent"]] | None:
        """Ends of the intervals of P(layer | latent) over documents, as float32; None where too few shards hold any.

        NaN for a latent that only one shard holds. Some latents at a time: never [shard, layer, n_latents] beside the sums.
        """
        used = self.by_shard["tokens"].nonzero()[:, 0]
        if len(used) < MIN_SHARDS:
            return None
        low, high = (torch.empty(self.n_layers, self.n_latents) for _ in range(2))
        starts = range(0, self.n_latents, latents_at_once)
        parts = ((min(latents_at_once, self.n_latents - i), slice(i, i + latents_at_once)) for i in starts)
        for at in bar(parts, total=self.n_latents, desc="intervals of profiles", progress=progress, unit="latent"):
            whole, without = self.totals[:, at], self.totals[:, at] - self.by_shard["totals"][:, :, at][used]
            found = jackknife(whole / whole.sum(0), without / without.sum(1, keepdim=True))
            low[:, at], high[:, at] = found.low, found.high
        return low, high

    def save(self, path: Path) -> None:
        """Write every sum of every shard to a safetensors file, exactly."""
        save_tensors(path, self.by_shard)

    @classmethod
    def load(cls, path: Path) -> "LayerStatistics":
        """What `save` wrote, exactly."""
        found = load_tensors(path)
        counts = found.get("counts", torch.empty(0))  # its bytes are in the file: a wild size cannot fill memory
        sizes = counts.shape if counts.ndim == 3 and counts.numel() else (1, 0, 0)
        statistics = cls(sizes[1], sizes[2], sizes[0])
        sums = statistics.by_shard
        if {n: (t.shape, t.dtype) for n, t in found.items()} != {n: (t.shape, t.dtype) for n, t in sums.items()}:
            raise ModelError(str(path), "does not hold layer statistics; name a file that LayerStatistics.save wrote")
        for name, total in sums.items():
            total.copy_(found[name])
        return statistics

    def density(self) -> Float[Tensor, "layer latent"]:
        """Share of tokens at which each latent is active at each layer, in [0, 1]; NaN before any token."""
        return self.counts.double() / self.n_tokens if self.n_tokens else torch.full_like(self.totals, math.nan)

    def unused_fraction(self) -> Float[Tensor, " layer"]:
        """Share of latents never active at each layer, in [0, 1]."""
        return (self.counts == 0).double().mean(dim=1)

    def persistence(self) -> Float[Tensor, "layer latent"]:
        """P(active at layer l + 1 | active at layer l) for all layers but the last, in [0, 1]; NaN where never active."""
        return self.persisted[:-1] / self.counts[:-1].double()

    def distribution(self) -> Distribution:
        """P(layer | latent), weighted by activation, and its moments."""
        return distribute(self.totals, self.counts)

    def decomposition(self, weight: str = "mass") -> Decomposition:
        """Depth variance split into within, token and latent, with activations weighted by one of WEIGHTS."""
        if weight not in WEIGHTS:
            raise ConfigError("weight", f"'{weight}'; choose {', '.join(WEIGHTS)}{did_you_mean(weight, WEIGHTS)}")
        return decompose(getattr(self, SUMS_OF[weight]).double(), self.within[WEIGHTS.index(weight)])

    def lawson2024(self) -> Lawson2024Ratios:
        """The published ratios, for comparison with published results only; averaged over sequences where defined.

        With p = z / sum_l z, 0 where inactive, and V(q) = sum_l l^2 q - (sum_l l q)^2, per sequence:
        rel_f = mean_j V(mean_t p) / V(mean_{t,j} p),  rel_t = mean_{t,j} V(p) / mean_j V(mean_t p)
        (Lawson et al. 2024, released code). The averaged q sum to a firing rate and not to 1, so V is a second moment
        about layer 0, not a variance: both ratios change when the layers are numbered from 1. The released code also
        took top-k values before rectification and kept special tokens as zero vectors; codes here have neither.
        """
        rel_f, rel_t = (self.published / self.sequences).tolist()
        return Lawson2024Ratios(rel_f, rel_t)

    def _zeros(self, n_shards: int) -> Sums:
        n_layers, n_latents = self.n_layers, self.n_latents
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "totals": ((n_layers, n_latents), torch.float64),
            "shares": ((n_layers, n_latents), torch.float64),
            "counts": ((n_layers, n_latents), torch.int64),
            "persisted": ((n_layers, n_latents), torch.int64),
            "within": ((len(WEIGHTS), n_latents), torch.float64),
            "effective_layers": ((n_latents,), torch.float64),
            "n_events": ((n_latents,), torch.int64),
            **dict.fromkeys(SHAPES, ((n_layers,), torch.int64)),
            "tokens": ((), torch.int64),
            "published": ((2,), torch.float64),  # lawson2024's rel_f and rel_t, summed over sequences
            "sequences": ((2,), torch.int64),  # where each is defined
        }
        return {name: torch.zeros(n_shards, *shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}

    def _with(self, sums: dict[str, Tensor]) -> "LayerStatistics":
        statistics = LayerStatistics(0, 0)
        statistics.n_layers, statistics.n_latents = self.n_layers, self.n_latents
        statistics.by_shard = {name: total[None] for name, total in sums.items()}
        return statistics

    def _add_reference(
        self,
        values: Float[Tensor, "layer token k"],
        indices: Int[Tensor, "layer token k"],
        shard: Int[Tensor, " token"],
        sequence: Int[Tensor, " token"],
        sums: Sums,
        firsts: Float[Tensor, "sequence n_latents"],
        moments: Float[Tensor, "sequence 3"],
    ) -> None:
        """What `ops.cpu.depth_sums` does, in NumPy, some tokens at a time."""
        at_once = max(1, ENTRIES_AT_ONCE // (self.n_layers * values.shape[2]))
        for at in (slice(start, start + at_once) for start in range(0, values.shape[1], at_once)):
            events = find_events(values[:, at], indices[:, at], self.n_latents)
            self._add_sums(sums, events, shard[at].numpy()[events.token])
            self._add_shapes(sums, events, shard[at].numpy()[events.token])
            owner = sequence[at].numpy()[events.token]
            _add_at(firsts, owner * self.n_latents + events.latent, events.mean)
            squared = np.square(events.mean)
            for column, x in enumerate((events.mean, squared, events.variance + squared)):
                _add_at(moments, owner * 3 + column, x)

    def _add_sums(self, sums: Sums, events: Events, owner: Int[np.ndarray, " event"]) -> None:
        latent = owner * self.n_latents + events.latent
        cell = (owner * self.n_layers * self.n_latents + events.latent).take(events.event)
        cell += events.layer * self.n_latents
        _add_at(sums["totals"], cell, events.value)
        _add_at(sums["shares"], cell, events.share)
        _add_at(sums["counts"], cell)
        _add_at(sums["persisted"], cell[events.goes_on])
        _add_at(sums["n_events"], latent)
        _add_at(sums["effective_layers"], latent, events.effective_layers)
        within = latent + owner * (len(WEIGHTS) - 1) * self.n_latents
        for row, name in enumerate(WEIGHTS):
            _add_at(sums["within"], within + row * self.n_latents, events.spread(name))

    def _add_shapes(self, sums: Sums, events: Events, owner: Int[np.ndarray, " event"]) -> None:
        base = owner * self.n_layers
        length, event = events.runs
        _add_at(sums["active_layers"], base + events.size - 1)
        _add_at(sums["longest_run"], base + events.longest_run() - 1)
        _add_at(sums["runs"], base[event] + length - 1)
        _add_at(sums["first_layer"], base + events.layer[events.start])
        _add_at(sums["last_layer"], base + events.layer[events.last])

    def _add_published(
        self,
        sums: Sums,
        firsts: Float[Tensor, "sequence n_latents"],
        moments: Float[Tensor, "sequence 3"],
        n_tokens: Int[Tensor, " sequence"],
        shard: Int[Tensor, " sequence"],
    ) -> None:
        """Per sequence, from the mean layers of events by latent, and the sums of them, their squares, and squared layers."""
        n_cells = n_tokens.double() * self.n_latents
        mean_first, mean_square, mean_second = (moments / n_cells[:, None]).unbind(1)
        e_f = mean_second - firsts.square().sum(1) / (n_cells * n_tokens)
        ratios = torch.stack([e_f / (mean_second - mean_first**2), (mean_second - mean_square) / e_f], dim=1)
        sums["published"].index_add_(0, shard, ratios.where(ratios.isfinite(), 0.0))
        sums["sequences"].index_add_(0, shard, ratios.isfinite().long())


def _add_at(
    sums: Shaped[Tensor, "*cell"], cell: Int[np.ndarray, " item"], x: Float[np.ndarray, " item"] | None = None
) -> None:
    """sums[cell] += x, or 1, where `cell` counts through all of `sums`."""
    at = torch.from_numpy(cell)
    sums.view(-1).scatter_add_(0, at, torch.ones_like(at) if x is None else torch.from_numpy(x))
