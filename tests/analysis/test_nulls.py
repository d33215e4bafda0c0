"""What the nulls keep of a code, and what they leave to chance."""

import pytest
import torch

from mlsae.analysis.layers import LayerStatistics, PlainCode
from mlsae.analysis.nulls import NULLS, NullStatistics

torch.set_num_threads(1)


def planted_run(n_tokens: int = 4000, rate: float = 0.2) -> PlainCode:
    """One latent on layers 2, 3 and 4 of the same tokens, and a second on all six of others."""
    on = torch.rand(n_tokens, 2, generator=torch.Generator().manual_seed(0)) < rate
    values = on.float().expand(6, -1, -1).clone()
    values[[0, 1, 5], :, 0] = 0
    return PlainCode(values, torch.arange(2).expand(6, n_tokens, 2))


def statistics(code: PlainCode) -> LayerStatistics:
    result = LayerStatistics(6, 2)
    result.update(code)
    return result


def redrawn(name: str, code: PlainCode) -> LayerStatistics:
    return statistics(NULLS[name](code, torch.Generator().manual_seed(1)))


def test_independence_keeps_every_rate_and_makes_coincidence_chance():
    code = planted_run()
    before, after = statistics(code), redrawn("independent", code)
    assert torch.equal(after.counts, before.counts)
    assert torch.equal(after.totals, before.totals)
    assert before.persistence()[2:4, 0].tolist() == [1, 1]
    assert after.persistence()[2:4, 0].tolist() == pytest.approx([0.2, 0.2], abs=0.05)
    # three independent layers of rate 0.2, given that one is on: 1 + 2 * 0.2 layers on average, weighing every activation
    rate = before.counts[2, 0].item() / before.n_tokens
    sizes = after.counts[:, 0].sum().item() / after.n_events[0].item()
    assert sizes == pytest.approx(3 * rate / (1 - (1 - rate) ** 3), rel=0.03)


def test_shuffled_layers_keep_every_event_and_spread_it_over_all_depths():
    code = planted_run()
    before, after = statistics(code), redrawn("shuffled_layers", code)
    assert torch.equal(after.active_layers, before.active_layers)
    assert torch.equal(after.n_events, before.n_events)
    homes = after.distribution().probability[:, 0]
    assert homes.tolist() == pytest.approx([1 / 6] * 6, abs=0.02)
    assert after.decomposition().latent == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("name", NULLS)
def test_values_stay_with_their_latents(name):
    values = torch.rand(6, 50, 3, generator=torch.Generator().manual_seed(2))
    indices = torch.rand(6, 50, 9, generator=torch.Generator().manual_seed(3)).topk(3).indices
    got = NULLS[name](PlainCode(values, indices), torch.Generator().manual_seed(4))
    assert not torch.equal(got.values, values)
    pairs = [
        sorted(zip(x.values.flatten().tolist(), x.indices.flatten().tolist()))
        for x in (got, PlainCode(values, indices))
    ]
    assert pairs[0] == pairs[1]


def test_a_batch_is_redrawn_alike_whatever_came_before_it_and_no_two_batches_are():
    parts = {position: planted_run(60 + position) for position in (3, 4, 11)}
    orders = []
    for order in ((3, 4, 11), (11, 3, 4)):
        nulls = NullStatistics(6, 2)
        for position in order:
            nulls.update(parts[position], position)
        orders.append(nulls)
    apart = [NullStatistics(6, 2) for _ in parts]
    for nulls, position in zip(apart, parts, strict=True):
        nulls.update(parts[position], position)
    for nulls in apart[1:]:
        apart[0].merge(nulls)
    again = NullStatistics(6, 2)
    again.update(parts[3], 4)
    first = NullStatistics(6, 2)
    first.update(parts[3], 3)
    for name in NULLS:
        for attribute in ("active_layers", "runs", "first_layer", "counts"):
            found = [getattr(nulls.statistics[name], attribute) for nulls in (*orders, apart[0])]
            assert torch.equal(found[0], found[1])
            assert torch.equal(found[0], found[2])
        assert not torch.equal(first.statistics[name].first_layer, again.statistics[name].first_layer)


def test_the_same_seed_draws_the_same_nulls():
    first, second, other = NullStatistics(6, 2), NullStatistics(6, 2), NullStatistics(6, 2, seed=1)
    for nulls in (first, second, other):
        nulls.update(planted_run(100), 0)
    for name in NULLS:
        assert torch.equal(first.statistics[name].active_layers, second.statistics[name].active_layers)
    assert not torch.equal(first.statistics["independent"].runs, other.statistics["independent"].runs)
