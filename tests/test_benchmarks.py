"""The benchmarks' own arithmetic and protocol, on workers that do nothing. No peer is needed and nothing is timed."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import depth  # noqa: E402
import harness  # noqa: E402
import peers  # noqa: E402
import step  # noqa: E402
from harness import Contest, Goal, Launch, Start, Turn  # noqa: E402
from workload import StepWork, dead_ids, residuals  # noqa: E402


def worker(name: str, body: str, python: str = sys.executable) -> Launch:
    """A contender whose function, of `turns`, has this body."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    script = f"import sys\nsys.path.insert(0, {str(BENCHMARKS)!r})\nimport harness\ndef run(turns):\n{lines}\nharness.serve(run)"
    return Launch(name, [python, "-c", script])


def contest(**costs: list[float]) -> Contest:
    """What contenders with these CPU seconds per round would have left; each took as many MiB as its first seconds."""
    found = Contest()
    for name, cpu in costs.items():
        found.turns[name] = [
            Turn(wall=2 * seconds, cpu=seconds, others=0.0, peak_mib=cpu[0], value=1.0) for seconds in cpu
        ]
        found.starts[name] = Start(start_mib=0.0, modifications=[f"{name} was bent"], versions={"torch": "1"}, pid=1)
    return found


def test_ratios_are_taken_within_a_round() -> None:
    # A slow round slows both, so the ratio holds where the ratio of the medians, 30 / 2, does not.
    assert harness.median_ratio([10.0, 30.0, 40.0], [1.0, 3.0, 2.0]) == 10
    assert contest(ours=[1.0, 3.0, 2.0], peer=[10.0, 30.0, 40.0]).ratio("peer", "ours", "wall") == 10
    assert contest(ours=[1.0]).ratio("peer", "ours") is None


def test_line_through_points() -> None:
    line = harness.fit_line([1, 2, 3, 4], [5, 7, 9, 11])
    assert (line.slope, line.intercept, line.r2) == (2, 3, 1)
    assert harness.fit_line([1, 2, 3], [1, 4, 1]).r2 == pytest.approx(0)


@pytest.mark.parametrize(
    ("goal", "met", "word"),
    [
        (Goal("a", 2.0, 2.0), True, "met"),
        (Goal("a", 2.0, 1.9), False, "NOT MET"),
        (Goal("a", 2.0, 1.9, at_least=False), True, "met"),
        (Goal("a", 2.0, None), None, "not measured"),
    ],
)
def test_goals(goal: Goal, met: bool | None, word: str) -> None:
    assert goal.met is met
    assert str(goal).split("  ")[1] == word


def test_contenders_take_turns(tmp_path: Path) -> None:
    order = tmp_path / "order"
    body = f"for i in turns:\n    open({str(order)!r}, 'a').write(%r)\n    turns.value = i"
    found = harness.compete([worker("a", body % "A"), worker("b", body % "B")], rounds=2, warmup=1, pause=0)
    assert order.read_text() == "ABABAB"
    assert not found.absent
    assert {name: [turn.value for turn in turns] for name, turns in found.turns.items()} == {"a": [1, 2], "b": [1, 2]}


def test_a_worker_measures_itself() -> None:
    idle = "import time\nfor i in turns: time.sleep(0.2)"
    busy = (
        "import time\nfor i in turns:\n    end = time.process_time() + 0.2\n    while time.process_time() < end: pass"
    )
    found = harness.compete([worker("idle", idle), worker("busy", busy)], rounds=1, warmup=0, pause=0)
    (idled,), (worked,) = found.turns["idle"], found.turns["busy"]
    assert idled.wall >= 0.2
    assert idled.cpu < 0.1
    assert 0.2 <= worked.cpu < 0.3
    assert idled.peak_mib is None or 1 < idled.peak_mib < 100


def test_a_contender_that_is_missing_or_breaks_is_left_out() -> None:
    well = "print('noise')\nturns.modifications.append('none')\nfor i in turns: turns.value = 7"
    found = harness.compete(
        [
            worker("well", well),
            worker("uninstalled", "import no_such_library"),
            worker("unset", "raise harness.Absent('set THIS')"),
            worker("broken", "for i in turns:\n    if i == 1: raise ValueError('of no use\\nat all')"),
            worker("killed", "import os, signal\nfor i in turns: os.kill(os.getpid(), signal.SIGKILL)"),
            worker("no python", "", python="/no/such/python"),
        ],
        rounds=2,
        warmup=0,
        pause=0,
    )
    assert list(found.turns) == ["well"]
    assert [turn.value for turn in found.turns["well"]] == [7, 7]
    assert found.starts["well"].modifications == ["none"]
    assert found.absent["uninstalled"] == "No module named 'no_such_library'"
    assert found.absent["unset"] == "set THIS"
    assert found.absent["broken"] == "failed: ValueError: of no use (round 1)"
    assert found.absent["killed"] == "ended with exit status -9: it said nothing (round 0)"
    assert "No such file" in found.absent["no python"]


