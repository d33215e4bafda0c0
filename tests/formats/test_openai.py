"""openai/sparse_autoencoder: its SAEs open here and ours there, with equal outputs; what has no twin is refused."""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import proof
from mlsae import MLSAE, formats, untrusted
from mlsae.errors import ConfigError, ModelError
from mlsae.formats import Given, openai

NAME = "openai"
PEER = proof.peer_python(NAME, "no package: a checkout") if "MLSAE_PEER_OPENAI_PATH" in os.environ else None
TRUSTED = Given(allow_pickle=True)
KINDS: dict[str, dict[str, Any]] = {
    "vector": {},
    "grouped": {"n_latents": 3 * proof.N_LATENTS, "groups": 3},
    "bias": {"latent_bias": True},
}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted, "unpickled", proof.unpickle_here)


def definition(path: Path, x: Tensor) -> proof.Answer:
    """What `Autoencoder` computes with the activation TopK: standardise, the k largest, rectify, and all the way back."""
    state = torch.load(path, weights_only=True)
    assert (state["activation"], state["activation_state_dict"]["postact_fn"]) == ("TopK", "ReLU")
    mean = x.mean(-1, keepdim=True)
    std = (x - mean).std(-1, keepdim=True)
    pre_acts = ((x - mean) / (std + 1e-5) - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]
    top = pre_acts.topk(state["activation_state_dict"]["k"], dim=-1)
    code = torch.zeros_like(pre_acts).scatter_(-1, top.indices, top.values.relu())
    return proof.Answer(code, (code @ state["decoder.weight"].T + state["pre_bias"]) * std + mean, "definition")


def written(path: Path, d_model: int = proof.D_MODEL) -> Path:
    """A file as the class's `state_dict` is saved: its activation stands in it twice."""
    torch.manual_seed(3)
    n = proof.N_LATENTS
    state: dict[str, Any] = {"pre_bias": torch.randn(d_model), "latent_bias": torch.randn(n)}
    state |= {"encoder.weight": torch.randn(n, d_model), "decoder.weight": torch.randn(d_model, n)}
    state |= {"stats_last_nonzero": torch.zeros(n, dtype=torch.int64), "latents_mean_square": torch.zeros(n)}
    state |= {"latents_activation_frequency": torch.ones(n), "activation": "TopK"}
    state |= {"activation.k": proof.K, "activation.postact_fn": "ReLU"}
    state |= {"activation_state_dict": {"k": proof.K, "postact_fn": "ReLU"}}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


