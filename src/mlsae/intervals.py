"""95 % intervals from documents: what a statistic would have been on other documents of the same kind.

Tokens of one document resemble each other, so documents, not tokens, are what was sampled. Documents are dealt into
shards, every sum is kept per shard, and the statistic is computed again without each shard in turn (the delete-a-group
jackknife: Quenouille 1956, Tukey 1958). That also removes the bias that a ratio or a square of sums has, which a
bootstrap of the same sums would add a second time. How often the intervals hold the truth is measured in docs/log.md.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from scipy.special import stdtrit
from torch import Tensor

from mlsae.errors import DataError

N_SHARDS = 23
"""A prime: whatever takes turns in a corpus does not fall into the same shards."""
MIN_SHARDS = 5
"""Shards that hold documents, below which nothing can be said: the interval is NaN."""


@dataclass(frozen=True)
class Estimate:
    """Numbers and their 95 % intervals; an interval is NaN where the statistic was undefined without some documents."""

    value: Float[Tensor, "*stat"]
    low: Float[Tensor, "*stat"]
    high: Float[Tensor, "*stat"]

    def __getitem__(self, at: Any) -> "Estimate":
        return Estimate(self.value[at], self.low[at], self.high[at])

    def to_dict(self) -> Any:
        """`{"value": .., "ci95": [low, high]}`, in lists as the numbers are."""
        if self.value.ndim:
            return [self[i].to_dict() for i in range(len(self.value))]
        return with_interval(self.value.item(), (self.low.item(), self.high.item()))


def with_interval(value: float, ci95: Sequence[float]) -> dict[str, Any]:
    """A number with its interval, as it stands in JSON."""
    return {"value": value, "ci95": list(ci95)}


def shard_of(document: Int[Tensor, "*token"], n_shards: int = N_SHARDS) -> Int[Tensor, "*token"]:
    """The shard of each token's document: the same in every process that reads a part of the same text."""
    return document % n_shards


def check_shards(shard: Int[Tensor, " token"] | None, n_tokens: int, n_shards: int) -> Int[Tensor, " token"]:
    """One shard a token on the CPU, all 0 where none is given; refuses others."""
    if shard is None:
        return torch.zeros(n_tokens, dtype=torch.int64)
    if len(shard) != n_tokens:
        raise DataError("shard", f"names the shard of {len(shard)} tokens; there are {n_tokens}")
    if n_tokens and not (int(shard.min()) >= 0 and int(shard.max()) < n_shards):
        raise DataError("shard", f"{int(shard.min())} to {int(shard.max())} given; these sums hold 0 to {n_shards - 1}")
    return shard.cpu().long()


def jackknife(value: Float[Tensor, "*stat"], without: Float[Tensor, "shard *stat"]) -> Estimate:
    """The interval around a statistic from its values without each shard; shards without documents are to be left out.

    centre = S value - (S - 1) mean(without),  se^2 = (S - 1)/S sum (without - mean)^2,  centre +- t_{S-1} se
    """
    n = len(without)
    value, without = value.double(), without.double()
    if n < MIN_SHARDS:
        return Estimate(value, torch.full_like(value, torch.nan), torch.full_like(value, torch.nan))
    mean = without.mean(0)
    centre = n * value - (n - 1) * mean
    half = stdtrit(n - 1, 0.975) * ((n - 1) / n * (without - mean).square().sum(0)).sqrt()
    return Estimate(value, centre - half, centre + half)


def estimate(
    sums: Mapping[str, Shaped[Tensor, "shard *rest"]],
    counts: Int[Tensor, " shard"],
    statistic: Callable[[dict[str, Tensor]], Float[Tensor, "*stat"]],
) -> Estimate:
    """A statistic of added-up sums, with its interval from the shards that hold any of the `counts`."""
    used = [int(s) for s in counts.nonzero()[:, 0]]
    whole = {name: part.sum(0) for name, part in sums.items()}
    without = [statistic({name: whole[name] - part[s] for name, part in sums.items()}) for s in used]
    value = statistic(whole)
    return jackknife(value, torch.stack(without) if without else value.new_empty(0, *value.shape))
