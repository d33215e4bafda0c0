"""SAEs of sparsify: `cfg.json` and `sae.safetensors` in a folder named by the module whose output they read, as `layers.5`.

    code = the k largest of relu((x - b_dec) @ encoder.weight.T + encoder.bias)        recon = code @ W_dec + b_dec

(github.com/EleutherAI/sparsify, sparse_coder.py.)
"""

import re
from pathlib import Path
from typing import Any

import torch

import mlsae.formats.foreign as foreign
from mlsae import files, untrusted
from mlsae.errors import ConfigError, ModelError, printable
from mlsae.formats.weights import Dictionary, Given

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae.safetensors"
TRAINING = {"normalize_decoder", "multi_topk"}
"""Keys that change nothing once an SAE is trained."""
SIZES = {"d_in", "num_latents", "expansion_factor", "k"}
ALLOWED: dict[str, Any] = {"activation": "topk", "skip_connection": False, "transcode": False, "signed": False}
"""The values that have a twin here, of keys that change what an SAE computes; left out they mean these."""
HOOK = re.compile(r"(?:\w+\.)*(?:layers|h|blocks)\.(\d{1,6})(\..+)?")
"""A block of a language model, or with more behind it a part of one."""


def recognises(place: Path) -> bool:
    """Whether a folder holds one."""
    return (place / CONFIG_FILE).is_file() and (place / WEIGHTS_FILE).is_file()


def folder_of(layer: int) -> str:
    """The folder of a layer, which sparsify names by the module."""
    return f"layers.{layer}"


def read(place: Path, given: Given) -> Dictionary:
    """The SAE in a folder. Raises ModelError if it is not whole, or a transcoder or something else with no twin here."""
    path = place / CONFIG_FILE
    values = foreign.mapping(path)
    for key, value in values.items():
        if key not in {*TRAINING, *SIZES, *ALLOWED}:
            raise ModelError(str(path), f"key '{printable(key)}' is unknown; what it changes cannot be told")
        if key in ALLOWED and value != ALLOWED[key]:
            only = f"only {ALLOWED[key]!r} has a twin in an MLSAE"
            raise ModelError(str(path), f"key '{key}' is {printable(repr(value))[:60]}; {only}")
    d_model = foreign.whole(values, "d_in", path)
    n_latents = foreign.whole(values, "num_latents", path, least=0) if "num_latents" in values else 0
    if n_latents == 0:
        n_latents = d_model * foreign.whole(values, "expansion_factor", path)
    k = foreign.whole(values, "k", path, most=n_latents)
    shapes = {"encoder.weight": (n_latents, d_model), "encoder.bias": (n_latents,)}
    shapes |= {"W_dec": (n_latents, d_model), "b_dec": (d_model,)}
    tensors = foreign.floats(untrusted.load_tensors(place / WEIGHTS_FILE), shapes, place / WEIGHTS_FILE)
    return Dictionary(
        W_enc=tensors["encoder.weight"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        b_enc=foreign.bias(tensors["encoder.bias"]),
        k=k,
        layers=foreign.read_layers(_layer(place, given), given, place),
        lm=_lm(_hook_folder(place).parent / "config.json") if given.lm is None else given.lm,
    )


def write(one: Dictionary, folder: Path) -> None:
    """The SAE of a layer. Raises ConfigError where sparsify has no twin: a standardised input, thresholds."""
    if one.standardize:
        raise ConfigError(
            "to", "'sparsify' cannot standardise each vector, as frame 'vector' does; saelens can: use it"
        )
    if one.threshold is not None:
        raise ConfigError("to", "'sparsify' has no thresholds; saelens has: use it")
    n_latents, d_model = one.W_enc.shape
    values: dict[str, Any] = {
        "activation": "topk",
        "expansion_factor": max(1, n_latents // d_model),
        "normalize_decoder": True,
        "num_latents": n_latents,
        "k": one.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": d_model,
    }
    tensors = {"encoder.weight": one.W_enc, "W_dec": one.W_dec, "b_dec": one.b_dec}
    tensors["encoder.bias"] = torch.zeros(n_latents) if one.b_enc is None else one.b_enc
    files.save_tensors(folder / WEIGHTS_FILE, tensors)
    files.write_json(folder / CONFIG_FILE, values)


def _hook_folder(place: Path) -> Path:
    """The folder that is named by a module: runs with several seeds have one for each of them in it."""
    place = place.absolute()
    return place.parent if re.fullmatch(r"seed\d+", place.name) else place


def _layer(place: Path, given: Given) -> int | None:
    """The layer whose block a folder is named by; None: it is named otherwise."""
    name = _hook_folder(place).name
    if (found := HOOK.fullmatch(name)) is None:
        return None
    if found[2] is None:
        return int(found[1])
    foreign.elsewhere(name, given, place)
    return None


def _lm(path: Path) -> str | None:
    """The language model that a run's own config names, beside the folders of its SAEs."""
    values = untrusted.read_json(path) if path.is_file() else None
    model = values.get("model") if isinstance(values, dict) and "sae" in values else None
    return model if isinstance(model, str) else None
