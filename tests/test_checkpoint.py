"""A run directory's checkpoints: exact, found out when damaged, old or new at every crash point, held by one process."""

import contextlib
import errno
import json
import logging
import os
import random
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass
from math import inf
from pathlib import Path

import pytest
import torch

from mlsae import checkpoint as module
from mlsae import files
from mlsae.checkpoint import Checkpoint, RunDirectory
from mlsae.config import MLSAEConfig
from mlsae.errors import MlsaeError, NumericsError, ResourceError
from mlsae.manifest import file_names
from mlsae.sae import MLSAE

torch.set_num_threads(1)
PARTS = file_names(1)
CONFIG = {"lm": "tiny", "k": 4, "layers": [0, 1], "lr": 2e-4, "limit": float("inf"), "out": "here"}


def make(step):
    """A checkpoint that differs from every other step's."""
    return Checkpoint(
        step,
        {"W_enc": torch.full((3, 2), float(step)), "norm_limit": torch.tensor([torch.inf, 3.0])},
        {
            "quiet": torch.arange(4) + step,
            "rng.torch": torch.arange(8, dtype=torch.uint8),
            "adam.step": torch.tensor(0.5),
        },
        {"position": 10 * step, "metrics_bytes": 7},
    )


def same(a, b):
    return (a.step, a.info) == (b.step, b.info) and same_tensors(a.sae, b.sae) and same_tensors(a.state, b.state)


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.fixture
def start(tmp_path):
    """A function that opens the run directory `run`; whatever is open is closed at the end."""
    opened = []

    def close_all():
        while opened:
            run = opened.pop()
            try:
                run.close()
            finally:
                run.lock.release()

    def call(resume=False, config=CONFIG, name="run"):
        close_all()
        run = RunDirectory(tmp_path / name, config, resume=resume)
        opened.append(run)
        return run

    yield call
    close_all()


def visible(folder):
    """What a later start sees: every file but the lock and what it would sweep."""
    paths = (p for p in folder.rglob("*") if p.is_file() and p.name != "run.lock")
    return {
        str(n): p.read_bytes() for p in paths if not str(n := p.relative_to(folder)).startswith((".tmp-", ".trash-"))
    }


# ---- what is kept --------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_exactly(start):
    start().save(make(5), keep=2)
    assert same(start(resume=True).load(), make(5))


def test_tensors_of_every_kind_and_any_stride_come_back(start):
    dtypes = (torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.uint8, torch.bool)
    odd = {str(dtype): torch.arange(6).to(dtype).reshape(2, 3).T for dtype in dtypes} | {"scalar": torch.tensor(2.5)}
    odd["empty"] = torch.empty(0, 4)
    start().save(Checkpoint(1, {}, odd, {"text": "naïve 🙂", "none": None, "float": 0.1}), keep=2)
    loaded = start(resume=True).load()
    assert same_tensors(loaded.state, odd)
    assert loaded.info == {"text": "naïve 🙂", "none": None, "float": 0.1}


def test_the_newest_are_kept(start):
    run = start()
    for step in (1, 2, 10, 9_999_999, 123_456_789):
        run.save(make(step), keep=3)
        assert same(run.load(), make(step))
    assert [int(p.name[5:]) for p in run.steps()] == [10, 9_999_999, 123_456_789]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["sae", "state"])
def test_a_tensor_that_is_not_finite_is_refused_and_nothing_written(start, tmp_path, value, part):
    run = start()
    run.save(make(1), keep=2)
    before, bad = visible(tmp_path), make(2)
    getattr(bad, part)["bad"] = torch.tensor([1.0, value])
    with pytest.raises(NumericsError, match="bad: not finite at step 2"):
        run.save(bad, keep=2)
    assert visible(tmp_path) == before


@pytest.mark.parametrize("value", [float("nan"), -float("inf"), 0.0])
def test_a_norm_limit_may_be_infinite_but_nothing_else_odd(start, value):
    bad = make(1)
    bad.sae["norm_limit"] = torch.tensor([1.0, value])
    with pytest.raises(NumericsError, match="norm_limit"):
        start().save(bad, keep=2)


# ---- damage --------------------------------------------------------------------------------------------------------


