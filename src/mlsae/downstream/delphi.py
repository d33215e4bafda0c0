"""Which latents were active where, in the files that delphi explains latents from: `latents/layers.L/FIRST_LAST.safetensors`.

A file holds the latents FIRST to LAST of a layer: `locations` [entry, 3] (sequence, position, latent - FIRST), `activations`
[entry] in half precision, `tokens` [sequence, position]. (eai-delphi 0.1.3, delphi/latents/cache.py.)
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mlsae import files
from mlsae.analysis.example_file import to_half
from mlsae.data import TextSource, TokenBlocks
from mlsae.downstream import chosen
from mlsae.errors import ConfigError
from mlsae.formats.sparsify import folder_of
from mlsae.heldout import open_blocks, open_pair, text_batches
from mlsae.lm import LanguageModel
from mlsae.reading import read
from mlsae.reporting import bar
from mlsae.sae import MLSAE

LEAST = 1e-5
"""What an activation exceeds, to be written: delphi's own."""


@dataclass(frozen=True)
class Cache:
    """What was written."""

    directory: str
    """Its `latents/` is delphi's `raw_dir`."""
    hookpoints: list[str]
    """One for each layer, the folders in it: delphi's `modules`."""
    n_sequences: int
    n_tokens: int
    """Masked positions, at which no latent is active, included."""
    n_entries: list[int]
    """Active (token, latent) pairs, per hookpoint."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values by name."""
        return asdict(self)


