"""dictionary_learning: its SAEs open here and ours there, with equal outputs; what has no twin is refused."""

import json
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
from mlsae.formats import Given, dictionary_learning

NAME = "dictionary-learning"
PEER = proof.peer_python(NAME, "no package: a checkout")
if "MLSAE_PEER_DICTIONARY_LEARNING_PATH" not in os.environ:
    PEER = None
TRUSTED = Given(allow_pickle=True)
KINDS: dict[str, dict[str, Any]] = {
    "none": {"frame": "none"},
    "layer": {"frame": "layer"},
    "grouped": {"frame": "layer", "n_latents": 3 * proof.N_LATENTS, "groups": 3},
    "lens": {"frame": "layer", "lens": "somewhere"},
    "bias": {"frame": "none", "latent_bias": True},
    "thresholds": {"frame": "layer", "activation": "jumprelu", "latent_bias": True},
}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted, "unpickled", proof.unpickle_here)


def definition(folder: Path, x: Tensor) -> proof.Answer:
    """What its classes compute, as `load_dictionary` opens them."""
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    t, kind = torch.load(folder / "ae.pt", weights_only=True), trainer["dict_class"]
    linear = "encoder.weight" in t
    W_enc, W_dec = (t["encoder.weight"].T, t["decoder.weight"].T) if linear else (t["W_enc"], t["W_dec"])
    b_enc, b_dec = t["encoder.bias" if linear else "b_enc"], t["bias" if kind == "AutoEncoder" else "b_dec"]
    if kind == "AutoEncoder":
        norms = W_dec.norm(dim=1)
        W_enc, b_enc, W_dec = W_enc * norms, b_enc * norms, W_dec / norms[:, None]
    acts = ((x if kind == "JumpReluAutoEncoder" else x - b_dec) @ W_enc + b_enc).relu()
    if kind == "AutoEncoderTopK":
        top = acts.topk(int(t["k"]), dim=-1)
        code = torch.zeros_like(acts).scatter_(-1, top.indices, top.values)
    else:
        code = acts * (acts > t.get("threshold", torch.tensor(-1.0)))
    return proof.Answer(code, code @ W_dec + b_dec, "definition")


