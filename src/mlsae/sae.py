"""The autoencoder: one dictionary of latents for the residual-stream vectors of every layer.

    pre_acts = (frame(resid) - b_pre) @ W_enc.T        keep the k largest, rectify        recon = unframe(code @ W_dec + b_pre)

(Lawson et al. 2024, section 3; Gao et al. 2024.) Nothing tells the SAE which layer a vector comes from, except, in the `layer`
frame, that layer's own mean and scale, and, behind a tuned lens, that layer's translator: then `resid` above is the lens's image,
and the last step its inverse. `encode` and `decode` are in the residual stream, their `_lensed` kin and the loss behind the lens.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from mlsae import files, ops, untrusted
from mlsae.config import Impl, MLSAEConfig
from mlsae.errors import ConfigError, ModelError
from mlsae.frames import Frame, Lens

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Code:
    """The k active latents of every residual vector, and what the frame needs to land back in the residual stream."""

    values: Float[Tensor, "layer *batch k"]
    """Activations, >= 0, in the frame's units."""
    indices: Int[Tensor, "layer *batch k"]
    """Latent ids in [0, n_latents); an entry whose value is 0 is not active."""
    shift: Float[Tensor, "#layer *#batch #d_model"]
    """What the frame subtracted."""
    scale: Float[Tensor, "#layer *#batch 1"]
    """What it divided by."""
    rows: tuple[int, ...]
    """Which of the SAE's layers the first axis holds, as positions in `sae.layers`."""
    n_latents: int
    """Size of the dictionary."""

    def to_dense(self) -> Float[Tensor, "layer *batch n_latents"]:
        """All activations, zeros included: for small things only."""
        dense = self.values.new_zeros(*self.values.shape[:-1], self.n_latents)
        return dense.scatter_(-1, self.indices, self.values)


@dataclass(frozen=True)
class Part:
    """A run of layers that share a dictionary."""

    here: slice
    """Where on the layer axis."""
    group: int
    latents: slice
    """The group's rows of the weights."""

    @property
    def n_layers(self) -> int:
        """Length of the run."""
        return self.here.stop - self.here.start

    def of(self, tensor: Shaped[Tensor, "layer *rest"]) -> Shaped[Tensor, "part *rest"]:
        """The part's layers of a tensor; all of one that is the same for every layer."""
        return tensor if len(tensor) == 1 else tensor[self.here]


