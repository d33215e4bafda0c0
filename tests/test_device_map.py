"""A language model whose modules are in several places gives what it gives in one."""

import json

import pytest
import torch
import transformers

from conftest import train_command
from mlsae import devices, fingerprint
from mlsae.cli import main
from mlsae.config import Placement
from mlsae.errors import ConfigError, ModelError
from mlsae.explorer.inference import Shared
from mlsae.explorer.library import Library
from mlsae.lm import LanguageModel
from tiny import ARCHITECTURES, byte_tokenizer, save_tiny_lm, tiny_hf_model

ALL_ON_DISK = pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="transformers 4 opens the files on the one device of such a map"
)

pytest.importorskip("accelerate")
CPU = torch.device("cpu")
PROMPT = "The cat sat on a mat"
LITTLE = ["--no-nulls", "--no-directions", "--examples", "0"]


def every_second_block_on_disk(folder):
    """A map that names every block, and whatever stands beside them or above."""
    hf = LanguageModel.from_pretrained(folder, device="cpu").hf
    names = [name for name, _ in hf.named_modules()]
    (blocks,) = [name for name, module in hf.named_modules() if isinstance(module, torch.nn.ModuleList)]
    above = {""} | {blocks[:at] for at, letter in enumerate(blocks) if letter == "."}
    beside = [name for name in names if name.rpartition(".")[0] in above and name not in above | {blocks}]
    odd = {f"{blocks}.{layer}": "disk" if layer % 2 else "cpu" for layer in range(3)}
    return odd | dict.fromkeys(beside, "cpu")


def mapped(folder):
    device_map = every_second_block_on_disk(folder)
    return LanguageModel.from_pretrained(folder, device="cpu", dtype="float32", device_map=device_map)


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2", "llama", "gemma2", "opt"])
def test_blocks_on_the_disk_change_no_bit(tmp_path, architecture):
    """Reading, replacing, resuming and unembedding: a block that is not computed is not even read."""
    folder = save_tiny_lm(tmp_path / architecture, architecture)
    whole, spread = LanguageModel.from_pretrained(folder, device="cpu", dtype="float32"), mapped(folder)
    assert any(weight.is_meta for weight in spread.hf.parameters())
    assert (spread.spread, spread.device) == (True, CPU)
    assert not whole.spread
    tokens = whole.tokenize(PROMPT)
    resid = whole.resid(tokens)
    assert torch.equal(spread.resid(tokens), resid)
    assert torch.equal(spread.resid(tokens, [2, 0]), resid[[2, 0]])
    double = {1: lambda x: 2 * x, 2: lambda x: x - 1}
    assert torch.equal(spread.logits(tokens, double, last=3), whole.logits(tokens, double, last=3))
    assert torch.equal(spread.run_from(resid[1], 1, tokens), whole.run_from(resid[1], 1, tokens))
    assert torch.equal(spread.unembed(resid[0]), whole.unembed(resid[0]))


@ALL_ON_DISK
@pytest.mark.parametrize("tie", [True, False])
def test_all_of_it_on_the_disk_has_the_same_weights_and_logits(tmp_path, tie):
    """Embeddings and hashes too, which are read one at a time; a tied head is one weight."""
    folder = save_tiny_lm(tmp_path / "lm", tie_word_embeddings=tie)
    whole = LanguageModel.from_pretrained(folder, device="cpu", dtype="float32")
    spread = LanguageModel.from_pretrained(folder, device="cpu", dtype="float32", device_map={"": "disk"})
    assert all(weight.is_meta for weight in spread.hf.parameters())
    assert torch.equal(spread.embedding, whole.embedding)
    assert torch.equal(spread.unembedding, whole.unembedding)
    assert [name for name, _ in spread.weights()] == [name for name, _ in whole.weights()]
    assert fingerprint.of_lm(spread) == fingerprint.of_lm(whole)
    tokens = whole.tokenize(PROMPT)
    assert torch.equal(spread.logits(tokens), whole.logits(tokens))


@ALL_ON_DISK
def test_a_gradient_passes_through_an_offloaded_head(tmp_path):
    """Lenses are trained through it."""
    folder = save_tiny_lm(tmp_path / "lm")
    found = []
    for device_map in (None, {"": "disk"}):
        lm = LanguageModel.from_pretrained(folder, device="cpu", dtype="float32", device_map=device_map)
        resid = lm.resid(lm.tokenize(PROMPT))[1].requires_grad_()
        lm.unembed(resid).square().sum().backward()
        found.append(resid.grad)
    assert torch.equal(*found)
    assert found[0].abs().sum() > 0


