"""Tokens to the residual vectors an SAE sees: the same masking for training, evaluation and analysis."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mlsae import fingerprint
from mlsae.data import TextSource, TokenBlocks, pack
from mlsae.errors import ConfigError, DataError, ModelError
from mlsae.lm import LanguageModel
from mlsae.sae import MLSAE

MAX_CONTEXT = 2048
"""Tokens of a sequence where neither the language model nor the user says less."""


def text_blocks(
    lm: LanguageModel,
    data: TextSource | TokenBlocks,
    *,
    tokens: int,
    context_length: int | None,
    progress: bool,
) -> TokenBlocks:
    """The text as this model's token blocks: all of it, so that `tokens` are an even sample, but of a stream only these."""
    if isinstance(data, TokenBlocks):
        if (theirs := data.info.tokenizer_fingerprint) != (ours := lm.tokenizer.fingerprint):
            raise DataError("data", f"was packed with tokenizer {theirs[:12]}; {lm.name} has {ours[:12]}; pack it anew")
        return data
    limit = lm.context_length or MAX_CONTEXT
    length = min(MAX_CONTEXT, limit) if context_length is None else context_length
    if length < 2:
        raise ConfigError("context_length", f"{length}; at least 2 tokens are needed to predict one")
    if length > limit:
        raise ConfigError("context_length", f"{length} exceeds the model's {limit}; lower it")
    return pack(data, lm.tokenizer, length, max_tokens=tokens if data.streaming else None, progress=progress)


@dataclass(frozen=True)
class Reading:
    """One batch of tokens and its residual vectors."""

    tokens: Int[Tensor, "batch pos"]
    resid: Float[Tensor, "layer batch pos d_model"]
    """The SAE's layers, every position."""
    visible: Bool[Tensor, "batch pos"]
    """Positions the SAE sees: no special token, not the first (if so masked), no norm beyond the limit at any layer."""
    vectors: Float[Tensor, "layer token d_model"]
    """The visible vectors: what metrics and analyses are computed on."""
    beyond: Bool[Tensor, "layer batch pos"]
    """Vectors beyond their layer's limit, among those the first two rules left."""
    norms: Float[Tensor, "layer batch pos"]
    """Norms of the vectors that the first two rules left; 0 elsewhere."""

    @property
    def over_norm(self) -> Int[Tensor, " layer"]:
        """How many those are."""
        return self.beyond.sum((1, 2))

    def to_train(self, sae: MLSAE) -> Float[Tensor, "layer token d_model"]:
        """What the SAE is trained on: the visible vectors, or (lawson2024, defect D5) all, with the others zeroed and kept."""
        if sae.config.special_tokens == "zero":
            return self.resid.where(self.visible[..., None], 0.0).flatten(1, 2)
        return self.vectors

    def split(self, n: int) -> list["Reading"]:
        """The readings of each run of n sequences."""
        return [self.of(slice(start, start + n)) for start in range(0, len(self.tokens), n)]

    def of(self, at: slice) -> "Reading":
        """The reading of some of the sequences, or of none."""
        resid, visible = self.resid[:, at], self.visible[at]
        return Reading(self.tokens[at], resid, visible, resid[:, visible], self.beyond[:, at], self.norms[:, at])


@torch.no_grad()
def read(lm: LanguageModel, sae: MLSAE, tokens: Int[Tensor, "batch pos"]) -> Reading:
    """One forward pass of the language model, masked as the SAE's config says."""
    tokens = tokens.to(lm.device)
    config = sae.config
    keep = lm.keep_mask(tokens, special_tokens=config.mask_special_tokens, first_position=config.mask_first_position)
    resid = lm.resid(tokens, layers=config.layers)
    norms = resid.norm(dim=-1)
    within = sae.within_norm(norms)
    visible = keep & within.all(0)
    return Reading(tokens, resid, visible, resid[:, visible], keep & ~within, norms.where(keep, 0.0))


def read_ahead(lm: LanguageModel, sae: MLSAE, batches: Iterable[Int[Tensor, "batch pos"]]) -> Iterator[Reading]:
    """`read` of every batch. On CUDA the next one is read, by a thread in a stream of its own, while this one is used."""
    if lm.device.type != "cuda" or lm.spread:
        yield from (read(lm, sae, tokens) for tokens in batches)
        return
    stream, here = torch.cuda.Stream(lm.device), torch.cuda.current_stream(lm.device)
    stream.wait_stream(here)  # the SAE's norm limits may still be on their way
    with ThreadPoolExecutor(1) as thread:
        pending: Future[Reading] | None = None
        for tokens in batches:
            following = thread.submit(_read_in, stream, lm, sae, tokens)
            if pending is not None:
                yield _handed_over(pending, stream, here)
            pending = following
        if pending is not None:
            yield _handed_over(pending, stream, here)


def _read_in(stream: Any, lm: LanguageModel, sae: MLSAE, tokens: Tensor) -> Reading:
    with torch.cuda.stream(stream):
        return read(lm, sae, tokens)


def _handed_over(pending: "Future[Reading]", stream: Any, here: Any) -> Reading:
    """A finished reading, whose memory the allocator may not give away before this stream has used it."""
    reading = pending.result()
    here.wait_stream(stream)
    for tensor in vars(reading).values():
        tensor.record_stream(here)
    return reading


def check_pair(lm: LanguageModel, sae: MLSAE) -> None:
    """Refuse a language model the SAE was not trained on: width, layers or tokenizer differ."""
    config = sae.config
    if config.d_model != lm.d_model:
        raise ModelError("sae", f"reads vectors of {config.d_model} entries; {lm.name} has d_model {lm.d_model}")
    if config.layers is not None and max(config.layers) >= lm.n_layers:
        raise ModelError("sae", f"reads layer {max(config.layers)}; {lm.name} has layers 0-{lm.n_layers - 1}")
    theirs, ours = lm.tokenizer.fingerprint, config.tokenizer_fingerprint
    if ours is not None and ours != theirs:
        raise ModelError("sae", f"was trained with tokenizer {ours[:12]}; {lm.name} has {theirs[:12]}; use {config.lm}")
    fingerprint.check_lm(sae, lm, sae.fingerprint)
