"""What a run tells: every step's line once, the same for the same run, and an outside logger that may fail to start."""

import builtins
import logging
import sys
import types

import pytest
import torch

from mlsae.files import JsonLines
from mlsae.reporting import Logger, Reporter, bar, open_logger
from mlsae.trainer import StepReport
from mlsae.untrusted import read_jsonl

torch.set_num_threads(1)


def step_report(step, loss=0.5):
    return StepReport(step, 10 * step, loss, 0.1, 0.25, [0.2, 0.3], 0.0, 1e-3, 2.0)


class Recorder:
    """A logger that remembers."""

    def __init__(self):
        self.lines, self.closed = [], 0

    def log(self, metrics, step):
        self.lines.append((step, dict(metrics)))

    def close(self):
        self.closed += 1


def report_steps(path, n, every=1, logger=None, **changes):
    lines = JsonLines(path)
    reporter = Reporter(lines, logger, done=0, total=10 * n, warmup=0, progress=False)
    try:
        for step in range(1, n + 1):
            extra = {"masked_by_norm": [0, step]} if step % every == 0 or step == n else None
            reporter.report(step_report(step, **changes), 10, extra)
        reporter.close()
    finally:
        lines.close()
    return read_jsonl(path)


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7]), (7, [7]), (100, [7])])
def test_steps_with_more_to_say_are_written(tmp_path, every, steps):
    lines = report_steps(tmp_path / "m", 7, every)
    assert [line["step"] for line in lines] == steps
    assert lines[-1]["masked_by_norm"] == [0, 7]
    assert lines[-1]["layer_fvu"] == [0.2, 0.3]


def test_the_wall_clock_stands_in_the_last_two_keys(tmp_path):
    lines = report_steps(tmp_path / "m", 2)
    assert all(list(line)[-2:] == ["elapsed_seconds", "tokens_per_second"] for line in lines)
    assert all(line["tokens_per_second"] > 0 for line in lines)


def test_a_loss_that_is_not_finite_is_null_in_the_file(tmp_path):
    assert report_steps(tmp_path / "m", 1, loss=float("nan"))[0]["loss"] is None


def test_the_logger_receives_what_the_file_does(tmp_path):
    logger = Recorder()
    lines = report_steps(tmp_path / "m", 7, every=3, logger=logger)
    assert isinstance(logger, Logger)
    assert [{"step": step, **metrics} for step, metrics in logger.lines] == lines
    assert logger.closed == 1


def test_no_progress_prints_nothing(tmp_path, capsys):
    report_steps(tmp_path / "m", 3)
    assert list(bar([(1, "a"), (2, "b")], total=3, desc="x", progress=False)) == ["a", "b"]
    assert capsys.readouterr() == ("", "")


def test_no_logger_unless_asked_for(tmp_path):
    assert open_logger(None, tmp_path, {}) is None


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_logger_that_is_not_installed_is_announced_once(tmp_path, caplog, monkeypatch, name):
    real = builtins.__import__

    def refuse(wanted, *arguments, **options):
        if wanted.split(".")[0] in ("wandb", "trackio") or wanted == "torch.utils.tensorboard":
            raise ModuleNotFoundError(f"No module named '{wanted}'")
        return real(wanted, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert open_logger(name, tmp_path, {}) is None
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert f"log_to: {name} is not installed" in caplog.text
    assert "logging to files only" in caplog.text


class OwnError(Exception):
    """As `wandb.Error`, a subclass of nothing but Exception."""


class UsageError(OwnError):
    """As wandb's: what `init` raises where nobody is logged in."""


@pytest.mark.parametrize("error", [UsageError, RuntimeError, OSError, ValueError, TimeoutError])
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_logger_that_cannot_start_is_announced_once(tmp_path, caplog, monkeypatch, error, name):
    """Row 49: missing, not logged in, or offline, the run goes on."""

    def init(**options):
        raise error("api_key not configured")

    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(init=init, Error=OwnError))
    assert open_logger(name, tmp_path, {}) is None
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert f"log_to: {name} cannot start (api_key not configured)" in caplog.text


def test_wandb_is_told_the_run_and_every_line(tmp_path, monkeypatch):
    told = []
    fake = types.SimpleNamespace(log=lambda m, step: told.append((step, m)), finish=lambda: told.append("finished"))
    init = types.SimpleNamespace(init=lambda **options: told.append(options) or fake)
    monkeypatch.setitem(sys.modules, "wandb", init)
    logger = open_logger("wandb", tmp_path / "my-run", {"k": 4})
    lines = report_steps(tmp_path / "m", 2, logger=logger)
    assert (told[0]["name"], told[0]["config"], told[-1]) == ("my-run", {"k": 4}, "finished")
    assert [{"step": step, **metrics} for step, metrics in told[1:-1]] == lines


@pytest.mark.parametrize("call", ["log", "finish"])
def test_a_logger_that_fails_later_does_not_end_the_run(tmp_path, monkeypatch, call):
    """P12: an outside service is a convenience; the file has every line all the same."""

    def refuse(*arguments, **options):
        raise ConnectionError("gone")

    calls = {"log": lambda *a, **k: None, "finish": lambda: None, call: refuse}
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **o: types.SimpleNamespace(**calls)))
    lines = report_steps(tmp_path / "m", 3, logger=open_logger("wandb", tmp_path, {}))
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_what_looks_ill_is_said_once(tmp_path, caplog):
    """More than 30 % dead latents, or a vector of more than 100 times the median norm."""
    with (
        JsonLines(tmp_path / "m") as lines,
        Reporter(lines, None, done=0, total=60, warmup=10, progress=False) as reporter,
    ):
        for step, (dead, ratio) in enumerate([(0.9, 900.0), (0.3, 100.0), (0.31, 3.0), (0.5, 240.0), (0.6, 300.0)], 1):
            healthy = step_report(step)
            reporter.report(type(healthy)(**{**vars(healthy), "dead_fraction": dead}), 10, {"norm_ratio": ratio})
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        "step 3: 31% of the latents are dead latents",
        "step 4: a vector has 240 times the median norm of its layer",
    ]
