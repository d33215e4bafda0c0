"""One optimizer step on residual vectors you bring. `train` is the loop around it."""

import contextlib
import itertools
import math
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mlsae import losses
from mlsae.config import TrainerConfig, default_lr
from mlsae.errors import ConfigError, NumericsError
from mlsae.formats.weights import nonfinite
from mlsae.initial import initialise
from mlsae.mesh import ALONE, Mesh
from mlsae.optimizer import optimizer_of
from mlsae.parallel import SHARDED
from mlsae.sae import MLSAE, Code

MAX_OVERFLOWS = 20
"""Steps in a row that float16 may skip because a gradient overflowed."""


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did."""

    step: int
    """Steps taken, this one included."""
    tokens: int
    """Unmasked tokens trained on so far."""
    loss: float
    """Reconstruction loss plus the weighted AuxK loss."""
    aux_loss: float
    """AuxK loss before its weight."""
    fvu: float
    """Mean over layers of `sum |resid - recon|^2 / (N d v_l)`, v_l being the layer's variance in the initial sample.

    Of an SAE with a lens, behind the lens.
    """
    layer_fvu: list[float]
    """The same for each layer."""
    dead_fraction: float
    """Share of latents without a value above the threshold, at any layer, for `dead_after_tokens` tokens."""
    lr: float
    """Learning rate of this step."""
    grad_norm: float
    """Norm of the whole gradient, before clipping."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values by field name."""
        return dict(vars(self))


