"""The training step in NumPy float64, written from the equations alone (docs/method.md): what the tests compare with.

Everything is dense and obvious: a code is a [layer, token, n_latents] array that is zero off its support, and every
gradient is derived by hand. Weights carry a leading group axis: W_enc, W_dec [group, n_latents, d_model], b_pre
[group, d_model]; `group_of` says which group each layer uses.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = dict[str, Array]

ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 6.25e-10
VECTOR_EPS = 1e-5


def framed(kind: str, x: Array, mean: Array | None, scale: Array | None) -> tuple[Array, Array, Array]:
    """x', and the shift and scale that lead back out: xh = (...) * scale + shift."""
    if kind == "vector":
        shift = x.mean(-1, keepdims=True)
        out_scale = (x - shift).std(-1, ddof=1, keepdims=True)
        return (x - shift) / (out_scale + VECTOR_EPS), shift, out_scale
    if kind == "layer":
        assert mean is not None
        assert scale is not None
        shift, out_scale = mean[:, None, :], scale[:, None, None]
        return (x - shift) / out_scale, shift, out_scale
    return x, np.zeros_like(x[..., :1]), np.ones_like(x[..., :1])


def top_code(pre_acts: Array, k: int, among: NDArray[np.bool_] | None = None) -> Array:
    """ReLU of the k largest pre-activations of each row (of those in `among`), as a dense array."""
    scores = pre_acts if among is None else np.where(among, pre_acts, -np.inf)
    order = np.argsort(-scores, axis=-1)[..., :k]
    kept = np.zeros(pre_acts.shape, dtype=bool)
    np.put_along_axis(kept, order, True, axis=-1)
    return np.where(kept & (scores > 0), pre_acts, 0.0)


@dataclass
class Problem:
    """What does not change during training."""

    k: int
    n_layers: int
    group_of: list[int]
    frame: str = "layer"
    mean: Array | None = None
    scale: Array | None = None
    variance: Array | None = None
    """v_l of section 5; unused by lawson2024."""
    lawson2024: bool = False
    k_aux: int = 0
    alpha: float = 1 / 32

    @property
    def n_groups(self) -> int:
        return max(self.group_of) + 1


@dataclass
class Result:
    """One forward and backward pass over resid [layer, token, d_model]."""

    recon_loss: float
    aux_loss: float
    """Already multiplied by alpha."""
    code: Array
    recon: Array
    grads: Weights


def encode(p: Problem, w: Weights, x: Array) -> tuple[Array, Array, Array, Array, Array]:
    """pre_acts, code, centred input x' - b_pre, shift, scale."""
    group = np.array(p.group_of)
    x_in, shift, scale = framed(p.frame, x, p.mean, p.scale)
    centred = x_in - w["b_pre"][group][:, None]
    pre_acts = np.einsum("ltd,lnd->ltn", centred, w["W_enc"][group])
    return pre_acts, top_code(pre_acts, p.k), centred, shift, scale


def decode(p: Problem, w: Weights, code: Array) -> Array:
    """sum_i z_i W_dec[i], without b_pre and before the frame is undone."""
    return np.einsum("ltn,lnd->ltd", code, w["W_dec"][np.array(p.group_of)])


def _backward(p: Problem, w: Weights, grads: Weights, code: Array, centred: Array, g_sum: Array, bias: bool) -> None:
    """Add the gradients of a loss whose derivative in `decode(code) (+ b_pre if bias)` is g_sum."""
    for layer, g in enumerate(p.group_of):
        z, up = code[layer], g_sum[layer]
        g_pre = np.where(z > 0, up @ w["W_dec"][g].T, 0.0)
        grads["W_dec"][g] += z.T @ up
        grads["W_enc"][g] += g_pre.T @ centred[layer]
        grads["b_pre"][g] -= (g_pre @ w["W_enc"][g]).sum(0)
        if bias:
            grads["b_pre"][g] += up.sum(0)


