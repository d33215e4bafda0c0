"""What a sample of residual vectors fixes before the first step: norm limits, the frame, variances, and `b_pre`."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from mlsae.config import Recipe
from mlsae.errors import DataError
from mlsae.metrics import Moments
from mlsae.sae import MLSAE

MEDIAN_VECTORS = 32_768
"""Vectors, over all layers, whose geometric median becomes `b_pre`."""
NORM_TOKENS = 1024
"""Tokens whose norms give each layer's median."""


@torch.no_grad()
def initialise(
    sae: MLSAE, batches: Iterable[Float[Tensor, "layer token d_model"]], n_tokens: int, rules: Recipe
) -> Float[Tensor, " layer"]:
    """Fit the SAE's norm limits, frame and `b_pre` to about `n_tokens` tokens; returns each layer's variance.

    `batches` hold the vectors left by masking, without the limit on norms. They are read once and not kept, but for a sample
    of `MEDIAN_VECTORS`. Raises DataError if there is no token at all.
    """
    moments, sample, first, seen = None, [], [], 0
    for resid in batches:
        seen += resid.shape[1]
        first.append(resid)
        if moments is None and seen < min(NORM_TOKENS, n_tokens):
            continue  # the limit on norms needs enough tokens for a median
        if moments is None:
            _set_norm_limit(sae, torch.cat(first, 1))
            moments = Moments(*first[0].shape[::2])
        for part in first:
            part = part[:, sae.within_norm(part).all(0)]
            moments.update(part)
            sample.append(_thinned(part, n_tokens))
        first = []
        if seen >= n_tokens:
            break
    if moments is None and first:  # a short sample
        return initialise(sae, [torch.cat(first, 1)], 1, rules)
    if moments is None or moments.n_tokens == 0:
        raise DataError("data", "no token is left after masking; use longer text")
    sae.frame.fit(moments.mean, moments.variance)
    _set_bias(sae, torch.cat(sample, 1), rules)
    return moments.variance


def _set_norm_limit(sae: MLSAE, resid: Tensor) -> None:
    factor = sae.config.mask_norm_factor
    if factor is not None:
        sae.norm_limit.copy_(factor * resid.norm(dim=-1).median(1).values)


def _thinned(resid: Tensor, n_tokens: int) -> Tensor:
    """Every so-manieth token, so that the sample for the median stays small whatever the model."""
    return resid[:, :: max(1, n_tokens * resid.shape[0] // MEDIAN_VECTORS)].clone()


def _set_bias(sae: MLSAE, sample: Float[Tensor, "layer token d_model"], rules: Recipe) -> None:
    """`b_pre` of each group is the geometric median of its layers' vectors: framed, or (lawson2024, defect D4) raw."""
    rows = list(range(sample.shape[0]))
    if rules.bias_init == "framed":
        sample = sae.frame.apply_to(sample, *sae.frame.shift_and_scale(sample, rows))
    for here, group, _ in sae.parts(rows):
        sae.biases.data[group] = geometric_median(sample[here].flatten(0, 1))


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
