"""The right stream of the right layer, of every architecture, and one sentence for whatever cannot be read."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub
from jaxtyping import TypeCheckError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, DynamicCache

import mlsae.downloads
from mlsae.config import LMShape
from mlsae.errors import ConfigError, DataError, ModelError
from mlsae.lm import LanguageModel, read_shape
from mlsae.tokens import Tokenizer
from tiny import ARCHITECTURES, byte_tokenizer, save_tiny_lm, tiny_config, tiny_hf_model, tiny_lm

torch.set_num_threads(1)
N_LAYERS, D_MODEL, LAST = 3, 32, 2
BLOCKS = {
    **dict.fromkeys(ARCHITECTURES, "model.layers"),
    **dict.fromkeys(["gpt2", "gptj", "bloom", "falcon"], "transformer.h"),
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny_lm(request.param)


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return tiny_lm("llama")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_lm(tmp_path_factory.mktemp("lm") / "tiny-llama")


def tokens_of(n_batch: int = 3, n_pos: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (n_batch, n_pos), generator=torch.Generator().manual_seed(n_batch))


def blocks_of(lm: LanguageModel) -> nn.ModuleList:
    return lm.hf.get_submodule(BLOCKS[lm.name.removeprefix("tiny-")])


def hooked(lm: LanguageModel, tokens: torch.Tensor):
    """Block outputs by plain forward hooks, and the model's own output with its hidden states."""
    outs = []
    hooks = [
        block.register_forward_hook(lambda module, args, out: outs.append(out[0] if isinstance(out, tuple) else out))
        for block in blocks_of(lm)
    ]
    with torch.no_grad():
        output = lm.hf(input_ids=tokens, output_hidden_states=True, use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(outs), output


class Counter:
    """How often modules ran."""

    def __init__(self, modules):
        self.calls = 0
        self.hooks = [module.register_forward_hook(self.count) for module in modules]

    def count(self, *_):
        self.calls += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


# ---- the stream ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_batch", [1, 3])
def test_every_layer_equals_an_independent_hook(lm: LanguageModel, n_batch: int):
    tokens = tokens_of(n_batch)
    resid = lm.resid(tokens)
    outs, output = hooked(lm, tokens)
    assert resid.shape == (N_LAYERS, n_batch, 16, D_MODEL)
    torch.testing.assert_close(resid, outs, rtol=0, atol=1e-6)
    torch.testing.assert_close(resid[:LAST], torch.stack(output.hidden_states[1:-1]), rtol=0, atol=1e-6)
    assert (resid[LAST] - output.hidden_states[-1]).abs().max() > 0.1, "the last layer is read after the final norm"
    torch.testing.assert_close(lm.logits(tokens), output.logits, rtol=0, atol=1e-6)


def test_layers_differ(lm: LanguageModel):
    resid = lm.resid(tokens_of())
    assert all((resid[i] - resid[j]).abs().max() > 0.1 for i in range(N_LAYERS) for j in range(i))


@pytest.mark.parametrize("layers", [[1], [0], [2, 0], [0, 1, 2], (2,)])
def test_layer_subsets_are_ids_in_the_order_given(lm: LanguageModel, layers: list[int]):
    tokens = tokens_of()
    assert torch.equal(lm.resid(tokens, layers), lm.resid(tokens)[list(layers)])


def test_sizes(lm: LanguageModel):
    assert (lm.n_layers, lm.d_model, lm.d_vocab) == (N_LAYERS, D_MODEL, 260)
    assert lm.shape == LMShape(lm.name, N_LAYERS, D_MODEL, 64)
    assert lm.logits(tokens_of()).shape[-1] == lm.d_vocab


def test_a_padded_prompt_equals_its_own_run(lm: LanguageModel):
    texts = ["a longer prompt", "short"]
    batch, alone = lm.tokenize(texts), lm.tokenize(texts[1])
    assert batch.shape == (2, 15)
    assert lm.keep_mask(batch)[1].tolist() == [False, *[True] * 4, *[False] * 10]
    torch.testing.assert_close(lm.resid(batch)[:, 1, :5], lm.resid(alone)[:, 0], rtol=1e-4, atol=1e-5)


def test_resid_needs_no_unembedding_and_no_later_block(llama: LanguageModel):
    later = [block.get_submodule("mlp") for block in blocks_of(llama)[1:]]
    with Counter([*later, llama.hf.get_output_embeddings()]) as counter:
        llama.resid(tokens_of(), [0])
    assert counter.calls == 0


def test_resid_can_be_trained_on(llama: LanguageModel):
    weight = nn.Parameter(torch.ones(D_MODEL))
    (llama.resid(tokens_of()) * weight).pow(2).sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().min() > 0
    assert not llama.logits(tokens_of()).is_inference()


def test_resid_is_float32_of_a_bfloat16_model():
    lm = LanguageModel(tiny_hf_model("llama").bfloat16(), byte_tokenizer())
    resid = lm.resid(tokens_of())
    assert resid.dtype == torch.float32
    assert torch.equal(lm.logits(tokens_of(), {1: lambda x: x}), lm.logits(tokens_of()))
    assert torch.equal(lm.run_from(resid[1], 1, tokens_of()), lm.logits(tokens_of()))


def test_an_opt_whose_embedding_is_narrower_than_its_stream():
    lm = tiny_lm("opt", word_embed_proj_dim=16)
    torch.testing.assert_close(lm.resid(tokens_of()), hooked(lm, tokens_of())[0], rtol=0, atol=1e-6)


# ---- replacing and resuming ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_a_layer_replaced_by_itself_changes_no_bit(lm: LanguageModel, layer: int):
    tokens = tokens_of()
    clean = lm.logits(tokens)
    assert torch.equal(lm.logits(tokens, {layer: lambda resid: resid}), clean)
    assert (lm.logits(tokens, {layer: torch.zeros_like}) - clean).abs().max() > 0.1


def test_all_layers_replaced_by_themselves_change_no_bit(lm: LanguageModel):
    tokens, seen = tokens_of(), []
    replace = {layer: lambda resid: seen.append(resid) or resid for layer in range(N_LAYERS)}
    assert torch.equal(lm.logits(tokens, replace), lm.logits(tokens))
    assert torch.equal(torch.stack(seen), lm.resid(tokens))


def test_a_replacement_sees_what_earlier_ones_left(llama: LanguageModel):
    seen = []
    llama.logits(tokens_of(), {0: torch.zeros_like, 1: lambda resid: seen.append(resid) or resid})
    assert not torch.equal(seen[0], llama.resid(tokens_of())[1])


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_resuming_from_a_layer_gives_the_logits(lm: LanguageModel, layer: int):
    tokens = tokens_of()
    resid = lm.resid(tokens)
    torch.testing.assert_close(lm.run_from(resid[layer], layer, tokens), lm.logits(tokens), rtol=1e-5, atol=1e-5)
    edited = 2 * resid[layer]
    want = lm.logits(tokens, {layer: lambda _: edited})
    torch.testing.assert_close(lm.run_from(edited, layer, tokens), want, rtol=1e-5, atol=1e-5)


def test_resuming_computes_no_block_up_to_the_layer(llama: LanguageModel):
    tokens = tokens_of()
    resid = llama.resid(tokens)
    with Counter(block.get_submodule("mlp") for block in blocks_of(llama)) as counter:
        llama.run_from(resid[LAST], LAST, tokens)
        assert counter.calls == 0
        llama.run_from(resid[0], 0, tokens)
        assert counter.calls == 2


@pytest.mark.parametrize("keeps", [True, False])
def test_logits_of_the_last_positions_are_the_last_of_all(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, keeps: bool
):
    if not keeps:  # as a model whose forward cannot leave positions out
        monkeypatch.setattr(lm, "_can_keep", False)
    tokens, replace = tokens_of(), {1: lambda resid: 2 * resid}
    for last in (1, 5, tokens.shape[1]):
        for edits in (None, replace):
            want = lm.logits(tokens, edits)[:, -last:]
            torch.testing.assert_close(lm.logits(tokens, edits, last=last), want, rtol=1e-5, atol=1e-5)


def test_positions_that_are_not_asked_for_are_not_unembedded(llama: LanguageModel):
    rows = []
    hook = llama.hf.get_output_embeddings().register_forward_hook(lambda module, args, out: rows.append(out.shape[:2]))
    llama.logits(tokens_of(), last=2)
    hook.remove()
    assert rows == [(3, 2)]


@pytest.mark.parametrize("last", [0, -1, 17])
def test_an_impossible_number_of_last_positions(llama: LanguageModel, last: int):
    with pytest.raises(ConfigError, match=f"last: {last}; give 1 to 16"):
        llama.logits(tokens_of(), last=last)


@pytest.mark.parametrize("parts", [[16], [3, 13], [9, 1, 1, 5]])
def test_going_on_from_what_was_seen_is_the_pass_over_all(lm: LanguageModel, parts: list[int]):
    """Of every architecture of these tests, with blocks replaced too."""
    tokens, replace = tokens_of()[:1], {0: lambda resid: 1.5 * resid, LAST: lambda resid: resid - 1.0}
    for edits in (None, replace):
        past = lm.begin()
        assert past is not None
        found = [lm.logits(part, edits, past=past) for part in tokens.split(parts, 1)]
        torch.testing.assert_close(torch.cat(found, 1), lm.logits(tokens, edits), rtol=1e-4, atol=1e-4)
    assert lm.logits(tokens[:, :2], past=lm.begin()).shape[1] == 2  # nothing is left of the passes before


def test_only_what_was_not_seen_before_is_computed(llama: LanguageModel):
    past, rows = llama.begin(), []
    llama.logits(tokens_of()[:1, :12], past=past)
    mlp = blocks_of(llama)[0].get_submodule("mlp")
    hook = mlp.register_forward_hook(lambda module, args, out: rows.append(args[0].shape[1]))
    llama.logits(tokens_of()[:1, 12:], past=past)
    hook.remove()
    assert rows == [4]


def test_a_model_that_does_not_go_on_as_it_would_without_is_not_asked_to(llama: LanguageModel, monkeypatch):
    monkeypatch.setattr(llama, "_goes_on", None)
    monkeypatch.setattr("mlsae.lm.DynamicCache", Forgetful)
    assert llama.begin() is None


class Forgetful(DynamicCache):
    """A cache that loses the values of what it is given first."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        return super().update(key_states, 0 * value_states, layer_idx, *args, **kwargs)


def test_a_sequence_in_parts_may_not_be_too_long_either(llama: LanguageModel):
    past, limit = llama.begin(), llama.context_length
    tokens = torch.zeros(1, limit, dtype=torch.int64)
    llama.logits(tokens, past=past)
    with pytest.raises(DataError, match=f"{limit + 1} in a sequence; .* at most {limit}"):
        llama.logits(tokens[:, :1], past=past)


def test_blocks_are_restored_after_an_error(lm: LanguageModel):
    def fail(resid: torch.Tensor):
        raise ArithmeticError("inside")

    clean, before = lm.logits(tokens_of()), [vars(block).get("forward") for block in blocks_of(lm)]
    with pytest.raises(ArithmeticError, match="inside"):
        lm.logits(tokens_of(), {0: torch.zeros_like, 1: fail})
    assert [vars(block).get("forward") for block in blocks_of(lm)] == before
    assert torch.equal(lm.logits(tokens_of()), clean)


def test_a_forward_that_someone_else_set_is_put_back(llama: LanguageModel):
    block = blocks_of(llama)[1]
    block.forward = theirs = block.forward
    try:
        llama.logits(tokens_of(), {1: lambda resid: resid})
        assert vars(block)["forward"] is theirs
    finally:
        del block.forward


# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_keep_mask_by_hand():
    lm = tiny_lm("gpt2", bos=True)
    tokens = torch.tensor([[258, 10, 256, 20], [30, 257, 40, 258]])  # BOS a EOS b; a PAD b BOS
    assert lm.keep_mask(tokens).tolist() == [[False, True, False, True], [False, False, True, False]]
    assert lm.keep_mask(tokens, first_position=False).tolist()[1] == [True, False, True, False]
    assert lm.keep_mask(tokens, special_tokens=False).tolist() == [[False, True, True, True]] * 2
    assert lm.keep_mask(tokens, special_tokens=False, first_position=False).all()
    assert lm.tokenize("ab")[0, 0] == 258


def test_a_named_separator_is_masked():
    lm = LanguageModel(tiny_hf_model("gpt2"), Tokenizer(byte_tokenizer(), separator_token="!"))
    assert lm.keep_mask(lm.tokenize("ab!c")).tolist() == [[False, True, False, True]]


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ([3], "layers: 3 is out of range; tiny-llama has layers 0-2"),
        ([-1], "layers: -1 is out of range; use 2 for the last"),
        ([0, 0], "layers: 0 is given twice"),
        ([], "layers: empty"),
    ],
)
def test_impossible_layers(llama: LanguageModel, layers: list[int], sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        llama.resid(tokens_of(), layers)


def test_impossible_layers_of_edits(llama: LanguageModel):
    with pytest.raises(ConfigError, match="-1 is out of range"):
        llama.logits(tokens_of(), {-1: torch.zeros_like})
    with pytest.raises(ConfigError, match="3 is out of range"):
        llama.run_from(torch.zeros(3, 16, D_MODEL), 3, tokens_of())


def test_a_replacement_of_another_shape(llama: LanguageModel):
    with pytest.raises(ConfigError, match=r"resid: \(3, 15, 32\) given for layer 1; .* \(3, 16, 32\)"):
        llama.logits(tokens_of(), {1: lambda resid: resid[:, 1:]})
    with pytest.raises(ConfigError, match="resid: NoneType given for layer 1"):
        llama.logits(tokens_of(), {1: lambda resid: None})
    with pytest.raises((ConfigError, TypeCheckError)):  # the checker of shapes is faster, where it runs
        llama.run_from(torch.zeros(3, 16, D_MODEL), 0, tokens_of(2))


def test_a_sequence_longer_than_the_model_takes(lm: LanguageModel):
    with pytest.raises(DataError, match=f"65 in a sequence; {lm.name} takes at most 64"):
        lm.resid(tokens_of(1, 65))


# ---- models that are refused -----------------------------------------------------------------------------------------


def refused(id_or_dir: str | Path) -> str:
    """The sentence, which both the shape and the model give."""
    with pytest.raises(ModelError) as quick:
        read_shape(id_or_dir)
    with pytest.raises(ModelError) as full:
        LanguageModel.from_pretrained(id_or_dir, device="cpu")
    assert str(quick.value) == str(full.value)
    assert (quick.value.field, quick.value.exit_code) == ("model", 6)
    assert "\n" not in str(full.value)
    return quick.value.problem


def folder_of(path: Path, config: object, weights: str = "model.safetensors") -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / weights).write_bytes(b"")
    return path


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("bert", "BertForMaskedLM"),
        ("t5", "T5ForConditionalGeneration"),
        ("llama", "LlamaForSequenceClassification"),
        ("bart", None),
        ("vit", None),
    ],
)
def test_models_that_do_not_predict_the_next_token(tmp_path: Path, model_type: str, architecture: str | None):
    config = CONFIG_MAPPING[model_type]()
    written_by = {"architectures": [architecture]} if architecture else {}
    path = folder_of(tmp_path / "other", config.to_dict() | {"model_type": model_type} | written_by)
    kind = architecture or type(config).__name__
    assert refused(path).startswith(f"'{path}' is {kind}, not a causal language model")


def test_a_model_that_sees_later_tokens():
    bert = AutoModelForCausalLM.from_config(tiny_config("bert"))
    with pytest.raises(ModelError, match=r"BertLMHeadModel\) is not causal: layer 0 sees later tokens"):
        LanguageModel(bert, byte_tokenizer())


def test_objects_that_are_no_causal_model():
    masked = AutoModelForMaskedLM.from_config(tiny_config("bert"))
    with pytest.raises(ModelError, match="BertForMaskedLM"):
        LanguageModel(masked, byte_tokenizer())
    t5 = AutoModelForSeq2SeqLM.from_config(CONFIG_MAPPING["t5"](num_layers=1, d_model=8, d_ff=8, vocab_size=260))
    with pytest.raises(ModelError, match="is T5ForConditionalGeneration, not a causal language model"):
        LanguageModel(t5, byte_tokenizer())
    with pytest.raises(ModelError, match="is LlamaModel, not a causal language model"):
        LanguageModel(tiny_hf_model("llama").model, byte_tokenizer())


def test_a_model_with_several_residual_streams():
    sizes = {"vocab_size_per_layer_input": 260, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "head_dim": 8}
    layers = {"layer_types": ["full_attention"] * 3, "activation_sparsity_pattern": [0.0] * 3}
    heads = {"num_key_value_heads": 2, "num_kv_shared_layers": 0}
    lm = AutoModelForCausalLM.from_config(tiny_config("gemma3n_text", **sizes, **layers, **heads))
    with pytest.raises(ModelError, match="has no single residual stream: layer 0 puts out"):
        LanguageModel(lm, byte_tokenizer())


def test_a_model_without_a_list_of_blocks():
    lm = tiny_hf_model("llama")
    lm.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match="has no list of 7 decoder blocks"):
        LanguageModel(lm, byte_tokenizer())


def test_a_model_that_changes_the_stream_between_blocks():
    lm = tiny_hf_model("llama")
    lm.model.layers[1].register_forward_pre_hook(lambda module, args: (1.5 * args[0], *args[1:]))
    with pytest.raises(ModelError, match="changes layer 0 on its way to the next block"):
        LanguageModel(lm, byte_tokenizer())


def test_a_model_whose_last_block_needs_what_the_first_computed():
    lm, shared = tiny_hf_model("llama"), []
    lm.model.layers[0].mlp.register_forward_hook(lambda module, args, out: shared.append(out))
    lm.model.layers[2].mlp.register_forward_hook(lambda module, args, out: out + shared.pop())
    with pytest.raises(ModelError, match="cannot be run block by block"):
        LanguageModel(lm, byte_tokenizer())


def test_a_model_whose_unembedding_knows_which_blocks_ran():
    lm, ran = tiny_hf_model("llama"), []
    lm.model.layers[0].mlp.register_forward_hook(lambda module, args, out: ran.append(True))
    lm.lm_head.register_forward_hook(lambda module, args, out: out * (1 + bool(ran)) + 0 * len(ran[: ran.clear()]))
    with pytest.raises(ModelError, match=r"cannot be resumed from layer 0 \(relative difference"):
        LanguageModel(lm, byte_tokenizer())


def test_a_model_that_gives_nan():
    lm = tiny_hf_model("gpt2")
    lm.transformer.ln_f.weight.data[0] = torch.nan
    with pytest.raises(ModelError, match="relative difference nan"):
        LanguageModel(lm, byte_tokenizer())


def test_a_model_that_needs_its_own_code(tmp_path: Path):
    config = {"model_type": "made_up", "auto_map": {"AutoModelForCausalLM": "modeling_made_up.MadeUp"}}
    assert "needs code from its repository; not supported" in refused(folder_of(tmp_path / "own", config))
    assert "is of type 'made_up', unknown" in refused(folder_of(tmp_path / "unknown", {"model_type": "made_up"}))


@pytest.mark.parametrize(
    "keys",
    [
        {"trust_remote_code": True},
        {"text_config": {"nested": [{"trust_remote_code": True}]}},
        {"_attn_implementation": "org/kernel"},
        {"attn_implementation": "org/kernel:function"},
        {"_attn_implementation_internal": "org/kernel"},
        {"_class_path": "os.system"},
        {"quantization_config": {"quant_method": "made_up"}},
    ],
)
def test_configs_that_could_choose_code(tmp_path: Path, saved: Path, keys: dict):
    config = json.loads((saved / "config.json").read_text()) | keys
    assert "in its config.json; not supported" in refused(folder_of(tmp_path / "code", config))


def test_own_code_is_not_used_where_transformers_knows_the_model(tmp_path: Path, saved: Path):
    shutil.copytree(saved, tmp_path / "lm")
    config = json.loads((saved / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}, "_attn_implementation": "sdpa"}
    config |= {"_name_or_path": "/x", "_model_name_or_path": "as files converted from GGUF say"}
    (tmp_path / "lm" / "config.json").write_text(json.dumps(config))
    (tmp_path / "lm" / "evil.py").write_text("raise SystemExit('code ran')")
    assert type(LanguageModel.from_pretrained(tmp_path / "lm").hf).__name__ == "LlamaForCausalLM"


def test_a_config_with_impossible_values(tmp_path: Path, saved: Path):
    config = json.loads((saved / "config.json").read_text())
    assert "does not say how many layers" in refused(folder_of(tmp_path / "a", config | {"num_hidden_layers": 0}))
    refused(folder_of(tmp_path / "b", config | {"num_hidden_layers": "three"}))
    refused(folder_of(tmp_path / "c", []))


def test_only_pickled_weights(tmp_path: Path, saved: Path):
    path = folder_of(tmp_path / "pickle", json.loads((saved / "config.json").read_text()), "pytorch_model.bin")
    assert refused(path) == f"'{path}' has no safetensors weights; see 'mlsae convert'"


def test_folders_that_are_no_model(tmp_path: Path):
    assert "has no config.json" in refused(tmp_path)
    assert "not found on the Hub or as a folder" in refused(tmp_path / "nowhere")
    assert "not found on the Hub or as a folder" in refused("./nowhere")


@pytest.mark.parametrize("change", ["missing", "unexpected", "mismatched", "truncated"])
def test_weights_that_do_not_fit(tmp_path: Path, saved: Path, change: str):
    path = shutil.copytree(saved, tmp_path / "lm")
    name, weights = "model.layers.1.mlp.up_proj.weight", load_file(path / "model.safetensors")
    if change == "missing":
        del weights[name]
    elif change == "unexpected":
        weights["model.layers.1.mlp.up_proj.bias"] = torch.zeros(64)
    elif change == "mismatched":
        weights[name] = weights[name][:-1].clone()
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    if change == "truncated":
        os.truncate(path / "model.safetensors", 5000)
    assert read_shape(path).n_layers == N_LAYERS
    with pytest.raises(ModelError) as error:
        LanguageModel.from_pretrained(path)
    assert {"missing": f"has 1 missing weights, such as {name}", "unexpected": "has 1 unexpected weights"}.get(
        change, "cannot be loaded"
    ) in str(error.value)


def test_no_tokenizer(tmp_path: Path):
    tiny_hf_model("llama").save_pretrained(tmp_path / "lm")
    with pytest.raises(ModelError, match="has no usable tokenizer"):
        LanguageModel.from_pretrained(tmp_path / "lm")


# ---- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "gemma2", "mixtral", "bloom"])
def test_save_and_load(tmp_path: Path, architecture: str):
    path = save_tiny_lm(tmp_path / "lm", architecture)
    want, got = tiny_lm(architecture), LanguageModel.from_pretrained(path, device="cpu")
    assert torch.equal(got.logits(tokens_of()), want.logits(tokens_of()))
    assert got.tokenizer.fingerprint == want.tokenizer.fingerprint
    assert got.shape == read_shape(path)
    assert (got.name, got.revision) == (str(path), None)
    assert not got.hf.training
    assert not any(p.requires_grad for p in got.hf.parameters())


def test_dtype_and_separator(saved: Path):
    lm = LanguageModel.from_pretrained(saved, device="cpu", dtype="bfloat16", separator_token="!")
    assert (lm.hf.dtype, lm.device) == (torch.bfloat16, torch.device("cpu"))
    assert lm.tokenizer.strings([lm.tokenizer.separator_id]) == ["!"]
    assert LanguageModel.from_pretrained(saved, device="cpu").hf.dtype == torch.float32


def answer(kind: type[Exception]) -> Exception:
    """A Hub error, whose constructor differs between versions, with a token in its text."""
    error = kind.__new__(kind)
    error.args = ("401 for Bearer hf_secret",)
    return error


NOT_CACHED = "'org/lm' is not in the local cache and %s; run 'hf download org/lm' while online"
HUB_ANSWERS = [
    ("EleutherAI/pythia-70n", hub.RepositoryNotFoundError, "or as a folder; did you mean 'EleutherAI/pythia-70m'?"),
    ("org/private", hub.RepositoryNotFoundError, "run 'hf auth login' if it is private"),
    ("org/lm", hub.GatedRepoError, "is gated; ask for access on huggingface.co/org/lm and run 'hf auth login'"),
    ("org/lm", hub.RevisionNotFoundError, "'org/lm' has no revision 'None'"),
    ("org/lm", hub.OfflineModeIsEnabled, NOT_CACHED % "offline mode is on"),
    ("org/lm", ConnectionError, NOT_CACHED % "the Hub cannot be reached (ConnectionError)"),
    ("org/lm", hub.HfHubHTTPError, NOT_CACHED % "the Hub cannot be reached (HfHubHTTPError)"),
]


@pytest.mark.parametrize(("name", "error", "sentence"), HUB_ANSWERS)
def test_what_the_hub_answers(monkeypatch: pytest.MonkeyPatch, name: str, error: type[Exception], sentence: str):
    def model_info(*args, **kwargs):
        raise answer(error)

    monkeypatch.setattr(mlsae.downloads.HfApi, "model_info", model_info)
    problem = refused(name)
    assert sentence in problem
    assert "hf_secret" not in problem


def test_gated_files_of_a_listed_repository(monkeypatch: pytest.MonkeyPatch):
    def download(*args, **kwargs):
        raise answer(hub.GatedRepoError)

    files = [{"rfilename": name} for name in ("config.json", "model.safetensors")]
    listing = huggingface_hub.ModelInfo(id="org/lm", sha="a" * 40, siblings=files)
    monkeypatch.setattr(mlsae.downloads.HfApi, "model_info", lambda *args, **kwargs: listing)
    monkeypatch.setattr(mlsae.downloads, "snapshot_download", download)
    assert "is gated" in refused("org/lm")


def test_a_cached_model_loads_offline(tmp_path: Path, saved: Path):
    commit, cache = "c" * 40, tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(saved, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    script = (
        "from mlsae.lm import LanguageModel, read_shape\n"
        "lm = LanguageModel.from_pretrained('org/tiny', device='cpu')\n"
        "print(lm.name, lm.revision, read_shape('org/tiny').n_layers, lm.tokenize('ab').shape[1])\n"
        "try: read_shape('org/other')\n"
        "except Exception as error: print(error)\n"
    )
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == f"org/tiny {commit} 3 2"
    assert second.startswith("model: 'org/other' is not in the local cache and offline mode is on; run 'hf download")


def test_a_random_twin_is_the_same_model_untrained(lm: LanguageModel, tmp_path: Path):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        before = torch.get_rng_state()
        lm.save_random_twin(tmp_path / folder, seed)
        assert torch.equal(torch.get_rng_state(), before)
    twin, again, other = (LanguageModel.from_pretrained(tmp_path / folder) for folder in "abc")
    assert twin.shape == replace(lm.shape, name=twin.name)
    assert twin.tokenizer.fingerprint == lm.tokenizer.fingerprint
    tokens = lm.tokenize("a store!")
    assert torch.equal(twin.resid(tokens), again.resid(tokens))
    assert not torch.allclose(twin.resid(tokens), other.resid(tokens))
    assert not torch.allclose(twin.resid(tokens), lm.resid(tokens))
