"""A run directory's checkpoints: exact, found out when damaged, old or new at every crash point, held by one process."""

import contextlib
import errno
import json
import logging
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

from mlsae import checkpoint as module
from mlsae import files
from mlsae.checkpoint import PARTS, Checkpoint, RunDirectory
from mlsae.errors import NumericsError, ResourceError

torch.set_num_threads(1)
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
    folder = start(resume=True).steps()[0]
    good = (folder / "manifest.json").read_bytes()
    for place in range(len(good)):
        for bit in range(8):
            bad = bytearray(good)
            bad[place] ^= 1 << bit
            (folder / "manifest.json").write_bytes(bad)
            with pytest.raises((ResourceError, module.ConfigError)):
                module._check_manifest(folder)
    (folder / "manifest.json").write_bytes(good)
    module._check_manifest(folder)


@pytest.mark.parametrize("seed", range(2))
def test_damage_is_found_and_the_previous_checkpoint_used(start, caplog, seed):
    """100 bit flips and 100 truncations; each time the warning names the file, and the damaged folder steps aside."""
    run, draw = start(), random.Random(seed)
    run.save(make(1), keep=2)
    run.save(make(2), keep=2)
    good, newest = run.path.with_name("good"), run.steps()[1]
    shutil.copytree(newest, good)
    for trial in range(100):
        name = PARTS[trial % len(PARTS)]
        data = bytearray((newest / name).read_bytes())
        place = draw.randrange(len(data))
        if seed:
            del data[place:]
        else:
            data[place] ^= 1 << draw.randrange(8)
        (newest / name).write_bytes(data)
        caplog.clear()
        assert same(run.load(), make(1))
        assert [r.levelname for r in caplog.records] == ["WARNING"]
        assert all(part in caplog.text for part in (newest.name, name, "using step-00000001"))
        assert [p.name for p in run.steps()] == ["step-00000001"]
        assert (run.path / "damaged-step-00000002" / name).read_bytes() == data
        shutil.copytree(good, newest)
    assert same(run.load(), make(2))


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
    assert "step-00000002 line 1, column 2: not JSON" in str(caught.value)
    assert len(run.steps()) == 2


def rewrite_manifest(folder, **changes):
    """A manifest of other fields with a true digest, as another version of the software would write it."""
    fields = json.loads((folder / "manifest.json").read_text())
    del fields["sha256"]
    fields |= changes
    (folder / "manifest.json").write_text(files.canonical_json({**fields, "sha256": module._digest(fields)}))


def test_a_newer_format_is_refused(start):
    run = start()
    run.save(make(1), keep=2)
    rewrite_manifest(run.steps()[0], format_version=3)
    with pytest.raises(ResourceError, match="has format 3; this version reads up to 1"):
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


# ---- crash points ----------------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """The process ends here."""


class Disk:
    """Counts what changes the disk, and refuses from the n-th call on: for good (a crash, a full disk) or once."""

    CALLS = ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir")

    def __init__(self, monkeypatch, error, *, once, calls=CALLS):
        self.count, self.at, self.error, self.once = 0, 0, error, once
        for name in calls:
            real = getattr(os, name) if name != "fsync" else lambda descriptor: None  # slow, and nothing is lost here
            monkeypatch.setattr(os, name, self._counted(real))
        monkeypatch.setattr("builtins.open", self._counted(open, writes=lambda *a, **k: a[1:] and "r" not in a[1]))

    def _counted(self, real, writes=lambda *a, **k: True):
        def call(*arguments, **options):
            if writes(*arguments, **options):
                self.count += 1
                if self.at and (self.count == self.at or (self.count > self.at and not self.once)):
                    raise self.error
            return real(*arguments, **options)

        return call


FAILURES = [
    Stopped(),
    OSError(errno.ENOSPC, "No space left"),
    OSError(errno.EIO, "I/O error"),
    OSError(errno.EROFS, "Read-only"),
]


@pytest.fixture
def failing_save(start, tmp_path, monkeypatch):
    """A function that yields, for every n, (run, error) after a save of step 3 whose n-th disk call was refused."""

    def attempt(failure, *, once, at):
        start(name="other")  # gives the last one up
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        run = start()
        run.save(make(1), keep=2)
        run.save(make(2), keep=2)
        error = None
        with monkeypatch.context() as patch:
            disk = Disk(patch, failure, once=once)
            disk.at = at
            try:
                run.save(make(3), keep=2)
            except BaseException as caught:
                error = caught
            disk.at = 0
        return run, error, disk.count

    def every(failure, *, once):
        n_calls = attempt(failure, once=once, at=0)[2]
        assert n_calls > 15
        for at in range(1, n_calls + 1):
            yield attempt(failure, once=once, at=at)[:2]

    return every


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("failure", FAILURES[:2], ids=["crash", "disk full"])
def test_a_save_that_stops_at_any_call_is_old_or_new(start, failing_save, failure, once):
    """Every mutating call of a save with rotation, refused once or from then on. The next start then loads and saves."""
    new = 0
    for run, _ in failing_save(failure, once=once):
        run = start(resume=True)
        assert not list(run.path.glob(".t*-*"))
        loaded = run.load()
        assert same(loaded, make(3) if (run.path / "step-00000003").exists() else make(2))
        assert not list(run.path.glob("damaged-*"))
        new += loaded.step == 3
        run.save(make(4), keep=2)
        assert same(run.load(), make(4))
        assert len(run.steps()) == 2
    assert 0 < new < 15


