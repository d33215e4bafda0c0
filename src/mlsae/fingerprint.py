"""What an SAE is and does, in a few numbers that are saved with it and taken again when it is loaded.

Shapes and hashes tell whether the weights are those that were saved; FVU and L0 on fixed vectors, whether this version of the
code makes of them what the one that saved them did; on a fixed prompt, whether the language model is that of the training.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mlsae.config import Config
from mlsae.errors import ModelError
from mlsae.files import finite, json_digest

if TYPE_CHECKING:
    from mlsae.lm import LanguageModel
    from mlsae.sae import MLSAE

log = logging.getLogger(__name__)

PROMPT = "When Mary and John went to the store, John gave a drink to Mary. Then he paid, and both of them walked home."
HASHED_ENTRIES = 1 << 22
"""Entries that are converted to float32 at a time."""
N_SAMPLED = 1024
"""Numbers looked at of every weight of a language model, at least."""
N_VECTORS = 8
"""Fixed vectors of each of three layers: a look at a dictionary of a million latents must not take a minute."""
TOLERANCE, LM_TOLERANCE = 1e-3, 0.05
"""How far FVU and L0 may lie from the saved ones, relatively: on fixed vectors, and on the prompt, where the precision of the
language model counts."""


class Quality(Config):
    """Of each layer, or None where it is not finite."""

    fvu: list[float | None]
    """Fraction of variance unexplained."""
    l0: list[float | None]
    """Active latents of a vector."""


class PromptQuality(Quality):
    """On a prompt."""

    text: str
    """The prompt."""


class Fingerprint(Config):
    """What a file must hold of it."""

    shapes: dict[str, list[int]]
    """Of every tensor."""
    sha256: dict[str, str]
    """Of every tensor's bytes as float32."""
    vectors: Quality
    """On fixed vectors, at the first, middle and last layer."""
    prompt: PromptQuality | None
    """On a prompt of the language model, if there was one when it was saved."""


def of(sae: "MLSAE", lm: "LanguageModel | None" = None) -> dict[str, Any]:
    """The fingerprint of an SAE, as JSON values; with a language model also its `prompt`."""
    tensors = sae.weights().tensors
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    return {"shapes": shapes, "sha256": {name: sha256([t]) for name, t in tensors.items()}, **behaviour(sae, lm)}


def behaviour(sae: "MLSAE", lm: "LanguageModel | None" = None) -> dict[str, Any]:
    """The part of it that says what an SAE does; of one that several processes share, all of them must ask."""
    prompt = None if lm is None else {"text": PROMPT, **quality(sae, _of_prompt(sae, lm, PROMPT))}
    return finite({"vectors": _on_fixed_vectors(sae), "prompt": prompt})


def of_weights(sae: "MLSAE") -> str:
    """One hash of an SAE's config and all its weights."""
    hashes = {name: sha256([tensor]) for name, tensor in sae.weights().tensors.items()}
    return json_digest({"config": sae.config.to_dict(), "sha256": hashes})


def of_lm(lm: "LanguageModel") -> str:
    """One hash of evenly spaced numbers from every weight of a language model: training or another precision changes it."""
    found = {}
    for name, weight in lm.weights():
        sampled = weight.detach().flatten()[:: max(1, weight.numel() // N_SAMPLED)]
        found[name] = [str(weight.dtype), list(weight.shape), sha256([sampled])]
    return json_digest(found)


@torch.no_grad()
def quality(
    sae: "MLSAE", resid: Float[Tensor, "layer token d_model"], layers: Sequence[int] | None = None
) -> dict[str, list[float]]:
    """Fraction of variance unexplained, and number of active latents, of each of `layers`; None: all."""
    code = sae.encode(resid, layers, impl="reference")
    error = (resid - sae.decode(code, impl="reference")).double().square().sum((1, 2))
    total = (resid - resid.mean(1, keepdim=True)).double().square().sum((1, 2))
    l0 = (code.values > 0).double().sum(-1).mean(-1)
    return {"fvu": (error / total.clamp_min(1e-30)).tolist(), "l0": l0.tolist()}


def check(sae: "MLSAE", saved: Mapping[str, Any]) -> None:
    """Refuse an SAE that is not what was saved, or that this version of the code reads otherwise, with a ModelError."""
    found = Fingerprint(**saved)
    for name, tensor in sae.weights().tensors.items():
        if found.sha256.get(name) != sha256([tensor]):
            raise ModelError("sae", f"tensor '{name}' is not the one that was saved; get the file again")
    if (far := _far(_on_fixed_vectors(sae), found.vectors.to_dict(), TOLERANCE)) is not None:
        raise ModelError(
            "sae", f"{far} on fixed vectors; this version of mlsae reads the file otherwise than its writer did"
        )


def check_lm(sae: "MLSAE", lm: "LanguageModel", saved: Mapping[str, Any] | None) -> None:
    """Warn where the SAE finds another residual stream than it was saved with."""
    prompt = None if saved is None else saved.get("prompt")
    if prompt is None:
        return
    if (far := _far(quality(sae, _of_prompt(sae, lm, prompt["text"])), prompt, LM_TOLERANCE)) is not None:
        log.warning("lm: %s on a fixed prompt; is '%s' what this SAE was trained on?", far, lm.name)


def _far(now: Mapping[str, list[float]], saved: Mapping[str, Any], tolerance: float) -> str | None:
    for name in ("fvu", "l0"):
        if len(now[name]) != len(saved[name]):
            return f"{name.upper()} is that of {len(now[name])} layers, and was of {len(saved[name])} when it was saved"
        for row, (here, there) in enumerate(zip(now[name], saved[name], strict=True)):
            if there is not None and not abs(here - there) <= tolerance * max(abs(there), 0.01):
                return f"{name.upper()} of its layer number {row} is {here:.4g}, and was {there:.4g} when it was saved"
    return None


def fixed_vectors(sae: "MLSAE") -> tuple[list[int] | None, Float[Tensor, "layer token d_model"]]:
    """The first, middle and last layer, and for each normal draws, the same for ever, about where its frame expects vectors."""
    known = sae.config.layers
    rows = [0] if known is None else sorted({0, len(known) // 2, len(known) - 1})
    shape = (len(rows), N_VECTORS, sae.config.d_model)
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(sae.W_enc)
    if sae.frame.name == "layer":
        resid = sae.frame.mean[rows, None] + sae.frame.scale[rows, None, None] * draw
    else:
        resid = 10 * draw
    return None if known is None else [known[row] for row in rows], resid


def _on_fixed_vectors(sae: "MLSAE") -> dict[str, list[float]]:
    layers, resid = fixed_vectors(sae)
    return quality(sae, resid, layers)


def _of_prompt(sae: "MLSAE", lm: "LanguageModel", text: str) -> Float[Tensor, "layer token d_model"]:
    """Without the first position, whose vector is unlike all others."""
    tokens = lm.tokenize(text)[:, : lm.context_length]
    return lm.resid(tokens, layers=sae.layers)[:, 0, 1:].to(sae.W_enc)


def sha256(pieces: Iterable[Tensor]) -> str:
    """Hex SHA-256 of a tensor's entries as float32; they come in pieces, and are converted some at a time."""
    found = hashlib.sha256()
    for piece in pieces:
        for part in piece.detach().reshape(-1).split(HASHED_ENTRIES):
            found.update(part.float().cpu().contiguous().numpy())
    return found.hexdigest()
