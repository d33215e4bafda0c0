"""The geometry of the residual stream against direct numpy computations."""

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mlsae.analysis.geometry import AdjacentSimilarity, ResidMeans
from mlsae.errors import DataError, ModelError

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
    assert lone.to_dict()["centred"] == {"mean": [], "std": [], "sem": [], "ci95": []}
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


@pytest.mark.parametrize(("apart", "merges"), [(1e-6, True), (1e-2, False)])
def test_means_that_only_round_differently_are_the_same(apart: float, merges: bool):
    """Another machine's matrix products differ in the last bits, and its sums are good all the same."""
    _, similarity = two_passes([random_resid(5)])
    _, other = two_passes([random_resid(5) * (1 + apart)])
    if not merges:
        with pytest.raises(ModelError, match="other means"):
            similarity.merge(other)
        return
    merged = similarity.merge(other)
    assert merged.to_dict()["n_tokens"] == 2 * similarity.to_dict()["n_tokens"]
    assert torch.equal(merged.means.mean, similarity.means.mean)


# ---- gamma -----------------------------------------------------------------------------------------------------------


def test_gamma_worked_by_hand():
    """Vectors (3, 4 +- 1): the mean is 5 long, the spread is 1."""
    means = ResidMeans(1, 2)
    means.update(torch.tensor([[[3.0, 5.0], [3.0, 3.0]]]))
    assert means.gamma.tolist() == pytest.approx([5])
    assert means.to_dict()["gamma"] == pytest.approx([5])


def test_gamma_is_that_of_numpy_and_ignores_scale():
    resid = random_resid(8)
    x = resid.double().numpy()
    mu = x.mean(1, keepdims=True)
    want = np.linalg.norm(mu[:, 0], axis=1) / np.sqrt(np.square(x - mu).sum(-1).mean(1))
    for given in (resid, 1000 * resid):
        means, _ = two_passes(list(given.split(7, dim=1)))
        np.testing.assert_allclose(means.gamma, want, rtol=1e-6)


def test_gamma_of_centred_vectors_is_0_and_of_equal_ones_infinite():
    resid = random_resid(9).double()
    centred, _ = two_passes([resid - resid.mean(1, keepdim=True)])
    assert centred.gamma.max() < 1e-12
    equal, _ = two_passes([torch.ones(2, 3, 4)])
    assert equal.gamma.tolist() == [math.inf, math.inf]
    assert ResidMeans(2, 3).gamma.isnan().all()


# ---- documents -------------------------------------------------------------------------------------------------------


def in_documents(n_shards: int, *, seed: int = 0, n_tokens: int = 60) -> tuple[Tensor, Tensor, AdjacentSimilarity]:
    """Tokens of documents that each turn their own way, all in one update."""
    shard = torch.arange(n_tokens) % 12 % n_shards
    own = torch.randn(4, 12, 8, generator=torch.Generator().manual_seed(seed + 100))
    resid = random_resid(seed, n_tokens=n_tokens) + 2 * own[:, torch.arange(n_tokens) % 12]
    means = ResidMeans(4, 8)
    means.update(resid)
    similarity = AdjacentSimilarity(means, n_shards)
    similarity.update(resid, shard)
    return resid, shard, similarity


def test_the_interval_is_the_jackknife_over_shards_left_out():
    resid, shard, similarity = in_documents(6)
    x = resid.double().numpy()
    cosines = direct_cosines(x - x.mean(1, keepdims=True))
    whole = cosines.mean(1)
    without = np.stack([cosines[:, shard.numpy() != s].mean(1) for s in range(6)])
    se = np.sqrt(5 / 6 * np.square(without - without.mean(0)).sum(0))
    centre = 6 * whole - 5 * without.mean(0)
    got = similarity.interval("centred")
    np.testing.assert_allclose(got.value, whole, rtol=1e-9)
    np.testing.assert_allclose(got.value, similarity.centred.mean, rtol=1e-9)
    np.testing.assert_allclose(got.low, centre - 2.570581836 * se, rtol=1e-6)  # t, 5 degrees of freedom
    np.testing.assert_allclose(got.high, centre + 2.570581836 * se, rtol=1e-6)
    assert similarity.to_dict()["centred"]["ci95"][0] == [got.low[0].item(), got.high[0].item()]
    np.testing.assert_allclose(similarity.interval("raw").value, direct_cosines(x).mean(1), rtol=1e-9)


def test_shards_do_not_depend_on_how_tokens_arrive():
    resid, shard, whole = in_documents(5)
    parts = []
    for at in (slice(0, 13), slice(13, 60)):
        parts.append(AdjacentSimilarity(whole.means, 5))
        parts[-1].update(resid[:, at], shard[at])
    merged = parts[0].merge(parts[1])
    for name in ("centred", "raw"):
        for bound in ("value", "low", "high"):
            got, want = getattr(merged.interval(name), bound), getattr(whole.interval(name), bound)
            torch.testing.assert_close(got, want, rtol=1e-9, atol=0)


def test_without_documents_there_is_no_interval():
    _, similarity = two_passes([random_resid(4)])
    assert similarity.interval("raw").low.isnan().all()
    torch.testing.assert_close(similarity.interval("raw").value, similarity.raw.mean)
    with pytest.raises(DataError, match="0 to 5 given; these sums hold 0 to 2"):
        AdjacentSimilarity(similarity.means, 3).update(random_resid(4), torch.arange(50) % 6)
    with pytest.raises(ModelError, match="3 shards of documents, these sums 1"):
        similarity.merge(AdjacentSimilarity(similarity.means, 3))
