"""SAELens' files: what its classes and ours make of the same vectors is the same, both ways."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import proof
from mlsae import formats
from mlsae.config import MLSAEConfig
from mlsae.errors import ConfigError, ModelError
from mlsae.formats import saelens
from mlsae.formats.weights import Given
from mlsae.sae import MLSAE

N_LATENTS, K, LAYERS = proof.N_LATENTS, proof.K, proof.LAYERS
PYTHON = proof.peer_python("saelens", "sae_lens")
peer = pytest.mark.skipif(PYTHON is None, reason="set MLSAE_PEER_SAELENS")
REAL = proof.real_vectors()
real = pytest.mark.skipif(REAL is None, reason="set MLSAE_REAL_RESID")


def definition(folder: Path, x: Tensor) -> proof.Answer:
    """What SAELens' classes make of `x [token, d_model]`."""
    cfg = json.loads((folder / "cfg.json").read_text())
    t = {name: tensor.float() for name, tensor in load_file(folder / "sae_weights.safetensors").items()}
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    standardised = cfg.get("normalize_activations") == "layer_norm"
    framed = (x - mean) / (std + 1e-5) if standardised else x
    subtracted = t["b_dec"] if cfg.get("apply_b_dec_to_input", True) else 0
    norms = t["W_dec"].norm(dim=1) if cfg.get("rescale_acts_by_decoder_norm") else 1
    pre_acts = ((framed - subtracted) @ t["W_enc"] + t["b_enc"]) * norms
    code = pre_acts.relu()
    if "threshold" in t:
        code = code * (pre_acts > t["threshold"])
    elif (k := cfg.get("k", cfg.get("activation_fn_kwargs", {}).get("k"))) is not None:
        top = code.topk(k)
        code = torch.zeros_like(code).scatter(-1, top.indices, top.values)
    recon = code / norms @ t["W_dec"] + t["b_dec"]
    return proof.Answer(code, recon * std + mean if standardised else recon, "definition")


# ---- SAEs of both ------------------------------------------------------------------------------------------------------

OURS: dict[str, dict[str, Any]] = {
    "vector": {"frame": "vector"},
    "none": {"frame": "none"},
    "layer": {"frame": "layer"},
    "groups": {"frame": "vector", "groups": 3, "n_latents": 3 * N_LATENTS},
    "lens": {"frame": "layer", "lens": "planted"},
    "bias": {"frame": "none", "latent_bias": True},
    "thresholds": {"frame": "vector", "latent_bias": True, "activation": "jumprelu", "k": N_LATENTS},
}


def our(name: str, **changes: Any) -> MLSAE:
    """One of OURS with nothing at its initial value."""
    return proof.make_sae(**{**OURS[name], **changes})


def vectors(sae: MLSAE) -> Tensor:
    """[layer, token, d_model], the same for every SAE."""
    torch.manual_seed(1)
    return proof.random_vectors(sae)


