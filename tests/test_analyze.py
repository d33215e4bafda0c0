"""Analysis over much text: its sums are those of a direct computation, and its files give them back."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mlsae.analysis.example_file import read_examples
from mlsae.analysis.layers import LayerStatistics
from mlsae.analyze import PROMPT, Analysis, analyze, prompt_activity
from mlsae.config import MLSAEConfig
from mlsae.data import TokenBlocks, pack
from mlsae.errors import DataError, MlsaeError
from mlsae.files import finite
from mlsae.lm import LanguageModel
from mlsae.sae import MLSAE
from mlsae.text import TextSource
from mlsae.untrusted import load_tensors

D_MODEL, CONTEXT, LAYERS, N_LATENTS = 32, 32, (0, 1, 2), 48
SETTINGS = {"tokens": 10**6, "progress": False, "prompt": "Mary and John"}


def make_sae(layers=LAYERS, **changes) -> MLSAE:
    torch.manual_seed(3)
    shape = {"d_model": D_MODEL, "n_latents": N_LATENTS, "k": 5, "frame": "vector", "mask_norm_factor": None}
    return MLSAE(MLSAEConfig(**shape | changes, layers=layers))


@pytest.fixture(scope="module")
def blocks(lm: LanguageModel, corpus: Path) -> TokenBlocks:
    return pack(TextSource(str(corpus), "test"), lm.tokenizer, CONTEXT, progress=False)


@pytest.fixture(scope="module")
def found(lm: LanguageModel, blocks: TokenBlocks) -> Analysis:
    return analyze(make_sae(), lm, blocks, **SETTINGS)


def vectors_of(lm: LanguageModel, blocks: TokenBlocks, layers=LAYERS) -> tuple[torch.Tensor, torch.Tensor]:
    """Unmasked residual vectors [layer, token, d_model] and the sequence each is from, straight from the model."""
    tokens = blocks.read(0, len(blocks))
    keep = lm.keep_mask(tokens)
    return lm.resid(tokens, layers=layers)[:, keep], keep.nonzero()[:, 0]


def test_statistics_are_those_of_the_codes(lm: LanguageModel, blocks: TokenBlocks, found: Analysis):
    vectors, sequence = vectors_of(lm, blocks)
    want = LayerStatistics(3, N_LATENTS)
    with torch.no_grad():
        want.update(make_sae().encode(vectors), sequence=sequence)
    for name in want.by_shard:
        got, total = (getattr(x, name).double() for x in (found.statistics, want))
        assert torch.allclose(got, total, rtol=1e-5, atol=1e-5), name
    assert found.statistics.n_tokens == vectors.shape[1]
    assert torch.equal(found.statistics.counts, want.counts)


def test_statistics_by_a_dense_array(lm: LanguageModel, blocks: TokenBlocks, found: Analysis):
    """Nothing of LayerStatistics: totals and counts of the dense activations."""
    vectors, _ = vectors_of(lm, blocks)
    with torch.no_grad():
        dense = make_sae().encode(vectors).to_dense().double()
    assert torch.allclose(found.statistics.totals, dense.sum(1), rtol=1e-5)
    assert torch.equal(found.statistics.counts, (dense > 0).sum(1))
    share = dense.sum(1) / dense.sum((0, 1))
    assert torch.allclose(found.statistics.distribution().probability, share, rtol=1e-5, equal_nan=True)


def test_similarity_by_numpy(lm: LanguageModel, blocks: TokenBlocks, found: Analysis):
    x = vectors_of(lm, blocks)[0].double().numpy()
    for centred in (True, False):
        y = x - x.mean(1, keepdims=True) if centred else x
        unit = y / np.linalg.norm(y, axis=-1, keepdims=True)
        cosines = (unit[:-1] * unit[1:]).sum(-1)
        got = found.similarity.to_dict()["centred" if centred else "raw"]
        assert got["mean"] == pytest.approx(cosines.mean(1).tolist(), abs=1e-6)
        assert got["std"] == pytest.approx(cosines.std(1, ddof=1).tolist(), abs=1e-6)
    norms = np.linalg.norm(x, axis=-1)
    assert found.means.to_dict()["norm"]["mean"] == pytest.approx(norms.mean(1).tolist(), rel=1e-6)


def test_names_are_those_of_summary_json(found: Analysis):
    summary = json.loads(json.dumps(finite(found.summary())))
    assert set(summary["decomposition"]) == {"mass", "event", "count"}
    for weights, terms in summary["decomposition"].items():
        assert set(terms) == {"within", "token", "latent", "total", "rel_f", "rel_t"}
        value = {name: term["value"] for name, term in terms.items()}
        assert value["within"] + value["token"] + value["latent"] == pytest.approx(value["total"], rel=1e-12)
        constant = (
            {"total"} if weights == "count" else set()
        )  # every layer has exactly k active: 2/3, whatever the text
        assert {name for name, term in terms.items() if not term["ci95"][0] < term["ci95"][1]} == constant
    assert set(summary["lawson2024"]) == {"rel_f", "rel_t"}
    assert summary["layers"] == [0, 1, 2]
    assert finite(found.to_dict()) == finite(found.summary())
    assert sum(summary["events"]["active_layers"]) == found.statistics.n_events.sum()
    assert set(summary["nulls"]) == {"independent", "shuffled_layers"}
    assert len(summary["persistence"]) == len(summary["nulls"]["independent"]["persistence"]) == 2
    assert set(summary["directions"]) == {"pairs", "logits", "embedding", "unembedding"}


def test_nothing_is_done_that_was_not_asked_for(tmp_path: Path, lm: LanguageModel, blocks: TokenBlocks):
    found = analyze(make_sae(), lm, blocks, **SETTINGS, nulls=False, directions=False, examples=0)
    assert (found.nulls, found.pairs, found.words, found.examples) == ({}, None, None, None)
    found.save(tmp_path)
    assert not (tmp_path / "examples.parquet").exists()
    assert "promoted_logits" not in pq.read_schema(tmp_path / "latents.parquet").names
    assert found.summary()["directions"] == {"pairs": None}


def test_a_dictionary_too_large_for_intervals_is_analyzed_without(
    tmp_path: Path, lm, blocks: TokenBlocks, monkeypatch, caplog
):
    import sys

    monkeypatch.setattr(sys.modules["mlsae.analysis.sums"], "MAX_STATISTICS_BYTES", 10_000)
    found = analyze(make_sae(), lm, blocks, **SETTINGS)
    assert "too many for intervals" in caplog.text
    assert found.statistics.n_shards == 1
    assert found.summary()["decomposition"]["mass"]["total"]["value"] > 0
    assert math.isnan(found.summary()["decomposition"]["mass"]["total"]["ci95"][0])
    (tmp_path / "profile.safetensors").write_bytes(b"of an older analysis")
    found.save(tmp_path)
    assert not (tmp_path / "profile.safetensors").exists()


def test_the_table_has_a_row_for_every_latent(tmp_path: Path, found: Analysis):
    found.save(tmp_path)
    table = pq.read_table(tmp_path / "latents.parquet").to_pylist()
    depth = found.statistics.distribution()
    assert [row["latent"] for row in table] == list(range(N_LATENTS))
    for row in table:
        latent = row["latent"]
        assert row["n_events"] == found.statistics.n_events[latent]
        if not depth.used[latent]:
            assert row["centre_of_mass"] is row["entropy"] is None
            continue
        assert row["centre_of_mass"] == pytest.approx(depth.centre_of_mass[latent].item())
        assert row["max_cosine"] == pytest.approx(found.pairs.max_cosine[latent].item())
        for name in ("promoted", "suppressed"):
            logits = getattr(found.words.logits, f"{name}_logits")[latent].tolist()
            assert row[f"{name}_logits"] == pytest.approx(logits)
            assert len(row[name]) == len(logits) == 8
    known = [row for row in table if row["centre_of_mass_low"] is not None]
    assert any(row["centre_of_mass_low"] < row["centre_of_mass_high"] for row in known)


def test_what_is_saved_is_given_back(tmp_path: Path, found: Analysis):
    found.save(tmp_path / "analysis")
    written = {path.name for path in (tmp_path / "analysis").iterdir()}
    tables = {"latents.parquet", "examples.parquet", "profile.safetensors"}
    assert written == tables | {"layers.safetensors", "prompt.safetensors", "summary.json", "similarity.json"}
    low, high = found.statistics.profile_interval()
    profile = load_tensors(tmp_path / "analysis" / "profile.safetensors")
    assert torch.equal(profile["low"].nan_to_num(9), low.nan_to_num(9))
    assert torch.equal(profile["high"].nan_to_num(9), high.nan_to_num(9))
    loaded = LayerStatistics.load(tmp_path / "analysis" / "layers.safetensors")
    assert all(torch.equal(loaded.by_shard[name][0], getattr(found.statistics, name)) for name in loaded.by_shard)
    summary = json.loads((tmp_path / "analysis" / "summary.json").read_text())
    terms = {name: term["value"] for name, term in summary["decomposition"]["mass"].items()}
    assert terms == found.statistics.decomposition().to_dict()
    latent = int(found.statistics.n_events.argmax())
    assert read_examples(tmp_path / "analysis" / "examples.parquet", latent)
    similarity = json.loads((tmp_path / "analysis" / "similarity.json").read_text())
    assert similarity["centred"] == found.similarity.to_dict()["centred"]
    assert similarity["n_tokens"] == similarity["resid"]["n_tokens"] == found.statistics.n_tokens


@pytest.mark.parametrize("at", range(14))
def test_an_analysis_saved_by_halves_is_not_taken_for_one(tmp_path: Path, found: Analysis, monkeypatch, at: int):
    """Killed at any call that changes the disk, over an older one: it has its summary.json only if it is whole, old or new."""
    folder = tmp_path / "analysis"
    older = dataclasses.replace(found, seconds=-1.0)
    older.save(folder)
    calls, names = itertools.count(), ("replace", "rename")

    def killed(real):
        def call(*arguments):
            if next(calls) == at:
                raise KeyboardInterrupt
            return real(*arguments)

        return call

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        for name in names:
            patch.setattr(os, name, killed(getattr(os, name)))
        found.save(folder)
    summary = folder / "summary.json"
    finished = next(calls) <= at
    assert summary.exists() == (finished or at == 0)
    if summary.exists():
        assert json.loads(summary.read_text())["seconds"] == (found.seconds if finished else -1.0)


@pytest.mark.parametrize("layers", [(2, 0), (1,)])
def test_a_subset_is_labelled_with_model_layers(lm, blocks: TokenBlocks, found: Analysis, layers: tuple[int, ...]):
    """N3: rows follow `layers`, and each is what the analysis of all layers has there."""
    part = analyze(make_sae(layers), lm, blocks, **SETTINGS)
    assert part.layers == layers
    assert part.summary()["layers"] == list(layers)
    assert torch.allclose(part.statistics.totals, found.statistics.totals[list(layers)], rtol=1e-5)
    norm = found.means.to_dict()["norm"]["mean"]
    assert part.means.to_dict()["norm"]["mean"] == pytest.approx([norm[layer] for layer in layers], rel=1e-6)
    if len(layers) == 1:
        assert part.summary()["decomposition"]["mass"]["total"]["value"] == 0.0
        assert part.similarity.to_dict()["raw"]["mean"] == []


def test_tokens_limit_what_is_read(lm: LanguageModel, blocks: TokenBlocks):
    found = analyze(make_sae(), lm, blocks, **SETTINGS | {"tokens": 2 * CONTEXT})
    assert found.statistics.n_tokens == int(lm.keep_mask(blocks.read(0, 2)).sum())


def test_analysis_changes_no_bit_of_the_sae(lm: LanguageModel, blocks: TokenBlocks):
    sae = make_sae()
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    first, second = (analyze(sae, lm, blocks, **SETTINGS) for _ in range(2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())
    sums = second.statistics.by_shard
    assert all(torch.equal(total, sums[name]) for name, total in first.statistics.by_shard.items())


# ---- one prompt ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [LAYERS, (2, 0)])
def test_prompt_by_hand(lm: LanguageModel, layers: tuple[int, ...]):
    sae, tokens = make_sae(layers), lm.tokenize("a store!")
    activity = prompt_activity(sae, lm, "a store!")
    with torch.no_grad():
        dense = sae.encode(lm.resid(tokens, layers=layers)[:, 0]).to_dense().double()
    assert activity.tokens == list("a store!")
    assert activity.visible.tolist() == [False] + [True] * 7
    assert torch.allclose(activity.mass, dense[:, 1:].sum(1), rtol=1e-6)
    assert torch.allclose(activity.by_position, dense.sum(-1), rtol=1e-6)
    assert activity.masked_share == pytest.approx((dense[:, 0].sum() / dense.sum()).item())
    assert 0 < activity.masked_share < 1


def test_special_tokens_of_a_prompt_are_masked_too(lm: LanguageModel):
    activity = prompt_activity(make_sae(), lm, "ab<|endoftext|>c")
    assert activity.tokens == ["a", "b", "<|endoftext|>", "c"]
    assert activity.visible.tolist() == [False, True, False, True]
    unmasked = prompt_activity(make_sae(mask_first_position=False, mask_special_tokens=False), lm, "ab<|endoftext|>c")
    assert unmasked.visible.all()
    assert unmasked.masked_share == 0.0


def test_the_published_prompt_fits_a_short_model(lm: LanguageModel):
    assert len(prompt_activity(make_sae(), lm, PROMPT).tokens) <= (lm.context_length or math.inf)


def test_a_prompt_of_masked_tokens_only(lm: LanguageModel):
    """Its mass is zero everywhere, and all of its activation is masked."""
    activity = prompt_activity(make_sae(), lm, "a")
    assert (activity.mass == 0).all()
    assert activity.masked_share == pytest.approx(1.0)


@pytest.mark.parametrize("prompt", ["", "too long " * 50])
def test_a_prompt_that_cannot_be_read_is_refused_before_the_text_is(lm, blocks, monkeypatch, prompt: str):
    """The prompt comes last, after hours over ten million tokens, which a bad one would throw away."""
    monkeypatch.setattr(TokenBlocks, "read", lambda *args, **kwargs: pytest.fail("read the text first"))
    with pytest.raises(MlsaeError):
        analyze(make_sae(), lm, blocks, **SETTINGS | {"prompt": prompt})


def test_no_token_left_is_said(lm: LanguageModel, blocks: TokenBlocks):
    separators = np.full((2, CONTEXT), lm.tokenizer.separator_id, dtype=np.uint16)
    with pytest.raises(DataError, match="no token is left after masking"):
        analyze(make_sae(), lm, TokenBlocks(separators, blocks.document_starts[:0], blocks.info), **SETTINGS)


def test_the_context_of_a_latent_is_where_it_was_most_active(lm: LanguageModel, blocks: TokenBlocks, found: Analysis):
    tokens = blocks.read(0, len(blocks))
    keep = lm.keep_mask(tokens)
    with torch.no_grad():
        dense = make_sae().encode(lm.resid(tokens, layers=LAYERS)).to_dense() * keep[..., None]
    latent = int(found.statistics.n_events.argmax())
    layer, row, position = np.unravel_index(int(dense[..., latent].argmax()), dense.shape[:-1])
    got = found.context(latent)
    strings = lm.tokenizer.strings(tokens[row].tolist())
    assert got[0] == LAYERS[layer]
    assert got[2] == strings[position]
    assert "".join(strings[: position + 1]).endswith(got[1] + got[2])
    assert "".join(strings[position:]).startswith(got[2] + got[3])
    unused = (found.statistics.n_events == 0).nonzero().flatten().tolist()
    assert all(found.context(j) is None for j in unused)
    assert dataclasses.replace(found, examples=None).context(latent) is None
