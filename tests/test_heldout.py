"""What an SAE is judged by: never the text it was trained on, unless that is asked for."""

from pathlib import Path

import pytest

from conftest import train_command
from mlsae.cli import main
from mlsae.heldout import held_out_split
from mlsae.sae import MLSAE
from test_evaluate import make_sae


def trained_on(data: Path) -> MLSAE:
    return make_sae(data=str(data))


def test_held_out_text_is_the_default(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    assert held_out_split(trained_on(tmp_path / "a.jsonl"), str(tmp_path / "a.jsonl")) == "test"
    assert held_out_split(trained_on(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")) == "all"
    assert held_out_split(trained_on(tmp_path / "a.jsonl"), str(corpus)) == "test"
    assert held_out_split(make_sae(), str(tmp_path / "a.jsonl")) == "all"
    monkeypatch.chdir(tmp_path)
    assert held_out_split(trained_on(Path("a.jsonl")), str(tmp_path / "a.jsonl")) == "test"


@pytest.mark.parametrize("spelled", ["x/../a.jsonl", "link.jsonl", "x/../link.jsonl"])
def test_training_text_is_known_however_it_is_spelled(tmp_path: Path, spelled: str):
    """Else the SAE is judged on the text it was trained on, and nobody is told."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    (tmp_path / "x").mkdir()
    assert held_out_split(trained_on(tmp_path / "a.jsonl"), str(tmp_path / spelled)) == "test"


def test_training_text_is_known_from_another_folder(tmp_path, trained, corpus, lm_folder, monkeypatch):
    """Trained with a relative --data, evaluated from elsewhere with the whole path."""
    monkeypatch.chdir(corpus)
    lone = tmp_path / "lone.jsonl"
    lone.write_text((corpus / "train.jsonl").read_text())
    monkeypatch.chdir(tmp_path)
    assert main(train_command(lm=lm_folder, data=Path("lone.jsonl"), out="run")) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert held_out_split(MLSAE.from_pretrained(tmp_path / "run"), str(lone)) == "test"
