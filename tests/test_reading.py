"""Tokens to vectors: what is masked, what is counted, and which pairs of language model and SAE are refused."""

import contextlib
import threading
from dataclasses import fields

import pytest
import torch

from mlsae import reading as reading_module
from mlsae.config import MLSAEConfig
from mlsae.errors import ModelError
from mlsae.lm import LanguageModel
from mlsae.reading import Reading, check_pair, read, read_ahead
from mlsae.sae import MLSAE
from tiny import byte_tokenizer, tiny_lm

torch.set_num_threads(1)
TOKENS = torch.tensor([[70, 71, 256, 73, 74], [258, 80, 81, 257, 83]])
VISIBLE = torch.tensor([[0, 1, 0, 1, 1], [0, 1, 1, 0, 1]]).bool()


@pytest.fixture(scope="module")
def lm():
    return tiny_lm(n_layers=3, d_model=16)


def make_sae(lm, **changes):
    shape = {"d_model": 16, "n_latents": 32, "k": 4, "layers": (0, 1, 2), "lm": "the right one"}
    return MLSAE(MLSAEConfig(**{**shape, "tokenizer_fingerprint": lm.tokenizer.fingerprint, **changes}))


def test_masked_vectors_are_left_out_in_order(lm):
    reading = read(lm, make_sae(lm), TOKENS)
    assert torch.equal(reading.visible, VISIBLE)
    assert torch.equal(reading.resid, lm.resid(TOKENS))
    assert torch.equal(reading.vectors, lm.resid(TOKENS)[:, VISIBLE])
    assert torch.equal(reading.over_norm, torch.zeros(3, dtype=torch.int64))


def test_what_a_reading_holds_does_not_ask_for_gradients(lm):
    reading = read(lm, make_sae(lm), TOKENS)
    assert not reading.resid.requires_grad
    assert not reading.vectors.requires_grad


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_each_rule_of_masking_can_be_turned_off(lm, special, first):
    reading = read(lm, make_sae(lm, mask_special_tokens=special, mask_first_position=first), TOKENS)
    expected = torch.ones_like(VISIBLE)
    if special:
        expected &= TOKENS < 256
    if first:
        expected[:, 0] = False
    assert torch.equal(reading.visible, expected)


def test_what_is_trained_on_is_dropped_or_zeroed(lm):
    """The zeroed kind keeps every position in its place; the analysis sees the same vectors of either."""
    drop, zero = (make_sae(lm, special_tokens=kind) for kind in ("drop", "zero"))
    a, b = read(lm, drop, TOKENS), read(lm, zero, TOKENS)
    assert torch.equal(a.vectors, b.vectors)
    assert torch.equal(a.to_train(drop), a.vectors)
    trained, visible = b.to_train(zero), VISIBLE.flatten()
    assert trained.shape == (3, TOKENS.numel(), 16)
    assert torch.equal(trained[:, visible], b.vectors)
    assert not trained[:, ~visible].any()


def test_layers_are_read_in_the_order_the_sae_names_them(lm):
    reading = read(lm, make_sae(lm, layers=(2, 0)), TOKENS)
    assert torch.equal(reading.resid, lm.resid(TOKENS)[[2, 0]])


def test_vectors_beyond_a_limit_are_counted_per_layer_and_their_tokens_left_out(lm):
    """A token beyond the limit at one layer is left out at all; masked positions do not count."""
    sae = make_sae(lm)
    norms = lm.resid(TOKENS).norm(dim=-1)
    sae.norm_limit[1] = norms[1][VISIBLE].sort().values[-2]  # one visible vector is longer
    reading = read(lm, sae, TOKENS)
    assert reading.over_norm.tolist() == [0, 1, 0]
    assert torch.equal(reading.visible, VISIBLE & (norms[1] <= sae.norm_limit[1]))
    assert reading.vectors.shape[1] == VISIBLE.sum() - 1


def test_a_batch_may_have_nothing_to_see(lm):
    reading = read(lm, make_sae(lm), torch.tensor([[70, 256, 257]]))
    assert reading.vectors.shape == (3, 0, 16)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(0, 1), (1, 3)])
