"""SIGINT and SIGTERM: a command ends at once with one sentence; training finishes its step and saves first."""

import contextlib
import functools
import logging
import signal
from collections.abc import Callable, Generator
from pathlib import Path
from types import FrameType
from typing import Any, ParamSpec, TypeVar

from mlsae.errors import Interrupted

P = ParamSpec("P")
R = TypeVar("R")

log = logging.getLogger(__name__)


@contextlib.contextmanager
def interruptible(command: str) -> Generator[None]:
    """SIGINT and SIGTERM end the command at once with one sentence; while steps are taken, training handles them itself."""
    before = _listen(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(command, "stopped; nothing half-made is left; run the same command again") from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def resumable(work: Callable[P, R]) -> Callable[P, R]:
    """Work that takes `resume`, first of all its config: stopped when runs in `config.out` have checkpoints, it says so.

    The same command again would refuse to begin over them.
    """

    @functools.wraps(work)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        config: Any = args[0] if args else kwargs["config"]
        try:
            return work(*args, **kwargs)
        except KeyboardInterrupt:
            if not any(Path(config.out).glob("*/step-*")):
                raise
            raise Interrupted(wrapped.__name__, "stopped; nothing half-made is left; --resume continues") from None

    return wrapped


def _listen(number: int, handler: Any) -> Any:
    """Set a handler; returns the one before, or None outside the main thread, whose owner handles signals."""
    try:
        return signal.signal(number, handler)
    except ValueError:
        return None


class StopFlag:
    """SIGINT and SIGTERM ask for a stop between two steps; a second signal ends the process at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopFlag":
        for number in (signal.SIGINT, signal.SIGTERM):
            if (before := _listen(number, self._ask)) is not None:
                self._before[number] = before
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        log.warning("stopping after this step; a second signal stops at once")

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
