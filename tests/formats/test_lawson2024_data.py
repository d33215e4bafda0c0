"""The published data sets, `-dists` and `-examples`: columns recomputed, windows compared, damage refused, their code asked."""

import json
import math
import os
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import proof
from mlsae.analysis.example_file import read_about, read_all, read_examples
from mlsae.analysis.example_rows import Example
from mlsae.analysis.examples import Examples
from mlsae.analysis.lawson2024_dists import TOLERANCE, columns, read_dists, write_dists
from mlsae.analysis.lawson2024_examples import Imported, import_examples, write_examples
from mlsae.analysis.layers import LayerStatistics, PlainCode
from mlsae.data import PackInfo, TokenBlocks
from mlsae.errors import ConfigError, ModelError
from mlsae.sae import MLSAE
from mlsae.tokens import Tokenizer
from tiny import byte_tokenizer

PYTHON = proof.peer_python("lawson2024", "no_package_of_that_name")
peer = pytest.mark.skipif(PYTHON is None, reason="set MLSAE_PEER_LAWSON2024 and MLSAE_PEER_LAWSON2024_PATH")
TOKENIZER = Tokenizer(byte_tokenizer())
N_LAYERS, N_LATENTS, LENGTH, N_BLOCKS = 3, 12, 16, 8


def codes(seed: int = 0) -> PlainCode:
    """The k largest of few latents, so that several fall on one; the last latent is never active."""
    torch.manual_seed(seed)
    top = torch.rand(N_LAYERS, LENGTH * N_BLOCKS, N_LATENTS - 1).topk(3)
    return PlainCode(top.values * 9 + 0.1, top.indices)


def statistics() -> LayerStatistics:
    found = LayerStatistics(N_LAYERS, N_LATENTS)
    found.update(codes())
    return found


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(next(folder.glob("data/train-*.parquet"))).to_pylist()


def write_rows(folder: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> Path:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "data" / "train-00000-of-00001.parquet")
    return folder


def definition(counts: list[float], totals: list[float]) -> dict[str, Any]:
    """The published columns of one latent, in Python's floats."""
    count, total = sum(counts), sum(totals)
    probs = [t / total if total else math.nan for t in totals]
    mean = sum(layer * p for layer, p in enumerate(probs))
    var = sum(layer**2 * p for layer, p in enumerate(probs)) - mean**2
    scalars = {"count": count, "total": total, "mean": total / (count + 1e-8), "layer_mean": mean, "layer_var": var}
    means = [t / (c + 1e-8) for t, c in zip(totals, counts, strict=True)]
    std = math.sqrt(max(var, 0.0)) if total else math.nan
    return {**scalars, "layer_std": std, "counts": counts, "totals": totals, "means": means, "probs": probs}


# ---- layer distributions -----------------------------------------------------------------------------------------------


def test_a_published_row():
    """Latent 0 of tim-lawson/mlsae-gpt2-x64-k32-dists."""
    totals = (43.93689, 0, 10.70555, 9.94031, 3.87512, 10.33491, 17.14882, 4.01866, 6.60453, 19.44759, 37.76560, 0)
    counts = torch.tensor([[40, 0, 9, 8, 3, 8, 12, 3, 4, 12, 27, 0]]).T
    found = columns(torch.tensor([totals], dtype=torch.float64).T, counts)
    want = {"count": 126, "mean": 1.299825, "layer_mean": 5.220183, "layer_var": 15.743475, "layer_std": 3.967805}
    assert {name: found[name].item() for name in want} == pytest.approx(want, rel=1e-5)


def test_every_column_written_is_the_published_one(tmp_path: Path):
    found = statistics()
    write_dists(found, tmp_path / "a-dists")
    rows = rows_of(tmp_path / "a-dists")
    assert [row.pop("latent") for row in rows] == list(range(N_LATENTS))
    for latent, row in enumerate(rows):
        want = definition(found.counts[:, latent].double().tolist(), found.totals[:, latent].tolist())
        assert row.keys() == want.keys()
        for name, value in want.items():
            assert row[name] == pytest.approx(value, rel=1e-6, abs=1e-9, nan_ok=True), (latent, name)
    assert "rectified" in (tmp_path / "a-dists" / "README.md").read_text()


