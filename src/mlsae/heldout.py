"""What an SAE is judged by: the text held out from its training, and that text in batches."""

import contextlib
from collections.abc import Generator, Iterator
from pathlib import Path

from jaxtyping import Int
from torch import Tensor

from mlsae.data import TextBatch, TextSource, TokenBlocks
from mlsae.devices import choose_device
from mlsae.lm import LanguageModel
from mlsae.mesh import Mesh, local_device, open_mesh
from mlsae.reading import check_pair, text_blocks
from mlsae.reporting import bar
from mlsae.sae import MLSAE
from mlsae.shards import TextShard

BATCH_TOKENS = 2048
"""Tokens of one batch; the published code's metrics are means over batches of this many."""


@contextlib.contextmanager
def together(lm: LanguageModel | str | Path | None = None, *, device: str | None = None) -> Generator[Mesh]:
    """The processes that share out a text, each with SAE and language model of its own: those of torchrun, or this one alone.

    Opened before these are loaded, which then go to the process's own accelerator.
    """
    own = lm.device if isinstance(lm, LanguageModel) else local_device(choose_device(device))
    with open_mesh(None, 1, own) as mesh:
        yield mesh


def open_pair(sae: MLSAE | str | Path, lm: LanguageModel | str | Path) -> tuple[MLSAE, LanguageModel]:
    """Both, loaded if they are names, on the same device, and fitting each other."""
    if not isinstance(sae, MLSAE):
        sae = MLSAE.from_pretrained(sae)
    if not isinstance(lm, LanguageModel):
        lm = LanguageModel.from_pretrained(lm, separator_token=sae.config.separator_token)
    check_pair(lm, sae)
    return sae.to(lm.device).eval(), lm


def open_blocks(
    sae: MLSAE,
    lm: LanguageModel,
    data: str | TextSource | TokenBlocks,
    *,
    tokens: int,
    split: str | None,
    context_length: int | None,
    progress: bool,
) -> TokenBlocks:
    """Token blocks of the text to judge by: held out from training unless another split is named.

    All of the text is packed, so that `tokens` of it are an even sample, but of a stream no more than `tokens`.
    """
    if isinstance(data, str):
        data = TextSource(data, held_out_split(sae, data) if split is None else split)
    return text_blocks(lm, data, tokens=tokens, context_length=context_length, progress=progress)


def held_out_split(sae: MLSAE, data: str, *, streaming: bool = False) -> str:
    """`test` for the text the SAE was trained on and for data that names such a split, else `all`."""
    return "test" if trained_on(sae, data) or "test" in TextSource(data, streaming=streaming).named_splits() else "all"


def trained_on(sae: MLSAE, data: str) -> bool:
    """Whether this is the text that the SAE was trained on, however its path is spelled."""
    return sae.config.data is not None and Path(sae.config.data).resolve() == Path(data).resolve()


def token_batches(
    blocks: TokenBlocks, tokens: int, *, desc: str, shard: TextShard | None = None, progress: bool
) -> Iterator[Int[Tensor, "batch pos"]]:
    """`tokens` tokens of the blocks, in a fixed shuffled order, each block once; or one shard of them."""
    return (batch.tokens for batch in text_batches(blocks, tokens, desc=desc, shard=shard, progress=progress))


def text_batches(
    blocks: TokenBlocks, tokens: int, *, desc: str, shard: TextShard | None = None, progress: bool
) -> Iterator[TextBatch]:
    """The same, with their places and documents."""
    n_blocks = min(len(blocks), max(1, tokens // blocks.context_length))
    size = max(1, BATCH_TOKENS // blocks.context_length)
    positions = range(0, n_blocks, size)
    if shard is not None:
        positions = shard.part(positions)

    def batches() -> Iterator[tuple[int, TextBatch]]:
        for position in positions:
            batch = blocks.batch(position, min(size, n_blocks - position))
            yield batch.tokens.numel(), batch

    total = sum(min(size, n_blocks - position) for position in positions) * blocks.context_length
    return bar(batches(), total=total, desc=desc, progress=progress)
