"""The published analysis code, run by its own Python: `lawson2024_data.py ACTION FOLDER`.

`write` analyses a tiny SAE on random tokens with the published loops: FOLDER gets `sae/`, `seen.safetensors` (the vectors and
token ids), `dists.safetensors`, `dists/data/*.parquet`, `examples.db` and `examples/data/*.parquet`. `read` opens what we wrote
there (`dists.safetensors`, `dists/`, `examples.db`) with the published classes, into `columns.safetensors` and `examples.json`.
MLSAE_PEER_LAWSON2024_PATH names the checkout.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, os.environ.get("MLSAE_PEER_LAWSON2024_PATH", "."))
os.environ.update(USE_TRITON="0", HF_HUB_OFFLINE="1", WANDB_MODE="disabled", HF_DATASETS_OFFLINE="1")

import sqlite3

import torch
from datasets import Dataset, load_dataset
from mlsae.analysis.dists import Dists, Metric
from mlsae.model import MLSAETransformer
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from mlsae.analysis.examples import create_db, delete_examples, get_examples, insert_examples, select_examples

N_LAYERS, D_MODEL, FACTOR, K, BATCH, LENGTH, STEPS = 3, 32, 8, 4, 2, 16, 4
COLUMNS = ("count", "total", "mean", "layer_mean", "layer_var", "layer_std", "counts", "totals", "means", "probs")


def language_model(folder):
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=20, hidden_size=D_MODEL, num_hidden_layers=N_LAYERS, num_attention_heads=4, intermediate_size=64
    )
    config.initializer_range = 0.2
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    vocabulary = {"<eos>": 0} | {f"Ġ{letter}": i + 1 for i, letter in enumerate("abcdefghijklmnopqrs")}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    words.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def write(folder):
    sizes = {"expansion_factor": FACTOR, "k": K, "max_length": LENGTH, "batch_size": BATCH}
    model = MLSAETransformer(model_name=language_model(folder / "lm"), **sizes)
    torch.nn.init.normal_(model.autoencoder.pre_encoder_bias)
    metric = Metric(model.n_layers, model.n_latents)
    connection, cursor = create_db(folder / "examples.db")
    seen = []
    for _ in range(STEPS):
        tokens = torch.randint(0, 20, (BATCH, LENGTH))
        resid = model.transformer.forward(tokens)
        seen.append((resid, tokens))
        metric.update(model.autoencoder.encode(resid).topk)
        insert_examples(cursor, list(get_examples(model, {"input_ids": tokens}, 4)))
    delete_examples(cursor, 32)
    connection.commit()
    resid, tokens = (torch.cat(parts, dim=i) for parts, i in zip(zip(*seen, strict=True), (1, 0), strict=True))
    save_file({"resid": resid.contiguous(), "tokens": tokens}, folder / "seen.safetensors")
    save_file(metric.compute(), folder / "dists.safetensors")
    cache = str(folder / "cache")
    data = Dataset.from_generator(Dists(metric.compute()).__iter__, cache_dir=cache)
    (folder / "dists" / "data").mkdir(parents=True)
    data.to_parquet(folder / "dists" / "data" / "train-00000-of-00001.parquet")
    names = ("id", "latent", "layer", "token_id", "token", "act", "token_ids", "tokens", "acts")
    rows = connection.execute("SELECT * FROM examples").fetchall()
    (folder / "examples" / "data").mkdir(parents=True)
    whole = Dataset.from_dict(dict(zip(names, zip(*rows, strict=True), strict=True)))
    whole.to_parquet(folder / "examples" / "data" / "train-00000-of-00001.parquet")
    model.on_train_end()
    model.save_pretrained(folder / "sae")


def read(folder):
    local = Dists.from_file(str(folder / "dists.safetensors"))
    hub = load_dataset(str(folder / "dists"), cache_dir=str(folder / "cache"))["train"]
    assert tuple(hub.column_names) == ("latent", *COLUMNS)
    hub_dists = Dists.from_dataset(hub)
    found = {f"local.{name}": getattr(local, name).contiguous() for name in COLUMNS}
    found |= {f"hub.{name}": getattr(hub_dists, name).contiguous() for name in COLUMNS}
    save_file(found, folder / "columns.safetensors")
    cursor = sqlite3.connect(folder / "examples.db").cursor()
    cells = cursor.execute("SELECT DISTINCT latent, layer FROM examples").fetchall()
    examples = [[list(e) for e in select_examples(cursor, latent, layer)] for latent, layer in cells]
    (folder / "examples.json").write_text(json.dumps(examples))


action, folder = sys.argv[1], Path(sys.argv[2])
{"write": write, "read": read}[action](folder)
