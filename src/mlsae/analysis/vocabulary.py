"""What directions mean in the language model's own words: tokens embedded nearby, and tokens promoted or suppressed.

Cosines and logits are made in blocks; nothing of [n_latents, d_vocab] is ever held. With a lens, `to_resid` takes
lensed directions back to the residual stream first.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mlsae.analysis.directions import (
    MAX_BLOCK_ELEMENTS,
    NULL_ROWS,
    Chance,
    Maxima,
    blocks,
    chance,
    random_rows,
    unit_rows,
)
from mlsae.errors import ConfigError, ModelError
from mlsae.lm import LanguageModel
from mlsae.sae import MLSAE

DirectionMap = Callable[[Float[Tensor, "row d_model"]], Float[Tensor, "row d_model"]]


@dataclass(frozen=True)
class TokenMatches:
    """The tokens whose embeddings point most nearly the way of each direction."""

    tokens: Int[Tensor, "direction top"]
    """Ids, nearest first."""
    cosines: Float[Tensor, "direction top"]
    chance: Chance
    """The largest cosine of random directions."""

    def to_dict(self) -> dict[str, Any]:
        """The largest cosines, and chance's; not the tokens."""
        return {"max_cosine": asdict(Maxima.of(self.cosines[:, 0])), "chance": asdict(self.chance)}


@dataclass(frozen=True)
class LogitLens:
    """The tokens that each direction promotes and suppresses, written straight into the logits."""

    promoted: Int[Tensor, "direction top"]
    """Ids, most promoted first."""
    promoted_logits: Float[Tensor, "direction top"]
    suppressed: Int[Tensor, "direction top"]
    """Ids, most suppressed first."""
    suppressed_logits: Float[Tensor, "direction top"]
    chance: Chance
    """The largest logit of random directions."""

    def to_dict(self) -> dict[str, Any]:
        """The largest logits, and chance's; not the tokens."""
        chance = {name: _logits(found) for name, found in vars(self.chance).items()}
        return {"max_logit": _logits(Maxima.of(self.promoted_logits[:, 0])), "chance": chance}


def _logits(largest: Maxima) -> dict[str, Any]:
    """Near-duplicates are of cosines."""
    return {name: value for name, value in asdict(largest).items() if name != "near_duplicates"}


@dataclass(frozen=True)
class Words:
    """What every latent's decoder row means in the language model's own words, and those words."""

    logits: LogitLens
    input: TokenMatches | None
    """Against the embeddings of tokens read; None where these have another width."""
    output: TokenMatches | None
    """Against those of tokens predicted."""
    strings: Mapping[int, str]
    """Every token named above, as a person reads it."""

    def to_dict(self) -> dict[str, Any]:
        """The largest cosines with embeddings and the largest logits, and chance's; not the tokens."""
        return {
            "logits": self.logits.to_dict(),
            "embedding": self.input.to_dict() if self.input else None,
            "unembedding": self.output.to_dict() if self.output else None,
        }


def words_of(sae: MLSAE, lm: LanguageModel, *, top: int = 8, progress: bool = False) -> Words:
    """All of the above for an SAE's decoder.

    A lens takes every layer to the last one's terms, which is where logits and the output's embeddings are; the input's
    are compared after the way back from the lens at the SAE's first layer.
    """
    n_tokens = min(lm.d_vocab, len(lm.tokenizer.hf))  # embeddings may be padded beyond the tokenizer's tokens
    top, rows = min(top, n_tokens), sae.W_dec.detach()
    settings: dict[str, Any] = {"top": top, "progress": progress}
    logits = logit_lens(rows, lambda some: lm.logits_along(some)[:, :n_tokens], **settings)

    def nearest(embedding: Tensor, to_resid: DirectionMap | None) -> TokenMatches | None:
        fits = embedding.shape[1] == rows.shape[1]
        return nearest_tokens(rows, embedding[:n_tokens], to_resid=to_resid, **settings) if fits else None

    read = nearest(lm.embedding, _back_from(sae))
    same = sae.lens is None and lm.embedding is lm.unembedding
    predicted = read if same else nearest(lm.unembedding, None)
    named = [logits.promoted, logits.suppressed, *(found.tokens for found in (read, predicted) if found)]
    ids = torch.cat([tokens.flatten() for tokens in named]).unique().tolist()
    return Words(logits, read, predicted, dict(zip(ids, lm.tokenizer.strings(ids), strict=True)))