BASE = {"d_in": 32, "d_sae": N_LATENTS, "dtype": "float32", "device": "cpu", "reshape_activations": "none"}
METADATA = {"sae_lens_version": "6.20.0", "hook_name": "blocks.2.hook_resid_post", "model_name": "pythia-70m"}
NOW = {**BASE, "apply_b_dec_to_input": True, "normalize_activations": "none", "metadata": METADATA}
OLD = {
    **BASE,
    "hook_point": "blocks.3.hook_resid_pre",
    "hook_point_layer": 3,
    "model_name": "gpt2-small",
    "l1_coefficient": 4,
}
TOPK = {**NOW, "architecture": "topk", "k": K}
THEIRS: dict[str, dict[str, Any]] = {
    "topk": {**TOPK, "normalize_activations": "layer_norm", "rescale_acts_by_decoder_norm": False},
    "topk-rescaled": {**TOPK, "rescale_acts_by_decoder_norm": True},
    "topk-of-x": {**TOPK, "apply_b_dec_to_input": False},
    "topk-of-both": {**TOPK, "rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False},
    "bfloat16": {**TOPK, "dtype": "bfloat16"},
    "jumprelu": {**NOW, "architecture": "jumprelu", "normalize_activations": "layer_norm"},
    "jumprelu-of-x": {**NOW, "architecture": "jumprelu", "apply_b_dec_to_input": False},
    "standard": {**NOW, "architecture": "standard"},
    "old-standard": {**OLD, "activation_fn_str": "relu", "normalize_activations": False},
    "old-topk": {
        **OLD,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "normalize_activations": "layer_norm",
    },
    "old-jumprelu": {**OLD, "architecture": "jumprelu", "sae_lens_version": "5.3.1", "hook_point_head_index": None},
}
"""By name, the cfg.json of an SAE of theirs."""
WRITTEN = ("batchtopk", "jumprelu", "matryoshka", "standard", "topk", "topk-in-training", "topk-rescaled")
"""By name, those that the library itself writes in tests/formats/peers/saelens.py."""


def their(folder: Path, name: str = "topk", d_model: int = 32, **changes: Any) -> Path:
    """An SAE of THEIRS in a folder."""
    torch.manual_seed(2)
    config = {**THEIRS[name], "d_in": d_model, **changes}
    tensors = {
        "W_enc": torch.randn(d_model, N_LATENTS) / 5,
        "W_dec": torch.randn(N_LATENTS, d_model) / 5,
        "b_enc": torch.randn(N_LATENTS),
        "b_dec": torch.randn(d_model),
    }
    if config.get("architecture") == "jumprelu":
        tensors["threshold"] = torch.rand(N_LATENTS) * 3 - 0.5
    kind = torch.bfloat16 if config["dtype"] == "bfloat16" else torch.float32
    return save(folder, config, {name: tensor.to(kind) for name, tensor in tensors.items()})


def save(folder: Path, config: Any, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors")
    return folder


def opened(folder: Path, **given: Any) -> MLSAE:
    return MLSAE.from_weights(formats.read(folder, Given(**given)))


def ask(root: Path, x: Tensor, scratch: Path) -> tuple[dict[str, proof.Answer], dict[str, Any]]:
    """The library's answers for all of `x [layer, token, d_model]` by folder, and what it says beside; it adds WRITTEN."""
    assert PYTHON is not None
    whole = proof.ask_peer(PYTHON, "saelens", "write", root, x.flatten(0, 1), scratch)
    said = json.loads((scratch / "who.json").read_text())
    codes, recons = (tensor.chunk(len(said["names"])) for tensor in (whole.code, whole.recon))
    answers = zip(said["names"], codes, recons, strict=True)
    return {name: proof.Answer(code, recon, whole.who) for name, code, recon in answers}, said


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with ours, exported, and theirs."""
    root = tmp_path_factory.mktemp("saelens")
    for name in OURS:
        sae = our(name, lm="gpt2")
        vectors(sae)  # which changes it
        formats.write(sae.weights(), root / "ours" / name, "saelens")
    for name in THEIRS:
        their(root / "by-hand" / name, name)
    return root


@pytest.fixture(scope="module")
def asked(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, proof.Answer], dict[str, Any], Path]:
    """What the library answers for that tree, where it is asked."""
    scratch = tmp_path_factory.mktemp("answers")
    return *ask(root, vectors(our("none")), scratch), scratch / "again"


# ---- equal outputs -----------------------------------------------------------------------------------------------------


def exported(name: str) -> tuple[MLSAE, Tensor, list[proof.Answer]]:
    """One of OURS, vectors, and its own answer for each layer; codes of the layer's group of latents."""
    sae = our(name, lm="gpt2")
    x = vectors(sae)
    answers = [proof.of_group(sae, row, answer) for row, answer in enumerate(proof.ours(sae, x))]
    return sae, x, answers


@pytest.mark.parametrize("name", OURS)
def test_an_export_means_what_our_sae_does(name: str, root: Path):
    _, x, answers = exported(name)
    for row, (layer, answer) in enumerate(zip(LAYERS, answers, strict=True)):
        there = definition(root / "ours" / name / f"blocks.{layer}.hook_resid_post", x[row])
        proof.compare("saelens", "export", "random", answer, there)


@peer
@pytest.mark.parametrize("name", OURS)
def test_the_library_makes_of_an_export_what_our_sae_does(name: str, asked: Any):
    _, x, answers = exported(name)
    for row, (layer, answer) in enumerate(zip(LAYERS, answers, strict=True)):
        whole = asked[0][f"ours/{name}/blocks.{layer}.hook_resid_post"]
        code, recon = (tensor.chunk(len(x))[row] for tensor in (whole.code, whole.recon))
        proof.compare("saelens", "export", "random", answer, proof.Answer(code, recon, whole.who))


def everywhere(folder: Path, x: Tensor) -> proof.Answer:
    """What ours makes of all vectors with the SAE in a folder."""
    return proof.ours(opened(folder), x.flatten(0, 1)[None])[0]


@pytest.mark.parametrize("name", THEIRS)
def test_an_import_means_what_their_sae_does(name: str, root: Path):
    x = vectors(our("none"))
    folder = root / "by-hand" / name
    proof.compare("saelens", "import", "random", everywhere(folder, x), definition(folder, x.flatten(0, 1)))


@peer
@pytest.mark.parametrize("name", [*(f"by-hand/{name}" for name in THEIRS), *(f"theirs/{name}" for name in WRITTEN)])
def test_ours_makes_of_an_import_what_the_library_does(name: str, root: Path, asked: Any):
    got = everywhere(root / name, vectors(our("none")))
    proof.compare("saelens", "import", "random", got, asked[0][name])


@peer
def test_the_library_keeps_what_an_export_says(root: Path, asked: Any):
    _, said, again = asked
    for name in (name for name in said["names"] if name.startswith("ours")):
        metadata = said["metadata"][name]
        assert (metadata["hook_name"], metadata["model_name"]) == (Path(name).name, "gpt2")
        assert metadata["sae_lens_version"] == saelens.VERSION
    first = saelens.read(root / min(said["names"]), Given())
    saved = saelens.read(again, Given())
    assert first.same_as(saved)
    assert (first.layers, first.lm) == (saved.layers, saved.lm)


@real
def test_real_vectors_mean_the_same_to_both(tmp_path: Path):
    assert REAL is not None
    layers = tuple(range(len(REAL)))
    saes = {name: our(name, d_model=REAL.shape[-1], layers=layers) for name in ("vector", "none", "layer")}
    saes["layer"].frame.fit(REAL.mean(1), REAL.var(dim=(1, 2)))
    for name, sae in saes.items():
        formats.write(sae.weights(), tmp_path / "tree" / name, "saelens")
    foreign = [
        their(tmp_path / "tree" / "by-hand" / name, name, REAL.shape[-1]) for name in ("topk", "jumprelu", "standard")
    ]
    answers = {} if PYTHON is None else ask(tmp_path / "tree", REAL, tmp_path / "answer")[0]
    for name, sae in saes.items():
        for layer, answer in enumerate(proof.ours(sae, REAL)):
            folder = f"{name}/blocks.{layer}.hook_resid_post"
            proof.compare("saelens", "export", "real", answer, definition(tmp_path / "tree" / folder, REAL[layer]))
            if folder in answers:
                code, recon = (t.chunk(len(REAL))[layer] for t in (answers[folder].code, answers[folder].recon))
                proof.compare("saelens", "export", "real", answer, proof.Answer(code, recon, answers[folder].who))
    for folder in foreign + [tmp_path / "tree" / "theirs" / name for name in WRITTEN if answers]:
        got = everywhere(folder, REAL)
        proof.compare("saelens", "import", "real", got, definition(folder, REAL.flatten(0, 1)))
        if answers:
            proof.compare("saelens", "import", "real", got, answers[str(folder.relative_to(tmp_path / "tree"))])


# ---- nothing lost, nothing passed over ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vector", "none", "groups", "bias", "thresholds"])
def test_an_export_is_read_back_bit_by_bit(name: str, root: Path):
    sae, _, _ = exported(name)
    back = formats.read(root / "ours" / name)
    before = sae.weights()
    assert back.tensors.keys() == before.tensors.keys()
    assert all(torch.equal(tensor, back.tensors[key]) for key, tensor in before.tensors.items())
    for key in ("k", "layers", "frame", "groups", "n_latents", "activation", "latent_bias", "lm"):
        assert getattr(back.config, key) == getattr(before.config, key)


def closest(a: proof.Answer, b: proof.Answer) -> bool:
    pairs = ((a.code, b.code), (a.recon, b.recon))
    return all(bool((x - y).abs().max() <= 1e-5 * y.abs().max()) for x, y in pairs)


MUTATIONS: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], object]] = {
    "W_enc transposed": lambda _, t: t.update(W_enc=t["W_enc"].T),
    "W_dec transposed": lambda _, t: t.update(W_dec=t["W_dec"].T),
    "W_enc negated": lambda _, t: t["W_enc"].neg_(),
    "W_dec's rows of unit norm": lambda _, t: t.update(W_dec=torch.nn.functional.normalize(t["W_dec"])),
    "b_dec dropped": lambda _, t: t["b_dec"].zero_(),
    "b_enc dropped": lambda _, t: t["b_enc"].zero_(),
    "thresholds dropped": lambda _, t: t["threshold"].zero_(),
    "k and one": lambda c, _: c.update(k=c["k"] + 1),
    "no k": lambda c, _: c.pop("k"),
    "normalisation swapped": lambda c, _: c.update(
        normalize_activations="none" if c["normalize_activations"] == "layer_norm" else "layer_norm"
    ),
    "b_dec not subtracted": lambda c, _: c.update(apply_b_dec_to_input=False),
    "activations rescaled": lambda c, _: c.update(rescale_acts_by_decoder_norm=True),
    "another architecture": lambda c, _: c.update(architecture="standard"),
}