def test_what_is_written_is_read_exactly_and_counts_every_activation_once(tmp_path: Path):
    found = statistics()
    write_dists(found, tmp_path / "a")
    write_dists(found, tmp_path / "a.safetensors")
    dists = read_dists(tmp_path / "a")
    assert torch.equal(dists.totals, found.totals)
    assert torch.equal(dists.counts, found.counts)
    assert int(dists.counts.sum()) == N_LAYERS * N_BLOCKS * LENGTH * 3
    assert torch.equal(read_dists(tmp_path / "a.safetensors").totals, found.totals.float().double())
    ours, theirs = found.distribution(), dists.distribution()
    for name, value in vars(ours).items():
        torch.testing.assert_close(vars(theirs)[name], value, rtol=0, atol=0, equal_nan=True)


def test_unused_latents_may_be_null_and_sums_negative(tmp_path: Path):
    unused = definition([0, 0, 0], [0, 0, 0])
    null = unused | dict.fromkeys(("layer_mean", "layer_var", "layer_std")) | {"probs": [None] * 3}
    negative = definition([3, 2, 1], [-0.5, 4, 1])
    rows = [{"latent": i, **row} for i, row in enumerate([negative, null, unused])]
    schema = pa.Table.from_pylist([rows[0], rows[2]]).schema
    schema = schema.set(schema.get_field_index("count"), pa.field("count", pa.float64()))
    for name in ("counts", "totals"):
        schema = schema.set(schema.get_field_index(name), pa.field(name, pa.list_(pa.float64())))
    found = read_dists(write_rows(tmp_path, rows, schema))
    assert found.counts.T.tolist() == [[3, 2, 1], [0, 0, 0], [0, 0, 0]]
    assert found.distribution().used.tolist() == [True, False, False]


def test_columns_in_single_precision_agree(tmp_path: Path):
    write_dists(statistics(), tmp_path)
    rows = rows_of(tmp_path)
    for row in rows:
        for name, value in row.items():
            if name != "latent":
                row[name] = np.float32(value).tolist()
        mean = np.float32(sum(np.float32(i) * np.float32(p) for i, p in enumerate(row["probs"])))
        var = np.float32(sum(np.float32(i * i) * np.float32(p) for i, p in enumerate(row["probs"]))) - mean**2
        row["layer_var"] = float(var)
    read_dists(write_rows(tmp_path, rows))


@pytest.mark.parametrize("name", [name for name in definition([1.0], [1.0]) if name not in ("counts", "totals")])
def test_a_column_that_does_not_follow_is_refused(tmp_path: Path, name: str):
    write_dists(statistics(), tmp_path)
    rows, off = rows_of(tmp_path), 1 + 10 * TOLERANCE * (30 if name == "layer_var" else 2)
    rows[4][name] = [x * off for x in rows[4][name]] if isinstance(rows[4][name], list) else rows[4][name] * off
    with pytest.raises(ModelError, match=rf"latent 4: {name} is .* follows from its totals and counts"):
        read_dists(write_rows(tmp_path, rows))


def drop(name: str) -> Callable[[list[dict]], Any]:
    return lambda rows: [row.pop(name) for row in rows]


ODD_ROWS = {
    "latents are not 0, 1, 2": lambda rows: rows.pop(3),
    "it has other columns": drop("means"),
    "not one as long as another": lambda rows: rows[2].update(means=[1.0]),
    "lists are of different lengths": lambda rows: [row.update(means=[1.0]) for row in rows],
    "column 'means' is double; it must be lists": lambda rows: [row.update(means=1.0) for row in rows],
    "-1 activations": lambda rows: rows[2].update(counts=[-1.0, 0, 0]),
    "1.5 activations": lambda rows: rows[2].update(counts=[1.5, 0, 0]),
    "0 activations that sum to": lambda rows: rows[2].update(counts=[0.0, 0, 0], count=0.0),
    "sum to nan": lambda rows: rows[2].update(totals=[None, 1.0, 1.0]),
    "column 'latent' is": lambda rows: [row.update(latent=float(row["latent"])) for row in rows],
}


