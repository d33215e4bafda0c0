"""What the readers of other libraries' files ask alike: numbers in a config, tensors of the right shapes, a layer, trust."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlsae import untrusted
from mlsae.errors import ModelError, printable
from mlsae.formats.weights import Given, Shapes

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""What weights may be kept in; all are read as float32, which holds each of them exactly."""


def mapping(path: Path) -> dict[str, Any]:
    """A JSON file's object. Raises ModelError if it holds something else."""
    values = untrusted.read_json(path)
    if not isinstance(values, dict):
        raise ModelError(str(path), "holds no mapping of keys; get the file again")
    return values


def whole(values: Mapping[str, Any], key: str, where: Path, least: int = 1, most: int | None = None) -> int:
    """The whole number under a key. Raises ModelError if there is none, or not one from `least` to `most`."""
    if key not in values:
        raise ModelError(str(where), f"key '{key}' is missing; the file is not whole")
    value = values[key]
    if type(value) is not int or value < least or (most is not None and value > most):
        range_ = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ModelError(
            str(where), f"key '{key}' is {printable(repr(value))[:60]}; it must be a whole number {range_}"
        )
    return value


def floats(tensors: Mapping[str, Tensor], wanted: Shapes, where: Path) -> dict[str, Tensor]:
    """The tensors as float32. Raises ModelError unless names and shapes are those wanted, and all numbers finite."""
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise ModelError(
            str(where), f"tensor '{missing[0]}' is missing; the file is not whole, or not what it is named"
        )
    if unknown := sorted(tensors.keys() - wanted.keys()):
        known = ", ".join(sorted(wanted))
        raise ModelError(str(where), f"tensor '{printable(unknown[0])}' is unknown; such an SAE has {known}")
    for name, shape in wanted.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise ModelError(str(where), f"tensor '{name}' has shape {list(tensor.shape)}; it must be {list(shape)}")
        if tensor.dtype not in FLOATS:
            raise ModelError(str(where), f"tensor '{name}' is {tensor.dtype}; it must be one of {list(FLOATS)}")
        if not tensor.isfinite().all():
            raise ModelError(str(where), f"tensor '{name}' holds NaN or infinity; get the file again")
    return {name: tensors[name].float().contiguous() for name in wanted}


def bias(tensor: Tensor) -> Tensor | None:
    """A latent bias; None where it is zero, which is none."""
    return tensor if tensor.any() else None


def read_layers(said: int | None, given: Given, where: Path) -> tuple[int, ...] | None:
    """The layer that a file says it reads, else those given. Raises ModelError if it is not one of those given."""
    if said is None or given.layers is None:
        return given.layers if said is None else (said,)
    if said not in given.layers:
        listed = ", ".join(map(str, given.layers))
        raise ModelError(
            str(where), f"reads layer {said}; layers {listed} are given; leave them out, or name its layer"
        )
    return (said,)


def elsewhere(hook: str, given: Given, where: Path) -> None:
    """Refuse an SAE of another place than the residual stream after a block, unless the layers to read with it are given."""
    if given.layers is None:
        problem = "reads another place than the residual stream after a block; give its layers to open it all the same"
        raise ModelError(str(where), f"'{printable(hook)}' {problem}")


def unpickled(path: Path, given: Given) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the plain values of a pickle, by dotted names. Raises ModelError unless reading it is allowed."""
    if not given.allow_pickle:
        raise ModelError(
            str(path), "is a pickle; give --allow-pickle (allow_pickle=True) if you trust where it comes from"
        )
    if not path.is_file():
        raise ModelError(str(path), "no such file; the SAE is not whole")
    return untrusted.unpickled(path, max_bytes=path.stat().st_size)
