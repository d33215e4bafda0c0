"""One SAE over several processes: whatever the layout, the code, the losses and the weights are those of one process."""

import itertools
import os

import pytest
import torch

from mlsae import costs
from mlsae.config import MLSAEConfig, TrainerConfig
from mlsae.errors import ConfigError, DataError, MlsaeError
from mlsae.mesh import ALONE, Mesh, check_layout, open_mesh
from mlsae.ops import reference
from mlsae.parallel import SHARDED, ShardedSAE, make_sae
from mlsae.sae import MLSAE
from mlsae.trainer import Trainer
from ranks import free_port, gathered_rows, run_ranks

CPU = torch.device("cpu")
LAYOUTS = {2: ((1, 2), (2, 1)), 4: ((2, 2), (1, 4), (4, 1))}
"""(dp, tp) by the number of processes."""
D_MODEL, K, K_AUX = 16, 5, 4


def on_layouts(n, work, *args, layouts=None):
    """`work(mesh, *args)` on every rank of each layout of n processes: {layout: [by rank]}."""
    layouts = LAYOUTS[n] if layouts is None else layouts
    by_rank = run_ranks(n, _each_layout, layouts, [free_port() for _ in layouts], work, args)
    return {layout: [answers[i] for answers in by_rank] for i, layout in enumerate(layouts)}


def _each_layout(layouts, ports, work, args):
    answers = []
    for (dp, tp), port in zip(layouts, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)  # a new place to meet: a rank may be late in leaving the old one
        with open_mesh(dp, tp, CPU) as mesh:
            answers.append(work(mesh, *args))
    return answers


def new_sae(mesh, **changes):
    torch.manual_seed(1)
    config = {"layers": (0, 1, 2), "d_model": D_MODEL, "n_latents": 123, "k": K} | changes
    return make_sae(MLSAEConfig(**config), mesh)


def vectors(seed, n_tokens, n_layers=3):
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(n_layers, D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(99))
    return torch.einsum("ltd,lde->lte", torch.randn(n_layers, n_tokens, D_MODEL, generator=draw).relu(), mix)


# ---- the code --------------------------------------------------------------------------------------------------------


def whole_numbers(mesh, groups=1, impl="auto"):
    """A code of an SAE of which many pre-activations are equal: all are whole numbers, so no rounding tells them apart."""
    sae = new_sae(mesh, groups=groups, n_latents=41 * groups, frame="none")
    draw = torch.Generator().manual_seed(5)
    numbers = torch.randint(-1, 2, (41 * groups, D_MODEL), generator=draw).float()
    own = sae.latents() if isinstance(sae, ShardedSAE) else slice(None)
    sae.W_enc.data.copy_(numbers[own])
    sae.W_dec.data.copy_(numbers.flip(0)[own])
    resid = torch.randint(-1, 2, (3, 50, D_MODEL), generator=draw).float()
    code = sae.encode(resid, impl=impl)
    return code.values.detach(), code.indices, sae.decode(code, impl=impl).detach()


def active(values, indices):
    """The (value, latent) pairs of every vector, inactive ones left out, in one order."""
    pairs = zip(values.flatten(0, 1).tolist(), indices.flatten(0, 1).tolist(), strict=True)
    return [sorted((v, i) for v, i in zip(vs, ids, strict=True) if v > 0) for vs, ids in pairs]


@pytest.mark.parametrize("n", [2, 4])
def test_every_layout_keeps_the_same_latents_ties_included(n):
    """1 and 3 groups, and with either impl; 41 latents a group are divisible by nothing."""
    for groups, impl in ((1, "auto"), (3, "auto"), (1, "reference")):
        values, indices, recon = whole_numbers(ALONE, groups, impl)
        wanted = active(values, indices)
        kept = [min(v for v, _ in row) for row in wanted]
        assert sum(a == b for a, b in itertools.pairwise(kept)) > 10, "no ties: the test would see nothing"
        layouts = [layout for layout in LAYOUTS[n] if layout[1] > 1]
        for ranks in on_layouts(n, whole_numbers, groups, impl, layouts=layouts).values():
            for theirs in ranks:
                assert active(theirs[0], theirs[1]) == wanted
                assert torch.equal(theirs[2], recon)


