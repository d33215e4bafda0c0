"""What is saved with an SAE tells a changed weight, changed code and another language model from what was saved."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlsae import MLSAE, fingerprint
from mlsae.errors import ModelError
from mlsae.formats import own
from mlsae.lm import LanguageModel
from mlsae.reading import check_pair
from mlsae.untrusted import tensors_metadata
from test_sae import make_sae
from tiny import save_tiny_lm

FRAMES = ("layer", "vector", "none")


def of_lm(lm: LanguageModel, frame: str = "layer") -> MLSAE:
    sae = make_sae(frame=frame, layers=(0, 2), d_model=lm.d_model, n_latents=64, lm=lm.name)
    resid = lm.resid(lm.tokenize("A cat and a dog ran far from the house, by the light of the moon"), layers=[0, 2])
    sae.frame.fit(resid[:, 0].mean(1), resid[:, 0].var((1, 2)))
    return sae


@pytest.mark.parametrize("frame", FRAMES)
def test_an_sae_has_the_fingerprint_it_was_saved_with(tmp_path, frame):
    sae = make_sae(frame=frame)
    sae.save_pretrained(tmp_path)
    again = MLSAE.from_pretrained(tmp_path)
    assert again.fingerprint == sae.fingerprint == fingerprint.of(again)
    assert again.fingerprint["shapes"] == {name: list(t.shape) for name, t in again.state_dict().items()}
    assert again.fingerprint["prompt"] is None


def test_fvu_and_l0_are_those_of_the_fixed_vectors():
    """By their definitions, on vectors drawn as the page says."""
    sae = make_sae(frame="none")
    x = 10 * torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0))
    code = sae.encode(x, [0, 2, 3])
    recon = sae.decode(code)
    fvu = (x - recon).square().sum((1, 2)) / (x - x.mean(1, keepdim=True)).square().sum((1, 2))
    found = fingerprint.of(sae)["vectors"]
    assert found["fvu"] == pytest.approx(fvu.tolist(), rel=1e-5)
    assert found["l0"] == (code.values > 0).float().sum(-1).mean(-1).tolist()


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_pre", "norm_limit", "frame.mean", "frame.scale"])
def test_one_bit_of_any_tensor_is_missed(tmp_path, name):
    make_sae().save_pretrained(tmp_path)
    path = tmp_path / own.WEIGHTS_FILE
    tensors, beside = load_file(path), tensors_metadata(path)
    tensors[name].view(torch.int32).view(-1)[0] ^= 1
    save_file(tensors, path, beside)
    with pytest.raises(ModelError, match=f"'{name}' is not the one that was saved"):
        MLSAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("frame", FRAMES)
def test_code_that_reads_the_weights_otherwise_is_found_out(tmp_path, monkeypatch, frame):
    """As a later version might that forgot the bias in the decoder."""
    make_sae(frame=frame).save_pretrained(tmp_path)
    real = MLSAE.decode_lensed
    monkeypatch.setattr(MLSAE, "decode_lensed", lambda self, code, **o: real(self, code, **o) - self.b_pre * code.scale)
    with pytest.raises(ModelError, match=r"FVU of its layer number 0 is .* reads the file otherwise"):
        MLSAE.from_pretrained(tmp_path)


def test_a_file_without_a_fingerprint_is_not_whole(tmp_path):
    make_sae().save_pretrained(tmp_path)
    path = tmp_path / own.WEIGHTS_FILE
    beside = json.loads(tensors_metadata(path)["sae"])
    for instead in ({"config": beside["config"]}, {**beside, "fingerprint": [1]}, {**beside, "fingerprint": None}):
        save_file(load_file(path), path, {"sae": json.dumps(instead)})
        with pytest.raises(ModelError, match="holds no fingerprint"):
            MLSAE.from_pretrained(tmp_path)


def test_the_same_sae_is_the_same_file(tmp_path):
    for name in "abcdefgh":
        make_sae().save_pretrained(tmp_path / name)
    assert len({(tmp_path / name / own.WEIGHTS_FILE).read_bytes() for name in "abcdefgh"}) == 1
    assert len({own.identity(tmp_path / name) for name in "abcdefgh"}) == 1


def test_identity_is_of_config_and_tensors_alone(tmp_path, lm):
    sae = of_lm(lm)
    sae.save_pretrained(tmp_path / "a")
    sae.save_pretrained(tmp_path / "b", lm=lm)
    sae.b_pre.data[0] += 1
    sae.save_pretrained(tmp_path / "c")
    assert own.identity(tmp_path / "a") == own.identity(tmp_path / "b") != own.identity(tmp_path / "c")


def test_another_language_model_of_the_same_shape_is_warned_of(tmp_path, lm, caplog):
    sae = of_lm(lm)
    sae.save_pretrained(tmp_path / "sae", lm=lm)
    sae = MLSAE.from_pretrained(tmp_path / "sae")
    assert len(sae.fingerprint["prompt"]["fvu"]) == 2
    check_pair(lm, sae)
    assert caplog.text == ""
    other = LanguageModel.from_pretrained(save_tiny_lm(tmp_path / "other", seed=1), device="cpu", dtype="float32")
    check_pair(other, sae)
    assert "on a fixed prompt; is" in caplog.text


def test_the_same_language_model_in_bfloat16_is_not_warned_of(tmp_path, lm, lm_folder, caplog):
    sae = of_lm(lm)
    sae.save_pretrained(tmp_path, lm=lm)
    check_pair(
        LanguageModel.from_pretrained(lm_folder, device="cpu", dtype="bfloat16"), MLSAE.from_pretrained(tmp_path)
    )
    assert caplog.text == ""


def test_a_prompt_without_a_finite_quality_can_be_saved(tmp_path, lm, monkeypatch):
    real = LanguageModel.resid
    monkeypatch.setattr(LanguageModel, "resid", lambda self, *a, **o: real(self, *a, **o) * torch.inf)
    sae = make_sae(frame="none", layers=(0, 2), d_model=32, n_latents=64, mask_norm_factor=None)
    sae.b_pre.data.zero_()
    sae.save_pretrained(tmp_path, lm=lm)
    assert MLSAE.from_pretrained(tmp_path).fingerprint["prompt"]["fvu"] == [None, None]
