"""Sources: which documents a split holds, what a fingerprint sees, and what is said when there are none."""

import json
import os
from itertools import chain
from pathlib import Path

import datasets
import pytest

from mlsae import text
from mlsae.errors import DataError, Interrupted
from mlsae.text import TextSource, split_of

SPLITS = ("train", "validation", "test")
DOCUMENTS = [f"document {i} says {i * i}" for i in range(500)]


def write(path: Path, documents: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


def refused(data, **options) -> str:
    with pytest.raises(DataError) as error:
        list(TextSource(str(data), **options).documents())
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- splits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["corpus.jsonl", "train.jsonl"])
def test_a_file_is_divided_by_document(tmp_path, name):
    path = write(tmp_path / name, DOCUMENTS)
    found = {split: list(TextSource(str(path), split=split).documents()) for split in SPLITS}
    assert sorted(chain(*found.values())) == sorted(DOCUMENTS)
    assert all(found.values())
    assert 0.93 < len(found["train"]) / len(DOCUMENTS) < 0.99
    assert list(TextSource(str(path), split="all").documents()) == DOCUMENTS


def test_a_document_keeps_its_split_in_another_file(tmp_path):
    folder = tmp_path / "folder"
    write(folder / "b.jsonl", DOCUMENTS[:100])
    write(folder / "deep" / "a.jsonl", DOCUMENTS[100:])
    for split in SPLITS:
        assert set(TextSource(str(folder), split=split).documents()) == {d for d in DOCUMENTS if split_of(d) == split}


def test_named_splits_are_used_whole(tmp_path):
    write(tmp_path / "train-00.jsonl", DOCUMENTS[:50])
    write(tmp_path / "train-01.jsonl", DOCUMENTS[50:100])
    write(tmp_path / "val" / "part.jsonl", DOCUMENTS[100:110])
    (tmp_path / "testimony.txt").write_text("no split of its own")
    (tmp_path / "README.md").write_text("not read")
    assert list(TextSource(str(tmp_path)).documents()) == DOCUMENTS[:100]
    assert list(TextSource(str(tmp_path), split="validation").documents()) == DOCUMENTS[100:110]
    assert list(TextSource(str(tmp_path), split="dev").documents()) == DOCUMENTS[100:110]
    assert len(list(TextSource(str(tmp_path), split="all").documents())) == 111
    assert "no split 'test'" in refused(tmp_path, split="test")
    assert "splits are train, validation, or all" in refused(tmp_path, split="test")


def test_a_lone_train_split_is_divided(tmp_path):
    write(tmp_path / "train-00.jsonl", DOCUMENTS)
    found = [set(TextSource(str(tmp_path), split=split).documents()) for split in SPLITS]
    assert set.union(*found) == set(DOCUMENTS)
    assert sum(map(len, found)) == len(DOCUMENTS)


def test_a_misspelled_split_is_answered_with_the_right_one(tmp_path):
    path = write(tmp_path / "a.jsonl", DOCUMENTS)
    assert "did you mean 'validation'?" in refused(path, split="validaton")


# ---- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "problem"),
    [(None, "null"), (7, "of type int"), (["x"], "of type list"), ("a\0b", "NUL"), ("\ud800", "lone surrogate")],
)
def test_bad_rows_stop_or_are_counted(tmp_path, bad, problem):
    path = write(tmp_path / "a.jsonl", ["good", bad, "fine"])
    message = refused(path, split="all")
    assert message.startswith(f"{path}: line 2, byte 17: the text ")
    assert problem in message
    assert "--skip-bad-rows" in message
    documents = TextSource(str(path), split="all", skip_bad_rows=True).documents()
    assert list(documents) == ["good", "fine"]
    assert (documents.n_rows, documents.n_skipped_rows) == (3, 1)


def test_a_missing_column_lists_those_there_are(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "x", "meta": 1}\n')
    for skip in (False, True):
        message = refused(path, skip_bad_rows=skip)
        assert "no column 'text'; columns are 'content', 'meta'; use --text-column" in message
    assert list(TextSource(str(path), split="all", text_column="content").documents()) == ["x"]


def test_progress_ends_at_one(tmp_path):
    write(tmp_path / "a.jsonl", DOCUMENTS[:30])
    write(tmp_path / "b.jsonl", DOCUMENTS[30:])
    documents = TextSource(str(tmp_path), split="all").documents()
    list(documents)
    assert documents.fraction_read == 1


# ---- nothing to read -----------------------------------------------------------------------------------------------


def test_empty_data_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [])
    assert "0 rows in split 'train'" in refused(path)
    assert "0 rows in split 'train' (1 bad rows skipped)" in refused(write(path, [None]), skip_bad_rows=True)
    assert "0 of its 1 documents fall into split 'test'" in refused(write(path, ["one"]), split="test")


def test_unknown_formats_and_missing_files_are_refused(tmp_path):
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    assert "no format we read; allowed are .txt, .jsonl, .csv, .parquet, .arrow" in refused(tmp_path / "notes.pdf")
    assert "no text files in" in refused(tmp_path)
    assert "no such file or folder" in refused(tmp_path / "nowhere")
    assert "no such file or folder" in refused("nowhere.jsonl")


# ---- fingerprints --------------------------------------------------------------------------------------------------


