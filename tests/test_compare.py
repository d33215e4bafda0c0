"""Rivals at equal budget: what is matched, what is refused, and dictionaries away from their layers."""

import importlib
import json
import math

import pytest
import torch

from conftest import TRAIN
from mlsae.analysis.comparison import Point, by_layer, frontier, interval
from mlsae.cli import main
from mlsae.compare import CompareConfig, compare, flops_per_token, parameters, plan
from mlsae.config import LMShape, MLSAEConfig
from mlsae.errors import ConfigError
from mlsae.evaluate import evaluate
from mlsae.offlayer import dictionary, off_layer_matrix
from mlsae.sae import MLSAE
from mlsae.untrusted import read_json

SHAPE = LMShape(name="tiny", n_layers=6, d_model=8, context_length=64)
COMMON = {"lm": "lm", "data": "text", "out": "out", "tokens": 64_000, "n_latents": 96, "k": [2, 4, 8]}


def planned(*arms, **changes):
    """Config and arm of each arm at k = 4."""
    config = CompareConfig.of({**COMMON, **changes, "arms": [{"name": "mlsae"}, *arms]})
    return {name.removesuffix("-k4"): each for name, each in plan(config, SHAPE).items() if name.endswith("-k4")}


# ---- equal budgets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [2, 3, "layers"])
def test_each_match_gives_the_first_arms_amount(groups):
    """As counted from the weights of an SAE that is made, and by hand for the rest."""
    n_groups = 6 if groups == "layers" else groups
    arms = [
        {"name": match, "groups": groups, "match": match} for match in ("latents", "parameters", "flops", "vectors")
    ]
    found = {name: each.config for name, each in planned(*arms).items()}
    saes = {
        name: MLSAE(MLSAEConfig(d_model=8, n_latents=c.n_latents, k=c.k, groups=c.groups)) for name, c in found.items()
    }
    counted = {name: sum(p.numel() for p in sae.parameters()) for name, sae in saes.items()}
    for name, c in found.items():
        assert parameters(c.n_latents, c.groups, 8) == counted[name]
    assert found["latents"].n_latents == 96
    assert counted["parameters"] == pytest.approx(counted["mlsae"], abs=8 * 2 * n_groups / 2)  # half a latent each
    for wide in ("flops", "vectors"):
        assert found[wide].n_latents == n_groups * 96
    flops = {name: flops_per_token(c.n_latents, c.groups, c.k, 6, 8) for name, c in found.items()}
    assert flops["flops"] == flops["mlsae"] > flops["latents"]
    vectors = {name: c.tokens * 6 / c.groups for name, c in found.items()}
    assert vectors["vectors"] == vectors["mlsae"] == n_groups * vectors["latents"]
    assert {c.tokens for name, c in found.items() if name != "vectors"} == {64_000}


def test_flops_worked_by_hand():
    """One vector of 2 entries, 3 latents, 1 active: 12 for three dot products, and 5 x 4 for five passes over one row."""
    assert flops_per_token(3, 1, 1, 1, 2) == 12 + 20
    assert flops_per_token(6, 2, 1, 2, 2) == 2 * (12 + 20)


def test_what_does_not_divide_comes_as_near_as_equal_dictionaries_can():
    found = planned({"name": "four", "groups": 4, "match": "latents"}, n_latents=90)["four"].config
    assert found.n_latents == 88
    assert found.n_latents % 4 == 0


def test_arms_take_the_first_ones_batches_and_order_and_their_own_keys():
    found = planned({"name": "own", "lr": 0.01, "frame": "vector", "seed": 9}, {"name": "long", "tokens": 640_000})
    first, own = found["mlsae"].config, found["own"].config
    assert (own.lr, own.frame, own.seed) == (0.01, "vector", 9)
    for each in found.values():
        for key in ("batch_size", "accumulation_steps", "context_length", "data_seed"):
            assert getattr(each.config, key) == getattr(first, key)


def test_every_arm_is_trained_with_every_k():
    config = CompareConfig.of({**COMMON, "arms": [{"name": "a"}, {"name": "b", "groups": 2}]})
    assert list(plan(config, SHAPE)) == ["a-k2", "b-k2", "a-k4", "b-k4", "a-k8", "b-k8"]
    assert CompareConfig.of({**{k: v for k, v in COMMON.items() if k != "k"}, "arms": [{"name": "a"}]}).k == (
        16,
        32,
        64,
    )


