"""What a sample of residual vectors fixes before the first step: norm limits, the frame, variances, and `b_pre`."""

import itertools
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from mlsae.errors import DataError
from mlsae.metrics import Moments
from mlsae.recipes import Recipe
from mlsae.sae import MLSAE

MEDIAN_VECTORS = 32_768
"""Vectors, over all layers, whose geometric median becomes `b_pre`."""
NORM_TOKENS = 1024
"""Tokens whose norms give each layer's median."""


@torch.no_grad()
def initialise(
    sae: MLSAE, batches: Iterable[Float[Tensor, "layer _ d_model"]], n_tokens: int, rules: Recipe
) -> Float[Tensor, " layer"]:
    """Fit the SAE's norm limits, frame and `b_pre` to about `n_tokens` tokens; returns each layer's variance.

    `batches` hold the vectors left by masking, without the limit on norms. They are read once and not kept, but for a sample
    of `MEDIAN_VECTORS`. Limits are for norms in the residual stream; all else is behind the SAE's lens, if it has one.
    Raises DataError if there is no token at all, or a layer does not vary.
    """
    batches = iter(batches)
    first = _take(batches, min(NORM_TOKENS, n_tokens))
    _set_norm_limit(sae, torch.cat(first, 1))
    moments, sample = Moments(*first[0].shape[::2]), _Sample()
    for resid in itertools.chain(first, batches):
        resid = sae.lensed(resid[:, sae.within_norm(resid.norm(dim=-1)).all(0)])
        sample.add(resid, moments.n_tokens)
        moments.update(resid)
        if moments.n_tokens >= n_tokens:
            break
    if not (moments.variance > 0).all():
        layer = sae.layers[int(moments.variance.argmin())]
        raise DataError("data", f"layer {layer} does not vary over {moments.n_tokens} tokens; use longer text")
    sae.frame.fit(moments.mean, moments.variance)
    _set_bias(sae, sae.lensed(first[0]) if rules.bias_init == "raw" else sample.vectors(), rules)
    return moments.variance


def _take(batches: Iterator[Tensor], n_tokens: int) -> list[Tensor]:
    """The first batches, until they hold `n_tokens` tokens: enough for a median of norms."""
    taken: list[Tensor] = []
    for resid in batches:
        taken.append(resid)
        if sum(part.shape[1] for part in taken) >= n_tokens:
            break
    if not any(part.shape[1] for part in taken):
        raise DataError("data", "no token is left after masking; use longer text")
    return taken


def _set_norm_limit(sae: MLSAE, resid: Tensor) -> None:
    factor = sae.config.mask_norm_factor
    if factor is not None:
        sae.norm_limit.copy_(factor * resid.norm(dim=-1).median(1).values)


class _Sample:
    """Evenly spaced tokens of a stream, at most twice `MEDIAN_VECTORS` vectors whatever its length."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._stride = 1

    def add(self, resid: Tensor, n_before: int) -> None:
        self._parts.append(resid[:, -n_before % self._stride :: self._stride].clone())
        while sum(part.shape[0] * part.shape[1] for part in self._parts) > 2 * MEDIAN_VECTORS:
            self._parts = [self.vectors()[:, ::2]]
            self._stride *= 2

    def vectors(self) -> Float[Tensor, "layer token d_model"]:
        return torch.cat(self._parts, 1)


def _set_bias(sae: MLSAE, sample: Float[Tensor, "layer token d_model"], rules: Recipe) -> None:
    """`b_pre` of each group is the geometric median of its layers' vectors: framed, or (lawson2024, defect D4) raw."""
    rows = list(range(sample.shape[0]))
    if rules.bias_init == "framed":
        sample = sae.frame.apply_to(sample, *sae.frame.shift_and_scale(sample, rows))
    for part in sae.parts(rows):
        sae.biases.data[part.group] = geometric_median(sample[part.here].flatten(0, 1))


def geometric_median(
    points: Float[Tensor, "point d_model"], max_steps: int = 100, tolerance: float = 1e-5
) -> Float[Tensor, " d_model"]:
    """The point with the least summed distance to all points: Weiszfeld's iteration from the mean."""
    median = points.mean(0)
    for _ in range(max_steps):
        weights = 1 / (points - median).norm(dim=1).clamp_min(1e-12)
        previous, median = median, (weights / weights.sum()) @ points
        if (median - previous).norm() < tolerance:
            break
    return median
