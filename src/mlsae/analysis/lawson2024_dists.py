"""The published data sets of layer distributions (`-dists`): for each layer and latent a summed activation and a count.

    probs = totals / sum_l totals        layer_mean = sum_l l probs        layer_var = sum_l l^2 probs - layer_mean^2

(Lawson et al. 2024, released code.) There are no events in them, no tokens and no documents: they hold two of the sums of
`LayerStatistics`. Their values are those of the k selected latents, not rectified, and special tokens count as zero vectors.
"""

import contextlib
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mlsae import files, untrusted
from mlsae.analysis.depth import Distribution, distribute
from mlsae.analysis.example_file import MAX_GROUP_BYTES, MAX_GROUP_ROWS
from mlsae.analysis.layers import LayerStatistics
from mlsae.errors import ModelError

PARTS = "data/train-*.parquet"
"""The files of a data set."""
PART = "data/train-00000-of-00001.parquet"
NUMBERS = ("count", "total", "mean", "layer_mean", "layer_var", "layer_std")
LISTS = ("counts", "totals", "means", "probs")
"""Columns with an entry for each layer."""
TOLERANCE = 1e-4
"""Of a column against what follows from totals and counts, relative to the terms it is the sum of: they were float32."""
EPS = 1e-8
"""Added to counts that are divided by."""
CARD = """# Layer distributions of a multi-layer SAE

One row a latent, {n_latents} of them over {n_layers} layers. `counts` and `totals` are of activations above zero, rectified, and
tokens that the SAE masks (special tokens, and first positions and outlying norms where it says so) are left out. The published
data sets of these columns hold selections before rectification, and count special tokens as zero vectors.
"""


@dataclass(frozen=True)
class Dists:
    """The sums of a published data set; `distribution` has what follows from them."""

    totals: Float[Tensor, "layer latent"]
    """Summed activations; published ones may be negative."""
    counts: Int[Tensor, "layer latent"]
    """Number of activations; in published ones of selections, exact up to 2^24."""

    def distribution(self) -> Distribution:
        """P(layer | latent) and its moments."""
        return distribute(self.totals, self.counts)


