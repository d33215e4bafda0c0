"""Decoder rows with each other against direct numpy computations, hand cases, and the permutations themselves."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mlsae.analysis import directions
from mlsae.analysis.directions import Maxima, Pairs, chance, compare_pairs, max_cosine, mmcs
from mlsae.errors import ConfigError, NumericsError

torch.set_num_threads(1)

E1, E2 = torch.eye(2)


def decoder(n: int = 37, d_model: int = 5, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d_model, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def centres(n: int = 37, *, layers: float = 6, seed: int = 1) -> Tensor:
    """Some never active, some at the very ends, some together."""
    centre = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * (layers - 1)
    centre[:5] = torch.tensor([torch.nan, 0, layers - 1, 2, 2])
    return centre


def cosine_table(W_dec: Tensor) -> np.ndarray:
    unit = (W_dec / W_dec.norm(dim=1, keepdim=True)).double().numpy()
    return unit @ unit.T


def each_pair(table: np.ndarray) -> np.ndarray:
    return table[np.triu_indices(len(table), 1)]


def assert_same(got: Pairs, want: Pairs) -> None:
    torch.testing.assert_close(got.max_cosine, want.max_cosine)
    assert torch.equal(got.neighbour, want.neighbour)
    assert torch.equal(got.histogram, want.histogram)
    assert got.lawson2024 == pytest.approx(want.lawson2024, rel=1e-12)
    assert got.depth is not None
    assert want.depth is not None
    assert torch.equal(got.depth.histogram, want.depth.histogram)
    assert torch.equal(got.depth.n_pairs, want.depth.n_pairs)
    torch.testing.assert_close(got.depth.mean, want.depth.mean, equal_nan=True)


# ---- nearest neighbours ----------------------------------------------------------------------------------------------


def test_mmcs_worked_by_hand():
    assert mmcs(torch.stack([E1, E1, E2, E2])) == 1
    assert mmcs(torch.stack([E1, 3 * E2])) == 0
    assert mmcs(torch.stack([E1, -E1])) == -1  # no floor at 0
    assert mmcs(torch.stack([E1, E1, E2])) == pytest.approx(2 / 3)
    assert math.isnan(mmcs(E1[None]))


def test_the_published_variant_worked_by_hand(monkeypatch: pytest.MonkeyPatch):
    rows = torch.stack([E1, E1, E2, E2])
    assert compare_pairs(rows).lawson2024 == 0.5
    assert compare_pairs(torch.stack([E1, -E1])).lawson2024 == 0
    monkeypatch.setattr(directions, "PUBLISHED_WHOLE_BELOW", 4)
    monkeypatch.setattr(directions, "PUBLISHED_CHUNK", 2)
    assert compare_pairs(rows).lawson2024 == 0.25


@pytest.mark.parametrize("block", [1, 5, 7, 37, 1000])
@pytest.mark.parametrize("chunk", [None, 5, 16])
def test_every_number_is_that_of_all_pairs_whatever_the_block(
    monkeypatch: pytest.MonkeyPatch, block: int, chunk: int | None
):
    W_dec, centre = decoder(), centres()
    if chunk is not None:
        monkeypatch.setattr(directions, "PUBLISHED_WHOLE_BELOW", 1)
        monkeypatch.setattr(directions, "PUBLISHED_CHUNK", chunk)
    got = compare_pairs(W_dec, centre, block=block)
    table = cosine_table(W_dec)
    others = np.where(np.eye(37, dtype=bool), -2, table)
    np.testing.assert_allclose(got.max_cosine, others.max(1), rtol=1e-12)
    np.testing.assert_array_equal(got.neighbour, others.argmax(1))
    np.testing.assert_array_equal(got.histogram, np.histogram(each_pair(table), 100, (-1, 1))[0])
    i, j = np.mgrid[:37, :37]
    start = j // chunk * chunk if chunk else 0
    compared = (i < j - start) | (i >= start + (chunk or 37))
    want = np.where(compared, table, 0).max(0, initial=0).mean()
    assert got.lawson2024 == pytest.approx(want, rel=1e-12)
    assert got.mmcs == pytest.approx(mmcs(W_dec), rel=1e-12)
    assert got.lawson2024 < got.mmcs


def test_order_and_length_of_the_rows_do_not_matter():
    W_dec, centre = decoder(), centres()
    order = torch.randperm(37, generator=torch.Generator().manual_seed(2))
    want, got = compare_pairs(W_dec, centre), compare_pairs(W_dec[order], centre[order])
    torch.testing.assert_close(got.max_cosine, want.max_cosine[order])
    assert torch.equal(order[got.neighbour], want.neighbour[order])
    assert torch.equal(got.histogram, want.histogram)
    assert got.depth is not None
    assert want.depth is not None
    assert torch.equal(got.depth.histogram, want.depth.histogram)
    lengths = torch.rand(37, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1
    assert_same(compare_pairs(lengths * W_dec, centre), want)


def test_a_planted_near_duplicate_is_found_and_chance_has_none():
    W_dec = decoder(300, 64)
    W_dec[250] = 2 * W_dec[11] + 0.1 * W_dec[12]
    pairs = compare_pairs(W_dec, block=64)
    assert (pairs.neighbour[11], pairs.neighbour[250]) == (250, 11)
    found = pairs.to_dict()
    assert found["max_cosine"]["near_duplicates"] == pytest.approx(2 / 300)
    assert found["chance"]["isotropic"]["near_duplicates"] == found["chance"]["covariance"]["near_duplicates"] == 0


def test_decoders_in_half_precision_are_compared_in_float32():
    W_dec = decoder(20, 6).bfloat16()
    assert max_cosine(W_dec).dtype == torch.float32
    assert mmcs(W_dec) == pytest.approx(mmcs(W_dec.float()))


def test_a_lone_latent_and_a_zero_row():
    lone = compare_pairs(E1[None], torch.zeros(1))
    assert math.isnan(lone.mmcs)
    assert math.isnan(lone.lawson2024)
    assert lone.neighbour.tolist() == [-1]
    assert lone.depth is not None
    assert math.isnan(lone.depth.chance_mean)
    assert compare_pairs(torch.stack([E1, 0 * E1, -E1])).max_cosine.tolist() == [0, 0, 0]


# ---- chance ----------------------------------------------------------------------------------------------------------


def test_a_random_decoder_is_what_chance_gives():
    """Four standard errors: one decoder in 16,000 would fail, and this one is fixed."""
    W_dec = decoder(1500, 24, seed=7)
    ours, isotropic = Maxima.of(max_cosine(W_dec)), chance(W_dec, seed=1).isotropic
    assert abs(ours.mean - isotropic.mean) < 4 * math.hypot(ours.sem, isotropic.sem)
    assert ours.std == pytest.approx(isotropic.std, rel=0.15)


def test_rows_in_a_subspace_are_nearer_by_chance_and_only_one_null_knows():
    W_dec = decoder(600, 32, seed=3)
    W_dec[:, 4:] *= 0.02
    ours, null = Maxima.of(max_cosine(W_dec)), chance(W_dec, seed=1)
    assert null.isotropic.mean < 0.75 < null.covariance.mean
    assert abs(ours.mean - null.covariance.mean) < 0.01


def test_rows_around_one_direction_are_nearer_by_chance():
    W_dec = decoder(300, 32, seed=5) + torch.eye(32, dtype=torch.float64)[0] * 12
    assert abs(mmcs(W_dec) - chance(W_dec, seed=1).covariance.mean) < 0.02


def test_chance_depends_on_the_seed_alone():
    W_dec = decoder(50, 8)
    assert chance(W_dec, seed=3) == chance(W_dec, seed=3) != chance(W_dec, seed=4)


# ---- depth -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_gap", [5.0, 2.0])
def test_cosines_by_depth_are_those_of_pairs_of_used_latents(max_gap: float):
    W_dec, centre = decoder(d_model=40), centres()
    depth = compare_pairs(W_dec, centre, max_gap=max_gap, block=10).depth
    assert depth is not None
    used = ~centre.isnan().numpy()
    mu = centre.numpy()[used]
    cosine, gap = each_pair(cosine_table(W_dec)[np.ix_(used, used)]), each_pair(abs(mu[:, None] - mu))
    limits = (0, max_gap), (-0.25, 0.25)
    np.testing.assert_array_equal(depth.histogram, np.histogram2d(gap, cosine, (64, 512), limits)[0])
    n_pairs, sums = (np.histogram(gap, 64, (0, max_gap), weights=w)[0] for w in (None, cosine))
    np.testing.assert_array_equal(depth.n_pairs, n_pairs)
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(depth.mean, sums / n_pairs, rtol=1e-9)
    assert depth.n_beyond == (gap > max_gap).sum()
    assert depth.chance_mean == pytest.approx(cosine.mean(), rel=1e-9)
    assert depth.n_pairs[-1] > 0 or max_gap != 5  # the gap from end to end is on the axis


def test_chance_of_depth_is_that_of_all_permutations():
    """All 720 ways to deal six centres out: their mean and standard deviation are what is computed without a draw."""
    W_dec, centre = decoder(6, 3), torch.tensor([0.0, 0.5, 1.4, 2.0, 2.0, 5.0], dtype=torch.float64)
    depth = compare_pairs(W_dec, centre).depth
    assert depth is not None
    orders = itertools.permutations(range(6))
    means = torch.stack([compare_at(W_dec, centre[list(order)]) for order in orders])  # [order, gap]
    filled = depth.n_pairs > 0
    torch.testing.assert_close(means[:, filled].mean(0), torch.full_like(depth.mean[filled], depth.chance_mean))
    torch.testing.assert_close(means[:, filled].std(0, correction=0), depth.chance_std[filled])
    assert depth.chance_std[~filled].isnan().all()


def compare_at(W_dec: Tensor, centre: Tensor) -> Tensor:
    """Mean cosine of each gap, by numpy."""
    cosine, gap = each_pair(cosine_table(W_dec)), each_pair(abs(centre[:, None] - centre).numpy())
    n, total = (np.histogram(gap, 64, (0, 5), weights=w)[0] for w in (None, cosine))
    return torch.from_numpy(np.divide(total, n, out=np.full(64, np.nan), where=n > 0))


def test_permuted_centres_are_flat_and_planted_ones_are_not():
    """Latents that turn slowly with depth: near in depth is near in direction, until the centres are dealt out anew."""
    centre = torch.linspace(0, 5, 400, dtype=torch.float64)
    planted = torch.stack([centre.cos(), centre.sin()], dim=1)
    W_dec = torch.cat([planted, decoder(400, 10)], dim=1)

    def scores(centre: Tensor) -> Tensor:
        depth = compare_pairs(W_dec, centre).depth
        assert depth is not None
        return (depth.mean - depth.chance_mean) / depth.chance_std

    assert scores(centre)[:5].min() > 6
    shuffled = scores(centre[torch.randperm(400, generator=torch.Generator().manual_seed(0))])
    assert shuffled.abs().max() < 4
    assert shuffled.square().mean().sqrt() == pytest.approx(1, abs=0.4)


# ---- the rest --------------------------------------------------------------------------------------------------------


def test_dictionaries_are_json():
    pairs = json.loads(json.dumps(compare_pairs(decoder(), centres()).to_dict()))
    assert len(pairs["histogram"]) == 100
    assert sum(pairs["histogram"]) == 37 * 36 // 2
    assert len(pairs["depth"]["mean"]) == 64
    assert compare_pairs(decoder()).to_dict()["depth"] is None


def test_what_cannot_be_compared():
    with pytest.raises(NumericsError, match="directions: hold NaN"):
        compare_pairs(torch.stack([E1, E2 / 0]))
    with pytest.raises(ConfigError, match="centre_of_mass: 3 given for 2 latents"):
        compare_pairs(torch.stack([E1, E2]), torch.zeros(3))
    with pytest.raises(ConfigError, match="max_gap: 0"):
        compare_pairs(torch.stack([E1, E2]), torch.zeros(2), max_gap=0.0)
