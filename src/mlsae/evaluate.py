"""How good an SAE is on held-out text, layer by layer, in one streaming pass in which nothing is dense."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mlsae.data import TextSource, TokenBlocks, pack
from mlsae.errors import ConfigError, DataError
from mlsae.lm import LanguageModel
from mlsae.metrics import ReconstructionSums, cross_entropy, kl_divergence
from mlsae.reading import Reading, check_pair, read
from mlsae.reporting import bar
from mlsae.sae import MLSAE

BATCH_TOKENS = 2048
"""Tokens of one batch; the published code's metrics are means over batches of this many."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured; the names are those of evaluation.json."""

    n_tokens: int
    """Tokens the SAE saw, masked ones not counted."""
    n_spliced_tokens: int
    """Positions over which cross-entropy and KL were measured, masked ones included."""
    layers: list[dict[str, Any]]
    """For each layer: layer, fvu, mse, cosine, norm_ratio, l0, l1, unused_fraction, delta_ce, kl."""
    mean: dict[str, float]
    """The unweighted mean over layers of each of these."""
    all_layers: dict[str, float]
    """delta_ce and kl when every layer is replaced in one pass, each reading what the replaced ones before it made."""
    clean_ce: float
    """Cross-entropy of the untouched language model, nats per predicted token."""
    dead_fraction: float
    """Share of latents never above 1e-3 at any layer on these tokens."""
    masked_by_norm: list[int]
    """Vectors left out for their norm, per layer."""
    lawson2024: dict[str, Any]
    """The published definitions where they differ: `layers` and `mean` of fvu, mse, kl."""
    seconds: float
    """Wall time."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values by field name."""
        return asdict(self)


