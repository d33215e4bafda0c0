"""Our own files: `config.json`, and `model.safetensors` which holds the config too: the files of two SAEs cannot be mixed."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from mlsae import files, untrusted
from mlsae.config import MLSAEConfig
from mlsae.errors import ModelError
from mlsae.formats.weights import Weights, nonfinite, shapes

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


def recognises(folder: Path) -> bool:
    """Whether a folder holds an SAE of ours, whole or not."""
    if not ((folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file()):
        return False
    values = untrusted.read_json(folder / CONFIG_FILE)
    return not isinstance(values, dict) or not {"format_version", "d_model"}.isdisjoint(values)


def write(weights: Weights, folder: Path, step: int | None = None) -> None:
    """Both files; weights that are not finite are refused. `step`: of the run that they are from."""
    tensors = {name: tensor.float() for name, tensor in weights.tensors.items()}
    _refuse_nonfinite(tensors, folder)
    write_in_pieces(weights.config, weights.fingerprint, lambda name: [tensors[name]], folder, step)


def write_in_pieces(
    config: MLSAEConfig,
    fingerprint: dict[str, Any] | None,
    pieces: Callable[[str], Iterable[torch.Tensor]],
    folder: Path,
    step: int | None = None,
) -> None:
    """The same of float32 tensors that are not there whole: `pieces(name)` gives the entries of one in order, some at a time."""
    beside: dict[str, Any] = {"config": config.to_dict(), "fingerprint": fingerprint}
    beside |= {} if step is None else {"step": step}
    metadata = {"sae": files.canonical_json(beside)}
    files.save_in_pieces(folder / WEIGHTS_FILE, kinds(config), pieces, metadata)
    files.write_json(folder / CONFIG_FILE, config.to_dict())


def read(folder: Path, *, allow_nonfinite: bool = False) -> Weights:
    """What `write` wrote. Raises ModelError if it is not whole, not ours or, unless it is allowed, not finite."""
    config = _read_config(folder / CONFIG_FILE)
    _check_belongs(folder, config)
    tensors = untrusted.load_tensors(folder / WEIGHTS_FILE, kinds(config))
    if not allow_nonfinite:
        _refuse_nonfinite(tensors, folder)
    return Weights(config, tensors, _beside(folder, "fingerprint"))


def identity(folder: Path) -> str:
    """Hex SHA-256 that SAEs of the same config and tensors share, whatever was measured beside them."""
    return files.json_digest([_beside(folder, "config"), _beside(folder, "fingerprint").get("sha256")])


def step(folder: Path) -> int | None:
    """The step of the run that an SAE is from, if its files say so."""
    value = _said_beside(folder / WEIGHTS_FILE).get("step")
    return value if isinstance(value, int) else None


def kinds(config: MLSAEConfig) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of every tensor."""
    return {name: (torch.float32, shape) for name, shape in shapes(config).items()}


def _read_config(path: Path) -> MLSAEConfig:
    """The config in a file that must hold every key: one left out would be guessed."""
    values = untrusted.read_json(path)
    if not isinstance(values, dict):
        raise ModelError(str(path), "holds no mapping of keys; name a folder that save_pretrained wrote")
    if missing := [key for key in MLSAEConfig.model_fields if key not in values]:
        raise ModelError(str(path), f"key '{missing[0]}' is missing; the file is not whole")
    return MLSAEConfig(**values)


def _check_belongs(folder: Path, config: MLSAEConfig) -> None:
    """Refuse a config.json that is not the one the weights were saved with."""
    saved_with = _beside(folder, "config")
    for key, value in config.to_dict().items():
        if key not in saved_with or saved_with[key] != value:
            was = f"with {saved_with[key]!r}" if key in saved_with else "without it"
            problem = f"key '{key}' is {value!r}; the weights were saved {was}; get both files again from one place"
            raise ModelError(str(folder / CONFIG_FILE), problem)


def _beside(folder: Path, name: str) -> dict[str, Any]:
    """What the weights' own file holds beside tensors."""
    path = folder / WEIGHTS_FILE
    value = _said_beside(path).get(name)
    if not isinstance(value, dict):
        raise ModelError(str(path), f"holds no {name}; save the SAE again with save_pretrained")
    return value


def _said_beside(path: Path) -> dict[str, Any]:
    found = untrusted.parse_json(untrusted.tensors_metadata(path).get("sae", "null"), path)
    return found if isinstance(found, dict) else {}


def _refuse_nonfinite(tensors: dict[str, torch.Tensor], where: Path) -> None:
    if (name := nonfinite(tensors)) is not None:
        raise ModelError(str(where), f"tensor '{name}' holds NaN or infinity; train again from an earlier checkpoint")
