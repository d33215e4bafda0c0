"""The catalogue of bad input: each is one sentence on stderr and an exit code, soon, and leaves nothing behind."""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import errors as hub
from safetensors.torch import save_file
from torch import zeros

import mlsae.hub
from conftest import train_command, tree
from mlsae import devices, files
from mlsae.cli import main

Prepare = Callable[["Place"], None]


@dataclass
class Place:
    """Where one case happens: a workspace that must not change, and what can be monkeypatched."""

    work: Path
    lm: Path
    corpus: Path
    run: Path
    patch: pytest.MonkeyPatch

    def config(self, content: str | bytes) -> None:
        """A YAML file named config.yaml."""
        (self.work / "config.yaml").write_bytes(content.encode() if isinstance(content, str) else content)

    def folder(self, name: str, config: object, weights: str = "model.safetensors") -> None:
        """A folder with a config.json and weights of a kind, but nothing that could be loaded."""
        (self.work / name).mkdir()
        (self.work / name / "config.json").write_text(json.dumps(config))
        if weights.endswith(".safetensors"):
            save_file({"x": zeros(1)}, self.work / name / weights)
        else:
            (self.work / name / weights).write_bytes(b"cos\nsystem\n(S'touch pickle-ran'\ntR.")


@dataclass
class Case:
    """A row of the catalogue: flags beside the usual ones, which they override, and what must be said."""

    row: str
    flags: str
    code: int
    says: str
    prepare: Prepare = lambda place: None
    seconds: float = 2.0


def hub_says(kind: type[Exception]) -> Prepare:
    """The Hub answers with an error whose own text quotes a token."""

    def prepare(place: Place) -> None:
        def model_info(*args: object, **kwargs: object) -> None:
            error = kind.__new__(kind)  # constructors differ between versions
            error.args = ("401 for Bearer hf_secret",)
            raise error

        place.patch.setattr(mlsae.hub.HfApi, "model_info", model_info)

    return prepare


def config_holds(content: str | bytes) -> Prepare:
    return lambda place: place.config(content)


def folder_holds(config: object, weights: str = "model.safetensors") -> Prepare:
    return lambda place: place.folder("bad", config, weights)


def little_memory(place: Place) -> None:
    place.patch.setattr(devices, "free_memory", lambda device: 100_000)


def little_disk(place: Place) -> None:
    place.patch.setattr(files, "free_bytes", lambda path: 100_000)


def read_only(place: Place) -> None:
    (place.work / "sealed").mkdir(mode=0o555)
    if os.access(place.work / "sealed", os.W_OK):  # root may write everywhere
        mkdir = Path.mkdir

        def refused(path: Path, *args: object, **kwargs: object) -> None:
            if "sealed" in path.parts:
                raise PermissionError(13, "Permission denied", str(path))
            mkdir(path, *args, **kwargs)

        place.patch.setattr(Path, "mkdir", refused)


def a_file(place: Place) -> None:
    (place.work / "taken").write_text("mine")


def a_run(place: Place) -> None:
    shutil.copytree(place.run, place.work / "run")


BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 32, "num_hidden_layers": 2}
T5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 32, "num_layers": 2}
CODE = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_hidden_layers": 3}

