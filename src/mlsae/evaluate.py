"""How good an SAE is on held-out text, layer by layer, in one streaming pass in which nothing is dense."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mlsae.data import TextSource, TokenBlocks
from mlsae.errors import DataError
from mlsae.heldout import open_blocks, open_pair, text_batches, together
from mlsae.intervals import N_SHARDS, Estimate, jackknife, shard_of, with_interval
from mlsae.lm import LanguageModel
from mlsae.metrics import ReconstructionSums, cross_entropy, kl_divergence
from mlsae.reading import Reading, read
from mlsae.sae import MLSAE
from mlsae.shards import (
    SUMS,
    TextShard,
    Whole,
    WrittenShard,
    added_up,
    check_together,
    load_sums,
    save_sums,
    work_on,
    write,
)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured; the names are those of evaluation.json."""

    n_tokens: int
    """Tokens the SAE saw, masked ones not counted."""
    n_spliced_tokens: int
    """Positions over which cross-entropy and KL were measured, masked ones included."""
    layers: list[dict[str, Any]]
    """For each layer: layer, fvu, mse, cosine, norm_ratio, l0, l1, unused_fraction, delta_ce, kl; of an SAE with a
    lens also lens_fvu and lens_mse, which are taken behind it, where the SAE was trained."""
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
    ci95: dict[str, Any]
    """95 % intervals over documents (see intervals.py) of what is in `layers`, `mean`, `all_layers` and `clean_ce`, in the
    same places; NaN where there are too few documents. Shares of latents have none."""
    seconds: float
    """Wall time."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values by field name; a number with an interval is `{"value", "ci95"}`."""
        plain = asdict(self)
        ends = plain.pop("ci95")
        rows = zip(self.layers, ends["layers"], strict=True)
        return plain | {
            "layers": [_with_intervals(row, of_row) for row, of_row in rows],
            **{name: _with_intervals(plain[name], ends[name]) for name in ("mean", "all_layers")},
            "clean_ce": with_interval(self.clean_ce, ends["clean_ce"]),
        }


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

    Under torchrun its processes share out the text, and each returns the same.

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
    reading: dict[str, Any] = {"tokens": tokens, "split": split, "context_length": context_length}
    with together(lm) as mesh:
        part, progress = TextShard.of_rank(mesh), progress and mesh.leads
        pair = mesh.everywhere(lambda: open_pair(sae, lm))
        blocks = mesh.leaders_first(lambda: open_blocks(*pair, data, **reading, progress=progress))
        check_together(mesh, lambda: work_on("evaluate", *pair, blocks, tokens, splice_tokens=splice_tokens))
        mine = mesh.everywhere(
            lambda: evaluation_sums(*pair, blocks, tokens, splice_tokens, shard=part, progress=progress)
        )
        sums = added_up(mesh, mine)
        return mesh.by_leader(lambda: sums.evaluation(pair[0], time.monotonic() - started))