def test_of_equal_pre_activations_the_lower_latents_are_kept():
    W_enc = torch.ones(40, 2)
    W_enc[[7, 11]] = 2.0
    values, indices = reference.top_k(torch.ones(3, 2), W_enc, 5)
    assert [sorted(row) for row in indices.tolist()] == [[0, 1, 2, 7, 11]] * 3
    assert torch.equal(values, (W_enc[indices] * 1.0).sum(-1))


def forward_and_back(mesh, n_layers):
    sae = new_sae(mesh, layers=tuple(range(n_layers)), groups=2, n_latents=82, frame="none")
    resid = vectors(0, 21, n_layers)
    mesh.calls.clear()
    code = sae.encode(resid)
    error, squared = sae.error(resid, code)
    forward = dict(mesh.calls)
    (squared / 10 + (error * vectors(1, 21, n_layers)).sum((1, 2))).sum().backward()
    return {
        "forward": forward,
        "both": dict(mesh.calls),
        "code": active(code.values.detach(), code.indices),
        "error": error.detach(),
        "W_enc": sae.W_enc.grad,
        "W_dec": sae.W_dec.grad,
        "b_pre": sae.b_pre.grad,
        "own": sae.latents() if isinstance(sae, ShardedSAE) else None,
    }


def test_thirty_layers_and_their_derivatives_take_two_collectives():
    alone = forward_and_back(ALONE, 30)
    assert alone["both"] == {}
    for ranks in on_layouts(2, forward_and_back, 30, layouts=[(1, 2)]).values():
        assert [rank["forward"] for rank in ranks] == [rank["both"] for rank in ranks] == [{"tp": 2}] * 2
        assert torch.cat([rank["own"] for rank in ranks]).sort().values.tolist() == list(range(82))
        torch.testing.assert_close(sum(rank["b_pre"] for rank in ranks), alone["b_pre"], rtol=1e-5, atol=1e-4)
        for rank in ranks:
            torch.testing.assert_close(rank["error"], alone["error"], rtol=1e-5, atol=1e-5)
            for name in ("W_enc", "W_dec"):
                torch.testing.assert_close(rank[name], alone[name][rank["own"]], rtol=1e-5, atol=1e-4)


def initial(mesh, groups):
    sae = new_sae(mesh, groups=groups, n_latents=3 * 41)
    after = torch.get_rng_state()
    return whole_tensors(sae, mesh), after


def whole_tensors(sae, mesh):
    """Every tensor of an SAE, put together."""
    tensors = {name: tensor.detach() for name, tensor in sae.state_dict().items()}
    if mesh.tp > 1:
        rows = {name: gathered_rows(tensors[name], sae.config.groups, sae.size, mesh) for name in SHARDED}
        tensors |= rows
    return tensors


@pytest.mark.parametrize("groups", [1, 3])
def test_shards_begin_as_one_process_does_bit_for_bit(groups, monkeypatch):
    alone, after = initial(ALONE, groups)
    for ranks in on_layouts(2, initial, groups, layouts=[(1, 2)]).values():
        for whole, random in ranks:
            assert all(torch.equal(whole[name], alone[name]) for name in alone)
            assert torch.equal(random, after)


# ---- learning --------------------------------------------------------------------------------------------------------


def learn(mesh, steps, sae_changes, trainer_changes, n_tokens=(33, 1)):
    """The reports, and the weights put together, of a few steps of micro-batches that no layout divides evenly."""
    sae = new_sae(mesh, n_latents=252, **sae_changes)
    config = {"lr": 3e-3, "init_tokens": 256, "dead_after_tokens": 150, "clip_grad_norm": 0.05} | trainer_changes
    trainer = Trainer(sae, TrainerConfig(**config), n_steps=steps, step_tokens=sum(n_tokens), mesh=mesh)
    trainer.initialise([vectors(1234, 300)])
    reports = []
    for step in range(steps):
        for part, n in enumerate(n_tokens):
            trainer.accumulate(vectors(10 * step + part, n)[:, mesh.share(n)])
        reports.append(trainer.update())
    return [report.to_dict() for report in reports], whole_tensors(sae, mesh)


