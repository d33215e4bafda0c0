"""SAEs of dictionary_learning: `ae.pt`, a pickle, and `config.json`, whose `dict_class` says what the tensors mean.

All rectify what the encoder gives, and then keep the k largest (AutoEncoderTopK), those above one threshold (BatchTopKSAE and
its Matryoshka kin), those above a threshold each (JumpReluAutoEncoder), or all (AutoEncoder). All but JumpReluAutoEncoder
subtract the decoder's bias before the encoder. (github.com/saprmarks/dictionary_learning, dictionary.py, trainers/.)
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mlsae.formats.foreign as foreign
from mlsae import files
from mlsae.errors import ConfigError, ModelError, printable
from mlsae.formats.weights import Dictionary, Given, Shapes

CONFIG_FILE, WEIGHTS_FILE = "config.json", "ae.pt"
TOPK, BATCH, MATRYOSHKA = "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"
JUMP, RELU = "JumpReluAutoEncoder", "AutoEncoder"
CLASSES = (TOPK, BATCH, MATRYOSHKA, JUMP, RELU)
"""Those that have a twin here."""
HOOK = re.compile(r"resid_(?:post|out)_layer_?(\d{1,6})")
"""`submodule_name` where it is the residual stream after a block."""
Values = dict[str, Any]


def recognises(place: Path) -> bool:
    """Whether a folder holds one, or a file is one, as those in `checkpoints` are."""
    if place.is_dir():
        return (place / WEIGHTS_FILE).is_file()
    return place.suffix == ".pt" and _config_of(place).is_file()


def folder_of(layer: int) -> str:
    """The folder of a layer, as dictionary_learning's examples name theirs."""
    return f"resid_post_layer_{layer}/trainer_0"


def read(place: Path, given: Given) -> Dictionary:
    """The SAE in a folder. Raises ModelError if it is not whole, or of a class that has no twin here."""
    path = place / WEIGHTS_FILE if place.is_dir() else place
    where = _config_of(path)
    values = foreign.mapping(where)
    trainer = values.get("trainer")
    if not isinstance(trainer, dict):
        raise ModelError(str(where), "holds no 'trainer'; it is not a config of dictionary_learning")
    if (kind := trainer.get("dict_class")) not in CLASSES:
        known = ", ".join(CLASSES)
        raise ModelError(
            str(where), f"dict_class is {printable(repr(kind))[:60]}, which has no twin in an MLSAE; {known} have"
        )
    layers = foreign.read_layers(_layer(trainer, values.get("buffer"), where, given), given, where)
    tensors = _unwrapped(*foreign.unpickled(path, given), path)
    n_latents, d_model = _sizes(tensors, trainer, path, where)
    k = _k(kind, tensors.pop("k", None), trainer, n_latents, path, where)
    sizes = tensors.pop("group_sizes", None) if kind == MATRYOSHKA else None
    if sizes is not None and int(sizes.sum()) != n_latents:
        raise ModelError(
            str(path), f"tensor 'group_sizes' adds up to {int(sizes.sum())}; there are {n_latents} latents"
        )
    shapes = _shapes(kind, n_latents, d_model)
    if kind == TOPK and "threshold" not in tensors:  # files of its first versions lack it; it selects nothing there
        del shapes["threshold"]
    lm = trainer.get("lm_name")
    return Dictionary(
        **_twin(kind, foreign.floats(tensors, shapes, path)),
        k=k,
        layers=layers,
        lm=given.lm if given.lm is not None else lm if isinstance(lm, str) else None,
    )


def write(one: Dictionary, folder: Path) -> None:
    """The SAE of a layer: AutoEncoderTopK or, with thresholds, JumpReluAutoEncoder.

    Raises ConfigError where dictionary_learning has no twin: a standardised input.
    """
    if one.standardize:
        raise ConfigError(
            "to", "'dictionary-learning' cannot standardise each vector, as frame 'vector' does; saelens can: use it"
        )
    n_latents, d_model = one.W_enc.shape
    b_enc = torch.zeros(n_latents) if one.b_enc is None else one.b_enc
    tensors: dict[str, Tensor] = {"b_dec": one.b_dec}
    if one.threshold is None:
        kind, trainer_class = TOPK, "TopKTrainer"
        tensors |= {"encoder.weight": one.W_enc, "encoder.bias": b_enc, "decoder.weight": one.W_dec.T}
        tensors |= {"k": torch.tensor(one.k, dtype=torch.int32), "threshold": torch.tensor(-1.0)}
    else:
        kind, trainer_class = JUMP, "JumpReluTrainer"
        b_enc = (b_enc.double() - one.W_enc.double() @ one.b_dec.double()).float()
        tensors |= {"W_enc": one.W_enc.T, "b_enc": b_enc, "W_dec": one.W_dec, "threshold": one.threshold}
    trainer: Values = {"trainer_class": trainer_class, "dict_class": kind}
    trainer |= {"activation_dim": d_model, "dict_size": n_latents, "lm_name": one.lm}
    if one.threshold is None:
        trainer["k"] = one.k
    if one.layers is not None:
        trainer |= {"layer": one.layers[0], "submodule_name": f"resid_post_layer_{one.layers[0]}"}
    files.save_pickle(folder / WEIGHTS_FILE, tensors)
    files.write_json(folder / CONFIG_FILE, {"trainer": trainer})


def _config_of(weights: Path) -> Path:
    """The config beside a file of weights, or above it if it is one of the `checkpoints`."""
    folder = weights.parent.parent if weights.absolute().parent.name == "checkpoints" else weights.parent
    return folder / CONFIG_FILE


