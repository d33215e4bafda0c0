"""Intervals over documents: against textbook cases, and how often they hold the truth."""

import math
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats

from mlsae.errors import DataError
from mlsae.intervals import N_SHARDS, check_shards, estimate, jackknife, shard_of

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from interval_coverage import coverage

torch.set_num_threads(1)


def draws(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 3


def without(x: torch.Tensor, statistic) -> torch.Tensor:
    return torch.stack([statistic(torch.cat([x[:i], x[i + 1 :]])) for i in range(len(x))])


def test_of_a_mean_it_is_the_interval_of_students_t():
    x = draws(20)
    found = jackknife(x.mean(), without(x, torch.mean))
    want = stats.t.interval(0.95, 19, loc=x.mean().item(), scale=x.std().item() / math.sqrt(20))
    assert (found.low.item(), found.high.item()) == pytest.approx(want)


def test_it_takes_the_bias_out_of_a_square():
    """mean(x)^2 is too large by var(x) / n, exactly what the centre of the interval is lower."""
    x = draws(20)
    found = jackknife(x.mean() ** 2, without(x, lambda part: part.mean() ** 2))
    assert (found.low + found.high).item() / 2 == pytest.approx((x.mean() ** 2 - x.var() / 20).item())


def test_sums_by_shard_are_left_out_one_at_a_time():
    x = draws(60)
    shard = shard_of(torch.arange(60), 10)
    sums = {
        "sum": torch.zeros(12, dtype=torch.float64).index_add_(0, shard, x),
        "n": torch.bincount(shard, minlength=12),
    }
    found = estimate(sums, sums["n"], lambda total: total["sum"] / total["n"])
    want = jackknife(x.mean(), torch.stack([x[shard != s].mean() for s in range(10)]))
    assert (found.low.item(), found.high.item()) == pytest.approx((want.low.item(), want.high.item()))


def test_numbers_keep_their_shape_in_json():
    found = jackknife(torch.zeros(2, 1), torch.zeros(6, 2, 1))
    assert found.to_dict() == [[{"value": 0, "ci95": [0, 0]}]] * 2


def test_too_few_documents_say_nothing():
    found = jackknife(torch.ones(()), torch.ones(4))
    assert found.value == 1
    assert found.low.isnan()
    assert found.high.isnan()


def test_what_is_undefined_without_some_documents_has_no_interval():
    found = jackknife(torch.ones(2), torch.tensor([[1.0, math.nan]] + [[1.0, 1.0]] * 6))
    assert found.low.isnan().tolist() == [False, True]


def test_a_shard_per_token_is_required_and_bounded():
    assert check_shards(None, 3, 1).tolist() == [0, 0, 0]
    for wrong, message in ((torch.zeros(2, dtype=torch.int64), "there are 3"), (torch.tensor([0, 1, -1]), "-1 to 1")):
        with pytest.raises(DataError, match=message):
            check_shards(wrong, 3, N_SHARDS)


@pytest.mark.slow
def test_they_hold_the_truth_as_often_as_they_say():
    found = coverage("jackknife of documents", n_draws=300, n_documents=200)
    assert all(0.91 <= share <= 0.98 for name, share in found.items() if not name.startswith("distribution")), found


def test_they_hold_the_truth_far_more_often_than_if_tokens_were_independent():
    """400 draws are needed to tell 93 from 97 %; 16 tell 95 from the 30 % of intervals that forget what documents are."""
    by_documents, by_tokens = (coverage(f"jackknife of {unit}", 16, 100, 10_000) for unit in ("documents", "tokens"))
    name = "decomposition.mass.token"
    assert by_documents[name] >= 0.85
    assert by_tokens[name] <= 0.6
