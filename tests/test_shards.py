"""Shards: together they are what one process does, and nothing that is not theirs is put together with them."""

import dataclasses
import importlib
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from conftest import tree
from mlsae import analyze as analyze_one
from mlsae import evaluate as evaluate_one
from mlsae import files, fingerprint, shards
from mlsae.analyze import Analysis, analyze_shard, merge_analysis
from mlsae.cli import main
from mlsae.config import MLSAEConfig
from mlsae.data import TokenBlocks, pack
from mlsae.errors import ConfigError, DataError, MlsaeError, ModelError, ResourceError
from mlsae.evaluate import Evaluation, EvaluationSums, evaluate_shard, evaluation_sums, merge_evaluation
from mlsae.frames import Lens
from mlsae.lm import LanguageModel
from mlsae.sae import MLSAE
from mlsae.shards import Record, TextShard, gather
from mlsae.text import TextSource
from mlsae.untrusted import load_tensors
from tiny import tiny_lm

CONTEXT, BATCH, N = 32, 64, 4
EVALUATE: dict[str, Any] = {"tokens": 1000, "splice_tokens": 470, "progress": False}
ANALYZE: dict[str, Any] = {"tokens": 1000, "prompt": "Mary and John", "examples": 3, "progress": False}
NOTHING = 1e-13
"""Of numbers that are differences: what is left of numbers around 1."""