def _layer(trainer: Values, buffer: object, where: Path, given: Given) -> int | None:
    """The layer a config says; None: it names no submodule, and a layer alone does not say where in it."""
    side = buffer.get("io", "out") if isinstance(buffer, dict) else "out"
    if side != "out":
        foreign.elsewhere(f"io: {side}", given, where)
        return None
    if (name := trainer.get("submodule_name")) is None:
        return None
    if (found := HOOK.fullmatch(str(name))) is None:
        foreign.elsewhere(str(name), given, where)
        return None
    if trainer.get("layer", int(found[1])) != int(found[1]):
        layer = printable(repr(trainer["layer"]))[:60]
        raise ModelError(str(where), f"key 'layer' is {layer}, but 'submodule_name' '{name}'; they must agree")
    return int(found[1])


def _unwrapped(tensors: dict[str, Tensor], values: Values, path: Path) -> dict[str, Tensor]:
    """An SAE's tensors: themselves, or out of the backup of an interrupted run, whose vectors were divided by a factor."""
    if not any(name.startswith("ae.") for name in tensors):
        return tensors
    own = {name.removeprefix("ae."): tensor for name, tensor in tensors.items() if name.startswith("ae.")}
    factor = values.get("norm_factor")
    if not isinstance(factor, int | float) or not (math.isfinite(factor) and factor > 0):
        raise ModelError(str(path), f"norm_factor is {factor!r} in the backup of a run; it must be a positive number")
    units = [name for name in ("bias", "b_dec", "b_enc", "encoder.bias", "threshold") if name in own]
    return own | {name: own[name] * (factor if name != "threshold" or own[name].max() >= 0 else 1) for name in units}


def _sizes(tensors: dict[str, Tensor], trainer: Values, path: Path, where: Path) -> tuple[int, int]:
    """n_latents and d_model, of the encoder; where the config says them too, they must agree."""
    name = next((name for name in ("encoder.weight", "W_enc") if name in tensors and tensors[name].ndim == 2), None)
    if name is None:
        raise ModelError(
            str(path), "tensor 'encoder.weight', or 'W_enc', is missing or no matrix; the file is not whole"
        )
    n_latents, d_model = tensors[name].shape if name != "W_enc" else tensors[name].T.shape
    for key, size in {"dict_size": n_latents, "activation_dim": d_model}.items():
        if trainer.get(key, size) != size:
            found = printable(repr(trainer[key]))[:60]
            raise ModelError(str(where), f"key '{key}' is {found}; '{name}' has shape {list(tensors[name].shape)}")
    return n_latents, d_model


def _k(kind: str, kept: Tensor | None, trainer: Values, n_latents: int, path: Path, where: Path) -> int:
    """Active latents: what config and weights say alike; with thresholds there is no limit but all."""
    if kept is not None and (kept.numel() != 1 or kept.is_floating_point()):
        raise ModelError(str(path), "tensor 'k' is not one whole number")
    said = trainer.get("k")
    if kept is not None and said is not None and int(kept) != said:
        raise ModelError(str(where), f"key 'k' is {printable(repr(said))[:60]}; the weights say {int(kept)}")
    if kind != TOPK:
        return n_latents
    return foreign.whole({"k": said if kept is None else int(kept)}, "k", where if kept is None else path, 1, n_latents)


def _shapes(kind: str, n_latents: int, d_model: int) -> Shapes:
    if kind in (MATRYOSHKA, JUMP):
        shapes: Shapes = {"W_enc": (d_model, n_latents), "b_enc": (n_latents,), "W_dec": (n_latents, d_model)}
    else:
        shapes = {"encoder.weight": (n_latents, d_model), "encoder.bias": (n_latents,)}
        shapes["decoder.weight"] = (d_model, n_latents)
    shapes["bias" if kind == RELU else "b_dec"] = (d_model,)
    if kind != RELU:
        shapes["threshold"] = (n_latents,) if kind == JUMP else ()
    return shapes


def _twin(kind: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The same SAE in our terms."""
    b_dec, threshold = tensors["bias" if kind == RELU else "b_dec"], tensors.get("threshold")
    if kind in (MATRYOSHKA, JUMP):
        W_enc, b_enc, W_dec = tensors["W_enc"].T, tensors["b_enc"], tensors["W_dec"]
    else:
        W_enc, b_enc, W_dec = tensors["encoder.weight"], tensors["encoder.bias"], tensors["decoder.weight"].T
    if kind == JUMP:  # it does not subtract what we do
        b_enc = (b_enc.double() + W_enc.double() @ b_dec.double()).float()
    if kind == RELU:
        threshold = torch.zeros_like(b_enc)
        norms = W_dec.norm(dim=1)
        if not torch.allclose(norms, torch.ones_like(norms)):  # then it is opened with rows of unit norm
            W_enc, b_enc, W_dec = W_enc * norms[:, None], b_enc * norms, W_dec / norms[:, None]
    if kind == TOPK:
        threshold = None
    elif threshold is not None:  # one that was never set is -1: every positive pre-activation exceeds it
        threshold = threshold.clamp_min(0).expand(len(b_enc))
    named = {"W_enc": W_enc, "W_dec": W_dec, "b_dec": b_dec, "threshold": threshold}
    named = {name: None if tensor is None else tensor.contiguous() for name, tensor in named.items()}
    return {**named, "b_enc": foreign.bias(b_enc)}
