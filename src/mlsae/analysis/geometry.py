"""The residual stream's own geometry: how far each layer's vectors lie from 0, and how far they turn to the next.

Adjacent layers take two passes: `ResidMeans` for the mean vector of each layer, then `AdjacentSimilarity` around those
means. A cosine is not linear in the mean, so no sums of fixed size give it exactly in one pass; but the mean of a
sample will do (65,536 tokens move the mean cosines of a real model by less than 0.001). Both are streams of
float64 sums that merge.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mlsae.errors import ModelError
from mlsae.intervals import Estimate, check_shards, estimate

SAME_MEANS = 1e-4
"""How far two means of the same vectors may lie apart, in mean norms of them: machines round differently."""


class RunningMoments:
    """Mean, sample standard deviation and standard error of each row of a stream.

    Kept as count, mean and squared deviation, joined as in Chan, Golub and LeVeque 1979: a sum of squares loses digits.
    """

    def __init__(self, n_rows: int):
        self.n = 0
        self.mean = torch.zeros(n_rows, dtype=torch.float64)
        self._squares = torch.zeros(n_rows, dtype=torch.float64)

    @property
    def std(self) -> Tensor:
        """sqrt(sum (x - mean)^2 / (n - 1)) [row]; NaN for fewer than two samples."""
        return (self._squares / (self.n - 1)).sqrt() if self.n > 1 else torch.full_like(self.mean, torch.nan)

    @property
    def sem(self) -> Tensor:
        """std / sqrt(n) [row]."""
        return self.std / max(self.n, 1) ** 0.5

    @property
    def mean_square(self) -> Tensor:
        """Mean of x^2 [row]; NaN without samples."""
        return self.mean.square() + self._squares / self.n if self.n else torch.full_like(self.mean, torch.nan)

    def update(self, samples: Float[Tensor, "row sample"]) -> None:
        """Add samples of every row."""
        if samples.shape[1]:
            samples = samples.detach().double().cpu()
            mean = samples.mean(dim=1)
            self._add(samples.shape[1], mean, (samples - mean[:, None]).square().sum(dim=1))

    def merge(self, other: "RunningMoments") -> "RunningMoments":
        """The moments of both sets of samples."""
        merged = RunningMoments(len(self.mean))
        for part in (self, other):
            merged._add(part.n, part.mean, part._squares)
        return merged

    def to_dict(self) -> dict[str, list[float]]:
        """Mean, std and sem, a value per row."""
        mean = self.mean if self.n else torch.full_like(self.mean, torch.nan)
        return {"mean": mean.tolist(), "std": self.std.tolist(), "sem": self.sem.tolist()}

    def _add(self, n: int, mean: Tensor, squares: Tensor) -> None:
        share = n / max(self.n + n, 1)
        step = mean - self.mean
        self._squares += squares + step.square() * self.n * share
        self.mean += step * share
        self.n += n


class ResidMeans:
    """Pass 1: the mean vector of every layer, and the mean and spread of its norms."""

    def __init__(self, n_layers: int, d_model: int):
        self.n_layers, self.d_model = n_layers, d_model
        self.norm = RunningMoments(n_layers)
        self._sum = torch.zeros(n_layers, d_model, dtype=torch.float64)

    @property
    def n_tokens(self) -> int:
        """Tokens seen, each at every layer."""
        return self.norm.n

    @property
    def mean(self) -> Tensor:
        """mean_t resid[l, t] [layer, d_model]; NaN before any token."""
        return self._sum / self.n_tokens if self.n_tokens else torch.full_like(self._sum, torch.nan)

    @property
    def gamma(self) -> Tensor:
        """|mean_l| / sqrt(mean_t |x[l,t] - mean_l|^2) [layer]: a layer's offset over its spread.

        0 if centred on 0, infinite if all vectors are equal. Tokens that share nothing else have raw cosines of about
        gamma^2 / (1 + gamma^2) with each other.
        """
        offset = self.mean.square().sum(dim=1)
        return (offset / (self.norm.mean_square - offset).clamp(min=0)).sqrt()

    def update(self, resid: Float[Tensor, "layer token d_model"]) -> None:
        """Add the residual vectors of some tokens, masked ones left out."""
        _check_sizes(resid, self.n_layers, self.d_model)
        for layer, vectors in enumerate(resid):  # a layer at a time: float64 doubles the memory
            self._sum[layer] += vectors.detach().double().sum(dim=0).cpu()
        self.norm.update(torch.stack([vectors.detach().double().norm(dim=-1) for vectors in resid]))

    def merge(self, other: "ResidMeans") -> "ResidMeans":
        """The means over both sets of tokens."""
        _check_sizes(other._sum[:, None], self.n_layers, self.d_model)
        merged = ResidMeans(self.n_layers, self.d_model)
        merged.norm = self.norm.merge(other.norm)
        merged._sum += self._sum + other._sum
        return merged

    def to_dict(self) -> dict[str, Any]:
        """The norms of every layer, and gamma."""
        return {"n_tokens": self.n_tokens, "norm": self.norm.to_dict(), "gamma": self.gamma.tolist()}


class AdjacentSimilarity:
    """Pass 2: cosine of each layer's residual vector with the next layer's at the same token.

    `centred`: cos(x[l,t] - mean_l, x[l+1,t] - mean_{l+1}), in [-1, 1], for l = 0..n_layers - 2  (Lawson et al. 2024)
    `raw`: cos(x[l,t], x[l+1,t]), which an offset shared by all tokens brings near 1.
    Masked tokens are left out; the released code kept them as zero vectors, all -mean_l once centred.
    """

    def __init__(self, means: ResidMeans, n_shards: int = 1):
        """`n_shards`: groups of documents (see `intervals.shard_of`) summed apart for the interval of the mean."""
        n_pairs = max(means.n_layers - 1, 0)
        self.means = means
        self.centred = RunningMoments(n_pairs)
        self.raw = RunningMoments(n_pairs)
        self._sums = {name: torch.zeros(n_shards, n_pairs, dtype=torch.float64) for name in ("centred", "raw")}
        self._n = torch.zeros(n_shards, dtype=torch.int64)

    def update(self, resid: Float[Tensor, "layer token d_model"], shard: Int[Tensor, " token"] | None = None) -> None:
        """Add the residual vectors of some tokens, each of a document in `shard` (None: all in shard 0)."""
        _check_sizes(resid, self.means.n_layers, self.means.d_model)
        shard = check_shards(shard, resid.shape[1], len(self._n))
        mean = self.means.mean.to(resid.device)[:, None]  # [layer, 1, d_model]
        centred, raw = _adjacent_cosines(resid, mean), _adjacent_cosines(resid, torch.zeros_like(mean))
        self.centred.update(centred)
        self.raw.update(raw)
        self._sums["centred"].index_add_(0, shard, centred.T.cpu())
        self._sums["raw"].index_add_(0, shard, raw.T.cpu())
        self._n += shard.bincount(minlength=len(self._n))

    def merge(self, other: "AdjacentSimilarity") -> "AdjacentSimilarity":
        """The similarity over both sets of tokens, which must have been centred by the same means, but for rounding."""
        apart = (self.means.mean - other.means.mean).norm(dim=1)
        if not (apart <= SAME_MEANS * self.means.norm.mean).all():
            raise ModelError("other", "was centred by other means; merge the ResidMeans of all parts before pass 2")
        if len(self._n) != len(other._n):
            raise ModelError(
                "other", f"holds {len(other._n)} shards of documents, these sums {len(self._n)}; use one number"
            )
        merged = AdjacentSimilarity(self.means, len(self._n))
        merged.centred, merged.raw = self.centred.merge(other.centred), self.raw.merge(other.raw)
        merged._sums = {name: sums + other._sums[name] for name, sums in self._sums.items()}
        merged._n = self._n + other._n
        return merged

    def interval(self, name: str) -> Estimate:
        """The mean cosine of each pair of layers, `centred` or `raw`, with its interval over documents."""
        sums = {"cosine": self._sums[name], "n": self._n}
        return estimate(sums, self._n, lambda total: total["cosine"] / total["n"])

    def to_dict(self) -> dict[str, Any]:
        """Mean, std, sem and 95 % interval of the mean of both cosines: entry l compares layers l and l + 1."""
        return {"n_tokens": self.raw.n} | {
            name: moments.to_dict() | {"ci95": [pair["ci95"] for pair in self.interval(name).to_dict()]}
            for name, moments in (("centred", self.centred), ("raw", self.raw))
        }


def _adjacent_cosines(
    resid: Float[Tensor, "layer token d_model"], offset: Float[Tensor, "layer 1 d_model"]
) -> Float[Tensor, "pair token"]:
    cosines = resid.new_empty(max(len(resid) - 1, 0), resid.shape[1], dtype=torch.float64)
    for layer, row in enumerate(cosines):
        here, above = (resid[i].detach().double() - offset[i] for i in (layer, layer + 1))
        row.copy_(torch.nn.functional.cosine_similarity(here, above, dim=-1))
    return cosines


def _check_sizes(resid: Tensor, n_layers: int, d_model: int) -> None:
    given = (resid.shape[0], resid.shape[2])
    if given != (n_layers, d_model):
        raise ModelError("resid", f"has (n_layers, d_model) = {given}; these statistics hold {(n_layers, d_model)}")
