"""Latents x layers in as many columns as a canvas has, small enough to send for every move of the mouse."""

from typing import TYPE_CHECKING

import numpy as np

from mlsae.errors import ConfigError

if TYPE_CHECKING:
    from mlsae.explorer.library import Library

MAX_COLUMNS = 4096


def heatmap_bytes(library: "Library", start: int = 0, stop: int | None = None, width: int = 1024) -> bytes:
    """Places `start` to `stop` (None: the end) of the latents ever active, by centre of mass, in `width` columns or fewer.

    Little-endian: u32 n_layers, n_columns, start, stop, n_latents_ordered; i32 latent[n_columns], the one in the middle of
    each column; u8 value[n_layers][n_columns] = 255 x mean of P(layer | latent) over the column's latents.

    Raises ConfigError for places that there are not, DataError without an analysis.
    """
    found = library.needed_statistics().ordered
    n_layers, n = found.probability.shape
    stop = n if stop is None else stop
    if not 0 <= start <= stop <= n or (start == stop and n):
        raise ConfigError("start", f"{start} to {stop} given; places are 0 to {n}, and one at least is shown")
    if not 1 <= width <= MAX_COLUMNS:
        raise ConfigError("width", f"{width} given; 1 to {MAX_COLUMNS} columns")
    n_columns = min(width, stop - start)
    edges = start + np.arange(n_columns + 1) * (stop - start) // max(n_columns, 1)
    middle = found.latent[(edges[:-1] + edges[1:]) // 2]
    value = np.zeros((n_layers, 0), np.uint8)
    if n_columns:
        sums = np.add.reduceat(found.probability[:, start:stop], edges[:-1] - start, axis=1)
        value = np.rint(255 * (sums / np.diff(edges))).astype(np.uint8)
    head = np.array([n_layers, n_columns, start, stop, n], "<u4")
    return head.tobytes() + middle.astype("<i4").tobytes() + value.tobytes()
