"""The published MLSAE classes, run by their own Python: `lawson2024.py ACTION FOLDER X ANSWER`.

ACTION is `read` or `write`, and after it, if wanted, `-none` (no standardising), `-tfm` (with the language model) and `-lens`
(and a tuned lens, random: the published code would download one). MLSAE_PEER_LAWSON2024_PATH names the checkout. `x` is
[token, d_model], or [layer, token, d_model]; recon is behind the lens.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, os.environ.get("MLSAE_PEER_LAWSON2024_PATH", "."))
os.environ.update(USE_TRITON="0", HF_HUB_OFFLINE="1", WANDB_MODE="disabled")

import torch
from mlsae.model import MLSAE, MLSAETransformer, lightning
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast
from tuned_lens import TunedLens

N_LATENTS, K = 256, 8


def from_model(model, name, map_location=None):
    """A lens that nothing is downloaded for."""
    lens = TunedLens.from_model(model)
    for translator in lens.layer_translators:
        torch.nn.init.normal_(translator.weight, std=0.05)
        torch.nn.init.normal_(translator.bias)
    return lens


def language_model(folder, n_layers, d_model):
    """A GPT-NeoX with a tokenizer that nobody asks."""
    config = GPTNeoXConfig(
        vocab_size=20, hidden_size=d_model, num_hidden_layers=n_layers, num_attention_heads=4, intermediate_size=8
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="<eos>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(folder)
    return str(folder)


def make(action, folder, x):
    d_model = x.shape[-1]
    torch.manual_seed(1)
    standardize = "-none" not in action
    if "-tfm" in action:
        whole = MLSAETransformer(
            model_name=language_model(folder.with_name("lm"), len(x), d_model),
            expansion_factor=max(1, N_LATENTS // d_model),
            k=K,
            standardize=standardize,
            max_length=16,
            tuned_lens="-lens" in action,
        )
        sae = whole.autoencoder
    else:
        whole = sae = MLSAE(d_model, N_LATENTS, K, dead_steps_threshold=76, standardize=standardize)
    torch.nn.init.normal_(sae.pre_encoder_bias)
    sae.decoder.weight.data *= torch.rand(sae.n_latents) + 0.5
    if whole is not sae:
        whole.on_train_end()
    else:
        del sae.last_nonzero
    whole.save_pretrained(folder)


@torch.no_grad()
def answer(action, folder, x):
    shape = (-1, 1, *x.shape[-2:])
    if "-tfm" in action:
        whole = MLSAETransformer.from_pretrained(folder)
        sae, x = whole.autoencoder, whole.forward_lens(x.reshape(shape).clone())
    else:
        sae, x = MLSAE.from_pretrained(folder), x.reshape(shape)
    out = sae.forward(x)
    code = torch.zeros(*out.topk.indices.shape[:-1], sae.n_latents)
    return code.scatter_(-1, out.topk.indices, out.topk.values), out.recons


lightning.TunedLens.from_model_and_pretrained = from_model
action, folder, given, path = sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]
x = load_file(given)["x"]
if action.startswith("write"):
    make(action, folder, x)
code, recon = answer(action, folder, x)
save_file({"code": code.reshape(*x.shape[:-1], -1), "recon": recon.reshape(x.shape).contiguous()}, path)
who = {"who": "tim-lawson/mlsae at ba90c51"}
Path(path).with_name("who.json").write_text(json.dumps(who))