def evaluate(
    sae: MLSAE | str | Path,
    lm: LanguageModel | str | Path,
    data: str | TextSource | TokenBlocks,
    *,
    tokens: int = 1_000_000,
    splice_tokens: int | None = None,
    split: str | None = None,
    context_length: int | None = None,
    progress: bool = True,
) -> Evaluation:
    """Reconstruction and downstream quality of `sae` on text.

    Args:
        tokens: tokens to read (or all there are, if fewer).
        splice_tokens: of these, how many also measure cross-entropy and KL, which costs half a pass a layer; None: all.
        split: part of the data; None: the held-out part of the text it was trained on, all of any other.
        context_length: tokens in a sequence; None: 2048 or the language model's limit.

    Raises:
        ModelError: the SAE was trained on another language model.
        DataError: there is no text, or none is left after masking.
    """
    started = time.monotonic()
    sae, lm = open_pair(sae, lm)
    blocks = open_blocks(sae, lm, data, tokens=tokens, split=split, context_length=context_length, progress=progress)
    sums = EvaluationSums(sae)
    spliced = 0
    for batch in token_batches(blocks, tokens, desc="evaluate", progress=progress):
        reading = read(lm, sae, batch)
        recon = sums.update_reconstruction(sae, reading)
        if splice_tokens is None or spliced < splice_tokens:
            part = slice(None) if splice_tokens is None else slice(-(-(splice_tokens - spliced) // batch.shape[1]))
            sums.update_downstream(lm, sae, reading, recon, part)
            spliced += reading.tokens[part].numel()
    return sums.evaluation(sae, time.monotonic() - started)


def open_pair(sae: MLSAE | str | Path, lm: LanguageModel | str | Path) -> tuple[MLSAE, LanguageModel]:
    """Both, loaded if they are names, on the same device, and fitting each other."""
    if not isinstance(sae, MLSAE):
        sae = MLSAE.from_pretrained(sae)
    if not isinstance(lm, LanguageModel):
        lm = LanguageModel.from_pretrained(lm, separator_token=sae.config.separator_token)
    check_pair(lm, sae)
    return sae.to(lm.device).eval(), lm


def open_blocks(
    sae: MLSAE,
    lm: LanguageModel,
    data: str | TextSource | TokenBlocks,
    *,
    tokens: int,
    split: str | None,
    context_length: int | None,
    progress: bool,
) -> TokenBlocks:
    """Token blocks of the text to judge by: held out from training unless another split is named.

    All of the text is packed, so that `tokens` of it are an even sample, but of a stream no more than `tokens`.
    """
    if isinstance(data, TokenBlocks):
        if (theirs := data.info.tokenizer_fingerprint) != (ours := lm.tokenizer.fingerprint):
            raise DataError("data", f"was packed with tokenizer {theirs[:12]}; {lm.name} has {ours[:12]}; pack it anew")
        return data
    limit = lm.context_length or BATCH_TOKENS
    length = min(BATCH_TOKENS, limit) if context_length is None else context_length
    if length < 2:
        raise ConfigError("context_length", f"{length}; at least 2 tokens are needed to predict one")
    if length > limit:
        raise ConfigError("context_length", f"{length} exceeds the model's {limit}; lower it")
    if isinstance(data, str):
        data = TextSource(data, held_out_split(sae, data) if split is None else split)
    return pack(data, lm.tokenizer, length, max_tokens=tokens if data.streaming else None, progress=progress)


def held_out_split(sae: MLSAE, data: str) -> str:
    """`test` for the text the SAE was trained on and for data that names such a split, else `all`."""
    trained_on = sae.config.data is not None and Path(sae.config.data).resolve() == Path(data).resolve()
    return "test" if trained_on or "test" in TextSource(data).named_splits() else "all"


def token_batches(blocks: TokenBlocks, tokens: int, *, desc: str, progress: bool) -> Iterator[Int[Tensor, "batch pos"]]:
    """`tokens` tokens of the blocks, in a fixed shuffled order, each block once."""
    n_blocks = min(len(blocks), max(1, tokens // blocks.context_length))
    size = max(1, BATCH_TOKENS // blocks.context_length)

    def batches() -> Iterator[tuple[int, Tensor]]:
        for position in range(0, n_blocks, size):
            batch = blocks.read(position, min(size, n_blocks - position))
            yield batch.numel(), batch

    return bar(batches(), total=n_blocks * blocks.context_length, desc=desc, progress=progress)


class EvaluationSums:
    """Streaming sums of every metric, over the layers of one SAE."""

    def __init__(self, sae: MLSAE):
        n_layers = len(sae.layers)
        self.reconstruction = ReconstructionSums(n_layers, sae.config.d_model)
        self.fired = torch.zeros(n_layers, sae.config.n_latents, dtype=torch.bool, device=sae.W_enc.device)
        self.over_norm = torch.zeros(n_layers, dtype=torch.int64)
        self.losses = torch.zeros(n_layers + 2, dtype=torch.float64)
        """Summed cross-entropy: each layer replaced, all replaced, clean."""
        self.kl = torch.zeros(n_layers + 1, dtype=torch.float64)
        self.kl_reversed = torch.zeros(n_layers + 1, dtype=torch.float64)
        self.n_predicted, self.n_positions, self.n_sequences = 0, 0, 0

    @torch.no_grad()
    def update_reconstruction(self, sae: MLSAE, reading: Reading) -> Float[Tensor, "layer token d_model"]:
        """Add one batch's reconstruction metrics; returns the reconstruction."""
        code, recon = sae(reading.vectors)
        self.reconstruction.update(reading.vectors, recon, code.values, n_masked=int((~reading.visible).sum()))
        for layer, (values, indices) in enumerate(zip(code.values, code.indices, strict=True)):
            self.fired[layer, indices[values > 1e-3]] = True
        self.over_norm += reading.over_norm.cpu()
        return recon

    @torch.no_grad()
    def update_downstream(
        self, lm: LanguageModel, sae: MLSAE, reading: Reading, recon: Float[Tensor, "layer token d_model"], part: slice
    ) -> None:
        """Add what the language model loses, on the sequences in `part`, when each layer, and all, are replaced."""
        spliced = reading.resid.clone()
        spliced[:, reading.visible] = recon
        tokens, visible = reading.tokens[part], reading.visible[part]
        clean = lm.logits(tokens).float().log_softmax(-1)
        self.losses[-1] += sum(cross_entropy(*pair).cpu() for pair in zip(clean, tokens, strict=True))
        for row, layer in enumerate(sae.layers):
            self._compare(row, clean, lm.run_from(spliced[row, part], layer, tokens), tokens)
        replace = {layer: splice_with(sae, layer, visible) for layer in sae.layers}
        self._compare(len(sae.layers), clean, lm.logits(tokens, replace=replace), tokens)
        self.n_predicted += tokens[:, 1:].numel()
        self.n_positions += tokens.numel()
        self.n_sequences += len(tokens)

    def _compare(self, row: int, clean: Tensor, logits: Tensor, tokens: Tensor) -> None:
        """Add one splice: `clean` are the untouched model's log-probabilities, `logits` the spliced one's."""
        for before, after, targets in zip(
            clean, logits, tokens, strict=True
        ):  # one sequence at a time: these are large
            after = after.float().log_softmax(-1)
            self.losses[row] += cross_entropy(after, targets).cpu()
            self.kl[row] += kl_divergence(before, after).double().sum().cpu()
            self.kl_reversed[row] += kl_divergence(after, before).double().sum().cpu()

    def evaluation(self, sae: MLSAE, seconds: float) -> Evaluation:
        """The totals, divided once."""
        n_tokens = self.reconstruction.moments.n_tokens
        if n_tokens == 0:
            raise DataError("data", "no token is left after masking; use longer text")
        quality = {name: column.tolist() for name, column in vars(self.reconstruction.quality()).items()}
        published = {
            name.removesuffix("_lawson2024"): quality.pop(name) for name in list(quality) if "lawson2024" in name
        }
        quality["unused_fraction"] = (~self.fired).float().mean(1).tolist()
        ce = (self.losses / max(1, self.n_predicted)).tolist()
        kl = (self.kl / max(1, self.n_positions)).tolist()
        downstream: dict[str, float] = {}
        if self.n_predicted:
            quality["delta_ce"], quality["kl"] = [loss - ce[-1] for loss in ce[:-2]], kl[:-1]
            published["kl"] = (self.kl_reversed[:-1] / self.n_sequences).tolist()
            downstream = {"delta_ce": ce[-2] - ce[-1], "kl": kl[-1]}
        return Evaluation(
            n_tokens=n_tokens,
            n_spliced_tokens=self.n_positions,
            layers=_by_layer(sae, quality),
            mean=_means(quality),
            all_layers=downstream,
            clean_ce=ce[-1] if self.n_predicted else float("nan"),
            dead_fraction=float((~self.fired.any(0)).float().mean()),
            masked_by_norm=self.over_norm.tolist(),
            lawson2024={"layers": _by_layer(sae, published), "mean": _means(published)},
            seconds=seconds,
        )


def splice_with(sae: MLSAE, layer: int, visible: Bool[Tensor, "batch pos"]) -> Callable[[Tensor], Tensor]:
    """A function that replaces a layer's visible residual vectors by the SAE's reconstruction of what flows there."""

    def splice(resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        resid = resid.clone()
        resid[visible] = sae.decode(sae.encode(resid[visible][None], layers=[layer]))[0]
        return resid

    return splice


def _by_layer(sae: MLSAE, columns: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [
        {"layer": layer, **{name: column[row] for name, column in columns.items()}}
        for row, layer in enumerate(sae.layers)
    ]


def _means(columns: dict[str, list[float]]) -> dict[str, float]:
    return {name: sum(column) / len(column) for name, column in columns.items()}