HAVE = [
    (name, mutation)
    for name in ("topk", "jumprelu")
    for mutation in MUTATIONS
    if {"thresholds dropped": "jumprelu", "k and one": "topk", "no k": "topk"}.get(mutation, name) == name
]


@pytest.mark.parametrize(("name", "mutation"), HAVE)
def test_no_mutation_of_a_file_passes_unseen(name: str, mutation: str, tmp_path: Path):
    """The reader refuses it, or it means something else to both, and then the same."""
    x = vectors(our("none"))
    whole = everywhere(their(tmp_path / "whole", name), x)
    config = json.loads((tmp_path / "whole" / "cfg.json").read_text())
    tensors = load_file(tmp_path / "whole" / "sae_weights.safetensors")
    MUTATIONS[mutation](config, tensors)
    folder = save(tmp_path / "mutated", config, tensors)
    try:
        got = everywhere(folder, x)
    except ModelError:
        return
    assert not closest(whole, got)
    assert closest(got, definition(folder, x.flatten(0, 1)))


# ---- which vectors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ({"hook_name": "blocks.7.hook_resid_post"}, 7),
        ({"hook_name": "blocks.7.hook_resid_pre"}, 6),
        ({"hook_name": "model.layers.7", "model_class_name": "AutoModelForCausalLM"}, 7),
        ({"hook_name": "transformer.h.7", "model_class_name": "AutoModelForCausalLM"}, 7),
        ({}, None),
    ],
)
def test_the_hook_says_the_layer(hook: dict[str, str], layer: int | None, tmp_path: Path):
    their(tmp_path, metadata={"sae_lens_version": "6.0.0", **hook})
    assert opened(tmp_path).config.layers == (None if layer is None else (layer,))


