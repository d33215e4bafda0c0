"""Every figure of one analysis, in the order of a report."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlsae.analysis.cosines import directions, similarity, vocabulary
from mlsae.analysis.curves import quality, training
from mlsae.analysis.heatmaps import heatmap, prompt_heatmap, prompt_positions
from mlsae.analysis.lives import latents, lives
from mlsae.analysis.picture import Picture, save
from mlsae.analysis.spread import centre_of_mass, spread, variance
from mlsae.analyze import Analysis

__all__ = ["FIGURES", "Picture", "pictures", "save"]

FIGURES: tuple[Callable[[Analysis], Picture | None], ...] = (
    heatmap, spread, variance, centre_of_mass, lives, latents, prompt_heatmap, prompt_positions, directions, vocabulary,
    similarity,
)  # fmt: skip
"""What is drawn of an Analysis; None where there is nothing to draw."""


def pictures(
    analysis: Analysis, evaluation: Mapping[str, Any] | None = None, metrics: Sequence[Mapping[str, Any]] = ()
) -> list[Picture]:
    """Every figure that these numbers allow, in the order of a report; `evaluation` is an Evaluation.to_dict()."""
    return [
        picture
        for picture in (training(metrics), quality(evaluation) if evaluation else None, *(f(analysis) for f in FIGURES))
        if picture is not None
    ]
