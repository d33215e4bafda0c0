"""What a checkpoint's folder holds: the manifest, the files that it names, and whose rows of which tensors are in them.

    step-00001000/{sae.safetensors, state.safetensors, state.json, manifest.json}

Where several processes each hold some of the latents, each writes files of its own (sae-1-of-2.safetensors ...), of the tensors
with a row for each latent; the first one writes all else.
"""

import contextlib
import math
import platform
import re
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from mlsae import files, untrusted
from mlsae.config import Config
from mlsae.errors import ResourceError

FORMAT_VERSION = 2
"""1 is written where one process holds all latents."""
MANIFEST, STATE = "manifest.json", "state.json"
BY_LATENT = re.compile(r"(adam\.)?(W_enc|W_dec)(\.exp_avg(_sq)?)?")
"""Tensors with a row for each latent."""
PIECE_BYTES = 16 << 20
"""Of a tensor, what is read at a time."""

Kinds = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""What is expected of tensors: types and shapes by name."""


class ManifestPart(Config):
    """One file of a checkpoint."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: str


class Manifest(Config):
    """What manifest.json holds, and nothing else."""

    format_version: int
    step: Annotated[int, Field(ge=0, lt=2**63)]
    device: str
    config_sha256: str
    python: str
    mlsae: str
    torch: str
    transformers: str
    threads: int
    shards: Annotated[int, Field(ge=1, le=10**6)] = 1
    """Processes that the latents were shared out among."""
    files: dict[str, ManifestPart]


class NewerFormat(ResourceError):
    """A checkpoint that a later version wrote: whole, and nothing to pass over."""


def steps(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in run.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def file_name(kind: str, shard: int, shards: int) -> str:
    """Where one of several processes writes its tensors."""
    return f"{kind}.safetensors" if shards == 1 else f"{kind}-{shard + 1}-of-{shards}.safetensors"


def file_names(shards: int) -> list[str]:
    """The files of a checkpoint, but for its manifest."""
    return [*(file_name(kind, i, shards) for kind in ("sae", "state") for i in range(shards)), STATE]


def verified(directory: Path, config_sha256: str | None = None, *, sizes_only: bool = False) -> Manifest:
    """The manifest, once it and every file it names are as they were written, by a run of this config (None: of any).

    Raises ResourceError that names the first file that is not.
    """
    path = directory / MANIFEST
    fields = untrusted.read_sealed(path)
    version = fields.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise NewerFormat(
            str(path),
            f"format {version}; this version reads up to {FORMAT_VERSION}; upgrade mlsae",
        )
    manifest = Manifest(**fields)
    names = file_names(manifest.shards)
    if manifest.files.keys() != set(names):
        raise ResourceError(str(path), f"does not name {', '.join(names)}")
    if config_sha256 not in (None, manifest.config_sha256):
        raise ResourceError(str(path), "is of a run with another config")
    for name in names:
        part, expected = directory / name, manifest.files[name]
        if not part.is_file() or part.stat().st_size != expected.bytes:
            raise ResourceError(str(part), f"failed its size check ({name})")
        if not sizes_only and files.sha256(part) != expected.sha256:
            raise ResourceError(str(part), f"failed its checksum ({name})")
    return manifest


def described(
    parts: Mapping[str, dict[str, Any]], step: int, device: str, config_sha256: str, shards: int
) -> dict[str, Any]:
    """The manifest of these files, for `files.write_sealed`."""
    return {
        **({"format_version": 1} if shards == 1 else {"format_version": 2, "shards": shards}),
        "step": step,
        "device": device,
        "config_sha256": config_sha256,
        **environment(),
        "files": {name: parts[name] for name in file_names(shards)},
    }


def part_of(path: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": files.sha256(path)}


def environment() -> dict[str, Any]:
    """What bit-exactness depends on besides the files."""
    versions = {name: metadata.version(name) for name in ("mlsae", "torch", "transformers")}
    return {"python": platform.python_version(), **versions, "threads": torch.get_num_threads()}


@dataclass(frozen=True)
class Layout:
    """Which rows of a group's latents a process holds, group after group."""

    groups: int
    size: int
    """Latents of a group."""
    own: range
    """Of every group."""

    def of(self, shard: int, shards: int) -> range:
        """What one of several processes holds."""
        return range(self.size * shard // shards, self.size * (shard + 1) // shards)

    def rows(self, held: range) -> int:
        """Of the tensors of a process that holds these."""
        return self.groups * len(held)

    def common(self, theirs: range) -> list[tuple[slice, slice]]:
        """For every group, where latents of both are in the rows of mine and in theirs."""
        first, last = max(self.own.start, theirs.start), min(self.own.stop, theirs.stop)
        if first >= last:
            return []
        pairs = []
        for group in range(self.groups):
            mine, its = (group * len(held) + first - held.start for held in (self.own, theirs))
            pairs.append((slice(mine, mine + last - first), slice(its, its + last - first)))
        return pairs


def read_part(directory: Path, kind: str, shards: int, like: Kinds, layout: Layout) -> dict[str, Tensor]:
    """The rows of one process's latents, out of the files of however many there were, and every other tensor whole."""
    whole = {name: k for name, k in like.items() if not BY_LATENT.fullmatch(name)}
    sharded = {name: k for name, k in like.items() if BY_LATENT.fullmatch(name)}
    found = untrusted.load_tensors(directory / file_name(kind, 0, shards), whole, beside=BY_LATENT.pattern)
    own = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in sharded.items()}
    for i in range(shards):
        theirs = layout.of(i, shards)
        with untrusted.tensor_slices(
            directory / file_name(kind, i, shards), _of_shard(like, layout, i, shards)
        ) as slices:
            for here, there in layout.common(theirs):
                for name, tensor in own.items():
                    tensor[here] = slices[name][there]
    return {**found, **own}


@contextlib.contextmanager
def whole_tensors(
    directory: Path, shards: int, kinds: Kinds, groups: int
) -> Generator[Callable[[str], Iterator[Tensor]]]:
    """The SAE's tensors put together from the files of `shards` processes: `pieces(name)` gives the rows of one in order.

    No more of them is in memory than one piece.
    """
    layout = Layout(groups, kinds["W_enc"][1][0] // groups, range(0))
    with contextlib.ExitStack() as stack:
        opened = [
            stack.enter_context(
                untrusted.tensor_slices(directory / file_name("sae", i, shards), _of_shard(kinds, layout, i, shards))
            )
            for i in range(shards)
        ]

        def pieces(name: str) -> Iterator[Tensor]:
            if not BY_LATENT.fullmatch(name):
                yield opened[0][name][:]
                return
            kind, (_, *row) = kinds[name]
            step = max(1, PIECE_BYTES // (kind.itemsize * math.prod(row)))
            for group in range(groups):
                for i, slices in enumerate(opened):
                    n = len(layout.of(i, shards))
                    for start in range(group * n, (group + 1) * n, step):
                        yield slices[name][start : min(start + step, (group + 1) * n)]

        yield pieces


def _of_shard(like: Kinds, layout: Layout, shard: int, shards: int) -> dict[str, Any]:
    """Types and shapes of what is in the file of one process: rows of latents, and in the first one's all else."""
    n_rows = layout.rows(layout.of(shard, shards))
    return {
        name: (kind, (n_rows, *shape[1:]) if BY_LATENT.fullmatch(name) else shape)
        for name, (kind, shape) in like.items()
        if shard == 0 or BY_LATENT.fullmatch(name)
    }
