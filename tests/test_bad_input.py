"""The catalogue of bad input: each is one sentence on stderr and an exit code, soon, and leaves nothing behind."""

import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from huggingface_hub import errors as hub
from safetensors.torch import save_file
from torch import zeros

import mlsae.downloads
from conftest import train_command, tree
from mlsae import commands, devices, evaluate, files
from mlsae.cli import main
from mlsae.data import pack
from mlsae.lm import LanguageModel
from mlsae.text import TextSource
from mlsae.tokens import Tokenizer
from mlsae.trainer import Trainer
from tiny import byte_tokenizer, save_tiny_lm

Prepare = Callable[["Place"], None]


@dataclass
class Place:
    """Where one case happens: a workspace that must not change, and what can be monkeypatched."""

    work: Path
    lm: Path
    corpus: Path
    run: Path
    patch: pytest.MonkeyPatch
    held: files.RunLock | None = None

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

        place.patch.setattr(mlsae.downloads.HfApi, "model_info", model_info)

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


def text(*lines: str | bytes) -> Prepare:
    """A file text.jsonl of these lines."""
    joined = b"\n".join(line.encode() if isinstance(line, str) else line for line in lines)
    return lambda place: (place.work / "text.jsonl").write_bytes(joined)


def cut_short(place: Place) -> None:
    whole = gzip.compress(b'{"text": "one"}\n' * 1000)
    (place.work / "text.jsonl.gz").write_bytes(whole[: len(whole) // 2])


def other_tokenizer(**tokens: str | None) -> Prepare:
    """The usual language model in `other`, its tokenizer without a special token or with another one."""

    def prepare(place: Place) -> None:
        shutil.copytree(place.lm, place.work / "other")
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (path := place.work / "other" / name).exists():
                found = {**json.loads(path.read_text()), **tokens}
                path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))

    return prepare


def fewer_rows(place: Place) -> None:
    save_tiny_lm(place.work / "other", vocab_size=256, bos_token_id=1, eos_token_id=2, pad_token_id=3)


def narrow(place: Place) -> None:
    a_run(place)
    save_tiny_lm(place.work / "other", d_model=16)


def renumbered(place: Place) -> None:
    a_run(place)
    save_tiny_lm(place.work / "other", bos=True)


def packed(place: Place) -> None:
    """`evaluate` is given blocks that another tokenizer made."""
    a_run(place)
    blocks = pack(TextSource(str(place.corpus)), Tokenizer(byte_tokenizer(bos=True)), 64, progress=False)
    run = lambda command: evaluate(command.sae, place.lm, blocks, progress=False)  # noqa: E731
    place.patch.setitem(commands.COMMANDS, "evaluate", (commands.Evaluate, run))


def unfinished(place: Place) -> list[Path]:
    """The run of fifteen steps; its checkpoints, newest first."""
    a_run(place)
    return sorted((place.work / "run").glob("step-*"), reverse=True)


def other_threads(place: Place) -> None:
    a_run(place)
    place.patch.setattr(torch, "get_num_threads", lambda: 7)


def damaged(n: int) -> Prepare:
    """The newest n checkpoints with a bit flipped."""

    def prepare(place: Place) -> None:
        for step in unfinished(place)[:n]:
            path = step / "sae.safetensors"
            content = bytearray(path.read_bytes())
            content[-5] ^= 4
            path.write_bytes(content)

    return prepare


def newer(place: Place) -> None:
    path = unfinished(place)[0] / "manifest.json"
    fields = {**json.loads(path.read_text()), "format_version": 3, "more": []}
    del fields["sha256"]
    digest = hashlib.sha256(files.canonical_json(fields).encode()).hexdigest()
    path.write_text(files.canonical_json({**fields, "sha256": digest}))


def in_use(place: Place) -> None:
    a_run(place)
    place.held = files.RunLock(place.work / "run")


def no_wandb(place: Place) -> None:
    place.patch.setitem(sys.modules, "wandb", None)


