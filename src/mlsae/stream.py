"""One text in one order: what a run reads, and what several runs that learn side by side read once."""

import logging
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from mlsae.config import TrainConfig
from mlsae.data import TextSource, TokenBlocks, pack
from mlsae.errors import DataError
from mlsae.files import canonical_json
from mlsae.lm import LanguageModel
from mlsae.mesh import ALONE, Mesh
from mlsae.reading import Reading, read, read_ahead
from mlsae.reporting import bar
from mlsae.sae import MLSAE

READ_TOKENS = 1024
"""Tokens of a forward pass below which several are made one: a language model reads a few short sequences slowly."""
READ_ALIKE = (
    *("lm", "data", "text_column", "split", "skip_bad_rows", "streaming", "separator_token", "repeat", "data_seed"),
    *("context_length", "batch_size", "layers", "device", "lm_dtype", "lm_device_map", "init_tokens"),
    *("mask_special_tokens", "mask_first_position", "mask_norm_factor"),
)
"""Keys of a resolved config that say which vectors a run sees, and in what order."""
DRAWN = ("W_enc", "W_dec")
"""Weights that begin with random numbers, and not with what a sample fixes."""

log = logging.getLogger(__name__)


class Stream:
    """The endless stream of a text's blocks in the order of one config, read in micro-batches.

    `shared` by runs that differ in nothing of READ_ALIKE, it reads the micro-batch that all of them are at once, and fits
    SAEs that begin alike once. Its readings are the same, bit for bit, shared or not.
    """

    def __init__(
        self, config: TrainConfig, lm: LanguageModel, *, progress: bool, shared: bool = False, mesh: Mesh = ALONE
    ):
        self.lm, self.shared, self.progress = lm, shared, progress
        self.init_tokens = config.init_tokens
        self.batch = config.batch_size or 1
        self.mesh, self.own = mesh, mesh.share(self.batch)
        """Which sequences of a micro-batch are this process's."""
        self.blocks = packed_once(config, lm, config.split, mesh, progress=progress)
        if (largest := self.blocks.info.max_token_id) >= lm.d_vocab:
            raise DataError("data", f"holds token {largest}; {lm.name} has {lm.d_vocab} tokens; use its own tokenizer")
        self.seed = config.seed if config.data_seed is None else config.data_seed
        self.order = config.rules.order
        self.together = max(1, READ_TOKENS // (self.batch * self.blocks.context_length))
        self._ready: dict[int, Reading] = {}
        """The micro-batches last read, by their position."""
        self._fits: dict[str, tuple[dict[str, Tensor], Tensor]] = {}
        """What the initial sample fixed, by what it depends on."""
        self._said: set[str] = set()

    def readings(self, sae: MLSAE, positions: Iterable[int]) -> Iterator[Reading]:
        """The micro-batches at these positions. Short ones are read several at a time, in groups that do not depend on where a
        run began."""
        n = self.own.stop - self.own.start
        if n == 0:
            yield from (read_some(self.lm, sae, self._tokens(position, 1), slice(0, 0)) for position in positions)
            return
        if self.together == 1 and not self.shared:
            yield from read_ahead(self.lm, sae, (self._own_tokens(position, 1) for position in positions))
            return
        size = self.batch * self.together
        for position in positions:
            if position not in self._ready:
                first = position - position % size
                group = read(self.lm, sae, self._own_tokens(first, self.together))
                parts = [group] if self.together == 1 else group.split(n)
                self._ready = {first + i * self.batch: part for i, part in enumerate(parts)}
            yield self._ready[position]

    def forget(self) -> None:
        """Let go of what was read last."""
        self._ready = {}

    def sample(self, sae: MLSAE) -> Iterator[Tensor]:
        """The first batches of the stream, each block once, for what is fixed before training; dp ranks read them in turns."""
        seen = ((batch.shape[1], batch) for batch in self._first_look(sae))
        return bar(seen, total=self.init_tokens, desc="first look", progress=self.progress)

    def _first_look(self, sae: MLSAE) -> Iterator[Tensor]:
        starts = range(0, len(self.blocks), self.batch)
        for first in range(0, len(starts), self.mesh.dp):
            mine = min(first + self.mesh.dp_rank, len(starts) - 1)
            tokens = self._tokens(starts[mine], min(self.batch, len(self.blocks) - starts[mine]))
            vectors = read(self.lm, sae, tokens).to_train(sae)
            yield from self.mesh.tokens_by_rank(vectors)[: len(starts) - first]

    def fit_of(self, sae: MLSAE) -> tuple[dict[str, Tensor], Tensor] | None:
        """What the initial sample fixed of an SAE that begins as this one does, and each layer's variance, if one did."""
        return self._fits.get(_beginning(sae))

    def keep_fit(self, sae: MLSAE, variance: Tensor) -> None:
        """Remember what the initial sample fixed, if another run may want it."""
        if self.shared:
            fitted = {name: tensor.clone() for name, tensor in sae.state_dict().items() if name not in DRAWN}
            self._fits[_beginning(sae)] = fitted, variance

    def documents(self, since: int, until: int) -> str:
        """Which documents were read between two positions, counted from 0: a few of them, in words."""
        blocks = self.blocks.block_ids(since, until - since, seed=self.seed, order=self.order)
        found = self.blocks.document_ids(blocks).unique().tolist()
        return ", ".join(map(str, found[:8])) + (f" and {len(found) - 8} more" if len(found) > 8 else "")

    def warn(self, words: str) -> None:
        """Say something of the text; runs that share it do not repeat each other."""
        if not (self.shared and words in self._said):
            self._said.add(words)
            log.warning("%s", words)

    def _own_tokens(self, position: int, n_batches: int) -> Int[Tensor, "batch pos"]:
        """This process's sequences of the micro-batches from a position on."""
        n = self.own.stop - self.own.start
        if n == self.batch:
            return self._tokens(position, n * n_batches)
        starts = [position + i * self.batch + self.own.start for i in range(n_batches)]
        return torch.cat([self._tokens(start, n) for start in starts])

    def _tokens(self, position: int, n: int) -> Int[Tensor, "batch pos"]:
        return self.blocks.read(position, n, seed=self.seed, order=self.order)


def _beginning(sae: MLSAE) -> str:
    """Everything that what is fixed before the first step depends on, for SAEs that read one stream."""
    config = sae.config.to_dict()
    return canonical_json({key: config[key] for key in config if key not in ("k", "n_latents", "expansion_factor")})


def read_some(lm: LanguageModel, sae: MLSAE, tokens: Int[Tensor, "batch pos"], share: slice) -> Reading:
    """The reading of some sequences, or of none: a language model cannot be asked for that."""
    return read(lm, sae, tokens[share]) if share.stop > share.start else read(lm, sae, tokens[:1]).of(slice(0))


def packed_once(config: TrainConfig, lm: LanguageModel, split: str, mesh: Mesh, *, progress: bool) -> TokenBlocks:
    """`pack_split`, of which one process of a machine packs, or sees that what is kept is whole, and the others open it."""
    return mesh.leaders_first(
        lambda: pack_split(config, lm, split, progress=progress),
        lambda: pack_split(config, lm, split, progress=False, verify=False),
    )


def pack_split(
    config: TrainConfig, lm: LanguageModel, split: str, *, progress: bool, verify: bool = True
) -> TokenBlocks:
    """The token blocks of one part of the training data; of a stream, no more than the run needs."""
    source = TextSource(config.data, split, config.text_column, config.skip_bad_rows, config.streaming)
    context = config.context_length or 1
    needed = config.tokens if split == config.split else config.validation_sequences * context
    return pack(
        source,
        lm.tokenizer,
        context,
        max_tokens=needed if config.streaming else None,
        packing=config.rules.packing,
        verify=verify,
        progress=progress,
    )
