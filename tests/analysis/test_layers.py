"""Depth statistics: planted latents whose answers are known, laws, and a dense brute force beside the sparse sums."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mlsae.analysis.depth import Decomposition
from mlsae.analysis.layers import WEIGHTS, LayerStatistics
from mlsae.errors import ConfigError, DataError, ModelError, NumericsError
from mlsae.intervals import jackknife
from mlsae.ops import cpu

torch.set_num_threads(1)


@pytest.fixture(autouse=True, params=["cpu", "reference"])
def impl(request, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every law holds for the C++ and for NumPy."""
    if request.param == "cpu" and (why := cpu.missing()) is not None:
        pytest.skip(why)
    if request.param == "reference":
        monkeypatch.setattr(cpu, "missing", lambda: "not wanted here")
    return request.param


EXACT = {"rel": 1e-12, "abs": 1e-12}


@dataclass(frozen=True)
class Code:
    """The two fields of mlsae.sae.Code that the statistics read."""

    values: Tensor
    indices: Tensor


def sparse(dense: Tensor) -> Code:
    """The code of dense activations [layer, token, latent], with k as large as it takes."""
    k = max(1, int((dense > 0).sum(-1).max())) if dense.numel() else 1
    return Code(*dense.topk(k))


def statistics(dense: Tensor, sequence: Tensor | None = None) -> LayerStatistics:
    """One update with dense activations [layer, token, latent]."""
    result = LayerStatistics(dense.shape[0], dense.shape[2])
    result.update(sparse(dense), sequence)
    return result


