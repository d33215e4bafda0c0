"""Everything that an analysis adds up over text, batch by batch: sums that merge, save and load."""

import logging
from pathlib import Path
from typing import Any

import torch

from mlsae.analysis.examples import Examples
from mlsae.analysis.geometry import AdjacentSimilarity, ResidMeans
from mlsae.analysis.layers import LayerStatistics
from mlsae.analysis.nulls import NullStatistics
from mlsae.data import TextBatch, TokenBlocks
from mlsae.errors import DataError
from mlsae.heldout import text_batches, token_batches
from mlsae.intervals import MIN_SHARDS, N_SHARDS, shard_of
from mlsae.lm import LanguageModel
from mlsae.mesh import ALONE, Mesh
from mlsae.reading import Reading, read
from mlsae.sae import MLSAE
from mlsae.shards import SUMS, TextShard, added_up, load_sums, save_sums

MEAN_TOKENS = 65_536
"""Tokens whose mean vectors centre the similarity of adjacent layers."""
MAX_STATISTICS_BYTES = 4 << 30
"""Memory for the sums of all shards of documents; a dictionary too large for it is given fewer, then no, intervals."""
STATISTICS, EXAMPLES = "layers.safetensors", "examples.parquet"

log = logging.getLogger(__name__)


class AnalysisSums:
    """Everything that `analyze` adds up over the text, batch by batch."""

    def __init__(self, sae: MLSAE, means: ResidMeans, context_length: int, *, nulls: bool, examples: int):
        sizes = (len(sae.layers), sae.config.n_latents)
        self.similarity = AdjacentSimilarity(means, N_SHARDS)
        self.statistics = LayerStatistics(*sizes, shards_that_fit(*sizes))
        self.nulls = NullStatistics(*sizes) if nulls else None
        n_kept: dict[str, int] = {"n_top": examples, "n_sampled": -(-examples // 2)}
        self.examples = Examples(*sizes, context_length, **n_kept) if examples else None
        self.over_norm = torch.zeros(len(sae.layers), dtype=torch.int64)

    @torch.no_grad()
    def update(self, sae: MLSAE, reading: Reading, batch: TextBatch) -> None:
        """Add one batch of text."""
        visible, code = reading.visible.cpu(), sae.encode(reading.vectors)
        documents = batch.documents[visible]
        self.statistics.update(code, visible.nonzero()[:, 0], shard_of(documents, self.statistics.n_shards))
        self.similarity.update(sae.lensed(reading.vectors), shard_of(documents))
        if self.nulls is not None:
            self.nulls.update(code, batch.position)
        if self.examples is not None:
            self.examples.update(code, visible, batch.blocks.numpy())
        self.over_norm += reading.over_norm.cpu()

    def merge(self, other: "AnalysisSums") -> "AnalysisSums":
        """Add the tokens of another pass, in place."""
        self.statistics = self.statistics.merge(other.statistics)
        self.similarity = self.similarity.merge(other.similarity)
        self.over_norm += other.over_norm
        if self.nulls is not None and other.nulls is not None:
            self.nulls.merge(other.nulls)
        if self.examples is not None and other.examples is not None:
            self.examples = self.examples.merge(other.examples)
        return self

    def save(self, folder: Path, blocks: TokenBlocks) -> None:
        """Write all of it into a folder."""
        self.statistics.save(folder / STATISTICS)
        save_sums(folder / SUMS, {"similarity": self.similarity, "over_norm": self.over_norm})
        if self.nulls is not None:
            for name, statistics in self.nulls.statistics.items():
                statistics.save(folder / f"{name}.safetensors")
        if self.examples is not None:
            self.examples.save(folder / EXAMPLES, blocks)

    @classmethod
    def load(cls, folder: Path, sae: MLSAE, context_length: int, *, nulls: bool, examples: int) -> "AnalysisSums":
        """What `save` wrote."""
        means = ResidMeans(len(sae.layers), sae.config.d_model)
        sums = cls(sae, means, context_length, nulls=nulls, examples=0)
        sums.statistics = LayerStatistics.load(folder / STATISTICS)
        stream: dict[str, Any] = {"similarity": sums.similarity, "over_norm": sums.over_norm}
        sums.over_norm = load_sums(folder / SUMS, stream)["over_norm"]
        if sums.nulls is not None:
            kept = {name: LayerStatistics.load(folder / f"{name}.safetensors") for name in sums.nulls.statistics}
            sums.nulls.statistics = kept
        sums.examples = Examples.load(folder / EXAMPLES) if examples else None
        return sums


def analysis_sums(
    sae: MLSAE,
    lm: LanguageModel,
    blocks: TokenBlocks,
    tokens: int,
    *,
    nulls: bool,
    examples: int,
    shard: TextShard | None = None,
    mesh: Mesh = ALONE,
    progress: bool,
) -> AnalysisSums:
    """The sums over `tokens` tokens of the blocks, which the mesh shares out, or over one shard of them.

    The means are of the same tokens for all shards.
    """
    part = TextShard.of_rank(mesh)

    def pass_one() -> ResidMeans:
        return resid_means(sae, lm, blocks, min(tokens, MEAN_TOKENS), shard=part, progress=progress)

    means = added_up(mesh, mesh.everywhere(pass_one))
    mesh.everywhere(lambda: _check_any(means))

    def pass_two() -> AnalysisSums:
        sums = AnalysisSums(sae, means, blocks.context_length, nulls=nulls, examples=examples)
        for batch in text_batches(
            blocks, tokens, desc="analyze", shard=part if shard is None else shard, progress=progress
        ):
            sums.update(sae, read(lm, sae, batch.tokens), batch)
        return sums

    return added_up(mesh, mesh.everywhere(pass_two))


def shards_that_fit(n_layers: int, n_latents: int) -> int:
    """Shards of documents to keep apart: N_SHARDS, or as many as MAX_STATISTICS_BYTES allows, or one."""
    with torch.device("meta"):
        one = LayerStatistics(n_layers, n_latents)
    n_bytes = sum(part.element_size() * part.numel() for part in one.by_shard.values())
    n_shards = min(N_SHARDS, MAX_STATISTICS_BYTES // n_bytes)
    if n_shards < MIN_SHARDS:
        log.warning("%d layers x %d latents are too many for intervals of the depth statistics", n_layers, n_latents)
    return n_shards if n_shards >= MIN_SHARDS else 1


def resid_means(
    sae: MLSAE, lm: LanguageModel, blocks: TokenBlocks, tokens: int, *, shard: TextShard, progress: bool
) -> ResidMeans:
    """Mean vectors and norms of each layer over one shard of the first `tokens` tokens that `analyze` reads."""
    means = ResidMeans(len(sae.layers), sae.config.d_model)
    for batch in token_batches(blocks, tokens, desc="means of layers", shard=shard, progress=progress):
        means.update(sae.lensed(read(lm, sae, batch).vectors))
    return means


def _check_any(means: ResidMeans) -> None:
    if means.n_tokens == 0:
        raise DataError("data", "no token is left after masking; use longer text")
