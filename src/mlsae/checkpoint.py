"""A run directory: its lock, its config, and its checkpoints, each staged, checksummed and renamed once.

    RUN/config.json · metrics.jsonl · run.lock · sae/
        step-00001000/{sae.safetensors, state.safetensors, state.json, manifest.json}

Where several processes each hold some of the latents, each writes files of its own (manifest.py), and the first one the manifest
once all are there. Any layout reads any other's.

The manifest is written last, as canonical JSON with a digest of its own fields, so that a flipped bit anywhere in a
checkpoint is found; a load takes the newest checkpoint that verifies and says why it passed over the others.
"""

import contextlib
import logging
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlsae import files, fingerprint, formats, untrusted
from mlsae.errors import ConfigError, ModelError, NumericsError, ResourceError
from mlsae.formats.weights import nonfinite
from mlsae.manifest import (
    BY_LATENT,
    MANIFEST,
    STATE,
    Layout,
    Manifest,
    NewerFormat,
    described,
    environment,
    file_name,
    part_of,
    read_part,
    steps,
    verified,
)
from mlsae.mesh import ALONE, Mesh

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
        return steps(self.path)

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
                    self._seal(staged, checkpoint, self._parts(staged))
            self._finish(target, keep)

    def _write_together(self, checkpoint: Checkpoint, keep: int) -> None:
        """The same by several processes: each stages its files; when all have, the leader writes the manifest and renames."""
        target, mesh = self.path / f"step-{checkpoint.step:08d}", self.mesh
        if not mesh.by_leader(lambda: self._verifies(target)):
            with contextlib.ExitStack() as stack:
                staged = Path(mesh.by_leader(lambda: str(stack.enter_context(files.staged_directory(target)))))
                mesh.everywhere(lambda: files.on_full_disk(lambda: self._stage(staged, checkpoint)))
                parts = mesh.of_all(mesh.everywhere(lambda: self._parts(staged)))
                mesh.by_leader(lambda: self._seal(staged, checkpoint, dict(ChainMap(*parts))))
                mesh.by_leader(stack.close)
        mesh.by_leader(lambda: self._finish(target, keep))

    def _stage(self, staged: Path, checkpoint: Checkpoint) -> None:
        """Write what is this process's to write: with several dp ranks, which hold the same, the first writes."""
        for name in self._own_files():
            if name == STATE:
                files.write_text(staged / STATE, files.canonical_json(checkpoint.info))
                continue
            tensors = checkpoint.sae if name.startswith("sae") else checkpoint.state
            own = {name: t for name, t in tensors.items() if self.mesh.leads or BY_LATENT.fullmatch(name)}
            files.save_tensors(staged / name, own)

    def _own_files(self) -> list[str]:
        """What this process writes of a checkpoint, but for the manifest."""
        if self.mesh.dp_rank:
            return []
        names = [file_name(kind, self.mesh.tp_rank, self.mesh.tp) for kind in ("sae", "state")]
        return [*names, STATE] if self.mesh.leads else names

    def _parts(self, staged: Path) -> dict[str, dict[str, Any]]:
        """What the manifest says of the files that this process wrote."""
        return {name: part_of(staged / name) for name in self._own_files()}

    def _seal(self, staged: Path, checkpoint: Checkpoint, parts: Mapping[str, dict[str, Any]]) -> None:
        """Write the manifest, once all files are there."""
        device = ", ".join(sorted({str(tensor.device) for tensor in checkpoint.sae.values()}))
        digest = _config_digest(self.config)
        files.write_sealed(staged / MANIFEST, described(parts, checkpoint.step, device, digest, self.mesh.tp))

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

    def _newest(self, like: Checkpoint | None, found: list[Checkpoint]) -> tuple[str, Manifest]:
        """The name and the manifest of the checkpoint that is loaded."""
        reasons = []
        for directory in reversed(self.steps()):
            try:
                manifest = self._check(directory)
                checkpoint = self._read(directory, manifest, like)
            except NewerFormat:
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

    def _read(self, directory: Path, manifest: Manifest, like: Checkpoint | None) -> Checkpoint:
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

    def _check(self, directory: Path, *, sizes_only: bool = False) -> Manifest:
        """The manifest of a checkpoint of this config, once everything is as it was written."""
        return verified(directory, _config_digest(self.config), sizes_only=sizes_only)

    def _set_aside(self, damaged: list[Path]) -> None:
        """Rename what failed: left in place it would block the save that reaches its step again."""
        for directory in damaged:
            target = directory.with_name(f"damaged-{directory.name}")
            files.remove(target)
            files.rename(directory, target)

    def _warn_of_changes(self, manifest: Manifest) -> None:
        here, there = environment(), manifest.to_dict()
        if changed := [f"{key} {there[key]} -> {here[key]}" for key in here if there[key] != here[key]]:
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


def _read(directory: Path, manifest: Manifest, like: Checkpoint | None, layout: Layout, mesh: Mesh) -> Checkpoint:
    """The checkpoint in a folder that was checked."""
    shards = manifest.shards
    if like is None or shards == mesh.tp == 1:
        if shards > 1:
            raise ResourceError(str(directory), f"is of {shards} processes; say what is expected of it")
        kinds = (None, None) if like is None else (_kinds(like.sae), _kinds(like.state))
        names = ("sae.safetensors", "state.safetensors")
        sae, state = (untrusted.load_tensors(directory / name, kind) for name, kind in zip(names, kinds, strict=True))
    else:
        sae = read_part(directory, "sae", shards, _kinds(like.sae), layout)
        state = read_part(directory, "state", shards, _kinds(like.state), layout)
    if (name := nonfinite({**sae, **state})) is not None:
        raise ResourceError(str(directory), f"holds NaN or infinity ({name})")
    info = untrusted.read_json(directory / STATE)
    if not isinstance(info, dict):
        raise ResourceError(str(directory / STATE), "holds no mapping of keys")
    return Checkpoint(manifest.step, sae, state, info)


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of what makes two runs the same: every key but the folder's name, and None like one that there is not.

    So a run goes on with a later version, which has keys more.
    """
    values = files.finite(dict(config))
    return files.json_digest({key: value for key, value in values.items() if key != "out" and value is not None})


def export_sae(directory: Path, folder: Path, behaviour: dict[str, Any]) -> None:
    """Write the SAE of a checkpoint that was just saved into a folder of its own, never holding more than a piece of it.

    Args:
        behaviour: the part of its fingerprint that only those who have all latents at hand can tell.
    """
    manifest = verified(directory, sizes_only=True)
    config = formats.checkpoint.config_of(directory)
    with formats.checkpoint.opened(directory, manifest.shards, config) as pieces:
        shapes = formats.weights.shapes(config)
        hashes = {name: fingerprint.sha256(pieces(name)) for name in shapes}
        found = {"shapes": {name: list(shape) for name, shape in shapes.items()}, "sha256": hashes, **behaviour}
        formats.own.write_in_pieces(config, found, pieces, folder, manifest.step)
