"""Packed blocks: what is in them, in which order they come, and when they are made again."""

import json
import os
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mlsae import data
from mlsae.data import TokenBlocks, pack, permutation
from mlsae.errors import ConfigError, DataError
from mlsae.text import TextSource
from mlsae.tokens import Tokenizer

torch.set_num_threads(1)

SEPARATOR, BOS = 256, 257
DOCUMENTS = [f"{i}:" + "abc de"[: i % 7] * (i % 11) for i in range(300)] + ["", "x", ""]


class CountingTokenizer(Tokenizer):
    """A tokenizer that counts the documents it is given."""

    n_documents = 0

    def documents(self, texts):
        self.n_documents += len(texts)
        return super().documents(texts)


def tokenizer(*, bos: bool = False, eos: bool = True, extra: int = 0) -> CountingTokenizer:
    """One token per byte, then the separator 256 and BOS 257, which texts start with if `bos`; then `extra` more."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|end|>", "<|bos|>", *(f"<{i}>" for i in range(extra))]
    fast = FastTokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if bos:
        fast.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)])
    special = {"bos_token": "<|bos|>"} | ({"eos_token": "<|end|>"} if eos else {})
    return CountingTokenizer(PreTrainedTokenizerFast(tokenizer_object=fast, **special))


def source(folder: Path, documents: list = DOCUMENTS, **options) -> TextSource:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return TextSource(str(path), split="all", **options)


@pytest.fixture
def packed(tmp_path):
    """A function that packs documents, with the cache in the test's folder and no bar."""

    def call(documents=DOCUMENTS, context_length=16, tokens=None, **options) -> TokenBlocks:
        options = {"cache": tmp_path / "cache", "progress": False} | options
        return pack(source(tmp_path, documents), tokens or tokenizer(), context_length, **options)

    return call


def joined(documents) -> list[int]:
    """The stream by hand: every document's bytes and a separator."""
    ids = tokenizer().documents(list(documents))
    return [token for document in ids for token in [*document, SEPARATOR]]


def flat(lists) -> list:
    return list(chain.from_iterable(lists))


def in_file_order(blocks: TokenBlocks) -> list[list[int]]:
    return blocks.read(0, len(blocks), order="file").tolist()


