"""Text becomes packed blocks of token ids, kept on disk once; order is a seeded permutation, position one integer.

Documents are joined by the separator and cut into blocks of `context_length` tokens, each after a BOS where the
tokenizer has one. The endless stream of blocks starts over in a new permutation at every pass, so it is known by
(seed, position) alone: however it is cut into reads, or resumed, it is the same.
"""

import hashlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor
from tqdm import tqdm

from mlsae import files, untrusted
from mlsae.errors import DataError, ResourceError
from mlsae.text import TextSource
from mlsae.tokens import Tokenizer

log = logging.getLogger(__name__)

Order = Literal["shuffled", "file"]
Packing = Literal["carry", "groups"]

GROUP_DOCUMENTS = 1024
"""Documents that `groups` packs together (lawson2024)."""
TOKEN_FILES = ("tokens.bin", "document_starts.bin")
BATCH_DOCUMENTS, BATCH_CHARACTERS = 256, 1_000_000
"""What is tokenized at once, whichever is reached first."""
STALE_SECONDS = 2 * 24 * 3600
"""Age at which an unfinished cache folder belongs to a process that was killed."""


@dataclass(frozen=True)
class PackInfo:
    """What is known of packed text; written beside it as meta.json."""

    n_blocks: int
    context_length: int
    """Tokens in a block, BOS included."""
    dtype: str
    """NumPy type of the token ids on disk."""
    n_documents: int
    """Documents that start inside the blocks."""
    n_empty_documents: int
    """Documents without a token: packed as a separator."""
    n_skipped_rows: int
    """Rows passed over because they hold no text."""
    max_token_id: int
    """Largest token id, which must be a row of the language model's embedding."""
    complete: bool
    """The text was read to its end."""
    tokenizer_fingerprint: str
    checksums: dict[str, str]
    """SHA-256 of each of TOKEN_FILES."""
    key: str
    """SHA-256 of the text, the tokenizer and the packing, whatever the length."""


# ---- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextBatch:
    """Some blocks of text."""

    tokens: Int[Tensor, "batch pos"]
    blocks: Int[Tensor, " batch"]
    """Their places on disk."""
    documents: Int[Tensor, "batch pos"]
    """The document of each token, counted from 0."""
    position: int
    """Where in the shuffled text the first of them stands."""


