"""An SAE as files hold it: a config with tensors, or a dictionary for each layer, as every other library keeps one.

pre_acts = (standardize(resid) - b_dec) @ W_enc.T + b_enc        recon = unstandardize(code @ W_dec + b_dec)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mlsae.config import MLSAEConfig
from mlsae.errors import ConfigError, ModelError
from mlsae.frames import Lens

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Given:
    """What a file may leave out, as the reader of it knows it."""

    lm: str | None = None
    """Language model that the SAE reads."""
    layers: tuple[int, ...] | None = None
    """The layers it reads."""
    allow_pickle: bool = False
    """Read files that are pickles: their tensors and numbers, in a process of its own."""


@dataclass(frozen=True)
class Weights:
    """A config, and the tensors that an `MLSAE` of it holds, by the names of its `state_dict`."""

    config: MLSAEConfig
    tensors: dict[str, Tensor]
    fingerprint: dict[str, Any] | None = None
    """What our own files say of the SAE beside it (fingerprint.py)."""


@dataclass(frozen=True)
class Dictionary:
    """One dictionary and the layers it reads: what a file of another library says, or can be told."""

    W_enc: Tensor
    """[n_latents, d_model], as all that is checked here: files have shapes of their own."""
    W_dec: Tensor
    """[n_latents, d_model]."""
    b_dec: Tensor
    """[d_model], subtracted before the encoder and added after the decoder."""
    k: int
    """Active latents of a vector; at most, where there are thresholds."""
    layers: tuple[int, ...] | None = None
    """Model layers, by the outputs of whose blocks; None: the file does not say."""
    standardize: bool = False
    """Every vector less its mean, over its standard deviation: frame `vector`."""
    b_enc: Tensor | None = None
    """[n_latents], added to pre-activations; None: nothing is."""
    threshold: Tensor | None = None
    """[n_latents], what an active pre-activation exceeds; None: the k largest are active."""
    lm: str | None = None
    """The language model it reads, if the file says so."""

    def __post_init__(self) -> None:
        n_latents, d_model = self.W_enc.shape
        if not 1 <= self.k <= n_latents:
            raise ModelError("k", f"{self.k} given; must lie in 1 to n_latents, {n_latents}")
        wanted: Shapes = {"W_enc": (n_latents, d_model), "W_dec": (n_latents, d_model), "b_dec": (d_model,)}
        wanted |= {"b_enc": (n_latents,), "threshold": (n_latents,)}
        for name, shape in wanted.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ModelError(name, f"has shape {list(tensor.shape)}; {list(shape)} follows from W_enc")
            if tensor is not None and not tensor.isfinite().all():
                raise ModelError(name, "holds NaN or infinity; get the file again")

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those there are, by name."""
        named = {name: getattr(self, name) for name in ("W_enc", "W_dec", "b_dec", "b_enc", "threshold")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def same_as(self, other: "Dictionary") -> bool:
        """Whether both are one dictionary that reads different layers."""
        mine, its = self.tensors, other.tensors
        if (self.k, self.standardize, self.lm, mine.keys()) != (other.k, other.standardize, other.lm, its.keys()):
            return False
        return all(torch.equal(tensor, its[name]) for name, tensor in mine.items())


# ---- from an SAE of ours to a dictionary for each layer ----------------------------------------------------------------


def dictionaries(weights: Weights) -> list[Dictionary]:
    """`dictionary` of every layer."""
    layers = weights.config.layers
    return [dictionary(weights, row) for row in range(1 if layers is None else len(layers))]


def dictionary(weights: Weights, row: int) -> Dictionary:
    """The dictionary equal to the SAE at its row-th layer. Tensors are shared where the frame leaves them as they are.

    Frame `layer` and a tuned lens are affine maps of a layer, so they go into its weights; activations stay what they are.

    Raises:
        ConfigError: a lens before frame `vector`, which is no affine map, and an SAE that does not know its layers.
    """
    config = weights.config
    if config.layers is None:
        raise ConfigError("layers", "the SAE does not say which it reads; give them")
    if config.lens is not None and config.frame == "vector":
        raise ConfigError(
            "lens", "a tuned lens before frame 'vector' has no twin in other libraries; use frame layer or none"
        )
    return _folded(weights, row, config.layers[row])


def _folded(weights: Weights, row: int, layer: int) -> Dictionary:
    config, tensors = weights.config, weights.tensors
    size, group = config.n_latents // config.groups, config.group_of(row)
    own = slice(group * size, (group + 1) * size)
    one = Dictionary(
        W_enc=tensors["W_enc"][own],
        W_dec=tensors["W_dec"][own],
        b_dec=tensors["b_pre"].view(config.groups, -1)[group],
        k=config.k,
        layers=(layer,),
        standardize=config.frame == "vector",
        b_enc=tensors["b_enc"][own] if "b_enc" in tensors else None,
        threshold=tensors["threshold"][own] if "threshold" in tensors else None,
        lm=config.lm,
    )
    if config.frame == "layer":
        mean, scale = tensors["frame.mean"][row], tensors["frame.scale"][row]
        one = replace(one, W_enc=one.W_enc / scale, W_dec=one.W_dec * scale, b_dec=one.b_dec * scale + mean)
    return one if config.lens is None else _behind(one, tensors["lens.weight"][row], tensors["lens.bias"][row])


def _behind(one: Dictionary, weight: Float[Tensor, "d_model d_model"], bias: Float[Tensor, " d_model"]) -> Dictionary:
    """With `y = x + x A^T + c` in its weights: `W_enc (I + A)`, and `(y - c) (I + A)^-T` of what it decodes."""
    lens = Lens((0,), len(bias))
    lens.weight = weight[None]  # and no bias: that is in b_dec alone
    W_enc, W_dec = one.W_enc + one.W_enc @ weight, lens.invert(one.W_dec[None])[0]
    return replace(one, W_enc=W_enc, W_dec=W_dec, b_dec=lens.invert((one.b_dec - bias).view(1, 1, -1)).flatten())


# ---- from dictionaries to an SAE of ours ---------------------------------------------------------------------------------


def joined(found: Sequence[Dictionary], **facts: Any) -> Weights:
    """One SAE of several dictionaries: shared where they are one and the same, else a group of latents for each.

    Args:
        facts: fields of the config that no dictionary holds: recipe, lens, special_tokens.

    Raises:
        ModelError: dictionaries that differ in more than their numbers.
        ConfigError: two that read the same layer.
    """
    if len(found) > 1 and any(one.layers is None for one in found):
        raise ModelError("layers", "not said by every file; open one of them alone")
    found = sorted(found, key=lambda one: one.layers or ())
    if any(one.b_enc is not None for one in found):  # no bias is a bias of zero
        found = [one if one.b_enc is not None else replace(one, b_enc=torch.zeros(len(one.W_enc))) for one in found]
    first = found[0]
    groups = 1 if all(first.same_as(one) for one in found[1:]) else len(found)
    for one in found[1:]:
        if (odd := _difference(first, one)) is not None:
            raise ModelError(
                "layers", f"{first.layers} and {one.layers} hold SAEs of different {odd}; open one of them alone"
            )
    shared = found[:1] if groups == 1 else found
    n_latents, d_model = first.W_enc.shape
    layers = None if first.layers is None else tuple(layer for one in found for layer in one.layers or ())
    config: dict[str, Any] = {
        "d_model": d_model,
        "n_latents": n_latents * groups,
        "k": first.k,
        "layers": layers,
        "groups": groups,
        "frame": "vector" if first.standardize else "none",
        "mask_first_position": False,
        "mask_norm_factor": None,
        "lm": first.lm,
        "activation": "topk" if first.threshold is None else "jumprelu",
        "latent_bias": first.b_enc is not None,
    }
    biases = torch.stack([one.b_dec for one in shared]).float()
    tensors = {
        name: torch.cat([one.tensors[name].float() for one in shared]) for name in first.tensors if name != "b_dec"
    }
    tensors |= {"b_pre": biases[0] if groups == 1 else biases}
    tensors |= {"norm_limit": torch.full((len(layers or ()),), math.inf)}
    return Weights(MLSAEConfig(**{**config, **facts}), {name: tensor.contiguous() for name, tensor in tensors.items()})


def _difference(one: Dictionary, other: Dictionary) -> str | None:
    pairs = {
        "shape": (one.W_enc.shape, other.W_enc.shape),
        "k": (one.k, other.k),
        "input normalisation": (one.standardize, other.standardize),
        "activation": (one.threshold is None, other.threshold is None),
        "language models": (one.lm, other.lm),
    }
    return next((name for name, (mine, its) in pairs.items() if mine != its), None)


# ---- what the tensors of a config are --------------------------------------------------------------------------------


def shapes(config: MLSAEConfig) -> Shapes:
    """The shape of every tensor of an SAE, by its name: all are float32."""
    n_latents, d_model, n_layers = config.n_latents, config.d_model, len(config.layers or ())
    found: Shapes = {"W_enc": (n_latents, d_model), "W_dec": (n_latents, d_model)}
    found["b_pre"] = (d_model,) if config.groups == 1 else (config.groups, d_model)
    found["norm_limit"] = (n_layers,)
    if config.latent_bias:
        found["b_enc"] = (n_latents,)
    if config.activation == "jumprelu":
        found["threshold"] = (n_latents,)
    if config.frame == "layer":
        found |= {"frame.mean": (n_layers, d_model), "frame.scale": (n_layers,)}
    if config.lens is not None:
        found |= {"lens.weight": (n_layers, d_model, d_model), "lens.bias": (n_layers, d_model)}
    return found


def nonfinite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first tensor that holds NaN or infinity, if one does: one pass over memory each, so that every step can ask."""
    floats = {
        name: tensor.detach() for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()
    }
    if not floats:
        return None
    device = next(iter(floats.values())).device
    extremes = [torch.stack(tensor.aminmax()).to(device, torch.float64) for tensor in floats.values()]  # NaN if any is
    for name, (least, most) in zip(floats, torch.stack(extremes).tolist(), strict=True):  # one wait for an accelerator
        if not (least > 0 if name == "norm_limit" else math.isfinite(least) and math.isfinite(most)):
            return name  # a limit may be infinite: off
    return None