def columns(
    totals: Float[Tensor, "layer latent"], counts: Int[Tensor, "layer latent"]
) -> dict[str, Float[Tensor, "..."]]:
    """Every column but `latent`, by the published formulas in float64: NUMBERS `[latent]`, LISTS `[layer, latent]`."""
    layer = torch.arange(len(totals), dtype=torch.float64)[:, None]
    count, total = counts.sum(0).double(), totals.sum(0)
    probs = totals / total
    mean = (layer * probs).sum(0)
    var = (layer**2 * probs).sum(0) - mean**2
    var = torch.where(var.abs() <= 1e-12 * (layer**2 * probs).abs().sum(0), 0.0, var)  # rounding
    values = (count, total, total / (count + EPS), mean, var, var.sqrt())
    lists = (counts.double(), totals, totals / (counts + EPS), probs)
    return dict(zip(NUMBERS + LISTS, values + lists, strict=True))


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_dists(path: str | Path) -> Dists:
    """The sums in a copy of a data set (a folder with `data/`), in one of its Parquet files, or in a local `.safetensors`.

    Raises ModelError where it is not whole, or a column does not follow from totals and counts.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _from_tensors(path)
    parts = sorted(path.glob(PARTS)) if path.is_dir() else [path]
    if not parts:
        raise ModelError(str(path), f"holds no {PARTS}; name a copy of a data set of layer distributions")
    found: list[dict[str, np.ndarray]] = []
    for part in parts:
        with opened(part) as file:
            found += [_arrays(table) for table in row_groups(file)]
    if not found or any(len(each["counts"]) != len(found[0]["counts"]) for each in found):
        raise ModelError(str(path), "its latents do not all have the same number of layers")
    arrays = {name: np.concatenate([each[name] for each in found], axis=-1) for name in found[0]}
    if not np.array_equal(arrays["latent"], np.arange(len(arrays["latent"]))):
        raise ModelError(str(path), "its latents are not 0, 1, 2, ...; get every file of the data set")
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    dists = _checked(path, tensors["totals"], tensors["counts"])
    _refuse_others(path, dists, tensors)
    return dists


@contextlib.contextmanager
def opened(path: Path) -> Generator[pq.ParquetFile]:
    """A Parquet file that others wrote; whatever shows, while it is read, that it is damaged is a ModelError."""
    if not path.is_file():
        raise ModelError(str(path), "no such file")
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, ValueError, OSError, MemoryError) as error:
        raise ModelError(str(path), f"is not a whole Parquet file ({str(error).splitlines()[0]})") from error


def row_groups(file: pq.ParquetFile) -> Generator[pa.Table]:
    """One table after another, refused if it is too large."""
    for group in map(file.metadata.row_group, range(file.num_row_groups)):
        if group.num_rows > MAX_GROUP_ROWS or group.total_byte_size > MAX_GROUP_BYTES:
            raise ValueError(f"{group.num_rows} rows of {group.total_byte_size} bytes stand in one group")
    for i in range(file.num_row_groups):
        yield file.read_row_group(i, use_threads=False).combine_chunks()


def _arrays(table: pa.Table) -> dict[str, np.ndarray]:
    """Columns by name, lists as [layer, latent]; null is NaN, which is what an unused latent has."""
    kinds = {"latent": pa.int64()} | dict.fromkeys(NUMBERS, pa.float64())
    if set(table.column_names) != {*kinds, *LISTS}:
        raise ValueError("it has other columns")
    found = {}
    for name, kind in kinds.items():
        if table[name].type != kind:
            raise ValueError(f"column '{name}' is {table[name].type}; it must be {kind}")
        found[name] = table[name].to_numpy()
    for name in LISTS:
        kind = table[name].type
        if not (pa.types.is_list(kind) and kind.value_type == pa.float64()):
            raise ValueError(f"column '{name}' is {kind}; it must be lists of double")
        column = table[name].combine_chunks()
        lengths = column.value_lengths()
        if lengths.null_count or len(lengths.unique()) > 1 or not (len(lengths) and lengths[0].as_py()):
            raise ValueError(f"lists of column '{name}' are not one as long as another")
        found[name] = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1).T
    if len({len(found[name]) for name in LISTS}) > 1 or found["latent"].dtype != np.int64:
        raise ValueError("its lists are of different lengths")
    return found


def _from_tensors(path: Path) -> Dists:
    shape = untrusted.tensor_shapes(path).get("counts", ())
    if len(shape) != 2 or 0 in shape:
        raise ModelError(str(path), "holds no counts [layer, latent]; name a file of layer distributions")
    tensors = untrusted.load_tensors(path, dict.fromkeys(("counts", "totals"), (torch.float32, shape)))
    return _checked(path, tensors["totals"].double(), tensors["counts"].double())


def _checked(path: Path, totals: Float[Tensor, "layer latent"], counts: Float[Tensor, "layer latent"]) -> Dists:
    """Refuse counts that are none, and sums that are none."""
    whole = (counts == counts.round()) & (counts >= 0) & (counts < 2**53)
    right = whole & totals.isfinite() & ((counts > 0) | (totals == 0))
    if not right.all():
        layer, latent = (~right).nonzero()[0].tolist()
        found = f"{counts[layer, latent]:g} activations that sum to {totals[layer, latent]:g}"
        raise ModelError(str(path), f"latent {latent}, layer {layer}: {found}; get the file again")
    return Dists(totals, counts.long())


def _refuse_others(path: Path, dists: Dists, found: Mapping[str, Tensor]) -> None:
    """Refuse a column that does not follow from totals and counts."""
    wanted, size = columns(dists.totals, dists.counts), columns(dists.totals.abs(), dists.counts)
    cancelled = size["total"] / wanted["total"].abs()  # 1 where no value is negative
    scales = {name: size[name] for name in ("count", "total", "mean", "means")}
    scales |= {name: size[name] * cancelled**2 for name in ("probs", "layer_mean")}
    layer = torch.arange(len(dists.totals), dtype=torch.float64)[:, None]
    scales["layer_var"] = (layer**2 * size["probs"]).sum(0) * cancelled**3
    for name, scale in scales.items():
        defined = wanted["total"] != 0 if name in ("probs", "layer_mean", "layer_var") else True
        off = (found[name] - wanted[name]).abs()
        _refuse_far(path, name, defined & ~(off <= TOLERANCE * scale), found[name], wanted[name])
    squared, far = found["layer_std"] ** 2, TOLERANCE * scales["layer_var"]
    right = torch.where(squared.isnan(), wanted["layer_var"] <= far, (squared - wanted["layer_var"]).abs() <= far)
    _refuse_far(path, "layer_std", (wanted["total"] != 0) & ~right, found["layer_std"], wanted["layer_std"])


def _refuse_far(path: Path, name: str, far: Tensor, found: Tensor, wanted: Tensor) -> None:
    if far.any():
        at = tuple(far.nonzero()[0].tolist())
        problem = f"latent {at[-1]}: {name} is {found[at]:g}; {wanted[at]:g} follows from its totals and counts"
        raise ModelError(str(path), f"{problem}; get the file again")


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_dists(statistics: LayerStatistics, path: str | Path) -> None:
    """A data set of the published columns in a folder, with a card; or, by the name of a `.safetensors`, the local file.

    Activations are rectified and masked tokens left out, where published ones are not: the card says so.
    """
    path = Path(path)
    totals, counts = statistics.totals, statistics.counts
    if path.suffix == ".safetensors":
        files.save_tensors(path, {"counts": counts.float(), "totals": totals.float()})
        return
    arrays: dict[str, pa.Array] = {"latent": pa.array(np.arange(statistics.n_latents))}
    for name, column in columns(totals, counts).items():
        arrays[name] = pa.array(column.numpy()) if name in NUMBERS else _lists(column.T.contiguous().numpy())
    with files.staged_directory(path) as staged:
        with files.replacing(staged / PART) as file:
            pq.write_table(pa.table(arrays), file, row_group_size=10_000)
        card = CARD.format(n_latents=statistics.n_latents, n_layers=statistics.n_layers)
        files.write_text(staged / "README.md", card)


def _lists(rows: Float[np.ndarray, "latent layer"]) -> pa.Array:
    ends, kind = np.arange(0, rows.size + 1, rows.shape[1]), pa.list_(pa.field("element", pa.float64()))
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(rows.reshape(-1)), type=kind)
