"""What is derived from sums over layers: each latent's distribution over depth, and the depth variance in three terms."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


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
    n_active_layers: Moments
    bimodality: Moments
    """Over latents that are on more than one layer."""

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
    birth: Int[Tensor, " latent"]
    """The first of these layers; -1 if there is none."""
    death: Int[Tensor, " latent"]
    """The last of them; -1 if there is none."""
    bimodality: Float[Tensor, " latent"]
    """(skewness^2 + 1) / kurtosis of the layer under P(l|j), in (0, 1]: 1 on any two layers, also adjacent ones, so
    read it beside `std`; NaN on a single layer."""

    @property
    def n_unused(self) -> int:
        """Latents never active at any layer."""
        return int((~self.used).sum())

    def summary(self) -> DistributionSummary:
        """Mean, std and standard error over used latents."""
        columns = {
            "std": self.std,
            "relative_std": self.std / len(self.probability),
            "entropy": self.entropy,
            "effective_layers": self.effective_layers,
            "n_active_layers": self.n_active_layers.double(),
            "bimodality": self.bimodality,
        }
        moments = {name: _moments(x[self.used & ~x.isnan()]) for name, x in columns.items()}
        return DistributionSummary(int(self.used.sum()), self.n_unused, **moments)


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


# ---- arithmetic ----------------------------------------------------------------------------------------------------


def distribute(totals: Float[Tensor, "layer latent"], counts: Int[Tensor, "layer latent"]) -> Distribution:
    """P(layer | latent) and its moments from each latent's summed activation and number of activations at each layer."""
    mass = totals.sum(dim=0)
    probability = totals / mass
    layer = torch.arange(len(totals), dtype=torch.float64)[:, None]
    centre = (layer * probability).sum(dim=0)
    second, third, fourth = (((layer - centre) ** p * probability).sum(dim=0) for p in (2, 3, 4))
    entropy = torch.special.entr(probability).sum(dim=0)
    active = (100 * counts >= counts.sum(dim=0)) & (counts > 0)
    at_all = active.any(dim=0)
    return Distribution(
        probability=probability,
        used=mass > 0,
        centre_of_mass=centre,
        variance=second,
        std=second.sqrt(),
        entropy=entropy,
        effective_layers=entropy.exp(),
        n_active_layers=active.sum(dim=0),
        birth=torch.where(at_all, active.int().argmax(dim=0), -1),
        death=torch.where(at_all, len(active) - 1 - active.flip(0).int().argmax(dim=0), -1),
        bimodality=(third**2 + second**3) / (second * fourth),
    )


def decompose(sums: Float[Tensor, "layer latent"], spread: Float[Tensor, " latent"]) -> Decomposition:
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