def damage(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The same file with something done to what it holds."""
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_equals_ours_in_every_layer(kind: str, tmp_path: Path):
    for name, sae, x in proof.inputs(proof.make_sae(**KINDS[kind])):
        paths = formats.write(sae.weights(), tmp_path / name, NAME)
        answers = [proof.of_group(sae, row, answer) for row, answer in enumerate(proof.ours(sae, x))]
        for path, answer, vectors in zip(paths, answers, x, strict=True):
            proof.compare(NAME, "export", name, answer, definition(path, vectors))
        if PEER is not None:
            theirs = proof.ask_peer(PEER, NAME, "read", paths[1], x[1], tmp_path / "peer")
            proof.compare(NAME, "export", name, answers[1], theirs)


def test_what_the_class_saves_opens_with_equal_outputs(tmp_path: Path):
    for name, _, x in proof.inputs(proof.make_sae()):
        path = written(tmp_path / name / "resid_post_mlp_v5_32k" / "autoencoders" / "1.pt", x.shape[2])
        opened = MLSAE.from_pretrained(path, allow_pickle=True)
        assert (opened.layers, opened.config.frame, opened.config.latent_bias) == ((1,), "vector", True)
        proof.compare(NAME, "import", name, proof.ours(opened, x[1:2])[0], definition(path, x[1]))
        if PEER is not None:
            theirs = proof.ask_peer(PEER, NAME, "write", tmp_path / name / "own.pt", x[1], tmp_path)
            opened = MLSAE.from_pretrained(tmp_path / name / "own.pt", layers=[1], allow_pickle=True)
            proof.compare(NAME, "import", name, proof.ours(opened, x[1:2])[0], theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_an_sae_comes_back_bit_for_bit(kind: str, tmp_path: Path):
    sae = proof.make_sae(**KINDS[kind])
    formats.write(sae.weights(), tmp_path / "out", NAME)
    back = formats.read(tmp_path / "out", TRUSTED)
    assert formats.detect(tmp_path / "out") == NAME
    assert (back.config.layers, back.config.k, back.config.groups) == (sae.layers, proof.K, sae.config.groups)
    assert back.tensors.keys() == sae.weights().tensors.keys()
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in sae.weights().tensors.items())


def test_a_pickle_is_read_only_if_that_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()  # in a process of its own
    path = written(tmp_path / "5.pt")
    with pytest.raises(ModelError, match=r"5\.pt: is a pickle; give --allow-pickle"):
        formats.read(path)
    sae = MLSAE.from_pretrained(path, layers=[5], allow_pickle=True)
    assert torch.equal(sae.W_enc, torch.load(path, weights_only=True)["encoder.weight"])
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"5\.pt"):
        formats.read(path, TRUSTED)


def test_only_the_place_of_publication_says_the_layer(tmp_path: Path):
    assert formats.read(written(tmp_path / "mine" / "7.pt"), TRUSTED).config.layers is None
    assert formats.read(tmp_path / "mine" / "7.pt", Given(layers=(3,), allow_pickle=True)).config.layers == (3,)
    path = written(tmp_path / "resid_delta_mlp_v5_32k" / "autoencoders" / "7.pt")
    with pytest.raises(ModelError, match="'resid_delta_mlp_v5_32k' reads another place than the residual stream"):
        formats.read(path, TRUSTED)
    assert formats.read(path, Given(layers=(7,), allow_pickle=True)).config.layers == (7,)
    path = path.rename(tmp_path / "mine" / "resid_post_mlp.pt")
    assert formats.read(path, TRUSTED).config.layers is None


@pytest.mark.parametrize(
    ("what", "change", "reason"),
    [
        (
            "no activation",
            lambda state: state.pop("activation"),
            "'activation' is 'ReLU'; only SAEs with TopK have a twin",
        ),
        ("activation ReLU", lambda state: state.update(activation="ReLU"), "'activation' is 'ReLU'"),
        (
            "postact_fn that is not ReLU",
            lambda state: [state.pop("activation.postact_fn"), state["activation_state_dict"].update(postact_fn="Id")],
            "'postact_fn' is 'Id'; only SAEs with ReLU",
        ),
        (
            "k said twice and differently",
            lambda state: state["activation_state_dict"].update(k=9),
            "'k' is both 8 and another",
        ),
        (
            "no k",
            lambda state: [state.pop("activation.k"), state["activation_state_dict"].pop("k")],
            "'k' is missing",
        ),
        (
            "k = 257 of 256 latents",
            lambda state: [state.pop("activation.k"), state["activation_state_dict"].update(k=257)],
            "'k' is 257; it must be a whole number from 1 to 256",
        ),
        ("normalize: false", lambda state: state.update(normalize=False), "'normalize' is unknown"),
        ("no latent_bias", lambda state: state.pop("latent_bias"), "'latent_bias' is missing"),
        ("no encoder.weight", lambda state: state.pop("encoder.weight"), "'encoder.weight' is missing"),
        (
            "a tied decoder",
            lambda state: state.update({"decoder.linear.weight": state.pop("decoder.weight")}),
            "'decoder.weight' is missing",
        ),
        ("a skip connection", lambda state: state.update(W_skip=torch.zeros(2)), "'W_skip' is unknown"),
        (
            "decoder.weight transposed",
            lambda state: state.update({"decoder.weight": state["decoder.weight"].T}),
            r"shape \[256, 32\]; it must be",
        ),
        ("NaN in pre_bias", lambda state: state["pre_bias"].fill_(torch.nan), "'pre_bias' holds NaN"),
        ("whole numbers", lambda state: state.update(pre_bias=state["pre_bias"].long()), "'pre_bias' is torch.int64"),
    ],
)
def test_damaged_and_mislabelled_files_are_refused(
    what: str, change: Callable[[Any], Any], reason: str, tmp_path: Path
):
    path = damage(written(tmp_path / "1.pt"), change)
    assert re.search(reason, proof.refuse(NAME, what, path, allow_pickle=True))


MUTATIONS: dict[str, Callable[[Any], Any]] = {
    "encoder": lambda one: replace(one, W_enc=one.W_enc.flip(0)),
    "decoder": lambda one: replace(one, W_dec=one.W_dec.T.reshape(one.W_dec.shape)),
    "latent bias": lambda one: replace(one, b_enc=None),
    "bias": lambda one: replace(one, b_dec=one.b_dec * 0),
    "not normalised": lambda one: replace(one, standardize=False),
    "k": lambda one: replace(one, k=one.k + 1),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_an_import_with_one_field_wrong_is_noticed(mutation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    x = proof.random_vectors(proof.make_sae())
    path, real = written(tmp_path / "1.pt"), openai._read
    want = definition(path, x[0])
    monkeypatch.setattr(openai, "_read", lambda path, given: MUTATIONS[mutation](real(path, given)))
    opened, rows = MLSAE.from_pretrained(path, layers=[0], allow_pickle=True), len(proof.ROWS)
    with pytest.raises(AssertionError):
        proof.compare(NAME, "import", "random", proof.ours(opened, x[:1])[0], want)
    del proof.ROWS[rows:]


@pytest.mark.parametrize("frame", ["none", "layer"])
def test_an_input_that_is_not_standardised_is_not_written(frame: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="as only frame 'vector' does"):
        formats.write(proof.make_sae(frame).weights(), tmp_path / "out", NAME)
    assert not (tmp_path / "out").exists()


def test_thresholds_are_not_written(tmp_path: Path):
    with pytest.raises(ConfigError, match="no thresholds; saelens"):
        formats.write(proof.make_sae(activation="jumprelu").weights(), tmp_path / "out", NAME)