def _back_from(sae: MLSAE) -> DirectionMap | None:
    """Directions behind the SAE's lens, as they are in the residual stream of its first layer."""
    if (lens := sae.lens) is None:
        return None
    first = sae.layers[:1]
    return lambda rows: (lens.invert(rows[None], first) - lens.invert(torch.zeros_like(rows[None]), first))[0]


@torch.no_grad()
def nearest_tokens(
    directions: Float[Tensor, "direction d_model"],
    embedding: Float[Tensor, "token d_embed"],
    *,
    top: int = 8,
    to_resid: DirectionMap | None = None,
    seed: int = 0,
    progress: bool = False,
) -> TokenMatches:
    """The tokens whose rows of an embedding, input or output, have the largest cosines with each direction.

    Args:
        directions: rows of W_dec.
        embedding: `LanguageModel.embedding` or `.unembedding`; leave out rows that pad it beyond the tokenizer's tokens.
        to_resid: takes directions as the SAE has them to the residual stream: the inverse of a lens, without its bias.
        seed: of the random directions behind `chance`.

    Raises:
        ModelError: the embedding has another width.
        ConfigError: it has fewer than `top` tokens.
    """
    if directions.shape[1] != embedding.shape[1]:
        given = f"has rows of {embedding.shape[1]} entries, the directions {directions.shape[1]}"
        raise ModelError("embedding", f"{given}; they cannot be compared")
    _check_top(top, len(embedding))
    targets = unit_rows(embedding)
    directions = unit_rows(directions if to_resid is None else to_resid(directions)).to(targets)
    tokens = torch.empty(len(directions), top, dtype=torch.int64)
    cosines = torch.empty(len(directions), top)
    at_once = MAX_BLOCK_ELEMENTS // len(targets)
    for at in blocks(len(directions), at_once, "tokens of latents", progress=progress):
        found = (directions[at] @ targets.T).topk(top)
        tokens[at], cosines[at] = found.indices.cpu(), found.values.cpu()
    return TokenMatches(tokens, cosines, chance(directions, targets, seed=seed))


@torch.no_grad()
def logit_lens(
    directions: Float[Tensor, "direction d_model"],
    logits_along: Callable[[Float[Tensor, "row d_model"]], Float[Tensor, "row token"]],
    *,
    top: int = 8,
    to_resid: DirectionMap | None = None,
    rows_at_once: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> LogitLens:
    """The tokens whose logits each direction raises and lowers most (nostalgebraist 2020, of directions).

    Args:
        directions: rows of W_dec.
        logits_along: `LanguageModel.logits_along`, which says how the final norm is treated, or that less some tokens.
        to_resid: as in `nearest_tokens`.
        rows_at_once: directions whose logits are held at once.
        seed: of the random directions behind `chance`.
    """
    directions = directions if to_resid is None else to_resid(directions)
    found: dict[str, list[Tensor]] = {name: [] for name in LogitLens.__annotations__ if name != "chance"}
    for at in blocks(len(directions), rows_at_once, "logit lens", progress=progress):
        logits = logits_along(directions[at])
        _check_top(top, logits.shape[1])
        for name, largest in (("promoted", True), ("suppressed", False)):
            ends = logits.topk(top, largest=largest)
            found[name].append(ends.indices.cpu())
            found[f"{name}_logits"].append(ends.values.cpu())
    by_chance = []
    for covariance in (False, True):
        random = random_rows(unit_rows(directions), NULL_ROWS, covariance=covariance, seed=seed)
        parts = blocks(NULL_ROWS, rows_at_once, "logit lens by chance", progress=progress)
        by_chance.append(Maxima.of(torch.cat([logits_along(random[at]).amax(1).cpu() for at in parts])))
    return LogitLens(**{name: torch.cat(parts) for name, parts in found.items()}, chance=Chance(*by_chance))


def _check_top(top: int, n_tokens: int) -> None:
    if not 1 <= top <= n_tokens:
        raise ConfigError("top", f"{top} given; it must be between 1 and the {n_tokens} tokens there are")