@pytest.mark.parametrize("reason", ODD_ROWS)
def test_damaged_rows_are_refused(tmp_path: Path, reason: str):
    write_dists(statistics(), tmp_path)
    rows = rows_of(tmp_path)
    ODD_ROWS[reason](rows)
    with pytest.raises(ModelError, match=reason):
        read_dists(write_rows(tmp_path, rows))


def test_what_holds_no_distributions_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match=r"holds no data/train-\*.parquet"):
        read_dists(tmp_path)
    write_dists(statistics(), tmp_path / "a")
    part = next((tmp_path / "a").glob("data/*"))
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(ModelError, match="not a whole Parquet file"):
        read_dists(tmp_path / "a")
    for tensors in ({"counts": torch.ones(3)}, {"counts": torch.ones(3, 2), "totals": torch.ones(2, 3)}):
        save_file(tensors, tmp_path / "b.safetensors")
        with pytest.raises(ModelError, match=r"holds no counts|'totals' has shape"):
            read_dists(tmp_path / "b.safetensors")


# ---- examples ------------------------------------------------------------------------------------------------------------


def our_examples(path: Path, n_sampled: int = 2, window: int = 6) -> Path:
    """Examples of `codes` on random bytes, saved in our file; layers 0, 1 and 4."""
    found = Examples(N_LAYERS, N_LATENTS, LENGTH, n_top=40, n_sampled=n_sampled, window=window)
    found.update(codes(), torch.ones(N_BLOCKS, LENGTH, dtype=torch.bool), np.arange(N_BLOCKS))
    found.save(path, blocks(), layers=(0, 1, 4))
    return path


def blocks() -> TokenBlocks:
    tokens = np.random.default_rng(0).integers(0, 250, (N_BLOCKS, LENGTH)).astype(np.uint16)
    about = PackInfo(*tokens.shape, "uint16", 2, 0, 0, 249, True, TOKENIZER.fingerprint, {}, "")
    return TokenBlocks(tokens, np.array([0, 70], dtype=np.int64), about)


def row(latent: int, layer: int, act: float, ids: list[int], acts: list[float], token_id: int) -> tuple[Any, ...]:
    """A published row, but its id."""
    lists = (ids, TOKENIZER.hf.convert_ids_to_tokens(ids), acts)
    return (latent, layer, token_id, TOKENIZER.hf.decode(token_id), act, *map(json.dumps, lists))


NAMES = ("latent", "layer", "token_id", "token", "act", "token_ids", "tokens", "acts")
IDS, ACTS = [70, 71, 72, 73, 74, 75, 76, 77], [0.0, 0.0, 2.0, 0.0, 1.5, 0.0, 0.0, 0.25]
ROWS = [
    row(3, 1, 1.5, IDS, ACTS, 74),
    row(3, 1, 2.5, IDS[:6], [0.0, 0.0, 0.0, 0.0, 2.5, 0.0], 74),
    row(3, 1, 9.5, [], [], 80),
    row(0, 2, 1.5, IDS, ACTS, 74),
    row(0, 0, 2.0, IDS, ACTS, 72),
]


def database(path: Path, rows: list[tuple[Any, ...]], table: str | None = None) -> Path:
    """A published SQLite file."""
    path.unlink(missing_ok=True)
    kinds = ("INTEGER", "INTEGER", "INTEGER", "TEXT", "REAL", "JSON", "JSON", "JSON")
    columns_of = ", ".join(f"{name} {kind}" for name, kind in zip(NAMES, kinds, strict=True))
    connection = sqlite3.connect(path)
    connection.execute(table or f"CREATE TABLE examples (id INTEGER PRIMARY KEY, {columns_of})")
    if table is None:
        connection.executemany(f"INSERT INTO examples ({', '.join(NAMES)}) VALUES (?,?,?,?,?,?,?,?)", rows)
    connection.commit()
    connection.close()
    return path


def everything(path: Path) -> list[Example]:
    return [example for group in read_all(path) for example in group]


def imported(source: Path, path: Path, **changes: Any) -> Imported:
    given = {"n_latents": N_LATENTS, "layers": (0, 1, 4), "tokenizer": TOKENIZER, "progress": False, **changes}
    return import_examples(source, path, **given)


