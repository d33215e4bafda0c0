"""Train one SAE on every layer of a language model: the loop, and what it needs around it to survive and be resumed."""

import contextlib
import logging
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from mlsae import devices, files, fingerprint, untrusted
from mlsae.checkpoint import Checkpoint, RunDirectory, export_sae
from mlsae.config import Config, MLSAEConfig, TrainConfig
from mlsae.errors import DataError, Interrupted, ModelError, NumericsError, ResourceError, out_of_memory
from mlsae.lens import TunedLens
from mlsae.lm import LanguageModel, read_shape
from mlsae.mesh import ALONE, Mesh, local_device, open_mesh, restarted, share_of_latents
from mlsae.norms import Norms
from mlsae.parallel import make_sae
from mlsae.prepare import described_sae, load_lm, prepared
from mlsae.reading import Reading, check_pair
from mlsae.reporting import NoLines, Reporter, open_logger
from mlsae.sae import MLSAE
from mlsae.stopping import StopFlag
from mlsae.stream import Stream
from mlsae.trainer import StepReport, Trainer
from mlsae.validation import validate, validation_blocks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A finished training run."""

    directory: str
    """The run directory; the SAE is in its folder `sae`."""
    steps: int
    """Optimizer steps in all."""
    tokens: int
    """Tokens read in all, masked ones included."""
    passes: float
    """How often the text was read."""
    fvu: float
    """Mean FVU of the last step."""
    dead_fraction: float
    """Dead latents at the last step."""
    masked_by_norm: list[int]
    """Vectors left out for their norm, per layer."""
    seconds: float
    """Wall time of this process's part of the run."""

    @property
    def sae(self) -> MLSAE:
        """The trained SAE, read back from disk."""
        return MLSAE.from_pretrained(self.directory)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values by field name."""
        return asdict(self)


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    progress: bool = True,
    lm: LanguageModel | None = None,
    dp: int | None = None,
    tp: int | None = None,
) -> Run:
    """Train as `config` says and return the finished run; `lm` saves loading the language model again.

    Under torchrun its processes train together: `dp` of them share out every micro-batch's sequences, times `tp` the latents
    (None: all on dp); the run is the same for every layout, and goes on with any other. One that torchrun starts again resumes.

    SIGINT and SIGTERM save a checkpoint and raise Interrupted; `resume` then goes on, bit for bit as if nothing had happened.

    Raises:
        ConfigError, DataError, ResourceError, ModelError: before the first step, and without leaving a new run directory.
        NumericsError: a loss or gradient is not finite; nothing of that step is kept.
    """
    device = local_device(devices.choose_device(config.device))
    with open_mesh(dp, tp, device) as mesh:
        if restarted() and not resume:
            resume = mesh.by_leader(lambda: any(Path(config.out).glob("step-*")))
        return _train(config, device, mesh, lm, resume=resume, progress=progress and mesh.leads)


def _train(
    config: TrainConfig, device: torch.device, mesh: Mesh, lm: LanguageModel | None, *, resume: bool, progress: bool
) -> Run:
    started = time.monotonic()
    shape = lm.shape if lm is not None else read_shape(config.lm)
    config = prepared(config, shape, device)
    mesh.everywhere(lambda: devices.check_fits(config, shape.d_model, device, share_of_latents(mesh)))
    run = RunDirectory(Path(config.out), config.to_dict(), resume=resume, mesh=mesh)
    try:
        lm = load_lm(config, device) if lm is None else lm
        loop = Loop(config, lm, run, resume=resume, progress=progress, mesh=mesh)
        with StopFlag() as loop.stop:
            loop.run()
        return loop.summary(time.monotonic() - started)
    finally:
        run.close()


class Progress(Config):
    """How far a run is: state.json of its checkpoints."""

    position: Annotated[int, Field(ge=0, lt=2**62)]
    """Blocks of the endless stream read so far: the one integer that says where in the data a run is."""
    validated: Annotated[int, Field(ge=0)]
    """Step after which the last validation was."""
    metrics_bytes: Annotated[int, Field(ge=0, lt=2**62)]
    """Length of metrics.jsonl that belongs to it; what a killed process wrote after it is forgotten."""
    tokenizer_fingerprint: str
    """SHA-256 that tells the tokenizer from others."""
    sae: MLSAEConfig | None = None
    """What the SAE is, for those who read it out of the checkpoint; None: an earlier version wrote this."""


class Loop:
    """One process's part of a run, from its first step or the newest checkpoint to the last step or a stop.

    Runs that are given one `stream` share what they read.
    """

    def __init__(
        self,
        config: TrainConfig,
        lm: LanguageModel,
        run: RunDirectory,
        *,
        resume: bool,
        progress: bool,
        stream: Stream | None = None,
        mesh: Mesh = ALONE,
    ):
        self.config, self.lm, self.run_directory, self.progress, self.mesh = config, lm, run, progress, mesh
        self.stop = StopFlag()
        """Whether a signal asked for a stop; it listens while `run` runs."""
        self.batch = config.batch_size or 1
        self.accumulation = config.accumulation_steps or 1
        self.context = config.context_length or 1
        self.step_tokens = self.batch * self.accumulation * self.context
        self.n_steps = config.tokens // self.step_tokens
        self.stream = Stream(config, lm, progress=progress, mesh=mesh) if stream is None else stream
        self.blocks = self.stream.blocks
        if not config.repeat:
            self.n_steps = min(self.n_steps, len(self.blocks) // (self.batch * self.accumulation))
        if self.n_steps == 0:
            raise DataError(
                "data", f"{self.blocks.n_tokens} tokens is less than one step ({self.step_tokens}); allow --repeat"
            )
        torch.manual_seed(config.seed)
        sae = make_sae(described_sae(config, lm), mesh).to(lm.device)
        check_pair(lm, sae)
        if config.lens is not None and not resume:  # a checkpoint holds the lens
            sae.set_lens(TunedLens.load(config.lens, lm))
        self.trainer = Trainer(sae, config, n_steps=self.n_steps, step_tokens=self.step_tokens, mesh=mesh)
        self.position = 0
        """Blocks of the endless stream read so far: the one integer that says where in the data a run is."""
        self.norms = Norms(len(sae.layers), mesh)
        self.metrics_bytes = 0
        """Length of metrics.jsonl that belongs to what was resumed; what a killed process wrote after it is forgotten."""
        self.validation = validation_blocks(config, lm, self.blocks, mesh, progress=progress)
        self.validated = 0
        """Step after which the last validation was."""
        if resume:
            self.trainer.variance = torch.zeros(len(sae.layers))  # one of the tensors there will be
            self._load(run.load(like=self._checkpoint(metrics_bytes=0)))
        else:
            self._say_passes()
            self._initialise()

    def run(self) -> None:
        """Every remaining step."""
        for _ in self.going():
            pass

    def going(self) -> Generator[None]:
        """Every remaining step, the loop itself; it pauses after each micro-batch, for others to learn from that too."""
        with self._lines() as self.metrics, self._reporter() as reporter:
            self.metrics.truncate(self.metrics_bytes)
            self._validate(reporter)
            for step in range(self.trainer.steps + 1, self.n_steps + 1):
                reporter.report((yield from self._step()), self.step_tokens, self._extra())
                stopping = self.stopping()
                if step % (self.config.save_every_steps or 1) == 0 or step == self.n_steps or stopping:
                    self._save()
                if stopping and step < self.n_steps:
                    raise self.stopped()
                self._validate(reporter)
            self._save_sae()

    def stopping(self) -> bool:
        """Whether a stop was asked for, of any process: they all stop at the same place."""
        return self.mesh.any(self.stop.asked)

    def _lines(self) -> files.JsonLines | NoLines:
        """metrics.jsonl, which one process writes."""
        return files.JsonLines(self.run_directory.path / "metrics.jsonl") if self.mesh.leads else NoLines()

    def _step(self) -> Generator[None, None, StepReport]:
        """Read a step's text and learn from it; one that fails is undone, the state before it saved, the run ended."""
        before, norms = self.position, (self.norms.left_out, self.norms.largest)
        try:
            for reading in self._readings():
                self.trainer.accumulate(reading.to_train(self.trainer.sae))
                self.norms.see(reading)
                yield
            self.norms.add_up()
            return self.trainer.update()
        except (NumericsError, MemoryError, RuntimeError) as error:
            if isinstance(error, NumericsError):
                documents = self.stream.documents(before, self.position)
                ending = NumericsError(error.field, f"{error.problem} (documents {documents} of the data)")
            elif out_of_memory(error):
                ending = ResourceError("memory", f"not enough at step {self.trainer.steps + 1}{self._too_large()}")
            else:
                raise
            self.trainer.abandon()
            self.position, (self.norms.left_out, self.norms.largest) = before, norms
            self.norms.forget()
            self.stream.forget()
            if self.trainer.steps and (self.mesh.alone or isinstance(error, NumericsError)):  # which all agree on
                with contextlib.suppress(NumericsError):  # what is not finite is the state itself: it is not saved
                    self._save()
            raise ending from error

    def _too_large(self) -> str:
        """What to do about memory, with the most that was in use."""
        peak = devices.peak_memory(self.lm.device) / 1e9
        saved = "what was learned is saved: free some and --resume, or" if self.trainer.steps else "free some, or"
        return (
            f" (at most {peak:.1f} GB in use); {saved} begin a run with less batch_size (now {self.batch}), "
            f"context_length ({self.context}) or expansion_factor"
        )

    def summary(self, seconds: float) -> Run:
        """The finished run in numbers."""
        tokens = self.trainer.steps * self.step_tokens
        last = self.mesh.by_leader(self._last_line)
        return Run(
            directory=str(self.run_directory.path),
            steps=self.trainer.steps,
            tokens=tokens,
            passes=self.position / len(self.blocks),
            fvu=last["fvu"],
            dead_fraction=float(self.trainer.dead().float().mean()),
            masked_by_norm=self.norms.left_out.tolist(),
            seconds=seconds,
        )

    def _last_line(self) -> dict[str, Any]:
        lines = untrusted.read_jsonl(self.run_directory.path / "metrics.jsonl", last_bytes=1 << 20)
        return [row for row in lines if "fvu" in row][-1]

    def _readings(self) -> Iterator[Reading]:
        """The step's micro-batches."""
        return self.stream.readings(self.trainer.sae, self._positions())

    def _positions(self) -> Iterator[int]:
        """Where each of the step's micro-batches begins; moves on as they are taken."""
        for _ in range(self.accumulation):
            first, last = self.position - 1, self.position + self.batch - 1
            if (passed := self.blocks.pass_of(last)) > self.blocks.pass_of(max(first, 0)):
                self.stream.warn(f"the text was read {passed} times and starts over")
            yield self.position
            self.position += self.batch

    def _sample(self) -> Iterator[torch.Tensor]:
        return self.stream.sample(self.trainer.sae)

    def _initialise(self) -> None:
        """Fix what the first batches fix; of runs that share them and begin alike, only the first reads them."""
        if (fit := self.stream.fit_of(self.trainer.sae)) is None:
            self.stream.keep_fit(self.trainer.sae, self.trainer.initialise(self._sample()))
        else:
            tensors, self.trainer.variance = fit
            self.trainer.sae.load_state_dict(tensors, strict=False)

    def _extra(self) -> dict[str, Any] | None:
        """What metrics.jsonl holds beside the report of the step just taken, if it has a line there: then norms begin anew."""
        if self.trainer.steps % (self.config.log_every_steps or 1) and self.trainer.steps < self.n_steps:
            return None
        return {"masked_by_norm": self.norms.left_out.tolist(), "norm_ratio": self.norms.ratio()}

    def _validate(self, reporter: Reporter) -> None:
        """The validation that is due after the step last taken. If it is stopped, the resumed run does it from its start."""
        step = self.trainer.steps
        if self.validation is None or step % (self.config.validate_every_steps or 1) or step == self.validated:
            return
        quiet = self.trainer.quiet
        try:
            fvu = validate(self.trainer, self.lm, self.validation, self.config, self._end_if_asked)
            reporter.validated(step, self.trainer.tokens, fvu)
        except Interrupted:
            self.trainer.quiet = quiet
            self._save()
            raise
        self.validated = step

    def _end_if_asked(self) -> None:
        if self.stopping():
            raise self.stopped()

    def stopped(self) -> Interrupted:
        """The end of a run that was asked to stop."""
        end = Interrupted("train", f"stopped after step {self.trainer.steps} of {self.n_steps}; --resume continues")
        end.elsewhere = not self.mesh.leads
        return end

    def _save(self) -> None:
        """A checkpoint of this moment between two steps, and the SAE where `from_pretrained` finds it."""
        checkpoint = self._checkpoint(metrics_bytes=self.metrics.sync())
        self.run_directory.save(checkpoint, self.config.keep_checkpoints)
        self._save_sae()

    def _save_sae(self) -> None:
        """The SAE as one file; where processes share its latents, out of those of the newest checkpoint."""
        sae, folder = self.trainer.sae, self.run_directory.path / "sae"
        if self.mesh.tp == 1:
            self.mesh.by_leader(lambda: sae.save_pretrained(folder, lm=self.lm, step=self.trainer.steps))
        else:
            behaviour = fingerprint.behaviour(sae, self.lm)
            self.mesh.by_leader(lambda: export_sae(self.run_directory.steps()[-1], folder, behaviour))

    def _checkpoint(self, *, metrics_bytes: int) -> Checkpoint:
        """Everything that a run is, between two steps. Live tensors: they are to be saved at once."""
        counts = {"over_norm": self.norms.left_out, "largest_norm": self.norms.largest}
        state = {**self.trainer.state(), **counts, "rng.torch": torch.get_rng_state()}
        progress = Progress(
            position=self.position,
            validated=self.validated,
            metrics_bytes=metrics_bytes,
            tokenizer_fingerprint=self.lm.tokenizer.fingerprint,
            sae=self.trainer.sae.config,
        )
        return Checkpoint(self.trainer.steps, dict(self.trainer.sae.state_dict()), state, progress.to_dict())

    def _load(self, checkpoint: Checkpoint) -> None:
        progress = Progress(**checkpoint.info)
        theirs, ours = progress.tokenizer_fingerprint, self.lm.tokenizer.fingerprint
        if theirs != ours:
            raise ModelError(
                "lm", f"its tokenizer is {ours[:12]}; the run read text with {theirs[:12]}; use that again"
            )
        self.trainer.sae.load_state_dict(checkpoint.sae)
        self.trainer.load_state(checkpoint.state)
        torch.set_rng_state(checkpoint.state["rng.torch"])
        self.norms.left_out, self.norms.largest = checkpoint.state["over_norm"], checkpoint.state["largest_norm"]
        self.position, self.validated = progress.position, progress.validated
        self.metrics_bytes = progress.metrics_bytes
        log.info("resuming after step %d of %d", self.trainer.steps, self.n_steps)

    def _say_passes(self) -> None:
        info = self.blocks.info
        if info.n_skipped_rows or info.n_empty_documents:
            self.stream.warn(f"the text: {self.blocks.summary()}")
        if (used := self.n_steps * self.step_tokens) + self.step_tokens <= self.config.tokens:
            self.stream.warn(f"the text ends after {used} of {self.config.tokens} tokens: training takes no more")
        passes = self.n_steps * self.batch * self.accumulation / len(self.blocks)
        if passes > 1:
            n_tokens = self.blocks.n_tokens
            self.stream.warn(f"the text holds {n_tokens} tokens: training will take {passes:.1f} passes")

    def _reporter(self) -> Reporter:
        warmup = int((self.config.warmup_fraction or 0.0) * self.n_steps)
        return Reporter(
            self.metrics,
            open_logger(self.config.log_to, self.run_directory.path, self.config.to_dict())
            if self.mesh.leads
            else None,
            done=self.trainer.steps * self.step_tokens,
            total=self.n_steps * self.step_tokens,
            warmup=warmup * self.step_tokens,
            progress=self.progress,
        )
