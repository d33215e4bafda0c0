"""The cache for delphi: every activation once, where it belongs, in files that any safetensors reader opens."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from mlsae.cli import main
from mlsae.data import pack
from mlsae.downstream import delphi
from mlsae.errors import ConfigError, ResourceError
from mlsae.reading import read
from mlsae.text import TextSource
from test_sae import make_sae

CONTEXT = 16


def sae_of(**changes):
    sae = make_sae(**{"layers": (0, 2), "d_model": 32, "n_latents": 40, "k": 5, **changes})
    sae.norm_limit.fill_(40)  # so that some tokens are masked by it
    return sae


@pytest.fixture(scope="module")
def blocks(lm, corpus):
    return pack(TextSource(str(corpus), "test"), lm.tokenizer, CONTEXT, progress=False)


def entries(folder) -> dict[tuple[int, int, int], float]:
    """Every (sequence, position, latent) with its activation, of all files in a hookpoint's folder."""
    found: dict[tuple[int, int, int], float] = {}
    for path in folder.glob("*.safetensors"):
        first, last = map(int, path.stem.split("_"))
        file = load_file(path)
        at = file["locations"].astype(np.int64) + np.array([0, 0, first])
        assert ((first <= at[:, 2]) & (at[:, 2] <= last)).all()
        assert (np.lexsort(at.T[::-1]) == np.arange(len(at))).all(), "in the order of places"
        here = dict(zip(map(tuple, at.tolist()), file["activations"].tolist(), strict=True))
        assert len(here) == len(at)
        assert not here.keys() & found.keys()
        found |= here
    return found


@torch.no_grad()
def expected(sae, lm, tokens, layer) -> dict[tuple[int, int, int], float]:
    """The same from a dense code of every visible vector."""
    row = sae.layers.index(layer)
    reading = read(lm, sae, tokens)
    code = sae.encode(reading.resid[row : row + 1], [layer])
    dense = code.to_dense()[0][..., sae.parts([row])[0].latents] * reading.visible[..., None]
    places = (dense > 1e-5).nonzero()
    return dict(zip(map(tuple, places.tolist()), dense[tuple(places.T)].half().tolist(), strict=True))


@pytest.mark.parametrize("changes", [{}, {"frame": "vector"}, {"groups": 2, "n_latents": 80}])
def test_every_activation_is_written_once(lm, blocks, tmp_path, monkeypatch, changes):
    # several batches, and one cut short
    monkeypatch.setattr(sys.modules["mlsae.heldout"], "BATCH_TOKENS", 3 * CONTEXT)
    sae = sae_of(**changes)
    done = delphi.write_cache(sae, lm, blocks, tmp_path / "out", n_splits=3, progress=False)
    assert done.hookpoints == ["layers.0", "layers.2"]
    assert done.n_tokens == blocks.n_tokens
    for layer, n_entries in zip((0, 2), done.n_entries, strict=True):
        folder = tmp_path / "out" / "latents" / f"layers.{layer}"
        assert sorted(path.name for path in folder.glob("*.safetensors")) == [
            *("0_12.safetensors", "13_25.safetensors", "26_39.safetensors")
        ]
        (tokens, *others) = (torch.from_numpy(load_file(p)["tokens"]).long() for p in folder.glob("*.safetensors"))
        assert all(torch.equal(tokens, other) for other in others)
        assert sorted(map(tuple, tokens.tolist())) == sorted(map(tuple, blocks.read(0, len(blocks)).tolist()))
        want, got = expected(sae, lm, tokens, layer), entries(folder)
        assert len(got) == n_entries
        assert got.keys() == want.keys()
        assert list(got.values()) == pytest.approx([want[at] for at in got], rel=2e-3)
        assert len(got) < sae.config.k * blocks.n_tokens, "masked tokens are empty"


def test_chosen_layers_tokens_and_splits(lm, blocks, tmp_path):
    done = delphi.write_cache(
        sae_of(), lm, blocks, tmp_path / "out", layers=[2], tokens=5 * CONTEXT + 3, n_splits=40, progress=False
    )
    folder = tmp_path / "out" / "latents" / "layers.2"
    assert [path.name for path in (tmp_path / "out" / "latents").iterdir()] == ["layers.2"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["latents"], "no spool is left"
    assert {path.stem for path in folder.glob("*.safetensors")} == {f"{i}_{i}" for i in range(40)}
    assert load_file(folder / "7_7.safetensors")["tokens"].shape == (5, CONTEXT)
    assert (done.n_sequences, done.n_tokens) == (5, 5 * CONTEXT)
    config = json.loads((folder / "config.json").read_text())
    assert (config["cache_ctx_len"], config["n_splits"], config["n_tokens"]) == (CONTEXT, 40, 80)
    assert config["model_name"] == lm.name


def test_a_file_without_activations_is_whole(lm, blocks, tmp_path):
    sae = sae_of(frame="none")
    sae.W_enc.data[20:] = 0
    delphi.write_cache(sae, lm, blocks, tmp_path / "out", n_splits=2, progress=False)
    file = load_file(tmp_path / "out" / "latents" / "layers.0" / "20_39.safetensors")
    assert file["locations"].shape == (0, 3)
    assert file["activations"].shape == (0,)
    assert len(file["tokens"]) == len(blocks)


def test_an_activation_beyond_half_precision_is_its_largest_number(lm, blocks, tmp_path):
    sae = sae_of(frame="none")
    sae.W_enc.data *= 1e6
    delphi.write_cache(sae, lm, blocks, tmp_path / "out", progress=False)
    assert max(entries(tmp_path / "out" / "latents" / "layers.0").values()) == 65504


@pytest.mark.parametrize(("most", "kind"), [(2**16, "U16"), (2**16 + 1, "U32")])
def test_places_take_four_bytes_where_two_do_not_hold_them(most, kind):
    assert delphi._smallest(most) == kind
    assert np.iinfo(delphi.TYPES[kind]).max >= most - 1


def test_what_cannot_be_is_refused_before_the_work(lm, blocks, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(ResourceError, match="is there and not empty; name a new folder"):
        delphi.write_cache(sae_of(), lm, blocks, tmp_path / "mine", progress=False)
    with pytest.raises(ConfigError, match="layers: 1 was not trained on; this SAE has 0, 2"):
        delphi.write_cache(sae_of(), lm, blocks, tmp_path / "out", layers=[1], progress=False)
    with pytest.raises(ConfigError, match="n_splits: 41; give 1 to 40"):
        delphi.write_cache(sae_of(), lm, blocks, tmp_path / "out", n_splits=41, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_command_reads_what_was_held_out(trained, corpus, tmp_path, capsys):
    line = [
        "export",
        str(trained),
        "--out",
        str(tmp_path / "out"),
        "--layers",
        "1",
        "--context-length",
        "32",
        "--quiet",
    ]
    assert main([*line, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    config = json.loads((tmp_path / "out" / "latents" / "layers.1" / "config.json").read_text())
    assert (config["dataset_repo"], config["dataset_split"]) == (str(corpus), "test")
    assert found["hookpoints"] == ["layers.1"]
    assert found["n_entries"][0] == len(entries(tmp_path / "out" / "latents" / "layers.1"))
