"""A run directory: its lock, its config, and its checkpoints, each staged, checksummed and renamed once.

    RUN/config.json · metrics.jsonl · run.lock · sae/
        step-00001000/{sae.safetensors, state.safetensors, state.json, manifest.json}

Where several processes each hold some of the latents, each writes files of its own (sae-1-of-2.safetensors ...), of the tensors
with a row for each latent; the first one writes all else, and the manifest once all are there. Any layout reads any other's.

The manifest is written last, as canonical JSON with a digest of its own fields, so that a flipped bit anywhere in a
checkpoint is found; a load takes the newest checkpoint that verifies and says why it passed over the others.
"""

import contextlib
import logging
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from mlsae import files, untrusted
from mlsae.config import Config
from mlsae.errors import ConfigError, ModelError, NumericsError, ResourceError
from mlsae.formats.weights import nonfinite
from mlsae.mesh import ALONE, Mesh

FORMAT_VERSION = 2
"""1 is written where one process holds all latents."""
PARTS = ("sae.safetensors", "state.safetensors", "state.json")
"""The files of one process."""
BY_LATENT = re.compile(r"(adam\.)?(W_enc|W_dec)(\.exp_avg(_sq)?)?")
"""Tensors with a row for each latent."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """The whole state of a run between two optimizer steps."""

    step: int
    """Optimizer steps taken."""
    sae: dict[str, Tensor]
    """The SAE's parameters and buffers."""
    state: dict[str, Tensor]
    """Everything else that is a tensor: moments, variances, counters, random-number state."""
    info: dict[str, Any]
    """Everything else that is not: data position, length of metrics.jsonl."""


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


class _NewerFormat(ResourceError):
    """A checkpoint that a later version wrote: whole, and nothing to pass over."""


