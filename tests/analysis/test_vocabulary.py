"""Directions in the language model's words: planted tokens come first, and the final norm is treated as stated."""

import json

import pytest
import torch
from torch import Tensor

from mlsae.analysis import vocabulary
from mlsae.analysis.vocabulary import logit_lens, nearest_tokens
from mlsae.errors import ConfigError, ModelError
from mlsae.lm import LanguageModel
from tiny import tiny_lm

torch.set_num_threads(1)


def rows(n: int, d_model: int = 32, *, seed: int = 0) -> Tensor:
    return torch.randn(n, d_model, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return tiny_lm("llama")


# ---- embeddings ------------------------------------------------------------------------------------------------------


def test_a_planted_token_comes_first(llama: LanguageModel):
    directions = rows(20)
    directions[3] = 5 * llama.embedding[77] + 0.1 * directions[3]
    directions[9] = llama.unembedding[200]
    assert nearest_tokens(directions, llama.embedding).tokens[3, 0] == 77
    matches = nearest_tokens(directions, llama.unembedding)
    assert matches.tokens[9, 0] == 200
    assert matches.cosines[9, 0] == pytest.approx(1)


@pytest.mark.parametrize("elements", [1, 600, 10**6])
def test_nearest_tokens_are_those_of_all_cosines_whatever_the_block(monkeypatch: pytest.MonkeyPatch, elements: int):
    monkeypatch.setattr(vocabulary, "MAX_BLOCK_ELEMENTS", elements)
    directions, embedding = rows(11), rows(50, seed=1)
    got = nearest_tokens(directions, embedding, top=5)
    want = torch.nn.functional.cosine_similarity(directions[:, None], embedding, dim=-1).topk(5)
    torch.testing.assert_close(got.cosines, want.values)
    assert torch.equal(got.tokens, want.indices)
    found = json.loads(json.dumps(got.to_dict()))["max_cosine"]
    largest = want.values[:, 0].double()
    assert (found["n"], found["mean"]) == (11, pytest.approx(largest.mean().item()))
    assert found["sem"] == pytest.approx(largest.std().item() / 11**0.5)


def test_random_directions_are_as_near_to_tokens_as_chance():
    embedding = rows(100, seed=1)
    matches = nearest_tokens(rows(1000, seed=2), embedding, seed=3)
    found, chance = matches.to_dict()["max_cosine"], matches.chance.isotropic
    assert abs(found["mean"] - chance.mean) < 4 * (found["sem"] ** 2 + chance.sem**2) ** 0.5


def test_lensed_directions_go_back_first():
    lens = rows(32)  # y = x A^T, so a direction of y is one of x times the inverse of A^T
    directions, embedding = rows(7, seed=4), rows(60, seed=5)
    back = torch.linalg.inv(lens.T)
    got = nearest_tokens(directions @ lens.T, embedding, to_resid=lambda y: y @ back)
    assert torch.equal(got.tokens, nearest_tokens(directions, embedding).tokens)
    read = {"logits_along": lambda x: x @ embedding.T, "rows_at_once": 3}
    got = logit_lens(directions @ lens.T, to_resid=lambda y: y @ back, **read)
    assert torch.equal(got.promoted, logit_lens(directions, **read).promoted)


# ---- the logit lens --------------------------------------------------------------------------------------------------


def test_a_planted_token_is_promoted_and_its_opposite_suppressed():
    lm = tiny_lm("llama", tie_word_embeddings=False)
    direction = lm.unembedding[123] / lm.hf.model.norm.weight  # the gain multiplies it once more
    lens = logit_lens(torch.stack([direction, -direction]), lm.logits_along)
    assert lens.promoted[0, 0] == lens.suppressed[1, 0] == 123
    torch.testing.assert_close(lens.promoted_logits[0], -lens.suppressed_logits[1])


@pytest.mark.parametrize("rows_at_once", [7, 100])
def test_promoted_tokens_are_those_of_all_logits_whatever_the_block(llama: LanguageModel, rows_at_once: int):
    directions = rows(10)
    logits = llama.logits_along(directions)
    got = logit_lens(directions, llama.logits_along, top=3, rows_at_once=rows_at_once)
    torch.testing.assert_close(got.promoted_logits, logits.topk(3).values)
    torch.testing.assert_close(got.suppressed_logits, logits.topk(3, largest=False).values)
    assert torch.equal(got.promoted, logits.topk(3).indices)
    found = json.loads(json.dumps(got.to_dict()))["max_logit"]
    assert found == {
        "n": 10,
        "mean": pytest.approx(logits.amax(1).mean().item()),
        "std": pytest.approx(logits.amax(1).std().item(), rel=1e-4),
        "sem": pytest.approx(logits.amax(1).std().item() / 10**0.5, rel=1e-4),
    }


def test_random_directions_promote_as_chance_does_and_directions_that_are_words_more(llama: LanguageModel):
    """A decoder that leans one way promotes as random directions that lean so do, and not as those of the whole space."""
    read = {"logits_along": llama.logits_along, "seed": 3}
    random = logit_lens(rows(1000, seed=2), **read)
    planted = logit_lens(llama.unembedding / llama.hf.model.norm.weight, **read)
    leaning = logit_lens(torch.nn.functional.normalize(rows(1000, seed=4) + llama.unembedding[7], dim=-1), **read)
    noise = 4 * 2**0.5 * random.chance.isotropic.sem
    found, chance = random.to_dict()["max_logit"], random.chance
    assert abs(found["mean"] - chance.isotropic.mean) < 4 * (found["sem"] ** 2 + chance.isotropic.sem**2) ** 0.5
    assert abs(found["mean"] - chance.covariance.mean) < 4 * (found["sem"] ** 2 + chance.covariance.sem**2) ** 0.5
    assert planted.to_dict()["max_logit"]["mean"] > planted.chance.isotropic.mean + noise
    found, chance = leaning.to_dict()["max_logit"], leaning.chance
    assert abs(found["mean"] - chance.covariance.mean) < noise < chance.covariance.mean - chance.isotropic.mean
    assert planted.chance.isotropic == random.chance.isotropic


def test_the_logits_chance_is_of_the_random_directions_that_embeddings_are_compared_with():
    """Where logits are cosines, both are one number."""
    directions, targets = rows(40), torch.nn.functional.normalize(rows(50, seed=1), dim=-1)
    matches, read = nearest_tokens(directions, targets, seed=5), logit_lens(directions, lambda x: x @ targets.T, seed=5)
    for name, found in vars(read.chance).items():
        assert found.mean == pytest.approx(getattr(matches.chance, name).mean)


def test_the_final_norm_leaves_its_gain_where_it_does_not_centre(llama: LanguageModel):
    directions = rows(5)
    unit = directions / directions.square().mean(1, keepdim=True).sqrt()
    want = (unit * llama.hf.model.norm.weight) @ llama.unembedding.T
    torch.testing.assert_close(llama.logits_along(directions), want, rtol=1e-4, atol=1e-4)


def test_the_final_norm_leaves_centring_and_gain_where_it_centres():
    lm = tiny_lm("gpt_neox")
    centred = rows(5) - rows(5).mean(1, keepdim=True)
    unit = centred / centred.square().mean(1, keepdim=True).sqrt()
    want = (unit * lm.hf.gpt_neox.final_layer_norm.weight) @ lm.unembedding.T
    assert lm.hf.gpt_neox.final_layer_norm.bias.abs().max() > 0.1
    torch.testing.assert_close(lm.logits_along(rows(5)), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lm.logits_along(1000 * rows(5) + 7), lm.logits_along(rows(5)), rtol=1e-3, atol=1e-3)


def test_a_bias_of_the_unembedding_promotes_nothing():
    lm = tiny_lm("phi")
    assert lm.hf.lm_head.bias.abs().max() > 0.1
    assert torch.equal(lm.logits_along(torch.zeros(1, 32)), torch.zeros(1, lm.d_vocab))


# ---- what cannot be read ---------------------------------------------------------------------------------------------


def test_embeddings_of_another_width_and_more_tokens_than_there_are(llama: LanguageModel):
    narrow = tiny_lm("opt", word_embed_proj_dim=16)
    with pytest.raises(ModelError, match="embedding: has rows of 16 entries, the directions 32"):
        nearest_tokens(rows(2), narrow.embedding)
    assert logit_lens(rows(2), narrow.logits_along).promoted.shape == (2, 8)
    for read in (lambda: nearest_tokens(rows(2), rows(7)), lambda: logit_lens(rows(2), lambda x: x[:, :7])):
        with pytest.raises(ConfigError, match="top: 8 given; it must be between 1 and the 7 tokens"):
            read()
