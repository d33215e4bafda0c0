"""The published MLSAE's files: what its class and ours make of the same vectors is the same, both ways."""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import proof
from mlsae import formats
from mlsae.errors import ConfigError, ModelError
from mlsae.sae import MLSAE

N_LATENTS, K = proof.N_LATENTS, proof.K
ALONE = "mlsae-pythia-70m-deduped-x8-k8"
PYTHON = proof.peer_python("lawson2024", "no_package_of_that_name")
peer = pytest.mark.skipif(PYTHON is None, reason="set MLSAE_PEER_LAWSON2024 and MLSAE_PEER_LAWSON2024_PATH")
real = pytest.mark.skipif("MLSAE_REAL_RESID" not in os.environ, reason="set MLSAE_REAL_RESID")


def definition(folder: Path, x: Tensor) -> proof.Answer:
    """What the published class makes of `x [layer, token, d_model]`; behind its lens, if the file holds one."""
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    W_enc, W_dec, bias = (
        next(tensor for full, tensor in tensors.items() if full.removeprefix("autoencoder.") == name)
        for name in ("encoder.weight", "decoder.weight", "pre_encoder_bias")
    )
    if config.get("tuned_lens"):
        lens = "lens.layer_translators"
        x = torch.stack(
            [v + v @ tensors[f"{lens}.{i}.weight"].T + tensors[f"{lens}.{i}.bias"] for i, v in enumerate(x)]
        )
    mean, std = (x.mean(-1, keepdim=True), x.std(-1, keepdim=True)) if config["standardize"] else (0.0, None)
    framed = x if std is None else (x - mean) / (std + 1e-5)
    top = ((framed - bias) @ W_enc.T).topk(config["k"], -1)
    code = torch.zeros(*x.shape[:-1], len(W_enc)).scatter_(-1, top.indices, top.values.relu())
    recon = code @ W_dec.T + bias
    return proof.Answer(code, recon if std is None else recon * std + mean, "definition")


def behind_lens(sae: MLSAE, x: Tensor) -> proof.Answer:
    """Ours; the published class's reconstruction is of what its lens, if there is one, shows."""
    with torch.no_grad():
        code = sae.encode(x)
        return proof.Answer(code.to_dense(), sae.decode_lensed(code), "mlsae")


