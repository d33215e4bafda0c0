"""Similarity of directions against direct numpy computations."""

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mlsae.analysis import geometry
from mlsae.analysis.geometry import AdjacentSimilarity, ResidMeans, max_cosine, mmcs
from mlsae.errors import ModelError

torch.set_num_threads(1)


def random_resid(seed: int = 0, n_layers: int = 4, n_tokens: int = 50, d_model: int = 8) -> Tensor:
    """Residual vectors that drift from layer to layer around a large offset."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(n_layers, n_tokens, d_model, generator=generator)
    return steps.cumsum(0) + 5 * torch.randn(n_layers, 1, d_model, generator=generator)


def two_passes(batches: list[Tensor]) -> tuple[ResidMeans, AdjacentSimilarity]:
    means = ResidMeans(*batches[0].shape[::2])
    for batch in batches:
        means.update(batch)
    similarity = AdjacentSimilarity(means)
    for batch in batches:
        similarity.update(batch)
    return means, similarity


def direct_cosines(x: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(x, axis=-1)
    return (x[1:] * x[:-1]).sum(-1) / (norms[1:] * norms[:-1])


def moments(samples: np.ndarray) -> dict[str, list[float]]:
    std = samples.std(1, ddof=1)
    return {"mean": samples.mean(1).tolist(), "std": std.tolist(), "sem": (std / samples.shape[1] ** 0.5).tolist()}


def assert_close(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for name, values in want.items():
        assert got[name] == pytest.approx(values, rel=1e-12), name


@pytest.mark.parametrize("cuts", [[], [25], [0, 3, 4, 49]])
def test_equals_a_direct_computation_however_the_tokens_arrive(cuts):
    resid = random_resid()
    means, similarity = two_passes(list(resid.tensor_split(cuts, dim=1)))
    x = resid.double().numpy()
    np.testing.assert_allclose(means.mean.numpy(), x.mean(1), rtol=1e-12)
    assert_close(means.norm.to_dict(), moments(np.linalg.norm(x, axis=-1)))
    assert_close(similarity.raw.to_dict(), moments(direct_cosines(x)))
    assert_close(similarity.centred.to_dict(), moments(direct_cosines(x - x.mean(1, keepdims=True))))


def test_merge_is_one_pass():
    parts = list(random_resid(1).tensor_split([7, 30], dim=1))
    want_means, want = two_passes(parts)
    means = ResidMeans(4, 8)
    for part in parts:
        shard = ResidMeans(4, 8)
        shard.update(part)
        means = means.merge(shard)
    torch.testing.assert_close(means.mean, want_means.mean, rtol=1e-12, atol=1e-12)
    assert_close(means.norm.to_dict(), want_means.norm.to_dict())
    merged = AdjacentSimilarity(want_means)
    for part in parts:
        shard = AdjacentSimilarity(want_means)
        shard.update(part)
        merged = merged.merge(shard)
    assert_close(merged.centred.to_dict(), want.centred.to_dict())
    assert_close(merged.raw.to_dict(), want.raw.to_dict())
    assert merged.to_dict()["n_tokens"] == 50


def test_the_centred_cosine_ignores_an_offset_and_the_raw_one_does_not():
    resid = random_resid(2)
    _, near = two_passes([resid])
    _, far = two_passes([resid + 1000])
    torch.testing.assert_close(near.centred.mean, far.centred.mean, rtol=1e-3, atol=1e-3)
    assert (far.raw.mean > 0.999).all()


def test_a_spread_far_below_its_mean_keeps_its_digits():
    """Norms of 1e6 that differ by 1e-3: a sum of squares would read noise."""
    resid = torch.zeros(1, 40, 2, dtype=torch.float64)
    resid[0, :, 0] = 1e6 + torch.arange(40) % 2 * 1e-3
    means, _ = two_passes(list(resid.split(8, dim=1)))
    assert means.norm.std.item() == pytest.approx(np.std(resid[0, :, 0].numpy(), ddof=1), rel=1e-9)


def test_identical_layers_have_cosine_one():
    _, similarity = two_passes([random_resid(3)[:1].expand(3, -1, -1)])
    assert similarity.centred.mean.tolist() == pytest.approx([1, 1])
    assert similarity.raw.std.tolist() == pytest.approx([0, 0], abs=1e-12)


def test_dictionaries_are_json_and_small_cases_are_nan():
    means, similarity = two_passes([random_resid(4, n_tokens=1)])
    assert json.loads(json.dumps(means.to_dict()))["n_tokens"] == 1
    assert all(math.isnan(std) for std in similarity.to_dict()["raw"]["std"])
    _, lone = two_passes([random_resid(4, n_layers=1)])
    assert lone.to_dict()["centred"] == {"mean": [], "std": [], "sem": []}
    assert math.isnan(ResidMeans(2, 3).to_dict()["norm"]["mean"][0])


def test_sizes_and_means_must_agree():
    means, similarity = two_passes([random_resid(5)])
    with pytest.raises(ModelError, match=r"\(4, 9\); these statistics hold \(4, 8\)"):
        means.update(random_resid(d_model=9))
    with pytest.raises(ModelError, match=r"\(3, 8\)"):
        similarity.update(random_resid(n_layers=3))
    with pytest.raises(ModelError, match=r"\(3, 8\)"):
        means.merge(ResidMeans(3, 8))
    with pytest.raises(ModelError, match="other means"):
        similarity.merge(two_passes([random_resid(6)])[1])


def test_mmcs_worked_by_hand():
    e1, e2 = torch.eye(2)
    assert mmcs(torch.stack([e1, e1, e2, e2])) == 1
    assert mmcs(torch.stack([e1, 3 * e2])) == 0
    assert mmcs(torch.stack([e1, -e1])) == -1  # no floor at 0
    assert mmcs(torch.stack([e1, e1, e2])) == pytest.approx(2 / 3)
    assert math.isnan(mmcs(e1[None]))


@pytest.mark.parametrize("elements", [1, 37, 150, 10**6])
def test_mmcs_is_all_pairs_whatever_the_block(monkeypatch, elements):
    monkeypatch.setattr(geometry, "MAX_BLOCK_ELEMENTS", elements)
    W_dec = torch.randn(37, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = W_dec / W_dec.norm(dim=1, keepdim=True)
    want = (unit @ unit.T).fill_diagonal_(-2).amax(1)
    torch.testing.assert_close(max_cosine(W_dec), want)
    assert mmcs(W_dec) == pytest.approx(want.mean().item(), rel=1e-12)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(max_cosine(W_dec[order]), want[order])


def test_decoders_in_half_precision_are_compared_in_float32():
    W_dec = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert max_cosine(W_dec).dtype == torch.float32
    assert mmcs(W_dec) == pytest.approx(mmcs(W_dec.float()))
