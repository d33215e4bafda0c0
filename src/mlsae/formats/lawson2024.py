"""The published MLSAE (Lawson et al. 2024): alone, or beside the language model it was trained on (`-tfm`).

    pre_acts = (standardize(x) - pre_encoder_bias) @ encoder.weight.T      keep the k largest, rectify      decoder.weight [d, n]

Which of the two a folder holds is told by the names of its tensors. A tuned lens is read as the published code applied it:
translator i to the output of the block that stands i-th in `layers` (defect D15 in docs/method.md).
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from mlsae import files, untrusted
from mlsae.config import Config, Layers, MLSAEConfig, check_layers
from mlsae.errors import ConfigError, ModelError, printable
from mlsae.formats.weights import Dictionary, Given, Shapes, Weights, joined, nonfinite
from mlsae.frames import Lens

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
FACTS = {"recipe": "lawson2024", "special_tokens": "zero"}
"""Of every published MLSAE."""
AUX, DEAD_STEPS, DEAD_THRESHOLD = 256, 76, 1e-3
"""What its class wants to know of the training, as published."""
NAME = re.compile(
    r"(?:ml)?sae-(?P<lm>.+)-x(?P<factor>\d+)-k(?P<k>\d+)(?P<lens>-lens)?(?:-tfm)?(?:-layers-(?P<layer>\d+))?"
)
"""Of a published repository."""
OWNERS = {"gpt2": "openai-community", "gemma-2-2b": "google", "Llama-3.2-3B": "meta-llama"}
"""Of published language models beside `EleutherAI/pythia-...`: repository names leave them out."""
BLOCK = re.compile(r"transformer\.model\.(?:\w+\.)*?(?:layers|h)\.(\d+)\..+")
TRANSLATOR = re.compile(r"lens\.layer_translators\.(\d+)\.weight")
LEARNED_LENS = ("encoder_lens.", "decoder_lens.")
BESIDE = r"(autoencoder\.)?last_nonzero"
"""Tensors that training leaves."""
BESIDE_WITH_LM = rf"{BESIDE}|transformer\..+|lens\.unembed\..+|(loss|logits)_(true|pred)"

Size = Annotated[int, Field(ge=1)]

log = logging.getLogger(__name__)


class _Common(Config):
    k: Size
    standardize: bool = True
    auxk: int | None = AUX
    dead_threshold: float = DEAD_THRESHOLD


class Alone(_Common):
    """`config.json` of an autoencoder."""

    n_inputs: Size
    n_latents: Size
    dead_steps_threshold: int = DEAD_STEPS


class WithLM(_Common):
    """`config.json` of an autoencoder with its language model."""

    model_name: str
    expansion_factor: Size
    layers: Layers | None = None
    """None: all."""
    tuned_lens: bool = False
    skip_special_tokens: bool = True
    auxk_coef: float | None = None
    dead_tokens_threshold: int | None = None
    dead_steps_threshold: int | None = None
    lr: float | None = None
    max_length: int | None = None
    batch_size: int | None = None
    accumulate_grad_batches: int | None = None
    autoencoder: None = None
    transformer: None = None


C = TypeVar("C", bound=_Common)


def recognises(folder: Path) -> bool:
    """Whether a folder holds one of both, whole or not."""
    if not ((folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file()):
        return False
    values = untrusted.read_json(folder / CONFIG_FILE)
    return isinstance(values, dict) and ("n_inputs" in values or {"model_name", "expansion_factor"} <= values.keys())


def read_whole(folder: Path, given: Given) -> Weights:
    """The SAE in a folder; what its files leave out is taken from a published repository's name, or from `given`.

    Raises ModelError where it is damaged, contradicts itself or its name, or was trained behind a lens that is not there.
    """
    shapes = untrusted.tensor_shapes(folder / WEIGHTS_FILE)
    if any(name.startswith(LEARNED_LENS) for name in shapes):
        problem = "holds a lens for each layer that was learned with the SAE, of an unreleased version; none is read"
        raise ModelError(str(folder / WEIGHTS_FILE), problem)
    alone = not any(name.startswith("autoencoder.") for name in shapes)
    return _read_alone(folder, given) if alone else _read_with_lm(folder, given, shapes)


def write_whole(weights: Weights, folder: Path) -> None:
    """The autoencoder alone, in the very bytes of a published one; README.md says what its config has no keys for.

    Raises ConfigError where it has no twin: frame `layer`, a lens, groups, thresholds, a bias of latents.
    """
    config, tensors = weights.config, weights.tensors
    _refuse_without_twin(config)
    if (name := nonfinite(tensors)) is not None:
        raise ModelError("sae", f"tensor '{name}' holds NaN or infinity; train again from an earlier checkpoint")
    named = {"encoder.weight": tensors["W_enc"], "decoder.weight": tensors["W_dec"].T}
    named |= {"pre_encoder_bias": tensors["b_pre"].view(-1)}
    files.save_tensors(folder / WEIGHTS_FILE, {name: tensor.float() for name, tensor in named.items()})
    values = Alone(
        k=config.k,
        standardize=config.frame == "vector",
        n_inputs=config.d_model,
        n_latents=config.n_latents,
        auxk=min(AUX, config.n_latents),  # its encoder asks topk for so many
    )
    files.write_text(folder / CONFIG_FILE, files.canonical_json(values.to_dict()).rstrip("\n"))
    files.write_text(folder / "README.md", _card(config))


# ---- reading ---------------------------------------------------------------------------------------------------------


def _read_alone(folder: Path, given: Given) -> Weights:
    config = _read_config(folder, Alone)
    size, n_latents = config.n_inputs, config.n_latents
    tensors = _load(folder, _shapes("", n_latents, size), BESIDE)
    name = _published_name(folder)
    if name is not None:
        _check_name(folder, name, (n_latents, size), config.k)
        if name["lens"] is not None:
            problem = "its name says that it was trained behind a tuned lens, whose translators are not in this file"
            raise ModelError(str(folder), f"{problem}; open the repository of that name with -tfm")
    named = None if name is None or name["layer"] is None else (int(name["layer"]),)
    lm = None if name is None else _language_model(name["lm"])
    one = _dictionary(folder, config, tensors, "", _layers(folder, named, given), lm if given.lm is None else given.lm)
    return joined([one], **FACTS)


def _read_with_lm(folder: Path, given: Given, shapes: Shapes) -> Weights:
    config = _read_config(folder, WithLM)
    bias = "autoencoder.pre_encoder_bias"
    size = shapes[bias][0] if len(shapes.get(bias, ())) == 1 else 0
    expected = _shapes("autoencoder.", config.expansion_factor * size, size)
    translators = _numbers(TRANSLATOR, shapes)
    depth = max(_numbers(BLOCK, shapes) | translators, default=-1) + 1
    if translators and not config.tuned_lens:
        raise ModelError(str(folder), "holds a tuned lens, which its config says it has not; get both files again")
    if config.tuned_lens and not translators:
        raise ModelError(str(folder), "was trained behind a tuned lens, whose translators are not in this file")
    for i in range(depth if config.tuned_lens else 0):
        expected |= {f"lens.layer_translators.{i}.weight": (size, size), f"lens.layer_translators.{i}.bias": (size,)}
    tensors = _load(folder, expected, BESIDE_WITH_LM)
    layers = _layers(folder, config.layers if config.layers is not None else tuple(range(depth)) or None, given)
    _check_layers(folder, layers, depth)
    if (name := _published_name(folder)) is not None:
        _check_name(folder, name, (config.expansion_factor, 1), config.k)
    lm = config.model_name if given.lm is None else given.lm
    one = _dictionary(folder, config, tensors, "autoencoder.", layers, lm)
    facts: dict[str, Any] = {**FACTS, "mask_special_tokens": config.skip_special_tokens}
    if not config.tuned_lens:
        return joined([one], **facts)
    found = joined([one], **facts, lens="lawson2024")
    return Weights(found.config, found.tensors | _lens(folder, one.layers or (), tensors))


def _read_config(folder: Path, kind: type[C]) -> C:
    path = folder / CONFIG_FILE
    values = untrusted.read_json(path)
    try:
        return kind(**values)
    except ConfigError as error:
        raise ModelError(str(path), f"{error.field}: {error.problem}") from error


def _shapes(prefix: str, n_latents: int, size: int) -> Shapes:
    sizes: Shapes = {"encoder.weight": (n_latents, size), "decoder.weight": (size, n_latents)}
    sizes["pre_encoder_bias"] = (size,)
    return {prefix + name: shape for name, shape in sizes.items()}


def _load(folder: Path, shapes: Shapes, beside: str) -> dict[str, Tensor]:
    """The float32 tensors of these shapes; the file may hold others whose names match `beside`."""
    path = folder / WEIGHTS_FILE
    tensors = untrusted.load_tensors(path, {name: (torch.float32, shape) for name, shape in shapes.items()}, beside)
    if (name := nonfinite(tensors)) is not None:
        raise ModelError(str(path), f"tensor '{name}' holds NaN or infinity; get the file again")
    return tensors


def _dictionary(
    folder: Path,
    config: _Common,
    tensors: Mapping[str, Tensor],
    prefix: str,
    layers: tuple[int, ...] | None,
    lm: str | None,
) -> Dictionary:
    W_enc = tensors[prefix + "encoder.weight"]
    if config.k > len(W_enc):
        raise ModelError(str(folder / CONFIG_FILE), f"k is {config.k}; the SAE has {len(W_enc)} latents")
    return Dictionary(
        W_enc=W_enc,
        W_dec=tensors[prefix + "decoder.weight"].T.contiguous(),
        b_dec=tensors[prefix + "pre_encoder_bias"],
        k=config.k,
        layers=layers,
        standardize=config.standardize,
        lm=lm,
    )


def _lens(folder: Path, layers: tuple[int, ...], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The maps by position: the published code counts, where it should name layers."""
    if layers != tuple(range(len(layers))):
        log.warning(
            "%s: translator 0 stands before layer %d, as in the published code, which counts", folder, layers[0]
        )
    lens = Lens(layers, len(tensors["autoencoder.pre_encoder_bias"]))
    for row in range(len(layers)):
        lens.weight[row] = tensors[f"lens.layer_translators.{row}.weight"]
        lens.bias[row] = tensors[f"lens.layer_translators.{row}.bias"]
    lens.check_invertible()
    return {"lens.weight": lens.weight, "lens.bias": lens.bias}


