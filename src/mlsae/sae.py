"""The autoencoder: one dictionary of latents for the residual-stream vectors of every layer.

    pre_acts = (frame(resid) - b_pre) @ W_enc.T        keep the k largest, rectify        recon = unframe(code @ W_dec + b_pre)

(Lawson et al. 2024, section 3; Gao et al. 2024.) Nothing tells the SAE which layer a vector comes from, except, in the `layer`
frame, that layer's own mean and scale, and, behind a tuned lens, that layer's translator: then `resid` above is the lens's image,
and the last step its inverse. `encode` and `decode` are in the residual stream, their `_lensed` kin and the loss behind the lens.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from mlsae import fingerprint, formats, ops
from mlsae.config import Impl, MLSAEConfig
from mlsae.errors import ConfigError, ModelError
from mlsae.formats.weights import Weights
from mlsae.frames import Frame, Lens
from mlsae.ops import imported

if TYPE_CHECKING:
    from mlsae.lm import LanguageModel
    from mlsae.publish import Push


@dataclass(frozen=True)
class Code:
    """The k active latents of every residual vector, and what the frame needs to land back in the residual stream."""

    values: Float[Tensor, "layer *batch k"]
    """Activations, >= 0, in the frame's units; with thresholds, as many as the fullest vector has."""
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
        return dense.scatter_add_(-1, self.indices, self.values)  # a wider code than a vector needs repeats latent 0


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
        self.b_enc = nn.Parameter(torch.zeros(config.n_latents)) if config.latent_bias else None
        self.threshold: Tensor | None
        """What an active latent's pre-activation exceeds; None: the k largest are active."""
        self.register_buffer("threshold", torch.zeros(config.n_latents) if config.activation == "jumprelu" else None)
        n_layers = len(config.layers or ())
        self.frame = Frame(config.frame, n_layers, config.d_model)
        self.lens = None if config.lens is None else Lens(self.layers, config.d_model)
        self.norm_limit: Tensor
        """Tokens whose norm exceeds this at any layer are masked; infinite when off."""
        self.register_buffer("norm_limit", torch.full((n_layers,), torch.inf))
        self.fingerprint: dict[str, Any] | None = None
        """What was saved with the weights, or None, if these were never saved."""

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
            if self.foreign_encoder:
                values, indices = self._encode_imported(resid, shift, scale, part)
            else:
                values, indices = self.encode_part(
                    resid, shift, scale, part, self.of(part, self.W_enc), self.config.k, impl
                )
            codes.append((values, indices + part.latents.start if part.latents.start else indices))
        width = max(values.shape[-1] for values, _ in codes)
        values, indices = (
            joined([imported.widened(each, width) for each in tensors]).view(*resid.shape[:-1], width)
            for tensors in zip(*codes, strict=True)
        )
        return Code(values, indices, shift, scale, tuple(rows), self.config.n_latents)

    @property
    def foreign_encoder(self) -> bool:
        """Whether its encoder is one that is not trained here: with a bias for each latent, or thresholds."""
        return not (self.b_enc is None and self.threshold is None)

    def _encode_imported(
        self, resid: Tensor, shift: Tensor, scale: Tensor, part: "Part"
    ) -> tuple[Float[Tensor, "part token width"], Int[Tensor, "part token width"]]:
        x = self.frame.apply_to(part.of(resid), part.of(shift), part.of(scale)) - self.biases[part.group]
        b_enc, threshold = (None if each is None else each[part.latents] for each in (self.b_enc, self.threshold))
        values, indices = imported.encode(x.flatten(0, -2), self.of(part, self.W_enc), b_enc, threshold, self.config.k)
        return values.view(part.n_layers, -1, values.shape[-1]), indices.view(part.n_layers, -1, values.shape[-1])

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

    def parts(self, rows: Sequence[int]) -> list["Part"]:
        """Runs of `rows` that share a dictionary."""
        size = self.config.n_latents // self.config.groups
        owner = [self.config.group_of(row) for row in rows]
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

    def save_pretrained(
        self, directory: str | Path, *, lm: "LanguageModel | None" = None, step: int | None = None
    ) -> None:
        """Write `config.json` and `model.safetensors` with a fingerprint; with `lm`, also of what it is on a fixed prompt of it.

        Weights that are not finite are refused. `step` says how far the run was that they are from.
        """
        self.fingerprint = fingerprint.of(self, lm)
        formats.own.write(replace(self.weights(), fingerprint=self.fingerprint), Path(directory), step)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        run: str | Path | None = None,
        license: str | None = None,  # noqa: A002
        dry_run: bool = False,
        **more: Any,
    ) -> "Push":
        """Upload it with a model card to `user/name` on the Hub, as one commit; `publish.push` says what is refused.

        Args:
            private: make the repository private, if it is not there yet.
            revision: branch; None: main.
            run: directory of the run that trained it, for the card.
            license: as the Hub spells it, such as mit; None: the card says that none was chosen.
            dry_run: only say what would be uploaded.
            more: `to`, `lm`, `data` and `tell` of `publish.push`.
        """
        from mlsae.publish import push

        where: dict[str, Any] = {"private": private, "revision": revision, "license": license, "dry_run": dry_run}
        return push(self.marked_weights(), repo_id, run=None if run is None else Path(run), **where, **more)

    def weights(self) -> Weights:
        """The config and tensors, as formats take them; nothing is copied."""
        return Weights(self.config, {name: tensor.detach() for name, tensor in self.state_dict().items()})

    def marked_weights(self) -> Weights:
        """With a fingerprint: the one they were saved with, which may know a prompt, if they are still the same."""
        now, saved = fingerprint.of(self), self.fingerprint
        unchanged = saved is not None and saved["sha256"] == now["sha256"]
        return replace(self.weights(), fingerprint=saved if unchanged else now)

    @classmethod
    def from_weights(cls, weights: Weights) -> "MLSAE":
        """The SAE of a config and tensors, which it keeps."""
        with torch.device("meta"):
            sae = cls(weights.config)
        sae.load_state_dict(weights.tensors, assign=True)
        sae.fingerprint = weights.fingerprint
        return sae.requires_grad_()

    @classmethod
    def from_pretrained(
        cls,
        id_or_dir: str | Path,
        *,
        revision: str | None = None,
        device: str | None = None,
        lm: str | None = None,
        layers: Sequence[int] | None = None,
        allow_pickle: bool = False,
        allow_nonfinite: bool = False,
    ) -> "MLSAE":
        """The SAE in a folder, a run directory or a Hub repository, whatever library wrote it.

        Of a run it is the one in `sae/` or, where that is missing or older, the one in its newest checkpoint; that, and a
        checkpoint's own folder, are read whatever the number of processes that wrote it.

        Args:
            id_or_dir: on the Hub `user/repo`, or `user/repo/folder` for one of several.
            revision: branch, tag or commit on the Hub; None: the newest.
            lm: the language model it reads, where its files do not say.
            layers: the layers it reads, where its files do not say.
            allow_pickle: also read formats whose files are pickles: tensors and numbers, in a process of its own.

        Raises ModelError if it is not there, not whole, of no known format, or not finite, unless `allow_nonfinite` opens it
        to look at.
        """
        given = formats.Given(lm, None if layers is None else tuple(layers), allow_pickle)
        found = formats.read(_find(id_or_dir, revision, allow_pickle), given, allow_nonfinite=allow_nonfinite)
        sae = cls.from_weights(found)
        if found.fingerprint is not None and not allow_nonfinite:
            fingerprint.check(sae, found.fingerprint)
        return sae.to(device or "cpu")


def _find(id_or_dir: str | Path, revision: str | None, allow_pickle: bool) -> Path:
    """The folder or file given, where its SAE is if it is a run directory, or a download."""
    if os.path.exists(id_or_dir):
        return formats.checkpoint.place(Path(id_or_dir))
    from mlsae.downloads import fetch_sae

    return fetch_sae(str(id_or_dir), revision, allow_pickle=allow_pickle)


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def by_token(tensor: Shaped[Tensor, "layer *batch last"]) -> Shaped[Tensor, "layer token last"]:
    """With one axis for all batch axes."""
    return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.cat`, which copies nothing where there is one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