def test_every_single_bit_flip_of_a_manifest_is_found(start):
    start().save(make(5), keep=2)
    run = start(resume=True)
    manifest = run.steps()[0] / "manifest.json"
    good = manifest.read_bytes()
    for place in range(len(good)):
        for bit in range(8):
            bad = bytearray(good)
            bad[place] ^= 1 << bit
            manifest.write_bytes(bad)
            with pytest.raises(ResourceError, match="no checkpoint can be used"):
                run.load()
    manifest.write_bytes(good)
    assert same(run.load(), make(5))


def flip(data, draw):
    place = draw.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]


def truncate(data, draw):
    return data[: draw.randrange(len(data))]


def unfound(damage, folder, *, trials):
    """Damage one file of the newest of two checkpoints, again and again; gives (trial, file, what went wrong) of each failure.

    Found means: the one before is used, one warning names the file and the checkpoints, and the damaged one steps aside.
    """
    run, draw, warnings = RunDirectory(folder / "run", CONFIG, resume=False), random.Random(0), []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: warnings.append(record.getMessage())
    run.save(make(1), keep=2)
    run.save(make(2), keep=2)
    newest, aside = run.path / "step-00000002", run.path / "damaged-step-00000002"
    shutil.copytree(newest, folder / "good")
    module.log.addHandler(listener)
    try:
        for trial in range(trials):
            name = (*PARTS, "manifest.json")[trial % 4]
            data = damage((newest / name).read_bytes(), draw)
            (newest / name).write_bytes(data)
            warnings.clear()
            loaded = run.load()
            told = len(warnings) == 1 and all(w in warnings[0] for w in (newest.name, name, "using step-00000001"))
            kept = run.steps() == [run.path / "step-00000001"] and (aside / name).read_bytes() == data
            if not (same(loaded, make(1)) and told and kept):
                yield trial, name, f"step {loaded.step} used; {warnings}"
            shutil.rmtree(newest, ignore_errors=True)
            shutil.copytree(folder / "good", newest)
        assert same(run.load(), make(2))
    finally:
        module.log.removeHandler(listener)
        run.close()


@pytest.mark.parametrize("trials", [100, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("damage", [flip, truncate])
def test_damage_is_found_and_the_previous_checkpoint_used(tmp_path, damage, trials):
    assert list(unfound(damage, tmp_path, trials=trials)) == []


def test_a_damaged_checkpoint_does_not_block_the_save_that_reaches_its_step_again(start):
    run = start()
    for step in (1, 2):
        run.save(make(step), keep=2)
    for _ in range(2):
        (run.path / "step-00000002" / "state.json").write_text("{}")
        assert same(run.load(), make(1))
        run.save(make(2), keep=2)
        assert same(run.load(), make(2))


@pytest.mark.parametrize("name", [*PARTS, "manifest.json"])
def test_a_missing_file_is_damage(start, name):
    run = start()
    run.save(make(1), keep=2)
    run.save(make(2), keep=2)
    (run.path / "step-00000002" / name).unlink()
    assert same(run.load(), make(1))


def test_files_of_two_checkpoints_are_not_mixed(start):
    """Each file is whole and the right size, but not of this step."""
    run = start()
    run.save(make(1), keep=2)
    run.save(make(2), keep=2)
    shutil.copy(run.path / "step-00000001" / "state.safetensors", run.path / "step-00000002")
    assert same(run.load(), make(1))


def test_when_all_are_damaged_each_is_listed_and_none_is_moved(start):
    run = start()
    run.save(make(1), keep=2)
    run.save(make(2), keep=2)
    (run.path / "step-00000001" / "sae.safetensors").write_bytes(b"")
    (run.path / "step-00000002" / "manifest.json").write_text("{")
    with pytest.raises(ResourceError) as caught:
        run.load()
    assert "step-00000001 failed its size check (sae.safetensors)" in str(caught.value)
    assert "step-00000002 failed its checksum (manifest.json: line 1, column 2: not JSON" in str(caught.value)
    assert len(run.steps()) == 2


def rewrite_manifest(folder, **changes):
    """A manifest of other fields with a true digest, as another version of the software would write it."""
    fields = json.loads((folder / "manifest.json").read_text())
    del fields["sha256"]
    fields |= changes
    files.write_sealed(folder / "manifest.json", fields)


def test_a_newer_format_is_refused(start):
    run = start()
    run.save(make(1), keep=2)
    rewrite_manifest(run.steps()[0], format_version=3)
    with pytest.raises(ResourceError, match="format 3; this version reads up to 2"):
        run.load()


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        "{}",
        "3",
        '{"format_version": "1"}',
        '{"format_version": null}',
        '{"step": NaN}',
        "[" * 500 + "]" * 500,
    ],
)
def test_a_manifest_that_is_something_else_is_damage(start, text):
    run = start()
    run.save(make(1), keep=2)
    run.save(make(2), keep=2)
    (run.path / "step-00000002" / "manifest.json").write_text(text)
    assert same(run.load(), make(1))


