"""The table of latents: what is written is read back, and what is no such table is refused."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlsae.analysis import latents
from mlsae.analysis.latents import read_numbers, read_row, read_words, save_columns
from mlsae.errors import ModelError

N = 23


def table(**more: pa.Array) -> dict[str, pa.Array]:
    words = [[f"w{(i * j) % 5}" for j in range(i % 4)] for i in range(N)]
    return {
        "latent": pa.array(range(N), pa.int32()),
        "std": pa.array([None if i % 3 == 0 else i / 7 for i in range(N)]),
        "promoted": pa.array(words, pa.list_(pa.string())),
        "promoted_logits": pa.array([[1.5] * len(row) for row in words], pa.list_(pa.float32())),
    } | more


@pytest.fixture(params=[4, 4096])
def path(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch) -> Path:
    monkeypatch.setattr(latents, "GROUP_ROWS", request.param)
    save_columns(tmp_path / "x.parquet", table())
    assert pq.read_metadata(tmp_path / "x.parquet").num_row_groups == -(-N // request.param)
    return tmp_path / "x.parquet"


def test_numbers_are_read_back(path: Path):
    found = read_numbers(path, ["std", "absent"], N)
    assert set(found) == {"std"}
    want = [np.nan if i % 3 == 0 else i / 7 for i in range(N)]
    assert np.array_equal(found["std"], want, equal_nan=True)


def test_words_are_read_back(path: Path):
    found = read_words(path, "promoted", N)
    assert sorted(found.strings) == sorted(set(found.strings))
    got = [[found.strings[code] for code in row if code >= 0] for row in found.codes]
    assert got == table()["promoted"].to_pylist()
    assert read_words(path, "suppressed", N) is None


def test_rows_are_read_back(path: Path):
    want = pq.read_table(path).to_pylist()
    assert [read_row(path, latent, N) for latent in range(N)] == want


@pytest.mark.parametrize(
    "odd",
    [
        {"latent": pa.array([*range(N - 1), 0])},
        {"latent": pa.array(["x"] * N)},
        {"std": pa.array(["x"] * N)},
        {"promoted": pa.array([[1]] * N)},
        {"promoted": pa.array(["x"] * N)},
        {"promoted": pa.array([["x"] * 65] * N)},
        {"promoted_logits": pa.array([["x"]] * N)},
    ],
)
def test_other_columns_are_refused(tmp_path: Path, odd: dict[str, pa.Array]):
    path = tmp_path / "x.parquet"
    save_columns(path, table(**odd))

    def read() -> None:
        read_numbers(path, ["std"], N)
        read_words(path, "promoted", N)

    with pytest.raises(ModelError, match="is not a whole table of latents"):
        read()


def test_other_sizes_are_refused(path: Path, tmp_path: Path):
    for n_latents in (N - 1, N + 1):
        with pytest.raises(ModelError, match=f"it has 23 rows, the SAE {n_latents} latents"):
            read_numbers(path, [], n_latents)
    with pytest.raises(ModelError, match="no such file; `mlsae analyze` writes it"):
        read_numbers(tmp_path / "absent", [], N)


def test_a_row_larger_than_any_of_ours_is_refused(tmp_path: Path):
    path = tmp_path / "x.parquet"
    rows = [[f"{i}{j}" + "x" * 20_000 for j in range(8)] for i in range(N)]
    save_columns(path, table(promoted=pa.array(rows)))
    with pytest.raises(ModelError, match="rows hold"):
        read_row(path, 0, N)


def test_one_long_word_that_every_row_names_is_held_once(tmp_path: Path):
    path = tmp_path / "x.parquet"
    save_columns(path, table(promoted=pa.array([["x" * 100_000] * 8] * N)))
    assert (len(read_words(path, "promoted", N).strings), len(read_row(path, 3, N)["promoted"])) == (1, 8)


def test_damage_anywhere_is_refused_in_a_sentence_if_it_is_seen(path: Path):
    whole, draw = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        data[draw.integers(len(data))] ^= 1 << draw.integers(8)
        path.write_bytes(data)
        try:
            for latent in range(N):
                read_row(path, latent, N)
            read_numbers(path, ["std"], N)
            read_words(path, "promoted", N)
        except ModelError:
            refused += 1
    assert refused > 20
