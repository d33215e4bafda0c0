"""One row for every latent, in a Parquet file that any table reader opens: where it lives, how often, what it says."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int
from torch import Tensor

from mlsae import files
from mlsae.analysis.directions import Pairs
from mlsae.analysis.layers import LayerStatistics
from mlsae.analysis.summary import by_latent
from mlsae.analysis.vocabulary import Words


def save_latents(path: Path, statistics: LayerStatistics, pairs: Pairs | None, words: Words | None) -> None:
    """Write the table; a column NAME with an interval has NAME_low and NAME_high beside it. Undefined numbers are null."""
    table = pa.table(columns(statistics, pairs, words))
    with files.replacing(path) as file:
        pq.write_table(table, file, compression="zstd")


def columns(statistics: LayerStatistics, pairs: Pairs | None, words: Words | None) -> dict[str, pa.Array]:
    """The table's columns in order."""
    found = statistics.distribution()
    table = {"latent": pa.array(range(statistics.n_latents), pa.int32()), "n_events": _numbers(statistics.n_events)}
    for name, estimate in statistics.estimates(by_latent).items():
        table |= {name: _numbers(estimate.value), f"{name}_low": _numbers(estimate.low)}
        table[f"{name}_high"] = _numbers(estimate.high)
    for name in ("entropy", "n_active_layers", "birth", "death", "bimodality"):
        table[name] = _numbers(getattr(found, name))
    if pairs is not None:
        table |= {"max_cosine": _numbers(pairs.max_cosine), "neighbour": _numbers(pairs.neighbour)}
    if words is not None:
        table["promoted"] = _strings(words.logits.promoted, words)
        table["suppressed"] = _strings(words.logits.suppressed, words)
        for name, matches in (("input", words.input), ("output", words.output)):
            if matches is not None:
                table[f"{name}_tokens"] = _strings(matches.tokens, words)
                table[f"{name}_cosine"] = _numbers(matches.cosines[:, 0])
    return table


def _numbers(x: Tensor) -> pa.Array:
    return pa.array(x.numpy(), from_pandas=True)  # NaN is null


def _strings(tokens: Int[Tensor, "latent top"], words: Words) -> Any:
    return pa.array([[words.strings[token] for token in row] for row in tokens.tolist()], pa.list_(pa.string()))