def test_everything_measured_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = contest(ours=[1.0, 1.0], peer=[10.0, 30.0])
    found.absent["other"] = "not installed"
    goals = [Goal("peer / ours", 6.0, found.ratio("peer", "ours"))]
    harness.print_contest(found, 100, "vectors")
    harness.print_modifications([found])
    harness.print_goals(goals)
    printed = capsys.readouterr().out
    peer = next(line for line in printed.splitlines() if line.startswith("peer"))
    assert peer.split() == ["peer", "20.000", "40.000", "2", "20.00", "20.00", "10", "0", "0", "1"]
    for words in ("other absent: not installed", "peer was bent", "met           peer / ours >= 6  measured 20"):
        assert words in printed
    options = Namespace(json=tmp_path / "out.json", rounds=2, worker=None, worker_work={})
    harness.write_json(options, {"w": {"k": 32}}, {"w": found}, goals)
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["options"] == {"rounds": 2}
    assert [turn["cpu"] for turn in written["results"]["w"]["turns"]["peer"]] == [10.0, 30.0]
    assert written["goals"] == [{"claim": "peer / ours", "bound": 6.0, "measured": 20.0, "at_least": True, "met": True}]


def test_a_goal_is_about_the_fastest_and_the_leanest_of_a_peer() -> None:
    costs = {"ours": [2.0], "ours-reference": [8.0], "sgemm": [4.0], "official": [60.0], "sparsify": [20.0]}
    found = contest(**costs, **{"sparsify-micro6": [10.0], "ours-micro6": [4.0]})
    measured = {goal.claim: goal.measured for goal in step.step_goals("8192", found)}
    assert measured == {
        "8192: ours / encoder sgemm, CPU": 0.5,
        "8192: official / ours, CPU": 30,
        "8192: sparsify / ours, CPU": 5,
        "8192: official / ours-reference, CPU": 7.5,
        "8192: sparsify / ours-reference, CPU": 1.25,
        "8192: ours / leanest peer, peak RSS": 0.1,
        "8192: ours-micro6 / leanest peer, peak RSS": 0.4,
    }
    assert all(goal.measured is None for goal in step.step_goals("8192", contest(ours=[1.0])))


def test_growth_tells_a_dense_matrix_from_what_is_linear() -> None:
    works = step.growth_works()
    for bytes_a_pair in (0, 4):
        found = Contest()
        for work in works:
            vectors, latents = work.n_vectors, work.n_latents
            peak = 300 + 0.01 * vectors + 0.02 * latents + bytes_a_pair * vectors * latents / 2**20
            found.turns[step.size(work)] = [Turn(1.0, 1.0 + vectors / 1e4 + latents / 1e4, 0.0, peak, None)]
            found.starts[step.size(work)] = Start(300.0, [], {}, 1)
        straight_v, straight_n, memory = step.print_growth(works, found)
        assert straight_v.measured == pytest.approx(1)
        assert straight_n.measured == pytest.approx(1)
        assert memory.measured == pytest.approx(bytes_a_pair)
        assert memory.met is (bytes_a_pair == 0)


def test_vectors_are_the_same_for_everyone() -> None:
    work = StepWork(n_layers=2, n_tokens=8, d_model=16, n_latents=50, dead=0.1)
    first, again = residuals(work), residuals(work)
    assert [batch.shape for batch in first] == [(2, 8, 16)] * 2
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert not (first[0] == first[1]).any()
    assert len(dead_ids(work)) == 5


def test_peers_that_are_not_set_up_say_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLSAE_BENCH_OFFICIAL_DIR", raising=False)
    with pytest.raises(
        harness.Absent, match="set MLSAE_BENCH_OFFICIAL_DIR to a checkout of tim-lawson/mlsae at ba90c51"
    ):
        peers.checkout("official")
    with pytest.raises(harness.Absent, match="MLSAE_BENCH_DICTIONARY_LEARNING_PYTHON"):
        peers.need("no_such_library", "no-such-library", "dictionary-learning")
    monkeypatch.setenv("MLSAE_BENCH_SAELENS_PYTHON", "/some/python")
    assert peers.interpreter("saelens") == "/some/python"
    assert peers.interpreter("ours") == sys.executable


def test_our_step_runs(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "step.py", "8192-dead", "--contenders", "ours", "sgemm", "official"]
    sizes = ["--tokens", "8", "--n-latents", "512", "--threads", "1", "--rounds", "1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLSAE_BENCH_")}
    done = subprocess.run([*command, *sizes], capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
    table = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    assert table["ours"][4:6] == ["1.00", "1.00"]
    assert 0 < float(table["ours"][-1]) < 2
    assert "official absent: set MLSAE_BENCH_OFFICIAL_DIR" in done.stdout


def test_our_depth_statistics_run_on_codes_whose_latents_are_distinct(tmp_path: Path) -> None:
    values, indices = depth.codes(depth.CodeWork(n_tokens=20, n_latents=640))
    assert (indices.sort(dim=-1).values.diff(dim=-1) > 0).all()
    assert (values > 0).all()
    command = [sys.executable, BENCHMARKS / "depth.py", "--rounds", "1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLSAE_BENCH_")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
    assert done.stdout.count("official absent: set MLSAE_BENCH_OFFICIAL_DIR") == 2
    assert "stories15M: ours, tokens per CPU second" in done.stdout
