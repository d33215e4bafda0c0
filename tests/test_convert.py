"""Converting: equal outputs after every way there and back, and nothing kept that is not."""

import json

import pytest
import torch

from mlsae import MLSAE, convert, formats
from mlsae.cli import main
from mlsae.errors import ConfigError, ModelError, ResourceError
from test_sae import make_resid, make_sae

WAYS = [
    ("layer", "saelens"),
    ("layer", "sparsify"),
    ("layer", "dictionary-learning"),
    ("vector", "saelens"),
    ("vector", "lawson2024"),
    ("vector", "openai"),
    ("none", "sparsify"),
]


@pytest.mark.parametrize(("frame", "to"), WAYS)
def test_there_and_back_gives_the_same_outputs(tmp_path, frame, to):
    sae, resid = make_sae(frame=frame, mask_norm_factor=None), make_resid(batch=(20,))
    sae.save_pretrained(tmp_path / "ours")
    there = convert(tmp_path / "ours", tmp_path / "theirs", to=to)
    back = convert(tmp_path / "theirs", tmp_path / "back", layers=(0, 1, 2, 3), allow_pickle=True)
    again = MLSAE.from_pretrained(tmp_path / "back")
    assert (there.to, there.layers, back.to, back.layers) == (to, [0, 1, 2, 3], "mlsae", [0, 1, 2, 3])
    assert len(there.folders) == (1 if to == "lawson2024" else 4)
    assert max(there.difference, back.difference) < 1e-5
    want, got = sae.encode(resid), again.encode(resid)
    torch.testing.assert_close(got.values.sort().values, want.values.sort().values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again.decode(got), sae.decode(want), rtol=1e-4, atol=1e-4)


def test_ours_to_ours_keeps_what_was_known_of_a_prompt(tmp_path, lm):
    make_sae(frame="none", layers=(0, 2), d_model=32, n_latents=64).save_pretrained(tmp_path / "a", lm=lm)
    convert(tmp_path / "a", tmp_path / "b")
    first, second = (MLSAE.from_pretrained(tmp_path / name).fingerprint for name in "ab")
    assert first == second
    assert second["prompt"] is not None


def test_a_folder_that_holds_something_is_left_as_it_is(tmp_path):
    make_sae().save_pretrained(tmp_path / "ours")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(ResourceError, match="is there and not empty; name a new folder"):
        convert(tmp_path / "ours", tmp_path / "mine", to="saelens")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_what_has_no_twin_leaves_nothing(tmp_path):
    make_sae(frame="vector").save_pretrained(tmp_path / "ours")
    with pytest.raises(ConfigError):
        convert(tmp_path / "ours", tmp_path / "theirs", to="sparsify")
    assert not (tmp_path / "theirs").exists()


def test_a_writer_that_forgets_a_bias_is_found_out(tmp_path, monkeypatch):
    make_sae(frame="none").save_pretrained(tmp_path / "ours")
    module, real = formats.module_of("saelens"), formats.module_of("saelens").write
    without = {"b_dec": torch.zeros(6)}
    monkeypatch.setattr(
        module, "write", lambda one, folder: real(formats.Dictionary(**{**vars(one), **without}), folder)
    )
    with pytest.raises(ModelError, match="as saelens it reconstructs otherwise"):
        convert(tmp_path / "ours", tmp_path / "theirs", to="saelens")


def test_the_command_says_where_and_how_near(tmp_path, capsys):
    make_sae().save_pretrained(tmp_path / "ours")
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "saelens", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["folders"]) == 4
    assert found["difference"] < 1e-5
