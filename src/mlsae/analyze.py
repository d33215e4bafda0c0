"""Read the layers of an SAE: where its latents live over much text, and on one prompt."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mlsae import files
from mlsae.analysis.geometry import AdjacentSimilarity, ResidMeans
from mlsae.analysis.layers import WEIGHTS, LayerStatistics
from mlsae.data import TextSource, TokenBlocks
from mlsae.errors import DataError
from mlsae.evaluate import open_blocks, open_pair, token_batches
from mlsae.lm import LanguageModel
from mlsae.reading import read
from mlsae.sae import MLSAE

PROMPT = "When Mary and John went to the store, John gave a drink to"
"""The published prompt (Lawson et al. 2024, figures of single prompts)."""
MEAN_TOKENS = 65_536
"""Tokens whose mean vectors centre the similarity of adjacent layers."""


@dataclass(frozen=True)
class PromptActivity:
    """What one prompt switches on."""

    prompt: str
    """The text."""
    tokens: list[str]
    """Its tokens as a person reads them."""
    visible: Bool[Tensor, " pos"]
    """Positions the SAE sees; the others are left out of `mass`."""
    mass: Float[Tensor, "layer n_latents"]
    """Summed activation of each latent at each layer, over visible positions."""
    by_position: Float[Tensor, "layer pos"]
    """Summed activation of all latents at each layer and position, masked ones included."""

    @property
    def masked_share(self) -> float:
        """Share of all activation that sits at masked positions (special tokens, the first position)."""
        return float(self.by_position[:, ~self.visible].sum() / self.by_position.sum())


@dataclass(frozen=True)
class Analysis:
    """What `analyze` found; `save` writes it down, `summary` is its summary.json."""

    layers: tuple[int, ...]
    """Model layers, in the order of every layer axis here."""
    statistics: LayerStatistics
    """Sums over all tokens."""
    means: ResidMeans
    """Mean vectors and norms of the residual stream."""
    similarity: AdjacentSimilarity
    """Cosine of adjacent layers."""
    prompt: PromptActivity
    """One prompt."""
    masked_by_norm: list[int]
    """Vectors left out for their norm, per layer."""
    seconds: float
    """Wall time."""

    def summary(self) -> dict[str, Any]:
        """The numbers, by the names of summary.json."""
        statistics = self.statistics
        return {
            "n_tokens": statistics.n_tokens,
            "n_events": int(statistics.n_events.sum()),
            "layers": list(self.layers),
            "decomposition": {weight: statistics.decomposition(weight).to_dict() for weight in WEIGHTS},
            "lawson2024": statistics.lawson2024().to_dict(),
            "distribution": statistics.distribution().summary().to_dict(),
            "events": {
                "active_layers": statistics.active_layers.tolist(),
                "longest_run": statistics.longest_run.tolist(),
                "first_layer": statistics.first_layer.tolist(),
                "last_layer": statistics.last_layer.tolist(),
            },
            "unused_fraction": statistics.unused_fraction().tolist(),
            "masked_by_norm": self.masked_by_norm,
            "prompt": {"text": self.prompt.prompt, "masked_share": self.prompt.masked_share},
            "seconds": self.seconds,
        }

    to_dict = summary

    def save(self, directory: str | Path) -> None:
        """Write layers.safetensors, prompt.safetensors, similarity.json and, last, summary.json: without it, it is not whole."""
        directory = Path(directory)
        files.remove(directory / "summary.json")
        self.statistics.save(directory / "layers.safetensors")
        prompt = {"mass": self.prompt.mass, "by_position": self.prompt.by_position, "visible": self.prompt.visible}
        files.save_tensors(directory / "prompt.safetensors", prompt)
        files.write_json(directory / "similarity.json", {"resid": self.means.to_dict(), **self.similarity.to_dict()})
        files.write_json(directory / "summary.json", self.summary())


def analyze(
    sae: MLSAE | str | Path,
    lm: LanguageModel | str | Path,
    data: str | TextSource | TokenBlocks,
    *,
    tokens: int = 10_000_000,
    split: str | None = None,
    context_length: int | None = None,
    prompt: str = PROMPT,
    progress: bool = True,
) -> Analysis:
    """Stream text through the language model and the SAE, adding up where in depth its latents are active.

    Args:
        tokens: tokens to read (or all there are, if fewer).
        split: part of the data; None: the held-out part of the text it was trained on, all of any other.
        context_length: tokens in a sequence; None: 2048 or the language model's limit.
        prompt: the text of the single-prompt heatmap.

    Raises:
        ModelError: the SAE was trained on another language model.
        DataError: there is no text, or none is left after masking.
    """
    started = time.monotonic()
    sae, lm = open_pair(sae, lm)
    activity = prompt_activity(sae, lm, prompt)  # first: a prompt that cannot be read must not cost hours
    blocks = open_blocks(sae, lm, data, tokens=tokens, split=split, context_length=context_length, progress=progress)
    means = resid_means(sae, lm, blocks, min(tokens, MEAN_TOKENS), progress=progress)
    similarity = AdjacentSimilarity(means)
    statistics = LayerStatistics(len(sae.layers), sae.config.n_latents)
    over_norm = torch.zeros(len(sae.layers), dtype=torch.int64)
    for batch in token_batches(blocks, tokens, desc="analyze", progress=progress):
        reading = read(lm, sae, batch)
        with torch.no_grad():
            statistics.update(sae.encode(reading.vectors), sequence=reading.visible.nonzero()[:, 0])
        similarity.update(reading.vectors)
        over_norm += reading.over_norm.cpu()
    seconds = time.monotonic() - started
    return Analysis(sae.layers, statistics, means, similarity, activity, over_norm.tolist(), seconds)


def resid_means(sae: MLSAE, lm: LanguageModel, blocks: TokenBlocks, tokens: int, *, progress: bool) -> ResidMeans:
    """Mean vectors and norms of each layer over the first `tokens` tokens that `analyze` reads."""
    means = ResidMeans(len(sae.layers), sae.config.d_model)
    for batch in token_batches(blocks, tokens, desc="means of layers", progress=progress):
        means.update(read(lm, sae, batch).vectors)
    if means.n_tokens == 0:
        raise DataError("data", "no token is left after masking; use longer text")
    return means


@torch.no_grad()
def prompt_activity(sae: MLSAE, lm: LanguageModel, prompt: str) -> PromptActivity:
    """What one prompt switches on, summed over its positions."""
    reading = read(lm, sae, lm.tokenize(prompt))
    code = sae.encode(reading.resid[:, 0])
    visible = reading.visible[0]
    mass = torch.zeros(len(sae.layers), sae.config.n_latents, dtype=torch.float64)
    values, indices = (x[:, visible].flatten(1).cpu() for x in (code.values, code.indices))
    mass.scatter_add_(1, indices, values.double())
    tokens = lm.tokenizer.strings(reading.tokens[0].tolist())
    return PromptActivity(prompt, tokens, visible.cpu(), mass, code.values.sum(-1).double().cpu())
