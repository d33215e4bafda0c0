"""SAELens: a folder for each SAE, `cfg.json` beside `sae_weights.safetensors`. Files of 6.x, and the flat ones before it.

    code = the k largest of relu((norm(x) - b_dec) @ W_enc + b_enc)        recon = unnorm(code @ W_dec + b_dec)

`W_enc` is [d_model, n_latents] there; `b_dec` is subtracted only with `apply_b_dec_to_input`, and `rescale_acts_by_decoder_norm`
multiplies pre-activations by the norms of `W_dec`'s rows before the choice: both go into the weights here. (SAELens,
sae_lens/saes/sae.py and topk_sae.py.)
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlsae import files, untrusted
from mlsae.errors import ConfigError, ModelError, printable
from mlsae.formats.foreign import bias, elsewhere, floats, mapping, read_layers, whole
from mlsae.formats.weights import Dictionary, Given, Shapes

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
VERSION = "6.54.12"
"""Of the library, whose files these are; one without a version it takes for older than 6, and forgets the hook's name."""

NORMS = {None: False, False: False, "none": False, "layer_norm": True}
"""By `normalize_activations`: whether vectors are standardised."""
OTHER_NORMS = {
    True: "its factor is not in the file; fold it with fold_activation_norm_scaling_factor and save again",
    "expected_average_only_in": "its factor is not in the file; fold it with fold_activation_norm_scaling_factor and save again",
    "constant_norm_rescale": "no frame of an MLSAE divides vectors by their norm",
    "covariance_whitening": "its matrix is not in the file; fold it with fold_activation_whitening and save again",
}
TRAINED_AS = {"batchtopk", "matryoshka_batchtopk"}
"""Architectures of SAEs in training, that the library saves as jumprelu once they are trained."""
WHERE = {"model_name", "hook_name", "hook_layer", "hook_head_index", "model_class_name", "model_from_pretrained_kwargs"}
"""Keys that say which vectors an SAE reads: beside the others before 6, in `metadata` since."""
KNOWN = WHERE | {
    "architecture",
    "metadata",
    "dtype",
    "device",
    "d_in",
    "d_sae",
    "k",
    "normalize_activations",
    "reshape_activations",
    "apply_b_dec_to_input",
    "rescale_acts_by_decoder_norm",
    "finetuning_scaling_factor",
    "neuronpedia_id",
    "dataset_path",
    "sae_lens_version",
    "sae_lens_training_version",
    "context_size",
    "prepend_bos",
    "exclude_special_tokens",
    "seqpos_slice",
    "dataset_trust_remote_code",
    "hf_hook_name",
    "decoder_init_norm",
    "use_sparse_activations",
    "aux_loss_coefficient",
    "l1_coefficient",
    "lp_norm",
    "l1_warm_up_steps",
    "l0_coefficient",
    "l0_warm_up_steps",
    "jumprelu_init_threshold",
    "jumprelu_bandwidth",
    "jumprelu_sparsity_loss_mode",
    "jumprelu_tanh_scale",
    "jumprelu_ste_to_input",
    "pre_act_loss_coefficient",
    "target_l0",
}
"""Keys of 6.x: of what is saved after training, and in it."""
OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
OWNERS = {"pythia-": "EleutherAI/", "gemma-": "google/"}
"""Of language models on the Hub, by the beginnings of the names that TransformerLens gives them."""


def recognises(place: Path) -> bool:
    """Whether a folder holds one."""
    return (place / CONFIG_FILE).is_file() and (place / WEIGHTS_FILE).is_file()


def folder_of(layer: int) -> str:
    """The folder of a layer, which releases name by the hook."""
    return f"blocks.{layer}.hook_resid_post"


def write(one: Dictionary, folder: Path) -> None:
    """Both files, as the library saves a trained SAE. Every dictionary has an exact twin, of one layer."""
    if one.layers is None or len(one.layers) != 1:
        raise ConfigError("layers", f"{one.layers} given; a SAELens folder is of one layer: name it")
    n_latents, d_model = one.W_enc.shape
    kind = {"architecture": "topk", "k": one.k, "rescale_acts_by_decoder_norm": False}
    config: dict[str, Any] = {
        **(kind if one.threshold is None else {"architecture": "jumprelu"}),
        "d_in": d_model,
        "d_sae": n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "layer_norm" if one.standardize else "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": VERSION,
            "sae_lens_training_version": None,
            "hook_name": folder_of(one.layers[0]),
            **({} if one.lm is None else {"model_name": one.lm}),
        },
    }
    tensors = {"b_enc": torch.zeros(n_latents), **one.tensors, "W_enc": one.W_enc.T}
    files.save_tensors(folder / WEIGHTS_FILE, {name: tensor.float() for name, tensor in tensors.items()})
    files.write_json(folder / CONFIG_FILE, config)


