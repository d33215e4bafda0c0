"""What files hold, kept until they change; a file that cannot be read leaves a sentence instead."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from mlsae.errors import MlsaeError

T = TypeVar("T")


class Kept(Generic[T]):
    """What some files hold: read when first asked for and when one of them has changed. Safe to ask from several threads.

    All of `paths` must be there; `beside` are files whose change matters too, and that may be absent.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], T], beside: Sequence[Path] = ()):
        self._paths, self._read, self._beside = paths, read, beside
        self._lock = threading.RLock()
        self._seen: object = None
        self._value: T | None = None
        self._problem: str | None = None

    def get(self) -> T | None:
        """The value, if the files are all there and good."""
        with self._lock:
            needed, beside = ([signature(path) for path in paths] for paths in (self._paths, self._beside))
            if (needed, beside) != self._seen:
                self._seen, self._value, self._problem = (needed, beside), None, None
                if None not in needed:
                    try:
                        self._value = self._read()
                    except MlsaeError as error:
                        self._problem = f"{named(error)}: {error.problem}"
                    except OSError as error:
                        self._problem = f"{self._paths[0].name} cannot be read ({error.strerror})"
            return self._value

    @property
    def problem(self) -> str | None:
        """What is wrong with files that are there; None while they are good, or not all there."""
        self.get()
        return self._problem


def signature(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file does; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def named(error: MlsaeError) -> str:
    """The field of an error, or the name of the file that it is about."""
    return Path(error.field).name if "/" in error.field else error.field
