"""An SAE from the files of one library into those of another, and a look whether both give the same outputs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mlsae import fingerprint, formats
from mlsae.errors import ModelError
from mlsae.sae import MLSAE

LARGEST_DIFFERENCE = 1e-3
"""Relative difference of reconstructions on fixed vectors beyond which what was written is called wrong; rounding leaves 1e-6."""


@dataclass(frozen=True)
class Converted:
    """What was written where."""

    folders: list[str]
    """One for each layer, or the one that holds all."""
    to: str
    """The format."""
    layers: list[int] | None
    """Layers that the SAE reads, if that is known."""
    n_latents: int
    """Latents in all."""
    difference: float
    """Largest difference of a reconstruction from the source's on fixed vectors, relative to the largest entry there."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values by field name."""
        return asdict(self)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: str = "mlsae",
    lm: str | None = None,
    layers: Sequence[int] | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
) -> Converted:
    """Write the SAE in `source`, a folder or a Hub repository of any known format, to the new folder `out`.

    Args:
        to: mlsae, lawson2024, saelens, sparsify, dictionary-learning or openai.
        lm: the language model that it reads, where its files do not say.
        layers: the layers that it reads, where its files do not say.
        allow_pickle: also read formats whose files are pickles.

    Raises:
        ConfigError: the format has no exact twin of this SAE.
        ModelError: there is no SAE, or what was written would not give the same outputs.
        ResourceError: `out` is a folder that holds something.
    """
    sae = MLSAE.from_pretrained(source, lm=lm, layers=layers, revision=revision, allow_pickle=allow_pickle)
    written = formats.write(sae.marked_weights(), Path(out), to)
    again = MLSAE.from_pretrained(out, layers=sae.config.layers, allow_pickle=True)
    if not (difference := _difference(sae, again)) <= LARGEST_DIFFERENCE:
        raise ModelError(
            "sae", f"as {to} it reconstructs otherwise, by {difference:.1e}; please report it, and do not use {out}"
        )
    known = None if sae.config.layers is None else list(sae.config.layers)
    return Converted([str(folder) for folder in written], to, known, sae.config.n_latents, difference)


@torch.no_grad()
def _difference(sae: MLSAE, again: MLSAE) -> float:
    layers, resid = fingerprint.fixed_vectors(sae)
    one, other = (each.decode(each.encode(resid, layers)) for each in (sae, again))
    return float((one - other).abs().max() / one.abs().max().clamp_min(1e-30))