def random_dense(seed: int, n_layers: int = 5, n_tokens: int = 40, n_latents: int = 9) -> Tensor:
    """Random activations, about a third of them active, float64."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(n_layers, n_tokens, n_latents, generator=generator, dtype=torch.float64)
    return (dense - torch.rand(n_latents, generator=generator)).relu()


def assert_same(got: LayerStatistics, want: LayerStatistics, rtol: float = 1e-12) -> None:
    for name, total in got.by_shard.items():
        torch.testing.assert_close(total, want.by_shard[name], rtol=rtol, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def terms(result: Decomposition) -> tuple[float, ...]:
    return result.within, result.token, result.latent, result.total


# ---- planted latents -----------------------------------------------------------------------------------------------


def planted(windows: list[list[int]], moving: bool = False, n_layers: int = 6, n_tokens: int = 3000) -> Tensor:
    """Latents that fire at z = 1 on one token in 50: latent j on windows[j], or on each window in turn."""
    n_latents = 1 if moving else len(windows)
    dense = torch.zeros(n_layers, n_tokens, n_latents)
    for i, token in enumerate(range(0, n_tokens, 50)):
        for latent in range(n_latents):
            dense[windows[i % len(windows) if moving else latent], token + latent, latent] = 1
    return dense


def runs(length: int) -> list[list[int]]:
    return [list(range(first, first + length)) for first in range(7 - length)]


NAN = math.nan
PLANTED = {
    "one fixed layer each": (runs(1), False, (0, 0, 35 / 12, 0, NAN), (154 / 155, 0), 0),
    "one layer per token": (runs(1), True, (0, 35 / 12, 0, 1, 0), (1, 0), 0),
    "same two adjacent layers": (runs(2), False, (1 / 4, 0, 2, 1 / 9, 1), (0.9952, 0.0300), 0.0176),
    "same three adjacent layers": (runs(3), False, (2 / 3, 0, 5 / 4, 8 / 23, 1), (0.9969, 0.0832), 0.0480),
    "two adjacent layers, moving": (runs(2), True, (1 / 4, 2, 0, 1, 1 / 9), (1, 0.0299), 0.0175),
    "all layers": (runs(6), False, (35 / 12, 0, 0, 1, 1), (1, 0.3226), 0.1955),
}
each_planted = pytest.mark.parametrize(
    ("windows", "moving", "ours", "published", "from_one"), PLANTED.values(), ids=PLANTED
)


@each_planted
@pytest.mark.parametrize("weight", WEIGHTS)
def test_planted_latents_read_as_planted(windows, moving, ours, published, from_one, weight):
    got = statistics(planted(windows, moving)).decomposition(weight)
    assert [got.within, got.token, got.latent, got.rel_f, got.rel_t] == pytest.approx(list(ours), nan_ok=True, **EXACT)


@each_planted
def test_published_ratios_of_planted_latents(windows, moving, ours, published, from_one):
    got = statistics(planted(windows, moving)).lawson2024()
    assert (got.rel_f, got.rel_t) == pytest.approx(published, abs=5.1e-5)


@each_planted
def test_numbering_layers_from_one_changes_only_the_published_ratio(windows, moving, ours, published, from_one):
    """A silent layer below all others numbers them 1..6."""
    dense = planted(windows, moving)
    counted, shifted = statistics(dense), statistics(torch.cat([torch.zeros_like(dense[:1]), dense]))
    assert terms(shifted.decomposition()) == pytest.approx(terms(counted.decomposition()), **EXACT)
    assert shifted.lawson2024().rel_t == pytest.approx(from_one, abs=5.1e-5)


def test_the_published_ratio_falls_with_depth_for_a_latent_that_never_moves():
    for n_layers, length, want in ((12, 2, 0.0063), (24, 2, 0.0014), (12, 3, 0.0174), (24, 3, 0.0039)):
        windows = [list(range(i, i + length)) for i in range(n_layers - length + 1)]
        got = statistics(planted(windows, n_layers=n_layers))
        assert got.lawson2024().rel_t == pytest.approx(want, abs=5.1e-5)
        assert got.decomposition().rel_t == 1


def test_terms_that_are_zero_are_exactly_zero():
    """Single-layer events and single-layer latents leave no rounding behind, so 0/0 is NaN and not noise."""
    dense = torch.zeros(7, 500, 7, dtype=torch.float64)
    for layer in range(7):
        dense[layer, :, layer] = torch.rand(500, generator=torch.Generator().manual_seed(layer), dtype=torch.float64)
    for weight in WEIGHTS:
        got = statistics(dense).decomposition(weight)
        assert (got.within, got.token, got.rel_f) == (0, 0, 0)
        assert math.isnan(got.rel_t)
        one_layer = statistics(dense[:, :, :1]).decomposition(weight)
        assert terms(one_layer) == (0, 0, 0, 0)
        assert math.isnan(one_layer.rel_f)


def test_rounding_does_not_grow_with_the_number_of_updates():
    """A latent with the same shares at every token never moves, in the 200,000th event as in the first."""
    result, generator = LayerStatistics(3, 1), torch.Generator().manual_seed(0)
    for _ in range(10):
        z = torch.rand(1, 20_000, 1, generator=generator)
        result.update(Code(torch.cat([z, 2 * z, z / 2]), torch.zeros(3, 20_000, 1, dtype=torch.int64)))
    for weight in WEIGHTS:
        assert result.decomposition(weight).token == 0
        assert result.decomposition(weight).rel_t == 1


# ---- distributions -------------------------------------------------------------------------------------------------


def with_totals(totals: list[float], counts: list[int] | None = None) -> LayerStatistics:
    """One latent with these totals (and counts) at each layer."""
    result = LayerStatistics(len(totals), 1)
    result.totals[:, 0] = torch.tensor(totals)
    result.counts[:, 0] = torch.tensor(counts or [int(t > 0) for t in totals])
    return result


def test_a_distribution_worked_by_hand():
    got = with_totals([1, 0, 3]).distribution()
    assert got.probability[:, 0].tolist() == [0.25, 0, 0.75]
    assert got.centre_of_mass.item() == 1.5
    assert got.variance.item() == 0.75
    assert got.entropy.item() == pytest.approx(0.56234, abs=5e-6)
    assert got.effective_layers.item() == pytest.approx(1.75477, abs=5e-6)
    assert got.n_active_layers.item() == 2


def test_a_published_row():
    """Row 0 of the dataset tim-lawson/mlsae-gpt2-x64-k32-dists."""
    totals = [43.93689, 0, 10.70555, 9.94031, 3.87512, 10.33491, 17.14882, 4.01866, 6.60453, 19.44759, 37.76560, 0]
    counts = [40, 0, 9, 8, 3, 8, 12, 3, 4, 12, 27, 0]
    dense = torch.zeros(12, 40, 1, dtype=torch.float64)
    for layer, (total, count) in enumerate(zip(totals, counts, strict=True)):
        dense[layer, :count] = total / max(count, 1)
    result = statistics(dense)
    got = result.distribution()
    assert result.counts[:, 0].tolist() == counts
    assert result.counts.sum() == 126
    assert (result.totals.sum() / result.counts.sum()).item() == pytest.approx(1.299825, abs=1e-5)
    assert got.centre_of_mass.item() == pytest.approx(5.220183, abs=1e-5)
    assert got.variance.item() == pytest.approx(15.743475, abs=1e-4)
    assert got.std.item() == pytest.approx(3.967805, abs=1e-5)
    assert got.n_active_layers.item() == 10


@pytest.mark.parametrize(
    ("heights", "want"), [([1] * 6, 0.578), ([1, 2, 3, 3, 2, 1], 0.446), ([1, 1, 0, 0], 1), ([1, 0, 0, 5], 1)]
)
def test_bimodality(heights, want):
    assert with_totals(heights).distribution().bimodality.item() == pytest.approx(want, abs=5e-4)


def test_uniform_over_layers():
    got = with_totals([2.5] * 8).distribution()
    assert got.variance.item() == pytest.approx((8**2 - 1) / 12)
    assert got.effective_layers.item() == pytest.approx(8)


def test_a_layer_is_active_from_one_percent_of_the_counts():
    assert with_totals([1] * 4, [981, 10, 9, 0]).distribution().n_active_layers.item() == 2
    assert with_totals([1, 1, 0], [1, 3, 0]).distribution().n_active_layers.item() == 2


def test_unused_latents_are_nan_and_left_out_of_the_summary():
    dense = random_dense(0)
    empty = torch.cat([dense, torch.zeros_like(dense[..., :3])], dim=-1)
    got, want = statistics(empty).distribution(), statistics(dense).distribution()
    assert got.n_unused == 3
    assert got.std[-3:].isnan().all()
    assert got.n_active_layers[-3:].tolist() == [0, 0, 0]
    assert replace(got.summary(), n_unused=0) == want.summary()


def test_the_summary_is_mean_std_and_sem_and_json():
    got = statistics(random_dense(1)).distribution()
    summary, std = got.summary(), got.std.numpy()
    want = {"mean": std.mean(), "std": std.std(ddof=1), "sem": std.std(ddof=1) / 3}
    assert summary.to_dict()["std"] == pytest.approx(want)
    assert summary.relative_std.mean == pytest.approx(std.mean() / 5)
    assert json.loads(json.dumps(summary.to_dict())) == summary.to_dict()


def test_nothing_seen_is_nan_without_a_warning():
    empty = LayerStatistics(3, 4)
    assert math.isnan(empty.distribution().summary().std.mean)
    assert all(math.isnan(term) for term in terms(empty.decomposition()))
    assert math.isnan(empty.lawson2024().rel_f)
    assert empty.density().isnan().all()
    assert empty.unused_fraction().tolist() == [1, 1, 1]


# ---- brute force ---------------------------------------------------------------------------------------------------


def weights_of(z: np.ndarray, weight: str) -> np.ndarray:
    if weight == "mass":
        return z
    return (z > 0).astype(float) if weight == "count" else z / np.where(z.sum(0) > 0, z.sum(0), 1)


def brute_force(z: np.ndarray, weight: str) -> tuple[float, ...]:
    """The law of total variance on the joint distribution [layer, token, latent], term by term."""
    p = weights_of(z, weight) / weights_of(z, weight).sum()
    layer = np.arange(len(z))[:, None, None]
    pair, one = p.sum(0), p.sum((0, 1))  # P(t, j), P(j)
    mean_pair = (layer * p).sum(0) / np.where(pair > 0, pair, 1)
    mean_one = (pair * mean_pair).sum(0) / np.where(one > 0, one, 1)
    mean = (one * mean_one).sum()
    within = (p * (layer - mean_pair) ** 2).sum()
    token = (pair * (mean_pair - mean_one) ** 2).sum()
    return within, token, (one * (mean_one - mean) ** 2).sum(), (p * (layer - mean) ** 2).sum()


def published_brute_force(z: np.ndarray) -> tuple[float, float]:
    """The published ratios of one sequence, with every mean taken on the dense array."""
    p, layer = weights_of(z, "event"), np.arange(len(z))

    def second_moment(q):
        return np.tensordot(layer**2, q, 1) - np.tensordot(layer, q, 1) ** 2

    e_f, e_tf = second_moment(p.mean(1)).mean(), second_moment(p).mean()
    return e_f / second_moment(p.mean((1, 2))), e_tf / e_f


@pytest.mark.parametrize("seed", range(50))
def test_equals_brute_force(seed):
    sizes = np.random.default_rng(seed).integers(1, (9, 60, 12))
    dense = random_dense(seed, *map(int, sizes))
    dense[0, 0, 0] = 1.0  # at least one event
    result = statistics(dense)
    for weight in WEIGHTS:
        got = result.decomposition(weight)
        assert terms(got) == pytest.approx(brute_force(dense.numpy(), weight), **EXACT)
        assert min(terms(got)) >= 0
        assert got.within + got.token + got.latent == pytest.approx(got.total, **EXACT)


@pytest.mark.parametrize("seed", range(5))
def test_published_ratios_equal_brute_force_averaged_over_sequences(seed):
    dense = random_dense(seed, n_tokens=50)
    sequence = torch.arange(50) // 20  # 20, 20 and 10 tokens
    want = np.mean([published_brute_force(dense[:, sequence == i].numpy()) for i in range(3)], axis=0)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(seed))
    for got in (statistics(dense, sequence), statistics(dense[:, order], sequence[order] + 7)):
        assert (got.lawson2024().rel_f, got.lawson2024().rel_t) == pytest.approx(tuple(want), rel=1e-12)


def test_a_sequence_without_a_published_ratio_is_left_out():
    dense = random_dense(0, n_tokens=20)
    silent = torch.cat([dense, torch.zeros_like(dense)], dim=1)
    assert statistics(silent, torch.arange(40) // 20).lawson2024() == statistics(dense).lawson2024()


def test_event_shapes_by_hand():
    dense = torch.zeros(6, 3, 2)
    for token, latent, layers in ((0, 0, [0, 1, 3]), (0, 1, [4]), (1, 0, [1, 3, 4, 5]), (2, 1, [5])):
        dense[layers, token, latent] = 1
    got = statistics(dense)
    assert got.active_layers.tolist() == [2, 0, 1, 1, 0, 0]
    assert got.longest_run.tolist() == [2, 1, 1, 0, 0, 0]
    assert got.runs.tolist() == [4, 1, 1, 0, 0, 0]
    assert got.first_layer.tolist() == [1, 1, 0, 0, 1, 1]
    assert got.last_layer.tolist() == [0, 0, 0, 1, 1, 2]
    assert got.n_events.tolist() == [2, 2]
    assert got.effective_layers.tolist() == pytest.approx([3 + 4, 1 + 1])
    assert got.persisted[:, 0].tolist() == [1, 0, 0, 1, 1, 0]
    torch.testing.assert_close(got.persistence()[:, 0], torch.tensor([1, 0, NAN, 0.5, 1]).double(), equal_nan=True)
    assert got.n_tokens == 3


def test_density_and_unused_fraction_by_hand():
    dense = torch.zeros(2, 4, 2)
    dense[0, :3, 0] = 1
    got = statistics(dense)
    assert got.density().tolist() == [[0.75, 0], [0, 0]]
    assert got.unused_fraction().tolist() == [0.5, 1]


# ---- laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", WEIGHTS)
def test_what_changes_no_decomposition(weight):
    dense = random_dense(3)
    silent = torch.zeros_like(dense[:2])
    order = torch.randperm(dense.shape[1], generator=torch.Generator().manual_seed(0))
    want = terms(statistics(dense).decomposition(weight))
    changed = {
        "layer offset": torch.cat([silent, dense]),
        "layers reversed": dense.flip(0),
        "token order": dense[:, order],
        "data twice": torch.cat([dense, dense], dim=1),
        "latents permuted": dense.flip(2),
        "all activations scaled": dense * 37.5,
    }
    for name, other in changed.items():
        assert terms(statistics(other).decomposition(weight)) == pytest.approx(want, **EXACT), name


def test_scaling_an_event_changes_mass_but_neither_event_nor_count():
    dense = random_dense(4)
    scale = 0.1 + torch.rand(dense.shape[1:], generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 9
    before, after = statistics(dense), statistics(dense * scale)
    for weight in ("event", "count"):
        want = terms(before.decomposition(weight))
        assert terms(after.decomposition(weight)) == pytest.approx(want, **EXACT)
    assert terms(after.decomposition("mass")) != pytest.approx(terms(before.decomposition("mass")), rel=1e-3)


@pytest.mark.parametrize("cuts", [[20], [0, 1, 39], list(range(1, 40))])
def test_batch_split_and_shard_merge_are_one_update(cuts):
    dense = random_dense(5)
    split, merged = LayerStatistics(5, 9), LayerStatistics(5, 9)
    for part in dense.tensor_split(cuts, dim=1):
        sequence = torch.zeros(part.shape[1], dtype=torch.int64)
        split.update(sparse(part), sequence)
        merged = merged.merge(statistics(part, sequence))
    assert_same(split, merged)
    whole = statistics(dense)
    for name in ("published", "sequences"):  # a sequence cut in two is two sequences
        split.by_shard[name].copy_(whole.by_shard[name])
    assert_same(split, whole)


def test_permuting_latents_permutes_every_sum_by_latent():
    dense = random_dense(6)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    got, want = statistics(dense[..., order]), statistics(dense)
    for name, total in want.by_shard.items():
        expected = total[..., order] if total.shape[-1:] == (9,) else total
        torch.testing.assert_close(got.by_shard[name], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("n_layers", "n_latents", "k"), [(1, 3, 3), (5, 9, 4), (30, 200, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ways_add_up_the_same(n_layers, n_latents, k, dtype):
    generator = torch.Generator().manual_seed(n_layers)
    indices = torch.rand(n_layers, 300, n_latents, generator=generator).topk(k).indices
    values = torch.rand(n_layers, 300, k, generator=generator).to(dtype) - 0.2
    found = []
    for how in ("cpu", "reference"):
        found.append(LayerStatistics(n_layers, n_latents, 7))
        for at in (slice(0, 120), slice(120, 300)):
            code = Code(values[:, at].relu(), indices[:, at])
            token = torch.arange(at.start, at.stop)
            found[-1].update(code, sequence=token // 60, shard=token // 13 % 7, impl=how)
    assert_same(*found)


def test_a_latent_named_twice_by_one_vector_is_an_error():
    twice = Code(torch.ones(2, 3, 2), torch.zeros(2, 3, 2, dtype=torch.int64))
    with pytest.raises(AssertionError, match="names the same latent twice"):
        LayerStatistics(2, 4).update(twice)


def test_the_same_codes_give_the_same_bits():
    assert_same(statistics(random_dense(7)), statistics(random_dense(7)), rtol=0)


def test_one_layer_has_no_variance():
    for weight in WEIGHTS:
        got = statistics(random_dense(8, n_layers=1)).decomposition(weight)
        assert terms(got) == (0, 0, 0, 0)
        assert math.isnan(got.rel_f)
        assert math.isnan(got.rel_t)


def test_selected_but_inactive_latents_are_never_counted():
    """Top-k pads with zeros when fewer than k latents are positive: those are no activations."""
    dense = random_dense(9)
    padded = Code(*dense.topk(9))
    assert (padded.values == 0).any()
    got = LayerStatistics(5, 9)
    got.update(padded)
    assert_same(got, statistics(dense))
    assert got.counts.sum() == (dense > 0).sum()
    nothing = statistics(torch.zeros(5, 4, 9))
    assert nothing.n_tokens == 4
    assert not any(total.any() for name, total in nothing.by_shard.items() if name != "tokens")


def test_no_tokens_change_nothing():
    result = statistics(random_dense(10))
    before = {name: total.clone() for name, total in result.by_shard.items()}
    result.update(Code(torch.zeros(5, 0, 4), torch.zeros(5, 0, 4, dtype=torch.int64)))
    assert all(torch.equal(total, before[name]) for name, total in result.by_shard.items())


def test_counts_are_exact_where_float32_stops_counting():
    once, many = statistics(torch.ones(2, 1, 1)), LayerStatistics(2, 1)
    many.by_shard["counts"] += 2**24
    many.by_shard["n_events"] += 2**53
    merged = once.merge(many).merge(once)
    assert merged.counts.tolist() == [[2**24 + 2]] * 2
    assert merged.n_events.tolist() == [2**53 + 2]


def test_half_precision_codes_are_summed_in_float64():
    dense = torch.full((2, 5000, 1), 1.0, dtype=torch.bfloat16)
    assert statistics(dense).totals.tolist() == [[5000.0], [5000.0]]


@pytest.mark.parametrize("seed", range(10))
def test_what_is_kept_of_events_equals_brute_force(seed):
    """Runs, persistence and effective layers, event by event on the dense array."""
    dense = random_dense(seed)
    got, on = statistics(dense), (dense > 0).numpy()
    runs, longest, effective = np.zeros(6, int), np.zeros(6, int), np.zeros(9)
    for token in range(40):
        for latent in np.flatnonzero(on[:, token].any(0)):
            lengths = [len(run) for run in "".join("01"[int(x)] for x in on[:, token, latent]).split("0") if run]
            runs += np.bincount(lengths, minlength=6)
            longest[max(lengths)] += 1
            effective[latent] += math.exp(
                torch.special.entr(dense[:, token, latent] / dense[:, token, latent].sum()).sum()
            )
    assert (got.runs.tolist(), got.longest_run.tolist()) == (runs[1:].tolist(), longest[1:].tolist())
    assert got.effective_layers.numpy() == pytest.approx(effective)
    assert got.persisted[:-1].tolist() == (on[:-1] & on[1:]).sum(1).tolist()


# ---- shards of documents -------------------------------------------------------------------------------------------


def sharded(dense: Tensor, shard: Tensor, n_shards: int = 7) -> LayerStatistics:
    result = LayerStatistics(dense.shape[0], dense.shape[2], n_shards)
    result.update(sparse(dense), shard=shard)
    return result


def test_shards_add_up_to_the_whole():
    dense, shard = random_dense(20), torch.randint(7, (40,), generator=torch.Generator().manual_seed(0))
    got, want = sharded(dense, shard), statistics(dense)
    assert_same(got.whole(), want)
    for weight in WEIGHTS:
        assert terms(got.decomposition(weight)) == pytest.approx(terms(want.decomposition(weight)), **EXACT)
    for n in range(7):
        own = statistics(dense[:, shard == n], torch.zeros(int((shard == n).sum()), dtype=torch.int64))
        for name in ("totals", "counts", "within", "n_events", "runs", "tokens"):
            torch.testing.assert_close(got.by_shard[name][n], own.by_shard[name][0], rtol=1e-12, atol=1e-12)


def test_without_a_shard_is_the_statistics_of_the_other_documents():
    """Exactly nothing is left where the shard held all there was, so that no quotient of roundings is taken for a latent."""
    dense, shard = random_dense(21), torch.arange(40) % 7
    dense[:, shard != 3, 4] = 0
    rest = statistics(dense[:, shard != 3])
    left = sharded(dense, shard).without(3)
    for name in ("totals", "counts", "within", "n_events", "effective_layers", "runs", "tokens"):
        torch.testing.assert_close(left.by_shard[name], rest.by_shard[name], rtol=1e-12, atol=1e-12)
    assert (left.totals[:, 4] == 0).all()
    assert not left.distribution().used[4]


def test_intervals_come_from_documents_left_out():
    dense, shard = random_dense(22), torch.arange(40) % 7

    def numbers(found: LayerStatistics) -> dict[str, Tensor]:
        return {"mean": found.totals.sum(1) / found.n_tokens}

    found = sharded(dense, shard).estimates(numbers)["mean"]
    without = torch.stack([dense[:, shard != n].sum((1, 2)) / (shard != n).sum() for n in range(7)])
    want = jackknife(dense.sum((1, 2)) / 40, without)
    torch.testing.assert_close(torch.stack([found.low, found.high]), torch.stack([want.low, want.high]))
    assert ((found.low < found.value) & (found.value < found.high)).all()


# ---- planted lives -------------------------------------------------------------------------------------------------


def test_births_and_deaths_are_those_planted():
    """Among noise, well below 1 % of what a latent does at home, the first and last layer of at least 95 % are found exactly."""
    generator = torch.Generator().manual_seed(0)
    n_layers, n_tokens, n_latents = 12, 4000, 100
    birth = torch.randint(n_layers, (n_latents,), generator=generator)
    death = torch.minimum(birth + torch.randint(5, (n_latents,), generator=generator), torch.tensor(n_layers - 1))
    layer = torch.arange(n_layers)[:, None, None]
    alive = (layer >= birth) & (layer <= death)
    fires = torch.rand(1, n_tokens, n_latents, generator=generator) < 0.1
    holds = torch.rand(n_layers, n_tokens, n_latents, generator=generator) < 0.8
    noise = torch.rand(n_layers, n_tokens, n_latents, generator=generator) < 0.0001
    found = statistics(((alive & fires & holds) | noise).float()).distribution()
    assert (found.birth == birth).float().mean() >= 0.95
    assert (found.death == death).float().mean() >= 0.95
    assert (found.n_active_layers == death - birth + 1).float().mean() >= 0.95


def test_a_latent_with_two_homes():
    """At layer 1 on half of its tokens and at layer 4 on the others: bimodal, and all of its variance is over tokens."""
    dense = torch.zeros(6, 100, 1)
    dense[1, :50], dense[4, 50:] = 1, 1
    got, found = statistics(dense).decomposition(), statistics(dense).distribution()
    assert terms(got) == (0, 2.25, 0, 2.25)
    assert [found.bimodality.item(), found.centre_of_mass.item(), found.std.item()] == pytest.approx([1, 2.5, 1.5])
    assert [found.birth.item(), found.death.item(), found.n_active_layers.item()] == [1, 4, 2]
    assert statistics(dense).longest_run.tolist() == [100, 0, 0, 0, 0, 0]


def test_an_unused_latent_has_neither_birth_nor_death():
    dense = torch.zeros(3, 5, 2)
    dense[1, :, 1] = 1
    found = statistics(dense).distribution()
    assert (found.birth.tolist(), found.death.tolist()) == ([-1, 1], [-1, 1])


# ---- intervals of profiles -----------------------------------------------------------------------------------------


def of_shards(n_shards: int, n_used: int, seed: int = 14) -> LayerStatistics:
    """Random codes of which each token is of its own shard in turn."""
    result = LayerStatistics(5, 9, n_shards)
    result.update(sparse(random_dense(seed)), shard=torch.arange(40) % n_used)
    return result


@pytest.mark.parametrize("at_once", [1, 4, 9, 100])
def test_intervals_of_profiles_are_those_of_the_jackknife(at_once: int):
    result = of_shards(8, 6)
    want = result.estimates(lambda s: {"p": s.distribution().probability})["p"]
    low, high = result.profile_interval(latents_at_once=at_once)
    assert low.dtype == high.dtype == torch.float32
    assert torch.allclose(low.double(), want.low, atol=1e-6, equal_nan=True)
    assert torch.allclose(high.double(), want.high, atol=1e-6, equal_nan=True)
    assert (high > low).any()


def test_a_latent_of_one_shard_has_no_interval_and_too_few_shards_give_none():
    result = of_shards(8, 6)
    result.by_shard["totals"][1:, :, 3] = 0
    result._whole = {}
    low, high = result.profile_interval()
    assert low[:, 3].isnan().all()
    assert high[:, 3].isnan().all()
    assert not low[:, 4].isnan().any()
    assert of_shards(8, 4).profile_interval() is None
    assert LayerStatistics(5, 9, 8).profile_interval() is None


# ---- saving and refusing -------------------------------------------------------------------------------------------


def test_load_is_what_was_saved(tmp_path: Path):
    result = statistics(random_dense(11), torch.arange(40) // 7)
    result.save(tmp_path / "layers.safetensors")
    loaded = LayerStatistics.load(tmp_path / "layers.safetensors")
    assert all(torch.equal(total, loaded.by_shard[name]) for name, total in result.by_shard.items())
    loaded.update(sparse(random_dense(12)))
    result.update(sparse(random_dense(12)))
    assert_same(loaded, result, rtol=0)


def test_a_file_of_something_else_is_refused(tmp_path: Path):
    from mlsae.files import save_tensors

    path, sums = tmp_path / "x.safetensors", LayerStatistics(2, 3).by_shard
    for wrong in (
        {"W_dec": torch.zeros(3, 2)},
        {**sums, "counts": sums["counts"].float()},
        {**sums, "counts": torch.zeros(10**12, 0, dtype=torch.int64)},
        {**sums, "n_events": torch.zeros(1, 4, dtype=torch.int64)},
        {**sums, "counts": sums["counts"][0]},
        {name: total for name, total in sums.items() if name != "within"},
    ):
        save_tensors(path, wrong)
        with pytest.raises(ModelError, match=r"LayerStatistics\.save"):
            LayerStatistics.load(path)


def test_mistakes_are_refused_before_anything_is_counted():
    result, dense = LayerStatistics(5, 9), random_dense(13)
    code = sparse(dense)
    with pytest.raises(ModelError, match="has 4 layers; these statistics have n_layers=5"):
        result.update(sparse(dense[:4]))
    with pytest.raises(DataError, match="batch and pos flattened"):
        result.update(Code(code.values[:, None], code.indices[:, None]))
    with pytest.raises(ModelError, match=r"outside \[0, 9\)"):
        result.update(Code(code.values, code.indices + 1))
    with pytest.raises(NumericsError, match="NaN or infinity"):
        result.update(Code(code.values.log(), code.indices))
    with pytest.raises(DataError, match="of 3 tokens; the code holds 40"):
        result.update(code, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(DataError, match="of 3 tokens; there are 40"):
        result.update(code, shard=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(DataError, match="0 to 1 given; these sums hold 0 to 0"):
        result.update(code, shard=torch.arange(40) % 2)
    assert_same(result, LayerStatistics(5, 9), rtol=0)
    with pytest.raises(ConfigError, match="did you mean 'mass'"):
        result.decomposition("mas")
    with pytest.raises(ModelError, match=r"\(5, 10, 1\), this one \(5, 9, 1\)"):
        result.merge(LayerStatistics(5, 10))
