"""Measuring by several processes: what one finds, said and written once, whoever fails or is stopped."""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tree
from mlsae import analyze, evaluate, files
from mlsae.cli import main
from mlsae.config import MLSAEConfig
from mlsae.data import TokenBlocks, pack
from mlsae.errors import ConfigError, DataError, MlsaeError, ModelError
from mlsae.evaluate import evaluate_shard, merge_evaluation
from mlsae.files import finite
from mlsae.frames import Lens
from mlsae.heldout import together
from mlsae.lm import LanguageModel
from mlsae.mesh import open_mesh
from mlsae.sae import MLSAE
from mlsae.shards import TextShard, gather
from mlsae.text import TextSource
from mlsae.untrusted import load_tensors
from ranks import run_ranks
from test_shards import assert_same, assert_same_tensors

heldout = importlib.import_module("mlsae.heldout")
evaluating = importlib.import_module("mlsae.evaluate")  # the package's own `evaluate` is the function
CONTEXT, BATCH = 32, 64
EVALUATE: dict[str, Any] = {"tokens": 1000, "splice_tokens": 470, "progress": False}
ANALYZE: dict[str, Any] = {"tokens": 1000, "prompt": "Mary and John", "examples": 3, "progress": False}
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _small_batches():
    """Two blocks a batch, so that a little text makes many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heldout, "BATCH_TOKENS", BATCH)
        yield


@pytest.fixture(scope="module")
def places(lm_folder: Path, corpus: Path) -> dict[str, Path]:
    return {"lm": lm_folder, "corpus": corpus}


def make_sae(**changes: Any) -> MLSAE:
    torch.manual_seed(3)
    shape = {"d_model": 32, "n_latents": 48, "k": 5, "layers": (0, 1, 2), "frame": "vector"}
    sae = MLSAE(MLSAEConfig(**shape | changes))
    sae.norm_limit[1:2] = 22.0  # a few vectors are longer
    if isinstance(sae.lens, Lens):
        with torch.no_grad():
            for tensor in sae.lens.state_dict().values():
                tensor += 0.01 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
    return sae


def materials(places: dict[str, Path], **changes: Any) -> tuple[MLSAE, LanguageModel, TokenBlocks]:
    """In a process of its own these are made again, and its batches small."""
    heldout.BATCH_TOKENS = BATCH
    lm = LanguageModel.from_pretrained(places["lm"], device="cpu", dtype="float32")
    blocks = pack(TextSource(str(places["corpus"]), "train"), lm.tokenizer, CONTEXT, progress=False)
    return make_sae(**changes), lm, blocks


def measured(places, out, tokens, sae_changes):
    """What a rank returns of both, and what it would write."""
    sae, lm, blocks = materials(places, **sae_changes)
    with together(lm) as mesh:
        evaluation = evaluate(sae, lm, blocks, **EVALUATE | {"tokens": tokens})
        analysis = analyze(sae, lm, blocks, **ANALYZE | {"tokens": tokens})
    dataclasses.replace(analysis, seconds=1.0).save(out / f"of-{mesh.rank}")
    return finite(evaluation.to_dict()), finite(analysis.summary())


def assert_measured(places, folder: Path, n: int, tokens: int, **sae_changes: Any) -> dict[str, Any]:
    """Every rank of n has the same, that of one process: counts and contexts exactly, sums to 1e-12. Gives the evaluation."""
    alone = measured(places, folder / "one", tokens, sae_changes)
    found = run_ranks(n, measured, places, folder / "many", tokens, sae_changes)
    assert all(each == found[0] for each in found)  # seconds, too
    assert_same(found[0][0], alone[0])
    assert_same(found[0][1], alone[1])
    got, want = folder / "many" / "of-0", folder / "one" / "of-0"
    for rank in range(1, n):
        assert tree(folder / "many" / f"of-{rank}") == tree(got)
    assert {path.name for path in got.iterdir()} == {path.name for path in want.iterdir()}
    assert (got / "examples.parquet").read_bytes() == (want / "examples.parquet").read_bytes()
    for path in want.glob("*.safetensors"):
        assert_same_tensors(load_tensors(got / path.name), load_tensors(path))
    assert_same(*(json.loads((place / "similarity.json").read_text()) for place in (got, want)))
    return found[0][0]


def test_two_processes_measure_what_one_does_and_to_the_bits_of_two_shards(places, tmp_path):
    found = assert_measured(places, tmp_path, 2, tokens=640)
    sae, lm, blocks = materials(places)
    for number in (1, 2):
        evaluate_shard(sae, lm, blocks, tmp_path, TextShard(number, 2), **EVALUATE | {"tokens": 640})
    merged = finite(merge_evaluation(gather(tmp_path, "evaluate"), sae).to_dict())
    assert {**found, "seconds": 0} == {**merged, "seconds": 0}


@pytest.mark.slow
def test_four_processes_measure_what_one_does(places, tmp_path):
    assert_measured(places, tmp_path, 4, tokens=1000)


def test_a_process_that_gets_no_text_changes_nothing(places, tmp_path):
    """Three batches for four processes; one layer, so that some sums are of nothing; behind a lens."""
    assert_measured(places, tmp_path, 4, tokens=3 * BATCH, layers=(1,), lens="lens")


# ---- failing together ------------------------------------------------------------------------------------------------


def errors(places):
    """What every rank says when only the last one fails, when all do, and when they were given different things."""
    sae, lm, blocks = materials(places)
    rank, said = int(os.environ["RANK"]), {}
    with together(lm):
        for kind, work in {
            "one": lambda: evaluate(sae, lm, blocks if rank == 0 else "nowhere", **EVALUATE),
            "all": lambda: analyze(sae, "nowhere", blocks, **ANALYZE),
            "sae": lambda: evaluate(make_sae(k=4 + rank), lm, blocks, **EVALUATE),
            "tokens": lambda: evaluate(sae, lm, blocks, **EVALUATE | {"tokens": 1000 + 64 * rank}),
            "layout": lambda: open_mesh(1, 2, CPU).__enter__(),
        }.items():
            with pytest.raises(MlsaeError) as error:
                work()
            said[kind] = error.type, str(error.value), error.value.elsewhere
    return said


def test_an_error_is_everyones_and_said_by_one(places):
    first, second = run_ranks(2, errors, places)
    for kind, error, says, by in (
        ("one", DataError, "nowhere", 1),
        ("all", ModelError, "nowhere", 0),
        ("sae", ConfigError, "rank 1 is of another SAE, unlike rank 0; give all processes the same", 1),
        ("tokens", ConfigError, "rank 1 was made with tokens 1064, unlike rank 0", 1),
    ):
        assert (first[kind][0], second[kind][0]) == (error, error)
        assert (first[kind][2], second[kind][2]) == (by != 0, by != 1)
        assert says in first[kind][1]
        assert first[kind][1] == second[kind][1]
    assert first["layout"][0] is ConfigError
    assert "processes are at work as 2 with tp 1" in first["layout"][1]


def dying(places, note):
    """Rank 1 is killed in its second batch."""
    pair = materials(places)
    update, calls = evaluating.EvaluationSums.update_reconstruction, iter(range(99))

    def counted(*args):
        if next(calls) == 1 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return update(*args)

    evaluating.EvaluationSums.update_reconstruction = counted
    started = time.monotonic()
    try:
        evaluate(*pair, **EVALUATE)
    except MlsaeError as error:
        note.write_text(json.dumps([type(error).__name__, str(error), time.monotonic() - started]))


def test_when_a_process_dies_the_others_say_so(places, tmp_path):
    with pytest.raises(AssertionError, match="a rank died"):
        run_ranks(2, dying, places, tmp_path / "said.json")
    kind, said, seconds = json.loads((tmp_path / "said.json").read_text())
    assert kind == "ResourceError"
    assert "another process of this job is gone" in said
    assert seconds < 30


# ---- the command line ------------------------------------------------------------------------------------------------


def command(arguments, cache):
    """Exit code, output and errors of one command on this rank, and what it wrote."""
    heldout.BATCH_TOKENS = BATCH
    os.environ["MLSAE_CACHE"] = str(cache)  # of one machine
    importlib.import_module("mlsae.analysis.report").pictures = lambda *args: []  # they take a minute
    out, err, written, replacing = io.StringIO(), io.StringIO(), [], files.replacing
    files.replacing = lambda path: written.append(path.name) or replacing(path)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return code, out.getvalue(), err.getvalue(), written


@pytest.mark.parametrize("name", ["evaluate", "analyze"])
def test_one_process_writes_and_prints_what_one_alone_does(trained, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr("mlsae.analysis.report.pictures", lambda *args: [])
    one, two = (shutil.copytree(trained, tmp_path / each / "run") for each in ("one", "two"))
    before = set(tree(one))
    flags = ["--split", "train", "--tokens", "1000", "--context-length", "32", "--quiet"]
    flags += ["--examples", "2", "--prompt", "Mary and John"] if name == "analyze" else ["--splice-tokens", "200"]
    assert main([name, str(one), *flags]) == 0
    shown = capsys.readouterr().out
    first, second = run_ranks(2, command, [name, str(two), *flags], tmp_path / "cache")
    assert (first[0], first[1].replace(str(two), str(one)), first[2]) == (0, shown, "")
    assert second == (0, "", "", [])
    assert {"evaluation.json", "report.html"} & set(first[3])
    assert set(tree(one)) == set(tree(two)) > before
    for path in [path for path in one.rglob("*.json") if str(path.relative_to(one)) not in before]:
        assert_same(json.loads((two / path.relative_to(one)).read_text()), json.loads(path.read_text()))


TOGETHER = "error: shard: '1/2' given; under torchrun the processes share out all: leave it out\n"


@pytest.mark.parametrize(
    ("name", "flags", "code", "says"),
    [
        ("evaluate", ["--shard", "1/2"], 2, TOGETHER),
        ("analyze", ["--shard", "1/2"], 2, TOGETHER),
        ("evaluate", ["--lm", "nowhere"], 6, "nowhere"),
        ("analyze", ["--out", "/proc/none"], 4, "/proc/none"),
    ],
)
def test_what_is_refused_is_one_sentence_of_one_process(trained, tmp_path, name, flags, code, says):
    first, second = run_ranks(2, command, [name, str(trained), "--tokens", "64", "--quiet", *flags], tmp_path)
    assert (first[0], second[0]) == (code, code)
    assert says in first[2]
    assert len(first[2].splitlines()) == 1
    assert second[2] == first[1] == ""


def stop_soon(note):
    """Once rank 0 is at its first batch, which takes it long, rank 1, which waits for it, is told to stop, then rank 0 too."""
    leads = os.environ["RANK"] == "0"

    def read(*args):
        note.touch()
        time.sleep(30)

    def stop():
        while not note.exists():
            time.sleep(0.1)
        time.sleep(4 if leads else 0.5)
        note.with_name(f"stopped-{leads}").touch()
        os.kill(os.getpid(), signal.SIGTERM)

    if leads:
        evaluating.read = read
    threading.Thread(target=stop).start()


def stopped(arguments, note):
    stop_soon(note)
    found = command(arguments, note.with_name("cache"))
    return *found, time.time() - note.with_name(f"stopped-{os.environ['RANK'] == '0'}").stat().st_mtime


def test_a_process_that_waits_for_others_hears_that_it_is_to_stop(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    before = tree(run)
    first, second = run_ranks(2, stopped, ["evaluate", str(run), "--tokens", "64", "--quiet"], tmp_path / "reading")
    assert (first[0], second[0]) == (75, 75)
    assert first[2] == "error: evaluate: stopped; nothing half-made is left; run the same command again\n"
    assert second[2] == ""
    assert max(first[-1], second[-1]) < 3  # seconds after the signal
    assert tree(run) == before