def written(folder: Path, kind: str = "AutoEncoderTopK", d_model: int = proof.D_MODEL, **changes) -> Path:
    """A folder as dictionary_learning writes one, with `changes` to its `trainer`."""
    torch.manual_seed(3)
    n = proof.N_LATENTS
    tensors = {"W_enc": torch.randn(d_model, n), "b_enc": torch.randn(n), "W_dec": torch.randn(n, d_model)}
    tensors["b_dec"] = torch.randn(d_model)
    if kind in ("AutoEncoderTopK", "BatchTopKSAE", "AutoEncoder"):
        tensors["encoder.weight"], tensors["encoder.bias"] = tensors.pop("W_enc").T, tensors.pop("b_enc")
        tensors["decoder.weight"] = tensors.pop("W_dec").T
    trainer: dict[str, Any] = {"dict_class": kind, "activation_dim": d_model, "dict_size": n, "lm_name": "gpt2"}
    trainer |= {"layer": 1, "submodule_name": "resid_post_layer_1", "lr": 1e-4}
    if kind == "AutoEncoder":
        tensors["bias"] = tensors.pop("b_dec")
    elif kind == "JumpReluAutoEncoder":
        tensors["threshold"] = torch.rand(n) * 20 - 2
    else:
        tensors |= {"k": torch.tensor(proof.K, dtype=torch.int32), "threshold": torch.tensor(9.0)}
        trainer["k"] = proof.K
    if kind == "MatryoshkaBatchTopKSAE":
        tensors["group_sizes"] = torch.tensor([64, n - 64])
    folder.mkdir(parents=True)
    torch.save(tensors, folder / "ae.pt")
    trainer = {key: value for key, value in (trainer | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    return folder


def damage(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The same folder with something done to the tensors of its `ae.pt`."""
    state = torch.load(folder / "ae.pt", weights_only=True)
    change(state)
    torch.save(state, folder / "ae.pt")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_equals_ours_in_every_layer(kind: str, tmp_path: Path):
    for name, sae, x in proof.inputs(proof.make_sae(**KINDS[kind])):
        folders = formats.write(sae.weights(), tmp_path / name, NAME)
        answers = [proof.of_group(sae, row, answer) for row, answer in enumerate(proof.ours(sae, x))]
        for folder, answer, vectors in zip(folders, answers, x, strict=True):
            proof.compare(NAME, "export", name, answer, definition(folder, vectors))
        if PEER is not None:
            theirs = proof.ask_peer(PEER, NAME, "read", folders[1], x[1], tmp_path / "peer")
            proof.compare(NAME, "export", name, answers[1], theirs)


@pytest.mark.parametrize("kind", dictionary_learning.CLASSES)
def test_each_class_with_a_twin_opens_with_equal_outputs(kind: str, tmp_path: Path):
    for name, _, x in proof.inputs(proof.make_sae("none")):
        folder = written(tmp_path / name, kind, x.shape[2])
        opened = MLSAE.from_pretrained(folder, allow_pickle=True)
        assert (opened.layers, opened.config.lm) == ((1,), "gpt2")
        assert opened.config.activation == ("topk" if kind == "AutoEncoderTopK" else "jumprelu")
        proof.compare(NAME, "import", name, proof.ours(opened, x[1:2])[0], definition(folder, x[1]))
        if PEER is not None:
            theirs = proof.ask_peer(PEER, NAME, f"write-{kind}", tmp_path / "theirs" / name, x[1], tmp_path)
            opened = MLSAE.from_pretrained(tmp_path / "theirs" / name, allow_pickle=True)
            proof.compare(NAME, "import", name, proof.ours(opened, x[1:2])[0], theirs)


@pytest.mark.parametrize("kind", ["none", "bias"])
def test_an_sae_comes_back_bit_for_bit(kind: str, tmp_path: Path):
    sae = proof.make_sae(**KINDS[kind], lm="gpt2")
    formats.write(sae.weights(), tmp_path / "out", NAME)
    back = formats.read(tmp_path / "out", TRUSTED)
    assert formats.detect(tmp_path / "out") == NAME
    assert (back.config.layers, back.config.k, back.config.groups) == (sae.layers, proof.K, 1)
    assert back.config.lm == "gpt2"
    assert back.tensors.keys() == sae.weights().tensors.keys()
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in sae.weights().tensors.items())


def test_thresholds_come_back_as_they_were(tmp_path: Path):
    """The biases take up what the class does not subtract, and give it back to a rounding."""
    sae = proof.make_sae("none", activation="jumprelu", latent_bias=True)
    formats.write(sae.weights(), tmp_path / "out", NAME)
    back = MLSAE.from_weights(formats.read(tmp_path / "out", TRUSTED))
    assert torch.equal(back.threshold, sae.threshold)
    torch.testing.assert_close(back.b_enc, sae.b_enc, rtol=0, atol=1e-5)


def test_a_group_is_written_without_the_others(tmp_path: Path):
    """Its weights are a view of all groups', which a pickle would keep whole."""
    weights = proof.make_sae("none", n_latents=3 * proof.N_LATENTS, groups=3).weights()
    first = formats.write(weights, tmp_path / "out", NAME)[0]
    one = 4 * 2 * proof.N_LATENTS * proof.D_MODEL
    assert one < (first / "ae.pt").stat().st_size < 1.2 * one
    back = formats.read(tmp_path / "out", TRUSTED)
    assert back.config.groups == 3
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in weights.tensors.items())


def test_a_pickle_is_read_only_if_that_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()  # in a process of its own
    folder = written(tmp_path / "trainer_0")
    with pytest.raises(ModelError, match=r"ae\.pt: is a pickle; give --allow-pickle"):
        formats.read(folder)
    sae = MLSAE.from_pretrained(folder, allow_pickle=True)
    assert torch.equal(sae.W_enc, torch.load(folder / "ae.pt", weights_only=True)["encoder.weight"])
    damage(folder, lambda state: state.update(b_dec=print))
    with pytest.raises(ModelError, match=r"ae\.pt"):
        formats.read(folder, TRUSTED)


def test_a_checkpoint_and_a_file_open_with_the_config_above_them(tmp_path: Path):
    folder = written(tmp_path / "trainer_0")
    (folder / "checkpoints").mkdir()
    checkpoint = (folder / "ae.pt").rename(folder / "checkpoints" / "ae_500.pt")
    assert formats.detect(checkpoint) == NAME
    assert formats.read(checkpoint, TRUSTED).config.layers == (1,)


def test_the_backup_of_a_run_is_in_the_units_of_the_residual_stream(tmp_path: Path):
    """Vectors were divided by the factor: reconstructions grow with it, as the library's own `scale_biases` makes them."""
    whole, backup = written(tmp_path / "whole", "BatchTopKSAE"), written(tmp_path / "backup", "BatchTopKSAE")
    ae, adam = torch.load(backup / "ae.pt", weights_only=True), {"state": {0: {"exp_avg": torch.zeros(3)}}}
    torch.save({"step": 5, "ae": ae, "optimizer": adam, "config": {"k": 8}, "norm_factor": 2.5}, backup / "ae.pt")
    x = proof.random_vectors(proof.make_sae("none"))[:1]
    small, large = (MLSAE.from_pretrained(folder, allow_pickle=True) for folder in (whole, backup))
    want = proof.ours(small, x)[0]
    proof.compare(
        NAME, "import", "random", proof.ours(large, x * 2.5)[0], proof.Answer(want.code * 2.5, want.recon * 2.5, "x")
    )
    proof.ROWS.pop()
    damage(backup, lambda state: state.pop("norm_factor"))
    with pytest.raises(ModelError, match="norm_factor is None"):
        formats.read(backup, TRUSTED)


def test_a_threshold_that_was_never_set_is_exceeded_by_all_that_is_positive(tmp_path: Path):
    folder = damage(written(tmp_path / "a", "BatchTopKSAE"), lambda state: state["threshold"].fill_(-1))
    x = proof.random_vectors(proof.make_sae("none"))[:1]
    got = proof.ours(MLSAE.from_pretrained(folder, allow_pickle=True), x)[0]
    assert torch.equal(got.code > 0, definition(folder, x[0]).code > 0)
    assert int((got.code > 0).sum(-1).max()) > 64


def test_files_of_the_first_versions_say_k_in_the_config_alone(tmp_path: Path):
    folder = damage(written(tmp_path / "a"), lambda state: [state.pop("k"), state.pop("threshold")])
    assert formats.read(folder, TRUSTED).config.k == proof.K


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, (1,)),
        ({"submodule_name": "resid_out_layer1"}, (1,)),
        ({"submodule_name": "resid_post_layer_0", "layer": 0}, (0,)),
        ({"submodule_name": None}, None),
        ({"submodule_name": "mlp_out_layer1"}, "'mlp_out_layer1' reads another place than the residual stream"),
        ({"layer": 2}, "'layer' is 2, but 'submodule_name' 'resid_post_layer_1'"),
    ],
)
def test_the_submodule_says_the_layer(changes: dict[str, Any], layers: object, tmp_path: Path):
    folder = written(tmp_path / "a", **changes)
    if isinstance(layers, str):
        with pytest.raises(ModelError, match=layers):
            formats.read(folder, TRUSTED)
    else:
        assert formats.read(folder, TRUSTED).config.layers == layers


