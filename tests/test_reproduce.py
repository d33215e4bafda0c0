"""The reproduction: every arm is what its commands alone would make of it, and a second call does nothing again."""

import importlib
import json
from pathlib import Path

import pytest

from mlsae.analyze import analyze
from mlsae.config import TrainConfig
from mlsae.errors import ConfigError
from mlsae.evaluate import evaluate
from mlsae.files import finite
from mlsae.intervals import with_interval
from mlsae.lm import LanguageModel
from mlsae.reproduce import Budget, Reproduction, arms_of, reproduce
from mlsae.sae import MLSAE
from mlsae.train import Loop

SETTINGS = {"k": (2, 4), "expansion_factor": (2.0, 4.0), "budget": Budget(512, 512, 128, 512), "progress": False}


def config_of(lm_folder: Path, corpus: Path, out: Path) -> TrainConfig:
    values = {"lm": str(lm_folder), "data": str(corpus), "out": str(out)}
    return TrainConfig(**values, tokens=1024, context_length=32, batch_size=2, accumulation_steps=1, init_tokens=64)


@pytest.fixture(scope="module")
def made(lm: LanguageModel, lm_folder: Path, corpus: Path, tmp_path_factory) -> Reproduction:
    out, module = tmp_path_factory.mktemp("reproduced"), importlib.import_module("mlsae.reproduce")
    real = module.write_report

    def of_the_main_arm(path: Path, **what):
        return real(path, **what) if path.parent == out else None

    with pytest.MonkeyPatch.context() as patch:  # drawing takes most of the time
        patch.setattr(module, "write_report", of_the_main_arm)
        return reproduce(config_of(lm_folder, corpus, out), lm=lm, **SETTINGS)


def test_arms_differ_from_the_main_one_in_one_thing(made: Reproduction):
    main, *others = made.arms
    assert (main.name, main.k, main.expansion_factor) == ("main", 4, 4)
    assert [arm.name for arm in others] == ["k2", "x2", "lens", "per-layer", "random-model"]
    assert [arm.differs_in(main) for arm in made.arms] == [None, "k", "expansion_factor", "kind", "kind", "kind"]
    rival = json.loads((Path(made.directory) / "per-layer" / "config.json").read_text())
    assert rival["groups"] == 3
    assert abs(rival["n_latents"] - 4 * 32) <= 2  # as many as three dictionaries can share out
    assert MLSAE.from_pretrained(Path(made.directory) / "lens").lens is not None


def test_its_numbers_are_those_of_the_commands(made: Reproduction, lm: LanguageModel):
    for arm in made.arms[:-1]:
        run = Path(made.directory) / arm.name
        sae = MLSAE.from_pretrained(run)
        alone = evaluate(sae, lm, sae.config.data, tokens=512, splice_tokens=128, progress=False)
        assert arm.evaluation["mean"]["fvu"] == with_interval(alone.mean["fvu"], alone.ci95["mean"]["fvu"])
        depth = analyze(sae, lm, sae.config.data, tokens=512, nulls=False, directions=False, examples=0, progress=False)
        assert finite(arm.summary["decomposition"]) == finite(depth.summary()["decomposition"])
        assert json.loads((run / "analysis" / "summary.json").read_text())["n_tokens"] == depth.statistics.n_tokens


def test_the_null_is_of_an_untrained_twin(made: Reproduction, lm: LanguageModel):
    null = made.arms[-1]
    config = json.loads((Path(made.directory) / "random-model" / "config.json").read_text())
    assert config["lm"] == str(Path(made.directory) / "random-lm")
    assert (null.k, null.expansion_factor) == (made.arms[0].k, made.arms[0].expansion_factor)
    assert null.evaluation["clean_ce"]["value"] != made.arms[0].evaluation["clean_ce"]["value"]


def test_everything_is_drawn_and_written(made: Reproduction):
    folder = Path(made.directory)
    names = {"quality_k", "quality_expansion_factor", "depth_k", "depth_size", "by_layer", "lens", "similarity_lens"}
    names |= {"heatmap", "prompt_heatmap", "centre_of_mass", "variance", "similarity"}
    assert names <= {path.stem for path in (folder / "figures").glob("*.png")}
    assert {path.stem for path in (folder / "figures").glob("*.pdf")} >= names
    assert (folder / "report.html").is_file()
    table = (folder / "reproduction.txt").read_text()
    assert all(arm.name in table for arm in made.arms)
    record = json.loads((folder / "reproduction.json").read_text())
    assert [arm["name"] for arm in record["arms"]] == [arm.name for arm in made.arms]
    assert len(made.lens["layers"]) == 3


def test_a_second_call_trains_measures_and_analyzes_nothing_again(made, lm, lm_folder, corpus, monkeypatch):
    def refuse(*arguments, **settings):
        raise AssertionError("done before")

    for module, name in (("reproduce", "train_lens"), ("reproduce", "analyze"), ("sweep", "evaluate")):
        monkeypatch.setattr(importlib.import_module(f"mlsae.{module}"), name, refuse)
    again = reproduce(config_of(lm_folder, corpus, Path(made.directory)), lm=lm, resume=True, **SETTINGS)
    for x, y in zip(again.arms, made.arms, strict=True):
        assert finite(x.evaluation) == finite(y.evaluation)
        assert finite(x.summary["events"]) == finite(y.summary["events"])


@pytest.mark.parametrize(("field", "values"), [("k", []), ("expansion_factor", [4.0, 4.0])])
def test_a_list_is_named_once_and_not_empty(lm, lm_folder: Path, corpus: Path, tmp_path: Path, field, values):
    lists = {"k": [4], "expansion_factor": [4.0]} | {field: values}
    with pytest.raises(ConfigError, match=f"^{field}: "):
        arms_of(config_of(lm_folder, corpus, tmp_path), lm.shape, **lists, lens=False, rival=False)


def test_sizes_are_given_as_factors(lm, lm_folder: Path, corpus: Path, tmp_path: Path):
    config = config_of(lm_folder, corpus, tmp_path).replaced(n_latents=64)
    with pytest.raises(ConfigError, match=r"^n_latents: 64 given"):
        arms_of(config, lm.shape, [4], [4.0], lens=False, rival=False)


def test_killed_before_its_first_checkpoint_it_begins_anew(made, lm, lm_folder, corpus, tmp_path, monkeypatch):
    """A run directory without a checkpoint is nothing to go on with."""
    config = config_of(lm_folder, corpus, tmp_path)
    small = {"k": (4,), "expansion_factor": (4.0,), "lens": False, "rival": False, "random_model": False}
    module = importlib.import_module("mlsae.reproduce")

    def killed(*arguments, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "going", killed)
        with pytest.raises(KeyboardInterrupt):
            reproduce(config, lm=lm, budget=Budget(512, 512, 128, 512), progress=False, **small)
    assert not list(tmp_path.glob("main/step-*"))
    monkeypatch.setattr(module, "write_report", lambda *arguments, **what: None)
    again = reproduce(config, lm=lm, resume=True, budget=Budget(512, 512, 128, 512), progress=False, **small)
    assert [arm.name for arm in again.arms] == ["main"]
