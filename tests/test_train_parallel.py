"""Training by several processes: the run of one, on any layout and across a change of it, and its end when one of them dies."""

import importlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mlsae import convert, files, fingerprint, manifest, stream
from mlsae.checkpoint import RunDirectory, export_sae
from mlsae.config import TrainConfig
from mlsae.errors import MlsaeError, ResourceError
from mlsae.mesh import open_mesh
from mlsae.prepare import described_sae, load_lm
from mlsae.sae import MLSAE
from mlsae.train import Loop, train
from mlsae.untrusted import read_json, read_jsonl
from ranks import free_port, gathered_rows, make_places, run_ranks

module = importlib.import_module("mlsae.train")  # the package's own `train` is the function
CPU = torch.device("cpu")
WALL = ("elapsed_seconds", "tokens_per_second")
TINY = {
    "batch_size": 3,
    "context_length": 16,
    "accumulation_steps": 2,
    "k": 4,
    "n_latents": 151,
    "init_tokens": 256,
    "lr": 3e-3,
    "dead_after_tokens": 200,
    "log_every_steps": 1,
    "save_every_steps": 5,
    "device": "cpu",
}
STEP_TOKENS = 96


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A tiny LM's folder and a corpus."""
    return make_places(tmp_path_factory.mktemp("parallel"))


def config_of(places, out, steps, **changes):
    return TrainConfig(**{**places, **TINY, "tokens": steps * STEP_TOKENS, "out": str(out), **changes})


def trained(config, dp=None, tp=None, *, resume=False, stop_after=None):
    """What a rank's `train` returns, or the error it ends with; asked to stop, on the last rank alone, after some steps."""
    if stop_after is not None:
        _ask_to_stop(stop_after)
    try:
        return train(config, resume=resume, progress=False, dp=dp, tp=tp).to_dict()
    except MlsaeError as error:
        return type(error).__name__, str(error), error.elsewhere


def _ask_to_stop(after):
    update, steps = module.Trainer.update, itertools.count(1)
    loops = []

    def remembered(self, *args, **kw):
        loops.append(self)
        return start(self, *args, **kw)

    def counted(self):
        report = update(self)
        if next(steps) == after and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            loops[0].stop.asked = True
        return report

    start, Loop.__init__ = Loop.__init__, remembered
    module.Trainer.update = counted


def metrics(run):
    return [{k: v for k, v in line.items() if k not in WALL} for line in read_jsonl(Path(run) / "metrics.jsonl")]


