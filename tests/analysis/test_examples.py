"""Examples against a brute force over dense activations; laws of order, batches and merging; windows; the file."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from mlsae.analysis import example_file, example_rows, examples
from mlsae.analysis.example_file import SCHEMA, read_about, read_examples, read_peaks
from mlsae.analysis.example_rows import Example
from mlsae.analysis.examples import Examples
from mlsae.data import PackInfo, TokenBlocks
from mlsae.errors import ConfigError, DataError, ModelError, NumericsError, ResourceError

FINGERPRINT = "f" * 64


@dataclass(frozen=True)
class Code:
    """The two fields of mlsae.sae.Code that are read."""

    values: Tensor
    indices: Tensor


@dataclass(frozen=True)
class World:
    """A text and what every latent does on it."""

    dense: Tensor
    """[layer, block, pos, latent], 0 where masked."""
    visible: Tensor
    blocks: TokenBlocks

    def code(self, ids: np.ndarray) -> Code:
        """The sparse code of the visible tokens of some blocks, k as large as it takes."""
        seen = self.dense[:, ids][:, self.visible[ids]]
        k = max(1, int((seen > 0).sum(-1).max())) if seen.numel() else 1
        return Code(*seen.topk(k))

    def collected(self, batches: list[list[int]], **settings: int) -> Examples:
        """The examples of batches of blocks."""
        found = Examples(len(self.dense), self.dense.shape[-1], self.blocks.context_length, **settings)
        for ids in map(np.array, batches):
            found.update(self.code(ids), self.visible[ids], ids)
        return found


def token_blocks(tokens: np.ndarray, starts: list[int]) -> TokenBlocks:
    """Packed text made by hand."""
    unknown = PackInfo(*tokens.shape, "uint16", len(starts), 0, 0, int(tokens.max()), True, FINGERPRINT, {}, "")
    return TokenBlocks(tokens.astype(np.uint16), np.array(starts, dtype=np.int64), unknown)


def world(seed: int, n_layers: int = 2, n_blocks: int = 5, length: int = 11, n_latents: int = 7) -> World:
    """Random activations in quarters, so that many are equal; latent 0 dense, the last never active; some tokens masked."""
    draw = torch.Generator().manual_seed(seed)
    shape = (n_layers, n_blocks, length, n_latents)
    active = torch.rand(shape, generator=draw) < torch.linspace(1, 0, n_latents) ** 2
    visible = torch.rand(n_blocks, length, generator=draw) < 0.85
    dense = torch.randint(1, 12, shape, generator=draw) / 4 * active * visible[None, ..., None]
    tokens = torch.randint(0, 500, (n_blocks, length), generator=draw).numpy()
    starts = np.flatnonzero(torch.rand(n_blocks * length, generator=draw).numpy() < 0.15).tolist()
    return World(dense, visible, token_blocks(tokens, starts))


def drawn(seed: int, place: int, cell: int) -> int:
    """SplitMix64 in Python's integers: the 31 bits that decide whether an event is sampled."""
    x = (place * 0x9E3779B97F4A7C15 + cell * 0xD6E8FEB86659FD93 + seed * 0xD1342543DE82EF95) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return (x ^ x >> 31) >> 33


def brute_force(
    given: World, layers: tuple[int, ...], n_top: int, n_sampled: int, window: int, seed: int = 0
) -> list[Example]:
    """Every example, from lists of all events."""
    n_layers, n_blocks, length, n_latents = given.dense.shape
    documents, tokens = given.blocks.document_ids(np.arange(n_blocks)), given.blocks.tokens(np.arange(n_blocks))
    found = []
    for latent in range(n_latents):
        for row in range(n_layers):
            z = given.dense[row, ..., latent]
            events = [(-z[b, p].item(), b, p) for b, p in z.nonzero().tolist()]
            top = sorted(events)[:n_top]
            by_chance = sorted((-drawn(seed, b * length + p, row * n_latents + latent), v, b, p) for v, b, p in events)
            sampled = sorted(event for _, *event in by_chance[:n_sampled])
            for kind, chosen in (("top", top), ("sampled", sampled)):
                for rank, (value, b, p) in enumerate(chosen):
                    near = [o for o in range(p - window, p + window + 1) if 0 <= o < length]
                    near = [o for o in near if documents[b, o] == documents[b, p]]
                    quantile = None if kind == "top" else (len(chosen) - 1 - rank) * 4 // len(chosen)
                    place = {"block": b, "position": p, "document": int(documents[b, p]), "centre": near.index(p)}
                    context = {"tokens": tokens[b, near].tolist(), "activations": z[b, near].tolist()}
                    what = (latent, layers[row], kind, rank, -value, quantile)
                    found.append(Example(*what, **place, **context))
    return found