class RunDirectory:
    """One run's folder, held by one process, or by those of one mesh, which call its methods together.

    Raises ResourceError if another process holds it, if it belongs to another config, or if `resume` finds nothing to resume.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], *, resume: bool, mesh: Mesh = ALONE):
        self.path, self.config, self.mesh = path, config, mesh
        self._made = self._claimed = False
        mesh.by_leader(lambda: self._open(resume))

    def _open(self, resume: bool) -> None:
        path = self.path
        self._made = not path.exists()
        if path.exists() and not path.is_dir():
            raise ResourceError(str(path), "is a file; choose a folder with --out")
        if resume and not self.steps():
            raise ResourceError(str(path), "no checkpoint in it; start without --resume")
        try:
            self.lock = files.RunLock(path)
        except ResourceError:
            if self._made:
                files.remove_if_empty(path)
            raise
        try:
            files.sweep(path)
            files.sweep(path / "sae")
            self._claim(resume)
        except BaseException:
            self.close()
            raise

    def _claim(self, resume: bool) -> None:
        """Write config.json into a new folder; in an old one, refuse a different config or a start over a run."""
        stored = self.path / "config.json"
        if not stored.exists():
            self._claimed = True
            files.write_json(stored, self.config)
            return
        before = untrusted.read_json(stored)
        now = files.finite(dict(self.config))
        changed = [key for key in {**before, **now} if key != "out" and before.get(key) != now.get(key)]
        if changed:
            differences = ", ".join(f"{key} {before.get(key)} -> {now.get(key)}" for key in changed)
            raise ResourceError(
                str(self.path), f"holds a run with another config ({differences}); choose another --out"
            )
        if not resume and self.steps():
            raise ResourceError(
                str(self.path), "holds this run already; add --resume to go on, or choose another --out"
            )

    def steps(self) -> list[Path]:
        """The checkpoints, oldest first."""
        found = [path for path in self.path.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))

    def save(self, checkpoint: Checkpoint, keep: int) -> None:
        """Write one checkpoint durably, verify it, and drop the oldest beyond `keep`.

        Raises NumericsError if a tensor is not finite and ResourceError if the disk refuses; the older ones then stand.
        """
        self.mesh.everywhere(lambda: _check_finite(checkpoint))
        if self.mesh.alone:
            files.on_full_disk(lambda: self._write(checkpoint, keep))
        else:
            self._write_together(checkpoint, keep)

    def _write(self, checkpoint: Checkpoint, keep: int) -> None:
        target = self.path / f"step-{checkpoint.step:08d}"
        needed = sum(tensor.nbytes for tensor in (*checkpoint.sae.values(), *checkpoint.state.values()))
        with files.disk_errors(target, needed):
            if not self._verifies(target):
                with files.staged_directory(target) as staged:
                    self._stage(staged, checkpoint)
                    files.write_sealed(staged / "manifest.json", _manifest(staged, checkpoint, self.config))
            self._finish(target, keep)

    def _write_together(self, checkpoint: Checkpoint, keep: int) -> None:
        """The same by several processes: each stages its files; when all have, the leader writes the manifest and renames."""
        target, mesh = self.path / f"step-{checkpoint.step:08d}", self.mesh
        if not mesh.by_leader(lambda: self._verifies(target)):
            with contextlib.ExitStack() as stack:
                staged = Path(mesh.by_leader(lambda: str(stack.enter_context(files.staged_directory(target)))))
                mesh.everywhere(lambda: files.on_full_disk(lambda: self._stage(staged, checkpoint)))
                manifest = staged / "manifest.json"
                mesh.by_leader(
                    lambda: files.write_sealed(manifest, _manifest(staged, checkpoint, self.config, mesh.tp))
                )
                mesh.by_leader(stack.close)
        mesh.by_leader(lambda: self._finish(target, keep))

    def _stage(self, staged: Path, checkpoint: Checkpoint) -> None:
        """Write what is this process's to write: with several dp ranks, which hold the same, the first writes."""
        if self.mesh.dp_rank:
            return
        for kind, tensors in (("sae", checkpoint.sae), ("state", checkpoint.state)):
            own = {name: t for name, t in tensors.items() if self.mesh.leads or BY_LATENT.fullmatch(name)}
            files.save_tensors(staged / _file_name(kind, self.mesh.tp_rank, self.mesh.tp), own)
        if self.mesh.leads:
            files.write_text(staged / "state.json", files.canonical_json(checkpoint.info))

    def _finish(self, target: Path, keep: int) -> None:
        """Look at what was written, and drop the oldest."""
        self._check(target, sizes_only=True)
        log.info("checkpoint step %d verified", int(target.name.removeprefix("step-")))
        for old in self.steps()[:-keep]:
            files.remove(old)

    def load(self, like: Checkpoint | None = None) -> Checkpoint:
        """The newest checkpoint whose every byte is as written; each one passed over is named and set aside.

        With `like`, its tensors have that one's names, shapes and dtypes.
        Raises ResourceError if none verifies: never a silent fresh start.
        """
        found: list[Checkpoint] = []  # by the leader, which must have read it to know that it can be
        name, manifest = self.mesh.by_leader(lambda: self._newest(like, found))
        return found[0] if found else self._read(self.path / name, manifest, like)

    def _newest(self, like: Checkpoint | None, found: list[Checkpoint]) -> tuple[str, dict[str, Any]]:
        """The name and the manifest of the checkpoint that is loaded."""
        reasons = []
        for directory in reversed(self.steps()):
            try:
                manifest = self._check(directory)
                checkpoint = self._read(directory, manifest, like)
            except _NewerFormat:
                raise
            except (ConfigError, ModelError, ResourceError) as error:
                reasons.append(f"{directory.name} {error.problem}")
                continue
            except OSError as error:
                reasons.append(f"{directory.name} cannot be read ({error.strerror or error})")
                continue
            for reason in reasons:
                log.warning("%s; using %s", reason, directory.name)
            self._set_aside([d for d in self.steps() if d.name > directory.name])
            self._warn_of_changes(manifest)
            found.append(checkpoint)
            return directory.name, manifest
        raise ResourceError(str(self.path), f"no checkpoint can be used: {'; '.join(reasons) or 'there is none'}")

    def _read(self, directory: Path, manifest: Mapping[str, Any], like: Checkpoint | None) -> Checkpoint:
        groups = self.config.get("groups", 1)
        size = self.config.get("n_latents", 0) // groups
        share = self.mesh.share(size, "tp")
        layout = Layout(groups, size, range(share.start, share.stop))
        return _read(directory, manifest, like, layout, self.mesh)

    def _verifies(self, directory: Path) -> bool:
        """Whether a checkpoint of this step stands already, as it does when the run stops right after saving it."""
        try:
            return bool(directory.exists() and self._check(directory))
        except (ConfigError, ResourceError):
            return False

    def _check(self, directory: Path, *, sizes_only: bool = False) -> dict[str, Any]:
        """The manifest, once it and every file it names are as they were written, by a run of this config."""
        path = directory / "manifest.json"
        manifest = untrusted.read_sealed(path)
        version = manifest.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise _NewerFormat(
                str(path),
                f"format {version}; this version reads up to {FORMAT_VERSION}; upgrade mlsae",
            )
        names = _file_names(Manifest(**manifest).shards)
        if manifest["files"].keys() != set(names):
            raise ResourceError(str(path), f"does not name {', '.join(names)}")
        if manifest["config_sha256"] != _config_digest(self.config):
            raise ResourceError(str(path), "is of a run with another config")
        for name in names:
            part, expected = directory / name, manifest["files"][name]
            if not part.is_file() or part.stat().st_size != expected["bytes"]:
                raise ResourceError(str(part), f"failed its size check ({name})")
            if not sizes_only and files.sha256(part) != expected["sha256"]:
                raise ResourceError(str(part), f"failed its checksum ({name})")
        return manifest

    def _set_aside(self, damaged: list[Path]) -> None:
        """Rename what failed: left in place it would block the save that reaches its step again."""
        for directory in damaged:
            target = directory.with_name(f"damaged-{directory.name}")
            files.remove(target)
            files.rename(directory, target)

    def _warn_of_changes(self, manifest: Mapping[str, Any]) -> None:
        here = _environment()
        if changed := [f"{key} {manifest.get(key)} -> {here[key]}" for key in here if manifest.get(key) != here[key]]:
            log.warning("resuming with %s: bit-exactness is not promised", ", ".join(changed))

    def close(self) -> None:
        """Give the folder up; a new one in which no step was taken leaves no trace."""
        if not self.mesh.leads:
            return
        metrics = self.path / "metrics.jsonl"
        stepped = self.steps() or (metrics.exists() and metrics.stat().st_size)
        if (self._made or self._claimed) and not stepped:
            for name in ("config.json", "metrics.jsonl", "run.lock") if self._claimed else ("run.lock",):
                files.remove(self.path / name)
            if self._made:
                files.remove_if_empty(self.path)
        self.lock.release()


