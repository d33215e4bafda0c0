"""Tiny random language models of many architectures, a byte tokenizer, and folders that hold both: seeded, offline."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from mlsae.lm import LanguageModel

D_VOCAB = 260
SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>", "<|bos|>")
_SLIDING = {"sliding_window": 8}
_MIXED = ("sliding_attention", "full_attention")

# What a config needs beside the sizes. Windows are shorter than the tests' inputs, and both kinds of layer occur.
_EXTRAS: dict[str, dict[str, Any]] = {
    "gpt_neox": {},
    "gpt2": {},
    "gptj": {"rotary_dim": 4},
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, **_SLIDING},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, **_SLIDING},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, **_SLIDING},
    "qwen2": {"num_key_value_heads": 2, "use_sliding_window": True, **_SLIDING},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8, "use_sliding_window": True, **_SLIDING},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": None},
    "bloom": {},
    "falcon": {"alibi": True, "new_decoder_architecture": False},
    "phi": {"partial_rotary_factor": 0.5},
    "olmo2": {"num_key_value_heads": 2},
    "smollm3": {"num_key_value_heads": 2},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}
ARCHITECTURES = tuple(_EXTRAS)


def tiny_config(architecture: str, n_layers: int = 3, d_model: int = 32, **changes: Any) -> Any:
    """The Hugging Face config of a tiny model; `changes` are the config's own keys."""
    extras = dict(_EXTRAS.get(architecture, {}))
    if architecture in ("gemma2", "gemma3_text", "qwen2", "qwen3"):
        extras["layer_types"] = [_MIXED[layer % 2] for layer in range(n_layers)]
    if architecture == "opt":
        extras["word_embed_proj_dim"] = d_model
    sizes = {"num_hidden_layers": n_layers, "hidden_size": d_model, "num_attention_heads": 4, "vocab_size": D_VOCAB}
    widths = {"intermediate_size": 2 * d_model, "max_position_embeddings": 64}
    ids = {"bos_token_id": 258, "eos_token_id": 256, "pad_token_id": 257}
    # The residual stream of the usual initialisation (0.02) is nearly its embedding: mixed-up layers would not show.
    scale = {"initializer_range": 0.2, "init_std": 0.2}
    return CONFIG_MAPPING[architecture](**(sizes | widths | ids | scale | extras | changes))


def tiny_hf_model(
    architecture: str = "llama", n_layers: int = 3, d_model: int = 32, *, seed: int = 0, **changes: Any
) -> Any:
    """A tiny random Hugging Face causal language model whose layers all do something visible."""
    config = tiny_config(architecture, n_layers, d_model, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = AutoModelForCausalLM.from_config(config).float().eval()
        for parameter in lm.parameters():  # norms and biases start as constants, which would hide a forgotten one
            parameter.data += 0.1 * torch.randn_like(parameter)
    return lm


def byte_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, then `<|endoftext|>` 256, `<|pad|>` 257, `<|bos|>` 258; with `bos`, texts start with 258."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *SPECIAL_TOKENS])}
    fast = FastTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    if bos:
        fast.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 258)])
    eos_token, pad_token, bos_token = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, eos_token=eos_token, pad_token=pad_token, bos_token=bos_token, model_max_length=64
    )


def tiny_lm(architecture: str = "llama", *, bos: bool = False, **kw: Any) -> LanguageModel:
    """A tiny random model and the byte tokenizer, wrapped; `kw` goes to `tiny_hf_model`."""
    return LanguageModel(tiny_hf_model(architecture, **kw), byte_tokenizer(bos), name=f"tiny-{architecture}")


def save_tiny_lm(path: Path, architecture: str = "llama", *, bos: bool = False, **kw: Any) -> Path:
    """A folder that `LanguageModel.from_pretrained` loads; gives back `path`."""
    tiny_hf_model(architecture, **kw).save_pretrained(path)
    byte_tokenizer(bos).save_pretrained(path)
    return path