def contents(path: Path) -> list[Example]:
    """All examples of a file, in its order."""
    return example_file._examples(pq.read_table(path))


def saved(found: Examples, given: World, path: Path) -> bytes:
    found.save(path, given.blocks)
    return path.read_bytes()


# ---- which events, and what surrounds them ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("n_top", "n_sampled", "window"), [(4, 3, 2), (1, 1, 0), (100, 100, 20)])
def test_the_file_holds_what_a_brute_force_over_all_events_finds(tmp_path, seed, n_top, n_sampled, window):
    given = world(seed)
    settings = {"n_top": n_top, "n_sampled": n_sampled, "window": window}
    found = given.collected([[3, 0], [2], [4, 1]], **settings)
    found.save(tmp_path / "a.parquet", given.blocks, layers=(1, 4))
    assert contents(tmp_path / "a.parquet") == brute_force(given, (1, 4), **settings)


def test_a_latent_that_is_nearly_always_active_is_one_among_rare_ones(tmp_path):
    """Cells with very different numbers of events go through the same update; here hundreds and one."""
    given = world(0, n_blocks=40, length=16, n_latents=12)
    found = given.collected([list(range(40))], n_top=3, n_sampled=5, window=2)
    found.save(tmp_path / "a.parquet", given.blocks)
    assert contents(tmp_path / "a.parquet") == brute_force(given, (0, 1), n_top=3, n_sampled=5, window=2)


def test_latent_ids_may_need_more_than_sixteen_bits():
    latents, n_tokens = torch.tensor([3, 65536 + 3, 2 * 65536 + 2, 65535]), 6
    indices = torch.stack([latents.roll(shift) for shift in range(n_tokens)])[None]
    values = 1 + torch.arange(indices.numel()).view(indices.shape) / 8
    found = Examples(1, 3 * 65536, n_tokens, n_top=6, n_sampled=1, window=1)
    found.update(Code(values, indices), torch.ones(1, n_tokens, dtype=torch.bool), np.array([0]))
    for latent in latents.tolist():
        want = values[indices == latent].sort().values
        assert np.sort(found._sets[0].values[latent]).tolist() == want.tolist()
    assert (found._sets[0].keys >= 0).sum() == indices.numel()


def test_an_example_by_hand(tmp_path):
    """Two sequences of 5 tokens; a document starts at position 3 of the second; position 1 of the first is masked."""
    z = torch.tensor([[0, 9.0, 2, 0.5, 0], [3, 1, 0, 2, 0]])
    visible = torch.tensor([[True, False, True, True, True], [True] * 5])
    blocks = token_blocks(np.array([[10, 11, 12, 13, 14], [20, 21, 22, 23, 24]]), [0, 8])
    given = World((z * visible)[None, ..., None], visible, blocks)
    given.collected([[0, 1]], n_top=3, n_sampled=1, window=2).save(tmp_path / "a.parquet", blocks, layers=[6])
    first, second, third = [e for e in read_examples(tmp_path / "a.parquet", 0) if e.kind == "top"]
    assert (first.value, first.block, first.position, first.layer) == (3, 1, 0, 6)
    assert (first.tokens, first.activations, first.centre) == ([20, 21, 22], [3, 1, 0], 0)
    assert (second.value, second.block, second.position, second.document) == (2, 0, 2, 0)
    assert (second.tokens, second.activations, second.centre) == ([10, 11, 12, 13, 14], [0, 0, 2, 0.5, 0], 2)
    assert (third.value, third.block, third.position, third.document) == (2, 1, 3, 1)
    assert (third.tokens, third.activations, third.centre) == ([23, 24], [2, 0], 0)


def test_a_latent_planted_on_one_token_has_it_at_the_centre_of_every_example(tmp_path):
    given = world(1, n_blocks=30, length=32)
    tokens = given.blocks.tokens(np.arange(30)) % 9
    dense = ((tokens == 5) * torch.rand(30, 32))[None, ..., None]
    given = World(
        dense, torch.ones_like(given.visible), token_blocks(tokens.numpy(), given.blocks.document_starts.tolist())
    )
    given.collected([list(range(30))], n_top=20, n_sampled=20, window=4).save(tmp_path / "a.parquet", given.blocks)
    found = read_examples(tmp_path / "a.parquet", 0)
    assert len(found) == 40
    for example in found:
        assert [t for t, z in zip(example.tokens, example.activations, strict=True) if z] == [5] * example.tokens.count(
            5
        )
        assert example.tokens[example.centre] == 5