def test_fingerprint_follows_content_split_and_column(tmp_path):
    path = write(tmp_path / "a.jsonl", DOCUMENTS)
    source = TextSource(str(path))
    first = source.fingerprint()
    assert first == TextSource(str(path)).fingerprint()
    others = {TextSource(str(path), split=split).fingerprint() for split in ("validation", "test", "all")}
    others.add(TextSource(str(path), text_column="content").fingerprint())
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    others.add(source.fingerprint())
    write(path, DOCUMENTS[:-1])
    others.add(source.fingerprint())
    assert first not in others
    assert len(others) == 6


def test_fingerprint_of_a_named_split_ignores_the_others(tmp_path):
    write(tmp_path / "train.jsonl", DOCUMENTS)
    write(tmp_path / "test.jsonl", DOCUMENTS[:3])
    first = TextSource(str(tmp_path)).fingerprint()
    write(tmp_path / "test.jsonl", DOCUMENTS[:5])
    assert TextSource(str(tmp_path)).fingerprint() == first


# ---- the Hub -------------------------------------------------------------------------------------------------------


class Broken(Exception):
    """Stands for what must never be swallowed."""


def hub(monkeypatch, answer) -> list:
    """Let load_dataset give (or raise) the answer; returns the list of the calls to come."""
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset)
    return calls


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_of_the_hub_is_read_by_split(tmp_path, monkeypatch, streaming):
    folder = tmp_path / "repository"
    write(folder / "train.jsonl", DOCUMENTS[:40])
    write(folder / "validation.jsonl", DOCUMENTS[40:50])
    loaded = datasets.load_dataset(str(folder), streaming=streaming, cache_dir=str(tmp_path / "cache"))
    calls = hub(monkeypatch, loaded)
    options = {"streaming": streaming}
    assert list(TextSource("some/corpus:en", **options).documents()) == DOCUMENTS[:40]
    assert list(TextSource("some/corpus", split="val", **options).documents()) == DOCUMENTS[40:50]
    assert list(TextSource("some/corpus", split="all", **options).documents()) == DOCUMENTS[:50]
    assert calls[0] == (("some/corpus", "en"), options)
    assert "splits are train, validation, or all" in refused("some/corpus", split="test", **options)
    assert "row 1: no column 'body'; columns are 'text'" in refused("some/corpus", text_column="body", **options)


def test_a_hub_dataset_with_only_train_is_divided(monkeypatch):
    hub(monkeypatch, datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": DOCUMENTS})))
    found = [list(TextSource("some/corpus", split=split).documents()) for split in SPLITS]
    assert sorted(chain(*found)) == sorted(DOCUMENTS)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (datasets.exceptions.DatasetNotFoundError("Dataset 'x' doesn't exist on the Hub"), "not found as a file"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'x' is a gated dataset\nmore"), "run 'hf auth login'"),
        (ConnectionError("Couldn't reach 'x' on the Hub (OfflineModeIsEnabled)"), "offline mode is on; run 'hf "),
        (ConnectionError("Couldn't reach 'x' on the Hub (LocalEntryNotFoundError)"), "the Hub cannot be reached"),
        (ValueError("Config name is missing.\nPlease pick one among: ['de', 'en']\nExample"), "they are de, en"),
        (RuntimeError("Dataset scripts are no longer supported, but found x.py"), "scripts are no longer supported"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(monkeypatch, error, message):
    hub(monkeypatch, error)
    assert message in refused("some/corpus")
    with pytest.raises(DataError, match="some/corpus"):
        TextSource("some/corpus").fingerprint()


def test_a_bug_is_not_taken_for_the_hub(monkeypatch):
    hub(monkeypatch, Broken())
    with pytest.raises(Broken):
        list(TextSource("some/corpus").documents())


def test_hub_fingerprint_follows_the_commit(monkeypatch):
    class Builder:
        hash = "1"

    hub(monkeypatch, Builder())
    first = TextSource("some/corpus").fingerprint()
    Builder.hash = "2"
    assert TextSource("some/corpus").fingerprint() != first


class Flaky:
    """A streamed dataset whose connection breaks after every few rows."""

    column_names = None

    def __init__(self, start: int = 0, rows_between_failures: int = 7):
        self.start, self.between = start, rows_between_failures

    def skip(self, n):
        return Flaky(self.start + n, self.between)

    def __iter__(self):
        for i in range(self.start, len(DOCUMENTS)):
            if i - self.start == self.between:
                raise ConnectionError("Server Disconnected")
            yield {"text": DOCUMENTS[i]}


def test_network_failures_neither_lose_nor_repeat_rows(monkeypatch):
    hub(monkeypatch, {"train": Flaky(), "test": Flaky()})
    monkeypatch.setattr(text.time, "sleep", lambda seconds: None)
    assert list(TextSource("some/corpus", streaming=True).documents()) == DOCUMENTS


def test_a_network_that_stays_away_ends_in_a_sentence(monkeypatch):
    hub(monkeypatch, {"train": Flaky(rows_between_failures=0), "test": Flaky()})
    slept = []
    monkeypatch.setattr(text.time, "sleep", slept.append)
    monkeypatch.setattr(text.time, "monotonic", lambda: sum(slept))
    with pytest.raises(
        Interrupted, match=r"some/corpus: the network failed for .* run the same command again"
    ) as error:
        list(TextSource("some/corpus", streaming=True).documents())
    assert error.value.exit_code == 75
    assert sum(slept) > text.PATIENCE_SECONDS / 2
