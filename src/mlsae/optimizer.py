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


class Optimizer:
    """Torch's Adam. A step is `norms = mean_gradients(n)`, then `step(lr, factor)` or, to leave the weights alone, `forget()`."""

    def __init__(self, sae: MLSAE, config: TrainerConfig, lr: float):
        self.sae, self.config = sae, config
        self.unit_rows = config.rules.normalize == "after_step"
        device = sae.W_enc.device
        fused = device.type in ("cpu", "cuda")
        self.adam = torch.optim.Adam(self.weights(), lr=lr, betas=config.adam_betas, eps=config.adam_eps, fused=fused)
        for weight in self.weights():  # the moments are made at once, so that `state()` always has them
            moments = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
            self.adam.state[weight] = {"step": torch.tensor(0.0, device=device), **moments}
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")

    def weights(self) -> list[Tensor]:
        """The tensors it trains, in the order of WEIGHTS."""
        return [getattr(self.sae, name) for name in WEIGHTS]

    def gradients(self) -> list[Tensor]:
        """What the backward passes have summed."""
        return [weight.grad for weight in self.weights() if weight.grad is not None]

    def mean_gradients(self, n_tokens: int) -> dict[str, float]:
        """Turn sums over tokens into means, keep the decoder's rows from growing, and give each gradient's norm."""
        self.scaler.unscale_(self.adam)
        for gradient in self.gradients():
            gradient.div_(n_tokens)
        if self.unit_rows:
            self.project()
        return {name: float(gradient.norm()) for name, gradient in zip(WEIGHTS, self.gradients(), strict=True)}

    @torch.no_grad()
    def project(self) -> None:
        """Remove from each decoder row's gradient its component along the (unit) row: the norm is not the loss's to change."""
        W_dec, (_, gradient, _) = self.sae.W_dec, self.gradients()
        gradient -= (gradient * W_dec).sum(1, keepdim=True) * W_dec

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

    def forget(self) -> None:
        """Drop the gradient."""
        self.adam.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Live moments and, with float16, the scaler's."""
        state = {}
        for name in WEIGHTS:
            for moment, value in self.adam.state[getattr(self.sae, name)].items():
                state[f"adam.{name}.{moment}"] = value
        if self.scaler.is_enabled():
            scaler = self.scaler.state_dict()
            state["scaler"] = torch.tensor([scaler["scale"], scaler["_growth_tracker"]], dtype=torch.float64)
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state()` gave."""
        for name in WEIGHTS:
            for moment, value in self.adam.state[getattr(self.sae, name)].items():
                value.copy_(state[f"adam.{name}.{moment}"])
        if self.scaler.is_enabled():
            scale, tracker = state["scaler"].tolist()
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": scale, "_growth_tracker": int(tracker)})


class FusedOptimizer(Optimizer):
    """The same in one pass over the rows of each weight: mean, projection, Adam and unit norm. The gradient stays as it is."""

    def mean_gradients(self, n_tokens: int) -> dict[str, float]:
        """The norms of the means, and what of each row's gradient will be left out."""
        self._mean = 1 / n_tokens
        self._along, norms = {}, {}
        for name, weight, gradient in zip(WEIGHTS, self.weights(), self.gradients(), strict=True):
            self._along[name], norm = cpu.project(*_rows(weight, gradient), unit=self._unit(name))
            norms[name] = norm * self._mean
        return norms

    @torch.no_grad()
    def step(self, lr: float, factor: float) -> None:
        """Step down `factor` times the gradient and forget it."""
        rates = {"lr": lr, "betas": self.config.adam_betas, "eps": self.config.adam_eps, "factor": factor * self._mean}
        for name, weight, gradient in zip(WEIGHTS, self.weights(), self.gradients(), strict=True):
            moments, along = self.adam.state[weight], self._along[name]
            cpu.adam_(*_rows(weight, gradient), moments, along, unit=self._unit(name), **rates)
        self.forget()

    def _unit(self, name: str) -> bool:
        return self.unit_rows and name == "W_dec"


def optimizer_of(sae: MLSAE, config: TrainerConfig, lr: float) -> Optimizer:
    """The one that suits the SAE's device and `config.impl`."""
    fused = ops.choose(config.impl, sae.W_enc) is cpu and config.precision in (None, "float32")
    return (FusedOptimizer if fused else Optimizer)(sae, config, lr)


def _rows(*tensors: Tensor) -> list[Tensor]:
    return [tensor.view(-1, tensor.shape[-1]) for tensor in tensors]
