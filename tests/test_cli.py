"""The command line: help, flags over files, the whole way from text to report, and what every failure looks like."""

import contextlib
import importlib
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from conftest import train_command, tree
from mlsae import cli, commands, naming
from mlsae.cli import COMMANDS, main
from mlsae.sae import MLSAE
from mlsae.text import TextSource

HEAVY = ("torch", "transformers", "datasets", "matplotlib", "huggingface_hub")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], env=ENV, capture_output=True, text=True, timeout=60, check=False
    )


def words(text: str) -> str:
    """Text without the help's frames, line breaks, quotes and backticks."""
    return " ".join(re.sub(r"[│╭╮╰╯─`]", " ", text).split())


# ---- help ------------------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy():
    """Help, usage errors and the version answer before anything slow is imported; only that is measured, not time."""
    script = (
        "import sys\nfrom mlsae.cli import main\n"
        "for a in ['--help'], ['--version'], *([c, '--help'] for c in ('demo', 'train', 'evaluate', 'analyze')):\n"
        "    assert main(a) == 0, a\n"
        "for a in ['trian'], ['train'], ['train', '--k', 'x', '--lm', 'a', '--data', 'a', '--out', 'a']:\n"
        "    assert main(a) == 2, a\n"
        f"print('heavy:', sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = python(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_field_with_its_docstring(name: str, capsys: pytest.CaptureFixture[str]):
    assert main([name, "--help"]) == 0
    shown = words(capsys.readouterr().out)
    for field, about in COMMANDS[name][0].model_fields.items():
        flag = field.rstrip("_").replace("_", "-")
        assert flag in shown or flag.upper() in shown
        assert about.description, f"{field} has no docstring"
        assert words(about.description) in shown, field


def test_program_help_names_every_command(capsys: pytest.CaptureFixture[str]):
    for arguments in ([], ["-h"], ["--help"]):
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        assert all(re.search(rf"^  {name} +\S", shown, re.MULTILINE) for name in COMMANDS)


def test_python_m_mlsae_is_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "mlsae", "trian"], env=ENV, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: command: unknown command 'trian'; did you mean 'train'?\n"


# ---- parsing ---------------------------------------------------------------------------------------------------------


USAGE = [
    ("trian", "command: unknown command 'trian'; did you mean 'train'?"),
    ("zzz", f"command: unknown command 'zzz'; choose {', '.join(COMMANDS)}"),
    ("train", "lm: missing; give --lm"),
    ("train --lm a --data b", "out: missing; give --out"),
    ("evaluate", "sae: missing; name a run directory, an SAE folder or a Hub id"),
    ("push run", "repo: missing; name a repository of yours on the Hub, user/name"),
    ("evaluate run --splice-token 5", "splice-token: unknown flag '--splice-token'; did you mean '--splice-tokens'?"),
    ("evaluate run --zzz 5", "zzz: unknown flag '--zzz'; see mlsae evaluate --help"),
    ("evaluate run --tokens 0", "tokens: 0 given; must be at least 1"),
    ("evaluate run --tokens", "tokens: 'nothing' given; must be a whole number"),
    ("evaluate run --tokens=many", "tokens: 'many' given; must be a valid integer"),
    ("train --lm a --data b --out c --k=many", "k: 'many' given; must be a whole number"),
    ("train --lm a --data b --out c --k 4 --k many", "k: 'many' given; must be a whole number"),
    ("train --lm a --data b --out c --recipe lawson", "recipe: 'lawson' given; must be standard or lawson2024"),
    ("train --lm a --data b --out c stray", "train: 'stray' is not understood; see mlsae train --help"),
    ("evaluate run --json", "json: 'nothing' given; must be a text"),
    ("analyze run stray", "analyze: 'stray' is not understood; see mlsae analyze --help"),
    ("demo --minutes 0", "minutes: 0.0 given; must be greater than 0"),
    ("demo --minutes nan", "minutes: nan given; must be greater than 0"),
]


@pytest.mark.parametrize(("line", "sentence"), USAGE, ids=[line for line, _ in USAGE])
def test_usage_errors(line: str, sentence: str, capsys: pytest.CaptureFixture[str]):
    assert main(line.split()) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"error: {sentence}\n")


def parsed(tmp_path: Path, yaml: str, flags: str = "") -> commands.Train:
    (tmp_path / "config.yaml").write_text(yaml)
    command = cli._parse(commands.Train, ["train", "--config", str(tmp_path / "config.yaml"), *flags.split()])
    assert isinstance(command, commands.Train)
    return command