def test_the_centre_is_exact_and_its_neighbours_are_in_half_precision(tmp_path):
    values = torch.tensor([[0.1, 1e-3, 70000.0, 1 / 3]])
    given = World(values[None, ..., None], torch.ones(1, 4, dtype=torch.bool), token_blocks(np.ones((1, 4)), [0]))
    given.collected([[0]], n_top=1, n_sampled=1, window=3).save(tmp_path / "a.parquet", given.blocks)
    example = read_examples(tmp_path / "a.parquet", 0)[0]
    assert example.value == example.activations[example.centre] == 70000
    others = values[0, [0, 1, 3]]
    assert [example.activations[i] for i in (0, 1, 3)] == others.half().float().tolist() != others.tolist()


# ---- order, batches, merging -----------------------------------------------------------------------------------------

SETTINGS = {"n_top": 4, "n_sampled": 3, "window": 3}


@pytest.mark.parametrize("batches", [[[0], [1], [2], [3], [4]], [[4, 2, 0, 1, 3]], [[3], [4, 0], [1, 2]]])
def test_neither_batches_nor_their_order_matter(tmp_path, batches):
    given = world(2)
    whole = saved(given.collected([[0, 1, 2, 3, 4]], **SETTINGS), given, tmp_path / "a")
    assert saved(given.collected(batches, **SETTINGS), given, tmp_path / "b") == whole


def test_nor_how_many_positions_are_sorted_at_once(tmp_path, monkeypatch):
    given = world(2)
    whole = saved(given.collected([[0, 1, 2, 3, 4]], **SETTINGS), given, tmp_path / "a")
    monkeypatch.setattr(examples, "POSITIONS_AT_ONCE", 25)  # of sequences of 11
    assert saved(given.collected([[0, 1, 2, 3, 4]], **SETTINGS), given, tmp_path / "b") == whole


def test_parts_merge_to_the_whole_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "CELLS_AT_ONCE", 5)
    given = world(3)
    whole = saved(given.collected([[0, 1, 2, 3, 4]], **SETTINGS), given, tmp_path / "a")
    a, b, c = (given.collected([ids], **SETTINGS) for ids in ([0, 3], [1], [2, 4]))
    assert saved(a.merge(b).merge(c), given, tmp_path / "b") == whole
    assert saved(c.merge(a.merge(b)), given, tmp_path / "b") == whole


def test_text_seen_twice_counts_once(tmp_path):
    given = world(4)
    once = given.collected([[0, 1, 2, 3, 4]], **SETTINGS)
    whole = saved(once, given, tmp_path / "a")
    assert saved(once.merge(once), given, tmp_path / "b") == whole
    assert saved(given.collected([[2, 3, 0, 2, 1, 4, 2]], **SETTINGS), given, tmp_path / "b") == whole
    assert saved(given.collected([[0, 1, 2], [1, 2, 3, 4], [0, 4, 0]], **SETTINGS), given, tmp_path / "b") == whole


def test_merging_changes_neither_part(tmp_path):
    given = world(4)
    a, b = (given.collected([ids], **SETTINGS) for ids in ([0, 1], [2]))
    before = saved(a, given, tmp_path / "a"), saved(b, given, tmp_path / "b")
    a.merge(b)
    assert (saved(a, given, tmp_path / "a"), saved(b, given, tmp_path / "b")) == before


def test_files_of_parts_load_and_merge_to_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(example_rows, "GROUP_ROWS", 20)
    given = world(5)
    whole = saved(given.collected([[0, 1, 2, 3, 4]], **SETTINGS), given, tmp_path / "a")
    for name, ids in (("b", [0, 4]), ("c", [1, 2, 3])):
        given.collected([ids], **SETTINGS).save(tmp_path / name, given.blocks, layers=(7, 3))
    merged = Examples.load(tmp_path / "b").merge(Examples.load(tmp_path / "c"))
    assert saved(merged, given, tmp_path / "d") == whole


def test_what_an_event_must_exceed_is_the_least_of_its_cell():
    found = world(6).collected([[0, 1], [2, 3, 4]], **SETTINGS)
    for kept in (*found._sets, *found.merge(found)._sets):
        assert (kept.least == kept.keys.min(axis=1)).all()