def test_layers_given_open_what_reads_another_place(tmp_path: Path):
    folder = written(tmp_path / "a", submodule_name="mlp_out_layer1")
    assert formats.read(folder, Given(layers=(1,), allow_pickle=True)).config.layers == (1,)
    values = json.loads((written(tmp_path / "b") / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps(values | {"buffer": {"io": "in"}}))
    with pytest.raises(ModelError, match="'io: in' reads another place"):
        formats.read(tmp_path / "b", TRUSTED)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dict_class": "GatedAutoEncoder"}, "dict_class is 'GatedAutoEncoder', which has no twin"),
        ({"dict_class": "AutoEncoderNew"}, "dict_class is 'AutoEncoderNew'"),
        ({"dict_class": ["AutoEncoder"]}, r"dict_class is \['AutoEncoder'\]"),
        ({"dict_class": "AutoEncoder"}, "'bias' is missing"),
        ({"dict_class": "JumpReluAutoEncoder"}, "'W_dec' is missing"),
        ({"k": 9}, "'k' is 9; the weights say 8"),
        ({"dict_size": 128}, r"'dict_size' is 128; 'encoder.weight' has shape \[256, 32\]"),
        ({"activation_dim": 31}, "'activation_dim' is 31"),
    ],
)
def test_a_config_without_a_twin_is_refused(changes: dict[str, Any], reason: str, tmp_path: Path):
    what = ", ".join(f"{key} = {value!r}" for key, value in changes.items())
    assert re.search(reason, proof.refuse(NAME, what, written(tmp_path / "a", **changes), allow_pickle=True))


