"""Examples in memory: what one is, how they were collected, and the text that they stand in."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float16, Float32, Int, Int64

from mlsae.data import TokenBlocks
from mlsae.errors import ConfigError, DataError

KINDS = ("top", "sampled")
"""The strongest activations, and a uniform sample of all."""
GROUP_ROWS = 16_384
"""Rows that are read together, at most."""
MAX_SETTINGS = {"n_layers": 2**15 - 1, "n_top": 2**14, "n_sampled": 2**14, "window": 2**13}
"""So that ranks and lengths of contexts fit their columns."""


@dataclass(frozen=True)
class Example:
    """A latent active at a layer on a token, and its context: one row of the file, by the names of its columns."""

    latent: int
    layer: int
    """The language model's layer."""
    kind: str
    """One of KINDS."""
    rank: int
    """0 is the strongest of its latent, layer and kind; of equal activations the earlier place."""
    value: float
    """The activation, exact."""
    quantile: int | None
    """Of a sampled one: the part of the sample it falls into, 0 the weakest."""
    block: int | None
    position: int | None
    """The token's place in the packed text; None, as is the document: imported, from files that do not say."""
    document: int | None
    tokens: list[int]
    """Token ids of the context, which ends where the document or the sequence does."""
    activations: list[float]
    """The latent's activations there, at this layer: half precision but for this one, 0 where masked or inactive."""
    centre: int
    """Which entry of both is the token itself."""

    def to_dict(self) -> dict[str, Any]:
        """The same names as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Settings:
    """What examples were collected of, and how."""

    n_layers: int
    n_latents: int
    context_length: int
    n_top: int
    n_sampled: int
    window: int
    seed: int

    def __post_init__(self) -> None:
        for name, value in self.to_dict().items():
            least, most = int(name not in ("n_sampled", "window", "seed")), MAX_SETTINGS.get(name, 2**31 - 1)
            if not least <= value <= most:
                raise ConfigError(name, f"{value}; give {least} to {most}")

    def to_dict(self) -> dict[str, int]:
        """By name."""
        return asdict(self)

    @property
    def n_bytes(self) -> int:
        """Memory that collecting takes: for each (latent, layer) two bounds, and keys, values and contexts."""
        return self.n_layers * self.n_latents * (16 + (self.n_top + self.n_sampled) * (12 + 2 * (2 * self.window + 1)))

    @property
    def latents_at_once(self) -> int:
        """Latents in a group of rows."""
        return max(1, GROUP_ROWS // (self.n_layers * (self.n_top + self.n_sampled)))


@dataclass(frozen=True)
class About:
    """What a file of examples says of itself."""

    settings: Settings
    layers: tuple[int, ...]
    """The model layer of each of the SAE's."""
    tokenizer_fingerprint: str
    """Of the tokenizer that made its token ids."""

    def to_dict(self) -> dict[str, Any]:
        """By name."""
        return asdict(self)


@dataclass(frozen=True)
class Rows:
    """Examples as columns, before text is put to them."""

    latent: Int64[np.ndarray, " row"]
    layer: Int64[np.ndarray, " row"]
    """Rows of the SAE, not yet model layers."""
    kind: Int64[np.ndarray, " row"]
    rank: Int64[np.ndarray, " row"]
    quantile: Int64[np.ndarray, " row"]
    """Meant for sampled rows only."""
    place: Int64[np.ndarray, " row"]
    value: Float32[np.ndarray, " row"]
    windows: Float16[np.ndarray, "row width"]
    """Activations around the place, 0 beyond the sequence."""


class Text:
    """The packed text that examples stand in, its blocks held in memory."""

    def __init__(self, blocks: TokenBlocks, places: Iterable[Int64[np.ndarray, " place"]]):
        self.length = blocks.context_length
        seen = np.zeros(len(blocks), dtype=bool)
        for part in places:
            if len(part) and part.max() >= blocks.n_tokens:
                raise DataError("blocks", f"end at block {len(blocks) - 1}; the examples stand in later ones")
            seen[part // self.length] = True
        self._row = seen.cumsum() - 1
        chosen = np.array_split(np.flatnonzero(seen), 1 + seen.sum() * self.length // (1 << 24))
        self._tokens = np.concatenate([blocks.tokens(ids).numpy().astype(np.int32) for ids in chosen])
        self._edges = np.r_[0, blocks.document_starts[1:], blocks.n_tokens]

    def around(
        self, place: Int64[np.ndarray, " row"], window: int
    ) -> tuple[Int[np.ndarray, "row width"], Bool[np.ndarray, "row width"], Int[np.ndarray, " row"]]:
        """Token ids up to `window` to either side, which of them are of the same sequence and document, and the document."""
        document = np.searchsorted(self._edges, place, side="right") - 1
        block, position = np.divmod(place, self.length)
        first = np.maximum(block * self.length, self._edges[document])
        end = np.minimum((block + 1) * self.length, self._edges[document + 1])
        near = np.arange(-window, window + 1)
        at = place[:, None] + near
        inside = (first[:, None] <= at) & (at < end[:, None])
        tokens = self._tokens[self._row[block, None], (position[:, None] + near).clip(0, self.length - 1)]
        return tokens, inside, document
