"""What latents respond to: their strongest activations at each layer, and a uniform sample of all, each in its context.

An *event* here is one latent active at one layer on one token; a *place* is block x context_length + position. For every
(layer, latent) two small sets of events are kept, each the largest by a key that orders all events: the strongest (by
activation, then earlier place) and a sample (by a hash of seed, place, layer and latent). So neither depends on the order or
the batches in which text comes, and the sets of two texts merge exactly.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float16, Float32, Int, Int64
from torch import Tensor

from mlsae import devices
from mlsae.analysis.example_file import N_PLACES, new_file, read_about, read_rows, to_half
from mlsae.analysis.example_rows import KINDS, About, Rows, Settings, Text
from mlsae.analysis.layers import SparseCode, checked
from mlsae.data import TokenBlocks
from mlsae.errors import ConfigError, DataError, ModelError, ResourceError
from mlsae.reporting import bar

POSITIONS_AT_ONCE = 4096
"""Of whole sequences, sorted together: more no longer helps."""
CELLS_AT_ONCE = 16_384
"""Of the sets, gone through together."""
NEVER = np.iinfo(np.int64).min


class Examples:
    """The `n_top` strongest events of every (layer, latent), and `n_sampled` drawn uniformly from all of its events.

    Each carries the latent's activations at that layer up to `window` positions to either side: in half precision, 0
    where it is masked or inactive; what they hold beyond the sequence is not saved. Memory: `settings.n_bytes`.

    Args:
        context_length: positions in a sequence, the same for all.
        seed: of the sample; two sets merge only if it is the same.
    """

    def __init__(
        self,
        n_layers: int,
        n_latents: int,
        context_length: int,
        *,
        n_top: int = 32,
        n_sampled: int = 16,
        window: int = 8,
        seed: int = 0,
    ):
        self.settings = Settings(n_layers, n_latents, context_length, n_top, n_sampled, window, seed)
        needed, free = self.settings.n_bytes, devices.free_memory(torch.device("cpu"))
        if needed > free:
            sizes = f"{needed / 1e9:.1f} GB of memory; {free / 1e9:.1f} GB free"
            raise ResourceError("examples", f"{sizes}; lower n_top, n_sampled or window")
        self._sets = [_Largest(n_layers * n_latents, n, 2 * window + 1) for n in (n_top, n_sampled)]

    def update(
        self,
        code: SparseCode,
        visible: Bool[Tensor, "batch {self.settings.context_length}"],
        blocks: Int[np.ndarray, " sequence"],
    ) -> None:
        """Add whole sequences; a sequence seen before changes nothing.

        Args:
            code: of the visible tokens at all layers, sequence after sequence: `sae.encode(reading.vectors)`.
            visible: which positions of the sequences these are: `reading.visible`.
            blocks: the block that each sequence is: `TokenBlocks.block_ids`.
        """
        values, indices = self._checked(code, visible, blocks)
        length, seen = self.settings.context_length, visible.cpu().numpy()
        for sequences in _slices(len(blocks), max(1, POSITIONS_AT_ONCE // length)):
            tokens = slice(seen[: sequences.start].sum(), seen[: sequences.stop].sum())
            places = (blocks[sequences, None].astype(np.int64) * length + np.arange(length)).reshape(-1)
            at = np.flatnonzero(seen[sequences])
            for layer in range(self.settings.n_layers):
                self._add(layer, values[layer, tokens], indices[layer, tokens], at, places)

    def merge(self, other: "Examples") -> "Examples":
        """The examples of both texts, as new examples; blocks that are in both count once."""
        if self.settings != other.settings:
            raise ModelError("other", f"has {other.settings}, this one {self.settings}; merge examples made alike")
        merged = Examples(**self.settings.to_dict())
        for examples in (self, other):
            for into, kept in zip(merged._sets, examples._sets, strict=True):
                into.absorb(kept)
        return merged

    def save(
        self,
        path: Path,
        blocks: TokenBlocks,
        layers: Sequence[int] | None = None,
        *,
        n_quantiles: int = 4,
        progress: bool = False,
    ) -> None:
        """Write every example to a Parquet file, sorted by (latent, layer, kind, rank); see `Example`.

        Args:
            blocks: the text that `update` was given codes of; windows end where its documents do.
            layers: the model layer of each row; None: 0, 1, 2, ...
            n_quantiles: parts of equal size that a sample is split into by activation.
        """
        settings = self.settings
        if blocks.context_length != settings.context_length:
            raise DataError(
                "blocks", f"hold {blocks.context_length} tokens each; the examples are of {settings.context_length}"
            )
        layers = range(settings.n_layers) if layers is None else layers
        if len(layers) != settings.n_layers:
            raise ConfigError("layers", f"{len(layers)} of them; the examples have n_layers={settings.n_layers}")
        if not 1 <= n_quantiles <= 100:
            raise ConfigError("n_quantiles", f"{n_quantiles}; give 1 to 100")
        text = Text(blocks, chain.from_iterable(kept.places() for kept in self._sets))
        with new_file(path, About(settings, tuple(layers), blocks.info.tokenizer_fingerprint)) as file:
            parts = ((part.stop - part.start, part) for part in _slices(settings.n_latents, settings.latents_at_once))
            for part in bar(parts, total=settings.n_latents, desc="examples", progress=progress, unit="latents"):
                file.write(self._rows(part, n_quantiles), text)

    def strongest(self, latent: int, blocks: TokenBlocks) -> tuple[int, list[int], int] | None:
        """The row of the layer, the tokens of the context and which of them it is on; None for one never active."""
        rows = self._rows(slice(latent, latent + 1), 1)
        if not len(rows.value):
            return None
        best = slice(rows.value.argmax(), rows.value.argmax() + 1)
        tokens, inside, _ = Text(blocks, [rows.place[best]]).around(rows.place[best], self.settings.window)
        return int(rows.layer[best][0]), tokens[inside].tolist(), int(inside[0, : self.settings.window].sum())

    @classmethod
    def load(cls, path: str | Path) -> "Examples":
        """What `save` wrote, to be merged; activations beyond a document's end were not written and are 0."""
        settings = read_about(path).settings
        examples = cls(**settings.to_dict())
        for rows in read_rows(path):
            cell = rows.layer * settings.n_latents + rows.latent
            for kind, into in enumerate(examples._sets):
                here = rows.kind == kind
                at, place, value, windows = cell[here], rows.place[here], rows.value[here], rows.windows[here]
                score = examples._draw(at, place) if kind == KINDS.index("sampled") else _float_bits(value)
                into.offer(at, _key(score, place), value, windows.__getitem__)
        return examples

    def _checked(
        self, code: SparseCode, visible: Tensor, blocks: np.ndarray
    ) -> tuple[Float32[np.ndarray, "layer token k"], Int64[np.ndarray, "layer token k"]]:
        """Values and ids in numpy, refused where they would be kept wrongly and silently."""
        values, indices = checked(code, self.settings.n_layers, self.settings.n_latents)
        n_tokens = int(visible.sum())
        if values.shape[1] != n_tokens:
            raise DataError("visible", f"marks {n_tokens} tokens; the code holds {values.shape[1]}")
        if len(blocks) != len(visible):
            raise DataError("blocks", f"names {len(blocks)} of them; {len(visible)} sequences are given")
        if len(blocks) and not 0 <= blocks.min() <= blocks.max() < N_PLACES // self.settings.context_length:
            raise DataError(
                "blocks", f"{blocks.min()} to {blocks.max()}; examples are kept of {N_PLACES} tokens at most"
            )
        return values.float().numpy(), indices.to(torch.int64).numpy()

    def _add(
        self,
        layer: int,
        values: Float32[np.ndarray, "token k"],
        indices: Int64[np.ndarray, "token k"],
        at: Int64[np.ndarray, " token"],
        places: Int64[np.ndarray, " position"],
    ) -> None:
        """Add one layer: its active entries are sorted by (latent, position), so that neighbours are near."""
        active = np.flatnonzero(values > 0)
        order = active[_order(indices.reshape(-1)[active], self.settings.n_latents)]
        latent, value, position = (
            indices.reshape(-1)[order],
            values.reshape(-1)[order],
            np.repeat(at, values.shape[1])[order],
        )
        spot, place, score = latent * len(places) + position, places[position], _float_bits(value)
        assert not (spot[1:] == spot[:-1]).any(), "a vector names the same latent twice"
        cell = layer * self.settings.n_latents + latent
        windows = partial(_windows, spot, value, self.settings.window)
        for into, scores in zip(self._sets, (score, self._draw(cell, place)), strict=True):
            into.offer(cell, _key(scores, place), value, windows)

    def _draw(
        self, cell: Int64[np.ndarray, " event"], place: Int64[np.ndarray, " event"]
    ) -> Int64[np.ndarray, " event"]:
        """31 bits for each event that are as good as random: SplitMix64 (Steele et al. 2014), every cell its own stream."""
        start = np.uint64(self.settings.seed * 0xD1342543DE82EF95 % 2**64)
        x = place.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x += cell.view(np.uint64) * np.uint64(0xD6E8FEB86659FD93)
        x += start
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x ^= x >> np.uint64(shift)
            x *= np.uint64(factor)
        return ((x ^ x >> np.uint64(31)) >> np.uint64(33)).view(np.int64)

    def _rows(self, latents: slice, n_quantiles: int) -> Rows:
        """The examples of a run of latents in the order of the file."""
        parts = []
        for kind, part in enumerate(self._sets):
            cells = np.arange(self.settings.n_layers)[None] * self.settings.n_latents + np.r_[latents][:, None]
            latent, layer, slot = (part.keys[cells] >= 0).nonzero()
            at = cells[latent, layer], slot
            place, value = _place(part.keys[at]), part.values[at]
            parts.append((latent + latents.start, layer, np.full(len(slot), kind), place, value, part.windows[at]))
        latent, layer, kind, place, value, windows = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        group = (latent * self.settings.n_layers + layer) * len(KINDS) + kind
        order = np.lexsort((place, -value, group))
        first, size = _runs(group[order])
        rank = np.arange(len(order)) - np.repeat(first, size)
        quantile = (np.repeat(size, size) - 1 - rank) * n_quantiles // np.repeat(size, size)
        columns = (x[order] for x in (latent, layer, kind))
        return Rows(*columns, rank, quantile, place[order], value[order], windows[order])


