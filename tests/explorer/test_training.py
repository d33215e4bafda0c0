"""Training curves: every line of metrics.jsonl once, whatever was being written when it was read."""

import itertools
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from mlsae.explorer.training import COLUMNS, MAX_POINTS, Training, training_view


def line(step: int, **more: Any) -> str:
    known = {"step": step, "tokens": 64 * step, "loss": 1 / step, "fvu": 1 / step, "dead_fraction": 0.5}
    return json.dumps(known | {"tokens_per_second": 10.0, "layer_fvu": [1, 2]} | more) + "\n"


def steps(training: Training, since: int = 0) -> list[int]:
    return [point["step"] for point in training.points(since)]


def config(run: Path, **changes: Any) -> None:
    sizes = {"tokens": 6400, "batch_size": 2, "accumulation_steps": 1, "context_length": 32}
    (run / "config.json").write_text(json.dumps(sizes | changes))


def test_lines_are_read_as_they_come(tmp_path: Path):
    path, training = tmp_path / "metrics.jsonl", Training(tmp_path)
    assert training_view(training) == {"running": False, "points": [], "last_step": 0, "total_steps": None}
    path.write_text(line(1) + line(2) + line(3)[:20])
    assert (steps(training), training.last_step) == ([1, 2], 2)
    path.write_text(path.read_text() + line(3)[20:] + line(4))
    assert steps(training) == [1, 2, 3, 4]
    assert steps(training, since=2) == [3, 4]
    assert set(training.points()[0]) == set(COLUMNS)
    assert training.points()[1] == {name: json.loads(line(2))[name] for name in COLUMNS}


def test_lines_that_were_taken_back_are_forgotten(tmp_path: Path):
    path, training = tmp_path / "metrics.jsonl", Training(tmp_path)
    path.write_text("".join(map(line, range(1, 11))))
    assert len(steps(training)) == 10
    path.write_text("".join(map(line, range(1, 6))))
    assert steps(training) == [1, 2, 3, 4, 5]
    path.write_text("".join(line(i, loss=9.5, note="x" * i) for i in range(1, 9)))  # longer than before, and other
    assert steps(training) == list(range(1, 9))
    assert {point["loss"] for point in training.points()} == {9.5}
    end = path.stat().st_size
    padded = line(1, note="x" * (end - len(line(1, note=""))))
    assert len(padded) == end  # a line begins where the last one read ended, and is not of what was read
    path.write_text(padded + line(2) + line(3))
    assert steps(training) == [1, 2, 3]
    path.unlink()
    assert steps(training) == []


def test_long_runs_are_thinned_evenly(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text("".join(map(line, range(1, 5002))))
    found = steps(Training(tmp_path))
    assert (len(found), found[0], found[-1]) == (MAX_POINTS, 1, 5001)
    gaps = {b - a for a, b in itertools.pairwise(found)}
    assert gaps == {2, 3}
    assert steps(Training(tmp_path), since=4990) == list(range(4991, 5002))


@pytest.mark.parametrize("odd", ["[1]\n", "not json\n", '{"step": "x"}\n', "\xff\n", '{"step": 1e400, "tokens": 1}\n'])
def test_what_is_no_line_of_ours_is_left_out(tmp_path: Path, odd: str):
    (tmp_path / "metrics.jsonl").write_bytes(odd.encode("latin1"))
    assert steps(Training(tmp_path)) == []


def test_numbers_that_are_none_are_undefined(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(line(1, loss=None, fvu="x"))
    (point,) = Training(tmp_path).points()
    assert point["loss"] != point["loss"]
    assert point["fvu"] != point["fvu"]
    assert point["tokens"] == 64


def test_a_run_goes_on_while_its_process_lives_and_steps_are_left(tmp_path: Path):
    config(tmp_path)
    training, lock = Training(tmp_path), tmp_path / "run.lock"
    assert training.n_steps == 100
    assert not training.is_running()
    lock.write_text(f"pid {os.getpid()} on {socket.gethostname()} since 2020-01-01 00:00:00")
    assert training.is_running()
    (tmp_path / "metrics.jsonl").write_text(line(99))
    assert training.is_running()
    (tmp_path / "metrics.jsonl").write_text(line(99) + line(100))
    assert not training.is_running()


@pytest.mark.parametrize(
    "holder", ["", "pid 0 on HOST", "pid 4194305 on HOST", f"pid {10**30} on HOST", "x y z w", "pid 1 on elsewhere"]
)
def test_a_run_that_nobody_holds_does_not_go_on(tmp_path: Path, holder: str):
    (tmp_path / "run.lock").write_text(holder.replace("HOST", socket.gethostname()))
    assert not Training(tmp_path).is_running()


def test_a_run_elsewhere_goes_on_while_it_writes(tmp_path: Path):
    (tmp_path / "run.lock").write_text("pid 1 on elsewhere since 2020-01-01 00:00:00")
    (tmp_path / "metrics.jsonl").write_text(line(1))
    assert Training(tmp_path).is_running()
    os.utime(tmp_path / "metrics.jsonl", (1, 1))
    assert not Training(tmp_path).is_running()


@pytest.mark.parametrize("changes", [{"tokens": None}, {"batch_size": "x"}, {"context_length": 0}])
def test_a_config_that_does_not_say_gives_no_number_of_steps(tmp_path: Path, changes: dict[str, Any]):
    config(tmp_path, **changes)
    assert Training(tmp_path).n_steps is None


def test_a_real_run_is_read(tiny_run: Path):
    training = Training(tiny_run)
    assert training.config["k"] == 4
    view = training_view(training)
    assert view["last_step"] == view["total_steps"] == len(view["points"])
    assert not view["running"]
    assert training.resume_command() == f"mlsae train --config {tiny_run}/config.json --out {tiny_run} --resume"


def test_no_run_has_no_training():
    assert training_view(Training(None)) == {"running": False, "points": [], "last_step": 0, "total_steps": None}
    assert Training(None).resume_command() is None
