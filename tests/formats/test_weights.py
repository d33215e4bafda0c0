"""What every format stands on: an SAE is a dictionary for each layer and back, and every encoder is its definition."""

from dataclasses import replace

import pytest
import torch

from mlsae import MLSAE
from mlsae.errors import ConfigError, ModelError
from mlsae.formats.weights import Dictionary, Weights, dictionaries, joined, shapes
from mlsae.frames import Lens
from mlsae.trainer import Trainer
from proof import D_MODEL, LAYERS, make_sae, ours, random_vectors

KINDS = {
    "vector": {"frame": "vector"},
    "none": {"frame": "none"},
    "layer": {"frame": "layer"},
    "groups": {"frame": "layer", "groups": 3, "n_latents": 3 * 256},
    "two groups": {"frame": "vector", "groups": 2, "n_latents": 2 * 256},
    "lens": {"frame": "layer", "lens": "somewhere"},
    "plain lens": {"frame": "none", "lens": "somewhere"},
}


def made(kind: str) -> MLSAE:
    sae = make_sae(**KINDS[kind])
    if sae.lens is not None:
        lens = Lens(LAYERS, D_MODEL)
        lens.weight, lens.bias = torch.randn(3, D_MODEL, D_MODEL) / 20, torch.randn(3, D_MODEL)
        sae.set_lens(lens)
    return sae