def test_the_only_checkpoint_saved_again_is_never_lost(start, tmp_path, monkeypatch):
    """As when a step is not finite and the state before it was saved already: a crash must leave one of the two."""
    lost = []
    for at in range(1, 40):
        start(name="other")
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        run = start()
        run.save(make(1), keep=2)
        with monkeypatch.context() as patch:
            disk = Disk(patch, Stopped(), once=False)
            disk.at = at
            with contextlib.suppress(Stopped):
                run.save(make(1), keep=2)
            disk.at = 0
        try:
            assert same(start(resume=True).load(), make(1))
        except ResourceError as error:
            lost.append((at, str(error)))
    assert lost == []


@pytest.mark.parametrize("failure", FAILURES[1:3], ids=lambda e: e.strerror)
def test_a_save_that_fails_says_so_in_words(failing_save, failure):
    """P5: wherever in a save the disk refuses, it is a ResourceError (exit 4), or step 3 is there all the same."""
    raw = []
    for at, (run, error) in enumerate(failing_save(failure, once=False), 1):
        if error is None:
            assert same(run.load(), make(3))
        elif not isinstance(error, ResourceError):
            raw.append((at, error))
    assert raw == []


def test_a_failed_save_leaves_exactly_the_old_files_at_once(failing_save):
    """Before any sweep: the process that failed cleans up behind itself, and its next save works."""
    for run, error in failing_save(OSError(errno.ENOSPC, "No space left"), once=True):
        if not (run.path / "step-00000003").exists():
            assert isinstance(error, ResourceError)
            assert sorted(p.name for p in run.path.iterdir()) == [
                "config.json",
                "run.lock",
                "step-00000001",
                "step-00000002",
            ]
            run.save(make(3), keep=2)
        assert same(run.load(), make(3))


def test_a_start_that_fails_at_any_call_leaves_no_trace(tmp_path, monkeypatch):
    def attempt(at):
        error = None
        with monkeypatch.context() as patch:
            disk = Disk(patch, FAILURES[1], once=True, calls=("rename", "replace", "fsync", "mkdir"))
            disk.at = at
            try:
                run = RunDirectory(tmp_path / "run", CONFIG, resume=False)
            except (ResourceError, OSError) as caught:
                error = caught
            disk.at = 0
        left = sorted(p.name for p in tmp_path.rglob("*"))
        if error is None:
            run.close()
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return error, left, disk.count

    n_calls = attempt(0)[2]
    tries = [attempt(at)[:2] for at in range(1, n_calls + 1)]
    assert [error for error, _ in tries if not isinstance(error, ResourceError | None)] == []
    assert [left for error, left in tries if error is not None and left] == []


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
    """P11: one runs; every other is told who holds the directory. Repeated, as the harm is in the timing."""
    complaints, holders = set(), []
    for trial in range(10):
        path, gate = tmp_path / f"run{trial}", os.pipe()
        out = os.pipe()
        children = []
        for _ in range(8):
            if (child := os.fork()) == 0:
                os.close(gate[1])
                os.read(gate[0], 1)  # until the parent closes its end
                try:
                    held = RunDirectory(path, CONFIG, resume=False)  # kept: the lock goes with the object
                    assert held.lock
                    os.write(out[1], b"held\n")
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
        holders.append(lines.count("held"))
        complaints |= {line.split(" by ")[0] for line in lines if line != "held"}
        RunDirectory(path, CONFIG, resume=False).close()  # at once, though its holder was killed
    assert (holders, complaints) == ([1] * 10, {"in use"})


def test_a_log_line_says_that_a_checkpoint_is_verified(start, caplog):
    with caplog.at_level(logging.INFO, "mlsae"):
        start().save(make(7), keep=2)
    assert "checkpoint step 7 verified" in caplog.text


def test_the_folder_of_a_checkpoint_holds_no_code(start):
    """Safetensors and JSON only: nothing in a checkpoint can run."""
    run = start()
    run.save(make(1), keep=2)
    assert {p.name for p in Path(run.steps()[0]).iterdir()} == {*PARTS, "manifest.json"}
