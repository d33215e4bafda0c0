"""The door to the disk: old or new and never a mix, and one writer."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mlsae import files, untrusted
from mlsae.errors import ResourceError

torch.set_num_threads(1)


def contents(folder):
    """Every file below a folder, hidden ones too, with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refuse_call(monkeypatch, name, code=errno.EIO, at=1):
    """Make the at-th call of `os.name` fail."""
    real, calls = getattr(os, name), []

    def call(*arguments, **options):
        calls.append(arguments)
        if len(calls) == at:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    monkeypatch.setattr(os, name, call)


# ---- tensors ---------------------------------------------------------------------------------------------------------


def tensors_of_every_kind():
    kinds = (*files.SAFETENSORS,)
    plain = {kind: torch.arange(5).to(getattr(torch, kind.removeprefix("torch."))) for kind in kinds}
    odd = {
        "scalar": torch.tensor(3),
        "none": torch.ones(0, 3),
        "turned": torch.randn(5, 7).T,
        "é": torch.randn(40)[::2],
    }
    return {**plain, **odd}


@pytest.mark.parametrize("metadata", [None, {"sae": 'x"é\n/\x1f\x7f'}])
@pytest.mark.parametrize("piece", [8, 24, 1 << 20])
def test_tensors_are_written_as_their_library_writes_them(tmp_path, monkeypatch, metadata, piece):
    """Byte for byte, however small the pieces in which they go to the disk."""
    monkeypatch.setattr(files, "PIECE_BYTES", piece)
    tensors = tensors_of_every_kind()
    files.save_tensors(tmp_path / "a", tensors, metadata)
    wanted = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    assert (tmp_path / "a").read_bytes() == wanted


def test_pieces_that_are_not_what_was_announced_leave_the_old_file(tmp_path):
    files.save_tensors(tmp_path / "a", {"x": torch.ones(3)})
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(AssertionError, match="16 bytes where 12"):
        files.save_in_pieces(tmp_path / "a", {"x": (torch.float32, (3,))}, lambda _: [torch.ones(2)] * 2)
    assert contents(tmp_path) == {"a": before}


# ---- writing -------------------------------------------------------------------------------------------------------


def test_a_write_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    for text in ("old", "naïve 🙂"):
        files.write_text(path, text)
        assert contents(tmp_path) == {"new/folder/a.txt": text.encode()}


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_a_write_that_fails_keeps_the_old_bytes(tmp_path, monkeypatch, call, code):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    refuse_call(monkeypatch, call, code)
    with pytest.raises(ResourceError, match=r"a\.txt"):
        files.write_text(path, "new")
    assert path.read_text() == "old"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_no_temporary_file(tmp_path, monkeypatch, call):
    """Outside a run directory nobody sweeps."""
    refuse_call(monkeypatch, call)
    with pytest.raises(ResourceError):
        files.write_text(tmp_path / "a.txt", "new")
    assert contents(tmp_path) == {}


def test_the_disk_fills_up_while_bytes_are_written(tmp_path):
    """A real file-size limit: the kernel itself refuses, half-way through the bytes."""
    code = f"""
import resource, signal, sys
from pathlib import Path
from mlsae import files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    files.write_bytes(Path({str(tmp_path / "a")!r}), b"new" * 1000)
except files.ResourceError as error:
    print(error)
"""
    files.write_text(tmp_path / "a", "old")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout
    assert contents(tmp_path) == {"a": b"old"}


def test_bytes_are_durable_before_their_name_is(tmp_path, monkeypatch):
    """The file is synced, then renamed, then its folder synced: in another order a crash can lose what was reported."""
    log = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (log.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (log.append("replace"), replace(a, b)))
    files.write_text(tmp_path / "a.txt", "new")
    assert log == [f".tmp-a.txt-{os.getpid()}", "replace", tmp_path.name]