CASES = [
    Case(
        "1 LM unknown",
        "--lm EleutherAI/pythia-70n",
        6,
        "model: 'EleutherAI/pythia-70n' not found on the Hub or as a folder; did you mean 'EleutherAI/pythia-70m'",
        hub_says(hub.RepositoryNotFoundError),
    ),
    Case(
        "1 no such folder", "--lm ./no-such-folder", 6, "model: './no-such-folder' not found on the Hub or as a folder"
    ),
    Case(
        "2 LM offline",
        "--lm org/lm",
        6,
        "model: 'org/lm' is not in the local cache and offline mode is on; run 'hf download org/lm' while online",
    ),
    Case("3 LM gated", "--lm org/lm", 6, "model: 'org/lm' is gated; .*'hf auth login'", hub_says(hub.GatedRepoError)),
    Case("3 LM private", "--lm o/p", 6, "model: 'o/p'.*'hf auth login'", hub_says(hub.RepositoryNotFoundError)),
    Case("4 BERT", "--lm bad", 6, "model: 'bad' is BertForMaskedLM, not a causal language model", folder_holds(BERT)),
    Case(
        "4 T5",
        "--lm bad",
        6,
        "model: 'bad' is T5ForConditionalGeneration, not a causal language model",
        folder_holds(T5),
    ),
    Case(
        "5 unsupported",
        "--lm bad",
        6,
        "model: 'bad' is of type 'novel'.* supported",
        folder_holds({"model_type": "novel"}),
    ),
    Case(
        "6 remote code", "--lm bad", 6, "model: 'bad' needs code from its repository; not supported", folder_holds(CODE)
    ),
    Case(
        "7 pickle weights",
        "--lm bad",
        6,
        "model: 'bad' has no safetensors weights; see 'mlsae convert'",
        folder_holds(LLAMA, "pytorch_model.bin"),
    ),
    Case("8 layer too large", "--layers 6", 2, "layers: 6 is out of range; .*tiny-llama has layers 0-2"),
    Case("8 layer n", "--layers 0 3", 2, "layers: 3 is out of range; .*tiny-llama has layers 0-2"),
    Case("9 negative layer", "--layers -1", 2, "layers: -1 is out of range; use 2 for the last"),
    Case("10 layer twice", "--layers 1 2 1", 2, "layers: 1 is given twice"),
    Case("10 no layer", "--layers", 2, "layers: .*(empty|nothing|at least one)"),
    Case("10 layer a word", "--layers 0 two", 2, "layers: '0 two' given; must be whole numbers"),
    Case("10 layer not whole", "--layers 1.5", 2, "layers: '1.5' given; must be whole numbers"),
    Case("11 k zero", "--k 0", 2, "k: 0 given; must be at least 1"),
    Case("11 k negative", "--k -4", 2, "k: -4 given; must be at least 1"),
    Case("12 k too large", "--k 9000", 2, r"k: 9000 exceeds n_latents 64 \(= 32 x 2\)"),
    Case("13 auxk too large", "--k-aux 9000", 2, "k_aux: 9000 exceeds n_latents 64; .*0 for off"),
    Case("13 auxk off", "--k-aux 0", 0, "", seconds=10),
    Case("14 expansion zero", "--expansion-factor 0", 2, "expansion_factor: 0.0 given; must be greater than 0"),
    Case("14 latents not whole", "--expansion-factor 0.7", 2, "expansion_factor: 0.7 x d_model 32 = 22.4 latents"),
    Case(
        "15 too big for memory",
        "--expansion-factor 64",
        2,
        r"expansion_factor: needs about \S+ GB \(weights, gradients, Adam\); \S+ GB free; largest expansion that fits: 3$",
        little_memory,
    ),
    Case("16 lr zero", "--lr 0", 2, "lr: 0.0 given; must be greater than 0"),
    Case("16 lr negative", "--lr -1e-3", 2, "lr: -0.001 given; must be greater than 0"),
    Case("16 lr NaN", "--lr nan", 2, "lr: nan given; must be .*[01]$"),
    Case("16 lr infinite", "--lr inf", 2, "lr: inf given; must be .*1$"),
    Case("16 lr too large", "--lr 1.5", 2, "lr: 1.5 given; must be less than or equal to 1"),
    Case("17 batch", "--batch-size 0", 2, "batch_size: 0 given; must be at least 1"),
    Case("17 context", "--context-length 0", 2, "context_length: 0 given; must be at least 1"),
    Case("17 context of 1", "--context-length 1", 2, "context_length: 1.* at least 2"),
    Case("17 accumulation", "--accumulation-steps -1", 2, "accumulation_steps: -1 given; must be at least 1"),
    Case("17 tokens", "--tokens 0", 2, "tokens: 0 given; must be at least 1"),
    Case("17 steps", "--save-every-steps 0", 2, "save_every_steps: 0 given; must be at least 1"),
    Case("18 less than a step", "--tokens 10", 2, r"tokens: 10 tokens is less than one step \(64\)"),
    Case("19 context too long", "--context-length 4096", 2, "context_length: 4096 exceeds the model's 64"),
    Case(
        "20 dead at once",
        "--dead-after-tokens 1",
        2,
        "dead_after_tokens: 1 is less than one step .*dead at once; use at least 64",
    ),
    Case(
        "21 unknown key",
        "--config config.yaml",
        2,
        "unknown key 'expasion_factor'; did you mean 'expansion_factor'?",
        config_holds("expasion_factor: 2\n"),
    ),
    Case(
        "21 unknown flag",
        "--expasion-factor 2",
        2,
        "unknown flag '--expasion-factor'; did you mean '--expansion-factor'?",
    ),
    Case(
        "22 text for a number",
        "--config config.yaml",
        2,
        "k: '32' given; must be a.* integer",
        config_holds('k: "32"\n'),
    ),
    Case(
        "22 true for a number",
        "--config config.yaml",
        2,
        "k: True given; must be a.* integer",
        config_holds("k: true\n"),
    ),
    Case(
        "22 number for a switch",
        "--config config.yaml",
        2,
        "repeat: 1 given; must be .*bool",
        config_holds("repeat: 1\n"),
    ),
    Case("22 word for a number", "--k many", 2, "k: 'many' given; must be a whole number"),
    Case("22 fraction for a count", "--tokens 1.5", 2, "tokens: 1.5 given; must be a.* integer"),
    Case("23 config missing", "--config nowhere.yaml", 2, "nowhere.yaml: no such file"),
    Case(
        "23 config empty",
        "--config config.yaml",
        2,
        "config.yaml: line 1, column 1: the file is empty",
        config_holds(""),
    ),
    Case(
        "23 config of blanks",
        "--config config.yaml",
        2,
        "config.yaml: line 1, column 1",
        config_holds(" \n# nothing\n"),
    ),
    Case(
        "23 config no YAML", "--config config.yaml", 2, r"config.yaml: line \d, column \d: ", config_holds("k: 4\n{\n")
    ),
    Case(
        "23 config no mapping",
        "--config config.yaml",
        2,
        "config.yaml: line 1, column 1: holds a list",
        config_holds("- k\n"),
    ),
    Case(
        "23 key twice",
        "--config config.yaml",
        2,
        "config.yaml: line [13], column 1: key 'k' stands twice",
        config_holds("k: 4\nlr: 1e-3\nk: 5\n"),
    ),
    Case(
        "23 BOM",
        "--config config.yaml",
        2,
        "config.yaml: line 1, column 1: .*byte-order mark",
        config_holds(b"\xef\xbb\xbfk: 4\n"),
    ),
    Case("23 not UTF-8", "--config config.yaml", 2, "config.yaml: byte 3: not UTF-8", config_holds(b"lm: \xff\n"[1:])),
    Case(
        "23 config runs nothing",
        "--config config.yaml",
        2,
        "config.yaml: line 1, column 4: ",
        config_holds("k: !!python/object/apply:os.system ['touch ran']\n"),
    ),
    Case(
        "37 precision", "--precision float16", 2, "precision: float16 is not supported on CPU; use float32 or bfloat16"
    ),
    Case("37 LM dtype", "--lm-dtype float16", 2, "lm_dtype: float16 is not supported on CPU; use float32 or bfloat16"),
    Case("38 no such GPU", "--device cuda:99", 2, "device: 'cuda:99' is not here; this machine has cpu"),
    Case("38 no such kind", "--device abacus", 2, "device: 'abacus' is not here; this machine has cpu"),
    Case("39 read-only", "--out sealed/run", 4, "sealed/run: Permission denied", read_only),
    Case("39 a file", "--out taken", 4, "taken: is a file", a_file),
    Case("39 below a file", "--out taken/run", 4, "taken/run: Not a directory", a_file),
    Case("39 path too long", f"--out {'x' * 300}/run", 4, "x/run: File name too long"),
    Case(
        "40 disk full",
        "--expansion-factor 64",
        4,
        r"out: 3 checkpoints need \S+ GB; \S+ GB free at out",
        little_disk,
    ),
    Case(
        "41 another config",
        "--out run --k 3",
        4,
        r"run: holds a run with another config \(k 4 -> 3\); choose another --out",
        a_run,
    ),
    Case("41 the same config", "--out run", 4, "run: holds this run already; add --resume", a_run),
    Case("42 nothing to resume", "--resume", 4, "out: no checkpoint in it"),
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lm_folder: Path, corpus: Path, trained: Path) -> Place:
    """An empty workspace, which is the current folder."""
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, lm_folder, corpus, trained, monkeypatch)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.row)
def test_bad_input(case: Case, place: Place, capsys: pytest.CaptureFixture[str]):
    case.prepare(place)
    command = train_command(*case.flags.split(), lm=place.lm, data=place.corpus, out="out")
    before = tree(place.work)
    capsys.readouterr()
    started = time.monotonic()
    code = main(command)
    seconds = time.monotonic() - started
    shown = capsys.readouterr().err
    assert code == case.code, shown
    assert seconds <= case.seconds
    if code == 0:
        return
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1, shown
    assert re.search(case.says, shown.rstrip("\n")), shown
    assert "Traceback" not in shown
    assert "hf_secret" not in shown
    assert tree(place.work) == before, "something was left behind"


def test_every_row_of_the_catalogue_has_a_case():
    covered = {int(case.row.split()[0]) for case in CASES}
    assert covered == {*range(1, 24), *range(37, 43)}