@pytest.fixture(scope="module", autouse=True)
def _small_batches() -> Iterator[None]:
    """Two blocks a batch, so that a little text makes many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("mlsae.heldout"), "BATCH_TOKENS", BATCH)
        yield


def make_sae(seed: int = 3, **changes: Any) -> MLSAE:
    torch.manual_seed(seed)
    shape = {"d_model": 32, "n_latents": 48, "k": 5, "layers": (0, 1, 2), "frame": "vector"}
    sae = MLSAE(MLSAEConfig(**shape | changes))
    sae.norm_limit[1] = 22.0  # a few vectors are longer
    return sae


def packed(lm: LanguageModel, corpus: Path, split: str = "train") -> TokenBlocks:
    return pack(TextSource(str(corpus), split), lm.tokenizer, CONTEXT, progress=False)


@pytest.fixture(scope="module")
def blocks(lm: LanguageModel, corpus: Path) -> TokenBlocks:
    return packed(lm, corpus)


@pytest.fixture(scope="module")
def analyzed(lm: LanguageModel, blocks: TokenBlocks) -> Analysis:
    return analyze_one(make_sae(), lm, blocks, **ANALYZE)


@pytest.fixture(scope="module")
def evaluated(lm: LanguageModel, blocks: TokenBlocks) -> Evaluation:
    return evaluate_one(make_sae(), lm, blocks, **EVALUATE)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, lm: LanguageModel, blocks: TokenBlocks) -> Path:
    """Four shards of each, done in no order; copy it before changing it."""
    out = tmp_path_factory.mktemp("shards")
    for number in (3, 1, 4, 2):
        evaluate_shard(make_sae(), lm, blocks, out, TextShard(number, N), **EVALUATE)
        analyze_shard(make_sae(), lm, blocks, out, TextShard(number, N), **ANALYZE)
    return out


@pytest.fixture
def mine(done: Path, tmp_path: Path) -> Path:
    return shutil.copytree(done, tmp_path / "mine")


def place(directory: Path, number: int, kind: str = "evaluate", n: int = N) -> Path:
    return directory / "shards" / kind / TextShard(number, n).folder


def assert_same(got: Any, want: Any, path: str = "") -> None:
    """Whole numbers, texts and shapes are equal, floats to 1e-12."""
    if isinstance(want, dict):
        assert got.keys() == want.keys(), path
        for key in want.keys() - {"seconds"}:
            assert_same(got[key], want[key], f"{path}.{key}")
    elif isinstance(want, list):
        assert len(got) == len(want), path
        for i, pair in enumerate(zip(got, want, strict=True)):
            assert_same(*pair, f"{path}[{i}]")
    elif isinstance(want, float):
        assert got == pytest.approx(want, rel=1e-12, abs=NOTHING, nan_ok=True), path
    else:
        assert got == want, path


def assert_same_tensors(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, x in want.items():
        if x.is_floating_point() and x.dtype == torch.float64:
            torch.testing.assert_close(got[name], x, rtol=1e-12, atol=NOTHING, equal_nan=True, msg=name)
        elif x.is_floating_point():  # float32 on disk: the last bit is rounding's
            torch.testing.assert_close(got[name], x, rtol=1e-6, atol=1e-7, equal_nan=True, msg=name)
        else:
            assert torch.equal(got[name], x), name


# ---- which part ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_batches", [0, 1, 3, 4, 29])
@pytest.mark.parametrize("n", [1, 2, 4, 31])
def test_every_batch_belongs_to_one_shard_and_shards_are_even(n_batches: int, n: int):
    positions = range(0, 7 * n_batches, 7)
    parts = [list(TextShard(number, n).part(positions)) for number in range(1, n + 1)]
    assert sorted(itertools.chain(*parts)) == list(positions)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_what_costs_more_at_the_start_is_shared():
    """Cross-entropy is measured on the first tokens alone, at many times the cost."""
    assert [list(TextShard(number, 3).part(range(4))) for number in (1, 2, 3)] == [[0, 3], [1], [2]]


def test_shards_are_written_as_they_are_read():
    assert TextShard.parse("2/4") == TextShard(2, 4)
    assert str(TextShard.parse("7/9999")) == "7/9999"
    assert TextShard(2, 14).folder == "0002-of-0014"


@pytest.mark.parametrize(
    "text", ["", "1", "0/4", "5/4", "-1/4", "1/0", "1/2/3", "a/b", "1.0/4", "1/10000", "１/4", "9" * 99]
)
def test_a_shard_that_is_none_is_refused(text: str):
    with pytest.raises(ConfigError, match="shard: '"):
        TextShard.parse(text)


# ---- the whole -------------------------------------------------------------------------------------------------------


def test_an_analysis_of_four_shards_is_that_of_one_process(
    tmp_path: Path, lm: LanguageModel, blocks: TokenBlocks, done: Path, analyzed: Analysis
):
    merged = merge_analysis(gather(done, "analyze"), make_sae(), lm, blocks, progress=False)
    assert merged.statistics.n_tokens == analyzed.statistics.n_tokens > 800
    assert merged.statistics.n_shards == analyzed.statistics.n_shards > 1
    assert_same_tensors(merged.statistics.by_shard, analyzed.statistics.by_shard)
    for name, null in analyzed.nulls.items():
        assert_same_tensors(merged.nulls[name].by_shard, null.by_shard)
    assert torch.equal(merged.means.mean, analyzed.means.mean)
    assert merged.masked_by_norm == analyzed.masked_by_norm
    assert 0 < analyzed.masked_by_norm[1] < 100
    assert_same(merged.summary(), analyzed.summary())
    assert np.isfinite(merged.summary()["decomposition"]["mass"]["rel_f"]["ci95"]).all()  # intervals were compared, too
    for found, folder in ((merged, "merged"), (analyzed, "one")):
        found.save(tmp_path / folder)
    got, want = tmp_path / "merged", tmp_path / "one"
    assert {path.name for path in got.iterdir()} == {path.name for path in want.iterdir()}
    assert (got / "examples.parquet").read_bytes() == (want / "examples.parquet").read_bytes()
    for name in ("layers", "prompt", "profile"):
        assert_same_tensors(*(load_tensors(folder / f"{name}.safetensors") for folder in (got, want)))
    assert_same(*(json.loads((folder / "similarity.json").read_text()) for folder in (got, want)))
    tables = [pq.read_table(folder / "latents.parquet") for folder in (got, want)]
    assert tables[0].schema == tables[1].schema
    assert_same(*([{k: v for k, v in row.items() if "ci95" not in k} for row in t.to_pylist()] for t in tables))


def test_an_evaluation_of_four_shards_is_that_of_one_process(done: Path, evaluated: Evaluation):
    """Cross-entropy stops in the middle of the text, and of a batch."""
    merged = merge_evaluation(gather(done, "evaluate"), make_sae())
    assert 0 < evaluated.n_spliced_tokens < evaluated.n_tokens
    assert evaluated.n_spliced_tokens % BATCH
    assert_same(merged.to_dict(), evaluated.to_dict())
    assert 0 < evaluated.masked_by_norm[1] < 100
    assert np.isfinite(evaluated.ci95["mean"]["delta_ce"]).all()


def test_the_seconds_are_those_of_all_shards(done: Path):
    whole = gather(done, "evaluate")
    records = [json.loads((folder / "shard.json").read_text()) for folder in whole.folders]
    assert whole.seconds == pytest.approx(sum(record["seconds"] for record in records))
    assert merge_evaluation(whole, make_sae()).seconds > whole.seconds > 0


def test_equal_activations_in_different_shards_are_ranked_as_in_one_process(
    tmp_path: Path, lm: LanguageModel, blocks: TokenBlocks
):
    """The same block over and over: every strongest activation is a tie between shards, and the earlier place wins."""
    tokens = np.repeat(blocks._tokens[3:4], 16, axis=0)
    same = TokenBlocks(tokens, np.arange(16, dtype=np.int64) * CONTEXT, blocks.info)
    settings = ANALYZE | {"directions": False, "nulls": False}
    for number in (2, 3, 1):
        analyze_shard(make_sae(), lm, same, tmp_path, TextShard(number, 3), **settings)
    merged = merge_analysis(gather(tmp_path, "analyze"), make_sae(), lm, same, progress=False)
    for found, name in ((merged, "merged"), (analyze_one(make_sae(), lm, same, **settings), "one")):
        assert found.examples is not None
        found.examples.save(tmp_path / name, same)
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "one").read_bytes()
    table = pq.read_table(tmp_path / "one").to_pandas()
    top = table[table.kind == "top"].groupby(["latent", "layer"])
    assert (top.value.nunique() < top.value.size()).mean() > 0.5


def test_more_shards_than_batches_are_the_same_whole(tmp_path: Path, lm: LanguageModel, blocks: TokenBlocks):
    few = EVALUATE | {"tokens": 3 * BATCH, "splice_tokens": None}
    for number in range(1, 6):
        evaluate_shard(make_sae(), lm, blocks, tmp_path, TextShard(number, 5), **few)
    merged = merge_evaluation(gather(tmp_path, "evaluate"), make_sae())
    assert_same(merged.to_dict(), evaluate_one(make_sae(), lm, blocks, **few).to_dict())


def test_an_sae_behind_a_lens_is_evaluated_in_shards(tmp_path: Path, lm: LanguageModel, blocks: TokenBlocks):
    sae = make_sae(lens="lens")
    assert isinstance(sae.lens, Lens)
    with torch.no_grad():
        for tensor in sae.lens.state_dict().values():
            tensor += 0.01 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
    for number in (1, 2):
        evaluate_shard(sae, lm, blocks, tmp_path, TextShard(number, 2), **EVALUATE)
    merged, one = merge_evaluation(gather(tmp_path, "evaluate"), sae), evaluate_one(sae, lm, blocks, **EVALUATE)
    assert_same(merged.to_dict(), one.to_dict())
    assert one.mean["lens_fvu"] != one.mean["fvu"]


def test_shards_merge_to_the_same_bits_in_whatever_order_they_are_done_or_found(
    tmp_path: Path, lm: LanguageModel, blocks: TokenBlocks, done: Path, monkeypatch: pytest.MonkeyPatch
):
    for number in (2, 4, 1, 3):
        analyze_shard(make_sae(), lm, blocks, tmp_path / "again", TextShard(number, N), **ANALYZE)
    found = Path.glob
    wholes = [gather(done, "analyze"), gather(tmp_path / "again", "analyze")]
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(sorted(found(self, pattern), reverse=True)))
    wholes.append(gather(done, "analyze"))
    monkeypatch.undo()
    saved = []
    for i, whole in enumerate(wholes):
        merged = merge_analysis(whole, make_sae(), lm, blocks, progress=False)
        dataclasses.replace(merged, seconds=1.0).save(tmp_path / str(i))
        saved.append(tree(tmp_path / str(i)))
    assert saved[0] == saved[1] == saved[2]


@pytest.mark.parametrize("lens", [None, "lens"])
def test_every_sum_comes_back_bit_for_bit(tmp_path: Path, lm: LanguageModel, blocks: TokenBlocks, lens: str | None):
    sae = make_sae(lens=lens)
    sums = evaluation_sums(sae, lm, blocks, 640, None, progress=False)
    shards.save_sums(tmp_path / "sums.safetensors", sums)
    back = shards.load_sums(tmp_path / "sums.safetensors", EvaluationSums(sae))
    assert vars(back).keys() == vars(sums).keys()
    for name in ("fired", "over_norm", "losses", "kl", "kl_reversed", "n_predicted", "n_positions"):
        got, want = getattr(back, name), getattr(sums, name)
        assert got.dtype == want.dtype
        assert torch.equal(got, want), name
    assert back.fired.any()
    assert back.n_sequences == sums.n_sequences > 0
    assert back.evaluation(sae, 1.0).to_dict() == sums.evaluation(sae, 1.0).to_dict()


def test_sums_of_other_sizes_are_refused(tmp_path: Path):
    shards.save_sums(tmp_path / "sums.safetensors", EvaluationSums(make_sae()))
    for other in (make_sae(layers=(0, 1)), make_sae(n_latents=64), make_sae(lens="lens")):
        with pytest.raises(ModelError, match="tensor '"):
            shards.load_sums(tmp_path / "sums.safetensors", EvaluationSums(other))


# ---- one shard's work ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no"), MemoryError])
def test_a_shard_that_dies_leaves_nothing_and_only_its_work_is_done_again(
    mine: Path, lm: LanguageModel, blocks: TokenBlocks, evaluated: Evaluation, monkeypatch, error
):
    before = tree(mine)
    shutil.rmtree(place(mine, 2))
    without = tree(mine)

    def die(*args: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_sealed", die)
        with pytest.raises((KeyboardInterrupt, MemoryError, ResourceError)):
            evaluate_shard(make_sae(), lm, blocks, mine, TextShard(2, N), **EVALUATE)
    assert tree(mine) == without
    with pytest.raises(ResourceError, match="2/4 is missing"):
        gather(mine, "evaluate")
    written = evaluate_shard(make_sae(), lm, blocks, mine, TextShard(2, N), **EVALUATE)
    assert written.missing == []
    after = tree(mine)
    assert {p for p in before if before[p] != after[p]} <= {"shards/evaluate/0002-of-0004/shard.json"}  # its seconds
    assert_same(merge_evaluation(gather(mine, "evaluate"), make_sae()).to_dict(), evaluated.to_dict())


def test_what_a_killed_shard_left_is_not_taken_for_one(mine: Path):
    """SIGKILL between the first file and the rename leaves a hidden folder."""
    place(mine, 2).rename(place(mine, 2).with_name(".tmp-0002-of-0004-4711"))
    with pytest.raises(ResourceError, match="2/4 is missing"):
        gather(mine, "evaluate")


def test_a_shard_says_which_others_are_missing(tmp_path: Path, lm: LanguageModel, blocks: TokenBlocks):
    few = EVALUATE | {"tokens": BATCH}
    assert evaluate_shard(make_sae(), lm, blocks, tmp_path, TextShard(2, 3), **few).missing == ["1/3", "3/3"]
    assert evaluate_shard(make_sae(), lm, blocks, tmp_path, TextShard(1, 3), **few).missing == ["3/3"]


def test_a_prompt_that_cannot_be_read_does_not_wait_for_the_merge(tmp_path: Path, lm, blocks, monkeypatch):
    monkeypatch.setattr(TokenBlocks, "read", lambda *args, **kwargs: pytest.fail("read the text first"))
    with pytest.raises(MlsaeError):
        analyze_shard(make_sae(), lm, blocks, tmp_path, TextShard(1, 2), **ANALYZE | {"prompt": "too long " * 50})


# ---- what does not belong together -----------------------------------------------------------------------------------


def test_missing_shards_are_named(mine: Path):
    shutil.rmtree(place(mine, 2))
    with pytest.raises(ResourceError, match=r"evaluate: 2/4 is missing; run --shard of each"):
        gather(mine, "evaluate")
    shutil.rmtree(place(mine, 4))
    with pytest.raises(ResourceError, match=r"evaluate: 2/4, 4/4 are missing"):
        gather(mine, "evaluate")
    gather(mine, "analyze")
    with pytest.raises(ResourceError, match="holds no shards; mlsae evaluate --shard i/n"):
        gather(mine / "nowhere", "evaluate")


@pytest.mark.parametrize("name", ["0002-of-0004", "0005-of-0004", "0001-of-0008", "0001-of-0004 copy", "readme"])
def test_a_shard_that_is_there_twice_is_refused_by_name(mine: Path, name: str):
    other = place(mine, 1).with_name(name)
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(place(mine, 1), other)
    with pytest.raises(ResourceError, match=f"{name}: holds shard 1/4, which belongs in 0001-of-0004"):
        gather(mine, "evaluate")


@pytest.fixture(scope="module")
def other_lm() -> LanguageModel:
    """One weight of one layer differs."""
    other = tiny_lm()
    other.hf.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1.0
    return other


def foreign(
    change: str, lm: LanguageModel, blocks: TokenBlocks, other_lm: LanguageModel, corpus: Path
) -> dict[str, Any]:
    """The arguments of a shard that has something else than the others."""
    return {
        "SAE": {"sae": make_sae(seed=4)},
        "config": {"sae": make_sae(k=4)},
        "language model": {"lm": other_lm},
        "text": {"data": packed(lm, corpus, "validation")},
        "tokens 640": {"tokens": 640},
        "splice_tokens None": {"splice_tokens": None},
        "context_length": {"data": pack(TextSource(str(corpus), "train"), lm.tokenizer, 16, progress=False)},
    }[change]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("SAE", "is of another SAE"),
        ("config", "is of another SAE"),
        ("language model", "is of another language model"),
        ("text", "is of another text"),
        ("tokens 640", "was made with tokens 640"),
        ("splice_tokens None", "was made with splice_tokens None"),
        ("context_length", "is of another text"),
    ],
)
def test_a_shard_of_something_else_is_refused_by_name(mine, lm, blocks, other_lm, corpus, change: str, says: str):
    changed = {"sae": make_sae(), "lm": lm, "data": blocks, **EVALUATE, **foreign(change, lm, blocks, other_lm, corpus)}
    evaluate_shard(out=mine, shard=TextShard(3, N), **changed)
    with pytest.raises(ResourceError, match=f"0003-of-0004: {says}, unlike 0001-of-0004; delete the one"):
        gather(mine, "evaluate")


def test_shards_of_another_number_are_refused_by_name(mine: Path, lm: LanguageModel, blocks: TokenBlocks):
    evaluate_shard(make_sae(), lm, blocks, mine, TextShard(1, 2), **EVALUATE)
    with pytest.raises(ResourceError, match="0001-of-0004: is one of 4 shards, unlike 0001-of-0002"):
        gather(mine, "evaluate")


def test_an_analysis_with_other_options_is_refused_by_name(mine: Path, lm: LanguageModel, blocks: TokenBlocks):
    analyze_shard(make_sae(), lm, blocks, mine, TextShard(2, N), **ANALYZE | {"nulls": False})
    with pytest.raises(ResourceError, match="0002-of-0004: was made with nulls False, unlike 0001-of-0004"):
        gather(mine, "analyze")


@pytest.mark.parametrize("kind", ["evaluate", "analyze"])
def test_a_damaged_shard_is_refused_by_name_whatever_byte_it_is(mine: Path, kind: Any):
    for path in sorted(place(mine, 2, kind).iterdir()):
        whole = path.read_bytes()
        for at in (0, len(whole) // 2, len(whole) - 2):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(ResourceError, match=rf"0002-of-0004/{path.name}: .*failed its checksum"):
                gather(mine, kind)
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ResourceError, match=rf"0002-of-0004/{path.name}: .*failed its checksum"):
            gather(mine, kind)
        path.unlink()
        with pytest.raises(ResourceError, match=rf"0002-of-0004/{path.name}"):
            gather(mine, kind)
        path.write_bytes(whole)
    gather(mine, kind)


def reseal(folder: Path, **changes: Any) -> None:
    record = json.loads((folder / "shard.json").read_text())
    files.write_sealed(folder / "shard.json", {**{k: v for k, v in record.items() if k != "sha256"}, **changes})


def test_a_record_that_was_written_by_others_is_refused(mine: Path, tmp_path: Path):
    for changes, says in (
        ({"format_version": 2}, "was written by another version of mlsae; run it again"),
        ({"checksums": {"../../../../secret": "0"}}, "leads outside the folder"),
        ({"number": 9}, "9/4"),
        ({"more": 1}, "more"),
        ({"work": 3}, "work"),
    ):
        shutil.rmtree(tmp_path / "odd", ignore_errors=True)
        shutil.copytree(mine, tmp_path / "odd")
        reseal(place(tmp_path / "odd", 2), **changes)
        with pytest.raises(MlsaeError, match=says):
            gather(tmp_path / "odd", "evaluate")


def test_what_the_shards_did_not_read_is_refused_when_they_are_merged(done, lm, blocks, other_lm, corpus):
    whole = gather(done, "analyze")
    with pytest.raises(ModelError, match="sae: is not the one that the shards read; name that one with --sae"):
        merge_analysis(whole, make_sae(seed=4), lm, blocks, progress=False)
    with pytest.raises(ModelError, match=r"lm: .* is not the one that the shards read; name that one with --lm"):
        merge_analysis(whole, make_sae(), other_lm, blocks, progress=False)
    with pytest.raises(DataError, match="data: is not the text that the shards read; name that one with --data"):
        merge_analysis(whole, make_sae(), lm, packed(lm, corpus, "test"), progress=False)
    with pytest.raises(ModelError, match="sae: is not the one that the shards read"):
        merge_evaluation(gather(done, "evaluate"), make_sae(seed=4))


# ---- what identifies them --------------------------------------------------------------------------------------------


def test_a_language_model_is_known_wherever_it_lies_and_by_every_weight(tmp_path: Path, lm_folder: Path, lm):
    moved = LanguageModel.from_pretrained(shutil.copytree(lm_folder, tmp_path / "moved"), device="cpu", dtype="float32")
    known = fingerprint.of_lm(lm)
    assert fingerprint.of_lm(moved) == known
    for name, weight in moved.hf.named_parameters():
        before = weight.data.clone()
        weight.data *= 1.001
        assert fingerprint.of_lm(moved) != known, name
        weight.data = before
    assert fingerprint.of_lm(moved) == known
    halved = LanguageModel.from_pretrained(tmp_path / "moved", device="cpu", dtype="bfloat16")
    assert fingerprint.of_lm(halved) != known


def test_text_is_known_by_its_tokens_and_documents(blocks: TokenBlocks):
    tokens, starts = np.array(blocks._tokens), np.array(blocks.document_starts)
    known = blocks.sha256()
    assert TokenBlocks(tokens, starts, dataclasses.replace(blocks.info, key="other")).sha256() == known
    changed, moved = tokens.copy(), starts.copy()
    changed[-1, -1] ^= 1
    moved[-1] += 1
    shapes = (tokens.reshape(-1, 2 * CONTEXT) if len(tokens) % 2 == 0 else tokens[:-1].reshape(-1, 2 * CONTEXT), starts)
    others = [(changed, starts), (tokens, moved), (tokens[:-1], starts), (tokens, starts[:-1]), shapes]
    assert len({known, *(TokenBlocks(*other, blocks.info).sha256() for other in others)}) == 1 + len(others)


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are drawn of the analysis alone, and take a minute."""
    monkeypatch.setattr("mlsae.analysis.report.pictures", lambda *args: [])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    return shutil.copytree(trained, tmp_path_factory.mktemp("run") / "run")


