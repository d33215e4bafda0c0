"""Directions compared: residual vectors at adjacent layers, and decoder rows with each other.

Adjacent layers take two passes over the same tokens: `ResidMeans` for the mean vector of each layer, then
`AdjacentSimilarity` around those means. Both are streams of float64 sums that merge.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mlsae.errors import ModelError

MAX_BLOCK_ELEMENTS = 1 << 24
"""Cosines held at once by `max_cosine`: 64 MB in float32."""


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
        """The norms of every layer."""
        return {"n_tokens": self.n_tokens, "norm": self.norm.to_dict()}


class AdjacentSimilarity:
    """Pass 2: cosine of each layer's residual vector with the next layer's at the same token.

    `centred`: cos(x[l,t] - mean_l, x[l+1,t] - mean_{l+1}), in [-1, 1], for l = 0..n_layers - 2  (Lawson et al. 2024)
    `raw`: cos(x[l,t], x[l+1,t]), which an offset shared by all tokens brings near 1.
    Masked tokens are left out; the released code kept them as zero vectors, all -mean_l once centred.
    """

    def __init__(self, means: ResidMeans):
        self.means = means
        self.centred = RunningMoments(max(means.n_layers - 1, 0))
        self.raw = RunningMoments(max(means.n_layers - 1, 0))

    def update(self, resid: Float[Tensor, "layer token d_model"]) -> None:
        """Add the residual vectors of some tokens: the tokens that the means were taken over."""
        _check_sizes(resid, self.means.n_layers, self.means.d_model)
        mean = self.means.mean.to(resid.device)[:, None]  # [layer, 1, d_model]
        self.centred.update(_adjacent_cosines(resid, mean))
        self.raw.update(_adjacent_cosines(resid, torch.zeros_like(mean)))

    def merge(self, other: "AdjacentSimilarity") -> "AdjacentSimilarity":
        """The similarity over both sets of tokens, which must have been centred by the same means."""
        if not torch.equal(self.means.mean, other.means.mean):
            raise ModelError("other", "was centred by other means; merge the ResidMeans of all shards before pass 2")
        merged = AdjacentSimilarity(self.means)
        merged.centred, merged.raw = self.centred.merge(other.centred), self.raw.merge(other.raw)
        return merged

    def to_dict(self) -> dict[str, Any]:
        """Mean, std and sem of both cosines: entry l compares layers l and l + 1."""
        return {"n_tokens": self.raw.n, "centred": self.centred.to_dict(), "raw": self.raw.to_dict()}


def max_cosine(W_dec: Float[Tensor, "n_latents d_model"]) -> Float[Tensor, " n_latents"]:
    """Each latent's largest cosine with another latent, max_{i != j} cos(W_dec[i], W_dec[j]), in [-1, 1].

    All pairs, in blocks of rows that keep memory at MAX_BLOCK_ELEMENTS cosines. A zero row has cosine 0 with all; a
    lone latent has no other, and -inf.
    """
    rows = torch.nn.functional.normalize(W_dec.detach().to(torch.promote_types(W_dec.dtype, torch.float32)), dim=-1)
    n_latents = len(rows)
    best = rows.new_empty(n_latents)
    for first in range(0, n_latents, max(1, MAX_BLOCK_ELEMENTS // n_latents)):
        block = rows[first : first + max(1, MAX_BLOCK_ELEMENTS // n_latents)]
        cosines = block @ rows.T  # [row, n_latents]
        cosines.diagonal(first).fill_(-torch.inf)  # a latent is not another latent
        best[first : first + len(block)] = cosines.amax(dim=1)
    return best


def mmcs(W_dec: Float[Tensor, "n_latents d_model"]) -> float:
    """Mean max cosine similarity: the mean over latents of `max_cosine`, in [-1, 1]; NaN for fewer than two latents.

    mean_j max_{i != j} cos(W_dec[i], W_dec[j])         (Sharkey et al. 2022, of a dictionary with itself; the released
    code of Lawson et al. 2024 compared i < j only, floored at 0, and is lower)
    """
    return max_cosine(W_dec).double().mean().item() if len(W_dec) > 1 else torch.nan


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