IMPOSSIBLE = {
    "no arm": ({"arms": []}, "arms: no arm given; list at least one"),
    "no list of arms": ({"arms": {"name": "a"}}, "arms: no arm given"),
    "an arm that is a word": ({"arms": ["mlsae"]}, "arms: 'mlsae' given; an arm is a mapping"),
    "a name twice": ({"arms": [{"name": "a"}, {"name": "a"}]}, "arms: 'a' is the name of two arms"),
    "a name that climbs": ({"arms": [{"name": "../a"}]}, "arms: '../a' is no name for a folder"),
    "no name": ({"arms": [{"groups": 2}]}, "name: missing"),
    "a key of no one": ({"arms": [{"name": "a", "grups": 2}]}, "arm 'a': unknown key 'grups'; did you mean 'groups'?"),
    "a key of no one, for all": ({"arms": [{"name": "a"}], "kk": 2}, "arms: unknown key 'kk'"),
    "groups > layers": (
        {"arms": [{"name": "a"}, {"name": "b", "groups": 7}]},
        "groups: 7 exceeds the 6 layers.*arm 'b'",
    ),
    "groups of words": ({"arms": [{"name": "a", "groups": "many"}]}, "groups"),
    "latents that do not split": (
        {"arms": [{"name": "a"}, {"name": "b", "groups": 5, "n_latents": 96}]},
        r"n_latents: 96 does not split into 5 groups.*\(arm 'b'\)",
    ),
    "a first arm that is matched": ({"arms": [{"name": "a", "match": "flops"}]}, "match: given in 'a', the first arm"),
    "a first arm with groups": (
        {"arms": [{"name": "a", "groups": 2}, {"name": "b", "match": "flops"}]},
        "arms: 'a' comes first and has groups",
    ),
    "an unknown match": ({"arms": [{"name": "a"}, {"name": "b", "match": "width"}]}, "match: 'width' given; must be"),
    "a size given twice": (
        {"arms": [{"name": "a"}, {"name": "b", "match": "flops", "n_latents": 8}]},
        "n_latents: given in arm 'b', where match: flops says it",
    ),
    "tokens given twice": (
        {"arms": [{"name": "a"}, {"name": "b", "match": "vectors", "tokens": 8}]},
        "tokens: given in arm 'b', where match: vectors says it",
    ),
    "k of one arm": ({"arms": [{"name": "a", "k": 3}]}, "k: given in arm 'a'; it is the same for all"),
    "k twice": ({"arms": [{"name": "a"}], "k": [2, 2]}, "k: 2 is given twice"),
    "no k": ({"arms": [{"name": "a"}], "k": []}, "k: "),
    "k too large": ({"arms": [{"name": "a"}], "k": [97]}, r"k: 97 exceeds n_latents 96.*\(arm 'a'\)"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_be_compared_is_refused_in_a_sentence(case):
    changes, sentence = IMPOSSIBLE[case]
    with pytest.raises(ConfigError, match=sentence):
        plan(CompareConfig.of({**COMMON, **changes}), SHAPE)


# ---- off their layers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make(lm):
    """SAEs with random weights and a frame of their own for the tiny model's three layers."""

    def sae(groups, frame="layer", seed=0):
        torch.manual_seed(seed)
        found = MLSAE(
            MLSAEConfig(
                d_model=32, n_latents=96, k=4, layers=(0, 1, 2), groups=groups, frame=frame, mask_norm_factor=None
            )
        )
        if frame == "layer":
            found.frame.fit(torch.randn(3, 32), torch.rand(3) + 0.5)
        found.b_pre.data = torch.randn_like(found.b_pre)
        return found

    return sae


def measured(matrix):
    return torch.stack([matrix.fvu, matrix.mse, *([] if matrix.delta_ce is None else [matrix.delta_ce])], -1)


@pytest.mark.parametrize("frame", ["layer", "vector", "none"])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_on_its_own_layers_a_dictionary_is_what_the_grouped_sae_is(make, lm, corpus, groups, frame):
    """As `evaluate` measures it, whose sums are cut otherwise; the codes are the same bit for bit (below)."""
    sae, own = make(groups, frame), {"tokens": 512, "progress": False}
    matrix = off_layer_matrix(sae, lm, str(corpus), splice_tokens=512, **own)
    layers = evaluate(sae, lm, str(corpus), **own).layers
    assert matrix.fvu.shape == (groups, 3)
    for column, row in enumerate(layers):
        group = sae.config.group_of(column)
        assert matrix.fvu[group, column].item() == pytest.approx(row["fvu"], rel=1e-6)
        assert matrix.mse[group, column].item() == pytest.approx(row["mse"], rel=1e-6)
        assert matrix.delta_ce is not None
        assert matrix.delta_ce[group, column].item() == pytest.approx(row["delta_ce"], abs=1e-9)
    assert len(set(matrix.fvu.flatten().tolist())) == 3 * groups, "every cell is of its own dictionary and layer"


def test_a_dictionary_of_its_own_shares_the_weights_and_encodes_as_the_group_does(make):
    sae, resid = make(3), torch.randn(3, 7, 32)
    whole, recon = sae(resid)
    for group in range(3):
        alone = dictionary(sae, group)
        assert alone.W_enc.data_ptr() == sae.W_enc[32 * group :].data_ptr()
        code, mine = alone(resid)
        assert torch.equal(code.values[group], whole.values[group])
        assert torch.equal(code.indices[group] + 32 * group, whole.indices[group])
        assert torch.equal(mine[group], recon[group])


def test_one_group_is_the_multi_layer_sae_at_every_layer_bit_for_bit(make, lm, corpus):
    both = off_layer_matrix(make(1), lm, str(corpus), mlsae=make(1), tokens=512, splice_tokens=512, progress=False)
    assert both.rows == ["0–2", "all"]
    assert torch.equal(measured(both)[0], measured(both)[1])


def test_the_last_row_is_the_multi_layer_sae(make, lm, corpus):
    sae, mlsae, own = make(3), make(1, seed=1), {"tokens": 512, "progress": False, "splice_tokens": 512}
    both, alone = (
        off_layer_matrix(sae, lm, str(corpus), mlsae=mlsae, **own),
        off_layer_matrix(mlsae, lm, str(corpus), **own),
    )
    assert both.rows == ["0", "1", "2", "all"]
    assert torch.equal(measured(both)[-1:], measured(alone))
    assert torch.equal(measured(both)[:-1], measured(off_layer_matrix(sae, lm, str(corpus), **own)))
    assert off_layer_matrix(make(2), lm, str(corpus), tokens=128, progress=False).rows == ["0–1", "2"]
    with pytest.raises(ConfigError, match="mlsae: has groups"):
        off_layer_matrix(sae, lm, str(corpus), mlsae=sae, **own)


def test_batches_do_not_matter_to_the_matrix(make, lm, corpus, monkeypatch):
    before = off_layer_matrix(make(3), lm, str(corpus), tokens=512, splice_tokens=512, progress=False)
    monkeypatch.setattr(importlib.import_module("mlsae.heldout"), "BATCH_TOKENS", 64)
    after = off_layer_matrix(make(3), lm, str(corpus), tokens=512, splice_tokens=512, progress=False)
    torch.testing.assert_close(measured(after), measured(before), rtol=1e-5, atol=1e-6)


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_an_interval_is_read_in_either_form():
    assert interval({"value": 1, "ci95": [0.5, 2]}) == (1.0, 0.5, 2.0)
    assert interval(3)[0] == 3.0
    assert all(map(math.isnan, interval(None)))
    assert math.isnan(interval({"value": 1, "ci95": [None, None]})[1])


def test_a_figure_draws_the_numbers_it_is_given():
    """What its data file holds: each SAE's x, value and interval, and lines through the means over seeds."""

    def point(line, x, fvu):
        layers = [{"layer": i, "fvu": {"value": fvu + i, "ci95": [fvu, fvu + 2]}} for i in range(2)]
        return Point(line, x, {"mean": {"fvu": {"value": fvu, "ci95": [fvu / 2, 2 * fvu]}, "l0": x}, "layers": layers})

    points = [point("a", 2, 0.5), point("a", 2, 0.3), point("a", 8, 0.2), point("b", 2, 0.6)]
    picture = frontier(points, name="n", title="t", x_label="k", about="Points.")
    assert picture.data["fvu"]["a"] == [[2, 0.3, 0.15, 0.6], [2, 0.5, 0.25, 1.0], [8, 0.2, 0.1, 0.4]]
    assert "delta_ce" not in picture.data
    (axes,) = picture.figure.axes
    drawn = axes.lines[0].get_xydata()
    assert drawn[:, 1].tolist() == [0.4, 0.2]
    assert drawn[:, 0].tolist() == pytest.approx([2, 8], rel=0.05)
    shown = by_layer(points, x_label="k =")
    assert shown.data["8"]["a"] == [[0.2, 0.2, 2.2], [1.2, 0.2, 2.2]]
    assert len(shown.figure.axes) == 2


# ---- the commands ----------------------------------------------------------------------------------------------------


def written(tmp_path, lm_folder, corpus, **changes):
    """A comparison's file for the tiny model."""
    train = {flag[2:].replace("-", "_"): float(value) for flag, value in TRAIN.items() if flag != "--k"}
    whole = {"lm": str(lm_folder), "data": str(corpus), "out": str(tmp_path / "out"), **train, **changes}
    path = tmp_path / "comparison.yaml"
    path.write_text(json.dumps(whole))  # JSON is YAML
    return path


def test_the_command_compares_in_one_go_and_goes_on_where_it_stopped(tmp_path, lm_folder, corpus, capsys):
    arms = [
        {"name": "mlsae"},
        {"name": "pairs", "groups": 2, "match": "parameters"},
        {"name": "layers", "groups": "layers", "match": "vectors"},
    ]
    small = {"tokens": 320, "evaluate_tokens": 512, "off_layer_tokens": 256, "off_layer_splice_tokens": 128}
    path = written(tmp_path, lm_folder, corpus, arms=arms, k=[2, 4], **small)
    assert main(["compare", str(path), "--quiet"]) == 0
    table = capsys.readouterr().out
    out = tmp_path / "out"
    found = read_json(out / "comparison.json")
    assert [row["arm"] for row in found["rows"]] == [arm["name"] for arm in arms] * 2
    assert table.startswith((out / "comparison.txt").read_text())
    assert "vectors × 1 " in table
    for row in found["rows"]:
        assert read_json(out / f"{row['arm']}-k{row['k']}" / "evaluation.json") == row["result"]["evaluation"]
    tokens = {row["arm"]: row["tokens"] for row in found["rows"]}
    assert tokens == {"mlsae": 320, "pairs": 320, "layers": 960}
    assert found["off_layer"]["layers-k4"]["rows"] == ["0", "1", "2", "all"]
    assert len(found["off_layer"]["layers-k4"]["delta_ce"]) == 4
    names = {p.name for p in (out / "figures").glob("*.png")}
    assert names == {"pareto.png", "by_layer.png", "off_layer_pairs-k4.png", "off_layer_layers-k4.png"}
    stamps = {p: p.stat().st_mtime_ns for p in out.glob("*/evaluation.json")}
    assert main(["compare", str(path), "--quiet"]) == 4  # it is there already
    assert main(["compare", str(path), "--quiet", "--resume"]) == 0
    assert {p: p.stat().st_mtime_ns for p in out.glob("*/evaluation.json")} == stamps, "nothing is measured twice"
    assert capsys.readouterr().out.splitlines()[1:7] == table.splitlines()[1:7]


def test_what_is_wrong_with_the_file_is_said_at_once(tmp_path, lm_folder, corpus, capsys):
    path = written(tmp_path, lm_folder, corpus, arms=[{"name": "a"}, {"name": "b", "groups": 4}], k=[2])
    assert main(["compare", str(path), "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("error: groups: 4 exceeds the 3 layers")
    assert main(["compare"]) == 2
    assert capsys.readouterr().err == "error: comparison: missing; name its YAML file\n"
    assert not (tmp_path / "out").exists()


def test_one_group_trained_in_any_match_is_the_multi_layer_sae_bit_for_bit(tmp_path, lm_folder, lm, corpus):
    arms = [
        {"name": "mlsae"},
        *({"name": match, "groups": 1, "match": match} for match in ("latents", "flops", "vectors")),
    ]
    path = written(tmp_path, lm_folder, corpus, arms=arms, k=[4], tokens=320, evaluate_tokens=256)
    done = compare(CompareConfig.load(path), progress=False, lm=lm)
    assert len({row.result.weights for row in done.rows}) == 1
    assert [row.matched for row in done.rows] == [None, 1.0, 1.0, 1.0]