class _Largest:
    """For each cell the n events of largest key that were offered, in no order. An empty slot has a key below 0."""

    def __init__(self, n_cells: int, n: int, width: int):
        self.keys = np.tile(np.arange(-n, 0), (n_cells, 1))  # distinct, as all keys of a cell are
        self.values = np.zeros((n_cells, n), np.float32)
        self.windows = np.zeros((n_cells, n, width), np.float16)
        self.least = self.keys[:, 0].copy() if n else np.full(n_cells, np.iinfo(np.int64).max)
        """The smallest key of each cell: what an event must exceed."""

    def offer(
        self,
        cell: Int64[np.ndarray, " event"],
        key: Int64[np.ndarray, " event"],
        value: Float32[np.ndarray, " event"],
        windows: Callable[[Int64[np.ndarray, " chosen"]], Float16[np.ndarray, "chosen width"]],
    ) -> None:
        """Keep what is large enough of events whose cells stand together; `windows` is asked for those only."""
        event = np.flatnonzero(key > self.least[cell])
        entries = [self._enter(cells, rows, key) for cells, rows in _padded(cell[event], event)]
        if not entries:
            return
        at_cell, slot, event = (np.concatenate(column) for column in zip(*entries, strict=True))
        self.keys[at_cell, slot] = key[event]
        self.values[at_cell, slot] = value[event]
        self.windows[at_cell, slot] = windows(event)

    def absorb(self, other: "_Largest") -> None:
        """Offer all that another one has kept."""
        for part in _slices(len(other.keys), CELLS_AT_ONCE):
            cell, slot = (other.keys[part] >= 0).nonzero()
            at = cell + part.start, slot
            self.offer(at[0], other.keys[at], other.values[at], lambda i, at=at: other.windows[at[0][i], at[1][i]])

    def places(self) -> Iterator[Int64[np.ndarray, " place"]]:
        """Where the kept events are, in parts."""
        for part in _slices(len(self.keys), CELLS_AT_ONCE):
            keys = self.keys[part]
            yield _place(keys[keys >= 0])

    def _enter(
        self,
        cells: Int64[np.ndarray, " cell"],
        events: Int64[np.ndarray, "cell column"],
        key: Int64[np.ndarray, " event"],
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which events enter their cell, and the slots of those that leave. An event of -1 is no event."""
        kept = self.keys[cells]
        keys = np.concatenate([kept, np.where(events >= 0, key[events], NEVER)], axis=1)
        ranked = np.sort(keys, axis=1)
        twice = ((ranked[:, 1:] == ranked[:, :-1]) & (ranked[:, 1:] >= 0)).any(axis=1)
        if twice.any():  # text that was seen before: all but the first of equal events are none
            again = np.tril(keys[twice, :, None] == keys[twice, None], -1).any(axis=-1)
            keys[twice] = np.where(again, NEVER, keys[twice])
            ranked = np.sort(keys, axis=1)
        new = keys[:, kept.shape[1] :]
        least = ranked[:, events.shape[1], None]
        leaving, slot = (kept < least).nonzero()
        entering, column = (new >= least).nonzero()
        assert (leaving == entering).all()
        self.least[cells] = least[:, 0]
        return cells[leaving], slot, events[entering, column]


def _padded(
    cell: Int64[np.ndarray, " item"], item: Int64[np.ndarray, " item"]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cells with their items, one row each, padded with -1: cells of 1, 2, 3-4, 5-8, ... items come together."""
    first, size = _runs(cell)
    doublings = np.ceil(np.log2(size))
    for doubling in np.unique(doublings):
        here, column = doublings == doubling, np.arange(2 ** int(doubling))
        index = np.minimum(first[here, None] + column, len(item) - 1)
        yield cell[first[here]], np.where(column < size[here, None], item[index], -1)


def _runs(x: Int64[np.ndarray, " item"]) -> tuple[Int64[np.ndarray, " run"], Int64[np.ndarray, " run"]]:
    """Where each run of equal entries starts, and how long it is."""
    first = np.flatnonzero(np.r_[True, x[1:] != x[:-1]][: len(x)])
    return first, np.diff(first, append=len(x))


def _windows(
    spot: Int64[np.ndarray, " event"],
    value: Float32[np.ndarray, " event"],
    window: int,
    chosen: Int64[np.ndarray, " chosen"],
) -> Float16[np.ndarray, "chosen width"]:
    """Activations around some events, `window` to either side: their neighbours in the sort that are near enough.

    What is near but of another sequence, or another latent, lies beyond the sequence's end, which nothing is read of.
    """
    found = np.zeros((len(chosen), 2 * window + 1), np.float32)
    found[:, window] = value[chosen]
    for side in (-1, 1):
        row = np.arange(len(chosen))
        for step in range(1, window + 1):
            other = chosen[row] + side * step
            row, other = (x[(other >= 0) & (other < len(spot))] for x in (row, other))
            distance = spot[other] - spot[chosen[row]]
            near = abs(distance) <= window
            row = row[near]
            found[row, window + distance[near]] = value[other[near]]
    return to_half(found)


def _key(score: Int64[np.ndarray, " event"], place: Int64[np.ndarray, " event"]) -> Int64[np.ndarray, " event"]:
    """One integer that orders by score, then by earlier place."""
    return score << 32 | (N_PLACES - 1 - place)


def _place(key: Int64[np.ndarray, " event"]) -> Int64[np.ndarray, " event"]:
    return N_PLACES - 1 - (key & (N_PLACES - 1))


def _float_bits(x: Float32[np.ndarray, " event"]) -> Int64[np.ndarray, " event"]:
    """Integers in the order of positive floats."""
    return np.ascontiguousarray(x).view(np.int32).astype(np.int64)


def _order(latent: Int64[np.ndarray, " event"], n_latents: int) -> Int64[np.ndarray, " event"]:
    """The stable order by latent, 16 bits at a time: those NumPy sorts by radix, ten times as fast as more."""
    order = np.argsort(latent.astype(np.uint16), kind="stable")
    if n_latents > 1 << 16:
        order = order[np.argsort((latent[order] >> 16).astype(np.uint16), kind="stable")]
    return order


def _slices(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))
