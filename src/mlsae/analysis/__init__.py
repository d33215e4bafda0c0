"""Where in depth the latents of an SAE live: statistics that stream, merge and save, and the pictures made of them."""

from mlsae.analysis.depth import Decomposition, Distribution
from mlsae.analysis.directions import Pairs, compare_pairs, max_cosine, mmcs
from mlsae.analysis.geometry import AdjacentSimilarity, ResidMeans
from mlsae.analysis.layers import LayerStatistics
from mlsae.analysis.vocabulary import LogitLens, TokenMatches, logit_lens, nearest_tokens

__all__ = [
    "AdjacentSimilarity",
    "Decomposition",
    "Distribution",
    "LayerStatistics",
    "LogitLens",
    "Pairs",
    "ResidMeans",
    "TokenMatches",
    "compare_pairs",
    "logit_lens",
    "max_cosine",
    "mmcs",
    "nearest_tokens",
]
