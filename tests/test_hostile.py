"""Files we did not write: nothing in them runs, and each is refused in one sentence, soon and in little memory, or is safe."""

import gzip
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from safetensors.torch import load_file, save_file

from conftest import train_command
from hostile import (
    NAMES,
    Outcome,
    Watched,
    X,
    forge,
    gadgets,
    generated,
    lair,
    lies,
    parquet_of_copies,
    repeated,
    safetensors,
    sparse,
    write_manifest,
)
from mlsae import MLSAE, MLSAEConfig, files
from mlsae.analysis.layers import LayerStatistics
from mlsae.cli import main
from mlsae.errors import ResourceError
from tiny import save_tiny_lm

STEP = "step-00000010"
FLAGS = ("--save-every-steps", "5", "--resume")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, lm_folder: Path) -> Iterator[Watched]:
    process = Watched(tmp_path_factory.mktemp("watched"), lm_folder)
    yield process
    process.close()


@pytest.fixture(scope="module")
def good(watched: Watched, lm_folder: Path, corpus: Path) -> dict[str, Path]:
    """A good one of each thing that is loaded; each loads."""
    folder = watched.root / "good"
    sae = MLSAE(MLSAEConfig(d_model=32, n_latents=64, k=4, layers=(0, 1, 2)))
    sae.save_pretrained(folder / "sae")
    LayerStatistics(3, 64).save(folder / "statistics" / "statistics.safetensors")
    (folder / "empty").mkdir()
    shutil.copytree(lm_folder, folder / "lm")
    assert main(train_command(*FLAGS[:2], lm=lm_folder, data=corpus, out=folder / "run")) == 0
    for step in (folder / "run").glob("step-*"):
        if step.name != STEP:
            shutil.rmtree(step)
    shutil.rmtree(folder / "run" / "sae")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def place(watched: Watched) -> Iterator[Path]:
    """A folder that is not there yet, where the watched process may write."""
    path = watched.root / "place"
    yield path
    shutil.rmtree(path, ignore_errors=True)


def edited(path: Path, **changes: Any) -> None:
    """A JSON file with other values of some keys."""
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | changes))


def check_each(outcomes: Mapping[str, Outcome], fine: Callable[[Outcome], bool]) -> None:
    bad = [f"{name[:60]!r}: {str(found)[:300]}" for name, found in outcomes.items() if not fine(found)]
    assert not bad, "\n".join(bad)


def refused(outcome: Outcome) -> bool:
    return outcome.refused


# ---- pickles ---------------------------------------------------------------------------------------------------------


def test_gadgets_work_and_the_watched_process_sees_them(watched: Watched):
    for gadget, data in gadgets(watched.canary).items():
        (watched.root / "gadget").write_bytes(data)
        outcome = watched.load("unsafely", watched.root / "gadget")
        assert "canary" in outcome.events, (gadget, outcome)
        assert not outcome.safe
        assert len(outcome.events) > 1


class Door(NamedTuple):
    """A file that a reader looks at, in a copy of something good."""

    reader: str
    base: str
    file: str
    named: bool = False
    """The reader is given the file; otherwise the folder."""
    without: str = ""
    """A file that is taken away."""
    then: Callable[[Path], object] = lambda path: None
    """What else is made to fit, given the file."""

    def __str__(self) -> str:
        return f"{self.reader} {self.file}{' itself' if self.named else ''}"


def forged(path: Path) -> None:
    forge(path.parent)


DOORS = [
    *(Door("sae", "sae", name) for name in ("model.safetensors", "config.json")),
    *(Door("sae", "sae", f"sae{suffix}", without="model.safetensors") for suffix in (".pt", ".bin", ".ckpt")),
    *(
        Door("sae", "empty", f"sae{suffix}", named=True)
        for suffix in (".pt", ".pkl", ".npy", ".joblib", ".safetensors")
    ),
    *(Door("lm", "lm", name) for name in ("model.safetensors", "config.json", "tokenizer.json")),
    *(Door("lm", "lm", name) for name in ("tokenizer_config.json", "generation_config.json")),
    *(Door("lm", "lm", name, without="model.safetensors") for name in ("pytorch_model.bin", "model.pt", "model.ckpt")),
    Door("lm", "lm", "model.safetensors.index.json", without="model.safetensors"),
    *(Door("resume", "run", name) for name in ("config.json", f"{STEP}/manifest.json")),
    *(
        Door("resume", "run", f"{STEP}/{name}", then=forged)
        for name in ("sae.safetensors", "state.safetensors", "state.json")
    ),
    Door("metrics", "run", "metrics.jsonl", named=True, then=lambda path: path.write_bytes(path.read_bytes() + b"\n")),
    Door("statistics", "statistics", "statistics.safetensors", named=True),
    Door("config", "empty", "config.yaml", named=True),
    *(
        Door("text", "empty", f"a{suffix}", named=True)
        for suffix in (".jsonl", ".csv", ".parquet", ".jsonl.zst", ".txt.gz")
    ),
    *(Door("text", "empty", f"a{suffix}", named=True) for suffix in (".pt", ".pkl", ".npy", ".bin", ".zip", ".tar")),
]


