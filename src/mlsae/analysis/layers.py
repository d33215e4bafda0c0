"""Where in depth each latent lives: its distribution over layers, and the depth variance split into three terms.

An *event* is one latent active on one token, at one layer or several. `LayerStatistics` adds up events and nothing
larger: it is updated with sparse codes, merged by addition, and everything reported is derived from its sums.
Counts are int64, sums float64, on the CPU, so the same codes give the same bits wherever the code was computed.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mlsae.analysis.events import Events, find_events, sums_by
from mlsae.errors import ConfigError, DataError, ModelError, NumericsError, did_you_mean
from mlsae.files import load_tensors, save_tensors

WEIGHTS = ("mass", "event", "count")
"""What an active (layer, token, latent) weighs: z; z / sum_l z, so that every event counts once; or 1."""


@runtime_checkable
class SparseCode(Protocol):
    """What is read of a code: the k active latents of the vectors of every layer at the same tokens."""

    @property
    def values(self) -> Float[Tensor, "layer token k"]:
        """Activations z, >= 0; zeros are not counted."""

    @property
    def indices(self) -> Int[Tensor, "layer token k"]:
        """Latent ids in [0, n_latents), distinct within a vector."""


# ---- results -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Mean, sample standard deviation and standard error std / sqrt(n) of a number over latents."""

    mean: float
    std: float
    sem: float


@dataclass(frozen=True)
class DistributionSummary:
    """The layer distributions in a few numbers, over used latents only."""

    n_used: int
    n_unused: int
    std: Moments
    """Standard deviation of the layer, in layers."""
    relative_std: Moments
    """The same divided by n_layers."""
    entropy: Moments
    """In nats."""
    effective_layers: Moments
    """exp(entropy), in [1, n_layers]."""

    def to_dict(self) -> dict[str, Any]:
        """The same names and numbers as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Distribution:
    """P(layer | latent) and what follows from it; NaN (0 in counts) for a latent that was never active.

    P(l|j) = A[l,j] / sum_l A[l,j] with A[l,j] = sum_t z[l,t,j]              (Lawson et al. 2024, rectified z here)
    """

    probability: Float[Tensor, "layer latent"]
    used: Bool[Tensor, " latent"]
    centre_of_mass: Float[Tensor, " latent"]
    """sum_l l P(l|j), in [0, n_layers - 1]."""
    variance: Float[Tensor, " latent"]
    """sum_l (l - centre_of_mass)^2 P(l|j); (n_layers^2 - 1) / 12 if uniform."""
    std: Float[Tensor, " latent"]
    entropy: Float[Tensor, " latent"]
    """-sum_l P ln P, in nats."""
    effective_layers: Float[Tensor, " latent"]
    """exp(entropy), in [1, n_layers]."""
    n_active_layers: Int[Tensor, " latent"]
    """Layers that hold at least 1 % of the latent's activations (counted), and at least one."""
    bimodality: Float[Tensor, " latent"]
    """(skewness^2 + 1) / kurtosis of the layer under P(l|j), in (0, 1]: 1 on any two layers, also adjacent ones, so
    read it beside `std`; NaN on a single layer."""

    @property
    def n_unused(self) -> int:
        """Latents never active at any layer."""
        return int((~self.used).sum())

    def summary(self) -> DistributionSummary:
        """Mean, std and standard error over used latents."""
        columns = (self.std, self.std / len(self.probability), self.entropy, self.effective_layers)
        return DistributionSummary(int(self.used.sum()), self.n_unused, *(_moments(x[self.used]) for x in columns))