def test_json_is_written_without_nan_and_keeps_its_order(tmp_path):
    files.write_json(tmp_path / "a.json", {"b": float("nan"), "a": [float("inf"), 1.5, {"c": -float("inf")}]})
    value = untrusted.read_json(tmp_path / "a.json")
    assert list(value) == ["b", "a"]
    assert value == {"b": None, "a": [None, 1.5, {"c": None}]}


def test_canonical_json_is_one_spelling():
    assert files.canonical_json({"b": 1, "a": 2}) == files.canonical_json({"a": 2, "b": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        files.canonical_json(float("nan"))


def test_a_staged_directory_appears_whole(tmp_path):
    with files.staged_directory(tmp_path / "step") as staged:
        files.write_text(staged / "sub" / "a.txt", "new")
        assert not (tmp_path / "step").exists()
    assert contents(tmp_path) == {"step/sub/a.txt": b"new"}


def test_a_staged_directory_takes_the_place_of_an_old_one(tmp_path):
    for text in ("old", "new"):
        with files.staged_directory(tmp_path / "step") as staged:
            files.write_text(staged / f"{text}.txt", text)
    assert contents(tmp_path) == {"step/new.txt": b"new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_staged_directory_that_fails_leaves_the_old_one(tmp_path, error):
    files.write_text(tmp_path / "step" / "a.txt", "old")

    def fill():
        with files.staged_directory(tmp_path / "step") as staged:
            files.write_text(staged / "a.txt", "new")
            raise error

    with pytest.raises(error):
        fill()
    assert contents(tmp_path) == {"step/a.txt": b"old"}


def test_a_staged_directory_is_synced_before_its_rename(tmp_path, monkeypatch):
    """Without the sync of the staged folder's entries, a save already reported as done can be lost."""
    log = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: (log.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd))
    )
    monkeypatch.setattr(os, "rename", lambda a, b: (log.append("rename"), rename(a, b)))
    with files.staged_directory(tmp_path / "step") as staged, files.new_file(staged / "a.bin") as file:
        file.write(b"new")
    assert log == ["a.bin", f".tmp-step-{os.getpid()}", "rename", tmp_path.name]


def test_remove_takes_files_folders_and_links_but_not_what_links_lead_to(tmp_path):
    files.write_text(tmp_path / "kept" / "a.txt", "kept")
    files.write_text(tmp_path / "folder" / "a.txt", "gone")
    files.write_text(tmp_path / "file", "gone")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "file", "link", "broken", "never there"):
        files.remove(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept"]
    assert contents(tmp_path) == {"kept/a.txt": b"kept"}


def test_sweep_removes_what_a_crash_left_and_nothing_else(tmp_path):
    for name in (".tmp-step-1/a", ".trash-step-2/b", ".tmp-config.json-3", ".hidden", "step-1/a"):
        files.write_text(tmp_path / name, name)
    files.sweep(tmp_path)
    assert set(contents(tmp_path)) == {".hidden", "step-1/a"}


def test_a_full_disk_is_said_in_words(tmp_path):
    with (
        pytest.raises(ResourceError, match=r"disk full: 12.3 MB needed, \S+ MB free; free some space") as caught,
        files.disk_errors(tmp_path, 12_345_678),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(tmp_path) in str(caught.value)
    assert caught.value.exit_code == 4


def test_other_errors_pass_through_disk_errors(tmp_path):
    with pytest.raises(ZeroDivisionError), files.disk_errors(tmp_path):
        raise ZeroDivisionError


# ---- places --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["there", "new", "new/and/deep"])
def test_a_probe_leaves_nothing_behind(tmp_path, name):
    (tmp_path / "there").mkdir()
    files.probe_writable(tmp_path / name)
    assert [p.name for p in tmp_path.rglob("*")] == ["there"]


def test_a_probe_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="Not a directory"):
        files.probe_writable(tmp_path / "file" / "run")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_probe_that_is_refused_leaves_nothing_behind(tmp_path, monkeypatch, code):
    def refuse(path, data):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(ResourceError, match=str(tmp_path)):
        files.probe_writable(tmp_path / "new" / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_too_long_is_refused_in_words(tmp_path):
    """Row 39. `Path.exists` itself raises for such a name."""
    with pytest.raises(ResourceError, match="File name too long"):
        files.probe_writable(tmp_path / ("x" * 300))


def test_free_space_of_a_folder_not_made_yet(tmp_path):
    assert files.free_bytes(tmp_path / "not" / "yet") == pytest.approx(files.free_bytes(tmp_path), rel=0.1)


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("MLSAE_CACHE", str(tmp_path))
    assert files.cache_directory() == tmp_path
    monkeypatch.setenv("MLSAE_CACHE", "")
    assert files.cache_directory() == Path.home() / ".cache" / "mlsae"


@pytest.mark.parametrize("name", ["a.txt", "sub/a.txt", "sub/../a.txt", "..a", "a..", "%2e%2e/a", r"..\a"])
def test_names_inside_a_folder(tmp_path, name):
    assert files.contained(tmp_path, name).is_relative_to(tmp_path.resolve())


@pytest.mark.parametrize("name", ["..", "../a", "sub/../../a", "/etc/passwd", "link/a", "a\0b", "../root-sibling/a"])
def test_names_that_lead_out_of_a_folder(tmp_path, name):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to("/etc")
    with pytest.raises(ResourceError, match="leads outside"):
        files.contained(root, name)


# ---- one writer ----------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from mlsae.files import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_writer_is_told_who_the_first_is_until_it_dies(tmp_path, holder):
    """The kernel frees the lock of a process killed outright: it is never stale."""
    for _ in range(2):  # a refused start must not wipe out the name either
        with pytest.raises(ResourceError, match=rf"in use by pid {holder.pid} on {os.uname().nodename} since \d\d\d\d"):
            files.RunLock(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    lock = files.RunLock(tmp_path)
    assert f"pid {os.getpid()} " in (tmp_path / "run.lock").read_text()
    lock.release()


def test_a_released_lock_is_free(tmp_path):
    for _ in range(3):
        files.RunLock(tmp_path).release()


def test_a_lock_file_removed_while_waiting_locks_nobody_out_and_lets_nobody_in(tmp_path, monkeypatch):
    """Between open and flock the holder may give up a new folder, lock file and all: a lock on the removed file is no lock."""
    first = files.RunLock(tmp_path)
    real = files.fcntl.flock

    def give_up_first(file, how):
        monkeypatch.setattr(files.fcntl, "flock", real)
        (tmp_path / "run.lock").unlink()
        first.release()
        real(file, how)

    monkeypatch.setattr(files.fcntl, "flock", give_up_first)
    held = []
    for _ in range(2):
        with contextlib.suppress(ResourceError):
            held.append(files.RunLock(tmp_path))
    for lock in held:
        lock.release()
    assert len(held) == 1


# ---- lines ---------------------------------------------------------------------------------------------------------


def test_lines_come_back_and_are_forgotten_to_a_noted_length(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = files.JsonLines(path)
    lines.append({"step": 1, "loss": float("nan")})
    length = lines.sync()
    assert length == path.stat().st_size
    lines.append({"step": 2})
    lines.truncate(length)
    lines.append({"step": 3})
    lines.close()
    assert untrusted.read_jsonl(path) == [{"step": 1, "loss": None}, {"step": 3}]


def test_lines_are_on_disk_as_soon_as_they_are_appended(tmp_path):
    lines = files.JsonLines(tmp_path / "a")
    lines.append({"step": 1})
    assert untrusted.read_jsonl(tmp_path / "a") == [{"step": 1}]
    lines.close()


def test_an_opened_file_goes_on_where_it_ended(tmp_path):
    for step in (1, 2):
        lines = files.JsonLines(tmp_path / "a")
        lines.append({"step": step})
        assert lines.sync() == (tmp_path / "a").stat().st_size
        lines.close()
    assert [line["step"] for line in untrusted.read_jsonl(tmp_path / "a")] == [1, 2]


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path):
    (tmp_path / "a").write_text('{"step": 1}\n{"st')
    assert untrusted.read_jsonl(tmp_path / "a") == [{"step": 1}]


def test_a_file_that_lost_lines_is_not_padded_with_zero_bytes(tmp_path):
    """Truncating to a noted length may not lengthen a file that was cut or deleted meanwhile."""
    lines = files.JsonLines(tmp_path / "a")
    lines.append({"step": 1})
    lines.truncate(1000)
    lines.append({"step": 2})
    lines.close()
    assert b"\0" not in (tmp_path / "a").read_bytes()


@pytest.mark.parametrize("call", ["append", "sync"])
def test_lines_on_a_full_disk_are_refused_in_words(tmp_path, monkeypatch, call):
    """/dev/full refuses every write as a full disk does."""
    lines = files.JsonLines(Path("/dev/full") if call == "append" else tmp_path / "a")
    refuse_call(monkeypatch, "fsync", errno.ENOSPC)
    try:
        with pytest.raises(ResourceError, match="disk full"):
            lines.append({"step": 1}) if call == "append" else lines.sync()
    finally:
        with contextlib.suppress(OSError, ResourceError):
            lines.close()


@pytest.mark.parametrize("n_failures", [0, 1, 3, 4])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_tried_again_three_times(tmp_path, caplog, n_failures, code):
    """What somebody else deletes meanwhile may be enough; each attempt is announced, and the last failure is said."""
    calls = []

    def write():
        calls.append(1)
        with files.disk_errors(tmp_path / "a"):
            if len(calls) <= n_failures:
                raise OSError(code, os.strerror(code))

    if n_failures > 3:
        with pytest.raises(ResourceError, match="disk full"):
            files.on_full_disk(write)
    else:
        files.on_full_disk(write)
    assert len(calls) == min(n_failures + 1, 4)
    assert caplog.text.count("trying again in") == min(n_failures, 3)


def test_a_disk_that_fails_in_another_way_is_not_tried_again(tmp_path):
    calls = []

    def write():
        calls.append(1)
        with files.disk_errors(tmp_path):
            raise OSError(errno.EIO, "I/O error")

    with pytest.raises(ResourceError, match="I/O error"):
        files.on_full_disk(write)
    assert len(calls) == 1


def test_a_line_half_of_which_fits_is_taken_back_and_written_whole_once_there_is_room(tmp_path, monkeypatch):
    lines = files.JsonLines(tmp_path / "a")
    lines.append({"step": 1})
    real, room = lines._file, iter([5, 3])

    class Full:
        """A file that takes a few bytes, twice, and then everything."""

        def __getattr__(self, name):
            return getattr(real, name)

        def write(self, line):
            return real.write(line[: next(room, len(line))])

    monkeypatch.setattr(lines, "_file", Full())
    lines.append({"step": 2})
    lines.close()
    assert untrusted.read_jsonl(tmp_path / "a") == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("last_bytes", [1, 10, 11, 12, 100, 10_000])
def test_the_last_lines_of_a_long_file_are_read_alone(tmp_path, last_bytes):
    with files.JsonLines(tmp_path / "a") as lines:
        for step in range(100):
            lines.append({"s": step})
    whole, tail = untrusted.read_jsonl(tmp_path / "a"), untrusted.read_jsonl(tmp_path / "a", last_bytes=last_bytes)
    assert tail == whole[len(whole) - len(tail) :]
    assert (len(tail) + 1) * 10 >= min(last_bytes, 1000) - 10


def test_a_folder_that_cannot_hold_lines(tmp_path):
    with pytest.raises(ResourceError, match="No such file"):
        files.JsonLines(tmp_path / "nowhere" / "a")
