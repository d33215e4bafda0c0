"""Each metric, defined once: a pure function, or streaming sums with `update` and `merge` whose totals are divided once.

Sums are float64 and counts int64, so results do not depend on batch size, token order or how the work was sharded.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mlsae.intervals import check_shards


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
    """Streaming sums behind `LayerQuality`, apart for each shard of documents."""

    def __init__(self, n_layers: int, d_model: int, n_shards: int = 1):
        self.shards = [Moments(n_layers, d_model) for _ in range(n_shards)]
        self.sums = torch.zeros(n_shards, 5, n_layers, dtype=torch.float64)
        self.batch_sums = torch.zeros(2, n_layers, dtype=torch.float64)
        self.n_batches = 0

    @property
    def n_tokens(self) -> int:
        """Tokens seen."""
        return sum(shard.n_tokens for shard in self.shards)

    def update(
        self,
        resid: Float[Tensor, "layer token d_model"],
        recon: Float[Tensor, "layer token d_model"],
        values: Float[Tensor, "layer token k"],
        *,
        shard: Int[Tensor, " token"] | None = None,
        n_masked: int = 0,
    ) -> None:
        """Add one batch of tokens.

        Args:
            shard: the shard of each token's document; None: all of the first.
            n_masked: how many more were left out, which the published definitions count as zeros.
        """
        if resid.shape[1] == 0:
            return
        shard = check_shards(shard, resid.shape[1], len(self.shards))
        for s in shard.unique().tolist():
            self.shards[s].update(resid if len(self.shards) == 1 else resid[:, (shard == s).to(resid.device)])
        norms, recon_norms = resid.norm(dim=-1), recon.norm(dim=-1)
        per_token = (
            (resid - recon).double().square().sum(-1),
            torch.nn.functional.cosine_similarity(resid, recon, dim=-1),
            recon_norms / norms.clamp_min(torch.finfo(norms.dtype).tiny),
            (values > 0).sum(-1),
            values.sum(-1),
        )
        self.sums.index_add_(0, shard, torch.stack([x.double() for x in per_token]).cpu().permute(2, 0, 1))
        zeros = resid.new_zeros(resid.shape[0], n_masked, resid.shape[2])
        published = torch.cat([resid, zeros], 1), torch.cat([recon, zeros], 1)
        batch = torch.stack([fvu_lawson2024(*published), (published[0] - published[1]).square().mean((1, 2))])
        self.batch_sums += batch.double().cpu()
        self.n_batches += 1

    def merge(self, other: "ReconstructionSums") -> "ReconstructionSums":
        """Add the tokens of another pass, in place."""
        for mine, theirs in zip(self.shards, other.shards, strict=True):
            mine.merge(theirs)
        self.sums += other.sums
        self.batch_sums += other.batch_sums
        self.n_batches += other.n_batches
        return self

    def moments(self, without: int | None = None) -> Moments:
        """Those of all documents, or of all but one shard's."""
        whole = Moments(*self.shards[0].mean.shape)
        for s, shard in enumerate(self.shards):
            if s != without:
                whole.merge(shard)
        return whole

    def quality(self, without: int | None = None) -> LayerQuality:
        """The totals, divided once; of all documents, or of all but one shard's."""
        moments = self.moments(without)
        sums = self.sums.sum(0) if without is None else self.sums.sum(0) - self.sums[without]
        error, cosine, norm_ratio, l0, l1 = sums
        fvu_batches, mse_batches = self.batch_sums / self.n_batches
        return LayerQuality(
            fvu=error / moments.deviation,
            mse=error / (moments.n_tokens * moments.mean.shape[1]),
            cosine=cosine / moments.n_tokens,
            norm_ratio=norm_ratio / moments.n_tokens,
            l0=l0 / moments.n_tokens,
            l1=l1 / moments.n_tokens,
            fvu_lawson2024=fvu_batches,
            mse_lawson2024=mse_batches,
        )


def cross_entropy(log_probs: Float[Tensor, "pos d_vocab"], tokens: Int[Tensor, " pos"]) -> Float[Tensor, " _"]:
    """Cross-entropy of each next token of one sequence, in nats: entry i is that of token i + 1."""
    return -log_probs[:-1].gather(1, tokens[1:, None])[:, 0].double()


def kl_divergence(
    clean: Float[Tensor, "*batch d_vocab"], spliced: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """KL(clean, spliced) = sum p_clean ln(p_clean / p_spliced) of two sets of log-probabilities, in nats per position."""
    return (clean.exp() * (clean - spliced)).sum(-1)