def write_cache(
    sae: MLSAE | str | Path,
    lm: LanguageModel | str | Path,
    data: str | TextSource | TokenBlocks,
    out: str | Path,
    *,
    tokens: int = 10_000_000,
    layers: Sequence[int] | None = None,
    split: str | None = None,
    context_length: int | None = None,
    n_splits: int = 5,
    progress: bool = True,
) -> Cache:
    """Stream text through the language model and the SAE, and write what was active to the new folder `out`.

    On disk it is 8 to 14 bytes an active pair, twice while it is made; in memory a batch of text. With several groups,
    latents are numbered within their layer's, as in its sparsify folder.

    Args:
        tokens: tokens to read (or all there are, if fewer).
        layers: of the language model; None: all the SAE's.
        split: part of the data; None: the held-out part of the text it was trained on, all of any other.
        context_length: tokens in a sequence, a multiple of delphi's `example_ctx_len`; None: 2048 or the language model's limit.
        n_splits: files for each layer.

    Raises:
        ConfigError: a layer that the SAE does not read, or more files than latents.
        ModelError: the SAE was trained on another language model.
        DataError: there is no text.
        ResourceError: `out` is a folder that holds something.
    """
    out = Path(out)
    files.probe_empty(out)
    sae, lm = open_pair(sae, lm)
    layers = chosen(sae, layers)
    n_latents = sae.config.n_latents // sae.config.groups
    if not 1 <= n_splits <= n_latents:
        raise ConfigError("n_splits", f"{n_splits}; give 1 to {n_latents}, the latents of a layer")
    edges = np.arange(n_splits + 1) * n_latents // n_splits
    blocks = open_blocks(sae, lm, data, tokens=tokens, split=split, context_length=context_length, progress=progress)
    with files.staged_directory(out) as staged, contextlib.ExitStack() as stack:
        text = _Pile(stack, staged / "spool-tokens", "I32", (blocks.context_length,))
        n_sequences = min(len(blocks), max(1, tokens // blocks.context_length))
        kind = _smallest(max(n_sequences, blocks.context_length, int(np.diff(edges).max())))
        spools = [_Spool(stack, staged, layer, edges, kind) for layer in layers]
        for batch in text_batches(blocks, tokens, desc="latents", progress=progress):
            _add(text, spools, sae, lm, batch.tokens)
        stack.close()
        for spool in bar(
            ((1, spool) for spool in spools), total=len(spools), desc="files", progress=progress, unit="layer"
        ):
            folder = staged / "latents" / folder_of(spool.layer)
            spool.write(folder, text)
            files.write_json(folder / "config.json", _config(lm, data, blocks, text.n_rows, n_splits))
        for pile in [text, *(pile for spool in spools for pile in spool.piles)]:
            files.remove(pile.path)
    entries = [spool.piles[0].n_rows for spool in spools]
    hookpoints = [folder_of(layer) for layer in layers]
    return Cache(str(out), hookpoints, text.n_rows, text.n_rows * blocks.context_length, entries)


@torch.no_grad()
def _add(
    text: "_Pile", spools: "list[_Spool]", sae: MLSAE, lm: LanguageModel, tokens: Int[Tensor, "batch pos"]
) -> None:
    """One batch of text."""
    reading = read(lm, sae, tokens)
    sequence, position = (x.cpu().numpy() for x in reading.visible.nonzero(as_tuple=True))
    size = sae.config.n_latents // sae.config.groups
    for spool in spools:
        row = sae.layers.index(spool.layer)
        code = sae.encode(reading.vectors[row : row + 1], (spool.layer,))
        values, latents = code.values[0].float().cpu().numpy(), code.indices[0].cpu().numpy()
        spool.add(values, latents - sae.config.group_of(row) * size, sequence + text.n_rows, position)
    text.add(tokens.numpy(), [len(tokens)])


def _config(lm: LanguageModel, data: Any, blocks: TokenBlocks, n_sequences: int, n_splits: int) -> dict[str, Any]:
    """What delphi's own `config.json` says of the text, as far as there is a source to name."""
    source = data if isinstance(data, TextSource) else TextSource(data if isinstance(data, str) else "")
    return {
        "dataset_repo": source.data,
        "dataset_split": source.split if isinstance(data, TextSource) else "",
        "dataset_name": "",
        "dataset_column": source.text_column,
        "batch_size": 1,
        "cache_ctx_len": blocks.context_length,
        "n_tokens": n_sequences * blocks.context_length,
        "n_splits": n_splits,
        "model_name": lm.name,
    }


# ---- piles: rows of one kind, written as they come, found again by part ------------------------------------------------

TYPES = {"U16": np.uint16, "U32": np.uint32, "F16": np.float16, "I32": np.int32}
"""By the names that safetensors has for them."""


def _smallest(most: int) -> str:
    """The type that delphi gives places in sequences, positions and latents: two bytes where they suffice."""
    return "U16" if most <= 1 << 16 else "U32"


class _Pile:
    """Rows in a file of their own; what is added together is in runs, one for each part."""

    def __init__(self, stack: contextlib.ExitStack, path: Path, kind: str, shape: tuple[int, ...] = ()):
        self.path, self.kind, self.shape = path, kind, shape
        self.row_bytes = TYPES[kind]().itemsize * int(np.prod(shape))
        self.n_rows = 0
        self.runs: list[list[int]] = []
        self._file = stack.enter_context(files.new_file(path))

    def add(self, rows: np.ndarray, runs: list[int]) -> None:
        """Rows in runs of these lengths, one for each part."""
        self._file.write(rows.astype(TYPES[self.kind]).tobytes())
        self.runs.append(runs)
        self.n_rows += len(rows)

    def about(self, part: int) -> tuple[str, list[int]]:
        """The type and shape of all rows of a part."""
        return self.kind, [sum(runs[part] for runs in self.runs), *self.shape]

    def read(self, part: int) -> Iterator[bytes]:
        """The rows of a part, run by run, in the order in which they came."""
        with open(self.path, "rb") as file:
            start = 0
            for runs in self.runs:
                file.seek((start + sum(runs[:part])) * self.row_bytes)
                yield file.read(runs[part] * self.row_bytes)
                start += sum(runs)


class _Spool:
    """One layer's entries, in a part for each of its files."""

    def __init__(self, stack: contextlib.ExitStack, folder: Path, layer: int, edges: np.ndarray, kind: str):
        self.layer, self.edges = layer, edges
        self.piles = (
            _Pile(stack, folder / f"spool-{layer}-at", kind, (3,)),
            _Pile(stack, folder / f"spool-{layer}", "F16"),
        )

    def add(
        self,
        values: Float[np.ndarray, "token k"],
        latents: Int[np.ndarray, "token k"],
        sequence: Int[np.ndarray, " token"],
        position: Int[np.ndarray, " token"],
    ) -> None:
        """The code of some tokens, later ones than before."""
        token, column = (values > LEAST).nonzero()
        latent, value = latents[token, column], values[token, column]
        part = np.searchsorted(self.edges, latent, side="right") - 1
        order = np.lexsort((latent, token, part))
        token, part = token[order], part[order]
        at = np.stack([sequence[token], position[token], latent[order] - self.edges[part]], axis=1)
        runs = np.bincount(part, minlength=len(self.edges) - 1).tolist()
        for pile, rows in zip(self.piles, (at, to_half(value[order])), strict=True):
            pile.add(rows, runs)

    def write(self, folder: Path, text: _Pile) -> None:
        """A file for each part, by the numbers of its first and last latent."""
        names = ("tokens", "locations", "activations")
        folder.mkdir(parents=True)
        for part, (start, stop) in enumerate(zip(self.edges[:-1], self.edges[1:], strict=True)):
            piles = [(text, 0), *((pile, part) for pile in self.piles)]
            with files.new_file(folder / f"{start}_{stop - 1}.safetensors") as file:
                file.write(_header({name: pile.about(i) for name, (pile, i) in zip(names, piles, strict=True)}))
                for pile, i in piles:
                    file.writelines(pile.read(i))


def _header(tensors: dict[str, tuple[str, list[int]]]) -> bytes:
    """How a safetensors file begins whose tensors, of these types and shapes, follow one another."""
    about, start = {}, 0
    for name, (kind, shape) in tensors.items():
        stop = start + TYPES[kind]().itemsize * int(np.prod(shape))
        about[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(about).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