def test_replacements_and_readings_cross_to_where_each_block_is(lm):
    """Blocks of another precision stand for blocks of another device: either refuses what was not moved to it."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Moves(ModelHook):
        """What accelerate's hook does with devices."""

        def __init__(self, dtype):
            self.dtype = dtype

        def pre_forward(self, module, *args, **kwargs):
            def moved(x):
                if isinstance(x, tuple):
                    return tuple(map(moved, x))
                return x.to(self.dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

            return tuple(map(moved, args)), {name: moved(value) for name, value in kwargs.items()}

    hf = tiny_hf_model()
    add_hook_to_module(hf.model.layers[1].double(), Moves(torch.float64))
    add_hook_to_module(hf.model.layers[2], Moves(torch.float32))
    mixed, plain = LanguageModel(hf, byte_tokenizer(), name="mixed"), LanguageModel(tiny_hf_model(), byte_tokenizer())
    tokens = plain.tokenize(PROMPT)
    seen, came = [], []
    hf.model.layers[2].register_forward_pre_hook(lambda module, args: came.append(args[0].dtype))

    def halve(x):
        seen.append((x.dtype, x.device))
        return x / 2

    torch.testing.assert_close(mixed.resid(tokens), plain.resid(tokens), rtol=1e-5, atol=1e-5)
    edits = {0: halve, 1: halve}
    torch.testing.assert_close(mixed.logits(tokens, edits), plain.logits(tokens, edits), rtol=1e-4, atol=1e-4)
    assert set(seen) == {(torch.float32, CPU)}
    assert set(came) == {torch.float64}  # what a replaced block puts out is where its own output was


@ALL_ON_DISK
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_can_be_read_from_the_disk(tmp_path, architecture):
    """The whole model, so that no module's name is needed."""
    folder = save_tiny_lm(tmp_path / "lm", architecture)
    whole = LanguageModel.from_pretrained(folder, device="cpu", dtype="float32")
    if architecture == "mixtral":  # transformers keeps its experts in one tensor, which no file holds
        with pytest.raises(ModelError, match=r"cannot be loaded \(.*offloaded to the disk"):
            LanguageModel.from_pretrained(folder, device="cpu", dtype="float32", device_map={"": "disk"})
        return
    spread = LanguageModel.from_pretrained(folder, device="cpu", dtype="float32", device_map={"": "disk"})
    tokens = whole.tokenize(PROMPT)
    assert torch.equal(spread.resid(tokens), whole.resid(tokens))


@pytest.mark.parametrize("spread", devices.SPREADS)
def test_on_one_device_every_way_to_spread_it_is_the_plain_one(lm, lm_folder, spread):
    found = LanguageModel.from_pretrained(lm_folder, device="cpu", dtype="float32", device_map=spread)
    tokens = lm.tokenize(PROMPT)
    assert torch.equal(found.resid(tokens), lm.resid(tokens))


# ---- what a map may be -----------------------------------------------------------------------------------------------


def test_a_placement_is_a_device_a_way_to_spread_or_a_file(tmp_path):
    path = tmp_path / "map.yaml"
    path.write_text("model: cpu\nlm_head: disk\n")
    assert devices.lm_placement(None, CPU) is CPU
    assert devices.lm_placement("cpu", torch.device("meta")) == CPU
    assert devices.lm_placement("balanced", CPU) == "balanced"
    assert devices.lm_placement(str(path), CPU) == {"model": "cpu", "lm_head": "disk"}
    assert devices.lm_device({"model": "disk", "lm_head": "cuda:1", "x": "cuda:0"}) == torch.device("cuda:1")
    assert devices.lm_device({"model": "disk", "lm_head": "cpu"}) == CPU


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere", "'nowhere' is not here; this machine has cpu"),
        ("absent.yaml", "there is no file 'absent.yaml'; write one 'module: device' a line"),
        ({}, "empty; write one 'module: device' a line"),
        ({"": "cuda:9"}, "'cuda:9' is not here"),
        ({"": 77}, "'cuda:77' is not here"),
        ({"model": True}, "True given for 'model'; name a device, cpu or disk"),
    ],
)
def test_what_is_no_place_is_refused_before_anything_is_loaded(given, message):
    with pytest.raises(ConfigError, match=f"lm_device_map: {message}"):
        LanguageModel.from_pretrained("there/is-no-such-model", device="cpu", device_map=given)