@dataclass(frozen=True)
class Decomposition:
    """Depth variance by the law of total variance: total = within + token + latent, each >= 0, in squared layers.

    Var(l) = E[Var(l|j,t)] + E[Var(E[l|j,t] | j)] + Var(E[l|j]), (layer l, token t, latent j) drawn by weight.
    """

    within: float
    """Spread of one latent on one token."""
    token: float
    """The same latent at different depths on different tokens."""
    latent: float
    """Different latents at different depths."""
    total: float

    @property
    def rel_f(self) -> float:
        """(within + token) / total, in [0, 1]; 0 if every latent keeps to one depth, NaN if there is no variance."""
        return _ratio(self.within + self.token, self.total)

    @property
    def rel_t(self) -> float:
        """within / (within + token), in [0, 1]; 1 if no latent moves over tokens, NaN if none has any variance."""
        return _ratio(self.within, self.within + self.token)

    def to_dict(self) -> dict[str, float]:
        """Terms and ratios by name."""
        return {**asdict(self), "rel_f": self.rel_f, "rel_t": self.rel_t}


@dataclass(frozen=True)
class Lawson2024Ratios:
    """The variance ratios as Lawson et al. 2024 published them: see `LayerStatistics.lawson2024`."""

    rel_f: float
    rel_t: float

    def to_dict(self) -> dict[str, float]:
        """Both ratios by name."""
        return asdict(self)


# ---- the accumulator -----------------------------------------------------------------------------------------------