class TokenBlocks:
    """Blocks of token ids over a read-only memory map, and where documents start in them."""

    def __init__(
        self, tokens: Integer[np.ndarray, "block pos"], document_starts: Int[np.ndarray, " document"], info: PackInfo
    ):
        self._tokens = tokens
        self.document_starts = document_starts
        """Where each document's first token stands: block x context_length + position, rising."""
        self.info = info
        self.n_blocks, self.context_length = tokens.shape
        self.n_tokens = self.n_blocks * self.context_length

    @classmethod
    def open(cls, folder: Path, max_tokens: int | None = None, *, verify: bool = True) -> "TokenBlocks":
        """The blocks in a folder that `pack` wrote, no more than hold `max_tokens`; what was just written is not verified."""
        info = PackInfo(**untrusted.read_sealed(folder / "meta.json"))
        if verify and (
            damaged := [name for name in TOKEN_FILES if files.sha256(folder / name) != info.checksums.get(name)]
        ):
            raise ResourceError(str(folder / damaged[0]), "failed its checksum; delete the folder and run again")
        shape = (info.n_blocks, info.context_length)
        tokens = np.memmap(folder / "tokens.bin", dtype=info.dtype, mode="r", shape=shape)
        starts = np.memmap(folder / "document_starts.bin", dtype=np.int64, mode="r", shape=(info.n_documents,))
        if max_tokens is not None:
            tokens = tokens[: math.ceil(max_tokens / info.context_length)]
        return cls(tokens, starts[: np.searchsorted(starts, tokens.size)], info)

    def __len__(self) -> int:
        return self.n_blocks

    def read(
        self, position: int, n: int, *, seed: int = 0, order: Order = "shuffled", repeat: bool = True
    ) -> Int[Tensor, "batch {self.context_length}"]:
        """The n blocks after the first `position` of the endless stream; fewer at the end if it may not repeat."""
        return self.tokens(self.block_ids(position, n, seed=seed, order=order, repeat=repeat))

    def block_ids(
        self, position: int, n: int, *, seed: int = 0, order: Order = "shuffled", repeat: bool = True
    ) -> Int[np.ndarray, " batch"]:
        """Which blocks `read` returns, by their place on disk."""
        end = position + n if repeat else max(position, min(position + n, self.n_blocks))
        positions = np.arange(position, end)
        if order == "file":
            return positions % self.n_blocks
        ids = np.empty_like(positions)
        for epoch in np.unique(positions // self.n_blocks):
            here = positions // self.n_blocks == epoch
            ids[here] = permutation(self.n_blocks, seed, int(epoch))[positions[here] % self.n_blocks]
        return ids

    def tokens(self, block_ids: Int[np.ndarray, " batch"]) -> Int[Tensor, "batch {self.context_length}"]:
        """The token ids of blocks."""
        return torch.from_numpy(self._tokens[block_ids].astype(np.int64))

    def document_ids(self, block_ids: Int[np.ndarray, " batch"]) -> Int[Tensor, "batch {self.context_length}"]:
        """The document of each token, counted from 0; separators and BOS count with the document before them."""
        offsets = block_ids[:, None] * self.context_length + np.arange(self.context_length)
        found = np.searchsorted(self.document_starts, offsets, side="right") - 1
        return torch.from_numpy(found.clip(min=0))

    def batch(self, position: int, n: int) -> "TextBatch":
        """The n blocks after the first `position` of the shuffled text, and where they are from."""
        ids = self.block_ids(position, n)
        return TextBatch(self.tokens(ids), torch.from_numpy(ids), self.document_ids(ids), position)

    def pass_of(self, position: int) -> int:
        """How many times the text was read whole before this position."""
        return position // self.n_blocks

    def sha256(self) -> str:
        """Hash of the token ids and of where documents start, whatever file or machine they are on."""
        found = hashlib.sha256(repr((self._tokens.shape, self._tokens.dtype.str)).encode())
        found.update(np.ascontiguousarray(self._tokens).data)
        found.update(np.ascontiguousarray(self.document_starts).data)
        return found.hexdigest()

    def summary(self) -> str:
        """What was packed, in words."""
        info = self.info
        odd = f", {info.n_empty_documents:,} empty" if info.n_empty_documents else ""
        odd += f", {info.n_skipped_rows:,} bad rows skipped" if info.n_skipped_rows else ""
        size = f"{self.n_tokens:,} tokens in {self.n_blocks:,} sequences of {self.context_length}"
        return f"{size}, {len(self.document_starts):,} documents{odd}"


@lru_cache(maxsize=2)
def permutation(n: int, seed: int, epoch: int) -> Int[np.ndarray, " n"]:
    """The order of n blocks in one pass. Not Generator.permutation: NumPy keeps only raw words the same forever."""
    words = np.random.PCG64([seed % 2**64, epoch]).random_raw(n)
    ids = np.argsort(words, kind="stable")
    ids.flags.writeable = False  # it is shared by every reader
    return ids


# ---- packing -------------------------------------------------------------------------------------------------------


def pack(
    source: TextSource,
    tokenizer: Tokenizer,
    context_length: int,
    *,
    max_tokens: int | None = None,
    packing: Packing = "carry",
    cache: Path | None = None,
    verify: bool = True,
    progress: bool = True,
) -> TokenBlocks:
    """The source's tokens in blocks, made once and kept under `cache` (None: the user's cache folder).

    Args:
        max_tokens: blocks enough for this many tokens, BOS included; the text is read no further. None: all of it.
        packing: `carry` carries remainders on; `groups` packs every 1,024 documents alone and drops the remainder.
        verify: read what was kept once, to see that it is whole; not where another process of this machine just did.

    Raises:
        DataError: the text cannot be read, or makes less than one block.
    """
    directory = files.cache_directory() / "tokens" if cache is None else cache
    key = _key(source, tokenizer, context_length, packing)
    if (blocks := _cached(directory / key, max_tokens, verify=verify)) is not None:
        return blocks
    _sweep(directory)
    with files.staged_directory(directory / key) as staged:
        _fill(staged, key, source, tokenizer, _Layout.of(tokenizer, context_length, packing), max_tokens, progress)
    return TokenBlocks.open(directory / key, max_tokens, verify=False)


def _key(source: TextSource, tokenizer: Tokenizer, context_length: int, packing: Packing) -> str:
    tokenized = (tokenizer.fingerprint, tokenizer.separator_id, tokenizer.bos_id)
    return hashlib.sha256(repr((2, source.fingerprint(), tokenized, context_length, packing)).encode()).hexdigest()


def _cached(folder: Path, max_tokens: int | None, *, verify: bool) -> TokenBlocks | None:
    """The blocks in a cache folder, if it is whole and they are enough."""
    if not folder.exists():
        return None
    try:
        blocks = TokenBlocks.open(folder, max_tokens, verify=verify)
    except (ResourceError, TypeError, ValueError, OSError) as error:  # damaged, or not ours
        log.warning("%s (it is made again)", error)
        return None
    enough = blocks.info.complete or (max_tokens is not None and blocks.n_tokens >= max_tokens)
    return blocks if enough else None


def _sweep(directory: Path) -> None:
    """Remove what killed processes left long ago; younger folders may be another process's work."""
    for path in [*directory.glob(".tmp-*"), *directory.glob(".trash-*")]:
        if time.time() - path.stat().st_mtime > STALE_SECONDS:
            files.remove(path)


def _fill(
    staged: Path,
    key: str,
    source: TextSource,
    tokenizer: Tokenizer,
    layout: "_Layout",
    max_tokens: int | None,
    progress: bool,
) -> None:
    """Read, tokenize and pack the source into a folder, no further than `max_tokens`."""
    documents, complete = source.documents(), True
    with (
        files.new_file(staged / "tokens.bin") as tokens,
        files.new_file(staged / "document_starts.bin") as starts,
        tqdm(desc="tokenizing", unit=" tokens", unit_scale=True, delay=2, disable=not progress) as bar,
    ):
        packer = _Packer(layout, tokens, starts)
        for texts in _batches(documents):
            packer.add(tokenizer.documents(texts))
            _show(bar, packer, documents.fraction_read, max_tokens)
            if max_tokens is not None and packer.n_blocks * layout.context_length >= max_tokens:
                complete = False
                break
    if not packer.n_blocks:
        needs = f"one sequence needs {layout.context_length}; give more text or lower context_length"
        raise DataError(source.data, f"{packer.n_read} tokens in all; {needs}")
    info = PackInfo(
        n_blocks=packer.n_blocks,
        context_length=layout.context_length,
        dtype=layout.dtype,
        n_documents=packer.n_starts,
        n_empty_documents=packer.n_empty_documents,
        n_skipped_rows=documents.n_skipped_rows,
        max_token_id=packer.max_token_id,
        complete=complete,
        tokenizer_fingerprint=tokenizer.fingerprint,
        checksums={name: files.sha256(staged / name) for name in TOKEN_FILES},
        key=key,
    )
    files.write_sealed(staged / "meta.json", asdict(info))


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    """Documents in lists to tokenize together; no list goes over the end of a group."""
    batch: list[str] = []
    n_characters = 0
    for number, text in enumerate(documents, 1):
        batch.append(text)
        n_characters += len(text)
        if len(batch) == BATCH_DOCUMENTS or n_characters >= BATCH_CHARACTERS or number % GROUP_DOCUMENTS == 0:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch


def _show(bar: tqdm, packer: "_Packer", fraction_read: float, max_tokens: int | None) -> None:
    """Move the bar; its end is a guess from the share of the source read so far."""
    guesses = [packer.n_read / fraction_read] if fraction_read else []
    guesses += [max_tokens] if max_tokens is not None else []
    bar.total = int(min(guesses)) if guesses else None
    bar.set_postfix_str(f"{packer.n_documents:,} documents", refresh=False)
    bar.update(packer.n_read - bar.n)


@dataclass(frozen=True)
class _Layout:
    """How documents are laid into blocks."""

    context_length: int
    separator_id: int
    bos_id: int | None
    packing: Packing
    dtype: str

    @classmethod
    def of(cls, tokenizer: Tokenizer, context_length: int, packing: Packing) -> "_Layout":
        largest = max(tokenizer.hf.get_vocab().values(), default=0)  # len() is less where ids have gaps
        dtype = "uint16" if largest < 2**16 else "uint32"
        return cls(context_length, tokenizer.separator_id, tokenizer.bos_id, packing, dtype)


class _Packer:
    """Cuts the stream of documents and separators into blocks and writes them as they fill."""

    def __init__(self, layout: _Layout, tokens_file: BinaryIO, starts_file: BinaryIO):
        self.layout = layout
        self._files = tokens_file, starts_file
        self._payload = layout.context_length - (layout.bos_id is not None)
        self.n_blocks = self.n_starts = self.n_read = self.n_documents = self.n_empty_documents = 0
        self.max_token_id = layout.bos_id or 0
        self._restart()

    def add(self, documents: Sequence[Sequence[int]]) -> None:
        """Append documents to the stream and write the blocks they fill."""
        grouped, separator = self.layout.packing == "groups", [self.layout.separator_id]
        pieces = ([separator, ids] if grouped else [ids, separator] for ids in documents)
        stream = np.array(list(chain.from_iterable(chain.from_iterable(pieces))), dtype=self.layout.dtype)
        ends = np.cumsum([len(ids) + 1 for ids in documents])
        starts = np.concatenate([[0], ends[:-1]]) + grouped + self._n_stream
        self._count(documents, stream)
        self._stream = np.concatenate([self._stream, stream])
        self._starts = np.concatenate([self._starts, self._places(starts)])
        self._n_stream += len(stream)
        self._write()
        if grouped and self.n_documents % GROUP_DOCUMENTS == 0:
            self._restart()

    def _count(self, documents: Sequence[Sequence[int]], stream: np.ndarray) -> None:
        self.n_read += len(stream)
        self.n_documents += len(documents)
        self.n_empty_documents += sum(not ids for ids in documents)
        self.max_token_id = max(self.max_token_id, int(stream.max()))

    def _restart(self) -> None:
        """Begin a stream at a new block; what is left of the old one is dropped."""
        self._first_block, self._n_stream = self.n_blocks, 0
        self._stream = np.empty(0, self.layout.dtype)
        self._starts = np.empty(0, np.int64)

    def _places(self, offsets: np.ndarray) -> np.ndarray:
        """Where tokens of the stream stand in the blocks, BOS counted."""
        block, position = np.divmod(offsets, self._payload)
        return (self._first_block + block + 1) * self.layout.context_length - self._payload + position

    def _write(self) -> None:
        """Write the full blocks, and the starts of the documents that start in them."""
        n_blocks = len(self._stream) // self._payload
        blocks, self._stream = np.split(self._stream, [n_blocks * self._payload])
        blocks = blocks.reshape(n_blocks, self._payload)
        if self.layout.bos_id is not None:
            blocks = np.insert(blocks, 0, self.layout.bos_id, axis=1)
        self.n_blocks += n_blocks
        written = np.searchsorted(self._starts, self.n_blocks * self.layout.context_length)
        starts, self._starts = np.split(self._starts, [written])
        self.n_starts += len(starts)
        self._files[0].write(blocks.tobytes())
        self._files[1].write(starts.astype(np.int64).tobytes())
