"""What the language model expects next, untouched, reconstructed and steered; and what one latent says of it at every layer."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mlsae.errors import ConfigError
from mlsae.explorer.answers import Index
from mlsae.explorer.inference import PromptCode, Session
from mlsae.explorer.prompts import PromptText, Request
from mlsae.explorer.steering import Edits, along, changes_by_layer, dosed, layers_of, likeliest, replacements
from mlsae.metrics import cross_entropy, kl_divergence
from mlsae.sae import MLSAE

MAX_POSITIONS = 256
"""In one answer."""
N_WORDS = 8
"""Tokens promoted and suppressed by a latent."""


class LogitsRequest(Request):
    """Of `logits_view`."""

    text: PromptText
    """The prompt."""
    edits: Edits = ()
    """What is done to latents; none: only the untouched and the reconstructed model are shown."""
    reconstruct: bool = False
    """Edit the reconstructed stream, not the untouched one."""
    start: Index = 0
    """The first position shown."""
    stop: Annotated[int, Field(ge=1)] = 64
    """Where they end; positions beyond the prompt are left out."""
    top: Annotated[int, Field(ge=1, le=32)] = 5
    """Next tokens shown at each."""


def logits_view(session: Session, request: LogitsRequest) -> dict[str, Any]:
    """Next-token distributions at each position, and their cross-entropy and divergence.

    Reconstructed is `evaluate`'s `all_layers`: every layer replaced in one pass, masked positions left alone. `mean` holds
    `evaluate`'s means over the same tokens: of cross-entropy over the `n` positions with a next token, of KL over all.
    """
    if not request.start < request.stop <= request.start + MAX_POSITIONS:
        raise ConfigError("stop", f"{request.stop}; give {request.start + 1} to {request.start + MAX_POSITIONS}")
    code = session.code_of(request.text)
    if request.start >= len(code.ids):
        raise ConfigError("start", f"{request.start}; the prompt has positions 0 to {len(code.ids) - 1}")
    lm, sae = session.lm(), session.sae()
    changes = changes_by_layer(dosed(session, request.edits, code))
    session.expect(3 if changes else 2)
    where = code.visible[None].to(lm.device)
    tokens = torch.tensor([code.ids], device=lm.device)
    shown = slice(request.start, min(request.stop, len(code.ids)))

    def read(changed: Any, clean: Tensor | None, *, reconstruct: bool) -> tuple[_Read, Tensor]:
        session.step()
        logits = lm.logits(tokens, replacements(sae, changed, where, reconstruct=reconstruct))[0]
        log_probs = logits.float().log_softmax(-1)
        top = [likeliest(lm, row.exp(), request.top) for row in log_probs[shown]]
        ce = cross_entropy(log_probs, tokens[0]).tolist()
        kl = [] if clean is None else kl_divergence(clean, log_probs).double().tolist()
        return _Read(top, ce, kl), log_probs

    clean, log_probs = read({}, None, reconstruct=False)
    found = {"clean": clean, "reconstructed": read({}, log_probs, reconstruct=True)[0]}
    found["steered"] = read(changes, log_probs, reconstruct=request.reconstruct)[0] if changes else None
    return {
        "tokens": code.tokens(),
        "start": shown.start,
        "stop": shown.stop,
        "mean": _means(found, len(code.ids)),
        "positions": [_position(found, code, pos, pos - shown.start) for pos in range(shown.start, shown.stop)],
    }


@dataclass(frozen=True)
class _Read:
    """What one pass expects."""

    top: list[list[dict[str, Any]]]
    """Of the positions shown."""
    ce: list[float]
    """Of every next token."""
    kl: list[float]
    """From the untouched model, at every position; of that itself, none."""


def _means(found: Mapping[str, _Read | None], n_pos: int) -> dict[str, Any]:
    means: dict[str, Any] = {"n": n_pos - 1}
    for name, each in found.items():
        means[f"ce_{name}"] = None if each is None or n_pos == 1 else math.fsum(each.ce) / (n_pos - 1)
        if name != "clean":
            means[f"kl_{name}"] = None if each is None else math.fsum(each.kl) / n_pos
    return means


def _position(found: Mapping[str, _Read | None], code: PromptCode, pos: int, at: int) -> dict[str, Any]:
    last = pos == len(code.ids) - 1
    row: dict[str, Any] = {
        "pos": pos,
        "actual": None if last else {"id": code.ids[pos + 1], "string": code.strings[pos + 1]},
    }
    for name, each in found.items():
        row[name] = None if each is None else each.top[at]
        row[f"ce_{name}"] = None if each is None or last else each.ce[pos]
        if name != "clean":
            row[f"kl_{name}"] = None if each is None else each.kl[pos]
    return row


# ---- one latent ------------------------------------------------------------------------------------------------------


def latent_logits_view(session: Session, latent: int) -> dict[str, Any]:
    """The tokens that a latent promotes and suppresses from each layer, written straight into the logits (logit lens).

    Its direction is what one unit of it adds to the residual stream there, through the frame and back from the lens: without
    a lens the same at every layer. `relative_norm` is the mean norm of its contribution where it is active over the stream's
    mean norm, both behind the lens; in the frame `vector` a vector's own scale is taken for |resid| / sqrt(d_model).
    """
    session.check_latent(latent)
    sae, lm = session.sae(), session.lm()
    layers = layers_of(sae, latent)
    same = sae.lens is None
    n_tokens = min(lm.d_vocab, len(lm.tokenizer.hf))  # rows may be padded beyond the tokenizer's tokens
    directions = torch.cat([_direction(sae, latent, layer) for layer in (layers[:1] if same else layers)])
    logits = lm.logits_along(directions)[:, :n_tokens].cpu()
    words = [_words(session, row) for row in logits]
    return {
        "latent": latent,
        "same_at_every_layer": same,
        "layers": [
            {
                "layer": layer,
                "relative_norm": _relative_norm(session, sae, latent, sae.layers.index(layer)),
                **words[0 if same else row],
            }
            for row, layer in enumerate(layers)
        ],
    }


def _direction(sae: MLSAE, latent: int, layer: int) -> Float[Tensor, "1 d_model"]:
    """What one unit of a latent adds to the residual stream, but for its length."""
    return along(sae, sae.W_dec[latent].detach()[None, None], [layer])[0]


def _words(session: Session, logits: Float[Tensor, " token"]) -> dict[str, Any]:
    found = {}
    for name, sign in (("promoted", 1), ("suppressed", -1)):
        values, ids = (sign * logits).topk(min(N_WORDS, len(logits)))
        strings = session.lm().tokenizer.strings(ids.tolist())
        rows = zip(strings, (sign * values).tolist(), strict=True)
        found[name] = [{"string": string, "logit": logit} for string, logit in rows]
    return found


def _relative_norm(session: Session, sae: MLSAE, latent: int, row: int) -> float | None:
    statistics, norms = session.library.statistics, session.library.similarity
    for key in ("resid", "norm", "mean"):
        norms = norms.get(key) if isinstance(norms, dict) else None
    mean = norms[row] if isinstance(norms, list) and len(norms) == len(sae.layers) else None
    if statistics is None or not isinstance(mean, float) or not mean > 0:
        return None
    sums = statistics.of(latent)
    count, total = (float(sums[name][row]) for name in ("counts", "totals"))
    if not count > 0:
        return None
    length = total / count * float(sae.W_dec[latent].norm())
    if sae.config.frame == "vector":
        return length / sae.config.d_model**0.5
    scale = float(sae.frame.scale[row]) if sae.config.frame == "layer" else 1.0
    return length * scale / mean