def evaluate_shard(
    sae: MLSAE | str | Path,
    lm: LanguageModel | str | Path,
    data: str | TextSource | TokenBlocks,
    out: str | Path,
    shard: TextShard,
    *,
    tokens: int = 1_000_000,
    splice_tokens: int | None = None,
    split: str | None = None,
    context_length: int | None = None,
    asked: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> WrittenShard:
    """Do one part of what `evaluate` would do, and write its sums under `out` for `merge_evaluation`; see both."""
    started = time.monotonic()
    sae, lm = open_pair(sae, lm)
    blocks = open_blocks(sae, lm, data, tokens=tokens, split=split, context_length=context_length, progress=progress)
    work = work_on("evaluate", sae, lm, blocks, tokens, splice_tokens=splice_tokens)
    sums = evaluation_sums(sae, lm, blocks, tokens, splice_tokens, shard=shard, progress=progress)

    def save(folder: Path) -> None:
        save_sums(folder / SUMS, sums)

    return write(Path(out), shard, work, save, seconds=time.monotonic() - started, asked=asked)


def merge_evaluation(whole: Whole, sae: MLSAE) -> Evaluation:
    """What `evaluate` would have returned, from the shards that `shards.gather` found; `seconds` are those of all of them.

    Raises:
        ModelError: the shards are of another SAE.
        DataError: no token was left after masking.
    """
    started = time.monotonic()
    whole.work.check(sae)
    sums = EvaluationSums(sae)
    for folder in whole.folders:
        sums.merge(load_sums(folder / SUMS, EvaluationSums(sae)))
    return sums.evaluation(sae, whole.seconds + time.monotonic() - started)


def evaluation_sums(
    sae: MLSAE,
    lm: LanguageModel,
    blocks: TokenBlocks,
    tokens: int,
    splice_tokens: int | None,
    *,
    shard: TextShard | None = None,
    progress: bool,
) -> "EvaluationSums":
    """The sums over `tokens` tokens of the blocks, or over one shard of them."""
    sums = EvaluationSums(sae)
    n_spliced = len(blocks) if splice_tokens is None else -(-splice_tokens // blocks.context_length)
    for batch in text_batches(blocks, tokens, desc="evaluate", shard=shard, progress=progress):
        reading, documents = read(lm, sae, batch.tokens), shard_of(batch.documents)
        recon = sums.update_reconstruction(sae, reading, documents)
        if batch.position < n_spliced:
            part = slice(n_spliced - batch.position)
            sums.update_downstream(lm, sae, reading, recon, documents, part)
    return sums


class EvaluationSums:
    """Streaming sums of every metric, over the layers of one SAE, apart for each shard of documents."""

    def __init__(self, sae: MLSAE):
        n_layers = len(sae.layers)
        sizes = (n_layers, sae.config.d_model, N_SHARDS)
        self.reconstruction = ReconstructionSums(*sizes)
        self.lensed = None if sae.lens is None else ReconstructionSums(*sizes)
        self.fired = torch.zeros(n_layers, sae.config.n_latents, dtype=torch.bool, device=sae.W_enc.device)
        self.over_norm = torch.zeros(n_layers, dtype=torch.int64)
        self.losses = torch.zeros(N_SHARDS, n_layers + 2, dtype=torch.float64)
        """Summed cross-entropy: each layer replaced, all replaced, clean."""
        self.kl = torch.zeros(N_SHARDS, n_layers + 1, dtype=torch.float64)
        self.kl_reversed = torch.zeros(n_layers + 1, dtype=torch.float64)
        self.n_predicted = torch.zeros(N_SHARDS, dtype=torch.int64)
        self.n_positions = torch.zeros(N_SHARDS, dtype=torch.int64)
        self.n_sequences = 0

    @torch.no_grad()
    def update_reconstruction(
        self, sae: MLSAE, reading: Reading, shard: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "layer token d_model"]:
        """Add one batch's reconstruction metrics; returns the reconstruction."""
        code, recon = sae(reading.vectors)
        where: dict[str, Any] = {"shard": shard[reading.visible.cpu()], "n_masked": int((~reading.visible).sum())}
        self.reconstruction.update(reading.vectors, recon, code.values, **where)
        if self.lensed is not None:
            self.lensed.update(sae.lensed(reading.vectors), sae.decode_lensed(code), code.values, **where)
        for layer, (values, indices) in enumerate(zip(code.values, code.indices, strict=True)):
            self.fired[layer, indices[values > 1e-3]] = True
        self.over_norm += reading.over_norm.cpu()
        return recon

    @torch.no_grad()
    def update_downstream(
        self,
        lm: LanguageModel,
        sae: MLSAE,
        reading: Reading,
        recon: Float[Tensor, "layer token d_model"],
        shard: Int[Tensor, "batch pos"],
        part: slice,
    ) -> None:
        """Add what the language model loses, on the sequences in `part`, when each layer, and all, are replaced."""
        spliced = reading.resid.clone()
        spliced[:, reading.visible] = recon
        tokens, visible, shard = reading.tokens[part], reading.visible[part], shard[part]
        clean = lm.logits(tokens).float().log_softmax(-1)
        for row in zip(clean, tokens, shard, strict=True):
            self._add_loss(-1, *row)
        for row, layer in enumerate(sae.layers):
            self._compare(row, clean, lm.run_from(spliced[row, part], layer, tokens), tokens, shard)
        replace = {layer: splice_with(sae, layer, visible) for layer in sae.layers}
        self._compare(len(sae.layers), clean, lm.logits(tokens, replace=replace), tokens, shard)
        self.n_predicted += shard[:, 1:].flatten().bincount(minlength=N_SHARDS)
        self.n_positions += shard.flatten().bincount(minlength=N_SHARDS)
        self.n_sequences += len(tokens)

    def merge(self, other: "EvaluationSums") -> "EvaluationSums":
        """Add the tokens of another pass, in place."""
        self.reconstruction.merge(other.reconstruction)
        if self.lensed is not None and other.lensed is not None:
            self.lensed.merge(other.lensed)
        self.fired |= other.fired
        for name in ("over_norm", "losses", "kl", "kl_reversed", "n_predicted", "n_positions"):
            getattr(self, name).add_(getattr(other, name))
        self.n_sequences += other.n_sequences
        return self

    def _compare(self, row: int, clean: Tensor, logits: Tensor, tokens: Tensor, shard: Tensor) -> None:
        """Add one splice: `clean` are the untouched model's log-probabilities, `logits` the spliced one's."""
        for before, after, targets, owner in zip(
            clean, logits, tokens, shard, strict=True
        ):  # one sequence at a time: these are large
            after = after.float().log_softmax(-1)
            self._add_loss(row, after, targets, owner)
            self.kl[:, row].index_add_(0, owner, kl_divergence(before, after).double().cpu())
            self.kl_reversed[row] += kl_divergence(after, before).double().sum().cpu()

    def _add_loss(self, row: int, log_probs: Tensor, tokens: Tensor, shard: Tensor) -> None:
        self.losses[:, row].index_add_(0, shard[1:], cross_entropy(log_probs, tokens).cpu())

    def _reconstructed(self, without: int | None = None) -> dict[str, Float[Tensor, " row"]]:
        """Metrics of the vectors, over all documents or all but one shard's: a row a layer, then their mean."""
        found = {name: x for name, x in vars(self.reconstruction.quality(without)).items() if "lawson2024" not in name}
        if self.lensed is not None:
            behind = self.lensed.quality(without)
            found |= {"lens_fvu": behind.fvu, "lens_mse": behind.mse}
        return {name: torch.cat([x, x.mean(0, keepdim=True)]) for name, x in found.items()}

    def _spliced(self, without: int | None = None) -> dict[str, Float[Tensor, " row"]]:
        """The same of the language model's loss, with a row more: all layers replaced at once. Of clean_ce one row alone."""
        kept = torch.ones(N_SHARDS, dtype=torch.float64)
        if without is not None:
            kept[without] = 0
        ce = kept @ self.losses / (kept @ self.n_predicted.double())
        kl = kept @ self.kl / (kept @ self.n_positions.double())
        return {"delta_ce": _mean_inserted(ce[:-1] - ce[-1]), "kl": _mean_inserted(kl), "clean_ce": ce[-1:]}

    def _estimates(self) -> dict[str, Estimate]:
        """Every metric with its interval, from the shards of documents that it was measured on."""
        vectors = torch.tensor([shard.n_tokens for shard in self.reconstruction.shards])
        found: dict[str, Estimate] = {}
        for numbers, seen in ((self._reconstructed, vectors), (self._spliced, self.n_predicted)):
            without = [numbers(int(shard)) for shard in seen.nonzero()[:, 0]]
            for name, value in numbers().items() if without else ():
                found[name] = jackknife(value, torch.stack([part[name] for part in without]))
        return found

    def evaluation(self, sae: MLSAE, seconds: float) -> Evaluation:
        """The totals, divided once."""
        if self.reconstruction.n_tokens == 0:
            raise DataError("data", "no token is left after masking; use longer text")
        estimates = self._estimates()
        rows, mean, all_layers = len(sae.layers), len(sae.layers), len(sae.layers) + 1
        clean = estimates.pop("clean_ce", None)
        values = {name: found.value.tolist() for name, found in estimates.items()}
        ends = {name: torch.stack([x.low, x.high], 1).tolist() for name, x in estimates.items()}
        unused = (~self.fired).float().mean(1).tolist()
        values["unused_fraction"] = [*unused, sum(unused) / rows]
        published = self._published()
        return Evaluation(
            n_tokens=self.reconstruction.n_tokens,
            n_spliced_tokens=int(self.n_positions.sum()),
            layers=[{"layer": layer, **_row(values, row)} for row, layer in enumerate(sae.layers)],
            mean=_row(values, mean),
            all_layers=_row(values, all_layers),
            clean_ce=float(clean.value) if clean is not None else math.nan,
            dead_fraction=float((~self.fired.any(0)).float().mean()),
            masked_by_norm=self.over_norm.tolist(),
            lawson2024={
                "layers": [{"layer": layer, **_row(published, row)} for row, layer in enumerate(sae.layers)],
                "mean": _row(published, mean),
            },
            ci95={
                "layers": [_row(ends, row) for row in range(rows)],
                "mean": _row(ends, mean),
                "all_layers": _row(ends, all_layers),
                "clean_ce": [float(clean.low), float(clean.high)] if clean is not None else [math.nan, math.nan],
            },
            seconds=seconds,
        )

    def _published(self) -> dict[str, list[float]]:
        """The published definitions: a row a layer, then their mean. With a lens, the published code stays behind it."""
        quality = (self.reconstruction if self.lensed is None else self.lensed).quality()
        found = {"fvu": quality.fvu_lawson2024, "mse": quality.mse_lawson2024}
        if self.n_sequences:
            found["kl"] = self.kl_reversed[:-1] / self.n_sequences
        return {name: [*x.tolist(), float(x.mean())] for name, x in found.items()}


def splice_with(sae: MLSAE, layer: int, visible: Bool[Tensor, "batch pos"]) -> Callable[[Tensor], Tensor]:
    """A function that replaces a layer's visible residual vectors by the SAE's reconstruction of what flows there."""

    def splice(resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        resid = resid.clone()
        resid[visible] = sae.decode(sae.encode(resid[visible][None], layers=[layer]))[0]
        return resid

    return splice


def _mean_inserted(x: Float[Tensor, " row"]) -> Float[Tensor, " _"]:
    """The mean over layers, put between them and the last row, all layers at once."""
    return torch.cat([x[:-1], x[:-1].mean(0, keepdim=True), x[-1:]])


def _row(columns: Mapping[str, Sequence[Any]], row: int) -> dict[str, Any]:
    """One row of every column that is so long."""
    return {name: column[row] for name, column in columns.items() if row < len(column)}


def _with_intervals(values: Mapping[str, Any], ends: Mapping[str, Any]) -> dict[str, Any]:
    return {name: with_interval(x, ends[name]) if name in ends else x for name, x in values.items()}
