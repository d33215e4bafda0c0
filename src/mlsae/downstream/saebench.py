"""One layer of an SAE as SAEBench takes one: dense activations, unit decoder rows, weights and a `cfg` by its names.

    code = the k largest of relu((x - b_dec) @ W_enc + b_enc)        recon = code @ W_dec + b_dec

`W_enc` is [d_model, n_latents] there. Frame `layer` and a lens go into the weights.
(SAEBench 0.6, sae_bench/custom_saes/base_sae.py.)
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mlsae.downstream import chosen
from mlsae.errors import ConfigError
from mlsae.formats.weights import Dictionary, dictionary
from mlsae.frames import VECTOR_EPS
from mlsae.sae import MLSAE


@dataclass
class Cfg:
    """What SAEBench asks of `sae.cfg`, by its names; not frozen, because it sets more while it works."""

    model_name: str
    """As TransformerLens knows the language model."""
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    context_size: int
    architecture: str
    """topk or jumprelu."""
    normalize_activations: str
    """none, or layer_norm of an SAE with frame `vector`."""
    dtype: str
    device: str
    hook_head_index: int | None = None
    apply_b_dec_to_input: bool = True
    finetuning_scaling_factor: bool = False
    activation_fn_str: str = "relu"
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    prepend_bos: bool = True
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = False
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = -100_000
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name."""
        return asdict(self)


class LayerSAE(nn.Module):
    """One dictionary, written out: `encode` gives all n_latents activations of every vector, so keep batches small.

    Decoder rows have unit norm and activations carry the norms they had; the k largest are chosen as before. A zero row stays
    zero. With frame `vector` the last `encode` is remembered, because `decode` must undo its mean and deviation.
    """

    def __init__(self, one: Dictionary, cfg: Cfg):
        super().__init__()
        norms = one.W_dec.double().norm(dim=1)
        norms[norms == 0] = 1
        b_enc = torch.zeros(cfg.d_sae) if one.b_enc is None else one.b_enc
        self.W_enc = nn.Parameter((one.W_enc.T * norms).float())
        self.W_dec = nn.Parameter((one.W_dec / norms[:, None]).float())
        self.b_enc = nn.Parameter((b_enc * norms).float())
        self.b_dec = nn.Parameter(one.b_dec.detach().float().clone())
        self.cfg, self.k, self.standardize = cfg, one.k, one.standardize
        self.norms: Tensor
        """[n_latents], of the decoder's rows before."""
        self.register_buffer("norms", norms.float())
        self.threshold: Tensor | None
        """[n_latents], what an active activation exceeds; None: the k largest are active."""
        self.register_buffer("threshold", None if one.threshold is None else one.threshold.clamp_min(0) * self.norms)
        self._seen: tuple[Tensor, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_enc.device

    @property
    def dtype(self) -> torch.dtype:
        """What they are."""
        return self.W_enc.dtype

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch n_latents"]:
        """All activations, zeros included, in the units of the residual stream; of frame `vector` in those of the frame."""
        if self.standardize:
            self._seen = mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
            x = (x - mean) / (std + VECTOR_EPS)
        pre_acts = (x - self.b_dec) @ self.W_enc + self.b_enc
        if self.threshold is not None:
            return pre_acts * (pre_acts > self.threshold)
        active = (pre_acts / self.norms).topk(self.k, dim=-1).indices
        return torch.zeros_like(pre_acts).scatter(-1, active, pre_acts.gather(-1, active).relu())

    def decode(self, feature_acts: Float[Tensor, "*batch n_latents"]) -> Float[Tensor, "*batch d_model"]:
        """The residual vectors that activations stand for.

        Raises ConfigError with frame `vector`, if these are not of as many vectors as were encoded last.
        """
        recon = feature_acts @ self.W_dec + self.b_dec
        if not self.standardize:
            return recon
        if self._seen is None or self._seen[0].shape[:-1] != feature_acts.shape[:-1]:
            given = f"of {list(feature_acts.shape[:-1])} vectors"
            raise ConfigError(
                "feature_acts", f"{given}, not of those encoded last, whose mean it adds; encode them first"
            )
        mean, std = self._seen
        return recon * std + mean

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """`decode(encode(x))`."""
        return self.decode(self.encode(x))

    @classmethod
    def of(
        cls,
        sae: MLSAE,
        layer: int,
        *,
        model_name: str | None = None,
        context_size: int = 128,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "LayerSAE":
        """The dictionary of one of the SAE's layers, as a copy.

        SAEBench masks special tokens itself; an SAE that never saw position 0 is judged there too.

        Args:
            layer: of the language model.
            model_name: as TransformerLens knows it; None: the name the SAE was trained with.
            context_size: tokens of a sequence, for evaluations that ask.

        Raises ConfigError: the SAE does not read this layer, or nobody says which language model it reads, or a lens stands
        before frame `vector`.
        """
        name = sae.config.lm if model_name is None else model_name
        if name is None:
            raise ConfigError("model_name", "the SAE does not say which language model it reads; give its name")
        one = dictionary(sae.weights(), sae.layers.index(*chosen(sae, [layer])))
        cfg = Cfg(
            model_name=name,
            d_in=sae.config.d_model,
            d_sae=len(one.W_enc),
            hook_layer=layer,
            hook_name=f"blocks.{layer}.hook_resid_post",
            context_size=context_size,
            architecture="topk" if one.threshold is None else "jumprelu",
            normalize_activations="layer_norm" if one.standardize else "none",
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
        )
        return cls(one, cfg).to(device=device, dtype=dtype)