def read(place: Path, given: Given) -> Dictionary:
    """The SAE in a folder: TopK, JumpReLU (as BatchTopK and Matryoshka SAEs are saved), and ReLU as JumpReLU above zero.

    A language model that is given goes before the one that the file names: libraries have names of their own for them.
    Raises ModelError if the SAE is not whole, of another kind, or reads vectors that ours cannot be shown.
    """
    path = place / CONFIG_FILE
    config = _config(path)
    kind = _kind(config, path)
    d_model, n_latents = whole(config, "d_in", path), whole(config, "d_sae", path)
    k = whole(config, "k", path, most=n_latents) if kind == "topk" else n_latents
    shapes: Shapes = {"W_enc": (d_model, n_latents), "W_dec": (n_latents, d_model), "b_enc": (n_latents,)}
    shapes |= {"b_dec": (d_model,)} | ({"threshold": (n_latents,)} if kind == "jumprelu" else {})
    tensors = floats(untrusted.load_tensors(place / WEIGHTS_FILE), shapes, place / WEIGHTS_FILE)
    one = Dictionary(
        W_enc=tensors["W_enc"].T.contiguous(),
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        k=k,
        layers=_layers(config, given, path),
        standardize=NORMS[config.get("normalize_activations")],
        b_enc=bias(tensors["b_enc"]),
        threshold=torch.zeros(n_latents) if kind == "standard" else tensors.get("threshold"),
        lm=_lm(config, path) if given.lm is None else given.lm,
    )
    if not _flag(config, "apply_b_dec_to_input", path, missing=True):
        one = _subtracting(one)
    return _unit_rows(one, place / WEIGHTS_FILE) if _flag(config, "rescale_acts_by_decoder_norm", path) else one


# ---- cfg.json ----------------------------------------------------------------------------------------------------------


def _config(path: Path) -> dict[str, Any]:
    """The keys of 6.x, and those of WHERE from `metadata` among them, of a file of any version."""
    found = mapping(path)
    metadata = found.get("metadata", {})
    if not isinstance(metadata, dict):
        raise ModelError(str(path), "key 'metadata' holds no mapping of keys; get the file again")
    version = found.get("sae_lens_version", metadata.get("sae_lens_version"))
    if version is not None and not re.match(r"\d+\.", str(version)):
        raise ModelError(str(path), f"sae_lens_version is {_shown(version)}; it must look like {VERSION}")
    if version is None or int(str(version).split(".")[0]) < 6:
        found = _renamed(found, path)
    elif unknown := sorted(found.keys() - KNOWN):
        raise ModelError(str(path), f"key '{printable(unknown[0])}' is unknown; what it changes cannot be told")
    return _merged([found, {key: metadata[key] for key in WHERE & metadata.keys()}], path)


def _merged(parts: list[dict[str, Any]], path: Path) -> dict[str, Any]:
    """All keys, without those that are null; one that two parts know must mean the same."""
    merged: dict[str, Any] = {}
    for key, value in (item for part in parts for item in part.items()):
        if value is None:
            continue
        if merged.get(key, value) != value:
            raise ModelError(
                str(path), f"key '{key}' is {_shown(merged[key])} and {_shown(value)}; one of them is wrong"
            )
        merged[key] = value
    return merged


def _renamed(old: dict[str, Any], path: Path) -> dict[str, Any]:
    """The flat keys of files before 6 by their names since: an activation function and a class were two things then."""
    config = _merged([{OLD_NAMES.get(key, key): value} for key, value in old.items()], path)
    architecture, function = config.get("architecture", "standard"), config.get("activation_fn", "relu")
    options = config.get("activation_fn_kwargs")
    if function == "topk" and architecture in ("standard", "topk"):
        k = {"k": options["k"]} if isinstance(options, dict) and "k" in options else {}
        return _merged([{**config, "architecture": "topk"}, k], path)
    if function != "relu" or (architecture == "topk" and "activation_fn" in config):
        problem = f"activation_fn is {_shown(function)} in architecture {_shown(architecture)}"
        raise ModelError(str(path), f"{problem}; only relu in standard and jumprelu, and topk, have a twin in an MLSAE")
    return {**config, "architecture": architecture}