@pytest.mark.parametrize(
    ("what", "change", "reason"),
    [
        ("no encoder.bias", lambda state: state.pop("encoder.bias"), "'encoder.bias' is missing"),
        ("no encoder.weight", lambda state: state.pop("encoder.weight"), "'encoder.weight', or 'W_enc', is missing"),
        ("a gate", lambda state: state.update(gate_bias=torch.zeros(256)), "'gate_bias' is unknown"),
        (
            "decoder.weight transposed",
            lambda state: state.update({"decoder.weight": state["decoder.weight"].T}),
            r"shape \[256, 32\]; it must be",
        ),
        ("infinity in b_dec", lambda state: state["b_dec"].fill_(torch.inf), "'b_dec' holds NaN or infinity"),
        ("float64", lambda state: state.update(b_dec=state["b_dec"].double()), "'b_dec' is torch.float64"),
        ("k of floating point", lambda state: state.update(k=torch.tensor(8.0)), "'k' is not one whole number"),
        ("k = 0 in the weights", lambda state: state.update(k=torch.tensor(0)), "'k' is 8; the weights say 0"),
    ],
)
def test_damaged_weights_are_refused(what: str, change: Callable[[Any], Any], reason: str, tmp_path: Path):
    folder = damage(written(tmp_path / "a"), change)
    assert re.search(reason, proof.refuse(NAME, what, folder, allow_pickle=True))


def test_groups_that_do_not_add_up_are_refused(tmp_path: Path):
    folder = damage(written(tmp_path / "a", "MatryoshkaBatchTopKSAE"), lambda state: state["group_sizes"].fill_(9))
    with pytest.raises(ModelError, match="'group_sizes' adds up to 18; there are 256"):
        formats.read(folder, TRUSTED)


def test_a_config_that_is_missing_or_another_librarys_is_refused(tmp_path: Path):
    folder = written(tmp_path / "a")
    (folder / "config.json").write_text('{"d_in": 3}')
    with pytest.raises(ModelError, match="holds no 'trainer'"):
        formats.read(folder, TRUSTED)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        formats.read(folder, TRUSTED)


MUTATIONS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "encoder": ("AutoEncoderTopK", lambda one: replace(one, W_enc=one.W_enc.flip(0))),
    "decoder": ("AutoEncoderTopK", lambda one: replace(one, W_dec=one.W_dec.T.reshape(one.W_dec.shape))),
    "latent bias": ("AutoEncoderTopK", lambda one: replace(one, b_enc=None)),
    "bias": ("AutoEncoderTopK", lambda one: replace(one, b_dec=one.b_dec * 0)),
    "normalised": ("AutoEncoderTopK", lambda one: replace(one, standardize=True)),
    "k": ("AutoEncoderTopK", lambda one: replace(one, k=one.k + 1)),
    "threshold": ("BatchTopKSAE", lambda one: replace(one, threshold=one.threshold * 1.5)),
    "threshold for k": ("BatchTopKSAE", lambda one: replace(one, threshold=None, k=proof.K)),
    "thresholds": ("JumpReluAutoEncoder", lambda one: replace(one, threshold=one.threshold.flip(0))),
    "bias subtracted": (
        "JumpReluAutoEncoder",
        lambda one: replace(one, b_enc=one.b_enc - one.W_enc @ one.b_dec),
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_an_import_with_one_field_wrong_is_noticed(mutation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kind, change = MUTATIONS[mutation]
    x = proof.random_vectors(proof.make_sae("none"))
    folder, real = written(tmp_path / "a", kind), dictionary_learning.read
    want = definition(folder, x[0])
    monkeypatch.setattr(dictionary_learning, "read", lambda place, given: change(real(place, given)))
    opened, rows = MLSAE.from_pretrained(folder, allow_pickle=True), len(proof.ROWS)
    with pytest.raises(AssertionError):
        proof.compare(NAME, "import", "random", proof.ours(opened, x[:1])[0], want)
    del proof.ROWS[rows:]


def test_a_standardised_input_is_not_written(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cannot standardise each vector.*saelens"):
        formats.write(proof.make_sae("vector").weights(), tmp_path / "out", NAME)
    assert not (tmp_path / "out").exists()