MATERIALS = "lm: a\ndata: b\nout: c\n"


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path):
    command = parsed(tmp_path, MATERIALS + "k: 7\nseed: 3\n", "--k 9 --out elsewhere")
    assert (command.k, command.seed, command.out, command.lm) == (9, 3, "elsewhere", "a")
    assert command.adam_eps == commands.Train(lm="a", data="b", out="c").adam_eps


def test_numbers_in_a_file_are_written_as_people_write_them(tmp_path: Path):
    yaml = (
        MATERIALS
        + "tokens: 1e5\nlr: 2e-4\nlayers: [0, 2]\ndead_after_tokens: 1E+6\nadam_betas: [0.9, 0.99]\nrepeat: false\n"
    )
    command = parsed(tmp_path, yaml)
    assert (command.tokens, command.lr, command.layers) == (100_000, 2e-4, (0, 2))
    assert (command.dead_after_tokens, command.adam_betas, command.repeat) == (1_000_000, (0.9, 0.99), False)
    assert isinstance(command.tokens, int)


def test_a_file_may_be_json_and_may_hold_the_resolved_config_of_a_run(tmp_path: Path, trained: Path):
    config = json.loads((trained / "config.json").read_text())
    assert parsed(tmp_path, json.dumps(config)).replaced(config=None) == commands.Train(**config)


def test_what_the_file_lacks_must_be_a_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.yaml").write_text("lm: a\nk: 4\n")
    assert main(["train", "--config", str(tmp_path / "config.yaml"), "--data", "b"]) == 2
    assert capsys.readouterr().err == "error: out: missing; give --out\n"


def test_a_switch_that_the_file_set_can_be_set_back(tmp_path: Path):
    """A flag wins over the file for switches too, whichever way the file set them."""
    assert parsed(tmp_path, MATERIALS, "--no-repeat").repeat is False
    assert parsed(tmp_path, MATERIALS + "skip_bad_rows: true\n", "--no-skip-bad-rows").skip_bad_rows is False
    assert parsed(tmp_path, MATERIALS + "repeat: false\n", "--repeat").repeat is True


# ---- the whole way ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """What commands of the `run` fixture wrote to standard output."""
    return {}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, trained: Path, printed: dict[str, str]) -> Path:
    """A trained, evaluated and analyzed run."""
    run = shutil.copytree(trained, tmp_path_factory.mktemp("cli") / "run")
    for command, *flags in (["evaluate"], ["analyze", "--json", "-"]):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main([command, str(run), "--tokens", "256", "--quiet", *flags]) == 0
        printed[command] = out.getvalue()
    return run


def test_training_leaves_a_run_directory(trained: Path):
    config = json.loads((trained / "config.json").read_text())
    assert (config["k"], config["tokens"], config["layers"]) == (4, 1000, [0, 1, 2])
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "tokens", "loss", "fvu", "dead_fraction", "tokens_per_second"} <= lines[-1].keys()
    assert [line["step"] for line in lines] == list(range(1, 16))
    assert {path.name for path in (trained / "sae").iterdir()} >= {"config.json", "model.safetensors"}
    newest = {path.name for path in sorted(trained.glob("step-*"))[-1].iterdir()}
    assert newest == {"sae.safetensors", "state.safetensors", "state.json", "manifest.json"}


def test_evaluation_and_analysis_are_written_into_the_run(run: Path):
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert {"n_tokens", "layers", "mean", "all_layers", "clean_ce", "dead_fraction", "lawson2024"} <= evaluation.keys()
    analysis = run / "analysis"
    assert {"decomposition", "lawson2024"} <= json.loads((analysis / "summary.json").read_text()).keys()
    assert (analysis / "layers.safetensors").stat().st_size
    assert json.loads((analysis / "similarity.json").read_text())["n_tokens"] == evaluation["n_tokens"]
    assert "<html" in (analysis / "report.html").read_text()
    assert any((analysis / "figures").iterdir())


