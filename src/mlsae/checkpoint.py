"""A run directory: its lock, its config, and its checkpoints, each staged, checksummed and renamed once.

    RUN/config.json · metrics.jsonl · run.lock · sae/
        step-00001000/{sae.safetensors, state.safetensors, state.json, manifest.json}

The manifest is written last, as canonical JSON with a digest of its own fields, so that a flipped bit anywhere in a
checkpoint is found; a load takes the newest checkpoint that verifies and says why it passed over the others.
"""

import logging
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mlsae import files, untrusted
from mlsae.config import Config
from mlsae.errors import ConfigError, ModelError, NumericsError, ResourceError
from mlsae.formats.weights import nonfinite

FORMAT_VERSION = 1
PARTS = ("sae.safetensors", "state.safetensors", "state.json")

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
    files: dict[Literal["sae.safetensors", "state.safetensors", "state.json"], ManifestPart]


class _NewerFormat(ResourceError):
    """A checkpoint that a later version wrote: whole, and nothing to pass over."""


class RunDirectory:
    """One run's folder, held by one process.

    Raises ResourceError if another process holds it, if it belongs to another config, or if `resume` finds nothing to resume.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], *, resume: bool):
        self.path = path
        self.config = config
        self._made = not path.exists()
        self._claimed = False
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
        if (name := nonfinite({**checkpoint.sae, **checkpoint.state})) is not None:
            raise NumericsError(name, f"not finite at step {checkpoint.step}; the last checkpoint stands")
        files.on_full_disk(lambda: self._write(checkpoint, keep))

    def _write(self, checkpoint: Checkpoint, keep: int) -> None:
        target = self.path / f"step-{checkpoint.step:08d}"
        needed = sum(tensor.nbytes for tensor in (*checkpoint.sae.values(), *checkpoint.state.values()))
        with files.disk_errors(target, needed):
            if not self._verifies(target):
                with files.staged_directory(target) as staged:
                    files.save_tensors(staged / "sae.safetensors", checkpoint.sae)
                    files.save_tensors(staged / "state.safetensors", checkpoint.state)
                    files.write_text(staged / "state.json", files.canonical_json(checkpoint.info))
                    files.write_sealed(staged / "manifest.json", _manifest(staged, checkpoint, self.config))
            self._check(target, sizes_only=True)
            log.info("checkpoint step %d verified", checkpoint.step)
            for old in self.steps()[:-keep]:
                files.remove(old)

    def load(self, like: Checkpoint | None = None) -> Checkpoint:
        """The newest checkpoint whose every byte is as written; each one passed over is named and set aside.

        With `like`, its tensors have that one's names, shapes and dtypes.
        Raises ResourceError if none verifies: never a silent fresh start.
        """
        reasons = []
        for directory in reversed(self.steps()):
            try:
                manifest = self._check(directory)
                checkpoint = _read(directory, manifest, like)
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
            return checkpoint
        raise ResourceError(str(self.path), f"no checkpoint can be used: {'; '.join(reasons) or 'there is none'}")

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
        Manifest(**manifest)
        if manifest["files"].keys() != set(PARTS):
            raise ResourceError(str(path), f"does not name {', '.join(PARTS)}")
        if manifest["config_sha256"] != _config_digest(self.config):
            raise ResourceError(str(path), "is of a run with another config")
        for name in PARTS:
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
        metrics = self.path / "metrics.jsonl"
        stepped = self.steps() or (metrics.exists() and metrics.stat().st_size)
        if (self._made or self._claimed) and not stepped:
            for name in ("config.json", "metrics.jsonl", "run.lock") if self._claimed else ("run.lock",):
                files.remove(self.path / name)
            if self._made:
                files.remove_if_empty(self.path)
        self.lock.release()


def _manifest(directory: Path, checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "step": checkpoint.step,
        "device": ", ".join(sorted({str(tensor.device) for tensor in checkpoint.sae.values()})),
        "config_sha256": _config_digest(config),
        **_environment(),
        "files": {
            name: {"bytes": (directory / name).stat().st_size, "sha256": files.sha256(directory / name)}
            for name in PARTS
        },
    }


def _read(directory: Path, manifest: Mapping[str, Any], like: Checkpoint | None) -> Checkpoint:
    """The checkpoint in a folder that was checked."""
    kinds = (None, None) if like is None else (_kinds(like.sae), _kinds(like.state))
    sae, state = (untrusted.load_tensors(directory / name, kind) for name, kind in zip(PARTS[:2], kinds, strict=True))
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