def numbers_in(folder: Path) -> dict[str, Any]:
    """Every JSON file under a folder, but for shards and checkpoints."""
    inner = (path for path in sorted(folder.rglob("*.json")) if "shards" not in path.parts)
    return {str(p.relative_to(folder)): json.loads(p.read_text()) for p in inner if "step-" not in str(p)}


@pytest.mark.usefixtures("_no_pictures")
def test_merge_writes_what_one_process_writes(tmp_path: Path, run: Path, monkeypatch, capsys):
    """Shards are named by paths that mean something in one folder, and are merged from another."""
    flags = ["--split", "train", "--tokens", "1000", "--context-length", "32", "--quiet"]
    few = ["--examples", "2", "--prompt", "Mary and John"]
    one, four = (shutil.copytree(run, tmp_path / name / "run") for name in ("one", "four"))
    monkeypatch.chdir(four.parent)
    for number in (2, 3, 1):
        assert main(["evaluate", "run", *flags, "--shard", f"{number}/3"]) == 0
    shown = capsys.readouterr().out
    assert "still missing: 1/3, 3/3" in shown
    assert shown.endswith("Next: mlsae merge run\n")
    for number in (1, 3, 2):
        assert main(["analyze", "run", *flags, *few, "--shard", f"{number}/3"]) == 0
    assert capsys.readouterr().out.endswith("Next: mlsae merge run/analysis\n")
    monkeypatch.chdir(tmp_path)
    assert main(["merge", "four/run", "--quiet"]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert main(["evaluate", str(one), *flags]) == 0
    assert main(["analyze", str(one), *flags, *few]) == 0
    alone = capsys.readouterr().out
    assert [line for line in shown.splitlines() if "run" not in line and line] == [
        line for line in alone.splitlines() if "run" not in line
    ]
    got, want = numbers_in(four), numbers_in(one)
    assert {"evaluation.json", "analysis/summary.json", "analysis/similarity.json"} <= got.keys()
    assert_same(got, want)
    paths = [{str(p.relative_to(f)) for p in f.rglob("*") if "shards" not in p.parts} for f in (one, four)]
    assert paths[0] == paths[1]
    assert "Layers of run" in (four / "analysis" / "report.html").read_text()


@pytest.mark.usefixtures("_no_pictures")
def test_merge_can_be_told_where_things_are_now(tmp_path: Path, run: Path, lm_folder: Path, corpus: Path, capsys):
    moved = shutil.copytree(lm_folder, tmp_path / "lm")
    there = shutil.copytree(run, tmp_path / "there")
    flags = ["--tokens", "256", "--lm", str(moved), "--quiet", "--no-nulls", "--no-directions", "--examples", "0"]
    out = tmp_path / "out"
    assert main(["analyze", str(there), *flags, "--shard", "1/1", "--out", str(out)]) == 0
    moved.rename(tmp_path / "elsewhere")
    there.rename(tmp_path / "back")
    capsys.readouterr()
    assert main(["merge", str(out), "--quiet"]) == 6
    assert "there" in capsys.readouterr().err
    now = ["--sae", str(tmp_path / "back"), "--lm", str(tmp_path / "elsewhere")]
    assert main(["merge", str(out), *now, "--data", str(corpus), "--quiet", "--json", str(tmp_path / "x.json")]) == 0
    written = json.loads((tmp_path / "x.json").read_text())["analyze"]
    assert written == json.loads((out / "summary.json").read_text())


def test_evaluate_writes_where_it_is_told(tmp_path: Path, run: Path):
    sae = str(run / "sae")
    assert main(["evaluate", sae, "--tokens", "64", "--quiet", "--out", str(tmp_path / "here")]) == 0
    assert json.loads((tmp_path / "here" / "evaluation.json").read_text())["n_tokens"] > 0


def test_nonsense_is_one_sentence(tmp_path: Path, run: Path, capsys):
    few = ["--tokens", "64", "--quiet"]
    for arguments, code, says in (
        (["analyze", str(run), *few, "--shard", "5/4"], 2, "shard: '5/4' given; 1/n to n/n are allowed"),
        (["evaluate", str(run), *few, "--shard", "two"], 2, "shard: 'two' given; write i/n, such as 2/4"),
        (["evaluate", str(run / "sae"), *few, "--shard", "1/2"], 2, "is not a run directory; give --out"),
        (["merge", str(tmp_path)], 4, "holds no shards"),
        (["merge", str(tmp_path / "nowhere")], 4, "holds no shards"),
        (["merge"], 2, "directory: missing; name the run directory"),
    ):
        assert main(arguments) == code, arguments
        error = capsys.readouterr().err
        assert says in error
        assert len(error.splitlines()) == 1


def test_every_field_of_the_record_is_said(done: Path):
    """`shard.json` is for people, too."""
    record = Record(
        **{k: v for k, v in json.loads((place(done, 1) / "shard.json").read_text()).items() if k != "sha256"}
    )
    assert (record.number, record.of, record.work.tokens, record.work.kind) == (1, 4, 1000, "evaluate")
    assert record.work.options == {"splice_tokens": 470}
