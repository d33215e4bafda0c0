"""Each metric, defined once: a pure function, or streaming sums with `update` and `merge` whose totals are divided once.

Sums are float64 and counts int64, so results do not depend on batch size, token order or how the work was sharded.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


def fvu(
    resid: Float[Tensor, "layer token d_model"], recon: Float[Tensor, "layer token d_model"]
) -> Float[Tensor, " layer"]:
    """Fraction of variance unexplained, per layer: 0 is perfect, 1 is predicting the mean.

    sum |resid - recon|^2 / sum |resid - mean_token(resid)|^2      (Gao et al. 2024, normalized MSE; here per batch)
    """
    return (resid - recon).square().sum((1, 2)) / (resid - resid.mean(1, keepdim=True)).square().sum((1, 2))


def fvu_lawson2024(
    resid: Float[Tensor, "layer token d_model"], recon: Float[Tensor, "layer token d_model"]
) -> Float[Tensor, " layer"]:
    """The published code's FVU of one batch: MSE over the unbiased variance of all scalars about one mean.

    Its denominator is larger than `fvu`'s by the variance, over features, of the mean vector, so it reads lower.
    """
    return (resid - recon).square().mean((1, 2)) / resid.flatten(1).var(1)


class Moments:
    """Each layer's mean vector and total squared deviation from it, in one pass (Chan et al. 1979)."""

    def __init__(self, n_layers: int, d_model: int):
        self.n_tokens = 0
        self.mean = torch.zeros(n_layers, d_model, dtype=torch.float64)
        self.deviation = torch.zeros(n_layers, dtype=torch.float64)

    def update(self, resid: Float[Tensor, "layer token d_model"]) -> None:
        """Add some tokens."""
        if resid.shape[1]:
            mean = resid.mean(1, dtype=torch.float64)
            # Deviations from a float32 mean lose nothing that the float64 correction below does not give back.
            centred = resid - mean[:, None].to(resid.dtype)
            leftover = centred.mean(1, dtype=torch.float64)
            square = centred.double().square().sum((1, 2)) - resid.shape[1] * leftover.square().sum(1)
            self._combine(resid.shape[1], mean.cpu(), square.cpu())

    def merge(self, other: "Moments") -> None:
        """Add the tokens of another pass."""
        self._combine(other.n_tokens, other.mean, other.deviation)

    def _combine(self, n_tokens: int, mean: Tensor, deviation: Tensor) -> None:
        total = self.n_tokens + n_tokens
        if total:
            delta = mean - self.mean
            self.deviation = self.deviation + deviation + delta.square().sum(1) * self.n_tokens * n_tokens / total
            self.mean = self.mean + delta * n_tokens / total
            self.n_tokens = total

    @property
    def variance(self) -> Float[Tensor, " layer"]:
        """Mean squared entry of `resid - mean`, per layer."""
        return self.deviation / (self.n_tokens * self.mean.shape[1])


@dataclass(frozen=True)
class LayerQuality:
    """How well each layer is reconstructed, over every token seen. Every field is `[layer]`."""

    fvu: Float[Tensor, " layer"]
    """sum |resid - recon|^2 / sum |resid - mean|^2, the ratio of totals over all tokens."""
    mse: Float[Tensor, " layer"]
    """Mean squared error of an entry, in the residual stream's units."""
    cosine: Float[Tensor, " layer"]
    """Mean over tokens of the cosine of resid and recon."""
    norm_ratio: Float[Tensor, " layer"]
    """Mean over tokens of |recon| / |resid|."""
    l0: Float[Tensor, " layer"]
    """Mean number of active latents (value > 0) of a token."""
    l1: Float[Tensor, " layer"]
    """Mean over tokens of the sum of values, in the frame's units."""
    fvu_lawson2024: Float[Tensor, " layer"]
    """Mean over batches of the published definition, masked tokens kept as zeros."""
    mse_lawson2024: Float[Tensor, " layer"]
    """Mean over batches of the batch's mean squared error."""


class ReconstructionSums:
    """Streaming sums behind `LayerQuality`."""

    def __init__(self, n_layers: int, d_model: int):
        self.moments = Moments(n_layers, d_model)
        self.sums = torch.zeros(5, n_layers, dtype=torch.float64)
        self.batch_sums = torch.zeros(2, n_layers, dtype=torch.float64)
        self.n_batches = 0

    def update(
        self,
        resid: Float[Tensor, "layer token d_model"],
        recon: Float[Tensor, "layer token d_model"],
        values: Float[Tensor, "layer token k"],
        *,
        n_masked: int = 0,
    ) -> None:
        """Add one batch of tokens; `n_masked` more were left out, which the published definitions count as zeros."""
        if resid.shape[1] == 0:
            return
        self.moments.update(resid)
        error = (resid - recon).double().square().sum((1, 2))
        norms, recon_norms = resid.norm(dim=-1), recon.norm(dim=-1)
        cosine = torch.nn.functional.cosine_similarity(resid, recon, dim=-1)
        per_token = (
            cosine,
            recon_norms / norms.clamp_min(torch.finfo(norms.dtype).tiny),
            (values > 0).sum(-1),
            values.sum(-1),
        )
        self.sums += torch.stack([error, *(x.double().sum(1) for x in per_token)]).cpu()
        zeros = resid.new_zeros(resid.shape[0], n_masked, resid.shape[2])
        published = torch.cat([resid, zeros], 1), torch.cat([recon, zeros], 1)
        batch = torch.stack([fvu_lawson2024(*published), (published[0] - published[1]).square().mean((1, 2))])
        self.batch_sums += batch.double().cpu()
        self.n_batches += 1

    def merge(self, other: "ReconstructionSums") -> None:
        """Add the tokens of another pass."""
        self.moments.merge(other.moments)
        self.sums += other.sums
        self.batch_sums += other.batch_sums
        self.n_batches += other.n_batches

    def quality(self) -> LayerQuality:
        """The totals, divided once."""
        n_tokens, d_model = self.moments.n_tokens, self.moments.mean.shape[1]
        error, cosine, norm_ratio, l0, l1 = self.sums
        fvu_batches, mse_batches = self.batch_sums / self.n_batches
        return LayerQuality(
            fvu=error / self.moments.deviation,
            mse=error / (n_tokens * d_model),
            cosine=cosine / n_tokens,
            norm_ratio=norm_ratio / n_tokens,
            l0=l0 / n_tokens,
            l1=l1 / n_tokens,
            fvu_lawson2024=fvu_batches,
            mse_lawson2024=mse_batches,
        )


def cross_entropy(log_probs: Float[Tensor, "pos d_vocab"], tokens: Int[Tensor, " pos"]) -> Float[Tensor, ""]:
    """Summed cross-entropy of each next token of one sequence, in nats."""
    return -log_probs[:-1].gather(1, tokens[1:, None]).double().sum()


def kl_divergence(
    clean: Float[Tensor, "*batch d_vocab"], spliced: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """KL(clean, spliced) = sum p_clean ln(p_clean / p_spliced) of two sets of log-probabilities, in nats per position."""
    return (clean.exp() * (clean - spliced)).sum(-1)
