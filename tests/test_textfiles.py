"""One file's rows: every format gives the same ones, and damage is found and placed."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from mlsae import textfiles
from mlsae.errors import DataError
from mlsae.textfiles import SEPARATOR_LINE, rows

DOCUMENTS = ["one fish", 'two\nlines, "quoted"', "naïve café 🙂", "a longer document " * 20, "last"]


def jsonl(documents: list[str]) -> bytes:
    return "".join(json.dumps({"meta": i, "text": text}) + "\n" for i, text in enumerate(documents)).encode()


def write_every_format(folder: Path, documents: list[str]) -> list[Path]:
    """The same documents in each format that can be read."""
    raw = jsonl(documents)
    (folder / "a.jsonl").write_bytes(raw)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(raw))
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(raw))
    (folder / "a.txt").write_text(f"\n{SEPARATOR_LINE}\n".join(documents), encoding="utf-8")
    table = pa.table({"meta": list(range(len(documents))), "text": documents})
    pq.write_table(table, folder / "a.parquet")
    with pa.ipc.new_stream(str(folder / "a.arrow"), table.schema) as stream:
        stream.write_table(table)
    with open(folder / "a.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["meta", "text"], *([i, text] for i, text in enumerate(documents))])
    return sorted(folder.iterdir())


def texts(path: Path, column: str = "text") -> list[str]:
    return [row.columns[column] for row in rows(path, column)]


def refused(path: Path) -> str:
    with pytest.raises(DataError) as error:
        texts(path)
    return str(error.value)


def test_every_format_gives_the_same_documents(tmp_path):
    documents = [text.rstrip() for text in DOCUMENTS]
    for path in write_every_format(tmp_path, documents):
        assert texts(path) == documents, path.name


def test_progress_rises_to_one(tmp_path):
    for path in write_every_format(tmp_path, DOCUMENTS * 50):
        fractions = [row.fraction for row in rows(path, "text")]
        assert fractions == sorted(fractions), path.name
        assert fractions[-1] == 1, path.name


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_compressed_files_end_to_end_are_one(tmp_path, pack):
    path = tmp_path / f"a.jsonl.{'gz' if pack is gzip.compress else 'zst'}"
    path.write_bytes(pack(jsonl(DOCUMENTS[:2])) + pack(jsonl(DOCUMENTS[2:])))
    assert texts(path) == DOCUMENTS


# ---- .txt ----------------------------------------------------------------------------------------------------------


def test_txt_without_separators_is_cut_at_blank_lines_and_loses_only_those(tmp_path):
    paragraphs = [f"Paragraph {i}. " + "word " * (20 + i % 60) for i in range(400)]
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(paragraphs))
    found = texts(path)
    assert len(found) > 10
    assert all(textfiles.MIN_PASSAGE <= len(text) < textfiles.MAX_PASSAGE for text in found[:-1])
    assert "\n".join(found).split() == "\n".join(paragraphs).split()


def test_txt_without_blank_lines_is_cut_at_line_ends(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"line number {i}\n" for i in range(10_000)))
    found = texts(path)
    assert max(map(len, found)) < textfiles.MAX_PASSAGE + 100
    assert "\n".join(found) == path.read_text().rstrip()


def test_short_txt_is_one_document(tmp_path):
    path = tmp_path / "note.txt"
    path.write_text("\n\nHello.\n\nGood bye.\n\n")
    assert texts(path) == ["Hello.\n\nGood bye."]


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "note.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n<|endoftext|>\r\ntwo\r\n")
    assert texts(path) == ["one", "two"]


# ---- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"caf\xe9 au lait", "line 2, byte 12: not UTF-8"),
        (b"half \xed\xa0\x80", "line 2, byte 14: not UTF-8"),
        (b"a\0b", "line 2, byte 10: NUL"),
    ],
)
def test_text_that_is_none_is_placed(tmp_path, bad, message):
    path = tmp_path / "a.txt"
    path.write_bytes(b"12345678\n" + bad + b"\n")
    assert message in refused(path)
    assert str(path) in refused(path)


@pytest.mark.parametrize("bad", ['{"text": "x"', '{"text": x}', "[1, 2]", "[" * 100_000, '"just a string"'])
def test_malformed_line_is_named_with_the_rows_before_it(tmp_path, bad):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two"}\n' + bad + "\n")
    assert "line 4, byte 33: not " in refused(path)
    assert "2 rows read so far" in refused(path)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_truncated_archive_says_how_far_it_was_read(tmp_path, suffix):
    compress = {"gz": gzip.compress, "zst": zstandard.compress}[suffix]
    whole = compress(b"".join(jsonl([f"{i * 7919 % 1013} {i}" * 20]) for i in range(8_000)))
    path = tmp_path / f"a.jsonl.{suffix}"
    for kept in (0.9, 0.999):
        path.write_bytes(whole[: int(len(whole) * kept)])
        message = refused(path)
        assert "the compressed data ends too early" in message
        assert int(message.partition(" rows read so far")[0].split()[-1]) > 2_000
    path.write_bytes(b"")
    assert "0 rows read so far" in refused(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_what_is_not_in_the_format_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is no archive" * 100)
    assert "0 rows read so far" in refused(tmp_path / name)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_bomb_is_refused_from_its_ratio(tmp_path, suffix):
    compress = {"gz": gzip.compress, "zst": zstandard.compress}[suffix]
    path = tmp_path / f"a.txt.{suffix}"
    path.write_bytes(compress(b"a line of text\n" * 200_000))
    assert "at most 200 times its size" in refused(path)


def test_largest_expansion_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(textfiles, "MAX_EXPANDED_BYTES", 1000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(DOCUMENTS * 10)))
    assert "expands to" in refused(path)


def test_endless_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(textfiles, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["short", "x" * 2000]))
    assert "line 2, byte 29: longer than 1000 bytes" in refused(path)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_table_without_the_column_is_refused_before_reading(tmp_path, suffix):
    table, path = pa.table({"content": ["x"], "meta": [1]}), tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table)
    assert "no column 'text'; columns are 'content', 'meta'; use --text-column" in refused(path)


def test_an_arrow_file_cut_short_is_damage(tmp_path):
    path = write_every_format(tmp_path, DOCUMENTS)[0]
    path.write_bytes(path.read_bytes()[:-100])
    assert "rows read so far; repair the file" in refused(path)