@pytest.mark.parametrize("name", [str(door) for door in DOORS])
def test_a_pickle_is_refused_unread_whatever_it_is_named(
    watched: Watched, good: dict[str, Path], place: Path, name: str
):
    door = next(door for door in DOORS if str(door) == name)
    for gadget, data in gadgets(watched.canary).items():
        shutil.copytree(good[door.base], place)
        if door.without:
            (place / door.without).unlink()
        (place / door.file).write_bytes(data)
        door.then(place / door.file)
        outcome = watched.load(door.reader, place / door.file if door.named else place)
        assert outcome.refused, f"{gadget}: {outcome}"
        shutil.rmtree(place)


def test_a_pickle_that_is_asked_for_is_read_by_another_process_and_does_nothing(watched: Watched):
    """All that this process does is to look at the zip file's list, make a folder, and start one Python, isolated."""
    path = watched.root / "params.pt"
    mine = (
        f"read {path}",
        f"subprocess.Popen ('{sys.executable}', ['{sys.executable}', '-I', '-B', '-c'",
        "os.mkdir ('/",
    )
    for gadget, data in gadgets(watched.canary).items():
        path.write_bytes(data)
        outcome = watched.load("unpickled", path)
        assert (outcome.kind, outcome.ours) == ("ModelError", True), (gadget, outcome)
        assert "holds more than tensors, or is damaged" in outcome.message, (gadget, outcome)
        started = [event for event in outcome.events if event.startswith("subprocess.")]
        assert len(started) == ("torch" in gadget or gadget == "zip"), (gadget, outcome)
        own = tempfile.gettempdir() + "/mlsae-"
        assert all(event.startswith(mine) or own in event for event in outcome.events), (gadget, outcome)
        assert not watched.canary.exists()
    torch.save({"W": torch.arange(3.0)}, path)
    outcome = watched.load("unpickled", path)
    assert (outcome.kind, outcome.message[-2:]) == ("", "{}"), outcome


def test_pickles_beside_good_files_are_left_alone(watched: Watched, good: dict[str, Path], place: Path):
    names = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_model.bin", "sae.pt", "config.pkl")
    for base in ("lm", "sae"):
        folder = shutil.copytree(good[base], place / base)
        want = watched.load(base, folder)
        for name, data in zip(names, gadgets(watched.canary).values()):
            (folder / name).write_bytes(data)
        outcome = watched.load(base, folder)
        assert outcome.safe, outcome
        assert outcome.message == want.message


@pytest.mark.parametrize("file", ["meta.json", "tokens.bin", "document_starts.bin"])
def test_a_poisoned_cache_of_tokens_is_made_anew(watched: Watched, corpus: Path, place: Path, file: str):
    want = watched.load("pack", corpus, place)
    for gadget, data in gadgets(watched.canary).items():
        next(place.glob(f"*/{file}")).write_bytes(data)
        outcome = watched.load("pack", corpus, place)
        assert outcome.safe
        assert outcome.message == want.message, f"{gadget}: {outcome}"


# ---- safetensors -----------------------------------------------------------------------------------------------------

