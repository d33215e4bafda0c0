"""What a long run tells people and programs: a progress bar, metrics.jsonl, and, if asked, one outside logger."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tqdm import tqdm

from mlsae.files import JsonLines
from mlsae.trainer import StepReport

SYMPTOMS = {
    "dead_fraction": (0.3, "{:.0%} of the latents are dead latents; lower lr, or raise k_aux or tokens"),
    "norm_ratio": (100.0, "a vector has {:.0f} times the median norm of its layer; mask_norm_factor leaves such out"),
}
"""What is worth a warning when it exceeds its limit."""

log = logging.getLogger(__name__)


@runtime_checkable
class Logger(Protocol):
    """Something that takes metrics by name."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Record one step's metrics."""

    def close(self) -> None:
        """Finish."""


def open_logger(name: str | None, run: Path, config: Mapping[str, Any]) -> Logger | None:
    """The outside logger of that name. If its package is missing or refuses, warns once and logs to files only."""
    if name is None:
        return None
    try:
        return _Careful(name, {"wandb": _Wandb, "trackio": _Trackio, "tensorboard": _TensorBoard}[name](run, config))
    except ImportError as error:
        log.warning("log_to: %s is not installed (%s); logging to files only", name, error)
    except _failures(name) as error:
        log.warning("log_to: %s cannot start (%s); logging to files only", name, error)
    return None


def _failures(name: str) -> tuple[type[Exception], ...]:
    """What an outside logger raises when it cannot do its work: the usual errors, and its package's own."""
    own = getattr(sys.modules.get(name), "Error", RuntimeError)
    return (OSError, RuntimeError, ValueError, own)


class _Careful:
    """A logger whose failures end its own work and not the run's."""

    def __init__(self, name: str, logger: Logger):
        self._name, self._logger = name, logger
        self._broken = False

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self._try(lambda: self._logger.log(metrics, step))

    def close(self) -> None:
        self._try(self._logger.close)

    def _try(self, call: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            call()
        except _failures(self._name) as error:
            self._broken = True
            log.warning("log_to: %s stopped (%s); logging to files only", self._name, error)


class _Wandb:
    def __init__(self, run: Path, config: Mapping[str, Any]):
        self._run = import_module("wandb").init(project="mlsae", name=run.name, dir=str(run), config=dict(config))

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, run: Path, config: Mapping[str, Any]):
        self._trackio = import_module("trackio")
        self._trackio.init(project="mlsae", name=run.name, config=dict(config))

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self._trackio.log(dict(metrics), step=step)

    def close(self) -> None:
        self._trackio.finish()


class _TensorBoard:
    def __init__(self, run: Path, config: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(run / "tensorboard")

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        for key, value in metrics.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class NoLines:
    """Stands in for metrics.jsonl where another process writes it."""

    def append(self, record: Mapping[str, Any]) -> None:
        """Nothing."""

    def sync(self) -> int:
        """Its length."""
        return 0

    def truncate(self, length: int) -> None:
        """Nothing."""

    def __enter__(self) -> "NoLines":
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing."""


class Reporter:
    """The one place where training logs. The same run writes the same lines, but for the two wall-clock keys at the end."""

    def __init__(
        self, metrics: JsonLines | NoLines, logger: Logger | None, *, done: int, total: int, warmup: int, progress: bool
    ):
        self._metrics, self._logger, self._warmup, self._done = metrics, logger, warmup, done
        self._started = time.monotonic()
        self._tokens_here = 0
        self._warned: set[str] = set()
        self._bar = tqdm(
            total=total, initial=done, unit="tok", unit_scale=True, desc="train", disable=not progress, smoothing=0.05
        )

    def report(self, report: StepReport, n_tokens: int, extra: Mapping[str, Any] | None) -> None:
        """Show one step and, with `extra`, write it down. `n_tokens` counts masked positions too."""
        self._tokens_here += n_tokens
        self._bar.update(n_tokens)
        self._bar.set_postfix_str(f"FVU {report.fvu:.3f}, dead {report.dead_fraction:.1%}", refresh=False)
        if extra is not None:
            elapsed = time.monotonic() - self._started
            wall = {"elapsed_seconds": round(elapsed, 3), "tokens_per_second": round(self._tokens_here / elapsed, 1)}
            self._write({**report.to_dict(), **extra, **wall})
            if self._done + self._tokens_here > self._warmup:
                self._warn({**report.to_dict(), **extra})

    def validated(self, step: int, tokens: int, fvu: float) -> None:
        """Write down a validation, on a line of its own: it may be done by another process than the step before it."""
        self._write({"step": step, "tokens": tokens, "validation_fvu": fvu})

    def _warn(self, record: Mapping[str, Any]) -> None:
        """Say, once, that a number is not what a healthy run has."""
        for name, (limit, words) in SYMPTOMS.items():
            if name not in self._warned and record.get(name, 0) > limit:
                self._warned.add(name)
                log.warning("step %d: %s", record["step"], words.format(record[name]))

    def _write(self, record: Mapping[str, Any]) -> None:
        self._metrics.append(record)
        if self._logger is not None:
            self._logger.log({k: v for k, v in record.items() if k != "step"}, record["step"])

    def close(self) -> None:
        """Finish the bar and the logger."""
        self._bar.close()
        if self._logger is not None:
            self._logger.close()

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def bar(items: Iterable[Any], *, total: int, desc: str, progress: bool, unit: str = "tok") -> Iterator[Any]:
    """`items`, each a (number of tokens, value) pair, with a progress bar in tokens; yields the values."""
    with tqdm(total=total, unit=unit, unit_scale=True, desc=desc, disable=not progress, delay=1) as shown:
        for n_tokens, value in items:
            yield value
            shown.update(n_tokens)