# ---- carry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context_length", [2, 3, 16, 64, 1000])
def test_blocks_joined_are_the_documents_joined(packed, context_length):
    stream = joined(DOCUMENTS)
    blocks = packed(context_length=context_length)
    assert flat(in_file_order(blocks)) == stream[: len(stream) // context_length * context_length]


@pytest.mark.parametrize("context_length", [2, 3, 16, 64])
def test_every_block_starts_with_bos_and_the_rest_is_the_stream(packed, context_length):
    rows = in_file_order(packed(context_length=context_length, tokens=tokenizer(bos=True)))
    assert {row[0] for row in rows} == {BOS}
    rest = [token for row in rows for token in row[1:]]
    stream = joined(DOCUMENTS)
    assert rest == stream[: len(rest)]
    assert len(stream) - len(rest) < context_length - 1


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("packing", ["carry", "groups"])
def test_documents_start_where_it_is_said(packed, bos, packing):
    blocks = packed(tokens=tokenizer(bos=bos), packing=packing)
    rows = np.array(in_file_order(blocks))
    flat = np.where(rows == BOS, -1, rows).reshape(-1)
    for document, start in zip(DOCUMENTS, blocks.document_starts, strict=False):
        rest = flat[start:]
        ids = tokenizer().documents([document])[0][:10]
        assert rest[rest >= 0][: len(ids)].tolist() == ids[: (rest >= 0).sum()]
    assert (np.diff(blocks.document_starts) > 0).all()
    assert len(blocks.document_starts) == blocks.info.n_documents
    assert len(DOCUMENTS) - len(blocks.document_starts) < 16


def test_document_ids_change_after_separators(packed):
    blocks = packed()
    ids = np.arange(len(blocks))
    tokens, documents = blocks.tokens(ids).reshape(-1), blocks.document_ids(ids).reshape(-1)
    assert torch.equal(documents[1:], (tokens[:-1] == SEPARATOR).cumsum(0))
    assert documents[0] == 0


def test_small_batches_pack_the_same(packed, monkeypatch, tmp_path):
    whole = in_file_order(packed())
    monkeypatch.setattr(data, "BATCH_DOCUMENTS", 1)
    assert in_file_order(packed(cache=tmp_path / "other")) == whole


# ---- groups --------------------------------------------------------------------------------------------------------


def test_groups_by_hand(packed, monkeypatch):
    monkeypatch.setattr(data, "GROUP_DOCUMENTS", 2)
    a, b, c, d, e = tokenizer().documents(list("abcde"))
    blocks = packed(["aaa", "bb", "ccccc", "d", "eeee"], context_length=3, packing="groups")
    s = SEPARATOR
    # s a a a s b b | s c c c c c s d | s e e e e: three tokens at a time, remainders "b", "s d", "e e" dropped
    by_hand = [[s, *a, *a], [*a, s, *b], [s, *c, *c], [*c, *c, *c], [s, *e, *e]]
    assert in_file_order(blocks) == by_hand
    assert blocks.document_starts.tolist() == [1, 5, 7, 13]
    assert d not in flat(by_hand)


def test_each_group_alone_gives_its_blocks(packed, monkeypatch, tmp_path):
    whole = in_file_order(packed(packing="groups", tokens=tokenizer(bos=True)))
    monkeypatch.setattr(data, "GROUP_DOCUMENTS", 100)
    options = {"packing": "groups", "tokens": tokenizer(bos=True)}
    parts = [in_file_order(packed(DOCUMENTS[i : i + 100], **options)) for i in (0, 100, 200)]
    together = in_file_order(packed(DOCUMENTS[:300], **options))
    assert together == flat(parts)
    assert len(together) < len(whole)


# ---- order ---------------------------------------------------------------------------------------------------------


def test_each_pass_is_a_permutation_of_its_own(packed):
    blocks = packed()
    n = len(blocks)
    passes = [blocks.block_ids(epoch * n, n, seed=1) for epoch in range(4)]
    assert all(sorted(ids) == list(range(n)) for ids in passes)
    assert len({tuple(ids) for ids in passes}) == 4
    assert not np.array_equal(passes[0], blocks.block_ids(0, n, seed=2))
    assert np.array_equal(passes[3], packed().block_ids(3 * n, n, seed=1))


@pytest.mark.parametrize("order", ["shuffled", "file"])
@pytest.mark.parametrize("repeat", [True, False])
def test_cutting_reads_differently_changes_nothing(packed, order, repeat):
    blocks = packed(context_length=64)
    total = 3 * len(blocks) + 5
    options = {"seed": 7, "order": order, "repeat": repeat}
    whole = blocks.read(0, total, **options)
    for sizes in (1, 3, len(blocks), len(blocks) + 1):
        pieces = [blocks.read(i, min(sizes, total - i), **options) for i in range(0, total, sizes)]
        assert torch.equal(torch.cat(pieces), whole)
    assert len(whole) == (total if repeat else len(blocks))


def test_without_repeat_the_end_is_the_end(packed):
    blocks = packed()
    n = len(blocks)
    assert len(blocks.read(n - 2, 5, repeat=False)) == 2
    assert len(blocks.read(n, 5, repeat=False)) == 0
    assert len(blocks.read(n + 100, 5, repeat=False)) == 0
    assert [blocks.pass_of(p) for p in (0, n - 1, n, 2 * n)] == [0, 0, 1, 2]


def test_negative_seeds_and_shared_permutations_are_safe():
    assert sorted(permutation(10, -1, 0)) == list(range(10))
    with pytest.raises(ValueError, match="read-only"):
        permutation(10, 0, 0)[0] = 1


def test_the_order_is_the_same_in_every_version():
    """Pinned: a changed order would silently give a resumed run other data."""
    assert permutation(8, 42, 0).tolist() == [4, 1, 3, 6, 0, 7, 2, 5]


# ---- how much ------------------------------------------------------------------------------------------------------


def test_max_tokens_is_a_prefix_and_stops_reading(packed, monkeypatch):
    monkeypatch.setattr(data, "BATCH_DOCUMENTS", 8)
    counting = tokenizer()
    cut = packed(tokens=counting, max_tokens=100)
    assert cut.n_tokens == 112
    assert counting.n_documents < 30
    assert not cut.info.complete
    assert in_file_order(packed(context_length=16, max_tokens=None))[:7] == in_file_order(cut)
    assert (cut.document_starts < cut.n_tokens).all()


def test_rows_are_read_no_further_than_needed(packed, monkeypatch):
    n_read = 0
    real = data.TextSource.documents

    def counted(self):
        documents = real(self)
        advance = documents._documents

        def count():
            nonlocal n_read
            for text in advance:
                n_read += 1
                yield text

        documents._documents = count()
        return documents

    monkeypatch.setattr(data.TextSource, "documents", counted)
    monkeypatch.setattr(data, "BATCH_DOCUMENTS", 4)
    packed(max_tokens=32)
    assert n_read < 20


@pytest.mark.parametrize("documents", [["a" * 14], ["a" * 7, "b" * 6], ["abc"]])
def test_less_than_one_block_is_refused(packed, documents, tmp_path):
    n_tokens = len(joined(documents))
    with pytest.raises(DataError, match=f"{n_tokens} tokens in all; one sequence needs 16"):
        packed(documents)
    assert list((tmp_path / "cache").iterdir()) == []


def test_exactly_one_block_is_enough(packed):
    assert in_file_order(packed(["a" * 15])) == [joined(["a" * 15])]


def test_no_text_is_refused(packed):
    with pytest.raises(DataError, match="0 rows in split 'all'"):
        packed([])


def test_counts_are_reported(packed, tmp_path):
    blocks = pack(
        source(tmp_path, [*DOCUMENTS, None, 3], skip_bad_rows=True),
        tokenizer(),
        16,
        cache=tmp_path / "cache",
        progress=False,
    )
    assert blocks.info.n_empty_documents == 2
    assert blocks.info.n_skipped_rows == 2
    assert blocks.info.max_token_id == SEPARATOR
    assert "2 empty, 2 bad rows skipped" in blocks.summary()
    assert f"{blocks.n_tokens:,} tokens in {len(blocks):,} sequences of 16" in blocks.summary()


def test_a_tokenizer_without_separator_is_refused_before_reading(packed):
    with pytest.raises(ConfigError, match="--separator-token"):
        packed(tokens=tokenizer(eos=False))


@pytest.mark.parametrize(("extra", "dtype"), [(0, "uint16"), (70_000, "uint32")])
def test_ids_are_stored_as_small_as_the_vocabulary_allows(packed, extra, dtype):
    tokens = tokenizer(extra=extra)
    last = f"<{extra - 1}>" if extra else "<|end|>"
    tokens.hf.add_special_tokens({"additional_special_tokens": [last]})
    blocks = packed(["a" * 15 + last + "b" * 20], tokens=tokens)
    assert blocks.info.dtype == dtype
    assert blocks.info.max_token_id == SEPARATOR + (extra + 1 if extra else 0)
    assert int(blocks.read(0, 2, order="file").max()) == blocks.info.max_token_id


# ---- the cache -----------------------------------------------------------------------------------------------------


def again(tmp_path: Path, tokens: Tokenizer, context_length: int = 16, **options) -> TokenBlocks:
    """Pack the file that is there, with the cache that is there."""
    text = TextSource(str(tmp_path / "text.jsonl"), split="all")
    return pack(text, tokens, context_length, cache=tmp_path / "cache", progress=False, **options)


def test_the_second_call_tokenizes_nothing(packed, tmp_path):
    first = packed()
    counting = tokenizer()
    second = again(tmp_path, counting)
    assert counting.n_documents == 0
    assert second.info == first.info
    assert in_file_order(second) == in_file_order(first)


def test_a_longer_cache_serves_shorter_requests_and_not_the_reverse(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BATCH_DOCUMENTS", 8)
    packed(max_tokens=500)
    counting = tokenizer()
    assert again(tmp_path, counting, max_tokens=100).n_tokens == 112
    assert counting.n_documents == 0
    assert again(tmp_path, counting, max_tokens=2000).n_tokens == 2000
    assert counting.n_documents > 0
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_whatever_matters_makes_it_anew(packed, tmp_path):
    packed()
    path = tmp_path / "text.jsonl"
    changes = [
        lambda: again(tmp_path, tokenizer(bos=True)),
        lambda: again(tmp_path, Tokenizer(tokenizer().hf, separator_token="<|bos|>")),
        lambda: again(tmp_path, tokenizer(), context_length=8),
        lambda: again(tmp_path, tokenizer(), packing="groups"),
        lambda: (os.utime(path, (1, 1)), again(tmp_path, tokenizer()))[1],
        lambda: (path.write_text(path.read_text() * 2), again(tmp_path, tokenizer()))[1],
    ]
    for n_before, change in enumerate(changes, 1):
        assert len(list((tmp_path / "cache").iterdir())) == n_before
        change()
    assert len(list((tmp_path / "cache").iterdir())) == len(changes) + 1


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, DataError("text", "torn")])
def test_stopped_half_way_it_leaves_nothing(packed, tmp_path, monkeypatch, failure):
    class Failing(CountingTokenizer):
        def documents(self, texts):
            if self.n_documents > 100:
                raise failure
            return super().documents(texts)

    monkeypatch.setattr(data, "BATCH_DOCUMENTS", 8)
    with pytest.raises(failure if isinstance(failure, type) else DataError):
        packed(tokens=Failing(tokenizer().hf))
    assert list((tmp_path / "cache").iterdir()) == []
    assert flat(in_file_order(packed()))[:50] == joined(DOCUMENTS)[:50]