def test_a_map_that_leaves_a_module_out_is_one_sentence(lm_folder):
    with pytest.raises(ModelError, match=r"cannot be loaded \(.*lm_head"):
        LanguageModel.from_pretrained(lm_folder, device="cpu", device_map={"model": "disk"})


def test_without_accelerate_only_a_device_can_be_named(monkeypatch, lm_folder):
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"lm_device_map: needs the package accelerate; pip install 'mlsae\[device"):
        LanguageModel.from_pretrained(lm_folder, device_map="auto")
    assert not LanguageModel.from_pretrained(lm_folder, device_map="cpu").spread


def test_processes_that_share_a_machine_do_not_each_fill_it(monkeypatch, lm_folder):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="lm_device_map: 'auto' given to 2 processes, each of which would fill all"):
        LanguageModel.from_pretrained(lm_folder, device="cpu", device_map="auto")


# ---- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def map_file(lm_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("map") / "map.json"
    path.write_text(json.dumps(every_second_block_on_disk(lm_folder)))
    return str(path)


def test_a_run_with_blocks_on_the_disk_is_the_run_without_bit_for_bit(trained, lm_folder, corpus, tmp_path, map_file):
    run = tmp_path / "run"
    assert main(train_command("--lm-device-map", map_file, lm=lm_folder, data=corpus, out=run)) == 0
    for file in ("sae/model.safetensors", "metrics.jsonl"):
        assert without_times(run / file) == without_times(trained / file)
    assert json.loads((run / "config.json").read_text())["lm_device_map"] == map_file


@pytest.mark.parametrize("command", ["evaluate", "analyze"])
def test_measured_with_blocks_on_the_disk_it_is_the_same(trained, tmp_path, map_file, command):
    found = []
    more = LITTLE if command == "analyze" else []
    for flags in ([], ["--lm-device-map", map_file, "--device", "cpu"]):
        out = tmp_path / f"out{len(flags)}"
        assert main([command, str(trained), "--out", str(out), "--tokens", "400", "--quiet", *more, *flags]) == 0
        name = {"evaluate": "evaluation.json", "analyze": "layers.safetensors"}[command]
        found.append(without_times(out / name))
    assert found[0] == found[1]


def test_in_bfloat16_everything_runs_on_a_cpu_and_finds_nearly_the_same(lm_folder, corpus, tmp_path):
    """Training, evaluation, and an analysis in shards, which merge in the precision that they had."""
    run, half = tmp_path / "run", ["--lm-dtype", "bfloat16", "--quiet"]
    assert main(train_command(*half[:2], lm=lm_folder, data=corpus, out=run)) == 0
    read = [str(run), "--tokens", "400"]
    found = []
    for flags in (half, ["--quiet"]):
        assert main(["evaluate", *read, *flags]) == 0
        found.append(json.loads((run / "evaluation.json").read_text()))
    assert found[0] != found[1]
    half_precise, precise = (each["mean"]["fvu"]["value"] for each in found)
    assert half_precise == pytest.approx(precise, rel=0.05)
    for shard in ("1/2", "2/2"):
        parts = ["--out", str(tmp_path / "parts"), "--shard", shard]
        assert main(["analyze", *read, *half, *LITTLE, *parts]) == 0
    assert main(["merge", str(tmp_path / "parts"), "--quiet"]) == 0  # refused of a language model in another precision


def test_the_explorer_loads_it_where_and_as_it_is_told(trained, map_file):
    library = Library.open(trained)
    library.lm_options = Placement(device="cpu", lm_dtype="bfloat16", lm_device_map=map_file).lm_options()
    _, lm = Shared(library).pair()
    assert (lm.hf.dtype, lm.spread) == (torch.bfloat16, True)


def test_a_lens_is_trained_through_a_model_that_is_read_from_the_disk(lm_folder, corpus, tmp_path, map_file):
    found = []
    for flags in ([], ["--lm-device-map", map_file]):
        out = tmp_path / f"lens{len(flags)}"
        named = ["--lm", str(lm_folder), "--data", str(corpus), "--out", str(out), "--tokens", "2000", "--quiet"]
        assert main(["lens", *named, *flags]) == 0
        found.append((out / "lens.safetensors").read_bytes())
    assert found[0] == found[1]


def without_times(path):
    """The bytes of a file, or what is in JSON but for clocks."""
    if path.suffix not in (".json", ".jsonl"):
        return path.read_bytes()
    text = path.read_text()
    lines = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else [json.loads(text)]
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]