def losses(p: Problem, w: Weights, x: Array, dead: NDArray[np.bool_]) -> Result:
    """Both losses and their analytic gradients for one micro-batch; dead is [group, n_latents]."""
    n_layers, n_tokens, d_model = x.shape
    pre_acts, code, centred, shift, scale = encode(p, w, x)
    group = np.array(p.group_of)
    recon = (decode(p, w, code) + w["b_pre"][group][:, None]) * scale + shift
    grads = {name: np.zeros_like(value) for name, value in w.items()}
    error = x - recon

    if p.lawson2024:
        variance = x.reshape(n_layers, -1).var(axis=1, ddof=1)
    else:
        assert p.variance is not None
        variance = p.variance
    weight = 1 / (n_layers * n_tokens * d_model * variance)[:, None, None]
    recon_loss = float((weight * error**2).sum())
    g_error = 2 * weight * error

    aux_loss = 0.0
    if p.k_aux > 0:
        aux_loss, g_error_aux = (_aux_lawson2024 if p.lawson2024 else _aux_standard)(
            p, w, grads, pre_acts, centred, scale, error, dead
        )
        g_error = g_error + g_error_aux
    _backward(p, w, grads, code, centred, -g_error * scale, bias=True)
    return Result(recon_loss, aux_loss, code, recon, grads)


def _aux_standard(
    p: Problem,
    w: Weights,
    grads: Weights,
    pre_acts: Array,
    centred: Array,
    scale: Array,
    error: Array,
    dead: NDArray[np.bool_],
) -> tuple[float, Array]:
    """Section 5: e is a constant, eh = scale * W_dec z_aux, one ratio per layer, 0 where nothing is dead."""
    code = np.zeros_like(pre_acts)
    active = np.array([dead[g].any() for g in p.group_of])
    for layer, g in enumerate(p.group_of):
        code[layer] = top_code(pre_acts[layer], min(p.k_aux, int(dead[g].sum())), dead[g])
    miss = error - scale * decode(p, w, code)
    spread = ((error - error.mean(1, keepdims=True)) ** 2).sum((1, 2))
    weight = np.where(active, p.alpha / (p.n_layers * spread), 0.0)[:, None, None]
    _backward(p, w, grads, code, centred, -2 * weight * miss * scale, bias=False)
    return float((weight * miss**2).sum()), np.zeros_like(error)


def _aux_lawson2024(
    p: Problem,
    w: Weights,
    grads: Weights,
    pre_acts: Array,
    centred: Array,
    scale: Array,
    error: Array,
    dead: NDArray[np.bool_],
) -> tuple[float, Array]:
    """D3: one ratio over everything; the raw, attached error against a framed W_dec z_aux + b_pre."""
    masked = np.where(dead[np.array(p.group_of)][:, None], pre_acts, 0.0)
    code = top_code(masked, p.k_aux)
    miss = error - (decode(p, w, code) + w["b_pre"][np.array(p.group_of)][:, None])
    spread = error - error.mean(-1, keepdims=True)
    top, bottom = (miss**2).mean(), (spread**2).mean()
    if bottom == 0:
        return 0.0, np.zeros_like(error)
    g_miss = p.alpha * 2 * miss / (error.size * bottom)
    g_spread = -p.alpha * top / bottom**2 * 2 * spread / error.size
    _backward(p, w, grads, code, centred, -g_miss, bias=True)
    return float(p.alpha * top / bottom), g_miss + g_spread


def unit_rows(W_dec: Array) -> Array:
    return W_dec / np.linalg.norm(W_dec, axis=-1, keepdims=True)


def project(grad: Array, W_dec: Array) -> Array:
    """grad without its component along each unit row of W_dec."""
    return grad - (grad * W_dec).sum(-1, keepdims=True) * W_dec


def learning_rate(step: int, base: float, warmup: int, decay: int, n_steps: int | None) -> float:
    """Linear warm-up from base / warmup, linear decay to base / decay at the last step."""
    rate = base
    if warmup > 0:
        rate *= min(1.0, (step + 1) / warmup)
    if decay > 0 and n_steps is not None:
        rate *= min(1.0, (n_steps - step) / decay)
    return rate


def scaled_lr(n_latents: int) -> float:
    return 2e-4 / np.sqrt(n_latents / 2**14)