def test_nan_is_not_masked_away_and_what_is_masked_does_not_leak(lm, monkeypatch, place, value):
    """A visible NaN must reach the loss, which stops the run; one at a masked position must not."""
    resid = lm.resid(TOKENS)
    resid[(1, *place)] = value
    monkeypatch.setattr(type(lm), "resid", lambda self, tokens, layers=None: resid)
    for special_tokens in ("drop", "zero"):
        sae = make_sae(lm, special_tokens=special_tokens)
        trained = read(lm, sae, TOKENS).to_train(sae)
        assert bool(trained.isfinite().all()) == (not VISIBLE[place])


def test_reading_ahead_is_reading(lm):
    batches = [TOKENS, TOKENS.flip(0), TOKENS[:1]]
    ahead = list(read_ahead(lm, make_sae(lm), iter(batches)))
    for got, tokens in zip(ahead, batches, strict=True):
        assert torch.equal(got.vectors, read(lm, make_sae(lm), tokens).vectors)


class Stream:
    """A CUDA stream as far as `read_ahead` knows one: who waited for whom, and when."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append((self.name, "waits for", other.name))


def test_on_cuda_the_next_batch_is_being_read_while_this_one_is_used(lm, monkeypatch):
    """The order of events, with streams that only write it down; the results are those of `read`."""
    log, started = [], threading.Semaphore(0)

    class OnCuda(LanguageModel):
        device = torch.device("cuda")  # type: ignore[assignment]
        spread = False

    def reads(_, sae, tokens):
        log.append(("side", "reads", len(tokens)))
        started.release()
        assert threading.current_thread() is not threading.main_thread()
        return read(lm, sae, tokens)

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side", log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main", log))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append((stream.name, "keeps", None)))
    monkeypatch.setattr(reading_module, "read", reads)
    batches, got = [TOKENS, TOKENS[:1]], []
    for reading in read_ahead(object.__new__(OnCuda), make_sae(lm), iter(batches)):
        if not got:  # both batches are read though only one was asked for
            assert started.acquire(timeout=10)
            assert started.acquire(timeout=10)
        got.append(reading)
        log.append(("main", "uses", len(reading.tokens)))
    for one, tokens in zip(got, batches, strict=True):
        assert torch.equal(one.vectors, read(lm, make_sae(lm), tokens).vectors)
    assert log[0] == ("side", "waits for", "main")
    for size in (2, 1):
        used = log.index(("main", "uses", size))
        assert log[:used].count(("main", "keeps", None)) == len(fields(Reading)) * (3 - size)
        assert ("main", "waits for", "side") in log[log.index(("side", "reads", size)) : used]


def test_a_fitting_pair_is_accepted(lm):
    check_pair(lm, make_sae(lm))
    check_pair(lm, make_sae(lm, layers=(2,), tokenizer_fingerprint=None))


REFUSED = {
    "width": ({"d_model": 32}, "sae: reads vectors of 32 entries; tiny-llama has d_model 16"),
    "layers": ({"layers": (0, 3)}, "sae: reads layer 3; tiny-llama has layers 0-2"),
    "tokenizer": (
        {"tokenizer_fingerprint": "ab" * 32},
        "was trained with tokenizer abababababab; tiny-llama has {ours}; use the",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_another_language_model_is_refused_naming_both_values(lm, kind):
    changes, message = REFUSED[kind]
    with pytest.raises(ModelError) as caught:
        check_pair(lm, make_sae(lm, **changes))
    assert message.format(ours=lm.tokenizer.fingerprint[:12]) in str(caught.value)
    assert caught.value.exit_code == 6


def test_a_tokenizer_of_the_same_size_is_told_apart(lm):
    """One BOS more before every text is another tokenizer."""
    assert len(byte_tokenizer(bos=True)) == len(byte_tokenizer())
    with pytest.raises(ModelError, match="was trained with tokenizer"):
        check_pair(lm, make_sae(tiny_lm(bos=True, n_layers=3, d_model=16)))