class Trainer:
    """Adam on one SAE: `step(resid)` takes one step; `accumulate(resid)` some micro-batches, then `update()`, the same.

    The first vectors it is shown fix the SAE's frame, limits and bias, unless `initialise` was called before. Everything that
    a resumed run needs, and the SAE itself does not, is in `state()`.

    Args:
        n_steps: length of the learning-rate schedule; None: no warm-up and no decay.
        step_tokens: tokens of a step, masked ones included; only the `lawson2024` dead-latent clock needs it.
        mesh: the processes that learn together, each from its own vectors; all must call the same methods in the same order.
    """

    def __init__(
        self,
        sae: MLSAE,
        config: TrainerConfig | None = None,
        *,
        n_steps: int | None = None,
        step_tokens: int | None = None,
        mesh: Mesh = ALONE,
    ):
        if sae.foreign_encoder:
            raise ConfigError(
                "sae", "has a bias for each latent or thresholds; only TopK SAEs without are trained here"
            )
        self.sae, self.mesh = sae, mesh
        sae.fingerprint = None
        self.config = config or TrainerConfig(recipe=sae.config.recipe)
        self.rules = self.config.rules
        self.n_steps = n_steps
        if mesh.tp > 1 and self.config.precision == "float16":
            raise ConfigError(
                "precision", f"float16 is not trained with tp {mesh.tp}; use bfloat16 or float32, or tp 1"
            )
        n_latents = sae.config.n_latents
        self.peak_lr = _given(self.config.lr, self.rules.lr, default_lr(n_latents // sae.config.groups))
        self.k_aux = _given(self.config.k_aux, min(256, n_latents))
        self.dead_after = _given(self.config.dead_after_tokens, self.rules.dead_after_tokens, 10_000_000)
        if self.rules.dead_clock == "forwards":
            self.dead_after //= step_tokens or 131_072  # defect D2: a count of steps, compared with a count of forwards
        self.optimizer = optimizer_of(sae, self.config, self.peak_lr)
        self.precision = self.config.precision or "float32"
        self.variance: Float[Tensor, " layer"] | None = None
        self.quiet = torch.zeros(n_latents, dtype=torch.int64, device=sae.W_enc.device)
        """Tokens (lawson2024: forward passes) since each latent was last active, at any layer."""
        self._begun = False
        """A step is in progress; what it changes before it is sound is kept as it was."""
        self._quiet_before = self.quiet
        self._decoder_before = sae.W_dec.detach()
        self.steps = 0
        self.tokens = 0
        self.overflows = 0
        """float16 steps skipped in a row."""
        self._parts: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def initialise(self, batches: Iterable[Float[Tensor, "layer _ d_model"]]) -> Float[Tensor, " layer"]:
        """Fit the SAE to a sample, of which `init_tokens` are used; returns each layer's variance."""
        batches = iter(batches)
        first = next(batches)
        if self.sae.config.layers is None:
            self.sae.set_layers(first.shape[0])
        sample = itertools.chain([first], batches)
        self.variance = initialise(self.sae, sample, self.config.init_tokens, self.rules).to(self.sae.W_enc)
        fixed = {name: tensor for name, tensor in self.sae.state_dict().items() if name not in SHARDED}
        self.mesh.same({**fixed, "variance": self.variance})
        return self.variance

    def step(self, resid: Float[Tensor, "layer token d_model"]) -> StepReport:
        """One optimizer step on these vectors, weighing every token alike."""
        self.accumulate(resid)
        return self.update()

    def accumulate(self, resid: Float[Tensor, "layer token d_model"]) -> None:
        """Add one micro-batch to the gradient of the coming step."""
        variance = self.variance if self.variance is not None else self.initialise([resid])
        if resid.shape[1] == 0 and self.mesh.dp == 1:
            return
        impl, quiet_before = self.config.impl, self.quiet
        resid = self.sae.lensed(resid)  # what follows, the loss too, is behind the lens
        with self._autocast():
            code = self.sae.encode_lensed(resid, impl=impl)
            n_tokens = self.tick(code, resid.shape[1])
            if n_tokens == 0:
                return
            self._begin(quiet_before)
            error, squared = self.sae.error(resid, code, impl=impl)
            squared = self.mesh.total(squared)
            aux = losses.AUX[self.rules.aux](
                self.sae, resid, code, error, self.dead(), self.k_aux, impl, n_tokens, self.mesh
            )
        per_layer = losses.RECONSTRUCTION[self.rules.variance](resid, squared, variance, n_tokens, self.mesh)
        loss = per_layer.mean() + self.config.aux_coef * aux
        self.optimizer.backward(loss * n_tokens)
        if self.rules.normalize == "each_micro_batch":  # defect D7
            self.sae.normalize_decoder_()
            self.optimizer.project()
        fvu = losses.per_dimension(resid, squared.detach(), variance, n_tokens)
        self._parts.append((n_tokens, loss.detach(), aux.detach(), fvu))

    def _begin(self, quiet: Tensor) -> None:
        """Keep what the step in progress changes before it is sound, if this is its beginning."""
        if not self._begun:
            self._begun, self._quiet_before = True, quiet
            if self.rules.normalize == "each_micro_batch":
                self._decoder_before = self.sae.W_dec.detach().clone()

    def update(self) -> StepReport:
        """Take the step that the accumulated gradient asks for. Raises NumericsError, changing nothing, if it is not finite."""
        if not self._parts:
            raise ConfigError("resid", "no unmasked token in this step; raise batch_size or check the mask")
        n_tokens = sum(n for n, *_ in self._parts)
        try:
            self.mesh.everywhere(self._check_state)
            *sharded, whole = self.optimizer.gradients()
            self.mesh.sum_gradients(sharded, whole)
            norms = self.mesh.norms(self.optimizer.mean_gradients(n_tokens), SHARDED)
            grad_norm = self.mesh.everywhere(lambda: self._finite(norms))
        except NumericsError:
            self.abandon()
            raise
        lr, limit = self._schedule(), self.config.clip_grad_norm
        self.optimizer.step(lr, 1.0 if limit is None or grad_norm <= limit else limit / grad_norm)
        self._begun = False
        self.steps += 1
        self.tokens += n_tokens
        return self._report(n_tokens, lr, grad_norm)

    def dead(self) -> Bool[Tensor, " n_latents"]:
        """Latents that have been quiet for the threshold."""
        return self.quiet >= self.dead_after

    def tick(self, code: Code, n_tokens: int) -> int:
        """Advance the dead-latent clock by one micro-batch, n_tokens of it here; returns how many there are on all ranks."""
        fired = torch.zeros_like(self.quiet, dtype=torch.bool)
        fired[code.indices[code.values > self.config.dead_threshold]] = True
        fired, n_tokens = self.mesh.union(fired, n_tokens)
        forwards = self.rules.dead_clock == "forwards"
        if n_tokens:
            self.quiet = torch.where(fired, 1 if forwards else 0, self.quiet + (1 if forwards else n_tokens))
        return n_tokens

    def _check_state(self) -> None:
        """Stop the run at a weight, moment or statistic that is not finite, seen by this step's vectors or not."""
        if (name := nonfinite({**self.sae.state_dict(), **self.state()})) is not None:
            raise NumericsError(name, f"not finite before step {self.steps + 1}; go back to a checkpoint before it")

    def _finite(self, norms: dict[str, float]) -> float:
        """The whole gradient's norm; stops the run at the first loss or gradient that is not finite."""
        for _, loss, _, _ in self._parts:
            if not math.isfinite(float(loss)):
                raise NumericsError(
                    "loss", f"{float(loss)} at step {self.steps + 1}; lower lr, or look at the data of this step"
                )
        for name, norm in norms.items():
            if not math.isfinite(norm) and self.precision != "float16":
                raise NumericsError(
                    f"gradient of {name}", f"{norm} at step {self.steps + 1}; lower lr or set clip_grad_norm"
                )
        norm = math.hypot(*norms.values())
        self.overflows = 0 if math.isfinite(norm) else self.overflows + 1
        if self.overflows == MAX_OVERFLOWS:
            raise NumericsError(
                "gradient", f"{MAX_OVERFLOWS} float16 overflows in a row; use --precision bfloat16 or float32"
            )
        return norm

    def abandon(self) -> None:
        """Forget the step in progress, if one is."""
        self.optimizer.forget()
        self._parts = []
        if not self._begun:
            return
        self._begun, self.quiet = False, self._quiet_before
        if self.rules.normalize == "each_micro_batch":
            self.sae.W_dec.data.copy_(self._decoder_before)

    def _schedule(self) -> float:
        """This step's learning rate: linear warm-up, constant, linear decay."""
        factor = 1.0
        if self.n_steps is not None:
            warmup = _given(self.config.warmup_fraction, self.rules.warmup_fraction) * self.n_steps
            decay = _given(self.config.decay_fraction, self.rules.decay_fraction) * self.n_steps
            factor = min(1.0, (self.steps + 1) / warmup if warmup else 1.0)
            factor = min(factor, max(0.0, self.n_steps - self.steps) / decay if decay else 1.0)
        return self.peak_lr * factor

    def _report(self, n_tokens: int, lr: float, grad_norm: float) -> StepReport:
        parts, self._parts = self._parts, []
        weights = [n / n_tokens for n, *_ in parts]
        loss = sum(w * float(loss) for w, (_, loss, _, _) in zip(weights, parts, strict=True))
        aux = sum(w * float(aux) for w, (_, _, aux, _) in zip(weights, parts, strict=True))
        layers = torch.stack([w * fvu for w, (*_, fvu) in zip(weights, parts, strict=True)]).sum(0)
        return StepReport(
            step=self.steps,
            tokens=self.tokens,
            loss=loss,
            aux_loss=aux,
            fvu=float(layers.mean()),
            layer_fvu=layers.tolist(),
            dead_fraction=float(self.dead().float().mean()),
            lr=lr,
            grad_norm=grad_norm,
        )

    @contextlib.contextmanager
    def _autocast(self) -> Generator[None]:
        dtype = getattr(torch, self.precision)
        with torch.autocast(self.sae.W_enc.device.type, dtype=dtype, enabled=dtype != torch.float32):
            yield

    # ---- what a resumed run needs --------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Everything but the SAE: moments, variances, quiet times, counters. Live tensors: copy them to keep this moment."""
        state = {"quiet": self.quiet, "counters": torch.tensor([self.steps, self.tokens])}
        if self.variance is not None:
            state["variance"] = self.variance
        return state | self.optimizer.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state()` gave."""
        self.quiet = state["quiet"].to(self.quiet)
        self.steps, self.tokens = state["counters"].tolist()
        self.variance = state["variance"].to(self.sae.W_enc) if "variance" in state else None
        self.optimizer.load_state(state)


def _given(*values: Any) -> Any:
    """The first value that is not None: 0 is a value."""
    return next(value for value in values if value is not None)
