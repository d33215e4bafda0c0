"""What a run survives: kill trainers, refuse them the disk, crash the machine, damage what they saved, and count the losses.

    python benchmarks/soak.py                  200 kills, in a few minutes
    python benchmarks/soak.py --kills 1000
    python benchmarks/soak.py --rows ranks     only the rows with this word in their names

The machinery is the tests' own (tests/test_resume.py, tests/test_kills.py, tests/test_checkpoint.py). Exits with 1 if anything
was lost. Linux only.
"""

import argparse
import contextlib
import itertools
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from transformers.utils.logging import disable_progress_bar

import test_checkpoint as checkpoints
import test_kills as ranks
import test_resume as runs

Row = tuple[str, list[str]]
"""What was done, with its figures, and what was lost by it."""


def killed(folder: Path, kills: int, seed: int) -> Row:
    """SIGKILL at any moment: the resumed run ends in the bits of the one that was left alone."""
    with training(folder) as trainers:
        tally = runs.soak(trainers, folder, kills=kills, seed=seed)
    where = f"{tally.inside} inside a save, {tally.early} before the first checkpoint"
    resumes = f"{tally.resumes} resumes, {len(tally.stuck)} refused"
    what = f"{tally.kills} kills ({where}), {resumes}: {tally.exact} of {tally.runs} runs exact"
    return what, tally.stuck + tally.inexact


def asked(folder: Path, signals: int, seed: int) -> Row:
    """SIGINT and SIGTERM: saved, exit 75, and the resumed run ends in the bits of the one that was left alone."""
    with training(folder) as trainers:
        tally = runs.asked(trainers, folder, signals=signals, seed=seed)
    where = f"{tally.kills} signals ({tally.inside} in a validation)"
    return f"{where}: all saved, {tally.exact} of {tally.runs} runs exact", tally.stuck + tally.inexact


def one_of_several(folder: Path, kills: int, seed: int) -> Row:
    """SIGKILL of one rank of several: the others end, and the resumed run ends in the bits of the one that was left alone."""
    tally = ranks.soak(folder, kills=kills, seed=seed)
    where = f"{tally.inside} inside a save, {tally.early} before the first checkpoint"
    resumes = f"{tally.resumes} resumes, {tally.changed} on another layout"
    ended = f"the others ended within {tally.slowest:.1f} s"
    exact = tally.runs - len(tally.stuck) - len(tally.inexact)
    return f"{tally.kills} kills ({where}), {resumes}, {ended}: {exact} of {tally.runs} runs as if left alone", [
        *tally.stuck,
        *tally.inexact,
    ]


def training(folder: Path) -> contextlib.closing[runs.Trainers]:
    """Trainers, ended when they are not needed any more."""
    return contextlib.closing(runs.Trainers(folder))


def refused(folder: Path) -> Row:
    """Every call that changes the disk refused, once or for good, in every way."""
    n, wrong = 0, []
    for subject, failure, once in itertools.product(checkpoints.SUBJECTS, checkpoints.FAILURES, (False, True)):
        place = folder / f"{subject} {failure} {once}"
        for _, found in checkpoints.refused(subject, failure, place, once=once):
            n += 1
            wrong += [f"{place.name}: {what}" for what in found]
    return f"{n} calls refused: {n - len(wrong)} left old or new", wrong


def crashed(folder: Path) -> Row:
    """The machine gone at every call of two writes, with all, one, or all but one of the unsynced changes."""
    n, wrong = 0, []
    for subject in checkpoints.SUBJECTS:
        for found, right in checkpoints.replay(subject, folder / subject):
            n += 1
            wrong += [] if right else [f"{subject}: {found} was found"]
    return f"{n} crashes: {n - len(wrong)} left old or new, and nothing reported as saved was lost", wrong


def damaged(folder: Path, trials: int) -> Row:
    """Bits flipped and files cut short in the newest checkpoint: found, named, and the one before used."""
    wrong: list[str] = []
    for damage in (checkpoints.flip, checkpoints.truncate):
        place = folder / damage.__name__
        wrong += [f"{name}, {what}" for _, name, what in checkpoints.unfound(damage, place, trials=trials)]
    return f"{trials} bit flips and {trials} truncations: found {2 * trials - len(wrong)} of {2 * trials}", wrong


def main() -> int:
    """Print the table; 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--rank-kills", type=int, default=20)
    parser.add_argument("--rows", default="", help="only rows with this in their names")
    parser.add_argument("--damages", type=int, default=1000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger("mlsae").addHandler(logging.NullHandler())  # it warns of all that is done here
    disable_progress_bar()
    os.fsync = lambda descriptor: None  # no machine crashes but in the model, which sees every call
    lost = 0
    for what, row in [found for found in rows(options) if options.rows in found[0]]:
        with tempfile.TemporaryDirectory(prefix="mlsae-soak-") as folder:
            began = time.monotonic()
            figures, wrong = row(Path(folder))
            print(f"{what:16} {time.monotonic() - began:5.0f} s   {figures}", flush=True)
            for each in wrong:
                print(f"{'':26} LOST: {each}", flush=True)
            lost += len(wrong)
    return 1 if lost else 0


def rows(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[Path], Row]]]:
    """The rows of the table."""
    yield "process killed", lambda folder: killed(folder, options.kills, options.seed)
    yield "ranks killed", lambda folder: one_of_several(folder, options.rank_kills, options.seed)
    yield "asked to stop", lambda folder: asked(folder, options.kills // 2, options.seed)
    yield "disk refuses", refused
    yield "machine crashes", crashed
    yield "files damaged", lambda folder: damaged(folder, options.damages)


if __name__ == "__main__":
    sys.exit(main())