class MLSAE(nn.Module):
    """One sparse autoencoder over many layers. `encode` and `decode` are pure: what training counts is not kept here.

    Weights have one row per latent: `W_enc`, `W_dec [n_latents, d_model]`, `b_pre [d_model]` (with several groups, each group
    owns an equal run of latents and a row of `b_pre [group, d_model]`).
    """

    def __init__(self, config: MLSAEConfig):
        super().__init__()
        self.config = config
        shape = (config.n_latents, config.d_model)
        bound = config.d_model**-0.5  # torch.nn.Linear's default
        self.W_enc = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.W_dec = nn.Parameter(nn.functional.normalize(self.W_enc.detach()))
        self.b_pre = nn.Parameter(torch.zeros(shape[1:] if config.groups == 1 else (config.groups, config.d_model)))
        n_layers = len(config.layers or ())
        self.frame = Frame(config.frame, n_layers, config.d_model)
        self.lens = None if config.lens is None else Lens(self.layers, config.d_model)
        self.norm_limit: Tensor
        """Tokens whose norm exceeds this at any layer are masked; infinite when off."""
        self.register_buffer("norm_limit", torch.full((n_layers,), torch.inf))

    @property
    def layers(self) -> tuple[int, ...]:
        """The model layers this SAE reads, in the order of `resid`'s first axis."""
        if self.config.layers is None:
            raise ConfigError("layers", "this SAE has seen no layer yet; give MLSAEConfig(layers=...) or train it")
        return self.config.layers

    def set_layers(self, n_layers: int) -> None:
        """Fix `layers` to 0..n_layers-1 in an SAE that was made without knowing how many there are."""
        self.config = self.config.replaced(layers=tuple(range(n_layers)))
        self.frame = Frame(self.config.frame, n_layers, self.config.d_model).to(self.W_enc)
        self.norm_limit = self.W_enc.new_full((n_layers,), torch.inf)

    def set_lens(self, lens: Lens) -> None:
        """Put the maps of the SAE's layers before its frame; MLSAEConfig.lens has said that there will be some."""
        if self.lens is None:
            raise ConfigError("lens", "this SAE was made without one; give MLSAEConfig(lens=...) where it came from")
        if lens.bias.shape[1] != self.config.d_model:
            raise ModelError("lens", f"maps {lens.bias.shape[1]} entries; this SAE has d_model {self.config.d_model}")
        if unknown := [layer for layer in self.layers if layer not in lens.layers]:
            raise ModelError(
                "lens", f"has no layer {unknown[0]}, but {_listed(lens.layers)}; train it on {self.config.lm}"
            )
        lens.check_invertible()
        rows = [lens.layers.index(layer) for layer in self.layers]
        self.lens.weight.copy_(lens.weight[rows])
        self.lens.bias.copy_(lens.bias[rows])

    def encode(
        self, resid: Float[Tensor, "layer *batch d_model"], layers: Sequence[int] | None = None, *, impl: Impl = "auto"
    ) -> Code:
        """Keep the k largest latents of each vector; changes no state.

        The first axis holds `layers` (model layer ids; default: all the SAE's). Raises ConfigError if it does not.
        """
        return self.encode_lensed(self.lensed(resid, layers), layers, impl=impl)

    def encode_lensed(
        self, resid: Float[Tensor, "layer *batch d_model"], layers: Sequence[int] | None = None, *, impl: Impl = "auto"
    ) -> Code:
        """`encode` of what `lensed` gave."""
        rows = self.rows(resid, layers)
        shift, scale = self.frame.shift_and_scale(resid, rows)
        codes = []
        for part in self.parts(rows):
            W_enc = self.of(part, self.W_enc)
            values, indices = self.encode_part(resid, shift, scale, part, W_enc, self.config.k, impl)
            codes.append((values, indices + part.latents.start if part.latents.start else indices))
        values, indices = (
            joined(tensors).view(*resid.shape[:-1], self.config.k) for tensors in zip(*codes, strict=True)
        )
        return Code(values, indices, shift, scale, tuple(rows), self.config.n_latents)

    def encode_part(
        self, resid: Tensor, shift: Tensor, scale: Tensor, part: "Part", W_enc: Tensor, k: int, impl: Impl
    ) -> tuple[Float[Tensor, "part token k"], Int[Tensor, "part token k"]]:
        """The k largest of the latents whose rows `W_enc` holds, as positions in it, for the layers of one part."""
        divisor = by_token(part.of(self.frame.divisor(scale)))
        x, shift = by_token(part.of(resid)), by_token(part.of(shift))
        return ops.encode(x, shift, divisor, self.biases[part.group], W_enc, k, impl)

    def decode(self, code: Code, *, impl: Impl = "auto") -> Float[Tensor, "layer *batch d_model"]:
        """The residual vectors a code stands for, in the units of the residual stream."""
        recon = self.decode_lensed(code, impl=impl)
        return recon if self.lens is None else self.lens.invert(recon, [self.layers[row] for row in code.rows])

    def decode_lensed(self, code: Code, *, impl: Impl = "auto") -> Float[Tensor, "layer *batch d_model"]:
        """`lensed(decode(code))`, without the way there and back."""
        framed = ops.decode(code.values.flatten(0, -2), code.indices.flatten(0, -2), self.W_dec, impl)
        framed = framed.unflatten(0, code.values.shape[:-1])
        biases = [self.biases[part.group].expand(part.n_layers, -1) for part in self.parts(code.rows)]
        bias = torch.cat(biases).view(len(code.rows), *[1] * (framed.ndim - 2), -1)
        return (framed + bias) * code.scale + code.shift

    def error(
        self, resid: Float[Tensor, "layer *batch d_model"], code: Code, *, impl: Impl = "auto"
    ) -> tuple[Float[Tensor, "layer *batch d_model"], Float[Tensor, " layer"]]:
        """`resid - decode_lensed(code)`, and its squared sum over each layer: what training minimises, in one pass."""
        parts = [
            ops.decode_error(
                by_token(part.of(code.values)),
                by_token(part.of(code.indices) - part.latents.start),
                self.of(part, self.W_dec),
                self.biases[part.group],
                by_token(part.of(resid)),
                by_token(part.of(code.shift)),
                by_token(part.of(code.scale)),
                impl,
            )
            for part in self.parts(code.rows)
        ]
        errors, squared = zip(*parts, strict=True)
        return joined(errors).view_as(resid), joined(squared)

    def forward(self, resid: Float[Tensor, "layer *batch d_model"]) -> tuple[Code, Tensor]:
        """`(code, recon)`."""
        code = self.encode(resid)
        return code, self.decode(code)

    def lensed(
        self, resid: Float[Tensor, "layer *batch d_model"], layers: Sequence[int] | None = None
    ) -> Float[Tensor, "layer *batch d_model"]:
        """Residual vectors as the lens shows them: themselves, where the SAE has none."""
        self.rows(resid, layers)
        return resid if self.lens is None else self.lens.apply_to(resid, layers)

    def within_norm(self, norms: Float[Tensor, "layer *batch"]) -> Bool[Tensor, "layer *batch"]:
        """Which vectors of the SAE's layers are no longer than their layer's limit; a token is masked when any of its is not.

        Norms are taken in the residual stream, before the lens. NaN is within the limit: it must reach the loss, which stops
        the run, and not be masked away.
        """
        limit = self.norm_limit if len(self.norm_limit) else self.norm_limit.new_full((1,), torch.inf)
        return ~(norms > limit.view(-1, *[1] * (norms.ndim - 1)))

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Give every row of W_dec unit norm; a zero row stays zero."""
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.W_dec.dtype).tiny)

    @property
    def biases(self) -> Float[Tensor, "group d_model"]:
        """`b_pre`, one row a group."""
        return self.b_pre.view(-1, self.config.d_model)

    def group_of(self, row: int) -> int:
        """The group of one of the SAE's layers: neighbours share one, and sizes differ by at most a layer."""
        return 0 if self.config.groups == 1 else row * self.config.groups // len(self.layers)

    def parts(self, rows: Sequence[int]) -> list["Part"]:
        """Runs of `rows` that share a dictionary."""
        size = self.config.n_latents // self.config.groups
        owner = [self.group_of(row) for row in rows]
        starts = [i for i in range(len(rows)) if i == 0 or owner[i] != owner[i - 1]]
        return [
            Part(slice(start, stop), owner[start], slice(owner[start] * size, (owner[start] + 1) * size))
            for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True)
        ]

    def of(self, part: "Part", weight: Float[Tensor, "n_latents d_model"]) -> Float[Tensor, "latent d_model"]:
        """A part's rows of a weight: itself, when there is one group."""
        return weight if self.config.groups == 1 else weight[part.latents]

    def rows(self, resid: Tensor, layers: Sequence[int] | None = None) -> list[int]:
        """Positions in `self.layers` of the layers that `resid`'s first axis holds."""
        if resid.shape[-1] != self.config.d_model:
            raise ConfigError("resid", f"vectors have {resid.shape[-1]} entries; this SAE needs {self.config.d_model}")
        if self.config.layers is None and layers is None:
            return list(range(resid.shape[0]))
        named = self.layers if layers is None else layers
        if unknown := [layer for layer in named if layer not in self.layers]:
            raise ConfigError("layers", f"{unknown[0]} was not trained on; this SAE has layers {_listed(self.layers)}")
        if len(named) != resid.shape[0]:
            raise ConfigError(
                "resid",
                f"holds {resid.shape[0]} layers where {len(named)} are expected; this SAE reads layers "
                f"{_listed(self.layers)}: use lm.resid(tokens, layers=sae.layers)",
            )
        return [self.layers.index(layer) for layer in named]

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, which holds the config too: the files of two SAEs cannot be mixed.

        Weights that are not finite are refused.
        """
        tensors = {name: tensor.float() for name, tensor in self.state_dict().items()}
        _refuse_nonfinite(tensors, Path(directory))
        config = self.config.to_dict()
        files.save_tensors(Path(directory) / WEIGHTS_FILE, tensors, {"config": files.canonical_json(config)})
        files.write_json(Path(directory) / CONFIG_FILE, config)

    @classmethod
    def from_pretrained(
        cls,
        id_or_dir: str | Path,
        *,
        revision: str | None = None,
        device: str | None = None,
        allow_nonfinite: bool = False,
    ) -> "MLSAE":
        """The SAE in a folder, a run directory or a Hub repository.

        Raises ModelError if it is not there, not whole, not ours, or not finite, unless `allow_nonfinite` opens it to look at.
        """
        directory = _find(id_or_dir, revision)
        with torch.device(
            "meta"
        ):  # sizes before bytes: nothing is allocated for a config that the file does not bear out
            sae = cls(_read_config(directory / CONFIG_FILE))
        expected = {name: (torch.float32, tuple(tensor.shape)) for name, tensor in sae.state_dict().items()}
        _check_belongs(directory, sae.config)
        tensors = untrusted.load_tensors(directory / WEIGHTS_FILE, expected)
        if not allow_nonfinite:
            _refuse_nonfinite(tensors, directory)
        sae.load_state_dict(tensors, assign=True)
        return sae.requires_grad_().to(device or "cpu")


def _read_config(path: Path) -> MLSAEConfig:
    """The config in a file that must hold every key: one left out would be guessed."""
    values = untrusted.read_json(path)
    if not isinstance(values, dict):
        raise ModelError(str(path), "holds no mapping of keys; name a folder that save_pretrained wrote")
    if missing := [key for key in MLSAEConfig.model_fields if key not in values]:
        raise ModelError(str(path), f"key '{missing[0]}' is missing; the file is not whole")
    return MLSAEConfig(**values)


def _check_belongs(directory: Path, config: MLSAEConfig) -> None:
    """Refuse a config.json that is not the one the weights were saved with."""
    stored = untrusted.tensors_metadata(directory / WEIGHTS_FILE).get("config", "{}")
    saved_with = untrusted.parse_json(stored, directory / WEIGHTS_FILE)
    if not isinstance(saved_with, dict):
        raise ModelError(str(directory / WEIGHTS_FILE), "holds no config; save the SAE again with save_pretrained")
    for key, value in config.to_dict().items():
        if key not in saved_with or saved_with[key] != value:
            was = f"with {saved_with[key]!r}" if key in saved_with else "without it"
            problem = f"key '{key}' is {value!r}; the weights were saved {was}; get both files again from one place"
            raise ModelError(str(directory / CONFIG_FILE), problem)


def _find(id_or_dir: str | Path, revision: str | None) -> Path:
    """The folder that holds config.json: the one given, its `sae/`, or a download."""
    for directory in (Path(id_or_dir) / "sae", Path(id_or_dir)):
        if os.path.isfile(directory / CONFIG_FILE) and os.path.isfile(directory / WEIGHTS_FILE):
            return directory
    if os.path.exists(id_or_dir):
        raise ModelError(
            "sae", f"'{id_or_dir}' holds no {CONFIG_FILE} with {WEIGHTS_FILE}; name a run or an SAE folder"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(id_or_dir), revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError("sae", f"'{id_or_dir}' is no folder and was not found on the Hub; check the name") from error


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


def _refuse_nonfinite(tensors: dict[str, Tensor], where: Path) -> None:
    if (name := nonfinite(tensors)) is not None:
        raise ModelError(str(where), f"tensor '{name}' holds NaN or infinity; train again from an earlier checkpoint")


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def by_token(tensor: Shaped[Tensor, "layer *batch last"]) -> Shaped[Tensor, "layer token last"]:
    """With one axis for all batch axes."""
    return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.cat`, which copies nothing where there is one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
