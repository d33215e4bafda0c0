"""Everything that can be the user's problem, and the exit code the command line gives it.

    MlsaeError
    ├── ConfigError    2   a flag, a config key, a combination of them
    ├── DataError      3   text and tokens
    ├── ResourceError  4   files, disk, locks, memory
    ├── NumericsError  5   NaN or infinity where a number must be
    ├── ModelError     6   the language model or the SAE
    └── Interrupted   75   stopped on request, resumable

0 is done, 1 is a bug in mlsae. A message is one sentence: `<field>: <given>; <allowed>; <what to do>`.
"""

import difflib
import unicodedata
from collections.abc import Iterable


class MlsaeError(Exception):
    """Base class: `str(error)` is the one sentence shown to the user."""

    exit_code = 1

    def __init__(self, field: str, problem: str):
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem
        self.elsewhere = False
        """Raised first by another process of the job, which says it."""


class ConfigError(MlsaeError):
    """A flag, a config key or a combination of them cannot work."""

    exit_code = 2


class DataError(MlsaeError):
    """Text or tokens cannot be read, or there are too few of them."""

    exit_code = 3


class ResourceError(MlsaeError):
    """A file, the disk, a lock or memory is not to be had."""

    exit_code = 4


class NumericsError(MlsaeError):
    """NaN or infinity where a number must be."""

    exit_code = 5


class ModelError(MlsaeError):
    """The language model or the SAE is missing, unsupported, or does not fit the other."""

    exit_code = 6


class Interrupted(MlsaeError):
    """Stopped on request, or by a network that stays away: the same command, a run's with --resume, goes on."""

    exit_code = 75


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on this machine or on an accelerator."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it
        return True
    return "can't allocate memory" in str(error)


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest allowed word, or an empty string."""
    near = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.7)
    return f"; did you mean '{near[0]}'?" if near else ""


def printable(text: str) -> str:
    """Text from a file made safe for a terminal: control and direction characters are escaped."""
    return "".join(ch if ch == " " or unicodedata.category(ch)[0] not in "CZ" else ascii(ch)[1:-1] for ch in text)