def test_examples_made_otherwise_do_not_merge():
    given = world(0)
    with pytest.raises(ModelError, match="made alike"):
        given.collected([[0]], seed=1).merge(given.collected([[1]], seed=2))


# ---- the sample ------------------------------------------------------------------------------------------------------


def samples(n_seeds: int, n: int, n_tokens: int, n_latents: int = 1) -> np.ndarray:
    """For each seed, cell (2 layers) and token: whether it was sampled, where every latent is active on every token."""
    shape = (2, n_tokens, n_latents)
    code = Code(torch.ones(shape), torch.arange(n_latents).expand(shape))
    drawn = np.zeros((n_seeds, 2 * n_latents, n_tokens), dtype=bool)
    for seed in range(n_seeds):
        found = Examples(2, n_latents, n_tokens, n_top=1, n_sampled=n, window=0, seed=seed)
        found.update(code, torch.ones(1, n_tokens, dtype=torch.bool), np.array([0]))
        np.put_along_axis(drawn[seed], np.array([examples._place(keys) for keys in found._sets[1].keys]), True, axis=1)
    return drawn


def test_every_event_is_sampled_equally_often():
    """Chi-square over tokens; without replacement its mean is (N - 1), once scaled by (N - 1) / (N - n)."""
    n_seeds, n, n_tokens = 400, 8, 40
    for counts in samples(n_seeds, n, n_tokens, n_latents=2).sum(0):
        expected = n_seeds * n / n_tokens
        chi_square = ((counts - expected) ** 2 / expected).sum() * (n_tokens - 1) / (n_tokens - n)
        assert abs(chi_square - (n_tokens - 1)) < 5 * math.sqrt(2 * (n_tokens - 1))


def test_pairs_of_events_are_sampled_equally_often():
    """Neighbouring tokens, layers and latents are drawn independently: the overlap of two samples is hypergeometric."""
    n_seeds, n, n_tokens = 400, 8, 40
    drawn = samples(n_seeds, n, n_tokens, n_latents=2).astype(int)
    mean, share = n * n / n_tokens, n / n_tokens
    spread = math.sqrt(mean * (1 - share) * (n_tokens - n) / (n_tokens - 1) / n_seeds)
    for a in range(4):
        for b in range(a):
            assert abs((drawn[:, a] * drawn[:, b]).sum(1).mean() - mean) < 5 * spread
    together = (drawn[..., 1:] * drawn[..., :-1]).sum(-1).mean()
    assert abs(together - (n_tokens - 1) * share * (n - 1) / (n_tokens - 1)) < 5 * spread


def test_the_sample_does_not_prefer_strong_events(tmp_path):
    """The mean rank of what is sampled is the middle, while the top is the top."""
    n_tokens = 1000
    code = Code(
        torch.arange(1, n_tokens + 1).float().view(1, -1, 1).expand(1, -1, 50), torch.arange(50).expand(1, n_tokens, 50)
    )
    found = Examples(1, 50, n_tokens, n_top=16, n_sampled=16, window=0)
    found.update(code, torch.ones(1, n_tokens, dtype=torch.bool), np.array([0]))
    top, sampled = (kept.values for kept in found._sets)
    assert top.min() == n_tokens - 15
    assert abs(sampled.mean() - n_tokens / 2) < 5 * n_tokens / math.sqrt(12 * 800)


def test_quantiles_cut_the_sample_into_equal_parts(tmp_path):
    values = torch.tensor([3.0, 1, 4, 1.5, 9, 2.6])
    given = World(values.view(1, 1, 6, 1), torch.ones(1, 6, dtype=torch.bool), token_blocks(np.ones((1, 6)), [0]))
    given.collected([[0]], n_top=1, n_sampled=6).save(tmp_path / "a.parquet", given.blocks, n_quantiles=3)
    sampled = [e for e in read_examples(tmp_path / "a.parquet", 0) if e.kind == "sampled"]
    assert [e.quantile for e in sampled] == [2, 2, 1, 1, 0, 0]
    assert [e.value for e in sampled] == values.sort(descending=True).values.tolist()


# ---- the file --------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[World, Path]:
    """A file of several groups of rows."""
    monkeypatch.setattr(example_rows, "GROUP_ROWS", 20)
    given = world(7)
    given.collected([[0, 1, 2, 3, 4]], **SETTINGS).save(tmp_path / "examples.parquet", given.blocks, layers=(2, 5))
    return given, tmp_path / "examples.parquet"