def save(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def alone(folder: Path, d_model: int = 32, **changes: Any) -> Path:
    """An autoencoder as the published class saves it."""
    torch.manual_seed(2)
    config = {"auxk": 256, "dead_steps_threshold": 76, "dead_threshold": 0.001, "k": K, "standardize": True}
    tensors = {
        "encoder.weight": torch.randn(N_LATENTS, d_model) / 5,
        "decoder.weight": torch.randn(d_model, N_LATENTS) / 5,
        "pre_encoder_bias": torch.randn(d_model),
    }
    return save(folder, {**config, "n_inputs": d_model, "n_latents": N_LATENTS, **changes}, tensors)


def with_lm(folder: Path, lens: bool = True, n_layers: int = 3, **changes: Any) -> Path:
    """The same with what stands for a language model, and a tuned lens."""
    inner = load_file(alone(folder) / "model.safetensors")
    tensors = {f"autoencoder.{name}": tensor for name, tensor in inner.items()}
    for i in range(n_layers):
        tensors[f"transformer.model.gpt_neox.layers.{i}.mlp.dense_h_to_4h.bias"] = torch.zeros(8)
        if lens:
            tensors[f"lens.layer_translators.{i}.weight"] = torch.randn(32, 32) / 20
            tensors[f"lens.layer_translators.{i}.bias"] = torch.randn(32)
            tensors["lens.unembed.final_norm.bias"] = torch.zeros(32)
    config: dict[str, Any] = {"model_name": "EleutherAI/pythia-70m-deduped", "layers": None, "expansion_factor": 8}
    config |= {
        "k": K,
        "auxk": 256,
        "auxk_coef": 0.03125,
        "dead_tokens_threshold": 10**7,
        "lr": 1e-4,
        "max_length": 2048,
    }
    config |= {"dead_steps_threshold": None, "dead_threshold": 0.001, "standardize": True, "skip_special_tokens": True}
    config |= {"batch_size": 1, "accumulate_grad_batches": 64, "tuned_lens": lens}
    return save(folder, config | changes, tensors)


def change(folder: Path, config: dict[str, Any] | None = None, **tensors: Tensor | None) -> Path:
    """Change keys of a config, and tensors by their names with _ for dots; None removes."""
    found = load_file(folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text()) | (config or {})
    names = {name.replace(".", "_"): name for name in found}
    for name, tensor in tensors.items():
        if tensor is None:
            del found[names[name]]
        else:
            found[names.get(name, name if "." in name else name.replace("_", ".", 1))] = tensor
    return save(folder, {key: value for key, value in values.items() if value != "gone"}, found)


def vectors(n_layers: int = 3, d_model: int = 32) -> Tensor:
    return torch.cat([7 * torch.randn(n_layers, 50, d_model) + 3, torch.zeros(n_layers, 1, d_model)], 1)


# ---- equal outputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", ["vector", "none"])
def test_what_is_written_means_the_same_there(tmp_path: Path, frame: str):
    sae = proof.make_sae(frame)
    x = proof.random_vectors(sae)
    assert formats.write(sae.weights(), tmp_path / "sae", "lawson2024") == [tmp_path / "sae"]
    proof.compare("lawson2024", "export", "random", behind_lens(sae, x), definition(tmp_path / "sae", x))


@pytest.mark.parametrize("standardize", [True, False])
def test_what_is_read_means_the_same_here(tmp_path: Path, standardize: bool):
    x = vectors()
    found = MLSAE.from_pretrained(alone(tmp_path, standardize=standardize), lm="tiny", layers=(0, 1, 3))
    assert (found.layers, found.config.lm, found.config.recipe) == ((0, 1, 3), "tiny", "lawson2024")
    assert (found.config.special_tokens, found.config.mask_first_position) == ("zero", False)
    proof.compare("lawson2024", "import", "random", behind_lens(found, x), definition(tmp_path, x))


@pytest.mark.parametrize("lens", [True, False])
def test_with_a_language_model_the_lens_stands_before_the_outputs_it_was_put_before(tmp_path: Path, lens: bool):
    x = vectors()
    found = MLSAE.from_pretrained(with_lm(tmp_path, lens))
    assert (found.layers, found.config.lm) == ((0, 1, 2), "EleutherAI/pythia-70m-deduped")
    assert found.config.lens == ("lawson2024" if lens else None)
    proof.compare("lawson2024", "import", "random", behind_lens(found, x), definition(tmp_path, x))
    if lens:  # and the way back is an inverse
        torch.testing.assert_close(
            found.lensed(found.decode(found.encode(x))), definition(tmp_path, x).recon, atol=1e-3, rtol=1e-4
        )


@peer
@pytest.mark.parametrize("frame", ["vector", "none"])
def test_the_published_class_reads_what_is_written(tmp_path: Path, frame: str):
    sae = proof.make_sae(frame)
    x = proof.random_vectors(sae)
    formats.write(sae.weights(), tmp_path / "sae", "lawson2024")
    answer = proof.ask_peer(str(PYTHON), "lawson2024", "read", tmp_path / "sae", x, tmp_path)
    proof.compare("lawson2024", "export", "random", behind_lens(sae, x), answer)


@peer
@pytest.mark.parametrize("action", ["write", "write-none", "write-tfm", "write-tfm-lens"])
def test_what_the_published_class_writes_is_read(tmp_path: Path, action: str):
    x = vectors()
    answer = proof.ask_peer(str(PYTHON), "lawson2024", action, tmp_path / "sae", x, tmp_path)
    found = MLSAE.from_pretrained(tmp_path / "sae", layers=(0, 1, 2))
    assert (found.config.frame, found.lens is None) == ("none" if "none" in action else "vector", "lens" not in action)
    proof.compare("lawson2024", "import", "random", behind_lens(found, x), answer)
    proof.compare("lawson2024", "import", "random", definition(tmp_path / "sae", x), answer)


@peer
@real
def test_both_ways_are_exact_on_real_vectors(tmp_path: Path):
    x = proof.real_vectors()
    assert x is not None
    answer = proof.ask_peer(str(PYTHON), "lawson2024", "write-tfm-lens", tmp_path / "theirs" / "sae", x, tmp_path)
    found = MLSAE.from_pretrained(tmp_path / "theirs" / "sae")
    proof.compare("lawson2024", "import", "real", behind_lens(found, x), answer)
    sae = proof.make_sae("vector", d_model=x.shape[-1], layers=tuple(range(len(x))))
    formats.write(sae.weights(), tmp_path / "ours", "lawson2024")
    answer = proof.ask_peer(str(PYTHON), "lawson2024", "read", tmp_path / "ours", x, tmp_path)
    proof.compare("lawson2024", "export", "real", behind_lens(sae, x), answer)


# ---- round trips, and bytes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", ["vector", "none"])
def test_what_is_written_is_read_bit_for_bit(tmp_path: Path, frame: str):
    sae = proof.make_sae(frame, lm="EleutherAI/pythia-70m-deduped")
    formats.write(sae.weights(), tmp_path / ALONE, "lawson2024")
    found = MLSAE.from_pretrained(tmp_path / ALONE, layers=proof.LAYERS)
    assert (found.config.frame, found.config.k, found.layers) == (frame, K, proof.LAYERS)
    assert found.config.lm == sae.config.lm  # told by the name of the folder
    for name, tensor in sae.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


@pytest.mark.parametrize("standardize", [True, False])
def test_what_is_read_is_written_byte_for_byte(tmp_path: Path, standardize: bool):
    alone(tmp_path / "theirs", standardize=standardize)
    formats.write(formats.read(tmp_path / "theirs"), tmp_path / "ours", "lawson2024")
    for file in ("config.json", "model.safetensors"):
        theirs, ours = (tmp_path / name / file for name in ("theirs", "ours"))
        if file == "config.json":
            assert json.loads(ours.read_text()) == json.loads(theirs.read_text())
        else:
            assert ours.read_bytes() == theirs.read_bytes()


def test_a_written_config_has_as_many_bytes_as_the_published_one(tmp_path: Path):
    """tim-lawson/mlsae-pythia-70m-deduped-x8-k32: 148 bytes."""
    sae = proof.make_sae(d_model=512, n_latents=4096, k=32)
    formats.write(sae.weights(), tmp_path, "lawson2024")
    assert (tmp_path / "config.json").stat().st_size == 148
    assert (tmp_path / "model.safetensors").stat().st_size == 4 * (2 * 4096 * 512 + 512) + 264


def test_the_card_says_what_the_config_cannot(tmp_path: Path):
    sae = proof.make_sae(lm="a/b", mask_norm_factor=None)
    formats.write(sae.weights(), tmp_path, "lawson2024")
    lines = (tmp_path / "README.md").read_text().splitlines()[-3:]
    assert [line.partition(": ")[2] for line in lines] == ["a/b", "0, 1, 3", "special tokens, first positions"]


# ---- what would not be equal ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "kw"),
    [
        ("frame", {"frame": "layer"}),
        ("lens", {"lens": "somewhere"}),
        ("groups", {"groups": 2, "n_latents": 2 * N_LATENTS}),
        ("activation", {"activation": "jumprelu"}),
        ("latent_bias", {"latent_bias": True}),
    ],
)
def test_what_has_no_twin_is_not_written(tmp_path: Path, field: str, kw: dict[str, Any]):
    sae = proof.make_sae(**{"frame": "vector", **kw})
    with pytest.raises(ConfigError, match=field) as caught:
        formats.write(sae.weights(), tmp_path / "sae", "lawson2024")
    assert caught.value.field == field
    assert "write" in caught.value.problem
    assert not (tmp_path / "sae").exists()


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path):
    sae = proof.make_sae()
    sae.W_dec.data[3, 4] = torch.nan
    with pytest.raises(ModelError, match=r"W_dec.*NaN"):
        formats.write(sae.weights(), tmp_path / "sae", "lawson2024")