class LayerStatistics:
    """Sums over tokens of where in depth each latent was active. All of them merge by addition; layer i is row i.

    Per (layer, latent): `totals` sum z, `shares` sum z / sum_l z, `counts` number of z > 0. Per latent: `n_events`, and
    `within`, a row for each of WEIGHTS: the sum over events of sum_l w (l - mean layer of the event)^2.
    Events by shape: `active_layers` and `longest_run` (entry i: i + 1 layers), `first_layer` and `last_layer`.
    """

    def __init__(self, n_layers: int, n_latents: int):
        self.n_layers, self.n_latents = n_layers, n_latents
        self.totals = torch.zeros(n_layers, n_latents, dtype=torch.float64)
        self.shares = torch.zeros(n_layers, n_latents, dtype=torch.float64)
        self.counts = torch.zeros(n_layers, n_latents, dtype=torch.int64)
        self.within = torch.zeros(len(WEIGHTS), n_latents, dtype=torch.float64)
        self.n_events = torch.zeros(n_latents, dtype=torch.int64)
        self.active_layers = torch.zeros(n_layers, dtype=torch.int64)
        self.longest_run = torch.zeros(n_layers, dtype=torch.int64)
        self.first_layer = torch.zeros(n_layers, dtype=torch.int64)
        self.last_layer = torch.zeros(n_layers, dtype=torch.int64)
        self._tokens = torch.zeros((), dtype=torch.int64)
        self._lawson2024 = torch.zeros(2, dtype=torch.float64)  # rel_f, rel_t summed over sequences
        self._sequences = torch.zeros(2, dtype=torch.int64)  # sequences where each is defined

    @property
    def n_tokens(self) -> int:
        """Tokens seen, each at every layer."""
        return int(self._tokens)

    def sums(self) -> dict[str, Tensor]:
        """Every sum by name: what is added by merge and written by save."""
        return {name.removeprefix("_"): value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def update(self, code: SparseCode, sequence: Int[Tensor, " token"] | None = None) -> None:
        """Add the code of some tokens at all layers.

        Args:
            sequence: the sequence that each token belongs to; None if they are all of one. Only `lawson2024` needs
                it: it averages over sequences, so a sequence must arrive whole. With `keep [batch, pos]` marking the
                tokens that were kept, it is `keep.nonzero()[:, 0]`.
        """
        values, indices = self._checked(code)
        n_tokens = values.shape[1]
        sequence = torch.zeros(n_tokens, dtype=torch.int64) if sequence is None else sequence.cpu()
        if len(sequence) != n_tokens:
            raise DataError("sequence", f"names the sequence of {len(sequence)} tokens; the code holds {n_tokens}")
        events = find_events(values, indices, self.n_latents)
        self._tokens += n_tokens
        self._add_sums(events)
        self._add_shapes(events)
        self._add_lawson2024(events, sequence)

    def merge(self, other: "LayerStatistics") -> "LayerStatistics":
        """The statistics of both sets of tokens, as new statistics."""
        mine, theirs = (self.n_layers, self.n_latents), (other.n_layers, other.n_latents)
        if mine != theirs:
            raise ModelError(
                "other", f"holds (n_layers, n_latents) = {theirs}, this one {mine}; merge statistics of the same SAE"
            )
        merged = LayerStatistics(*mine)
        for name, total in merged.sums().items():
            total += self.sums()[name] + other.sums()[name]
        return merged

    def save(self, path: Path) -> None:
        """Write every sum to a safetensors file, exactly."""
        save_tensors(path, self.sums())

    @classmethod
    def load(cls, path: Path) -> "LayerStatistics":
        """What `save` wrote, exactly."""
        found = load_tensors(path)
        counts = found.get("counts", torch.empty(0))  # its bytes are in the file: a wild size cannot fill memory
        statistics = cls(*counts.shape) if counts.ndim == 2 and counts.numel() else cls(0, 0)
        sums = statistics.sums()
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

    def distribution(self) -> Distribution:
        """P(layer | latent), weighted by activation, and its moments."""
        mass = self.totals.sum(dim=0)
        probability = self.totals / mass
        layer = torch.arange(self.n_layers, dtype=torch.float64)[:, None]
        centre = (layer * probability).sum(dim=0)
        second, third, fourth = (((layer - centre) ** p * probability).sum(dim=0) for p in (2, 3, 4))
        entropy = torch.special.entr(probability).sum(dim=0)
        return Distribution(
            probability=probability,
            used=mass > 0,
            centre_of_mass=centre,
            variance=second,
            std=second.sqrt(),
            entropy=entropy,
            effective_layers=entropy.exp(),
            n_active_layers=((100 * self.counts >= self.counts.sum(dim=0)) & (self.counts > 0)).sum(dim=0),
            bimodality=(third**2 + second**3) / (second * fourth),
        )

    def decomposition(self, weight: str = "mass") -> Decomposition:
        """Depth variance split into within, token and latent, with activations weighted by one of WEIGHTS."""
        if weight not in WEIGHTS:
            raise ConfigError("weight", f"'{weight}'; choose {', '.join(WEIGHTS)}{did_you_mean(weight, WEIGHTS)}")
        return _decompose(self._layer_sums(weight).double(), self.within[WEIGHTS.index(weight)])

    def lawson2024(self) -> Lawson2024Ratios:
        """The published ratios, for comparison with published results only; averaged over sequences where defined.

        With p = z / sum_l z, 0 where inactive, and V(q) = sum_l l^2 q - (sum_l l q)^2, per sequence:
        rel_f = mean_j V(mean_t p) / V(mean_{t,j} p),  rel_t = mean_{t,j} V(p) / mean_j V(mean_t p)
        (Lawson et al. 2024, released code). The averaged q sum to a firing rate and not to 1, so V is a second moment
        about layer 0, not a variance: both ratios change when the layers are numbered from 1. The released code also
        took top-k values before rectification and kept special tokens as zero vectors; codes here have neither.
        """
        rel_f, rel_t = (self._lawson2024 / self._sequences).tolist()
        return Lawson2024Ratios(rel_f, rel_t)

    def _checked(self, code: SparseCode) -> tuple[Float[Tensor, "layer token k"], Int[Tensor, "layer token k"]]:
        """Values and ids on the CPU, refused where they would be counted wrongly and silently."""
        values, indices = code.values.detach().cpu(), code.indices.cpu()
        if values.ndim != 3:
            raise DataError("code", f"has shape {list(values.shape)}; give [layer, token, k], batch and pos flattened")
        if len(values) != self.n_layers:
            raise ModelError("code", f"has {len(values)} layers; these statistics have n_layers={self.n_layers}")
        if ((indices < 0) | (indices >= self.n_latents)).any():
            raise ModelError("code", f"names latents outside [0, {self.n_latents}); check which SAE it is from")
        if not values.isfinite().all():
            raise NumericsError("code", "values hold NaN or infinity; check the SAE's weights and the residual stream")
        return values, indices

    def _layer_sums(self, weight: str) -> Tensor:
        return {"mass": self.totals, "event": self.shares, "count": self.counts}[weight]

    def _add_sums(self, events: "Events") -> None:
        cell = events.layer * self.n_latents + events.latent[events.event]
        for name, within in zip(WEIGHTS, self.within, strict=True):
            weight, spread = events.weighted(name)
            _add_at(self._layer_sums(name).view(-1), cell, weight)
            _add_at(within, events.latent, spread)
        _add_at(self.n_events, events.latent, torch.ones_like(events.latent))

    def _add_shapes(self, events: "Events") -> None:
        last = events.start + events.size - 1
        self.active_layers += torch.bincount(events.size - 1, minlength=self.n_layers)
        self.longest_run += torch.bincount(events.longest_run() - 1, minlength=self.n_layers)
        self.first_layer += torch.bincount(events.layer[events.start], minlength=self.n_layers)
        self.last_layer += torch.bincount(events.layer[last], minlength=self.n_layers)

    def _add_lawson2024(self, events: "Events", sequence: Int[Tensor, " token"]) -> None:
        """Per sequence, from the first and second moment of the layer in each event: V needs no more."""
        _, sequence, n_tokens = sequence.unique(return_inverse=True, return_counts=True)
        owner, n_sequences, n_cells = sequence[events.token], len(n_tokens), n_tokens * self.n_latents
        first, second = events.sum(events.share * events.layer), events.sum(events.share * events.layer**2)
        pairs, pair = (owner * self.n_latents + events.latent).unique(return_inverse=True)
        pair_first = sums_by(first, pair, len(pairs))
        mean_second = sums_by(second, owner, n_sequences) / n_cells
        mean_first = sums_by(first, owner, n_sequences) / n_cells
        e_f = mean_second - sums_by(pair_first**2, pairs // self.n_latents, n_sequences) / (n_cells * n_tokens)
        e_tf = mean_second - sums_by(first**2, owner, n_sequences) / n_cells
        ratios = torch.stack([e_f / (mean_second - mean_first**2), e_tf / e_f])  # [ratio, sequence]
        self._lawson2024 += ratios.nan_to_num(0.0).sum(dim=1)
        self._sequences += ratios.isfinite().sum(dim=1)


# ---- arithmetic ----------------------------------------------------------------------------------------------------


def _add_at(sums: Shaped[Tensor, " cell"], cell: Int[Tensor, " item"], x: Shaped[Tensor, " item"]) -> None:
    """sums[cell] += x. Floats are added up apart first: rounding then grows with the updates, not with the entries."""
    if sums.is_floating_point():
        sums += sums_by(x, cell, len(sums))
    else:
        sums.scatter_add_(0, cell, x.to(sums.dtype))


def _decompose(sums: Float[Tensor, "layer latent"], spread: Float[Tensor, " latent"]) -> Decomposition:
    """The three terms from `sums[l, j]` of the weight and each latent's `spread` within events.

    Means are taken with weights divided by their own sum first: where all weight is on one layer that is exactly 1,
    and the terms are exactly 0. `token` alone is a difference, of two float64 sums; what is left of it below 1e-12 of
    the total is their rounding and is set to 0. Anything more negative is not rounding and stays visible.
    """
    centred = torch.arange(len(sums), dtype=torch.float64) - (len(sums) - 1) / 2
    mass, by_layer = sums.sum(dim=0), sums.sum(dim=1)
    sums, mass, weight = sums[:, mass > 0], mass[mass > 0], by_layer.sum()
    mean_of_latent = centred @ (sums / mass)
    mean = centred @ (by_layer / weight)
    total = (centred - mean) ** 2 @ by_layer / weight
    latent = mass @ (mean_of_latent - mean) ** 2 / weight
    within = spread.sum() / weight
    token = ((centred[:, None] - mean_of_latent) ** 2 * sums).sum() / weight - within
    token = torch.where(token.abs() <= 1e-12 * total, 0.0, token)
    return Decomposition(within.item(), token.item(), latent.item(), total.item())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _moments(x: Float[Tensor, " latent"]) -> Moments:
    std = x.std().item() if len(x) > 1 else math.nan
    return Moments(x.mean().item(), std, std / math.sqrt(len(x)) if len(x) else math.nan)