@pytest.mark.parametrize(
    "hook", ["blocks.2.hook_mlp_out", "blocks.0.hook_resid_pre", "blocks.2.attn.hook_z", "model.layers.2"]
)
def test_another_place_is_refused_unless_layers_are_given(hook: str, tmp_path: Path):
    their(tmp_path, metadata={**METADATA, "hook_name": hook})
    with pytest.raises(ModelError, match="another place than the residual stream"):
        formats.read(tmp_path)
    assert opened(tmp_path, layers=(2,)).config.layers == (2,)


def test_the_language_model_is_named_as_on_the_hub_unless_it_is_given(tmp_path: Path):
    assert opened(their(tmp_path / "now")).config.lm == "EleutherAI/pythia-70m"
    assert opened(their(tmp_path / "old", "old-topk")).config.lm == "gpt2"
    assert opened(tmp_path / "old", lm="openai-community/gpt2").config.lm == "openai-community/gpt2"


def test_a_file_without_a_version_keeps_its_metadata(tmp_path: Path):
    """The library would forget the hook's name."""
    their(tmp_path, metadata={"hook_name": "blocks.4.hook_resid_post"})
    assert opened(tmp_path).config.layers == (4,)


# ---- trees -------------------------------------------------------------------------------------------------------------


def release(folder: Path, layers: tuple[int, ...], **changes: Any) -> Path:
    """A tree with an SAE of its own for every layer, in the flat files before 6."""
    for layer in layers:
        hook = f"blocks.{layer}.hook_resid_post"
        place = their(folder / hook, "old-standard", hook_point=hook, hook_point_layer=layer, **changes)
        tensors = load_file(place / "sae_weights.safetensors")
        save_file({name: tensor + layer for name, tensor in tensors.items()}, place / "sae_weights.safetensors")
        save_file({"sparsity": torch.zeros(N_LATENTS)}, place / "sparsity.safetensors")
    return folder