def half_made(place: Place) -> None:
    place.folder("bad", LLAMA, "model-1.safetensors")
    index = {"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}}
    (place.work / "bad" / "model.safetensors.index.json").write_text(json.dumps(index))


def interrupted(place: Place) -> None:
    place.patch.setattr(LanguageModel, "resid", lambda *arguments, **options: signal.raise_signal(signal.SIGINT))


def no_memory(place: Place) -> None:
    real = Trainer.accumulate

    def accumulate(trainer: Trainer, resid: torch.Tensor) -> None:
        real(trainer, resid)
        if trainer.steps == 5:
            torch.empty(2**50)

    place.patch.setattr(Trainer, "accumulate", accumulate)


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
    Case("24 no such data", "--data ./nowhere.jsonl", 3, "data: './nowhere.jsonl': no such file or folder"),
    Case(
        "24 data offline",
        "--data org/text",
        3,
        "data: 'org/text' is not in the local cache and offline mode is on; run 'hf download --repo-type dataset org/text'",
        seconds=10,
    ),
    Case("25 no rows", "--data text.jsonl", 3, "text.jsonl: 0 rows in split 'train'; give it some text", text("")),
    Case(
        "26 no such split",
        "--split nope",
        3,
        "split: no split 'nope' in .*; splits are test, train, validation, or all",
    ),
    Case("27 no such column", "--text-column body", 3, "no column 'body'; columns are 'text'; use --text-column"),
    *(
        Case(
            f"28 text is {value}",
            "--data text.jsonl",
            3,
            f"line 2, byte .*: the text is {words}, not a string; .*--skip-bad-rows",
            text('{"text": "one"}', f'{{"text": {value}}}'),
        )
        for value, words in {"null": "null", "7": "of type int", '["a"]': "of type list"}.items()
    ),
    Case(
        "28 bad rows skipped",
        "--data text.jsonl --skip-bad-rows --split all",
        0,
        "2 bad rows skipped",
        text('{"text": null}', *['{"text": "once upon a time there was a tree"}'] * 40, '{"text": 3}'),
        seconds=10,
    ),
    Case(
        "29 less than a context",
        "--data text.jsonl --split all",
        3,
        "text.jsonl: 11 tokens in all; one sequence needs 64",
        text('{"text": "ten tokens"}'),
    ),
    Case(
        "30 some documents empty",
        "--data text.jsonl --split all",
        0,
        "2 empty",
        text('{"text": ""}', *['{"text": "once upon a time there was a tree"}'] * 40, '{"text": ""}'),
        seconds=10,
    ),
    Case("31 not UTF-8", "--data text.jsonl", 3, "line 1, byte 8: not UTF-8", text(b'{"text":\xff')),
    Case("31 NUL", "--data text.jsonl", 3, "line 2, byte 19: NUL", text('{"text": "a tree"}', b"\0")),
    Case("31 lone surrogate", "--data text.jsonl", 3, "line 1, .*lone surrogate", text('{"text": "\\ud800"}')),
    Case(
        "32 not JSON",
        "--data text.jsonl",
        3,
        "line 2, byte 16: not JSON .*; 1 rows read so far",
        text('{"text": "one"}', "{"),
    ),
    Case("32 cut short", "--data text.jsonl.gz", 3, "text.jsonl.gz: .*ends too early; .* rows read so far", cut_short),
    Case(
        "33 several passes",
        "--tokens 1e4",
        0,
        r"training will take \d.\d passes.*the text was read 1 times and starts over",
        seconds=20,
    ),
    Case("33 not repeated", "--tokens 1e4 --no-repeat", 0, "the text ends after", seconds=20),
    Case(
        "34 no end of sequence",
        "--lm other",
        2,
        "separator_token: .*set --separator-token",
        other_tokenizer(eos_token=None),
    ),
    Case("34 no BOS", "--lm other", 0, "", other_tokenizer(bos_token=None), seconds=10),
    Case("34 pad is the end", "--lm other", 0, "", other_tokenizer(pad_token="<|endoftext|>"), seconds=10),
    Case("35 id without a row", "--lm other", 3, "data: holds token 256; .*other has 256 tokens", fewer_rows),
    Case(
        "36 packed elsewhere",
        "evaluate run",
        3,
        "data: was packed with tokenizer [0-9a-f]{12}; .* has [0-9a-f]{12}; pack",
        packed,
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
    Case(
        "43 other threads",
        "--out run --resume",
        0,
        "resuming with threads 1 -> 7: bit-exactness is not promised",
        other_threads,
        10,
    ),
    Case(
        "44 newest damaged",
        "--out run --resume",
        0,
        r"step-00000015 failed its checksum \(sae.safetensors\); using step-00000014",
        damaged(1),
        10,
    ),
    Case(
        "45 all damaged",
        "--out run --resume",
        4,
        r"run: no checkpoint can be used: step-00000015 failed its checksum \(sae.safetensors\); step-00000014 failed",
        damaged(2),
        10,
    ),
    Case("46 newer format", "--out run --resume", 4, "format 3; this version reads up to 2; upgrade mlsae", newer, 10),
    Case(
        "47 other width",
        "evaluate run --lm other",
        6,
        "sae: reads vectors of 32 entries; other has d_model 16",
        narrow,
        10,
    ),
    Case(
        "47 other tokenizer",
        "evaluate run --lm other",
        6,
        "sae: was trained with tokenizer [0-9a-f]{12}; other has",
        renumbered,
        10,
    ),
    Case("48 in use", "--out run --resume", 4, r"run: in use by pid \d+ on \S+ since \S+ \S+; wait for it", in_use),
    Case(
        "49 wandb missing",
        "--log-to wandb",
        0,
        "log_to: wandb is not installed .*; logging to files only",
        no_wandb,
        10,
    ),
    Case(
        "53 a shard missing",
        "--lm bad",
        6,
        "'bad' is not whole: model-2.safetensors is missing; download it",
        half_made,
    ),
    Case(
        "54 stopped before step 1",
        "",
        75,
        "train: stopped; nothing half-made is left; run the same command again",
        interrupted,
        10,
    ),
    Case(
        "55 out of memory",
        "--out run",
        4,
        r"memory: not enough at step 6 \(at most \S+ GB.*--resume.*batch_size",
        no_memory,
        10,
    ),
]
NOT_YET = {50, 51, 52}
"""Rows about the explorer."""


@pytest.fixture
def place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lm_folder: Path, corpus: Path, trained: Path
) -> Iterator[Place]:
    """An empty workspace, which is the current folder."""
    monkeypatch.chdir(tmp_path)
    place = Place(tmp_path, lm_folder, corpus, trained, monkeypatch)
    yield place
    if place.held is not None:
        place.held.release()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.row)
def test_bad_input(case: Case, place: Place, capsys: pytest.CaptureFixture[str]):
    case.prepare(place)
    words = case.flags.split()
    if words[:1] == ["evaluate"]:
        command = [*words, "--tokens", "64", "--quiet"]
    else:
        command = train_command(*words, lm=place.lm, data=place.corpus, out="out")
    before = tree(place.work)
    capsys.readouterr()
    started = time.monotonic()
    code = main(command)
    seconds = time.monotonic() - started
    shown = capsys.readouterr().err
    assert code == case.code, shown
    assert seconds <= case.seconds
    assert re.search(case.says, shown.rstrip("\n"), re.DOTALL), shown
    assert "Traceback" not in shown
    assert "hf_secret" not in shown
    if code == 0:
        assert "error" not in shown
        return
    *warnings, error = shown.splitlines()
    assert error.startswith("error: ")
    assert all(line.startswith("warning: ") for line in warnings)
    assert tree(place.work) == before or case.row.startswith("55"), "something was left behind"


def test_every_row_of_the_catalogue_has_a_case():
    covered = {int(case.row.split()[0]) for case in CASES}
    assert covered == set(range(1, 56)) - NOT_YET
