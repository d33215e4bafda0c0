"""sparsify: its SAEs open here and ours there, with equal outputs; what has no twin is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import proof
from mlsae import MLSAE, formats
from mlsae.errors import ConfigError, ModelError
from mlsae.formats import Given, sparsify

NAME = "sparsify"
PEER = proof.peer_python(NAME, NAME)
KINDS: dict[str, dict[str, Any]] = {
    "none": {"frame": "none"},
    "layer": {"frame": "layer"},
    "grouped": {"frame": "layer", "n_latents": 3 * proof.N_LATENTS, "groups": 3},
    "lens": {"frame": "layer", "lens": "somewhere"},
    "bias": {"frame": "none", "latent_bias": True},
}


def definition(folder: Path, x: Tensor) -> proof.Answer:
    """What sparsify computes: x - b_dec, rectify, the k largest; no normalisation."""
    cfg, tensors = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae.safetensors")
    assert (cfg["activation"], cfg["transcode"], cfg["skip_connection"]) == ("topk", False, False)
    pre_acts = ((x - tensors["b_dec"]) @ tensors["encoder.weight"].T + tensors["encoder.bias"]).relu()
    values, indices = pre_acts.topk(cfg["k"], dim=-1)
    code = torch.zeros_like(pre_acts).scatter_(-1, indices, values)
    return proof.Answer(code, code @ tensors["W_dec"] + tensors["b_dec"], "definition")


def make(kind: str, **changes) -> MLSAE:
    return proof.make_sae(**(KINDS[kind] | changes))


def written(folder: Path, d_model: int = proof.D_MODEL, **changes) -> Path:
    """A folder as sparsify writes one, with `changes` to its config; in bfloat16 if those say so."""
    torch.manual_seed(3)
    n = proof.N_LATENTS
    dtype = changes.pop("dtype", torch.float32)
    tensors = {"encoder.weight": torch.randn(n, d_model), "encoder.bias": torch.randn(n)}
    tensors |= {"W_dec": torch.randn(n, d_model), "b_dec": torch.randn(d_model)}
    cfg = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": n, "k": proof.K}
    cfg |= {"multi_topk": False, "skip_connection": False, "transcode": False, "d_in": d_model} | changes
    folder.mkdir(parents=True)
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({key: value for key, value in cfg.items() if value is not ...}))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_equals_ours_in_every_layer(kind: str, tmp_path: Path):
    for name, sae, x in proof.inputs(make(kind)):
        folders = formats.write(sae.weights(), tmp_path / name, NAME)
        assert [folder.name for folder in folders] == [f"layers.{layer}" for layer in sae.layers]
        answers = [proof.of_group(sae, row, answer) for row, answer in enumerate(proof.ours(sae, x))]
        for folder, answer, vectors in zip(folders, answers, x, strict=True):
            proof.compare(NAME, "export", name, answer, definition(folder, vectors))
        if PEER is not None:
            theirs = proof.ask_peer(PEER, NAME, "read", folders[1], x[1], tmp_path / "peer")
            proof.compare(NAME, "export", name, answers[1], theirs)


def test_what_sparsify_writes_opens_with_equal_outputs(tmp_path: Path):
    for name, _, x in proof.inputs(make("none")):
        folder = written(tmp_path / name / "gpt_neox.layers.1", x.shape[2])
        opened = MLSAE.from_pretrained(folder)
        assert opened.layers == (1,)
        assert opened.config.latent_bias
        proof.compare(NAME, "import", name, proof.ours(opened, x[1:2])[0], definition(folder, x[1]))
        if PEER is not None:
            folder = tmp_path / name / "peer" / "layers.2"
            theirs = proof.ask_peer(PEER, NAME, "write", folder, x[1], tmp_path / name)
            proof.compare(NAME, "import", name, proof.ours(MLSAE.from_pretrained(folder), x[1:2])[0], theirs)


@pytest.mark.parametrize("kind", ["none", "bias"])
def test_an_sae_comes_back_bit_for_bit(kind: str, tmp_path: Path):
    sae = make(kind)
    formats.write(sae.weights(), tmp_path / "out", NAME)
    back = formats.read(tmp_path / "out")
    assert formats.detect(tmp_path / "out") == NAME
    assert (back.config.layers, back.config.k, back.config.groups) == (sae.layers, proof.K, 1)
    assert back.tensors.keys() == sae.weights().tensors.keys()
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in sae.weights().tensors.items())


def test_layers_that_differ_come_back_as_groups(tmp_path: Path):
    sae = make("grouped", frame="none")
    formats.write(sae.weights(), tmp_path / "out", NAME)
    back = formats.read(tmp_path / "out")
    assert back.config.groups == 3
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in sae.weights().tensors.items())


def test_half_precision_is_read_as_it_is(tmp_path: Path):
    half = written(tmp_path / "layers.0", dtype=torch.bfloat16)
    want = load_file(half / "sae.safetensors")["W_dec"]
    got = formats.read(half).tensors["W_dec"]
    assert got.dtype == torch.float32
    assert torch.equal(got.bfloat16(), want)


@pytest.mark.parametrize(
    ("folder", "layers"),
    [("layers.5", (5,)), ("transformer.h.0", (0,)), ("layers.7/seed1", (7,)), ("mine", None), ("v1.2", None)],
)
def test_a_folder_named_by_a_block_says_the_layer(folder: str, layers: tuple[int, ...] | None, tmp_path: Path):
    assert formats.read(written(tmp_path / folder)).config.layers == layers


def test_layers_given_fill_in_and_do_not_contradict(tmp_path: Path):
    plain, part = written(tmp_path / "mine"), written(tmp_path / "layers.3.mlp")
    assert formats.read(plain, Given(layers=(2, 4))).config.layers == (2, 4)
    assert formats.read(part, Given(layers=(3,))).config.layers == (3,)
    with pytest.raises(ModelError, match=r"layers\.3\.mlp.*another place than the residual stream"):
        formats.read(part)
    with pytest.raises(ModelError, match="reads layer 5; layers 4 are given"):
        formats.read(written(tmp_path / "layers.5"), Given(layers=(4,)))


def test_the_config_of_the_run_names_the_language_model(tmp_path: Path):
    folder = written(tmp_path / "layers.5")
    assert formats.read(folder).config.lm is None
    (tmp_path / "config.json").write_text(json.dumps({"sae": {}, "model": "gpt2"}))
    assert formats.read(folder).config.lm == "gpt2"
    assert formats.read(folder, Given(lm="mine")).config.lm == "mine"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"activation": "groupmax"}, "'activation' is 'groupmax'; only 'topk'"),
        ({"transcode": True}, "'transcode' is True"),
        ({"skip_connection": True}, "'skip_connection' is True"),
        ({"signed": True}, "'signed' is True"),
        ({"temperature": 2}, "'temperature' is unknown"),
        ({"k": 257}, "'k' is 257; it must be a whole number from 1 to 256"),
        ({"k": True}, "'k' is True"),
        ({"k": ...}, "'k' is missing"),
        ({"d_in": 31}, r"shape \[256, 32\]; it must be \[256, 31\]"),
        ({"num_latents": 0, "expansion_factor": 16}, r"shape \[256, 32\]; it must be \[512, 32\]"),
        ({"num_latents": -1}, "'num_latents' is -1"),
        ({"dtype": torch.float64}, "is torch.float64; it must be one of"),
    ],
)
def test_a_config_without_a_twin_is_refused(changes: dict[str, Any], reason: str, tmp_path: Path):
    what = ", ".join(f"{key} missing" if value is ... else f"{key} = {value!r}" for key, value in changes.items())
    assert re.search(reason, proof.refuse(NAME, what, written(tmp_path / "layers.0", **changes)))


def test_no_latents_named_means_the_expansion_factor(tmp_path: Path):
    folder = written(tmp_path / "layers.0", num_latents=0, expansion_factor=8, multi_topk=True, activation=...)
    assert formats.read(folder).config.n_latents == 256


@pytest.mark.parametrize(
    ("what", "name", "tensor", "reason"),
    [
        ("no encoder.bias", "encoder.bias", None, "'encoder.bias' is missing"),
        ("no W_dec", "W_dec", None, "'W_dec' is missing"),
        ("W_dec transposed", "W_dec", torch.zeros(32, 256), r"'W_dec' has shape \[32, 256\]"),
        ("a skip connection all the same", "W_skip", torch.zeros(32, 32), "'W_skip' is unknown"),
        ("NaN in b_dec", "b_dec", torch.full((32,), torch.nan), "'b_dec' holds NaN"),
        ("whole numbers", "b_dec", torch.zeros(32, dtype=torch.int64), "'b_dec' is torch.int64"),
    ],
)
def test_damaged_weights_are_refused(what: str, name: str, tensor: Tensor | None, reason: str, tmp_path: Path):
    folder = written(tmp_path / "layers.0")
    tensors = {key: value for key, value in load_file(folder / "sae.safetensors").items() if key != name}
    save_file(tensors | ({} if tensor is None else {name: tensor}), folder / "sae.safetensors")
    assert re.search(reason, proof.refuse(NAME, what, folder))


def test_a_file_cut_short_is_refused(tmp_path: Path):
    folder = written(tmp_path / "layers.0")
    data = (folder / "sae.safetensors").read_bytes()
    (folder / "sae.safetensors").write_bytes(data[: len(data) // 2])
    assert "sae.safetensors: not a readable" in proof.refuse(NAME, "weights cut short", folder)
    (folder / "cfg.json").write_text("[]")
    with pytest.raises(ModelError, match="holds no mapping"):
        formats.read(folder)


MUTATIONS = {
    "encoder": lambda one: replace(one, W_enc=one.W_enc.flip(0)),
    "decoder transposed": lambda one: replace(one, W_dec=one.W_dec.T.reshape(one.W_dec.shape)),
    "decoder": lambda one: replace(one, W_dec=one.W_dec.flip(1)),
    "latent bias": lambda one: replace(one, b_enc=None),
    "bias": lambda one: replace(one, b_dec=one.b_dec * 0),
    "normalised": lambda one: replace(one, standardize=True),
    "k": lambda one: replace(one, k=one.k + 1),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_an_import_with_one_field_wrong_is_noticed(mutation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    x = proof.random_vectors(make("none"))
    folder = written(tmp_path / "layers.0")
    want = definition(folder, x[0])
    real = sparsify.read
    monkeypatch.setattr(sparsify, "read", lambda place, given: MUTATIONS[mutation](real(place, given)))
    rows = len(proof.ROWS)
    with pytest.raises(AssertionError):
        proof.compare(NAME, "import", "random", proof.ours(MLSAE.from_pretrained(folder), x[:1])[0], want)
    del proof.ROWS[rows:]


def test_what_sparsify_cannot_say_is_not_written(tmp_path: Path):
    for sae in (proof.make_sae("vector"), proof.make_sae("none", activation="jumprelu")):
        with pytest.raises(ConfigError, match="saelens"):
            formats.write(sae.weights(), tmp_path / "out", NAME)
    assert not (tmp_path / "out").exists()