def test_a_release_is_read_whole_or_one_folder_of_it(tmp_path: Path):
    layers = (0, 2, 10)
    tree = opened(release(tmp_path, layers))
    assert (tree.config.layers, tree.config.groups) == (layers, 3)
    x = torch.randn(3, 20, 32)
    for row, (layer, answer) in enumerate(zip(layers, proof.ours(tree, x), strict=True)):
        alone = opened(tmp_path / f"blocks.{layer}.hook_resid_post")
        assert alone.config.layers == (layer,)
        (there,) = proof.ours(alone, x[row : row + 1])
        assert closest(proof.Answer(answer.code[:, row * N_LATENTS : (row + 1) * N_LATENTS], answer.recon, ""), there)


def test_a_release_one_of_whose_saes_has_no_bias_is_read_whole(tmp_path: Path):
    release(tmp_path, (0, 1))
    place = tmp_path / "blocks.1.hook_resid_post" / "sae_weights.safetensors"
    tensors = load_file(place)
    save_file({**tensors, "b_enc": torch.zeros(N_LATENTS)}, place)
    x = torch.randn(2, 20, 32)
    for row, answer in enumerate(proof.ours(opened(tmp_path), x)):
        there = definition(tmp_path / f"blocks.{row}.hook_resid_post", x[row])
        assert closest(proof.Answer(answer.code[:, row * N_LATENTS : (row + 1) * N_LATENTS], answer.recon, ""), there)


def test_a_tree_with_an_sae_of_another_place_names_its_folder(tmp_path: Path):
    release(tmp_path, (0, 1))
    their(tmp_path / "blocks.1.hook_mlp_out", "old-standard", hook_point="blocks.1.hook_mlp_out", hook_point_layer=1)
    with pytest.raises(ModelError, match=r"blocks\.1\.hook_mlp_out.*another place"):
        formats.read(tmp_path)


def test_a_tree_with_two_saes_of_a_layer_is_refused(tmp_path: Path):
    release(tmp_path / "a", (0, 1))
    release(tmp_path / "b", (1,))
    with pytest.raises((ModelError, ConfigError), match="layers"):
        formats.read(tmp_path)


# ---- what is refused ---------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("topk", {"architecture": "gated"}, r"cfg.json: architecture 'gated' has no twin"),
    ("topk", {"architecture": "abstopk"}, "'abstopk' has no twin"),
    ("topk", {"architecture": "transcoder"}, "'transcoder' has no twin"),
    ("topk", {"architecture": "batchtopk"}, "save_inference_model"),
    ("topk", {"architecture": None}, "'architecture' is missing"),
    ("topk", {"architecture": ["topk"]}, "has no twin"),
    ("topk", {"normalize_activations": "expected_average_only_in"}, "factor is not in the file"),
    ("old-topk", {"normalize_activations": True}, "factor is not in the file"),
    ("topk", {"normalize_activations": "constant_norm_rescale"}, "no frame of an MLSAE"),
    ("topk", {"normalize_activations": "covariance_whitening"}, "matrix is not in the file"),
    ("topk", {"normalize_activations": 0}, "normalize_activations is 0: unknown"),
    ("topk", {"reshape_activations": "hook_z"}, "heads of attention"),
    ("old-standard", {"finetuning_scaling_factor": True}, "factors of their own"),
    ("old-standard", {"hook_point_head_index": 0}, "a head of attention"),
    ("jumprelu", {"rescale_acts_by_decoder_norm": True}, "has no such thing"),
    ("standard", {"k": K}, "'k' is 8: architecture standard has no such thing"),
    ("old-standard", {"activation_fn_str": "tanh-relu"}, "'tanh-relu' in architecture 'standard'"),
    ("old-topk", {"architecture": "gated"}, "'topk' in architecture 'gated'"),
    ("old-topk", {"k": K + 1}, "'k' is 9 and 8; one of them is wrong"),
    ("old-topk", {"activation_fn_kwargs": {}}, "'k' is missing"),
    ("topk", {"k": N_LATENTS + 1}, "whole number from 1 to 256"),
    ("topk", {"k": 8.0}, "whole number"),
    ("topk", {"d_sae": True}, "whole number"),
    ("topk", {"d_sae": 2 * N_LATENTS}, r"'W_enc' has shape \[32, 256\]; it must be \[32, 512\]"),
    ("topk", {"apply_b_dec_to_input": "no"}, "true or false"),
    ("topk", {"temperature": 2}, "'temperature' is unknown"),
    ("topk", {"metadata": []}, "'metadata' holds no mapping"),
    ("topk", {"metadata": {**METADATA, "sae_lens_version": 6}}, "must look like"),
    ("topk", {"hook_name": "blocks.1.hook_resid_post"}, "'hook_name' is .*one of them is wrong"),
    ("old-topk", {"hook_name": "blocks.1.hook_resid_post"}, "'hook_name' is .*one of them is wrong"),
    ("old-topk", {"hook_point_layer": 2}, "hook_layer 2; one of them is wrong"),
    ("old-topk", {"model_from_pretrained_kwargs": {"center_writing_weights": True}}, "vectors without their mean"),
    ("topk", {"model_name": 7, "metadata": {**METADATA, "model_name": 7}}, "must be a text"),
]


