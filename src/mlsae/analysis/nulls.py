"""What depth statistics would be if depth meant nothing: codes in which one thing is kept and the rest left to chance."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from mlsae.analysis.layers import LayerStatistics, PlainCode, SparseCode


def independent(code: SparseCode, generator: torch.Generator) -> PlainCode:
    """The tokens of every layer in a random order of its own.

    Each latent keeps its rate and its activations at each layer; that it is active at several layers of one token is
    chance. Given a batch of tokens it mixes those.
    """
    n_layers, n_tokens, _ = code.values.shape
    order = torch.stack([torch.randperm(n_tokens, generator=generator) for _ in range(n_layers)])
    return PlainCode(*(_taken(x.cpu(), order, 1) for x in (code.values, code.indices)))


def shuffled_layers(code: SparseCode, generator: torch.Generator) -> PlainCode:
    """The layers of every token in a random order of its own.

    An event keeps its number of layers and their activations; which layers they are is chance, so no latent has a home.
    """
    n_layers, n_tokens, _ = code.values.shape
    order = torch.rand(n_layers, n_tokens, generator=generator).argsort(dim=0)
    return PlainCode(*(_taken(x.cpu(), order, 0) for x in (code.values, code.indices)))


NULLS: dict[str, Callable[[SparseCode, torch.Generator], PlainCode]] = {
    "independent": independent,
    "shuffled_layers": shuffled_layers,
}


class NullStatistics:
    """The depth statistics of every null, beside those of the codes themselves.

    Chance starts anew at every batch, so the same batches give the same sums whichever processes read them.
    """

    def __init__(self, n_layers: int, n_latents: int, seed: int = 0):
        self.statistics = {name: LayerStatistics(n_layers, n_latents) for name in NULLS}
        self.seed = seed

    def update(self, code: SparseCode, position: int) -> None:
        """Add the code of some tokens at all layers, redrawn; `position` is a number of this batch's own."""
        start = int(np.random.SeedSequence([self.seed, position]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(start)
        for name, statistics in self.statistics.items():
            statistics.update(NULLS[name](code, generator))

    def merge(self, other: "NullStatistics") -> None:
        """Add the tokens of another pass."""
        self.statistics = {name: mine.merge(other.statistics[name]) for name, mine in self.statistics.items()}


def _taken(
    x: Shaped[Tensor, "layer token k"], order: Int[Tensor, "layer token"], dim: int
) -> Shaped[Tensor, "layer token k"]:
    return x.gather(dim, order[:, :, None].expand_as(x))