@dataclass
class Training:
    """Weights, Adam moments and the dead clock; `step` takes a list of micro-batches."""

    problem: Problem
    w: Weights
    dead_after: int
    """Tokens; forward calls for lawson2024."""
    threshold: float = 1e-3
    base_lr: float = 1e-4
    warmup: int = 0
    decay: int = 0
    n_steps: int | None = None
    steps: int = 0
    quiet: NDArray[np.int64] = field(init=False)
    first: Weights = field(init=False)
    second: Weights = field(init=False)
    grads: Weights = field(init=False)
    """What the last step handed to Adam."""

    def __post_init__(self) -> None:
        self.quiet = np.zeros(self.w["W_enc"].shape[:2], dtype=np.int64)
        self.first = {name: np.zeros_like(value) for name, value in self.w.items()}
        self.second = {name: np.zeros_like(value) for name, value in self.w.items()}

    def tick(self, code: Array) -> NDArray[np.bool_]:
        """Advance the dead clock by one micro-batch's code and return the dead set."""
        fired = np.zeros(self.quiet.shape, dtype=bool)
        for layer, g in enumerate(self.problem.group_of):
            fired[g] |= (code[layer] > self.threshold).any(0)
        lawson2024 = self.problem.lawson2024
        self.quiet = np.where(fired, int(lawson2024), self.quiet + (1 if lawson2024 else code.shape[1]))
        return self.quiet >= self.dead_after

    def step(self, micro_batches: list[Array]) -> list[Result]:
        """One optimiser step; the results of its micro-batches."""
        total = sum(x.shape[1] for x in micro_batches)
        grads = {name: np.zeros_like(value) for name, value in self.w.items()}
        results = []
        for x in micro_batches:
            dead = self.tick(encode(self.problem, self.w, x)[1])
            result = losses(self.problem, self.w, x, dead)
            for name in grads:
                grads[name] += result.grads[name] * x.shape[1] / total
            if self.problem.lawson2024:
                self.w["W_dec"] = unit_rows(self.w["W_dec"])
                grads["W_dec"] = project(grads["W_dec"], self.w["W_dec"])
            results.append(result)
        if not self.problem.lawson2024:
            grads["W_dec"] = project(grads["W_dec"], self.w["W_dec"])
        self.grads = grads
        self._adam(learning_rate(self.steps, self.base_lr, self.warmup, self.decay, self.n_steps))
        if not self.problem.lawson2024:
            self.w["W_dec"] = unit_rows(self.w["W_dec"])
        return results

    def _adam(self, lr: float) -> None:
        self.steps += 1
        beta1, beta2 = ADAM_BETAS
        for name, g in self.grads.items():
            self.first[name] = beta1 * self.first[name] + (1 - beta1) * g
            self.second[name] = beta2 * self.second[name] + (1 - beta2) * g**2
            first = self.first[name] / (1 - beta1**self.steps)
            second = self.second[name] / (1 - beta2**self.steps)
            self.w[name] = self.w[name] - lr * first / (np.sqrt(second) + ADAM_EPS)


def geometric_median(points: Array, iterations: int = 10_000) -> Array:
    """Weiszfeld from the mean, run until it stands still."""
    centre = points.mean(0)
    for _ in range(iterations):
        weight = 1 / np.maximum(np.linalg.norm(points - centre, axis=1), 1e-300)
        moved = (weight[:, None] * points).sum(0) / weight.sum()
        if np.linalg.norm(moved - centre) < 1e-13:
            return moved
        centre = moved
    return centre


# ---- from the package's objects to the oracle's: shapes only ---------------------------------------------------------


def weights_of(sae: Any) -> Weights:
    """An SAE's weights with their group axis, copied."""
    shape = (sae.config.groups, -1, sae.config.d_model)
    W_enc, W_dec = (w.detach().double().numpy().reshape(shape).copy() for w in (sae.W_enc, sae.W_dec))
    return {"W_enc": W_enc, "W_dec": W_dec, "b_pre": sae.b_pre.detach().double().numpy().reshape(shape[0], -1).copy()}


def like(array: Array, tensor: Any) -> Array:
    """`array` in the shape of one of the SAE's tensors."""
    return array.reshape(tuple(tensor.shape))


def even_groups(n_layers: int, groups: int) -> list[int]:
    """One group for all layers, or runs of neighbours of equal length."""
    assert n_layers % groups == 0
    return [layer * groups // n_layers for layer in range(n_layers)]


def layer_statistics(x: Array) -> tuple[Array, Array]:
    """mu_l, and v_l = sigma_l^2: the mean squared entry of x - mu_l."""
    mean = x.mean(1)
    return mean, ((x - mean[:, None]) ** 2).mean((1, 2))