def test_published_examples_by_hand(tmp_path: Path):
    """The strongest first; one whose window is empty, and one whose window does not hold its token, are left out."""
    done = imported(database(tmp_path / "a.db", ROWS), tmp_path / "a.parquet")
    assert done == Imported(n_examples=4, n_left_out=1)
    first, second = read_examples(tmp_path / "a.parquet", 3, 1)
    facts = {
        "latent": 3,
        "layer": 1,
        "kind": "top",
        "quantile": None,
        "block": None,
        "position": None,
        "document": None,
    }
    tokens = {"tokens": IDS[:6], "activations": [0.0, 0.0, 0.0, 0.0, 2.5, 0.0], "centre": 4}
    assert first == Example(**facts, rank=0, value=2.5, **tokens)
    assert second == Example(**facts, rank=1, value=1.5, tokens=IDS, activations=ACTS, centre=4)
    assert [(e.layer, e.centre) for e in read_examples(tmp_path / "a.parquet", 0)] == [(0, 2), (4, 4)]
    assert read_about(tmp_path / "a.parquet").settings.n_sampled == 0


def test_a_window_of_other_text_is_left_out(tmp_path: Path):
    source = database(tmp_path / "a.db", [row(3, 1, 1.25, IDS, ACTS, 74), row(3, 1, 1.5, IDS, ACTS, 75)])
    assert imported(source, tmp_path / "a.parquet") == Imported(0, 2)
    assert read_examples(tmp_path / "a.parquet", 3) == []


def test_a_token_that_comes_twice_is_the_one_with_four_before_it(tmp_path: Path):
    ids, acts = [74, 71, 72, 73, 74, 75, 76, 77], [1.5, 0, 0, 0, 1.5, 0, 0, 0]
    imported(database(tmp_path / "a.db", [row(3, 1, 1.5, ids, acts, 74)]), tmp_path / "a.parquet")
    assert read_examples(tmp_path / "a.parquet", 3)[0].centre == 4


def test_a_copy_from_the_hub_says_the_same(tmp_path: Path):
    table = [{"id": i + 7, **dict(zip(NAMES, one, strict=True))} for i, one in enumerate(ROWS)]
    imported(database(tmp_path / "a.db", ROWS), tmp_path / "a.parquet")
    assert imported(write_rows(tmp_path / "b-examples", table), tmp_path / "b.parquet") == Imported(4, 1)
    assert everything(tmp_path / "b.parquet") == everything(tmp_path / "a.parquet")


def test_what_is_written_is_imported_again(tmp_path: Path):
    """All windows are whole: four tokens to both sides, as far as the document and the sequence go."""
    ours = our_examples(tmp_path / "ours.parquet")
    n_written = write_examples(ours, tmp_path / "a.db", TOKENIZER, progress=False)
    assert imported(tmp_path / "a.db", tmp_path / "back.parquet") == Imported(n_written, 0)
    want = [e for e in everything(ours) if e.kind == "top" and e.rank < 32]
    assert len(want) == n_written > 100
    for e, f in zip(want, everything(tmp_path / "back.parquet"), strict=True):
        near = slice(max(0, e.centre - 4), e.centre + 5)
        assert (f.latent, f.layer, f.rank, f.value, f.centre) == (e.latent, e.layer, e.rank, e.value, min(e.centre, 4))
        assert (f.tokens, f.activations) == (e.tokens[near], e.activations[near])


def test_the_written_table_is_the_published_one(tmp_path: Path):
    write_examples(our_examples(tmp_path / "ours.parquet"), tmp_path / "a.db", TOKENIZER, progress=False)
    database(tmp_path / "theirs.db", ROWS)
    infos = [
        sqlite3.connect(tmp_path / name).execute("PRAGMA table_info(examples)").fetchall()
        for name in ("a.db", "theirs.db")
    ]
    assert infos[0] == infos[1]
    rows = sqlite3.connect(tmp_path / "a.db").execute("SELECT * FROM examples").fetchall()
    assert [one[0] for one in rows] == list(range(1, len(rows) + 1))
    assert {one[2] for one in rows} == {0, 1, 2}  # layers are counted there
    assert max(len(json.loads(one[8])) for one in rows) == 9
    for one in rows[:50]:
        assert row(one[1], one[2], one[5], json.loads(one[6]), json.loads(one[8]), one[3]) == one[1:]
    assert list(tmp_path.glob(".tmp*")) == []
    assert list(tmp_path.glob("a.db-*")) == []


