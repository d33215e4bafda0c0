"""One policy for separators, special tokens and BOS, and a fingerprint that tells tokenizers apart."""

import pytest
import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerFast

from mlsae.errors import ConfigError
from mlsae.tokens import Tokenizer
from tiny import byte_tokenizer

EOS, PAD, BOS = 256, 257, 258
NAMES = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>", "bos_token": "<|bos|>"}


def changed(*, merges=(), pre_tokenizer=None, normalizer=None, **names) -> Tokenizer:
    """A tokenizer of 261 entries like the tiny one, but for what is given; None takes a special token away."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *NAMES.values(), "th", "he"])}
    fast = FastTokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    fast.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        fast.normalizer = normalizer
    given = {key: value for key, value in (NAMES | names).items() if value is not None}
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast, **given))


def split_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("t"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def test_the_separator_is_the_end_of_sequence_unless_named():
    assert Tokenizer(byte_tokenizer()).separator_id == EOS
    assert Tokenizer(byte_tokenizer(), "!").separator_id == byte_tokenizer().convert_tokens_to_ids("!")
    for tokenizer in (Tokenizer(byte_tokenizer(), "<|nowhere|>"), changed(eos_token=None)):
        with pytest.raises(ConfigError, match="separator_token"):
            _ = tokenizer.separator_id


def test_no_end_of_sequence_is_refused_with_the_flag_to_set():
    with pytest.raises(ConfigError, match="no end-of-sequence token; set --separator-token"):
        _ = changed(eos_token=None).separator_id


def test_a_separator_with_id_0_is_a_separator():
    first = byte_tokenizer().convert_ids_to_tokens(0)
    tokenizer = Tokenizer(byte_tokenizer(), first)
    assert tokenizer.separator_id == 0
    assert 0 in tokenizer.special_ids


def test_bos_is_what_the_tokenizer_itself_puts_first():
    assert Tokenizer(byte_tokenizer(bos=True)).bos_id == BOS
    assert Tokenizer(byte_tokenizer(bos=False)).bos_id is None  # it has one, and does not use it


def test_special_ids_are_masked_ids():
    assert Tokenizer(byte_tokenizer()).special_ids == {EOS, PAD, BOS}
    assert Tokenizer(byte_tokenizer(), "!").special_ids == {
        EOS,
        PAD,
        BOS,
        Tokenizer(byte_tokenizer(), "!").separator_id,
    }
    assert changed(pad_token=None, bos_token=None).special_ids == {EOS}
    assert changed(eos_token=None, pad_token=None, bos_token=None).special_ids == frozenset()
    assert changed(pad_token="<|endoftext|>", bos_token="<|endoftext|>").special_ids == {EOS}


def test_fingerprints_tell_tokenizers_of_one_size_apart():
    """N6: the same number of entries, other merges, pre-tokenizer, normalizer or special ids."""
    others = {
        "same": changed(),
        "merges": changed(merges=[("t", "h")]),
        "other merges": changed(merges=[("h", "e")]),
        "both merges": changed(merges=[("t", "h"), ("h", "e")]),
        "pre-tokenizer": changed(merges=[("t", "h")], pre_tokenizer=split_digits()),
        "prefix": changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True), add_prefix_space=True),
        "normalizer": changed(normalizer=normalizers.Lowercase()),
        "no pad": changed(pad_token=None),
        "eos is bos": changed(eos_token="<|bos|>", bos_token=None, pad_token=None),
        "bos in use": Tokenizer(byte_tokenizer(bos=True)),
        "bos unused": Tokenizer(byte_tokenizer()),
    }
    found = {name: tokenizer.fingerprint for name, tokenizer in others.items()}
    assert found["merges"] != found["same"] != found["normalizer"]
    equal = {(a, b) for a in found for b in found if a < b and found[a] == found[b]}
    # A tokenizer that isolates every `t` never merges `th`: the same tokens come out, so it is the same.
    assert equal <= {("pre-tokenizer", "same"), ("bos unused", "same"), ("bos unused", "pre-tokenizer")}


def test_fingerprint_is_of_the_separator_too_but_not_of_the_object():
    assert Tokenizer(byte_tokenizer()).fingerprint == Tokenizer(byte_tokenizer()).fingerprint
    assert Tokenizer(byte_tokenizer(), "!").fingerprint != Tokenizer(byte_tokenizer()).fingerprint


def test_fingerprint_says_nothing_on_stderr(caplog: pytest.LogCaptureFixture):
    """The probe text is longer than a short model's limit, which is no reason to warn the user."""
    with caplog.at_level("WARNING"):
        _ = Tokenizer(byte_tokenizer()).fingerprint
    assert caplog.records == []


def test_documents_have_no_special_tokens_and_no_limit():
    tokenizer = Tokenizer(byte_tokenizer(bos=True))
    assert tokenizer.documents(["ab", "", "a" * 500]) == [
        byte_tokenizer().encode("ab"),
        [],
        byte_tokenizer().encode("a") * 500,
    ]
    assert tokenizer.documents([]) == []


def test_prompts_are_padded_on_the_right():
    for hf in (byte_tokenizer(), byte_tokenizer(bos=True)):
        hf.padding_side = "left"  # the tokenizer's own opinion does not count
        rows = Tokenizer(hf).prompts(["abc", "a"])
        assert rows.shape == (2, 3 + (hf("a").input_ids[0] == BOS))
        assert rows[1].tolist() == [*hf("a").input_ids, PAD, PAD]
    assert torch.equal(Tokenizer(byte_tokenizer()).prompts("abc")[0], Tokenizer(byte_tokenizer()).prompts(["abc"])[0])
    assert changed(pad_token=None).prompts(["ab", "a"])[1, 1] == EOS


@pytest.mark.parametrize("texts", ["", [], ["a", ""]])
def test_an_empty_prompt_is_refused(texts):
    with pytest.raises(ConfigError, match="text: empty"):
        Tokenizer(byte_tokenizer()).prompts(texts)


def test_strings_are_what_a_person_reads():
    hf = byte_tokenizer()
    ids = hf.encode("a b\n\x1b\u00a0")
    shown = Tokenizer(hf).strings([*ids, EOS])
    assert shown[:5] == ["a", " ", "b", "\\n", "\\x1b"]
    assert shown[-1] == "<|endoftext|>"
    assert all(text.isprintable() or text == " " for text in shown)


def test_strings_together_are_the_text_where_a_token_alone_loses_its_space():
    pieces = [("<unk>", 0.0), *((piece, -1.0) for piece in ("▁a", "▁bird", "▁sang", "s", ",", "a"))]
    backend = FastTokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token=",")
    ids = hf("a bird sang, a bird", add_special_tokens=False).input_ids
    assert hf.decode([ids[1]]) == "bird"
    assert Tokenizer(hf).strings(ids) == [" a", " bird", " sang", ",", " a", " bird"]