def test_reading_a_latent_is_choosing_its_rows(made):
    given, path = made
    everything = brute_force(given, (2, 5), **SETTINGS)
    assert pq.ParquetFile(path).num_row_groups > 3
    for latent in range(7):
        want = [e for e in everything if e.latent == latent]
        assert read_examples(path, latent) == want
        assert read_examples(path, latent, layer=5) == [e for e in want if e.layer == 5]


def test_peaks_are_the_tokens_of_the_strongest_examples(made):
    given, path = made
    strongest = [e for e in brute_force(given, (2, 5), **SETTINGS) if (e.kind, e.rank) == ("top", 0)]
    found = [pair for latent, token in read_peaks(path) for pair in zip(latent.tolist(), token.tolist(), strict=True)]
    assert sorted(found) == sorted((e.latent, e.tokens[e.centre]) for e in strongest)


def test_a_latent_that_was_never_active_has_no_rows(made):
    assert read_examples(made[1], 6) == []


def test_rows_are_sorted_and_an_example_is_a_row(made):
    table = pq.read_table(made[1])
    rows = table.to_pylist()
    order = [(r["latent"], r["layer"], ["top", "sampled"].index(r["kind"]), r["rank"]) for r in rows]
    assert order == sorted(order)
    assert len(set(order)) == len(order)
    assert [e.to_dict() for e in contents(made[1])] == rows
    assert table.schema.equals(SCHEMA)
    assert json.loads(json.dumps(rows)) == rows


def test_a_file_says_what_it_is_of(made):
    about = read_about(made[1])
    assert about.layers == (2, 5)
    assert about.tokenizer_fingerprint == FINGERPRINT
    assert about.settings.to_dict() == {"n_layers": 2, "n_latents": 7, "context_length": 11, "seed": 0, **SETTINGS}


def test_examples_of_nothing_make_a_file(tmp_path):
    given = world(0)
    given.collected([]).save(tmp_path / "a.parquet", given.blocks)
    assert [read_examples(tmp_path / "a.parquet", latent) for latent in range(7)] == [[]] * 7
    assert saved(Examples.load(tmp_path / "a.parquet"), given, tmp_path / "b") == (tmp_path / "a.parquet").read_bytes()


def test_a_save_that_fails_leaves_the_old_file(made, monkeypatch):
    given, path = made
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(example_file.Writer, "write", full)
    with pytest.raises(ResourceError, match="disk full"):
        given.collected([[0]], **SETTINGS).save(path, given.blocks)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def damages(data: bytes) -> Iterator[bytes]:
    draw = np.random.default_rng(0)
    for at in draw.integers(0, len(data), 60).tolist():
        yield data[:at]
        yield data[:at] + bytes([data[at] ^ 1 << int(draw.integers(8))]) + data[at + 1 :]


def test_a_damaged_file_is_refused_in_one_sentence_or_reads_the_same(made):
    path, good = made[1], made[1].read_bytes()
    want = [read_examples(path, latent) for latent in range(7)]
    outcomes = []
    for data in damages(good):
        path.write_bytes(data)
        try:
            got = [read_examples(path, latent) for latent in range(7)]
        except ModelError as error:
            outcomes.append(len(str(error).splitlines()))
        else:
            outcomes.append(int(got == want))
    assert outcomes == [1] * 120


