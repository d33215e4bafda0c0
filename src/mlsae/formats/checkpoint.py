"""The SAE in a checkpoint of a run, out of the files of however many processes wrote it, and without any of them."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from mlsae import untrusted
from mlsae.config import MLSAEConfig
from mlsae.errors import ConfigError, ModelError, ResourceError
from mlsae.formats.own import kinds, step
from mlsae.formats.own import recognises as written
from mlsae.formats.weights import Weights, nonfinite
from mlsae.manifest import MANIFEST, STATE, steps, verified, whole_tensors

log = logging.getLogger(__name__)


def recognises(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a run."""
    return (folder / MANIFEST).is_file() and (folder / STATE).is_file()


def place(folder: Path) -> Path:
    """Where in a run directory its SAE is: `sae/`, or the newest sound checkpoint if that is later; any other folder itself."""
    sae = folder / "sae"
    there = written(sae)
    checkpoints = steps(folder) if folder.is_dir() else []
    known = step(sae) if there and checkpoints else None
    for checkpoint in reversed(checkpoints):
        later = not there or (known is not None and int(checkpoint.name.removeprefix("step-")) > known)
        if not later:
            break
        try:
            verified(checkpoint)
        except (ConfigError, ResourceError) as error:
            log.warning("%s is passed over (%s)", checkpoint, error.problem)
            continue
        log.warning("sae: %s/ is %s; reading %s", sae, "of an earlier step" if there else "not there", checkpoint)
        return checkpoint
    return sae if there else folder


def read(folder: Path, *, allow_nonfinite: bool = False) -> Weights:
    """The SAE of a checkpoint, once every file of it is as it was written.

    Raises:
        ResourceError: one is not.
        ModelError: it does not say what the SAE is, or, unless that is allowed, holds what is not finite.
    """
    manifest = verified(folder)
    config = config_of(folder)
    tensors = {name: torch.empty(shape, dtype=kind) for name, (kind, shape) in kinds(config).items()}
    with opened(folder, manifest.shards, config) as pieces:
        for name, tensor in tensors.items():
            at = 0
            for piece in pieces(name):
                tensor[at : at + len(piece)] = piece
                at += len(piece)
    if not allow_nonfinite and (name := nonfinite(tensors)) is not None:
        raise ModelError(str(folder), f"tensor '{name}' holds NaN or infinity; take an earlier checkpoint")
    return Weights(config, tensors)


def opened(
    folder: Path, shards: int, config: MLSAEConfig
) -> AbstractContextManager[Callable[[str], Iterator[torch.Tensor]]]:
    """`manifest.whole_tensors` of the SAE of this config."""
    return whole_tensors(folder, shards, kinds(config), config.groups)


def config_of(folder: Path) -> MLSAEConfig:
    """What the SAE of a checkpoint is. Raises ModelError if it does not say so."""
    path = folder / STATE
    state = untrusted.read_json(path)
    if not isinstance(state, dict) or not isinstance(state.get("sae"), dict):
        raise ModelError(str(path), "says nothing of the SAE: an earlier version wrote it; resume its run, which does")
    return MLSAEConfig(**state["sae"])