def _numbers(pattern: re.Pattern[str], names: Mapping[str, Any]) -> set[int]:
    return {int(match[1]) for match in map(pattern.fullmatch, names) if match}


# ---- what the files leave out ------------------------------------------------------------------------------------------


def _published_name(folder: Path) -> re.Match[str] | None:
    """The name of the repository that a folder is, or that the Hub's cache holds in it, if it is a published one."""
    inside = folder.absolute()
    name = inside.parent.parent.name.rpartition("--")[2] if inside.parent.name == "snapshots" else inside.name
    return NAME.fullmatch(name)


def _check_name(folder: Path, name: re.Match[str], factor: tuple[int, int], k: int) -> None:
    """Refuse a name that says another expansion factor, given as a fraction, or another k."""
    if (int(name["factor"]) * factor[1], int(name["k"])) != (factor[0], k):
        found = f"x{factor[0] / factor[1]:g}-k{k}"
        problem = f"its name says x{name['factor']}-k{name['k']}, its files {found}; get both files again"
        raise ModelError(str(folder), problem)


def _language_model(tail: str) -> str | None:
    """The language model of a repository name, which has no owner."""
    owner = "EleutherAI" if tail.startswith("pythia-") else OWNERS.get(tail)
    return None if owner is None else f"{owner}/{tail}"