@pytest.mark.parametrize("name", ["meta.json", "tokens.bin", "document_starts.bin"])
@pytest.mark.parametrize("damage", ["cut", "gone", "flipped"])
def test_a_damaged_cache_is_made_anew(packed, tmp_path, name, damage):
    whole = in_file_order(packed())
    (file,) = (tmp_path / "cache").glob(f"*/{name}")
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-5])
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    counting = tokenizer()
    assert in_file_order(again(tmp_path, counting)) == whole
    assert counting.n_documents == len(DOCUMENTS)


def test_only_old_remains_are_swept(packed, tmp_path):
    old, new = tmp_path / "cache" / ".tmp-old-1", tmp_path / "cache" / ".tmp-new-2"
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (1, 1))
    packed()
    assert new.exists()
    assert not old.exists()


def test_the_cache_is_the_users_own_by_default(packed, tmp_path, monkeypatch):
    monkeypatch.setenv("MLSAE_CACHE", str(tmp_path / "mine"))
    blocks = packed(cache=None)
    assert (tmp_path / "mine" / "tokens" / blocks.info.key / "meta.json").is_file()


# ---- the bar -------------------------------------------------------------------------------------------------------


def test_the_bar_is_quiet_for_short_work_and_guesses_its_end(packed, capfd, monkeypatch):
    packed(progress=True)
    assert capfd.readouterr() == ("", "")
    real, totals = data._show, []

    def show(bar, packer, fraction_read, max_tokens):
        real(bar, packer, fraction_read, max_tokens)
        totals.append((bar.total, bar.n))

    monkeypatch.setattr(data, "_show", show)
    monkeypatch.setattr(data, "BATCH_DOCUMENTS", 32)
    packed(DOCUMENTS * 2, progress=True)
    assert totals[-1][0] == totals[-1][1] == len(joined(DOCUMENTS * 2))