def test_a_disk_that_cannot_read_one_checkpoint_still_gives_the_one_before(start, monkeypatch):
    run = start()
    run.save(make(1), keep=2)
    run.save(make(2), keep=2)
    real = files.sha256

    def sha256(path):
        if path.parent.name == "step-00000002":
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(files, "sha256", sha256)
    assert same(run.load(), make(1))


def test_a_copy_that_a_user_made_beside_the_checkpoints_is_left_alone(start):
    run = start()
    run.save(make(1), keep=2)
    shutil.copytree(run.path / "step-00000001", run.path / "step-00000001.bak")
    run.save(make(2), keep=2)
    assert same(run.load(), make(2))


def test_another_environment_is_announced(start, caplog, monkeypatch):
    start().save(make(1), keep=2)
    run = start(resume=True)
    run.load()
    assert not caplog.records
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    run.load()
    assert "resuming with threads 1 -> 7: bit-exactness is not promised" in caplog.text


def test_a_later_version_with_keys_more_goes_on(start):
    """Row 43: a new key whose default is None says nothing that the run did not."""
    start().save(make(1), keep=2)
    assert same(start(resume=True, config=CONFIG | {"new": None}).load(), make(1))
    with pytest.raises(ResourceError, match="new None -> 3"):
        start(resume=True, config=CONFIG | {"new": 3})


# ---- crash points ----------------------------------------------------------------------------------------------------


RENAMES = ("rename", "replace")
FAILURES = {"end of process": None} | {name: getattr(errno, name) for name in ("ENOSPC", "EIO", "EROFS", "EDQUOT")}


class Stopped(BaseException):
    """The process ends here."""


