"""Notes: what was written is read back, by any process, and what cannot be kept is refused and harms nothing."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import ValidationError

from mlsae.errors import ConfigError, ResourceError
from mlsae.explorer.library import Library
from mlsae.explorer.notes import NoteRequest, Notes, note_view, put_note


def test_what_was_written_is_read_back_by_anyone(tmp_path: Path):
    notes, other = Notes(tmp_path), Notes(tmp_path)
    assert (notes.of(7), notes.problem) == ("", None)
    notes.write(7, "a cat 🐈\n<b>bold</b> \x00")
    other.write(3, "three")
    assert notes.of(7) == other.of(7) == Notes(tmp_path).of(7) == "a cat 🐈\n<b>bold</b> \x00"
    assert json.loads((tmp_path / "notes.json").read_text()) == {"notes": {"3": "three", "7": notes.of(7)}}


def test_an_empty_note_takes_it_away(tmp_path: Path):
    notes = Notes(tmp_path)
    notes.write(7, "seven")
    notes.write(3, "three")
    notes.write(7, "")
    assert notes.of(7) == ""
    assert json.loads((tmp_path / "notes.json").read_text()) == {"notes": {"3": "three"}}


def test_notes_written_at_once_are_all_kept(tmp_path: Path):
    notes = Notes(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda latent: notes.write(latent, f"note {latent}"), range(40)))
    assert [Notes(tmp_path).of(latent) for latent in range(40)] == [f"note {latent}" for latent in range(40)]


@pytest.mark.parametrize(
    "damaged", ['{"notes": {"7": "se', "[]", '{"notes": {"x": "y"}}', '{"notes": {"7": 7}}', "", "\x00\xff"]
)
def test_a_damaged_file_is_said_and_not_written_over(tmp_path: Path, damaged: str):
    path = tmp_path / "notes.json"
    path.write_text(damaged)
    notes = Notes(tmp_path)
    assert notes.of(7) == ""
    assert notes.problem is not None
    assert str(tmp_path) not in notes.problem
    with pytest.raises(ResourceError, match=r"note: not saved: notes\.json is damaged"):
        notes.write(7, "new")
    assert path.read_text() == damaged


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"note: not saved: .*choose a folder you can write to"):
        Notes(tmp_path / "file").write(7, "seven")
    with pytest.raises(ResourceError, match="give --analysis DIR"):
        Notes(None).write(7, "seven")
    assert Notes(None).of(7) == ""


def test_half_a_character_is_refused_with_its_place(tmp_path: Path):
    with pytest.raises(ConfigError, match="note: character 2 is half of a pair"):
        Notes(tmp_path).write(7, "ab\ud800c")
    assert not (tmp_path / "notes.json").exists()


def test_too_many_are_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("mlsae.explorer.notes.MAX_BYTES", 2000)
    notes = Notes(tmp_path)
    notes.write(1, "x" * 900)
    with pytest.raises(ResourceError, match="would be too large"):
        notes.write(2, "x" * 900)
    assert (len(notes.of(1)), notes.of(2)) == (900, "")


def test_views_know_which_latents_there_are(tiny_run: Path, tmp_path: Path):
    library = Library.open(tiny_run)
    library.notes = Notes(tmp_path)
    assert put_note(library, 127, NoteRequest(note="last")) == {"note": "last"} == note_view(library, 127)
    for latent in (128, -1):
        with pytest.raises(ConfigError, match=f"latent: {latent} is none of this SAE's; give 0 to 127"):
            put_note(library, latent, NoteRequest(note="x"))


@pytest.mark.parametrize(
    "body", [{}, {"note": 7}, {"note": None}, {"note": "x" * 4001}, {"note": "x", "more": 1}, {"note": b"x"}]
)
def test_bodies_are_strict(body: dict):
    with pytest.raises(ValidationError):
        NoteRequest.model_validate(body)