def _layers(folder: Path, said: tuple[int, ...] | None, given: Given) -> tuple[int, ...] | None:
    if said is None or given.layers is None or said == given.layers:
        return given.layers if said is None else said
    raise ModelError(str(folder), f"reads layers {_listed(said)}, not {_listed(given.layers)} as given; leave them out")


def _check_layers(folder: Path, layers: tuple[int, ...] | None, depth: int) -> None:
    """Refuse layers that the language model in the same file has not; say so if one layer goes by the name of many."""
    if layers is None:
        return
    try:
        check_layers(layers)
    except ConfigError as error:
        raise ModelError(str(folder / CONFIG_FILE), f"{error.field}: {error.problem}") from error
    if depth and max(layers) >= depth:
        problem = f"layers: {max(layers)} is out of range; the language model beside it has {depth} layers"
        raise ModelError(str(folder / CONFIG_FILE), problem)
    name = _published_name(folder)
    if len(layers) == 1 and depth > 1 and name is not None and name["layer"] is None and name[0].startswith("mlsae"):
        log.warning("%s: named an MLSAE, is an SAE of layer %d alone", folder, layers[0])


def _listed(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))


# ---- writing ---------------------------------------------------------------------------------------------------------


def _refuse_without_twin(config: MLSAEConfig) -> None:
    others = "saelens, sparsify or dictionary-learning"
    if config.frame == "layer":
        problem = f"'layer'; a published MLSAE standardises each vector or does nothing; write {others}"
        raise ConfigError("frame", problem)
    if config.lens is not None:
        other = others if config.frame == "none" else "mlsae"
        raise ConfigError("lens", f"a published MLSAE holds none without a whole language model; write {other}")
    if config.groups > 1:
        raise ConfigError("groups", f"{config.groups}; a published MLSAE has one dictionary; write saelens")
    if config.activation != "topk":
        raise ConfigError("activation", f"'{config.activation}'; a published MLSAE has topk; write saelens")
    if config.latent_bias:
        raise ConfigError("latent_bias", "a published MLSAE has none; write saelens")


def _card(config: MLSAEConfig) -> str:
    layers = "not known" if config.layers is None else _listed(config.layers)
    left_out = {
        "special tokens": config.mask_special_tokens and config.special_tokens == "drop",
        "first positions": config.mask_first_position,
        "tokens of outlying norm": config.mask_norm_factor is not None,
    }
    return (
        f"# MLSAE\n\n{config.n_latents} latents, k = {config.k}, for the class `MLSAE` of github.com/tim-lawson/mlsae. "
        "What its config has no keys for:\n\n"
        f"- language model: {printable(config.lm) if config.lm is not None else 'not known'}\n"
        f"- layers, by the outputs of whose blocks: {layers}\n"
        f"- left out in training: {', '.join(name for name, out in left_out.items() if out) or 'nothing'}\n"
    )