WEIGHTS = {
    "sae": Door("sae", "sae", "model.safetensors"),
    "lm": Door("lm", "lm", "model.safetensors"),
    "statistics": Door("statistics", "statistics", "statistics.safetensors", named=True),
    "run's sae": Door("resume", "run", f"{STEP}/sae.safetensors", then=forged),
    "run's state": Door("resume", "run", f"{STEP}/state.safetensors", then=forged),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_file_that_lies_about_itself_is_refused_or_loads_as_the_true_one(
    watched: Watched, good: dict[str, Path], place: Path, kind: str
):
    door = WEIGHTS[kind]
    true = (good[door.base] / door.file).read_bytes()
    outcomes = {}
    for lie, data in {"": true, **lies(true)}.items():
        shutil.copytree(good[door.base], place)
        (place / door.file).write_bytes(data)
        door.then(place / door.file)
        outcomes[lie] = watched.load(door.reader, place / door.file if door.named else place)
        shutil.rmtree(place)
    want = outcomes.pop("")
    assert want.safe
    assert not want.kind, want
    check_each(outcomes, lambda outcome: outcome.refused or (outcome.safe and outcome.message == want.message))


# ---- sizes -----------------------------------------------------------------------------------------------------------


def tensors_of(path: Path, sizes: dict[str, list[int]]) -> None:
    """A safetensors file of zeros that takes no space, however large."""
    header, end = {}, 0
    for name, shape in sizes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    head = safetensors(header)
    sparse(path, len(head) + end, head)


def large_sae(folder: Path, n_latents: int, d_model: int = 32, *, true: bool = True) -> None:
    edited(folder / "config.json", n_latents=n_latents, d_model=d_model, expansion_factor=n_latents / d_model)
    if true:
        wide = {"W_dec": [n_latents, d_model], "W_enc": [n_latents, d_model]}
        small = {n: list(t.shape) for n, t in load_file(folder / "model.safetensors").items() if n not in wide}
        tensors_of(folder / "model.safetensors", wide | small)


def many_names(folder: Path) -> None:
    entry = b'"%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
    head = b"{" + b"".join(entry % i for i in range(1_000_000))[:-1] + b"}"
    (folder / "model.safetensors").write_bytes(safetensors(head))


def jsonl(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


Bomb = Callable[[Path], object]
LINES = jsonl("x" * 1_000_000) * 16
BOMBS: dict[str, tuple[str, str, str, Bomb]] = {
    "40 GB in a .gz": ("text", "empty", "a.jsonl.gz", lambda f: repeated(gzip.compress(LINES), 2500, f / "a.jsonl.gz")),
    "40 GB in a .zst": (
        "text",
        "empty",
        "a.jsonl.zst",
        lambda f: repeated(zstandard.compress(LINES), 2500, f / "a.jsonl.zst"),
    ),
    "terabytes in a .parquet": (
        "text",
        "empty",
        "a.parquet",
        lambda f: parquet_of_copies(f / "a.parquet", "x" * (4 << 20), 250_000),
    ),
    "a .zip": ("text", "empty", "a.zip", lambda f: sparse(f / "a.zip", 40 << 30, b"PK\3\4")),
    "a line of 40 GB": ("text", "empty", "a.jsonl", lambda f: sparse(f / "a.jsonl", 40 << 30, jsonl("x"))),
    "a deep line": (
        "text",
        "empty",
        "a.jsonl",
        lambda f: (f / "a.jsonl").write_text("[" * 100_000 + "]" * 100_000 + "\n"),
    ),
    "1 GB of config.json": ("sae", "sae", "", lambda f: sparse(f / "config.json", 1 << 30, b"{")),
    "a deep config.json": (
        "sae",
        "sae",
        "",
        lambda f: (f / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000),
    ),
    "1 GB of YAML": ("config", "empty", "a.yaml", lambda f: sparse(f / "a.yaml", 1 << 30, b"k: 1")),
    "YAML that expands": (
        "config",
        "empty",
        "a.yaml",
        lambda f: (f / "a.yaml").write_text(
            "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}, *a{i}, *a{i}]\n" for i in range(30))
        ),
    ),
    "deep YAML": ("config", "empty", "a.yaml", lambda f: (f / "a.yaml").write_text("a: " + "[" * 400_000)),
    "10^12 latents": ("sae", "sae", "", lambda f: large_sae(f, 10**12, true=False)),
    "10^30 latents": ("sae", "sae", "", lambda f: large_sae(f, 10**30, true=False)),
    "10^12 x 10^12 weights": ("sae", "sae", "", lambda f: large_sae(f, 10**12, 10**12, true=False)),
    "2^40 weights": ("sae", "sae", "", lambda f: large_sae(f, 2**35)),
    "a million names": ("sae", "sae", "", many_names),
    "2^40 counts": (
        "statistics",
        "statistics",
        "statistics.safetensors",
        lambda f: tensors_of(f / "statistics.safetensors", {"counts": [8, 2**37]}),
    ),
    "500 MB of metrics": ("metrics", "empty", "metrics.jsonl", lambda f: sparse(f / "metrics.jsonl", 500 << 20)),
    "1 GB of manifest": ("resume", "run", "", lambda f: sparse(f / STEP / "manifest.json", 1 << 30)),
    "50 MB of state.json": (
        "resume",
        "run",
        "",
        lambda f: (sparse(f / STEP / "state.json", 50 << 20), forge(f / STEP)),
    ),
    "1 GB of LM config": ("lm", "lm", "", lambda f: sparse(f / "config.json", 1 << 30, b"{")),
    "500 MB of vocabulary": ("lm", "lm", "", lambda f: sparse(f / "tokenizer.json", 500 << 20, b"{")),
    "1 GB of tokenizer config": ("lm", "lm", "", lambda f: sparse(f / "tokenizer_config.json", 1 << 30, b"{")),
    "1 GB of generation config": ("lm", "lm", "", lambda f: sparse(f / "generation_config.json", 1 << 30, b"{")),
    "1 GB of index": (
        "lm",
        "lm",
        "",
        lambda f: (
            (f / "model.safetensors").rename(f / "model-1.safetensors"),
            sparse(f / "model.safetensors.index.json", 1 << 30, b"{"),
        ),
    ),
    "a million names of weights": ("lm", "lm", "", many_names),
    "hidden_size 10^9": ("lm", "lm", "", lambda f: edited(f / "config.json", hidden_size=10**9)),
    "vocab_size 10^12": ("lm", "lm", "", lambda f: edited(f / "config.json", vocab_size=10**12)),
    "intermediate_size 10^12": ("lm", "lm", "", lambda f: edited(f / "config.json", intermediate_size=10**12)),
    "10^6 layers": ("lm", "lm", "", lambda f: edited(f / "config.json", num_hidden_layers=10**6)),
    "10^9 heads": ("lm", "lm", "", lambda f: edited(f / "config.json", num_attention_heads=10**9)),
    "10^30 heads": ("lm", "lm", "", lambda f: edited(f / "config.json", num_attention_heads=10**30)),
    "GPT-J context of 10^10": ("lm", "gptj", "", lambda f: edited(f / "config.json", n_positions=10**10)),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_from_its_size(watched: Watched, good: dict[str, Path], place: Path, bomb: str):
    reader, base, file, build = BOMBS[bomb]
    if base == "gptj":
        save_tiny_lm(place, "gptj")
    else:
        shutil.copytree(good[base], place)
    build(place)
    outcome = watched.load(reader, place / file, timeout=10)
    assert outcome.refused, outcome


# ---- language models -------------------------------------------------------------------------------------------------

LOADS = "LlamaForCausalLM"
ESCAPES = "\x1b]0;title\x07\x1b[31m\n\u202e"


def config(**keys: Any) -> Bomb:
    return lambda folder: edited(folder / "config.json", **keys)


def config_in(base: str, **keys: Any) -> Bomb:
    return lambda folder: edited(folder / base / "config.json", **keys)


def tokenizer_config(**keys: Any) -> Bomb:
    return lambda folder: edited(folder / "tokenizer_config.json", **keys)


def generation_config(**keys: Any) -> Bomb:
    return lambda folder: edited(folder / "generation_config.json", **keys)


def tokenizer(**keys: Any) -> Bomb:
    return lambda folder: edited(folder / "tokenizer.json", **keys)


def index(*weight_map: str) -> Bomb:
    """Weights in shards whose files are called so: all in the first, which is renamed, if it is a plain name."""

    def build(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        secret = folder.parent / "secret.safetensors"
        (folder / "model.safetensors").rename(secret)
        shutil.copy(secret, folder / "model-1.safetensors")
        where = [name.format(secret=secret) for name in weight_map]
        names = {name: where[i % len(where)] for i, name in enumerate(weights)}
        edited(folder / "model.safetensors.index.json", metadata={}, weight_map=names)

    return build


def pickled_weights(name: str) -> Bomb:
    def build(folder: Path) -> None:
        torch.save(load_file(folder / "model.safetensors"), folder / name)

    return build


def both(*builds: Bomb) -> Bomb:
    return lambda folder: [build(folder) for build in builds]


UNSUPPORTED = "in its config.json; not supported"
CHAT = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for x in ().__class__.__base__.__subclasses__() %}{% endfor %}"
QUANTIZED = {"quant_method": "bitsandbytes", "load_in_8bit": True, "modules_to_not_convert": ["os.system"]}
REPOSITORIES: dict[str, tuple[str, Bomb]] = {
    "auto_map of a known type": (LOADS, config(auto_map={"AutoConfig": "evil.A", "AutoModelForCausalLM": "evil.A"})),
    "auto_map of its own type": (
        "needs code from its repository",
        config(model_type="evil", auto_map={"AutoConfig": "evil.A"}),
    ),
    "auto_map to another repository": (LOADS, config(auto_map={"AutoModelForCausalLM": "evil/repo--evil.A"})),
    "auto_map of the tokenizer": (
        "needs code from its repository",
        tokenizer_config(auto_map={"AutoTokenizer": ["evil.A", "evil.A"]}, tokenizer_class="A"),
    ),
    "nested trust": (UNSUPPORTED, config(text_config={"deep": [{"trust_remote_code": True}]})),
    "trust in the tokenizer": (
        "in its tokenizer_config.json; not supported",
        tokenizer_config(trust_remote_code=True, auto_map={"AutoTokenizer": ["evil.A", None]}),
    ),
    "attention kernel": (UNSUPPORTED, config(attn_implementation="evil/kernel:run")),
    "internal attention kernel": (UNSUPPORTED, config(_attn_implementation_internal="evil/kernel")),
    "experts kernel": ("cannot be loaded", config(experts_implementation="evil/kernel")),
    "class path": (UNSUPPORTED, config(_class_path="os.system")),
    "target": (UNSUPPORTED, config(rope_scaling={"_target_": "os.system", "rope_type": "default"})),
    "quantization": (UNSUPPORTED, config(quantization_config=QUANTIZED)),
    "activation": ("model:", config(hidden_act="os.system")),
    "rope type": ("model:", config(rope_scaling={"rope_type": "os.system", "factor": 2.0})),
    "architectures": ("not a causal language model", config(architectures=["os.system", "../evil"])),
    "weights from outside": (
        "model:",
        both(index("model-1.safetensors"), config(transformers_weights="../secret.safetensors")),
    ),
    "weights from a pickle": (
        "model:",
        both(pickled_weights("adapter_model.bin"), config(transformers_weights="adapter_model.bin")),
    ),
    "adapter": (
        "is an adapter of another model",
        lambda f: edited(f / "adapter_config.json", peft_type="LORA", base_model_name_or_path="evil/repo"),
    ),
    "custom generate": (
        LOADS,
        lambda f: (f / "custom_generate").mkdir() or shutil.copy(f / "evil.py", f / "custom_generate" / "generate.py"),
    ),
    "generation config": (
        "in its generation_config.json; not supported",
        generation_config(trust_remote_code=True, custom_generate="evil/repo", _target_="os.system"),
    ),
    "chat template": (LOADS, tokenizer_config(chat_template=CHAT)),
    "chat template in a file": (LOADS, lambda f: (f / "chat_template.jinja").write_text(CHAT)),
    "unknown tokenizer class": (LOADS, tokenizer_config(tokenizer_class="EvilTokenizer")),
    "tokenizer class in a module": ("tokenizer_class", tokenizer_config(tokenizer_class="evil.Tokenizer")),
    "tokenizer files elsewhere": (
        LOADS,
        tokenizer_config(tokenizer_file="../secret.json", vocab_file="/etc/passwd", name_or_path="evil/repo"),
    ),
    "processor": (
        LOADS,
        lambda f: edited(f / "processor_config.json", auto_map={"AutoProcessor": "evil.A"}, processor_class="A"),
    ),
    "unknown pre-tokenizer": ("has no usable tokenizer", tokenizer(pre_tokenizer={"type": "Evil", "path": "evil.py"})),
    "endless pre-tokenizer": (
        "model:",
        tokenizer(
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": "(a+)+$|(.*)*x"},
                "behavior": "Isolated",
                "invert": False,
            }
        ),
    ),
    "index to a file above": ("model.safetensors.index.json", index("../secret.safetensors")),
    "index to a file above, deeper": (
        "model.safetensors.index.json",
        index("model-1.safetensors", "a/../../secret.safetensors"),
    ),
    "index to a whole path": ("model.safetensors.index.json", index("{secret}")),
    "index to a pickle": ("model.safetensors.index.json", both(pickled_weights("part.bin"), index("part.bin"))),
    "index to a missing file": ("is not whole", index("model-1.safetensors", "model-2.safetensors")),
    "index to a link": (
        LOADS,
        both(
            index("model-link.safetensors"),
            lambda f: (f / "model-link.safetensors").symlink_to(f.parent / "secret.safetensors"),
        ),
    ),
    "tokens that write on the terminal": (
        LOADS,
        lambda f: (f / "tokenizer.json").write_text(
            (f / "tokenizer.json").read_text().replace("<|pad|>", json.dumps(ESCAPES)[1:-1])
        ),
    ),
    "a module beside": (
        LOADS,
        lambda f: [
            shutil.copy(f / "evil.py", f / n) for n in ("modeling_llama.py", "configuration_llama.py", "torch.py")
        ],
    ),
}


@pytest.mark.parametrize("repository", REPOSITORIES)
def test_a_repository_runs_no_code(watched: Watched, good: dict[str, Path], place: Path, repository: str):
    says, build = REPOSITORIES[repository]
    folder = shutil.copytree(good["lm"], place / "lm")
    for name in ("evil.py", "tokenization_evil.py", "__init__.py"):
        (folder / name).write_text(f"open({str(watched.canary)!r}, 'w').close()\nclass A: pass\n")
    build(folder)
    outcome = watched.load("lm", folder)
    assert outcome.safe, outcome
    assert says in outcome.message


# ---- names that become paths -----------------------------------------------------------------------------------------


@pytest.fixture
def names(place: Path) -> dict[str, str]:
    """What NAMES are filled in with; `x` outside is a file that would load."""
    place.mkdir()
    return lair(place)


def test_there_are_enough_names():
    assert len(set(NAMES)) == len(NAMES) >= 80


def check_contained(names: dict[str, str], name: str) -> None:
    """Refused, or inside by the system's own account."""
    root = Path(names["root"])
    try:
        path = os.path.realpath(files.contained(root, name.format(**names)))
    except ResourceError:
        return
    assert os.path.commonpath([path, os.path.realpath(root)]) == os.path.realpath(root), name


@pytest.mark.parametrize("n", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_name_leads_out_of_a_folder(names: dict[str, str], n: int):
    for name in (*NAMES, *generated(n, seed=n)):
        check_contained(names, name)


def test_a_weights_index_names_files_of_its_folder(watched: Watched, good: dict[str, Path], names: dict[str, str]):
    root = Path(names["root"])
    for file in good["lm"].iterdir():
        shutil.copy(file, root)
    weights = load_file(root / "model.safetensors")
    for folder in (root.parent, Path(names["outside"]), root.parent / "root-sibling"):
        shutil.copy(root / "model.safetensors", folder / X)
    (root / "model.safetensors").rename(root / "model-1.safetensors")
    outcomes = {}
    for name in NAMES:
        where = dict.fromkeys(weights, name.format(**names))
        (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
        outcomes[name] = watched.load("lm", root)
    check_each(outcomes, refused)


@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_a_manifest_names_files_of_its_checkpoint(
    watched: Watched, good: dict[str, Path], names: dict[str, str], every: int
):
    """Other names in it are refused or mean nothing."""
    run, outcomes = Path(names["root"]) / "run", {}
    names |= {"root": str(run / STEP)}
    for folder in (run.parent, Path(names["outside"])):
        shutil.copy(good["run"] / STEP / "sae.safetensors", folder / X)
    manifest = json.loads((good["run"] / STEP / "manifest.json").read_text())
    for name in ("", *NAMES[::every]):
        shutil.copytree(good["run"], run)
        (run / STEP / "link").symlink_to(names["outside"])
        file = name.format(**names).encode(errors="replace").decode()
        more = {file: manifest["files"]["sae.safetensors"]} if file else {}
        write_manifest(run / STEP, manifest | {"files": manifest["files"] | more})
        outcomes[name] = watched.load("resume", run)
        shutil.rmtree(run)
    check_each(outcomes, lambda outcome: outcome.refused or (outcome.safe and outcome.message == outcomes[""].message))


@pytest.mark.parametrize("reader", ["shape", "revision", "text"])
def test_a_name_that_is_no_file_and_no_id_is_refused(watched: Watched, names: dict[str, str], reader: str):
    """No name with dots that lead up, or with what no id holds, is looked up anywhere."""
    outcomes = {}
    for name in (name.format(**names) for name in NAMES):
        is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", name) and ".." not in name
        if not is_id and not os.path.isdir(name):
            outcomes[name] = (
                watched.load("shape", "org/lm", name) if reader == "revision" else watched.load(reader, name)
            )
    assert len(outcomes) > 60
    asked = "socket." if reader == "revision" else "nothing"
    check_each(outcomes, lambda o: o.ours and o.seconds < 5 and all(e.startswith(asked) for e in o.events))


# ---- checkpoints whose manifest fits ---------------------------------------------------------------------------------


Tensors = dict[str, torch.Tensor]
TENSORS: dict[str, Callable[[torch.Tensor], Tensors]] = {
    "left out": lambda t: {},
    "longer": lambda t: {"": torch.cat([t.reshape(-1), t.reshape(-1)[:1]])},
    "recast": lambda t: {"": t.to(torch.int32 if t.dtype == torch.float64 else torch.float64)},
    "empty": lambda t: {"": t.reshape(-1)[:0].clone()},
    "joined by another": lambda t: {"": t, "_2": t.clone()},
}


def tensor_forgeries(step: Path, every: int) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Each tensor of a checkpoint changed in each way, or every so manieth of these changes."""

    def change(file: str, name: str, edit: Callable[[torch.Tensor], Tensors]) -> Callable[[Path], None]:
        def apply(step: Path) -> None:
            tensors = load_file(step / file)
            changed = edit(tensors.pop(name))
            save_file(tensors | {name + suffix: tensor for suffix, tensor in changed.items()}, step / file)

        return apply

    names = [(file, name) for file in ("sae.safetensors", "state.safetensors") for name in load_file(step / file)]
    for (file, name), how in [*itertools.product(names, TENSORS)][::every]:
        yield f"{name} {how}", change(file, name, TENSORS[how])


def of_state(**changes: Any) -> Callable[[Path], None]:
    return lambda step: edited(step / "state.json", **changes)


STATES: dict[str, Callable[[Path], None]] = {
    "a list": lambda step: (step / "state.json").write_text("[]\n") and None,
    "no position": lambda step: (step / "state.json").write_text('{"metrics_bytes": 0}') and None,
    "no length": lambda step: (step / "state.json").write_text('{"position": 0}') and None,
    "position of text": of_state(position="0"),
    "position below 0": of_state(position=-1),
    "position 10^30": of_state(position=10**30),
    "length below 0": of_state(metrics_bytes=-1),
    "length of text": of_state(metrics_bytes="0"),
}
MANIFESTS: dict[str, dict[str, Any]] = {
    "no files": {"files": {}},
    "files in a list": {"files": ["sae.safetensors"]},
    "files of nothing": {"files": None},
    "a file without facts": {"files": {"sae.safetensors": {}}},
    "a file of text": {"files": {"sae.safetensors": "x"}},
    "step of text": {"step": "10"},
    "step below 0": {"step": -1},
    "step 10^30": {"step": 10**30},
    "format of text": {"format_version": "1"},
    "format 0": {"format_version": 0},
    "format true": {"format_version": True},
}


def manifest_with(changes: dict[str, Any]) -> Callable[[Path], None]:
    return lambda step: write_manifest(step, json.loads((step / "manifest.json").read_text()) | changes)


SLOW = pytest.param("all tensors", marks=pytest.mark.slow)
PARTS = ["manifest", "state", "tensors", SLOW]


@pytest.mark.parametrize("part", PARTS)
def test_a_forged_checkpoint_is_refused_or_means_the_same(
    watched: Watched, good: dict[str, Path], place: Path, part: str
):
    forgeries = {
        "manifest": lambda: {name: manifest_with(changes) for name, changes in MANIFESTS.items()},
        "state": lambda: STATES,
        "tensors": lambda: dict(tensor_forgeries(good["run"] / STEP, every=3)),
        "all tensors": lambda: dict(tensor_forgeries(good["run"] / STEP, every=1)),
    }[part]()
    outcomes = {}
    for forgery, change in {"": lambda step: None, **forgeries}.items():
        shutil.copytree(good["run"], place)
        change(place / STEP)
        if part != "manifest":
            forge(place / STEP)
        outcomes[forgery] = watched.load("resume", place)
        shutil.rmtree(place)
    check_each(outcomes, lambda outcome: outcome.refused or (outcome.safe and outcome.message == outcomes[""].message))


# ---- random damage ---------------------------------------------------------------------------------------------------


def damaged(data: bytes, draw: random.Random) -> tuple[bytes, bool]:
    """A file with a bit, a byte or a run of it changed, and whether only tensor data were."""
    size, bad = 8 + int.from_bytes(data[:8], "little"), bytearray(data)
    start = draw.randrange(size if draw.random() < 0.8 else len(data))
    stop = min(start + draw.choice([1, 1, 2, 8, 64]), len(data))
    how = draw.choice(["bit", "bytes", "digit", "cut out", "twice", "cut off"])
    if how == "bit":
        bad[start] ^= 1 << draw.randrange(8)
    elif how == "bytes":
        bad[start:stop] = draw.randbytes(stop - start)
    elif how == "digit":
        bad[start:stop] = bytes(draw.choices(b"0123456789", k=stop - start))
    elif how == "cut out":
        del bad[start:stop]
    elif how == "twice":
        bad[start:start] = bad[start:stop]
    else:
        del bad[start:]
    return bytes(bad), start >= size and len(bad) == len(data)


@pytest.mark.parametrize("n", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damage_is_refused_or_changes_nothing(watched: Watched, good: dict[str, Path], place: Path, n: int):
    """Tensor data of an SAE or language model carry no hash: other values there are not found, but shapes hold."""
    draw = random.Random(n)
    shares = {"sae": 0.6, "statistics": 0.3, "lm": 0.06, "run's state": 0.04}
    for kind, share in shares.items():
        door = WEIGHTS[kind]
        true = (good[door.base] / door.file).read_bytes()
        shutil.copytree(good[door.base], place)
        want = watched.load(door.reader, place / door.file if door.named else place).message
        for i in range(round(share * n)):
            shutil.rmtree(place)
            shutil.copytree(good[door.base], place)
            data, only_values = damaged(true, draw)
            (place / door.file).write_bytes(data)
            outcome = watched.load(door.reader, place / door.file if door.named else place)
            same = outcome.safe and (outcome.message == want or (only_values and kind != "run's state"))
            assert outcome.seconds <= 1
            assert outcome.refused or same, (kind, i, outcome)
        shutil.rmtree(place)


# ---- what is shown ---------------------------------------------------------------------------------------------------

YAML = json.dumps(ESCAPES + "key") + ": 1\n"
SHOWN: dict[str, tuple[str, Bomb]] = {
    "name of no LM": (f"--lm ./{ESCAPES}", lambda f: None),
    "name of an LM's folder": (f"--lm {ESCAPES}", lambda f: (f / ESCAPES).mkdir()),
    "name of a data folder": (f"--data {ESCAPES}", lambda f: (f / ESCAPES).mkdir()),
    "name of a data file": (f"--data {ESCAPES}.jsonl", lambda f: (f / f"{ESCAPES}.jsonl").write_text("oops")),
    "columns": ("--data a.jsonl", lambda f: (f / "a.jsonl").write_text(json.dumps({ESCAPES: 1}) + "\n")),
    "column of a .csv": ("--data a.csv", lambda f: (f / "a.csv").write_text('"\x1b[31m\u202e",b\n1,2\n')),
    "columns of a .parquet": (
        "--data a.parquet",
        lambda f: pq.write_table(pa.table({ESCAPES: ["x"]}), f / "a.parquet"),
    ),
    "splits": (
        "--data d --split nowhere",
        lambda f: [(f / "d").mkdir(), (f / "d" / f"train{ESCAPES}.txt").write_text("a")],
    ),
    "key of a config": ("--config a.yaml", lambda f: (f / "a.yaml").write_text(YAML)),
    "value of a config": ("--config a.yaml", lambda f: (f / "a.yaml").write_text(f"frame: {json.dumps(ESCAPES)}\n")),
    "model_type": ("--lm lm", config_in("lm", model_type=ESCAPES)),
    "architectures": ("--lm lm", config_in("lm", architectures=[ESCAPES])),
    "key of an LM": ("--lm lm", config_in("lm", **{f"_{ESCAPES}": 1})),
    "value of an LM": ("--lm lm", config_in("lm", hidden_act=ESCAPES)),
    "weights of an LM": (
        "--lm lm",
        lambda f: save_file({ESCAPES: torch.zeros(1)}, f / "lm" / "model.safetensors", {"format": "pt"}),
    ),
    "key of an SAE": ("sae", config_in("sae", **{ESCAPES: 1})),
    "value of an SAE": ("sae", config_in("sae", recipe=ESCAPES)),
    "LM of an SAE": ("sae", config_in("sae", lm=f"./{ESCAPES}", data="a.txt")),
    "data of an SAE": ("sae", config_in("sae", lm="lm", data=f"./{ESCAPES}")),
    "separator of an SAE": ("sae", config_in("sae", lm="lm", data="a.txt", separator_token=ESCAPES)),
    "tensor of an SAE": ("sae", lambda f: save_file({ESCAPES: torch.zeros(1)}, f / "sae" / "model.safetensors")),
    "key that stands twice": (
        "sae",
        lambda f: (f / "sae" / "config.json").write_text(f"{{{json.dumps(ESCAPES)}: 1, {json.dumps(ESCAPES)}: 2}}"),
    ),
    "config of a run": ("--out run --resume", config_in("run", recipe=ESCAPES)),
}


@pytest.mark.parametrize("shown", SHOWN)
def test_hostile_text_is_escaped_on_the_terminal(
    watched: Watched, good: dict[str, Path], corpus: Path, place: Path, shown: str, monkeypatch: pytest.MonkeyPatch
):
    flags, build = SHOWN[shown]
    place.mkdir()
    for name in ("lm", "sae", "run"):
        shutil.copytree(good[name], place / name)
    (place / "a.txt").write_text("some text\n" * 100)
    build(place)
    words = [str(place / word) if word in os.listdir(place) else word for word in flags.split(" ")]
    if words[0].startswith("--"):
        command = train_command(*words, lm=place / "lm", data=corpus, out=place / "out")
    else:
        command = ["evaluate", *words, "--quiet"]
    outcome = watched.load("command", *command)
    code, _, stderr = outcome.message.partition(": ")
    assert code in "2346", stderr
    assert not outcome.events
    *before, error = stderr.removesuffix("\n").split("\n")
    assert error.startswith("error: ")
    assert all(line.isprintable() for line in [*before, error]), stderr
    assert not before or all(line.startswith("warning: ") for line in before)