@contextlib.contextmanager
def watching(tell):
    """Calls `tell(name, path, more)` before every call that changes the disk; more is a rename's target or a write's bytes."""

    def place(path, folder=None):
        if isinstance(path, int):
            return Path(os.readlink(f"/proc/self/fd/{path}"))
        return Path(path) if folder is None else place(folder) / path

    def told(name, real):
        def call(path, *more, **options):
            tell(name, place(path, options.get("dir_fd")), Path(more[0]) if name in RENAMES else None)
            return real(path, *more, **options)

        return call

    class File:
        """A file open for writing. A write that is refused leaves half of its bytes."""

        def __init__(self, file):
            self._file, self._path = file, Path(file.name)

        def write(self, data):
            raw = data.encode() if isinstance(data, str) else bytes(data)
            try:
                tell("write", self._path, raw)
            except BaseException:
                self._file.write(data[: len(data) // 2])
                raise
            return self._file.write(data)

        def flush(self):
            tell("flush", self._path, None)
            self._file.flush()

        def truncate(self, size=None):
            tell("truncate", self._path, size)
            return self._file.truncate(size)

        def __getattr__(self, name):
            return getattr(self._file, name)

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self._file.close()

    def opened(path, mode="r", *more, real=open, **options):
        if "r" in mode:
            return real(path, mode, *more, **options)
        tell("open", Path(path), None)
        return File(real(path, mode, *more, **options))

    with pytest.MonkeyPatch.context() as patch:
        for name in (*RENAMES, "mkdir", "unlink", "rmdir"):
            patch.setattr(os, name, told(name, getattr(os, name)))
        patch.setattr(os, "fsync", told("fsync", lambda _: None))  # slow, and nothing is lost here
        patch.setattr("builtins.open", opened)
        patch.setattr(time, "sleep", lambda _: None)  # between attempts on a full disk
        yield


class Disk:
    """Refuses the n-th call that changes it, or with `once` unset every call from then on; counts them all."""

    def __init__(self, failure, *, at=inf, once=True):
        self.failure, self.at, self.once, self.count = failure, at, once, 0

    def __call__(self, name, path, more):
        self.count += 1
        if self.count == self.at or (self.count > self.at and not self.once):
            raise Stopped if self.failure is None else OSError(self.failure, os.strerror(self.failure))


# What is written, how it is read back, and whether it may be refused when half done. Each is told which value to write.


def write_checkpoint(folder, n, watched=contextlib.nullcontext):
    run = RunDirectory(folder / "run", CONFIG, resume=n > 1)
    try:
        with watched():
            run.save(make(n), keep=2)
    finally:
        run.lock.release()


def read_checkpoint(folder):
    run = RunDirectory(folder / "run", CONFIG, resume=True)
    try:
        loaded = run.load()
    finally:
        run.lock.release()
    assert same(loaded, make(loaded.step))
    return loaded.step


def write_file(folder, n, watched=contextlib.nullcontext):
    with watched():
        files.write_bytes(folder / "file", bytes([n]) * 100 * n)


def read_file(folder):
    data = (folder / "file").read_bytes()
    assert data == bytes([data[0]]) * 100 * data[0]
    return data[0]


def write_sae(folder, n, watched=contextlib.nullcontext, k=lambda n: 2):
    sae = MLSAE(MLSAEConfig(d_model=2, n_latents=8, k=k(n), layers=(0, 1)))
    torch.nn.init.constant_(sae.W_enc, n)
    with watched():
        sae.save_pretrained(folder / "sae")


def write_other_sae(folder, n, watched=contextlib.nullcontext):
    write_sae(folder, n, watched, k=lambda n: n)


def read_sae(folder):
    sae = MLSAE.from_pretrained(folder / "sae")
    n = int(sae.W_enc[0, 0])
    assert (sae.W_enc == n).all()
    assert sae.config.k in (2, n)
    return n


def read_other_sae(folder):
    n = read_sae(folder)
    assert MLSAE.from_pretrained(folder / "sae").config.k == n
    return n


SUBJECTS = {
    "checkpoint": (write_checkpoint, read_checkpoint, False),
    "file": (write_file, read_file, False),
    "sae": (write_sae, read_sae, False),
    "sae of another config": (write_other_sae, read_other_sae, True),
}


def outcome(read, folder):
    """What a reader finds: the number of the value; or in our words why it is refused; or what it stumbled over."""
    try:
        return read(folder)
    except MlsaeError as error:
        return str(error)
    except Exception as error:
        return error


def attempts(write, folder, failure, *, once):
    """With 1 and 2 written, write 3 and have the n-th call refused, for every n: (error, the folder as it is left)."""
    for n in (1, 2):
        write(folder / "old", n)
    disk = Disk(failure)
    shutil.copytree(folder / "old", folder / "whole")
    write(folder / "whole", 3, lambda: watching(disk))
    for at in range(1, disk.count + 1):
        there, error = folder / str(at), None
        shutil.copytree(folder / "old", there)
        try:
            write(there, 3, lambda at=at: watching(Disk(failure, at=at, once=once)))
        except (Exception, Stopped) as caught:
            error = caught
        yield error, there
        shutil.rmtree(there)


def refused(subject, failure, folder, *, once):
    """Refuse every call of a write by turns: (what a later start finds, what is wrong with that or with what came after)."""
    write, read, may_refuse = SUBJECTS[subject]
    for error, there in attempts(write, folder, FAILURES[failure], once=once):
        found, wrong = outcome(read, there), []
        if error is not None and not isinstance(error, ResourceError if FAILURES[failure] else Stopped):
            wrong.append(f"the writer was told {error!r}")
        if found not in ((2, 3) if error else (3,)) and not (error and may_refuse and isinstance(found, str)):
            wrong.append(f"{found} was found")
        write(there, 4)
        left = [p.name for p in there.rglob("*") if p.name.startswith((".tmp-", ".trash-", "damaged-"))]
        if left or outcome(read, there) != 4:
            wrong.append(f"the next write left {left}")
        yield found, wrong


@pytest.fixture(autouse=True)
def _no_real_sync(monkeypatch):
    """Nothing here survives a power cut; `watching` sees every call all the same."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("once", [False, True], ids=["for good", "once"])
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_write_refused_at_any_call_leaves_old_or_new(tmp_path, subject, failure, once):
    """The writer is told in a ResourceError; a later start finds one or the other, never a mix, and can write again."""
    outcomes = list(refused(subject, failure, tmp_path, once=once))
    assert [wrong for _, wrong in outcomes if wrong] == []
    found = [what for what, _ in outcomes]
    assert 3 in found
    assert 2 in found or (once and failure in ("ENOSPC", "EDQUOT")), "on a full disk it is tried again"
    assert len(found) > {"checkpoint": 40, "file": 6}.get(subject, 12)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_save_that_fails_cleans_up_behind_itself(tmp_path):
    """Before any sweep, the old or the new are left; both, if all that failed was to make sure of the new."""
    old, new = {"step-00000001", "step-00000002"}, {"step-00000002", "step-00000003"}
    for error, folder in attempts(write_checkpoint, tmp_path, FAILURES["EIO"], once=True):
        left = {p.name for p in (folder / "run").iterdir() if not p.name.startswith(".trash-")}
        assert left - {"config.json", "run.lock"} in ([old, new, old | new] if error else [new])


def test_a_checkpoint_that_stands_is_not_written_again(start):
    """As when a step is not finite and the state before it was saved already: a crash could cost the only one."""
    run, calls = start(), []
    run.save(make(1), keep=2)
    with watching(lambda *call: calls.append(call)):
        run.save(make(1), keep=2)
    assert calls == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("failure", [name for name in FAILURES if FAILURES[name]])
def test_a_start_that_fails_at_any_call_leaves_no_trace(tmp_path, failure):
    """Unless it is the cleaning up that fails."""

    def attempt(at):
        disk, told = Disk(FAILURES[failure], at=at), "nothing"
        try:
            with watching(lambda name, *more: name in ("unlink", "rmdir") or disk(name, *more)):
                run = RunDirectory(tmp_path / "run", CONFIG, resume=False)
            run.close()
        except (ResourceError, OSError) as error:
            told = type(error).__name__
        left = [p.name for p in tmp_path.rglob("*")]
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return disk.count, (told, left)

    tries = [attempt(at)[1] for at in range(1, attempt(inf)[0] + 1)]
    assert len(tries) > 10
    assert [found for found in tries if found not in (("nothing", []), ("ResourceError", []))] == []
    assert ("ResourceError", []) in tries


# ---- what a crash of the machine may leave -----------------------------------------------------------------------------


@dataclass(eq=False)
class Change:
    """Bytes more in a file, or names of a folder that stand for something else now."""

    node: int
    what: bytes | dict[str, int | None]
    made: int
    """Number of the call that made it."""
    durable: float = inf
    """Number of the call that synced its file or folder."""


class Journal:
    """What was asked of the disk, call by call, and every state in which a crash of the machine may leave it.

    Only a sync makes the bytes of a file, or the names in a folder, durable. Any other change may be lost, whatever came later.
    """

    def __init__(self, root):
        self.root, self.calls, self.changes, self.folders = root, 0, [], {0: {}}
        for path in sorted(root.rglob("*")):
            self("mkdir" if path.is_dir() else "open", path, None)
            if path.is_file():
                self("write", path, path.read_bytes())
        self.calls = 0
        for change in self.changes:
            change.made = change.durable = 0

    def __call__(self, name, path, more):
        self.calls += 1
        node, parent = self._node(path), self._node(path.parent)
        if name == "fsync":
            for change in self.changes:
                if change.node == node:
                    change.durable = min(change.durable, self.calls)
        elif name == "write":
            self._change(node, more)
        elif name == "open" or (name == "mkdir" and node is None):
            new = len(self.changes) + 1
            self._change(parent, {path.name: new})
            if name == "mkdir":
                self.folders[new] = {}
        elif name in RENAMES:
            assert path.parent == more.parent
            self._change(parent, {path.name: None, more.name: node})
        elif name in ("unlink", "rmdir"):
            self._change(parent, {path.name: None})
        else:
            assert name in ("mkdir", "flush"), name

    def _node(self, path):
        node = 0
        for name in path.relative_to(self.root).parts if path != self.root.parent else ():
            node = self.folders[node].get(name)
        return node

    def _change(self, node, what):
        self.changes.append(Change(node, what, self.calls))
        if node in self.folders:
            self.folders[node].update(what)

    def crashes(self):
        """(calls made, files left) of a crash after every call that loses nothing, all that was not synced, one change of
        that, or all of it but one change."""
        for calls in range(self.calls + 1):
            made = [change for change in self.changes if change.made <= calls]
            loose = [change for change in made if change.durable > calls]
            for lost in ([], loose, *([c] for c in loose), *([c for c in loose if c is not kept] for kept in loose)):
                yield calls, self._files([change for change in made if change not in lost])

    def _files(self, changes):
        contents = {}
        for change in changes:
            if isinstance(change.what, bytes):
                contents[change.node] = contents.get(change.node, b"") + change.what
            else:
                contents[change.node] = contents.get(change.node, {}) | change.what

        def walk(node, place):
            for name, child in contents.get(node, {}).items():
                if child in self.folders:
                    yield place / name, None
                    yield from walk(child, place / name)
                elif child is not None:
                    yield place / name, contents.get(child, b"")

        return tuple(sorted(walk(0, Path())))


def replay(subject, folder):
    """With 1 and 2 written, write 3 and 4; for every crash: (what a reader finds, whether that is right).

    Right is what was last reported as written or, while the next is being written, that.
    """
    write, read, may_refuse = SUBJECTS[subject]
    for n in (1, 2):
        write(folder / "disk", n)
    journal, reported, known = Journal(folder / "disk"), {0: 2}, {}
    for n in (3, 4):
        write(folder / "disk", n, lambda: watching(journal))
        reported[journal.calls] = n
    for calls, left in journal.crashes():
        if left not in known:
            (folder / "crashed").mkdir()
            for name, data in left:
                path = folder / "crashed" / name
                path.mkdir() if data is None else path.write_bytes(data)
            known[left] = outcome(read, folder / "crashed")
            shutil.rmtree(folder / "crashed")
        found, writing = known[left], calls not in reported
        done = max(n for at, n in reported.items() if at <= calls)
        yield found, found == done or (writing and (found == done + 1 or (may_refuse and isinstance(found, str))))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("subject", SUBJECTS)
def test_what_a_crash_of_the_machine_leaves_is_old_or_new(tmp_path, subject):
    """And never what was there before something that was reported as written."""
    outcomes = list(replay(subject, tmp_path))
    assert [found for found, right in outcomes if not right] == []
    assert {2, 3, 4} <= {found for found, _ in outcomes}
    assert len(outcomes) > {"checkpoint": 1000, "file": 50}.get(subject, 100)


UNSYNCED = {
    "no folder": lambda path: True,
    "not the run directory": lambda path: path.name == "run",
    "not the staged folder": lambda path: path.name.startswith(".tmp-"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("left_out", UNSYNCED)
def test_the_replay_finds_saves_that_a_missing_sync_would_lose(tmp_path, monkeypatch, left_out):
    real = files.sync_directory
    monkeypatch.setattr(files, "sync_directory", lambda path: None if UNSYNCED[left_out](path) else real(path))
    assert [right for _, right in replay("checkpoint", tmp_path)].count(False) > 10


# ---- whose directory it is -------------------------------------------------------------------------------------------


def test_a_directory_of_another_config_is_refused_naming_each_key(start, tmp_path):
    start().save(make(1), keep=2)
    before = visible(tmp_path)
    for resume in (False, True):
        with pytest.raises(ResourceError, match=r"k 4 -> 8, lr 0.0002 -> 0.1, new None -> 3\); choose another --out"):
            start(resume=resume, config={**CONFIG, "k": 8, "lr": 0.1, "new": 3})
    assert visible(tmp_path) == before


def test_a_key_that_is_gone_is_a_changed_config(start):
    start().save(make(1), keep=2)
    with pytest.raises(ResourceError, match="k 4 -> None"):
        start(resume=True, config={key: value for key, value in CONFIG.items() if key != "k"})


def test_a_moved_directory_is_the_same_run(start, tmp_path):
    start().save(make(1), keep=2)
    start(name="other")  # gives the first one up
    (tmp_path / "run").rename(tmp_path / "moved")
    assert same(start(resume=True, config={**CONFIG, "out": "there"}, name="moved").load(), make(1))


def test_a_start_over_a_run_is_refused(start, tmp_path):
    start().save(make(1), keep=2)
    before = visible(tmp_path)
    with pytest.raises(ResourceError, match="holds this run already; add --resume"):
        start()
    assert visible(tmp_path) == before


@pytest.mark.parametrize("exists", [False, True])
def test_nothing_to_resume(start, tmp_path, exists):
    if exists:
        (tmp_path / "run").mkdir()
    with pytest.raises(ResourceError, match="no checkpoint in it; start without --resume"):
        start(resume=True)
    assert [p.name for p in tmp_path.rglob("*")] == ["run"] * exists


def test_a_file_is_no_run_directory(start, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ResourceError, match="is a file"):
        start()
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("name", ["run", "new/and/deep"])
def test_a_directory_nothing_was_saved_in_leaves_no_trace(tmp_path, name):
    run = RunDirectory(tmp_path / name, CONFIG, resume=False)
    assert (tmp_path / name / "config.json").exists()
    run.close()
    assert not (tmp_path / name).exists()


def test_a_folder_the_user_made_keeps_what_is_the_users(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    RunDirectory(tmp_path / "run", CONFIG, resume=False).close()
    assert visible(tmp_path) == {"run/notes.txt": b"mine"}


def test_a_directory_with_metrics_is_kept(tmp_path):
    run = RunDirectory(tmp_path / "run", CONFIG, resume=False)
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    run.close()
    assert {"run/config.json", "run/metrics.jsonl"} <= visible(tmp_path).keys()


def test_what_a_killed_process_left_is_swept_at_the_next_start(start, tmp_path):
    start().save(make(1), keep=2)
    for name in (
        ".tmp-step-00000002-77/sae.safetensors",
        ".trash-step-00000000-77/a",
        ".tmp-config.json-77",
        "sae/.tmp-a-77",
    ):
        files.write_text(tmp_path / "run" / name, "half")
    start(resume=True)
    assert [p.name for p in (tmp_path / "run").rglob(".t*")] == []


# ---- one writer ------------------------------------------------------------------------------------------------------


def test_a_second_run_directory_is_refused_and_changes_nothing(start, tmp_path):
    start().save(make(1), keep=2)
    files.write_text(tmp_path / "run" / ".tmp-step-00000002-1" / "a", "the first one's work")
    for resume in (False, True):
        with pytest.raises(ResourceError, match=f"in use by pid {os.getpid()} on"):
            RunDirectory(tmp_path / "run", CONFIG, resume=resume)
    assert (tmp_path / "run" / ".tmp-step-00000002-1" / "a").exists()


def test_simultaneous_starts_give_one_writer(tmp_path):
    """One of 50 runs; every other is told who holds the directory. Repeated, as the harm is in the timing."""
    host, strangers = socket.gethostname(), []
    for trial in range(4):
        path, gate = tmp_path / f"run{trial}", os.pipe()
        out = os.pipe()
        children = []
        for _ in range(50):
            if (child := os.fork()) == 0:
                socket.gethostname = lambda: time.sleep(0.05) or host  # whoever has the lock is slow to say its name
                os.close(gate[1])
                os.read(gate[0], 1)  # until the parent closes its end
                try:
                    held = RunDirectory(path, CONFIG, resume=False)  # kept: the lock goes with the object
                    assert held.lock
                    os.write(out[1], f"in use by pid {os.getpid()} on {host} held\n".encode())
                except ResourceError as error:
                    os.write(out[1], error.problem.replace("\n", " ").encode() + b"\n")
                except BaseException as error:
                    os.write(out[1], repr(error).encode() + b"\n")
                os.close(out[0])
                while True:
                    signal.pause()  # hold whatever is held until killed
            children.append(child)
        os.close(gate[0])
        os.close(gate[1])
        said = b""
        while said.count(b"\n") < len(children):
            said += os.read(out[0], 4096)
        for child in children:
            os.kill(child, 9)
            os.waitpid(child, 0)
        os.close(out[0])
        os.close(out[1])
        lines = said.decode().splitlines()
        (holder,) = [line.removesuffix(" held") for line in lines if line.endswith(" held")]
        strangers += [line for line in lines if not line.startswith(holder)]
        RunDirectory(path, CONFIG, resume=False).close()  # at once, though its holder was killed
    assert strangers == []


def test_a_log_line_says_that_a_checkpoint_is_verified(start, caplog):
    with caplog.at_level(logging.INFO, "mlsae"):
        start().save(make(7), keep=2)
    assert "checkpoint step 7 verified" in caplog.text


def test_the_folder_of_a_checkpoint_holds_no_code(start):
    """Safetensors and JSON only: nothing in a checkpoint can run."""
    run = start()
    run.save(make(1), keep=2)
    assert {p.name for p in Path(run.steps()[0]).iterdir()} == {*PARTS, "manifest.json"}
