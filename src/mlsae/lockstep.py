"""Train several SAEs off the same readings: one pass of the language model for each micro-batch, however many learn from it."""

import contextlib
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from mlsae import devices
from mlsae.checkpoint import RunDirectory
from mlsae.config import LMShape, TrainConfig
from mlsae.errors import ConfigError, Interrupted, MlsaeError, ResourceError
from mlsae.lm import LanguageModel, read_shape
from mlsae.prepare import load_lm, prepared
from mlsae.stopping import StopFlag
from mlsae.stream import READ_ALIKE, Stream
from mlsae.train import Loop, Run


@dataclass(frozen=True)
class Trained:
    """What `train_together` made."""

    runs: dict[str, Run]
    """The finished run of each arm; `seconds` is the time of all of them together."""
    lm: LanguageModel
    """The language model that was read."""


def train_together(
    configs: Mapping[str, TrainConfig], *, resume: bool = False, progress: bool = True, lm: LanguageModel | None = None
) -> Trained:
    """Train an SAE for each config, by the name of its arm; each is, bit for bit, what `train` makes of that config alone.

    What is read must be alike (`stream.READ_ALIKE`); `tokens` may differ. Each arm has a run directory of its own, on which
    every command works. SIGINT and SIGTERM save every arm; `resume` takes each from its own newest checkpoint, those
    behind first, and begins the ones that have none. An arm that fails stops the others at their next step, saved.

    Raises:
        ConfigError: the arms cannot read one stream, or memory cannot hold them together.
        What `train` raises, the arm named.
    """
    started = time.monotonic()
    first = next(iter(configs.values()))
    device = devices.choose_device(first.device)
    shape = lm.shape if lm is not None else read_shape(first.lm)
    configs = {name: _prepared(name, config, shape, device) for name, config in configs.items()}
    check_one_stream(configs)
    devices.check_fit_together(list(configs.values()), shape.d_model, device)
    resumed = {name: resume and any(Path(config.out).glob("step-*")) for name, config in configs.items()}
    if resume and not any(resumed.values()):
        folder = str(Path(first.out).parent)
        raise ResourceError(folder, "no checkpoint in any of its arms; start without --resume")
    with contextlib.ExitStack() as stack:
        runs = {}
        for name, config in configs.items():
            with of_arm(name):
                runs[name] = RunDirectory(Path(config.out), config.to_dict(), resume=resumed[name])
            stack.callback(runs[name].close)
        first = next(iter(configs.values()))
        lm = load_lm(first, device) if lm is None else lm
        stream = Stream(first, lm, progress=progress, shared=True)
        arms = []
        for name, config in configs.items():
            with of_arm(name):
                loop = Loop(config, lm, runs[name], resume=resumed[name], progress=False, stream=stream)
            arms.append(Arm(name, loop))
        run_in_lockstep(arms, progress=progress)
        seconds = time.monotonic() - started
        return Trained({arm.name: arm.loop.summary(seconds) for arm in arms}, lm)


def check_one_stream(configs: Mapping[str, TrainConfig]) -> None:
    """Refuse resolved configs that do not read the same text in the same order through the same masks."""
    (first, like), *others = configs.items()
    for name, config in others:
        keys = [*READ_ALIKE, *(["tokens"] if like.streaming else [])]
        differing = [key for key in keys if getattr(config, key) != getattr(like, key)]
        if (config.rules.order, config.rules.packing) != (like.rules.order, like.rules.packing):
            differing.append("recipe")
        if differing:
            given = f"{getattr(like, differing[0])} in '{first}', {getattr(config, differing[0])} in '{name}'"
            raise ConfigError(differing[0], f"{given}; arms read one stream: give all the same, or run them apart")
    if len({Path(config.out).resolve() for config in configs.values()}) < len(configs):
        raise ConfigError("out", "two arms have one run directory; give each its own")


class Arm:
    """One run among several, with random numbers of its own, as if it were alone in the process."""

    def __init__(self, name: str, loop: Loop):
        self.name, self.loop = name, loop
        self.due = loop.position
        """Position of the micro-batch it learns from next."""
        self._random = torch.get_rng_state()
        self._going = loop.going()

    def advance(self) -> bool:
        """Learn from the next micro-batch; False when that was the last."""
        torch.set_rng_state(self._random)
        try:
            with of_arm(self.name):
                next(self._going)
        except StopIteration:
            return False
        finally:
            self._random = torch.get_rng_state()
        self.due += self.loop.batch
        return True

    def close(self) -> None:
        """Let go of its open files."""
        self._going.close()


def run_in_lockstep(arms: Sequence[Arm], *, progress: bool) -> None:
    """Every remaining step of all arms. The one that is furthest behind goes next, so that arms in step read together."""
    total = sum(arm.loop.n_steps * arm.loop.step_tokens for arm in arms)
    done = sum(arm.loop.trainer.steps * arm.loop.step_tokens for arm in arms)
    going, errors = list(arms), []
    with contextlib.ExitStack() as stack, StopFlag() as stop:
        shown = stack.enter_context(
            tqdm(total=total, initial=done, unit="tok", unit_scale=True, desc="train", disable=not progress)
        )
        for arm in arms:
            stack.callback(arm.close)
            arm.loop.stop = stop
        while going:
            shown.set_postfix_str(f"{len(going)} of {len(arms)} arms", refresh=False)
            arm = min(going, key=lambda arm: arm.due)
            before = arm.loop.trainer.steps
            try:
                if not arm.advance():
                    going.remove(arm)
            except MlsaeError as error:
                going.remove(arm)
                errors.append(error)
                stop.asked = True  # the others end their step and save
            shown.update((arm.loop.trainer.steps - before) * arm.loop.step_tokens)
    if failures := [error for error in errors if not isinstance(error, Interrupted)]:
        raise failures[0]
    if errors:
        steps = min(arm.loop.trainer.steps for arm in arms)
        raise Interrupted("train", f"stopped, every arm saved, none before step {steps}; --resume continues")


@contextlib.contextmanager
def of_arm(name: str) -> Generator[None]:
    """Errors say whose they are."""
    try:
        yield
    except MlsaeError as error:
        raise type(error)(error.field, f"{error.problem} (arm '{name}')") from error


def _prepared(name: str, config: TrainConfig, shape: LMShape, device: torch.device) -> TrainConfig:
    with of_arm(name):
        return prepared(config, shape, device)