def test_analysis_elsewhere_needs_a_place(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]):
    sae, out = run / "sae", tmp_path / "elsewhere"
    assert main(["analyze", str(sae), "--tokens", "128"]) == 2
    assert f"error: out: '{sae}' is not a run directory; give --out" in capsys.readouterr().err
    assert main(["analyze", str(sae), "--tokens", "128", "--out", str(out), "--quiet"]) == 0
    assert (out / "summary.json").is_file()


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The corpus in a column `story`, with a row that has no text in each file."""
    folder = tmp_path_factory.mktemp("stories")
    for file in corpus.iterdir():
        rows = [{"story": json.loads(line)["text"]} for line in file.read_text().splitlines()]
        (folder / file.name).write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"story": 5}]))
    return folder


def test_a_run_is_judged_on_its_own_text_as_it_read_it(tmp_path, lm_folder, corpus, stories, capsys):
    """The same documents in another column, with rows that are none, give the same numbers without a flag."""
    found = []
    for data, flags in ((corpus, ()), (stories, ("--text-column", "story", "--skip-bad-rows"))):
        out = tmp_path / data.name
        assert main(train_command(*flags, lm=lm_folder, data=data, out=out)) == 0
        for command in ("evaluate", "analyze"):
            assert main([command, str(out), "--tokens", "256", "--quiet"]) == 0, capsys.readouterr().err
        summaries = (json.loads((out / name).read_text()) for name in ("evaluation.json", "analysis/summary.json"))
        found.append([{**summary, "seconds": 0} for summary in summaries])
    assert found[0] == found[1]
    capsys.readouterr()
    sae = str(tmp_path / stories.name / "sae")  # an SAE alone does not say how its text was read
    assert main(["evaluate", sae, "--tokens", "256", "--quiet"]) == 3
    assert "story" in capsys.readouterr().err
    flags = ("--tokens", "256", "--quiet", "--json", str(tmp_path / "alone.json"))
    assert main(["evaluate", sae, "--text-column", "story", "--skip-bad-rows", *flags]) == 0
    assert {**json.loads((tmp_path / "alone.json").read_text()), "seconds": 0} == found[0][0]


def test_what_a_run_read_goes_for_its_own_text_and_flags_go_before_it(tmp_path: Path, trained: Path, corpus, stories):
    run, other = shutil.copytree(trained, tmp_path / "run"), str(stories)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "text_column": "story", "streaming": True}))
    sae, own = MLSAE.from_pretrained(run), str(corpus)

    def text(data: str, **flags: Any) -> TextSource:
        return naming.text(commands.Evaluate(sae=str(run), **flags), sae, data)

    assert text(own) == TextSource(own, "test", "story", streaming=True)
    assert text(f"{corpus}/../{corpus.name}") == TextSource(
        f"{corpus}/../{corpus.name}", "test", "story", streaming=True
    )
    assert text(own, text_column="text", skip_bad_rows=True) == TextSource(own, "test", "text", True, True)
    assert text(own, split="train").split == "train"
    assert text(other) == TextSource(other, "test")
    flags = {"text_column": "story", "skip_bad_rows": True, "streaming": True, "split": "all"}
    assert text(other, **flags) == TextSource(other, "all", "story", True, True)
    (run / "config.json").unlink()
    assert text(own) == TextSource(own, "test")


def test_json_to_standard_output_is_all_there_is(run: Path, printed: dict[str, str], capfd):
    assert json.loads(printed["analyze"]) == json.loads((run / "analysis" / "summary.json").read_text())
    assert main(["evaluate", str(run), "--tokens", "256", "--json", "-", "--quiet"]) == 0
    assert json.loads(capfd.readouterr().out) == json.loads((run / "evaluation.json").read_text())


def test_json_to_a_file(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]):
    command = ["evaluate", str(run), "--tokens", "128", "--quiet", "--json", str(tmp_path / "deep" / "result.json")]
    assert main(command) == 0
    written = json.loads((tmp_path / "deep" / "result.json").read_text())
    assert "FVU" in capsys.readouterr().out
    assert {**written, "seconds": 0} == {**json.loads((run / "evaluation.json").read_text()), "seconds": 0}


def test_json_where_nothing_can_be_written_is_refused_before_the_work(tmp_path: Path, run: Path, monkeypatch, capsys):
    """Hours of evaluation must not end in a file that cannot be written."""
    (tmp_path / "taken").write_text("")
    module = importlib.import_module("mlsae.evaluate")
    monkeypatch.setattr(module, "evaluate", lambda *args, **kwargs: pytest.fail("evaluated first"))
    assert main(["evaluate", str(run), "--tokens", "128", "--quiet", "--json", str(tmp_path / "taken" / "x.json")]) == 4
    assert "Not a directory" in capsys.readouterr().err


def test_train_prints_json_too(tmp_path: Path, lm_folder: Path, corpus: Path, capfd: pytest.CaptureFixture[str]):
    assert main(train_command("--json", "-", lm=lm_folder, data=corpus, out=tmp_path / "run")) == 0
    assert json.loads(capfd.readouterr().out)["steps"] == 15


def test_an_sae_that_forgot_its_language_model_must_be_told(tmp_path: Path, trained: Path, capsys):
    sae = MLSAE.from_pretrained(trained)
    config = sae.config
    for key, code in (("lm", 2), ("data", 2)):
        sae.config = config.replaced(expansion_factor=None, **{key: None})
        sae.save_pretrained(tmp_path / "sae")
        assert main(["evaluate", str(tmp_path / "sae"), "--tokens", "64"]) == code
        assert capsys.readouterr().err == f"error: {key}: the SAE does not say what it was trained on; give --{key}\n"


def test_resuming_a_finished_run_changes_nothing_and_says_so(tmp_path: Path, trained: Path, lm_folder, corpus, capsys):
    run = shutil.copytree(trained, tmp_path / "run")
    before = tree(run)
    assert main(train_command("--resume", lm=lm_folder, data=corpus, out=run)) == 0
    after = tree(run)
    assert after == before
    assert "nan" not in capsys.readouterr().out.lower()


# ---- failures --------------------------------------------------------------------------------------------------------


def failing_with(error: BaseException):
    def run(command):
        raise error

    return run


def test_terminal_escapes_in_what_was_given_are_escaped(capsys: pytest.CaptureFixture[str]):
    given = "\x1b[31mred\x1b[0m\n\u202egpj.exe\x07"
    assert main(["evaluate", given]) == 6
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert not set("\x1b\u202e\x07") & set(shown)
    assert "\\x1b[31mred" in shown


def test_a_bug_asks_for_a_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(COMMANDS, "demo", (commands.Demo, failing_with(ZeroDivisionError("oops"))))
    assert main(["demo"]) == 1
    shown = capsys.readouterr().err
    assert "ZeroDivisionError: oops" in shown
    assert re.search(r"error: a bug in mlsae \(ZeroDivisionError\).*report", shown.splitlines()[-1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_at_once_in_words(monkeypatch: pytest.MonkeyPatch, capsys, number: int):
    def work(command: object) -> None:
        signal.raise_signal(number)
        raise AssertionError("went on")

    before = signal.getsignal(number)
    monkeypatch.setitem(COMMANDS, "evaluate", (commands.Evaluate, work))
    assert main(["evaluate", "sae"]) == 75
    assert (
        capsys.readouterr().err == "error: evaluate: stopped; nothing half-made is left; run the same command again\n"
    )
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"train", "evaluate", "analyze"}))
def test_what_one_process_does_is_refused_under_torchrun(name: str, monkeypatch: pytest.MonkeyPatch, capsys):
    """Else several would write the same files at once."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(COMMANDS, name, (COMMANDS[name][0], failing_with(AssertionError("it ran"))))
    assert main([name]) == 2
    assert re.fullmatch(
        f"error: torchrun: {name} is done by one process; .*train, evaluate, analyze.*\n", capsys.readouterr().err
    )