def assert_same_run(one, other):
    """Lines of metrics.jsonl within 1e-6, whole numbers exactly, and the SAE nearly."""
    lines, wanted = metrics(one), metrics(other)
    assert len(lines) == len(wanted)
    for mine, theirs in zip(lines, wanted, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert mine[key] == pytest.approx(value, rel=1e-6, abs=1e-6), (theirs["step"], key)
    mine, theirs = (load_file(Path(run) / "sae" / "model.safetensors") for run in (one, other))
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def alone(places, tmp_path_factory):
    """A run of fifty steps by one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    train(config_of(places, run, 50, validate_every_steps=20), progress=False)
    return run


@pytest.fixture(scope="module")
def two_by_two(places, tmp_path_factory):
    """The same by four, and what they returned."""
    run = tmp_path_factory.mktemp("two_by_two") / "run"
    return run, run_ranks(4, trained, config_of(places, run, 50, validate_every_steps=20), 2, 2)


def test_fifty_steps_of_four_processes_are_those_of_one(alone, two_by_two):
    run, returned = two_by_two
    assert_same_run(run, alone)
    assert any(line.get("aux_loss", 0.0) > 0 for line in metrics(alone)), "no latent is dead: AuxK was not tried"
    assert all({**each, "seconds": 0} == {**returned[0], "seconds": 0} for each in returned)
    files = {path.name for path in (run / "step-00000050").iterdir()}
    shards = {f"{kind}-{i}-of-2.safetensors" for kind in ("sae", "state") for i in (1, 2)}
    assert files == {*shards, "state.json", "manifest.json"}
    assert MLSAE.from_pretrained(run).config.n_latents == 151
    assert read_json(run / "config.json") | {"out": ""} == read_json(alone / "config.json") | {"out": ""}


@pytest.mark.slow
@pytest.mark.parametrize(("dp", "tp"), [(2, 1), (1, 2), (4, 1), (1, 4)])
@pytest.mark.parametrize(
    "changes", [{}, {"groups": 3, "n_latents": 153}, {"batch_size": 1}], ids=["one", "groups", "b1"]
)
def test_fifty_steps_of_every_layout_are_those_of_one_process(places, tmp_path, dp, tp, changes):
    train(config_of(places, tmp_path / "alone", 50, **changes), progress=False)
    run_ranks(dp * tp, trained, config_of(places, tmp_path / "many", 50, **changes), dp, tp)
    assert_same_run(tmp_path / "many", tmp_path / "alone")


def whole_state(run, places, dp=None, tp=None):
    """What a resumed loop holds, put together: every tensor of the SAE and of the optimizer, in rank 0's answer."""
    with open_mesh(dp, tp, CPU) as mesh:
        config = TrainConfig(**read_json(run / "config.json"))
        directory = RunDirectory(run, config.to_dict(), resume=True, mesh=mesh)
        loop = Loop(config, load_lm(config, CPU), directory, resume=True, progress=False, mesh=mesh)
        directory.close()
        trainer, state = loop.trainer, {}
        for name, tensor in {**trainer.sae.state_dict(), **trainer.state()}.items():
            if mesh.tp > 1 and re.search(r"W_(enc|dec)(\.exp|$)", name):
                tensor = gathered_rows(tensor, config.groups, config.n_latents // config.groups, mesh)
            state[name] = tensor.clone()
        return state, loop.position


def test_a_checkpoint_of_two_by_two_is_the_same_bits_on_every_layout(two_by_two, places):
    run, _ = two_by_two
    wanted, position = whole_state(run, places)
    assert torch.equal(wanted["W_dec"], load_file(run / "sae" / "model.safetensors")["W_dec"])
    assert wanted["adam.W_enc.exp_avg_sq"].shape == (151, 16)
    for n, dp, tp in ((2, 1, 2), (4, 1, 4), (4, 2, 2)):
        for state, at in run_ranks(n, whole_state, run, places, dp, tp):
            assert at == position
            assert state.keys() == wanted.keys()
            assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items()), (dp, tp)


def tensors_of(sae):
    return dict(sae.state_dict())


def same_tensors(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_without_its_processes_a_run_gives_its_sae_from_a_checkpoint_of_any_layout(alone, two_by_two, tmp_path):
    for original in (alone, two_by_two[0]):
        run = tmp_path / original.parent.name
        shutil.copytree(original, run)
        wanted, last = load_file(run / "sae" / "model.safetensors"), max(run.glob("step-*"))
        convert(last, tmp_path / f"{run.name} in one")
        assert same_tensors(load_file(tmp_path / f"{run.name} in one" / "model.safetensors"), wanted)
        shutil.rmtree(run / "sae")
        assert same_tensors(tensors_of(MLSAE.from_pretrained(run)), wanted)
        assert MLSAE.from_pretrained(run).config == MLSAE.from_pretrained(original).config


def test_where_the_sae_is_of_an_earlier_step_the_newest_sound_checkpoint_is_read(two_by_two, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(two_by_two[0], run)
    newest = tensors_of(MLSAE.from_pretrained(run))
    before, last = sorted(run.glob("step-*"))[-2:]
    MLSAE.from_pretrained(before).save_pretrained(run / "sae", step=45)
    older = load_file(run / "sae" / "model.safetensors")
    assert not same_tensors(older, newest)
    assert same_tensors(tensors_of(MLSAE.from_pretrained(run)), newest)
    shard = last / "sae-2-of-2.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert same_tensors(tensors_of(MLSAE.from_pretrained(run)), older)
    with pytest.raises(ResourceError, match="failed its checksum"):
        MLSAE.from_pretrained(last)


def test_the_leader_writes_the_sae_a_piece_at_a_time(two_by_two, tmp_path, monkeypatch):
    """It has no more than a piece in its hands, and what it writes is what one process would."""
    run, largest = two_by_two[0], []
    last, saved = max(run.glob("step-*")), fingerprint_of(run)
    monkeypatch.setattr(manifest, "PIECE_BYTES", 10 * 16 * 4)
    real = files._write_entries
    monkeypatch.setattr(files, "_write_entries", lambda file, part: largest.append(len(part)) or real(file, part))
    export_sae(last, tmp_path / "sae", {name: saved[name] for name in ("vectors", "prompt")})
    assert max(largest) <= 16
    assert (tmp_path / "sae" / "model.safetensors").read_bytes() == (run / "sae" / "model.safetensors").read_bytes()
    sae = MLSAE.from_pretrained(tmp_path / "sae")
    for name in ("shapes", "sha256"):
        assert fingerprint.of(sae)[name] == saved[name]


def fingerprint_of(run):
    return MLSAE.from_pretrained(run).fingerprint


def looked_at(config):
    """What the first look shows on each rank, and what the rank read and hashed of it."""
    with open_mesh(None, None, CPU) as mesh:
        hashes, reads, sha256, read = [], [], files.sha256, stream.read
        files.sha256 = lambda path: hashes.append(path.name) or sha256(path)
        stream.read = lambda *asked: reads.append(asked[2].shape) or read(*asked)
        lm = load_lm(config, CPU)
        source = stream.Stream(config, lm, progress=False, mesh=mesh)
        sae = MLSAE(described_sae(config, lm))
        return [each.clone() for each in source.sample(sae)], len(reads), hashes


def test_the_first_look_is_shared_out_and_one_process_checks_the_text(places, tmp_path, alone):
    config = TrainConfig(**read_json(alone / "config.json"))
    (wanted, n_reads, _), by_rank = looked_at(config), run_ranks(2, looked_at, config)
    assert n_reads == len(wanted) > 3
    assert sum(n for _, n, _ in by_rank) <= n_reads + 1
    for shown, _, _ in by_rank:
        assert len(shown) == len(wanted)
        assert all(torch.equal(a, b) for a, b in zip(shown, wanted, strict=True))
    assert [sorted(hashes) for *_, hashes in by_rank] == [["document_starts.bin", "tokens.bin"], []]


def test_a_stop_asked_of_one_rank_stops_all_and_another_layout_goes_on(places, tmp_path, alone):
    run = tmp_path / "run"
    config = config_of(places, run, 50, validate_every_steps=20)
    ended = run_ranks(2, lambda_free_stop, config)
    assert [kind for kind, *_ in ended] == ["Interrupted"] * 2
    assert [elsewhere for *_, elsewhere in ended] == [False, True]
    assert "after step 7 of 50" in ended[0][1]
    assert run_ranks(2, trained_from_checkpoint, config)[0]["steps"] == 50
    assert_same_run(run, alone)


def lambda_free_stop(config):
    return trained(config, 1, 2, stop_after=7)


def trained_from_checkpoint(config):
    return trained(config, 2, 1, resume=True)


def dying(config, how):
    """Rank 1 ends in its third step; what rank 0 says then."""
    update, steps = module.Trainer.update, itertools.count(1)

    def counted(self):
        if next(steps) == 8 and os.environ["RANK"] == "1":
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise MemoryError
        return update(self)

    module.Trainer.update = counted
    started = time.monotonic()
    return trained(config), time.monotonic() - started


def test_when_a_rank_dies_the_others_say_so_and_the_run_resumes(places, tmp_path, alone):
    config = config_of(places, tmp_path / "run", 50, validate_every_steps=20)
    with pytest.raises(AssertionError, match="a rank died"):
        run_ranks(2, dying_and_noting, config, tmp_path / "said.json")
    kind, said, seconds = json.loads((tmp_path / "said.json").read_text())
    assert kind == "ResourceError"
    assert "another process of this job is gone" in said
    assert seconds < 30
    assert sorted(p.name for p in (tmp_path / "run").glob("step-*")) == ["step-00000005"]
    assert train(config, resume=True, progress=False).steps == 50
    assert_same_run(tmp_path / "run", alone)


def dying_and_noting(config, note):
    (kind, said, _), seconds = dying(config, "killed")
    note.write_text(json.dumps([kind, said, seconds]))


# ---- as users start it -----------------------------------------------------------------------------------------------

CHILD = """
import os, signal, sys
import mlsae.trainer
from mlsae.cli import main

update, steps = mlsae.trainer.Trainer.update, iter(range(10**6))
def counted(self):
    if next(steps) == 7 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self)
mlsae.trainer.Trainer.update = counted
sys.exit(main())
"""


def torchrun(*arguments):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    return done.returncode, done.stderr, time.monotonic() - started


def flags(config):
    given = {**TINY, "lm": config.lm, "data": config.data, "tokens": config.tokens, "out": config.out}
    return [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", str(value))]


@pytest.mark.slow
def test_under_torchrun_a_killed_rank_ends_the_job_and_a_restart_resumes_by_itself(places, tmp_path, monkeypatch):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    train(config_of(places, tmp_path / "alone", 20), progress=False)
    config = config_of(places, tmp_path / "run", 20)
    code, said, seconds = torchrun(str(script), "train", *flags(config), "--tp", "2", "--quiet")
    assert code != 0
    assert "another process of this job is gone" in said
    assert seconds < 60  # starting included
    config = config_of(places, tmp_path / "again", 20)
    restarts = ("--max-restarts", "1")
    code, said, _ = torchrun(*restarts, str(script), "train", *flags(config), "--tp", "2", "--quiet")
    assert code == 0, said
    assert_same_run(tmp_path / "again", tmp_path / "alone")
