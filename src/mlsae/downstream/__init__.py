"""What other people's tools read: an object for SAEBench, a cache for delphi, files for Neuronpedia. One module for each."""

from collections.abc import Sequence

from mlsae.errors import ConfigError
from mlsae.sae import MLSAE


def chosen(sae: MLSAE, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The layers asked for; None: all the SAE's. Raises ConfigError for one that it does not read."""
    asked = sae.layers if layers is None else tuple(layers)
    if unknown := [layer for layer in asked if layer not in sae.layers]:
        raise ConfigError("layers", f"{unknown[0]} was not trained on; this SAE has {', '.join(map(str, sae.layers))}")
    return asked


__all__ = ["chosen"]
