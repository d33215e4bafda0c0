"""Where in depth the latents of an SAE live: statistics that stream, merge and save, and the pictures made of them."""

from mlsae.analysis.geometry import AdjacentSimilarity, ResidMeans, max_cosine, mmcs
from mlsae.analysis.layers import Decomposition, Distribution, LayerStatistics

__all__ = [
    "AdjacentSimilarity",
    "Decomposition",
    "Distribution",
    "LayerStatistics",
    "ResidMeans",
    "max_cosine",
    "mmcs",
]