def _kind(config: Mapping[str, Any], path: Path) -> str:
    """Its architecture. Raises ModelError if it, or a key beside it, computes something with no twin here."""
    if "architecture" not in config:
        raise ModelError(str(path), "key 'architecture' is missing; the file is not whole")
    kind, norm = config["architecture"], config.get("normalize_activations")
    if kind not in ("topk", "jumprelu", "standard"):
        trained = isinstance(kind, str) and kind in TRAINED_AS
        remedy = "is of training; save it with save_inference_model" if trained else "has no twin in an MLSAE"
        raise ModelError(str(path), f"architecture {_shown(kind)} {remedy}; topk, jumprelu and standard are read")
    if not isinstance(norm, str | bool | None) or norm not in NORMS:
        why = OTHER_NORMS.get(norm, "unknown") if isinstance(norm, str | bool) else "unknown"
        raise ModelError(str(path), f"normalize_activations is {_shown(norm)}: {why}; none and layer_norm are read")
    only: dict[str, tuple[Any, str]] = {
        "reshape_activations": ("none", "heads of attention are put together"),
        "finetuning_scaling_factor": (False, "latents have factors of their own"),
        "hook_head_index": (None, "it reads a head of attention"),
    }
    if kind != "topk":
        only["rescale_acts_by_decoder_norm"] = (False, f"architecture {kind} has no such thing")
        only["k"] = (None, f"architecture {kind} has no such thing")
    for key, (value, why) in only.items():
        if config.get(key, value) != value:
            raise ModelError(str(path), f"key '{key}' is {_shown(config[key])}: {why}; only {value} is read")
    return str(kind)


def _flag(config: Mapping[str, Any], key: str, path: Path, *, missing: bool = False) -> bool:
    value = config.get(key, missing)
    if not isinstance(value, bool):
        raise ModelError(str(path), f"key '{key}' is {_shown(value)}; it must be true or false")
    return value


def _shown(value: Any) -> str:
    return printable(repr(value))[:60]


# ---- which vectors it reads ----------------------------------------------------------------------------------------------


def _layers(config: Mapping[str, Any], given: Given, path: Path) -> tuple[int, ...] | None:
    """The layer that the hook names, else those given; None where nobody says."""
    options, hook = config.get("model_from_pretrained_kwargs"), config.get("hook_name")
    if isinstance(options, dict) and options.get("center_writing_weights"):
        problem = (
            "center_writing_weights is set: it reads vectors without their mean, which the language model does not make"
        )
        raise ModelError(str(path), problem)
    if hook is None:
        return read_layers(None, given, path)
    block, layer = _placed(str(hook), config.get("model_class_name"))
    if block is not None and config.get("hook_layer") not in (None, block):
        raise ModelError(
            str(path),
            f"hook_name is {_shown(hook)} and hook_layer {_shown(config['hook_layer'])}; one of them is wrong",
        )
    if layer is None:
        elsewhere(str(hook), given, path)
    return read_layers(layer, given, path)


def _placed(hook: str, lm_class: object) -> tuple[int | None, int | None]:
    """The block in a hook's name, and the layer whose vectors it sees, if any: what enters a block left the one before."""
    if found := re.fullmatch(r"blocks\.(\d{1,6})\.hook_resid_(pre|post)", hook):
        block = int(found[1])
        layer = block if found[2] == "post" else block - 1
        return block, layer if layer >= 0 else None
    if lm_class == "AutoModelForCausalLM" and (found := re.fullmatch(r"(?:\w+\.)*(?:layers|h)\.(\d{1,6})", hook)):
        return int(found[1]), int(found[1])
    return None, None


def _lm(config: Mapping[str, Any], path: Path) -> str | None:
    """The language model by its name on the Hub, where TransformerLens has a shorter one."""
    name = config.get("model_name")
    if not isinstance(name, str | None):
        raise ModelError(str(path), f"key 'model_name' is {_shown(name)}; it must be a text")
    if name is None or "/" in name:
        return name
    return (
        "gpt2"
        if name == "gpt2-small"
        else next((o for start, o in OWNERS.items() if name.startswith(start)), "") + name
    )


# ---- folds, in float64 ---------------------------------------------------------------------------------------------------


def _subtracting(one: Dictionary) -> Dictionary:
    """With `W_enc b_dec` more in `b_enc`, for an SAE that reads x itself: ours reads `x - b_dec`."""
    more = one.W_enc.double() @ one.b_dec.double()
    return replace(one, b_enc=(more if one.b_enc is None else more + one.b_enc).float())


def _unit_rows(one: Dictionary, path: Path) -> Dictionary:
    """With the norms of `W_dec`'s rows in the encoder, for an SAE whose activations count in their units."""
    norms = one.W_dec.double().norm(dim=1)
    if not norms.all():
        raise ModelError(str(path), "a row of W_dec is zero, and rescale_acts_by_decoder_norm divides by its norm")

    def scaled(tensor: Tensor, factors: Tensor) -> Tensor:
        return (tensor.double() * factors).float()

    return replace(
        one,
        W_enc=scaled(one.W_enc, norms[:, None]),
        W_dec=scaled(one.W_dec, 1 / norms[:, None]),
        b_enc=None if one.b_enc is None else scaled(one.b_enc, norms),
    )