def test_examples_without_a_sample_are_the_strongest_alone_and_imported_ones_do_not_merge(tmp_path: Path):
    with_sample, without = (our_examples(tmp_path / f"{n}.parquet", n_sampled=n) for n in (2, 0))
    assert everything(without) == [e for e in everything(with_sample) if e.kind == "top"]
    merged = Examples.load(without).merge(Examples.load(without))
    merged.save(tmp_path / "merged.parquet", blocks(), layers=(0, 1, 4))
    assert read_examples(tmp_path / "merged.parquet", 1) == read_examples(without, 1)
    imported(database(tmp_path / "a.db", ROWS), tmp_path / "a.parquet")
    with pytest.raises(ModelError, match="have no places in a text; they cannot be merged"):
        Examples.load(tmp_path / "a.parquet")


def test_examples_of_another_tokenizer_or_too_narrow_are_not_written(tmp_path: Path):
    other = Tokenizer(byte_tokenizer(bos=True))
    with pytest.raises(ModelError, match="of another tokenizer"):
        write_examples(our_examples(tmp_path / "a.parquet"), tmp_path / "a.db", other)
    with pytest.raises(ConfigError, match="window: 3 tokens to a side"):
        write_examples(our_examples(tmp_path / "b.parquet", window=3), tmp_path / "a.db", TOKENIZER)
    assert not (tmp_path / "a.db").exists()


def cell(column: str, value: Any) -> list[tuple[Any, ...]]:
    """The first row with one cell changed."""
    return [tuple(value if name == column else x for name, x in zip(NAMES, ROWS[0], strict=True))]


ODD_CELLS = [
    ("latent", N_LATENTS, "column 'latent' holds 12"),
    ("latent", -1, "column 'latent' holds -1"),
    ("layer", 3, "column 'layer' holds 3"),
    ("layer", None, "column 'layer' holds None"),
    ("token_id", "x", "column 'token_id' holds x"),
    ("token", b"\x05", "column 'token' holds"),
    ("act", 0.0, "column 'act' holds 0.0"),
    ("act", float("inf"), "column 'act' holds inf"),
    ("token_ids", "[1, 2", "not JSON"),
    ("token_ids", "[99999999999, 1]", "column 'token_ids' holds"),
    ("token_ids", b"\x00", "column 'token_ids' holds"),
    ("tokens", "[1]", "column 'tokens' holds"),
    ("acts", "[1.0]", "column 'acts' holds"),
    ("acts", "[1.0, NaN]", "holds NaN"),
    ("acts", json.dumps([0.5] * 100), "column 'acts' holds"),
    ("tokens", json.dumps(["x"] * 8), r"token 70 is 'x' there and .* to this tokenizer"),
]  # fmt: skip


@pytest.mark.parametrize(("column", "value", "reason"), ODD_CELLS)
def test_damaged_examples_are_refused(tmp_path: Path, column: str, value: Any, reason: str):
    source = database(tmp_path / "a.db", cell(column, value))
    with pytest.raises((ModelError, ConfigError), match=reason):
        imported(source, tmp_path / "a.parquet")
    assert not (tmp_path / "a.parquet").exists()


def test_what_is_no_table_of_examples_is_refused(tmp_path: Path):
    path = tmp_path / "a.db"
    path.write_bytes(b"no database" * 100)
    with pytest.raises(ModelError, match="not a whole SQLite file"):
        imported(path, tmp_path / "a.parquet")
    view = f"CREATE VIEW examples AS SELECT 1 AS id, {', '.join(f'0 AS {name}' for name in NAMES)}"
    for table in ("CREATE TABLE other (id INTEGER)", "CREATE TABLE examples (id INTEGER)", view):
        with pytest.raises(ModelError, match="holds no table 'examples'"):
            imported(database(path, [], table), tmp_path / "a.parquet")
    database(path, ROWS * 6)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError, match="not a whole SQLite file"):
        imported(path, tmp_path / "a.parquet")
    with pytest.raises(ModelError, match="33 examples; at most 32"):
        imported(database(path, ROWS[:1] * 33), tmp_path / "a.parquet")
    with pytest.raises(ModelError, match="no such file"):
        imported(tmp_path / "b.db", tmp_path / "a.parquet")
    with pytest.raises(ModelError, match=r"holds no data/train-\*.parquet"):
        imported(tmp_path, tmp_path / "a.parquet")


