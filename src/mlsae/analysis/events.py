"""The events of a code: one latent active on one token, at one layer or several, found by one sort."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Events:
    """The positive entries of a code sorted by (token, latent, layer), and the events they form."""

    layer: Int[Tensor, " entry"]
    value: Float[Tensor, " entry"]
    event: Int[Tensor, " entry"]
    token: Int[Tensor, " event"]
    latent: Int[Tensor, " event"]
    start: Int[Tensor, " event"]
    """The event's first entry."""
    size: Int[Tensor, " event"]
    """How many entries it has."""

    @cached_property
    def mass(self) -> Float[Tensor, " event"]:
        """sum_l z."""
        return self.sum(self.value)

    @cached_property
    def share(self) -> Float[Tensor, " entry"]:
        """z / sum_l z."""
        return self.value / self.mass[self.event]

    @cached_property
    def variance(self) -> Float[Tensor, " event"]:
        """Variance of the layer under the shares."""
        return self._variance(self.share)

    def sum(self, x: Float[Tensor, " entry"]) -> Float[Tensor, " event"]:
        """Each event's sum over its entries."""
        return sums_by(x, self.event, len(self.start))

    def weighted(self, name: str) -> tuple[Float[Tensor, " entry"], Float[Tensor, " event"]]:
        """The weight w of every entry (see WEIGHTS), and of every event sum_l w (l - mean)^2."""
        if name == "mass":
            return self.value, self.mass * self.variance
        if name == "event":
            return self.share, self.variance
        return torch.ones_like(self.share), self.size * self._variance(self.size.double().reciprocal()[self.event])

    def longest_run(self) -> Int[Tensor, " event"]:
        """The most consecutive layers of each event."""
        begins = _changes(self.event) | _changes(self.layer - torch.arange(len(self.layer)))
        length = torch.bincount(begins.cumsum(0) - 1)  # [run]
        return torch.zeros_like(self.start).scatter_reduce_(0, self.event[begins], length, "amax")

    def _variance(self, share: Float[Tensor, " entry"]) -> Float[Tensor, " event"]:
        """sum_l p (l - mean)^2 in two passes: never negative, and exactly 0 on one layer, where p is 1."""
        mean = self.sum(share * self.layer)
        return self.sum(share * (self.layer - mean[self.event]).square())


def find_events(
    values: Float[Tensor, "layer token k"], indices: Int[Tensor, "layer token k"], n_latents: int
) -> Events:
    """Sort the positive entries by one integer, never touching the [token, n_latents] table they index."""
    n_layers, n_tokens, k = values.shape
    position = (values > 0).flatten().nonzero().squeeze(1)
    layer, token = position // (n_tokens * k), position // k % n_tokens
    key, order = ((token * n_latents + indices.flatten()[position]) * n_layers + layer).sort()
    assert not (key[1:] == key[:-1]).any(), "a vector names the same latent twice"
    key //= n_layers
    begins = _changes(key)
    event, start = begins.cumsum(0) - 1, begins.nonzero().squeeze(1)
    value = values.flatten()[position[order]].double()
    return Events(layer[order], value, event, key[start] // n_latents, key[start] % n_latents, start, event.bincount())


def _changes(x: Int[Tensor, " entry"]) -> Bool[Tensor, " entry"]:
    """True where an entry differs from the one before, and at the first."""
    return torch.cat([torch.ones_like(x[:1], dtype=torch.bool), x[1:] != x[:-1]])


def sums_by(x: Float[Tensor, " item"], group: Int[Tensor, " item"], n_groups: int) -> Float[Tensor, " group"]:
    return torch.zeros(n_groups, dtype=x.dtype).scatter_add_(0, group, x)
