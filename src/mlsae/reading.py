"""Tokens to the residual vectors an SAE sees: the same masking for training, evaluation and analysis."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mlsae.errors import ModelError
from mlsae.lm import LanguageModel
from mlsae.sae import MLSAE


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
    over_norm: Int[Tensor, " layer"]
    """Vectors beyond their layer's limit, among those the first two rules left."""

    def to_train(self, sae: MLSAE) -> Float[Tensor, "layer token d_model"]:
        """What the SAE is trained on: the visible vectors, or (lawson2024, defect D5) all, with the others zeroed and kept."""
        if sae.config.special_tokens == "zero":
            return self.resid.where(self.visible[..., None], 0.0).flatten(1, 2)
        return self.vectors


@torch.no_grad()
def read(lm: LanguageModel, sae: MLSAE, tokens: Int[Tensor, "batch pos"]) -> Reading:
    """One forward pass of the language model, masked as the SAE's config says."""
    tokens = tokens.to(lm.device)
    config = sae.config
    keep = lm.keep_mask(tokens, special_tokens=config.mask_special_tokens, first_position=config.mask_first_position)
    resid = lm.resid(tokens, layers=config.layers)
    within = sae.within_norm(resid)
    visible = keep & within.all(0)
    over_norm = (keep & ~within).sum((1, 2))
    return Reading(tokens, resid, visible, resid[:, visible], over_norm)


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