def test_a_command_may_run_outside_the_main_thread():
    """Where signals are somebody else's."""
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(main, ["info", "--quiet"]).result() == 0


def test_a_closed_pipe_is_no_failure(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setitem(COMMANDS, "demo", (commands.Demo, failing_with(BrokenPipeError())))
    assert main(["demo"]) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_debug_shows_where_it_happened(capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", "./nowhere", "--debug"]) == 6
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.splitlines()[-1].startswith("error: sae: './nowhere'")


def test_warnings_are_one_escaped_line_each(capsys: pytest.CaptureFixture[str]):
    cli._set_up_logging()
    logging.getLogger("mlsae.made_up").warning("document\n%s", "\x1b[2J")
    assert capsys.readouterr().err == "warning: document\\n\\x1b[2J\n"


def test_nothing_but_ours_is_on_stderr_of_a_quiet_command(tmp_path: Path, lm_folder: Path, corpus: Path):
    """In a process of its own: no advice of libraries, no bars, no warnings."""
    command = train_command(lm=lm_folder, data=corpus, out=tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-m", "mlsae", *command], env=ENV, capture_output=True, text=True, timeout=90, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(
        r"15 steps, 960 tokens \(0\.\d+ passes\) in .*dead\n.*/sae\nNext: mlsae evaluate .*\n", done.stdout
    )