@pytest.mark.parametrize(("name", "changes", "reason"), REFUSED)
def test_what_ours_cannot_equal_is_refused_with_its_reason(
    name: str, changes: dict[str, Any], reason: str, tmp_path: Path
):
    what = ", ".join(f"{key} = {value!r}" for key, value in changes.items())
    sentence = proof.refuse("saelens", f"{name}: {what}", their(tmp_path / "sae", name, **changes))
    assert re.search(reason, sentence)


def test_layers_that_contradict_the_file_are_refused(tmp_path: Path):
    with pytest.raises(ModelError, match="reads layer 2; layers 3 are given"):
        formats.read(their(tmp_path), Given(layers=(3,)))


@pytest.mark.parametrize(
    ("what", "change", "reason"),
    [
        ("no b_enc", lambda t: t.pop("b_enc"), "'b_enc' is missing"),
        ("scaling_factor", lambda t: t.update(scaling_factor=torch.ones(N_LATENTS)), "'scaling_factor' is unknown"),
        ("thresholds of a TopK SAE", lambda t: t.update(threshold=torch.ones(N_LATENTS)), "'threshold' is unknown"),
        ("whole numbers", lambda t: t.update(b_dec=torch.zeros(32, dtype=torch.int64)), "'b_dec' is torch.int64"),
        ("NaN in W_dec", lambda t: t["W_dec"][3].fill_(torch.nan), "'W_dec' holds NaN"),
        ("W_enc transposed", lambda t: t.update(W_enc=t["W_enc"].T), "'W_enc' has shape"),
    ],
)
def test_damaged_weights_are_refused_with_their_reason(
    what: str, change: Callable[..., object], reason: str, tmp_path: Path
):
    path = their(tmp_path / "sae") / "sae_weights.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    assert reason in proof.refuse("saelens", what, path.parent)


def test_damaged_files_are_refused_with_their_reason(tmp_path: Path):
    folder = their(tmp_path / "sae")
    weights, config = folder / "sae_weights.safetensors", folder / "cfg.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    assert "not a readable safetensors file" in proof.refuse("saelens", "weights cut short", folder)
    weights.write_bytes(b"")
    assert "not a safetensors file" in proof.refuse("saelens", "weights empty", folder)
    weights.write_bytes(whole)
    config.write_text(config.read_text()[:-5])
    assert "not JSON" in proof.refuse("saelens", "cfg.json cut short", folder)


def test_a_row_of_zeros_cannot_be_rescaled(tmp_path: Path):
    path = their(tmp_path, "topk-rescaled") / "sae_weights.safetensors"
    tensors = load_file(path)
    tensors["W_dec"][5] = 0
    save_file(tensors, path)
    with pytest.raises(ModelError, match="a row of W_dec is zero"):
        formats.read(tmp_path)


def test_an_sae_with_no_exact_twin_is_not_written(tmp_path: Path):
    with pytest.raises(ConfigError, match="lens"):
        formats.write(our("lens", frame="vector").weights(), tmp_path / "lens", "saelens")
    unknown = MLSAE(MLSAEConfig(d_model=8, n_latents=16, k=2, layers=None, frame="none"))
    with pytest.raises(ConfigError, match="layers"):
        formats.write(unknown.weights(), tmp_path / "unknown", "saelens")
    assert list(tmp_path.iterdir()) == []