# ---- the published code -----------------------------------------------------------------------------------------------------


def ask(action: str, folder: Path) -> None:
    script = Path(__file__).parent / "peers" / "lawson2024_data.py"
    command = [str(PYTHON), str(script), action, str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]


@peer
def test_what_the_published_analysis_writes_is_what_ours_finds(tmp_path: Path):
    ask("write", tmp_path)
    sae, seen = MLSAE.from_pretrained(tmp_path / "sae"), load_file(tmp_path / "seen.safetensors")
    code = sae.encode(seen["resid"].flatten(1, 2))
    ours = LayerStatistics(len(sae.layers), sae.config.n_latents)
    ours.update(PlainCode(code.values.detach(), code.indices))
    for source in ("dists", "dists.safetensors"):
        theirs = read_dists(tmp_path / source)
        assert torch.equal(theirs.counts, ours.counts)
        torch.testing.assert_close(theirs.totals, ours.totals, rtol=1e-5, atol=1e-5)
    tokenizer = Tokenizer(AutoTokenizer.from_pretrained(tmp_path / "lm"))
    given = {"n_latents": sae.config.n_latents, "layers": sae.layers, "tokenizer": tokenizer, "context_length": 16}
    done = [imported(tmp_path / name, tmp_path / f"{name}.parquet", **given) for name in ("examples.db", "examples")]
    assert done[0] == done[1]
    assert min(done[0].n_examples, done[0].n_left_out) > 100
    dense = code.to_dense().detach()
    found = everything(tmp_path / "examples.db.parquet")
    assert len(found) == done[0].n_examples
    ids = seen["tokens"].flatten().tolist()
    for e in found:  # positions are counted through each batch of two sequences of sixteen
        starts = [i for i in range(len(ids)) if ids[i - e.centre : i - e.centre + len(e.tokens)] == e.tokens]
        here = [i for i in starts if abs(dense[e.layer, i, e.latent] - e.value) < 2e-3 * e.value]
        assert here, e
        near = dense[e.layer, here[0] - e.centre : here[0] - e.centre + len(e.tokens), e.latent]
        assert near.tolist() == pytest.approx(e.activations, rel=2e-3, abs=2e-3)


@peer
def test_the_published_analysis_reads_what_is_written(tmp_path: Path):
    found = statistics()
    write_dists(found, tmp_path / "dists")
    write_dists(found, tmp_path / "dists.safetensors")
    n_written = write_examples(
        our_examples(tmp_path / "ours.parquet"), tmp_path / "examples.db", TOKENIZER, progress=False
    )
    ask("read", tmp_path)
    theirs, ours = load_file(tmp_path / "columns.safetensors"), columns(found.totals, found.counts)
    for name, column in ours.items():
        for source in ("local", "hub"):
            got = theirs[f"{source}.{name}"].double()
            torch.testing.assert_close(got, column, rtol=1e-4, atol=1e-4, equal_nan=True)
    examples = json.loads((tmp_path / "examples.json").read_text())
    assert sum(map(len, examples)) == n_written
    ours_there = [e for e in everything(tmp_path / "ours.parquet") if e.kind == "top" and e.rank < 32]
    for members in examples:
        place = (members[0][0], (0, 1, 4)[members[0][1]])
        want = [e for e in ours_there if (e.latent, e.layer) == place]
        for one, e in zip(members, want, strict=True):
            near = slice(max(0, e.centre - 4), e.centre + 5)
            assert (one[2], one[4]) == (e.tokens[e.centre], e.value)
            assert (one[5], one[7]) == (e.tokens[near], e.activations[near])
