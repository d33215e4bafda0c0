"""Validation: the mean FVU on a fixed part of the text, each process reading its share."""

from collections.abc import Callable

import torch

from mlsae.config import TrainConfig
from mlsae.data import TokenBlocks
from mlsae.lm import LanguageModel
from mlsae.mesh import Mesh
from mlsae.metrics import ReconstructionSums
from mlsae.shards import added_up
from mlsae.stream import packed_once, read_some
from mlsae.trainer import Trainer


def validation_blocks(
    config: TrainConfig, lm: LanguageModel, training: TokenBlocks, mesh: Mesh, *, progress: bool
) -> TokenBlocks | None:
    """What is read for it; None: there is none. lawson2024 reads the start of the training stream (D18)."""
    if config.validate_every_steps is None:
        return None
    if config.rules.validation_data == "train":
        return training
    return packed_once(config, lm, "validation", mesh, progress=progress)


@torch.no_grad()
def validate(
    trainer: Trainer, lm: LanguageModel, blocks: TokenBlocks, config: TrainConfig, pause: Callable[[], None]
) -> float:
    """Mean FVU on these blocks, of which `validation_sequences` are read; lawson2024 moves the clock by it (D8).

    `pause` is called before every batch, and may raise.
    """
    sae, mesh, batch = trainer.sae, trainer.mesh, config.batch_size or 1
    sums = ReconstructionSums(len(sae.layers), sae.config.d_model)
    n_blocks = min(config.validation_sequences, len(blocks))
    for position in range(0, n_blocks, batch):
        tokens = blocks.read(position, min(batch, n_blocks - position), order="file")
        pause()
        vectors = sae.lensed(read_some(lm, sae, tokens, mesh.share(len(tokens))).to_train(sae))  # as in training
        code = sae.encode_lensed(vectors)
        sums.update(vectors, sae.decode_lensed(code), code.values)
        if trainer.rules.validation_counts:
            trainer.tick(code, vectors.shape[1])
    return float(added_up(mesh, sums).quality().fvu.mean())
