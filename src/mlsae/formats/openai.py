"""SAEs of openai/sparse_autoencoder: one pickle for each layer, of the state of its `Autoencoder` with a `TopK` activation.

    code = relu of the k largest of (standardize(x) - pre_bias) @ encoder.weight.T + latent_bias
    recon = unstandardize(code @ decoder.weight.T + pre_bias)

Whether vectors are standardised does not stand in the file: they are if, and only if, the activation is TopK.
(github.com/openai/sparse_autoencoder, model.py, paths.py; Gao et al. 2024.)
"""

import re
from pathlib import Path
from typing import Any

import torch

import mlsae.formats.foreign as foreign
from mlsae import files
from mlsae.errors import ConfigError, ModelError, printable
from mlsae.formats.weights import Dictionary, Given, Weights, joined

LOCATIONS = ("mlp_post_act", "resid_delta_attn", "resid_delta_mlp", "resid_post_attn", "resid_post_mlp")
"""What the files were published under: `{location}{version}/autoencoders/{layer}.pt`; the last is after a block."""
STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
"""Tensors that say what happened in training."""
ACTIVATION = {"activation": "TopK", "postact_fn": "ReLU"}
"""What has a twin here."""


def recognises(place: Path) -> bool:
    """Whether a file is named like one, or a folder holds some that are named by layers."""
    if place.is_dir():
        return any(path.stem.isdecimal() for path in place.glob("*.pt"))
    return place.suffix == ".pt"


def folder_of(layer: int) -> str:
    """The file of a layer."""
    return f"{LOCATIONS[-1]}/autoencoders/{layer}.pt"


def read_whole(folder: Path, given: Given) -> Weights:
    """The SAE of a file, or of all files named by a layer in a folder, those in it and in them.

    Raises ModelError where they are not whole, not TopK, or not of the residual stream after a block.
    """
    paths = [folder]
    if folder.is_dir():
        found = (path for pattern in ("*.pt", "*/*.pt", "*/*/*.pt") for path in folder.glob(pattern))
        paths = sorted(path for path in found if path.stem.isdecimal())
    return joined([_read(path, given) for path in paths])


def write(one: Dictionary, path: Path) -> None:
    """The SAE of a layer, as a file. Raises ConfigError where there is no twin: an input not standardised, thresholds."""
    if not one.standardize:
        raise ConfigError(
            "to",
            "'openai' standardises each vector whenever it keeps the k largest, as only frame 'vector' does; "
            "saelens, sparsify and dictionary-learning need not: use one",
        )
    if one.threshold is not None:
        raise ConfigError("to", "'openai' has no thresholds; saelens has: use it")
    n_latents = len(one.W_enc)
    state: dict[str, Any] = {
        "pre_bias": one.b_dec,
        "encoder.weight": one.W_enc,
        "latent_bias": torch.zeros(n_latents) if one.b_enc is None else one.b_enc,
        "decoder.weight": one.W_dec.T,
        "stats_last_nonzero": torch.zeros(n_latents, dtype=torch.int64),
        "latents_activation_frequency": torch.zeros(n_latents),
        "latents_mean_square": torch.zeros(n_latents),
        "activation": ACTIVATION["activation"],
        "activation_state_dict": {"k": one.k, "postact_fn": ACTIVATION["postact_fn"]},
    }
    files.save_pickle(path, state)


def _read(path: Path, given: Given) -> Dictionary:
    layers = foreign.read_layers(_layer(path, given), given, path)
    tensors, values = foreign.unpickled(path, given)
    said = _activation(values, path)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in STATISTICS}
    if "encoder.weight" not in tensors or tensors["encoder.weight"].ndim != 2:
        raise ModelError(str(path), "tensor 'encoder.weight' is missing or no matrix; the file is not whole")
    n_latents, d_model = tensors["encoder.weight"].shape
    shapes = {"pre_bias": (d_model,), "encoder.weight": (n_latents, d_model), "latent_bias": (n_latents,)}
    tensors = foreign.floats(tensors, shapes | {"decoder.weight": (d_model, n_latents)}, path)
    return Dictionary(
        W_enc=tensors["encoder.weight"],
        W_dec=tensors["decoder.weight"].T.contiguous(),
        b_dec=tensors["pre_bias"],
        b_enc=foreign.bias(tensors["latent_bias"]),
        k=foreign.whole(said, "k", path, most=n_latents),
        layers=layers,
        standardize=True,
        lm=given.lm,
    )


def _activation(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """`activation`, `postact_fn` and `k`; the last two may stand twice, as the class itself writes them."""
    said: dict[str, Any] = {}
    for key, value in values.items():
        name = key.removeprefix("activation_state_dict.").removeprefix("activation.")
        if name not in ("k", *ACTIVATION):
            raise ModelError(str(path), f"key '{printable(key)}' is unknown; what it changes cannot be told")
        if said.setdefault(name, value) != value:
            raise ModelError(str(path), f"'{name}' is both {printable(repr(said[name]))[:60]} and another")
    said.setdefault("activation", "ReLU")  # what is meant where nothing is said
    for name, allowed in ACTIVATION.items():
        if said.get(name) != allowed:
            found = printable(repr(said.get(name)))[:60]
            raise ModelError(str(path), f"'{name}' is {found}; only SAEs with {allowed} have a twin in an MLSAE")
    return said


def _layer(path: Path, given: Given) -> int | None:
    """The layer of a file at the place where it was published; None: it lies elsewhere."""
    parts = path.absolute().parts[-3:]
    if len(parts) < 3 or parts[1] != "autoencoders" or not re.fullmatch(r"\d{1,6}", path.stem):
        return None
    location = next((location for location in LOCATIONS if parts[0].startswith(location)), None)
    if location in (None, LOCATIONS[-1]):
        return None if location is None else int(path.stem)
    foreign.elsewhere(parts[0], given, path)
    return None