def _check_finite(checkpoint: Checkpoint) -> None:
    if (name := nonfinite({**checkpoint.sae, **checkpoint.state})) is not None:
        raise NumericsError(name, f"not finite at step {checkpoint.step}; the last checkpoint stands")


def _file_name(kind: str, shard: int, shards: int) -> str:
    return f"{kind}.safetensors" if shards == 1 else f"{kind}-{shard + 1}-of-{shards}.safetensors"


def _file_names(shards: int) -> list[str]:
    """The files of a checkpoint, but for its manifest."""
    return [*(_file_name(kind, i, shards) for kind in ("sae", "state") for i in range(shards)), "state.json"]


def _manifest(directory: Path, checkpoint: Checkpoint, config: Mapping[str, Any], shards: int = 1) -> dict[str, Any]:
    return {
        **({"format_version": 1} if shards == 1 else {"format_version": 2, "shards": shards}),
        "step": checkpoint.step,
        "device": ", ".join(sorted({str(tensor.device) for tensor in checkpoint.sae.values()})),
        "config_sha256": _config_digest(config),
        **_environment(),
        "files": {
            name: {"bytes": (directory / name).stat().st_size, "sha256": files.sha256(directory / name)}
            for name in _file_names(shards)
        },
    }


def _read_part(
    directory: Path, kind: str, shards: int, like: Mapping[str, Tensor], layout: "Layout"
) -> dict[str, Tensor]:
    """The rows of one process's latents, out of the files of however many there were, and every other tensor whole."""
    whole = {name: k for name, k in _kinds(like).items() if not BY_LATENT.fullmatch(name)}
    sharded = {name: k for name, k in _kinds(like).items() if BY_LATENT.fullmatch(name)}
    found = untrusted.load_tensors(directory / _file_name(kind, 0, shards), whole, beside=BY_LATENT.pattern)
    own = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in sharded.items()}
    for i in range(shards):
        theirs = layout.of(i, shards)
        expected = {name: (dtype, (layout.rows(theirs), *shape[1:])) for name, (dtype, shape) in sharded.items()}
        path = directory / _file_name(kind, i, shards)
        with untrusted.tensor_slices(path, {**expected, **(whole if i == 0 else {})}) as slices:
            for here, there in layout.common(theirs):
                for name, tensor in own.items():
                    tensor[here] = slices[name][there]
    return {**found, **own}


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


def _read(
    directory: Path, manifest: Mapping[str, Any], like: Checkpoint | None, layout: Layout, mesh: Mesh
) -> Checkpoint:
    """The checkpoint in a folder that was checked."""
    shards = manifest.get("shards", 1)
    if like is None or shards == mesh.tp == 1:
        if shards > 1:
            raise ResourceError(str(directory), f"is of {shards} processes; say what is expected of it")
        kinds = (None, None) if like is None else (_kinds(like.sae), _kinds(like.state))
        names = ("sae.safetensors", "state.safetensors")
        sae, state = (untrusted.load_tensors(directory / name, kind) for name, kind in zip(names, kinds, strict=True))
    else:
        sae = _read_part(directory, "sae", shards, like.sae, layout)
        state = _read_part(directory, "state", shards, like.state, layout)
    if (name := nonfinite({**sae, **state})) is not None:
        raise ResourceError(str(directory), f"holds NaN or infinity ({name})")
    info = untrusted.read_json(directory / "state.json")
    if not isinstance(info, dict):
        raise ResourceError(str(directory / "state.json"), "holds no mapping of keys")
    return Checkpoint(manifest["step"], sae, state, info)


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of what makes two runs the same: every key but the folder's name."""
    return files.json_digest({key: value for key, value in files.finite(dict(config)).items() if key != "out"})


def _environment() -> dict[str, Any]:
    """What bit-exactness depends on besides the files."""
    versions = {name: metadata.version(name) for name in ("mlsae", "torch", "transformers")}
    return {"python": platform.python_version(), **versions, "threads": torch.get_num_threads()}