RULES = {
    "standard": ({}, {}),
    "groups": ({"groups": 3}, {}),
    "lawson2024": ({"frame": "vector"}, {"recipe": "lawson2024", "clip_grad_norm": None}),
    "reference": ({}, {"impl": "reference"}),
}


def check_learning(n, rules, steps, layouts=None):
    n_tokens = (33, 2) if rules == "lawson2024" else (33, 1)
    alone, weights = learn(ALONE, steps, *RULES[rules], n_tokens)
    assert all(report["grad_norm"] > 0.05 for report in alone)
    assert alone[-1]["aux_loss"] > 0.1
    for layout, ranks in on_layouts(n, learn, steps, *RULES[rules], n_tokens, layouts=layouts).items():
        for reports, _ in ranks:
            assert reports == ranks[0][0], f"ranks of {layout} report different numbers"
            for mine, wanted in zip(reports, alone, strict=True):
                assert (mine["step"], mine["tokens"]) == (wanted["step"], wanted["tokens"])
                assert mine["dead_fraction"] == wanted["dead_fraction"]
                for key in ("loss", "aux_loss", "fvu", "grad_norm"):
                    assert mine[key] == pytest.approx(wanted[key], rel=1e-6, abs=1e-6), (layout, mine["step"], key)
        theirs = ranks[0][1]
        if rules != "lawson2024":
            assert (theirs["W_dec"].norm(dim=1) - 1).abs().max() < 1e-6
        for name, wanted in weights.items():
            torch.testing.assert_close(theirs[name], wanted, rtol=1e-4, atol=1e-4)


def test_fifty_steps_on_two_by_two_are_those_of_one_process():
    check_learning(4, "standard", 50, [(2, 2)])


@pytest.mark.parametrize("rules", ["groups", "lawson2024"])
def test_steps_on_two_processes_are_those_of_one(rules):
    check_learning(2, rules, 12)


@pytest.mark.slow
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("n", [2, 4])
def test_fifty_steps_on_every_layout_are_those_of_one_process(n, rules):
    check_learning(n, rules, 50)


def exchanges(mesh, dead, axis="dp"):
    """Collectives over an axis, and bytes that they gave, of one micro-batch."""
    sae = new_sae(mesh)
    config = TrainerConfig(lr=1e-3, init_tokens=64, dead_after_tokens=50, k_aux=K_AUX)
    trainer = Trainer(sae, config, mesh=mesh)
    trainer.initialise([vectors(0, 64)])
    trainer.quiet += 60 * dead
    mesh.calls.clear()
    mesh.bytes.clear()
    trainer.accumulate(vectors(1, 8)[:, mesh.share(8)])
    assert bool(trainer.dead().any()) == bool(dead)
    return mesh.calls[axis], mesh.bytes[axis]


def test_a_micro_batch_takes_two_sums_over_dp_and_two_more_while_latents_are_dead():
    """Flags of 123 latents and a count; 3 squared errors; 3 means of the error, and what is left and the spread of 3 layers."""
    for dead, wanted in ((0, (2, 4 * (124 + 3))), (1, (4, 4 * (124 + 3 + 3 * D_MODEL + 6)))):
        assert on_layouts(2, exchanges, dead, layouts=[(2, 1)])[2, 1] == [wanted, wanted]


def test_what_tp_ranks_exchange_is_as_the_formulas_say():
    """`costs`: the candidates and the parts of reconstructions, and the same of AuxK while latents are dead."""
    plain = costs.code_payload(3, 8, new_sae(ALONE).config.k) + costs.sums_payload(3, 8, D_MODEL)
    more = plain + sum(costs.aux_payload(3, 8, K_AUX, D_MODEL))
    for dead, wanted in ((0, (2, plain)), (1, (4, more))):
        assert on_layouts(2, exchanges, dead, "tp", layouts=[(1, 2)])[1, 2] == [wanted, wanted]


