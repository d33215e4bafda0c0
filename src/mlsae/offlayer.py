"""What a dictionary does away from the layers it was trained on: every group's dictionary on every layer's vectors."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mlsae.data import TextSource, TokenBlocks
from mlsae.errors import ConfigError
from mlsae.heldout import open_blocks, open_pair, token_batches
from mlsae.lm import LanguageModel
from mlsae.metrics import ReconstructionSums, cross_entropy
from mlsae.reading import Reading, read
from mlsae.sae import MLSAE


@dataclass(frozen=True)
class OffLayer:
    """Quality of each dictionary (rows) on the vectors of each layer (columns)."""

    rows: list[str]
    """What each dictionary was trained on: a layer or a run of them; `all` is the multi-layer SAE, last."""
    layers: list[int]
    fvu: Float[Tensor, "row layer"]
    """As in an Evaluation: 0 is perfect, 1 the layer's mean vector."""
    mse: Float[Tensor, "row layer"]
    """Mean squared error of an entry, in the residual stream's units."""
    delta_ce: Float[Tensor, "row layer"] | None
    """Rise in cross-entropy when the layer is replaced, nats per predicted token; None: not measured."""
    n_tokens: int
    """Tokens the dictionaries saw, masked ones not counted."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values by field name."""
        return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in vars(self).items()}


def dictionary(sae: MLSAE, group: int) -> MLSAE:
    """One group's dictionary as an SAE of every layer, with each layer's own frame; the weights are shared, not copied."""
    size = sae.config.n_latents // sae.config.groups
    with torch.device("meta"):
        alone = MLSAE(sae.config.replaced(groups=1, n_latents=size))
    own = slice(group * size, (group + 1) * size)
    state = sae.state_dict()
    weights = {name: state[name][own] for name in ("W_enc", "W_dec", "b_enc", "threshold") if name in state}
    alone.load_state_dict({**state, **weights, "b_pre": sae.biases.detach()[group]}, assign=True)
    return alone.requires_grad_(False).eval()


@torch.no_grad()
def off_layer_matrix(
    sae: MLSAE,
    lm: LanguageModel,
    data: str | TextSource | TokenBlocks,
    *,
    tokens: int = 100_000,
    splice_tokens: int = 0,
    mlsae: MLSAE | None = None,
    progress: bool = True,
) -> OffLayer:
    """Every dictionary of `sae` on every layer, in one streaming pass of the language model.

    Args:
        splice_tokens: of these tokens, how many also measure the rise in cross-entropy: half a pass for each cell.
        mlsae: a multi-layer SAE of the same layers, which becomes the last row.

    Raises:
        ConfigError: `mlsae` has groups or other layers.
    """
    sae, lm = open_pair(sae, lm)
    saes = [dictionary(sae, group) for group in range(sae.config.groups)]
    rows = [_trained_on(sae, group) for group in range(sae.config.groups)]
    if mlsae is not None:
        if mlsae.config.groups > 1 or mlsae.layers != sae.layers:
            raise ConfigError("mlsae", "has groups or other layers; give one dictionary for the same layers")
        saes, rows = [*saes, open_pair(mlsae, lm)[0]], [*rows, "all"]
    sums = [ReconstructionSums(len(sae.layers), sae.config.d_model) for _ in saes]
    losses, clean, n_predicted = torch.zeros(len(saes), len(sae.layers), dtype=torch.float64), 0.0, 0
    blocks = open_blocks(sae, lm, data, tokens=tokens, split=None, context_length=None, progress=progress)
    for batch in token_batches(blocks, tokens, desc="off-layer", progress=progress):
        reading = read(lm, sae, batch)
        spliced = n_predicted < splice_tokens
        for row, one in enumerate(saes):
            code, recon = one(reading.vectors)
            sums[row].update(reading.vectors, recon, code.values)
            if spliced:
                losses[row] += _spliced_losses(lm, sae.layers, reading, recon)
        if spliced:
            clean += _loss(lm.logits(reading.tokens), reading.tokens)
            n_predicted += reading.tokens[:, 1:].numel()
    quality = [each.quality() for each in sums]
    return OffLayer(
        rows=rows,
        layers=list(sae.layers),
        fvu=torch.stack([found.fvu for found in quality]),
        mse=torch.stack([found.mse for found in quality]),
        delta_ce=(losses - clean) / n_predicted if n_predicted else None,
        n_tokens=sums[0].n_tokens,
    )


def _trained_on(sae: MLSAE, group: int) -> str:
    """The layers of a group, in words; neighbours share one, so the first and the last say it."""
    own = [layer for row, layer in enumerate(sae.layers) if sae.config.group_of(row) == group]
    return f"{own[0]}" if len(own) == 1 else f"{own[0]}–{own[-1]}"


def _spliced_losses(
    lm: LanguageModel, layers: tuple[int, ...], reading: Reading, recon: Float[Tensor, "layer token d_model"]
) -> Float[Tensor, " layer"]:
    """Summed cross-entropy when each layer in turn is replaced at its visible positions."""
    found = []
    for row, layer in enumerate(layers):
        spliced = reading.resid[row].clone()
        spliced[reading.visible] = recon[row]
        found.append(_loss(lm.run_from(spliced, layer, reading.tokens), reading.tokens))
    return torch.tensor(found, dtype=torch.float64)


def _loss(logits: Float[Tensor, "batch pos d_vocab"], tokens: Tensor) -> float:
    """Summed cross-entropy, one sequence at a time: log-probabilities are large."""
    pairs = zip(logits, tokens, strict=True)
    return sum(float(cross_entropy(each.float().log_softmax(-1), targets).sum()) for each, targets in pairs)