def defined(one: Dictionary, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense code and reconstruction of vectors `[token, d_model]`, in float64."""
    W_enc, W_dec, b_dec = one.W_enc.double(), one.W_dec.double(), one.b_dec.double()
    x = x.double()
    mean, scale = torch.zeros(len(x), 1), torch.ones(len(x), 1)
    if one.standardize:
        mean, scale = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        x = (x - mean) / (scale + 1e-5)
    pre_acts = (x - b_dec) @ W_enc.T + (0 if one.b_enc is None else one.b_enc.double())
    if one.threshold is None:
        top = pre_acts.topk(one.k)
        code = torch.zeros_like(pre_acts).scatter_(1, top.indices, top.values.relu())
    else:
        code = pre_acts.relu() * (pre_acts > one.threshold)
    return code, (code @ W_dec + b_dec) * scale + mean


def assert_equal_outputs(sae: MLSAE, found: list[Dictionary], x: torch.Tensor) -> None:
    for row, (answer, one, vectors) in enumerate(zip(ours(sae, x), found, x, strict=True)):
        code, recon = defined(one, vectors)
        own = torch.zeros(len(code), sae.config.n_latents, dtype=torch.float64)
        own[:, sae.parts([row])[0].latents] = code
        code = own
        assert ((answer.code > 0) != (code > 0)).sum() <= 2  # where rounding decides a tie
        near = ((answer.code > 0) == (code > 0)).all(-1)
        assert near.float().mean() > 0.95
        torch.testing.assert_close(answer.code[near].double(), code[near], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(answer.recon[near].double(), recon[near], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_an_sae_is_a_dictionary_for_each_of_its_layers(kind):
    """The frame and the lens go into the weights, and nothing changes, activations in the frame's units included."""
    sae = made(kind)
    x = random_vectors(sae)
    found = dictionaries(sae.weights())
    assert [one.layers for one in found] == [(layer,) for layer in LAYERS]
    assert_equal_outputs(sae, found, x)


@pytest.mark.parametrize("kind", KINDS)
def test_dictionaries_are_an_sae_again(kind):
    sae = made(kind)
    x = random_vectors(sae)
    again = MLSAE.from_weights(joined(dictionaries(sae.weights())))
    assert again.layers == LAYERS
    assert_equal_outputs(again, dictionaries(sae.weights()), x)
    shared = kind in ("vector", "none")
    assert again.config.groups == (1 if shared else 3)
    if shared:
        for name in ("W_enc", "W_dec", "b_pre"):
            assert torch.equal(getattr(again, name), getattr(sae, name))


def test_a_lens_before_standardised_vectors_has_no_twin():
    with pytest.raises(ConfigError, match="no twin in other libraries"):
        dictionaries(make_sae("vector", lens="somewhere").weights())


def make_dictionary(layer: int, *, seed: int = 0, **changes) -> Dictionary:
    draw = torch.Generator().manual_seed(seed)
    tensors = {"W_enc": torch.randn(64, 16, generator=draw), "W_dec": torch.randn(64, 16, generator=draw)}
    return Dictionary(**{**tensors, "b_dec": torch.randn(16, generator=draw), "k": 8, "layers": (layer,), **changes})


FOREIGN = {
    "bias": {"b_enc": torch.linspace(-1, 1, 64)},
    "threshold": {"threshold": torch.linspace(-1, 4, 64), "k": 64},
    "both": {"b_enc": torch.linspace(-1, 1, 64), "threshold": torch.linspace(0, 4, 64), "k": 64},
    "both, standardised": {"b_enc": torch.ones(64), "threshold": torch.ones(64), "k": 64, "standardize": True},
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("n_layers", [1, 3])
def test_biases_and_thresholds_of_latents_are_kept(kind, n_layers):
    found = [make_dictionary(layer, seed=layer, **FOREIGN[kind]) for layer in range(n_layers)]
    sae = MLSAE.from_weights(joined(found))
    assert_equal_outputs(sae, found, 3 * torch.randn(n_layers, 20, 16) + 1)
    assert_equal_outputs(sae, dictionaries(sae.weights()), 3 * torch.randn(n_layers, 20, 16) + 1)


@pytest.mark.parametrize("kind", FOREIGN)
def test_gradients_of_imported_encoders_are_those_of_the_definition(kind):
    one = make_dictionary(0, **FOREIGN[kind])
    sae = MLSAE.from_weights(joined([one]))
    x = torch.randn(1, 5, 16, requires_grad=True)
    sae.encode(x).values.square().sum().backward()
    again = x.detach()[0].clone().requires_grad_()
    defined(one, again)[0].square().sum().backward()
    torch.testing.assert_close(x.grad[0], again.grad, rtol=1e-3, atol=1e-3)


def test_no_active_latent_at_all_is_a_code_of_zeros():
    sae = MLSAE.from_weights(joined([make_dictionary(0, threshold=torch.full((64,), 1e9), k=64)]))
    code = sae.encode(torch.randn(1, 3, 16))
    assert code.to_dense().count_nonzero() == 0
    assert torch.equal(sae.decode(code), sae.b_pre.expand(1, 3, 16))
    assert sae.encode(torch.randn(1, 0, 16)).values.shape[:2] == (1, 0)


def test_what_is_imported_with_biases_or_thresholds_is_not_trained_on():
    sae = MLSAE.from_weights(joined([make_dictionary(0, **FOREIGN["bias"])]))
    with pytest.raises(ConfigError, match="only TopK SAEs without"):
        Trainer(sae)


def test_layers_come_in_order_whatever_the_folders_were_called():
    found = [make_dictionary(layer, seed=layer) for layer in (10, 2, 9)]
    weights = joined(found)
    assert weights.config.layers == (2, 9, 10)
    assert torch.equal(weights.tensors["b_pre"][2], found[0].b_dec)


DIFFERENT = {
    "k": {"k": 7},
    "input normalisation": {"standardize": True},
    "activation": {"threshold": torch.zeros(64)},
    "language models": {"lm": "another"},
}


def test_no_bias_is_a_bias_of_zero():
    found = [make_dictionary(0), make_dictionary(1, seed=1, b_enc=torch.linspace(-1, 1, 64))]
    sae = MLSAE.from_weights(joined(found))
    assert_equal_outputs(sae, found, 3 * torch.randn(2, 20, 16) + 1)


@pytest.mark.parametrize("what", DIFFERENT)
def test_dictionaries_that_differ_in_kind_are_not_joined(what):
    with pytest.raises(ModelError, match=f"SAEs of different {what}; open one of them alone"):
        joined([make_dictionary(0), make_dictionary(1, **DIFFERENT[what])])


def test_a_layer_is_not_read_twice():
    with pytest.raises(ConfigError, match="given twice"):
        joined([make_dictionary(1), make_dictionary(1, seed=1)])


WRONG = {
    "W_dec": {"W_dec": torch.zeros(16, 64)},
    "b_dec": {"b_dec": torch.zeros(64)},
    "b_enc": {"b_enc": torch.zeros(16)},
    "threshold": {"threshold": torch.zeros(1)},
}


@pytest.mark.parametrize("name", WRONG)
def test_tensors_of_other_shapes_are_refused_by_name(name):
    with pytest.raises(ModelError, match=f"{name}: has shape"):
        make_dictionary(0, **WRONG[name])


def test_numbers_that_are_none_are_refused():
    with pytest.raises(ModelError, match="W_enc: holds NaN"):
        make_dictionary(0, W_enc=torch.full((64, 16), torch.nan))
    with pytest.raises(ModelError, match="k: 65 given"):
        make_dictionary(0, k=65)


@pytest.mark.parametrize("kind", [*KINDS, "foreign"])
def test_shapes_are_those_of_the_module(kind):
    """`formats` knows no MLSAE, and must not be told other tensors than it has."""
    sae = MLSAE.from_weights(joined([make_dictionary(0, **FOREIGN["both"])])) if kind == "foreign" else made(kind)
    assert shapes(sae.config) == {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
    sae.load_state_dict(Weights(sae.config, sae.weights().tensors).tensors, strict=True)


def test_a_dictionary_that_is_replaced_is_another():
    one = make_dictionary(0)
    assert one.same_as(replace(one, layers=(5,)))
    assert not one.same_as(replace(one, b_dec=one.b_dec + 1))
    assert not one.same_as(replace(one, k=7))