def not_finite(mesh):
    """What every rank says of a step in which only the last one has a NaN, in its vectors or in its weights."""
    sae = new_sae(mesh)
    trainer = Trainer(sae, TrainerConfig(lr=1e-3, init_tokens=64), mesh=mesh)
    trainer.initialise([vectors(0, 64)])
    said = []
    for place in ("vectors", "weights"):
        before = sae.W_enc.detach().clone()
        resid = vectors(1, 8)[:, mesh.share(8)]
        if mesh.rank == mesh.dp * mesh.tp - 1:
            (resid if place == "vectors" else sae.W_dec.data)[..., -1, 0] = torch.nan
        try:
            trainer.step(resid)
        except MlsaeError as error:
            said.append((type(error).__name__, error.field))
        assert torch.equal(sae.W_enc, before)
    return said


def test_what_is_not_finite_on_one_rank_stops_all_of_them():
    for layout, ranks in on_layouts(2, not_finite).items():
        assert ranks[0] == ranks[1], layout
        assert [kind for kind, _ in ranks[0]] == ["NumericsError"] * 2
        assert ranks[0][1][1] == "W_dec"


# ---- the mesh --------------------------------------------------------------------------------------------------------


def test_alone_nothing_is_exchanged_or_copied():
    x = torch.ones(2, 3, 4)
    assert all(each is x for each in (ALONE.total(x), ALONE.tokens_by_rank(x)[0], ALONE.gathered(x)[0]))
    flags = torch.ones(3, dtype=torch.bool)
    assert ALONE.union(flags, 5) == (flags, 5)
    assert ALONE.share(7) == slice(0, 7)
    assert type(make_sae(MLSAEConfig(d_model=4, n_latents=8, k=2), ALONE)) is MLSAE
    assert not ALONE.calls


def test_shares_are_a_partition_as_even_as_can_be():
    for n, size in itertools.product(range(10), (1, 2, 3, 4)):
        shares = []
        for rank in range(size):
            mesh = Mesh()
            mesh.dp, mesh.dp_rank = size, rank
            shares.append(range(n)[mesh.share(n)])
        assert [i for share in shares for i in share] == list(range(n))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("world", "asked", "found"),
    [(1, (None, None), (1, 1)), (4, (None, None), (4, 1)), (4, (None, 2), (2, 2)), (4, (1, None), (1, 4))],
)
def test_what_is_not_said_of_a_layout_goes_to_dp(world, asked, found, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    assert check_layout(*asked) == found


@pytest.mark.parametrize(("world", "asked"), [(1, (2, None)), (1, (None, 4)), (4, (3, None)), (2, (2, 2))])
def test_a_layout_that_is_not_the_processes_is_refused(world, asked, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(ConfigError, match="torchrun"):
        check_layout(*asked)


def errors_of(mesh):
    def fail():
        raise DataError("data", f"of rank {mesh.rank}")

    said = []
    for work in (
        lambda: mesh.by_leader(fail),
        lambda: mesh.everywhere(lambda: fail() if mesh.rank == 1 else None),
    ):
        try:
            work()
        except MlsaeError as error:
            said.append((type(error).__name__, error.problem, error.elsewhere))
    return said, mesh.by_leader(lambda: {"rank": mesh.rank}), mesh.everywhere(lambda: mesh.rank)


def test_an_error_of_one_rank_is_raised_on_all_and_said_by_one():
    first, second = on_layouts(2, errors_of, layouts=[(2, 1)])[2, 1]
    assert first[0] == [("DataError", "of rank 0", False), ("DataError", "of rank 1", True)]
    assert second[0] == [("DataError", "of rank 0", True), ("DataError", "of rank 1", False)]
    assert (first[1], second[1]) == ({"rank": 0}, {"rank": 0})
    assert (first[2], second[2]) == (0, 1)


def test_more_tp_than_latents_is_refused():
    mesh = Mesh()
    mesh.tp = 9
    with pytest.raises(ConfigError, match="exceeds the 8 latents"):
        make_sae(MLSAEConfig(d_model=4, n_latents=8, k=2), mesh)
