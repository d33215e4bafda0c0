"""Adam on an SAE's weights, with the decoder's rows kept at unit norm: torch's own, or on a CPU one pass over each weight.

Both keep the same moments, so a run may stop with one and go on with the other.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mlsae import ops
from mlsae.config import TrainerConfig
from mlsae.ops import cpu
from mlsae.sae import MLSAE

WEIGHTS = ("W_enc", "W_dec", "b_pre")


def optimizer_of(sae: MLSAE, config: TrainerConfig, lr: float) -> "RowAdam":
    """The one that suits the SAE's device and `config.impl`."""
    in_float32 = config.precision in (None, "float32")
    if in_float32 and ops.choose(config.impl, sae.W_enc) is cpu:
        return RowAdam(sae, config)
    return TorchAdam(sae, config, lr)


class RowAdam:
    """Means, projection, Adam and unit norm in one pass over the rows of each weight, by the CPU kernels.

    A step is `backward(loss)` once or more, `norms = mean_gradients(n)`, then `step(lr, factor)`, or else `forget()`.
    """

    def __init__(self, sae: MLSAE, config: TrainerConfig):
        self.sae, self.config = sae, config
        self.unit_rows = config.rules.normalize == "after_step"
        self.moments = {name: _no_moments(getattr(sae, name)) for name in WEIGHTS}
        self._mean, self._along = 1.0, {}

    def weights(self) -> list[Tensor]:
        """The tensors it trains, in the order of WEIGHTS."""
        return [getattr(self.sae, name) for name in WEIGHTS]

    def gradients(self) -> list[Tensor]:
        """What the backward passes have summed."""
        return [weight.grad for weight in self.weights() if weight.grad is not None]

    def backward(self, loss: Tensor) -> None:
        """Add a loss's derivatives to the gradient."""
        loss.backward()

    def mean_gradients(self, n_tokens: int) -> dict[str, float]:
        """The norms of the means. The gradient stays as it is; what of each row is left out is kept for `step`."""
        self._mean, norms = 1 / n_tokens, {}
        for name, weight, gradient in zip(WEIGHTS, self.weights(), self.gradients(), strict=True):
            self._along[name], norm = cpu.project(*_rows(weight, gradient), unit=self._unit(name))
            norms[name] = norm * self._mean
        return norms

    @torch.no_grad()
    def step(self, lr: float, factor: float) -> None:
        """Step down `factor` times the gradient and forget it."""
        rates = {"lr": lr, "betas": self.config.adam_betas, "eps": self.config.adam_eps, "factor": factor * self._mean}
        for name, weight, gradient in zip(WEIGHTS, self.weights(), self.gradients(), strict=True):
            moments, along = self.moments[name], self._along[name]
            cpu.adam_(*_rows(weight, gradient), moments, along, unit=self._unit(name), **rates)
        self.forget()

    @torch.no_grad()
    def project(self) -> None:
        """Remove from each decoder row's gradient its component along the (unit) row."""
        W_dec, (_, gradient, _) = self.sae.W_dec, self.gradients()
        gradient -= (gradient * W_dec).sum(1, keepdim=True) * W_dec

    def forget(self) -> None:
        """Drop the gradient."""
        for weight in self.weights():
            weight.grad = None

    def state(self) -> dict[str, Tensor]:
        """Live moments."""
        return {f"adam.{name}.{key}": value for name in WEIGHTS for key, value in self.moments[name].items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state()` gave."""
        for name in WEIGHTS:
            for key, value in self.moments[name].items():
                value.copy_(state[f"adam.{name}.{key}"])

    def _unit(self, name: str) -> bool:
        return self.unit_rows and name == "W_dec"


class TorchAdam(RowAdam):
    """Torch's Adam on the same moments, and its gradient scaler where training is in float16."""

    def __init__(self, sae: MLSAE, config: TrainerConfig, lr: float):
        super().__init__(sae, config)
        device = sae.W_enc.device.type
        fused = device in ("cpu", "cuda")
        self.adam = torch.optim.Adam(self.weights(), lr=lr, betas=config.adam_betas, eps=config.adam_eps, fused=fused)
        for name, weight in zip(WEIGHTS, self.weights(), strict=True):
            self.adam.state[weight] = self.moments[name]
        self.scaler = torch.amp.GradScaler(device, enabled=config.precision == "float16")

    def backward(self, loss: Tensor) -> None:
        """Add a loss's derivatives, scaled in float16, to the gradient."""
        self.scaler.scale(loss).backward()

    def mean_gradients(self, n_tokens: int) -> dict[str, float]:
        """Turn sums over tokens into means, keep the decoder's rows from growing, and give each gradient's norm."""
        self.scaler.unscale_(self.adam)
        for gradient in self.gradients():
            gradient.div_(n_tokens)
        if self.unit_rows:
            self.project()
        return {name: float(gradient.norm()) for name, gradient in zip(WEIGHTS, self.gradients(), strict=True)}

    def step(self, lr: float, factor: float) -> None:
        """Step down `factor` times the gradient and forget it."""
        if factor != 1.0:
            for gradient in self.gradients():
                gradient.mul_(factor)
        self.adam.param_groups[0]["lr"] = lr
        self.scaler.step(self.adam)
        self.scaler.update()
        if self.unit_rows:
            self.sae.normalize_decoder_()
        self.forget()

    def state(self) -> dict[str, Tensor]:
        """Live moments and, with float16, the scaler's."""
        if not self.scaler.is_enabled():
            return super().state()
        scaler = self.scaler.state_dict()
        numbers = torch.tensor([scaler["scale"], scaler["_growth_tracker"]], dtype=torch.float64)
        return super().state() | {"scaler": numbers}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state()` gave."""
        super().load_state(state)
        if self.scaler.is_enabled():
            scale, tracker = state["scaler"].tolist()
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": scale, "_growth_tracker": int(tracker)})


def _no_moments(weight: Tensor) -> dict[str, Tensor]:
    """Torch's names. They are made at once, so that `state()` always has them."""
    step = torch.tensor(0.0, device=weight.device)
    return {"step": step, "exp_avg": torch.zeros_like(weight.data), "exp_avg_sq": torch.zeros_like(weight.data)}


def _rows(*tensors: Tensor) -> list[Tensor]:
    return [tensor.view(-1, tensor.shape[-1]) for tensor in tensors]
