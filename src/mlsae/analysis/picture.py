"""A figure with its caption and the numbers behind it, and the files it is kept in."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from mlsae import files
from mlsae.analysis.drawing import rendered

MAX_JSON_NUMBERS = 200_000
"""Numbers that a data file holds as JSON, about 5 MB; more go into a safetensors file."""


@dataclass(frozen=True)
class Picture:
    """One figure, ready to be saved or put in a report."""

    name: str
    """File name without its ending."""
    title: str
    caption: str
    """How to read it."""
    figure: Figure
    data: Mapping[str, Any]
    """The numbers drawn: plain JSON values, and tensors where there are many."""
    here: str = ""
    """What it shows here, a sentence made of its numbers."""


def save(picture: Picture, directory: Path) -> list[Path]:
    """Write NAME.png, NAME.pdf and NAME.json (large tensors: NAME.safetensors); same picture, same bytes."""
    tensors = {name: value for name, value in picture.data.items() if isinstance(value, Tensor)}
    paths = [directory / f"{picture.name}.{ending}" for ending in ("png", "pdf", "json", "safetensors")]
    for path in paths[:2]:
        files.write_bytes(path, rendered(picture.figure, path.suffix[1:]))
    plain = {**picture.data, "title": picture.title, "caption": f"{picture.here} {picture.caption}".strip()}
    if sum(tensor.numel() for tensor in tensors.values()) > MAX_JSON_NUMBERS:
        files.save_tensors(paths[3], {name: tensor.contiguous() for name, tensor in tensors.items()})
        plain |= dict.fromkeys(tensors, f"tensor in {paths[3].name}")
    else:
        plain |= {name: tensor.tolist() for name, tensor in tensors.items()}
        files.remove(paths.pop())  # of an earlier, larger analysis
    files.write_json(paths[2], plain)
    return paths
