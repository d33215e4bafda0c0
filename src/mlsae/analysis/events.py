"""The events of a code: one latent active on one token, at one layer or several, found by sorting each token's entries."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


@dataclass(frozen=True)
class Events:
    """The positive entries of a code sorted by (token, latent, layer), and the events they form."""

    layer: Int[np.ndarray, " entry"]
    value: Float[np.ndarray, " entry"]
    token: Int[np.ndarray, " event"]
    latent: Int[np.ndarray, " event"]
    start: Int[np.ndarray, " event"]
    """The event's first entry."""
    size: Int[np.ndarray, " event"]
    """How many entries it has: the layers it is active at."""

    @cached_property
    def mass(self) -> Float[np.ndarray, " event"]:
        """sum_l z."""
        return self.sum(self.value)

    @cached_property
    def share(self) -> Float[np.ndarray, " entry"]:
        """z / sum_l z."""
        return self.value / self.mass.take(self.event)

    @cached_property
    def mean(self) -> Float[np.ndarray, " event"]:
        """Mean layer under the shares."""
        return self.sum(self.share * self.layer)

    @cached_property
    def variance(self) -> Float[np.ndarray, " event"]:
        """Variance of the layer under the shares, in two passes: never negative, and exactly 0 on one layer."""
        return self.sum(self.share * np.square(self.layer - self.mean.take(self.event)))

    @cached_property
    def effective_layers(self) -> Float[np.ndarray, " event"]:
        """exp(-sum_l p ln p) under the shares p, in [1, layers it is active at]."""
        return np.exp(-self.sum(self.share * np.log(self.share)))

    @cached_property
    def goes_on(self) -> Bool[np.ndarray, " entry"]:
        """Whether the event is active at the entry's next layer too."""
        goes_on = np.empty(len(self.layer), dtype=bool)
        np.equal(self.layer[:-1] + 1, self.layer[1:], out=goes_on[:-1])
        goes_on[self.last] = False
        return goes_on

    @property
    def last(self) -> Int[np.ndarray, " event"]:
        """The event's last entry."""
        return self.start + self.size - 1

    @cached_property
    def event(self) -> Int[np.ndarray, " entry"]:
        """The event of every entry."""
        return np.repeat(np.arange(len(self.start)), self.size)

    def sum(self, x: Shaped[np.ndarray, " entry"]) -> Float[np.ndarray, " event"]:
        """Each event's sum over its entries, in their order."""
        return np.bincount(self.event, x, minlength=len(self.start)).astype(np.float64, copy=False)

    def spread(self, weight: str) -> Float[np.ndarray, " event"]:
        """sum_l w (l - mean)^2 of every event, under one of layers.WEIGHTS."""
        if weight == "mass":
            return self.mass * self.variance
        if weight == "event":
            return self.variance
        first, second = self.sum(self.layer), self.sum(np.square(self.layer))  # whole numbers: nothing is lost
        return (self.size * second - np.square(first)) / self.size

    @cached_property
    def runs(self) -> tuple[Int[np.ndarray, " run"], Int[np.ndarray, " run"]]:
        """Every stretch of consecutive layers: its length, and its event."""
        ends = np.flatnonzero(~self.goes_on)
        return np.diff(ends, prepend=-1), self.event[ends]

    def longest_run(self) -> Int[np.ndarray, " event"]:
        """The most consecutive layers of each event."""
        length, event = self.runs
        return np.maximum.reduceat(length, _first_of_each(event)) if len(event) else length


def find_events(
    values: Float[Tensor, "layer token k"], indices: Int[Tensor, "layer token k"], n_latents: int
) -> Events:
    """Sort every token's entries by one integer, never touching the [token, n_latents] table they index.

    The integer is the latent and the place in the token's row, which grows with the layer: one sort of plain integers,
    which processors do many at a time, also says where each value went.
    """
    n_layers, n_tokens, k = values.shape
    width = n_layers * k
    bits = width.bit_length()
    whole = np.int32 if n_latents << bits < 1 << 31 else np.int64
    latent, z = (x.transpose(0, 1).reshape(n_tokens, width).numpy() for x in (indices, _exactly(values)))
    key = np.sort((latent.astype(whole) << bits) + np.arange(width, dtype=whole), axis=1)
    place = key & ((1 << bits) - 1)
    value = z.reshape(-1).take((place + np.arange(0, n_tokens * width, width)[:, None]).ravel()).astype(np.float64)
    latent, layer = (key >> bits).ravel(), (place // k).ravel()
    entry = np.flatnonzero(value > 0)
    if len(entry) < len(value):
        latent, layer, value = latent.take(entry), layer.take(entry), value.take(entry)
    begins = np.ones(len(value), dtype=bool)
    np.not_equal(latent[1:], latent[:-1], out=begins[1:])
    of_token = np.searchsorted(entry, np.arange(0, n_tokens * width, width))
    begins[of_token[of_token < len(entry)]] = True
    assert (begins[1:] | (layer[1:] != layer[:-1])).all(), "a vector names the same latent twice"
    start = np.flatnonzero(begins)
    size = np.diff(start, append=len(value))
    return Events(layer, value, entry[start] // width, latent[start].astype(np.int64), start, size)


def _exactly(values: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """The same in a type that NumPy has."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _first_of_each(x: Int[np.ndarray, " item"]) -> Int[np.ndarray, " group"]:
    """Where each run of equal numbers begins."""
    return np.flatnonzero(np.concatenate([[True], x[1:] != x[:-1]]))
