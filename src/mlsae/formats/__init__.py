"""SAEs in the files of every library that has some: one module for each, and what they share.

A module of `OTHERS` says what it `recognises` and `read`s one dictionary from it; most also `write` one, into a folder named by
`folder_of` where a library keeps a folder for each layer. What has no exact twin is refused, with the reason.
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

from mlsae import files
from mlsae.errors import ConfigError, ModelError
from mlsae.formats import checkpoint, own
from mlsae.formats.weights import Dictionary, Given, Weights, dictionaries, joined
from mlsae.recipes import FormatName

OTHERS = tuple(name for name in get_args(FormatName) if name != "mlsae")
"""The formats besides ours, by the names that `mlsae convert --to` takes."""
MAX_FOLDERS = 4096
"""Folders to look for layers in."""


def module_of(name: str) -> Any:
    """The module of one of OTHERS."""
    return import_module(f"mlsae.formats.{name.replace('-', '_')}")


def detect(folder: Path) -> str | None:
    """The format of the SAE, or of the first of several, in a folder; None: of no format that is known."""
    if own.recognises(folder) or checkpoint.recognises(folder):
        return "mlsae"
    return next((name for name in OTHERS for place in _places(folder) if module_of(name).recognises(place)), None)


def read(folder: Path, given: Given | None = None, *, allow_nonfinite: bool = False) -> Weights:
    """The SAE in a folder, whatever library wrote it; the folders of several layers are joined to one.

    Raises ModelError where there is none, or one that ours cannot equal, and says why.
    """
    given = Given() if given is None else given
    name = detect(folder)
    if name is None:
        known = ", ".join(get_args(FormatName))
        raise ModelError("sae", f"'{folder}' holds no SAE of a known format ({known}); name a run or an SAE folder")
    if name == "mlsae":
        module = own if own.recognises(folder) else checkpoint
        return module.read(folder, allow_nonfinite=allow_nonfinite)
    module = module_of(name)
    if hasattr(module, "read_whole"):
        return module.read_whole(folder, given)
    return joined([module.read(place, given) for place in _places(folder) if module.recognises(place)])


def write(weights: Weights, folder: Path, to: str) -> list[Path]:
    """The SAE in the format `to`; returns the folders of its layers, or the one folder. All are there, or none.

    Raises ConfigError where the format has no exact twin of it.
    """
    if to not in get_args(FormatName):
        raise ConfigError("to", f"'{to}' given; must be {' or '.join(get_args(FormatName))}")
    files.probe_empty(folder)
    with files.staged_directory(folder) as staged:
        if to == "mlsae":
            own.write(weights, staged)
            return [folder]
        module = module_of(to)
        if hasattr(module, "write_whole"):
            module.write_whole(weights, staged)
            return [folder]
        written = []
        for one in dictionaries(weights):
            layer = (one.layers or (0,))[0]
            module.write(one, staged / module.folder_of(layer))
            written.append(folder / module.folder_of(layer))
        return written


def _places(folder: Path) -> Sequence[Path]:
    """A folder and, in order, those in it and in them."""
    if not folder.is_dir():
        return [folder]
    below = sorted(path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_dir())
    if len(below) > MAX_FOLDERS:
        raise ModelError("sae", f"'{folder}' holds {len(below)} folders; name the one of an SAE")
    return [folder, *below]


__all__ = ["OTHERS", "Dictionary", "Given", "Weights", "detect", "dictionaries", "joined", "module_of", "read", "write"]