MUTATIONS = {
    "encoder rows": lambda t, c: t.update({"autoencoder.encoder.weight": t["autoencoder.encoder.weight"].roll(1, 0)}),
    "decoder rows": lambda t, c: t.update({"autoencoder.decoder.weight": t["autoencoder.decoder.weight"].roll(1, 1)}),
    "decoder norms": lambda t, c: t["autoencoder.decoder.weight"].div_(t["autoencoder.decoder.weight"].norm(dim=0)),
    "bias": lambda t, c: t["autoencoder.pre_encoder_bias"].zero_(),
    "k": lambda t, c: c.update(k=K + 1),
    "standardize": lambda t, c: c.update(standardize=False),
    "translator transposed": lambda t, c: t.update(
        {"lens.layer_translators.1.weight": t["lens.layer_translators.1.weight"].T.contiguous()}
    ),
    "translator bias": lambda t, c: t["lens.layer_translators.1.bias"].zero_(),
    "translators one layer on": lambda t, c: t.update(
        {f"lens.layer_translators.{i}.{part}": t[f"lens.layer_translators.{(i + 1) % 3}.{part}"].clone()
         for i in range(2) for part in ("weight", "bias")}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_one_field_wrong_and_the_answers_differ(tmp_path: Path, name: str):
    x = vectors()
    want = definition(with_lm(tmp_path), x)
    config, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    MUTATIONS[name](tensors, config)
    got = behind_lens(MLSAE.from_pretrained(save(tmp_path, config, tensors)), x)
    before = len(proof.ROWS)
    with pytest.raises(AssertionError):
        proof.compare("lawson2024", "none", "random", got, want, atol=1e-4)
    del proof.ROWS[before:]


# ---- damaged, mislabelled --------------------------------------------------------------------------------------------------


def what(config: dict, tensors: dict) -> str:
    """What was changed, in words."""
    odd = [
        f"no {name}" if tensor is None else f"{name} {list(tensor.shape)} of {tensor.dtype}"
        for name, tensor in tensors.items()
    ]
    return ", ".join([*(f"{key} = {value!r}" for key, value in config.items()), *odd])


ODD_ALONE = [
    ({"k": N_LATENTS + 1}, {}, "config.json: k is 257; the SAE has 256 latents"),
    ({"k": "8"}, {}, "config.json: k: "),
    ({"k": "gone"}, {}, "config.json: k: "),
    ({"standardize": 1}, {}, "config.json: standardize: "),
    ({"activation": "relu"}, {}, "unknown key 'activation'"),
    ({"n_latents": 128}, {}, r"'encoder.weight' has shape \[256, 32\]; config.json needs \[128, 32\]"),
    ({}, {"decoder_weight": torch.zeros(N_LATENTS, 32)}, r"'decoder.weight' has shape \[256, 32\]"),
    ({}, {"pre_encoder_bias": None}, "'pre_encoder_bias' is missing"),
    ({}, {"encoder_bias": torch.zeros(N_LATENTS)}, "'encoder.bias' is unknown"),
    ({}, {"pre_encoder_bias": torch.full((32,), torch.inf)}, "'pre_encoder_bias' holds NaN or infinity"),
    ({}, {"pre_encoder_bias": torch.zeros(32, dtype=torch.float64)}, "'pre_encoder_bias' is F64; it must be F32"),
    ({"lens": True}, {"encoder_lens.0.weight": torch.zeros(32, 32)}, "learned with the SAE"),
]


@pytest.mark.parametrize(("config", "tensors", "reason"), ODD_ALONE)
def test_a_damaged_autoencoder_is_refused(tmp_path: Path, config: dict, tensors: dict, reason: str):
    change(alone(tmp_path / "a"), config, **tensors)
    assert re.search(reason, proof.refuse("lawson2024", what(config, tensors), tmp_path / "a"))


ODD_WITH_LM = [
    (
        {"expansion_factor": 16},
        {},
        r"'autoencoder.encoder.weight' has shape \[256, 32\]; config.json needs \[512, 32\]",
    ),
    ({"tuned_lens": False}, {}, "holds a tuned lens, which its config says it has not"),
    ({"layers": [0, 3]}, {}, "layers: 3 is out of range; the language model beside it has 3 layers"),
    ({"layers": [1, 1]}, {}, "layers: 1 is given twice"),
    ({"layers": []}, {}, "layers: empty"),
    ({"autoencoder": {}}, {}, "autoencoder"),
    ({}, {"lens_layer_translators_1_bias": None}, "'lens.layer_translators.1.bias' is missing"),
    ({}, {"lens_layer_translators_2_weight": -torch.eye(32)}, "translator of layer 2 is singular"),
    ({}, {"autoencoder_pre_encoder_bias": None}, "'autoencoder.pre_encoder_bias' is missing"),
    ({}, {"optimizer": torch.zeros(1)}, "'optimizer' is unknown"),
]


@pytest.mark.parametrize(("config", "tensors", "reason"), ODD_WITH_LM)
def test_a_damaged_one_with_a_language_model_is_refused(tmp_path: Path, config: dict, tensors: dict, reason: str):
    change(with_lm(tmp_path / "a"), config, **tensors)
    assert re.search(reason, proof.refuse("lawson2024", f"-tfm: {what(config, tensors)}", tmp_path / "a"))


def test_a_lens_that_is_not_there_is_missed(tmp_path: Path):
    with pytest.raises(ModelError, match="trained behind a tuned lens, whose translators are not in this file"):
        MLSAE.from_pretrained(with_lm(tmp_path / "a", lens=False, tuned_lens=True))
    with pytest.raises(ModelError, match=r"trained behind a tuned lens.*open the repository of that name with -tfm"):
        MLSAE.from_pretrained(alone(tmp_path / "mlsae-pythia-70m-deduped-x8-k8-lens"))


def test_a_file_cut_short_is_refused(tmp_path: Path):
    path = alone(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        MLSAE.from_pretrained(tmp_path)


# ---- what names say --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "lm", "layers"),
    [
        (ALONE, "EleutherAI/pythia-70m-deduped", None),
        ("mlsae-gpt2-x8-k8", "openai-community/gpt2", None),
        ("mlsae-my-own-x8-k8", None, None),
        ("sae-pythia-160m-deduped-x8-k8-tfm-layers-11", "EleutherAI/pythia-160m-deduped", (11,)),
        ("models--tim-lawson--mlsae-pythia-70m-deduped-x8-k8/snapshots/0a1b", "EleutherAI/pythia-70m-deduped", None),
        ("some-folder-x8-k8", None, None),
    ],
)
def test_the_name_of_a_published_repository_says_what_its_files_do_not(tmp_path: Path, name: str, lm: Any, layers: Any):
    found = MLSAE.from_pretrained(alone(tmp_path / name)).config
    assert (found.lm, found.layers) == (lm, layers)


def test_what_is_given_goes_before_a_name_and_not_before_layers_that_files_say(tmp_path: Path):
    assert MLSAE.from_pretrained(alone(tmp_path / ALONE), lm="here").config.lm == "here"
    one = with_lm(tmp_path / "one", layers=[1, 2])
    assert MLSAE.from_pretrained(one, layers=(1, 2), lm="here").config.lm == "here"
    with pytest.raises(ModelError, match="reads layers 1, 2, not 0, 1 as given"):
        MLSAE.from_pretrained(one, layers=(0, 1))


@pytest.mark.parametrize("name", ["mlsae-pythia-70m-deduped-x16-k8", "mlsae-pythia-70m-deduped-x8-k9"])
def test_a_name_that_its_files_contradict_is_refused(tmp_path: Path, name: str):
    for make in (alone, with_lm):
        with pytest.raises(ModelError, match="its name says x"):
            MLSAE.from_pretrained(make(tmp_path / name))


def test_a_single_layer_by_a_name_of_many_is_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        found = MLSAE.from_pretrained(with_lm(tmp_path / (ALONE + "-tfm"), lens=False, layers=[0]))
    assert found.layers == (0,)
    assert "named an MLSAE, is an SAE of layer 0 alone" in caplog.text


def test_translators_go_by_position_and_that_is_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tensors = load_file(with_lm(tmp_path, layers=[2]) / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        found = MLSAE.from_pretrained(tmp_path)
    assert found.lens is not None
    assert torch.equal(found.lens.weight[0], tensors["lens.layer_translators.0.weight"])
    assert "translator 0 stands before layer 2" in caplog.text


def test_early_files_say_less(tmp_path: Path):
    folder = with_lm(tmp_path / (ALONE + "-tfm"), lens=False)
    change(folder, {"tuned_lens": "gone", "standardize": "gone", "autoencoder": None, "transformer": None})
    assert MLSAE.from_pretrained(folder).config.frame == "vector"
    early = alone(tmp_path / "sae-pythia-70m-deduped-x8-k8-tfm-layers-3")
    assert MLSAE.from_pretrained(early).layers == (3,)


def test_special_tokens_stay_where_they_were_kept(tmp_path: Path):
    assert not MLSAE.from_pretrained(with_lm(tmp_path, skip_special_tokens=False)).config.mask_special_tokens


def test_others_are_not_taken_for_one(tmp_path: Path):
    assert formats.detect(alone(tmp_path / "a")) == formats.detect(with_lm(tmp_path / "b")) == "lawson2024"
    save(tmp_path / "lm", {"model_type": "gpt_neox", "hidden_size": 32}, {"x": torch.zeros(1)})
    assert formats.detect(tmp_path / "lm") is None
    formats.write(proof.make_sae().weights(), tmp_path / "ours", "mlsae")
    assert formats.detect(tmp_path / "ours") == "mlsae"