STRANGERS = {
    "not Parquet": b"PAR1 but no more",
    "empty": b"",
    "other columns": {"text": ["a"]},
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_file_of_another_kind_is_refused(tmp_path, kind):
    stranger, path = STRANGERS[kind], tmp_path / "a.parquet"
    pq.write_table(pa.table(stranger), path) if isinstance(stranger, dict) else path.write_bytes(stranger)
    for reader in (lambda: read_examples(path, 0), lambda: Examples.load(path)):
        with pytest.raises(ModelError, match=r"a\.parquet: is not a whole file of examples"):
            reader()


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        read_examples(tmp_path / "a.parquet", 0)


LIES = {
    "centre": lambda t: t["centre"].to_numpy() + 40,
    "tokens": lambda t: [[1]] * len(t),
    "latent": lambda t: t["latent"].to_numpy() + 100,
    "layer": lambda t: t["layer"].to_numpy() + 1,
    "block": lambda t: t["block"].to_numpy() - 5,
    "value": lambda t: t["value"].to_numpy() * np.nan,
    "position": lambda t: t["position"].to_numpy() + 11,
    "activations": lambda t: [None] * len(t),
}


@pytest.mark.parametrize("name", LIES)
def test_a_file_whose_rows_cannot_be_is_not_loaded(made, name):
    table = pq.read_table(made[1])
    column = pa.array(LIES[name](table), SCHEMA.field(name).type)
    pq.write_table(table.set_column(SCHEMA.names.index(name), SCHEMA.field(name), column), made[1])
    with pytest.raises(ModelError, match="is not a whole file of examples"):
        Examples.load(made[1])


@pytest.mark.parametrize("change", [{"n_top": 0}, {"n_layers": 3}, {"window": -1}, {"n_latents": "many"}])
def test_a_file_that_lies_about_itself_is_refused(made, change):
    table = pq.read_table(made[1])
    about = read_about(made[1]).to_dict()
    about["settings"] |= change
    pq.write_table(table.replace_schema_metadata({example_file.KEY: json.dumps(about)}), made[1])
    with pytest.raises(ModelError, match="is not a whole file of examples"):
        read_examples(made[1], 0)


def test_groups_of_rows_too_large_to_be_ours_are_refused(made, monkeypatch):
    monkeypatch.setattr(example_file, "MAX_GROUP_ROWS", 5)
    with pytest.raises(ModelError, match="stand in one group"):
        read_examples(made[1], 0)


def test_what_a_file_does_not_hold_is_named(made):
    with pytest.raises(ConfigError, match=r"latent: 7; .*0 to 6"):
        read_examples(made[1], 7)
    with pytest.raises(ConfigError, match=r"layer: 3; .*layers 2, 5"):
        read_examples(made[1], 0, layer=3)
    assert read_examples(made[1], 0, layer=2)  # a layer by the model's name for it; row 0 is not layer 0
    with pytest.raises(ConfigError, match="layer: 0"):
        read_examples(made[1], 0, layer=0)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_codes_that_would_be_kept_wrongly_are_refused():
    given, ids = world(0), np.array([1, 2])
    code, visible, found = given.code(ids), given.visible[ids], given.collected([])
    with pytest.raises(ModelError, match="n_layers=2"):
        found.update(Code(code.values[:1], code.indices[:1]), visible, ids)
    with pytest.raises(DataError, match="visible: marks"):
        found.update(Code(code.values[:, 1:], code.indices[:, 1:]), visible, ids)
    with pytest.raises(ModelError, match=r"outside \[0, 7\)"):
        found.update(replace(code, indices=code.indices + 7), visible, ids)
    with pytest.raises(NumericsError, match="NaN"):
        found.update(replace(code, values=code.values * math.nan), visible, ids)
    for wrong in ([1], [-1, 2], [1, 2**32 // 11]):
        with pytest.raises(DataError, match="blocks"):
            found.update(code, visible, np.array(wrong))
    assert (found._sets[0].keys < 0).all()


@pytest.mark.parametrize("change", [{"n_top": 0}, {"n_sampled": -1}, {"window": -1}, {"n_top": 20_000}])
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ConfigError, match=f"{next(iter(change))}: {next(iter(change.values()))}"):
        Examples(1, 2, 8, **change)


def test_memory_is_what_the_settings_say():
    found = Examples(3, 50, 8, n_top=5, n_sampled=2, window=3)
    arrays = [array for kept in found._sets for array in vars(kept).values()]
    assert found.settings.n_bytes == sum(array.nbytes for array in arrays)


@pytest.mark.parametrize("n_top", [1, 2**14])
def test_more_than_memory_holds_is_refused(n_top):
    with pytest.raises(ResourceError, match="lower n_top"):
        Examples(2**15 - 1, 2**31 - 1, 8, n_top=n_top)


def test_text_that_the_examples_are_not_from_is_refused(tmp_path):
    given = world(0)
    found = given.collected([[4]])
    with pytest.raises(DataError, match="hold 3 tokens each"):
        found.save(tmp_path / "a", token_blocks(np.ones((5, 3)), [0]))
    with pytest.raises(DataError, match="end at block 3"):
        found.save(tmp_path / "a", token_blocks(np.ones((4, 11)), [0]))
    with pytest.raises(ConfigError, match="layers: 3 of them"):
        found.save(tmp_path / "a", given.blocks, layers=(0, 1, 2))
    with pytest.raises(ConfigError, match="n_quantiles: 0"):
        found.save(tmp_path / "a", given.blocks, n_quantiles=0)
    assert list(tmp_path.iterdir()) == []
