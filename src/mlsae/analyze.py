"""Read the layers of an SAE: where its latents live over much text, and on one prompt."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mlsae import files
from mlsae.analysis.directions import Pairs, compare_pairs
from mlsae.analysis.examples import Examples
from mlsae.analysis.geometry import AdjacentSimilarity, ResidMeans
from mlsae.analysis.latents import save_latents
from mlsae.analysis.layers import LayerStatistics
from mlsae.analysis.summary import headlines, nested, summarise
from mlsae.analysis.sums import AnalysisSums, analysis_sums
from mlsae.analysis.vocabulary import Words, words_of
from mlsae.data import TextSource, TokenBlocks
from mlsae.heldout import open_blocks, open_pair, together
from mlsae.lm import LanguageModel
from mlsae.mesh import ALONE, Mesh
from mlsae.reading import read
from mlsae.sae import MLSAE
from mlsae.shards import TextShard, Whole, WrittenShard, check_together, work_on, write
from mlsae.tokens import Tokenizer

PROMPT = "When Mary and John went to the store, John gave a drink to"
"""The published prompt (Lawson et al. 2024, figures of single prompts)."""


@dataclass(frozen=True)
class PromptActivity:
    """What one prompt switches on."""

    prompt: str
    """The text."""
    tokens: list[str]
    """Its tokens as a person reads them."""
    visible: Bool[Tensor, " pos"]
    """Positions the SAE sees; the others are left out of `mass`."""
    mass: Float[Tensor, "layer n_latents"]
    """Summed activation of each latent at each layer, over visible positions."""
    by_position: Float[Tensor, "layer pos"]
    """Summed activation of all latents at each layer and position, masked ones included."""

    @property
    def masked_share(self) -> float:
        """Share of all activation that sits at masked positions (special tokens, the first position)."""
        return float(self.by_position[:, ~self.visible].sum() / self.by_position.sum())


@dataclass(frozen=True)
class Analysis:
    """What `analyze` found; `save` writes it down, `summary` is its summary.json."""

    layers: tuple[int, ...]
    """Model layers, in the order of every layer axis here."""
    statistics: LayerStatistics
    """Sums over all tokens, apart for each shard of documents."""
    nulls: Mapping[str, LayerStatistics]
    """The same of codes in which depth means nothing (see analysis.nulls); empty if not asked for."""
    means: ResidMeans
    """Mean vectors and norms of the residual stream, of an SAE with a lens behind it."""
    similarity: AdjacentSimilarity
    """Cosine of adjacent layers, in the same place."""
    pairs: Pairs | None
    """Decoder rows against each other; None if not asked for."""
    words: Words | None
    """Decoder rows against the language model's embeddings; None if not asked for."""
    examples: Examples | None
    """What each latent responds to at each layer; None if not asked for."""
    blocks: TokenBlocks
    """The text."""
    prompt: PromptActivity
    """One prompt."""
    masked_by_norm: list[int]
    """Vectors left out for their norm, per layer."""
    seconds: float
    """Wall time."""
    tokenizer: Tokenizer | None = None
    """Turns the tokens of examples into words."""

    @cached_property
    def _depth(self) -> dict[str, Any]:
        """The depth statistics with their intervals, and those of the nulls: worked out once."""
        nulls = {name: nested(_plain(headlines(found))) for name, found in self.nulls.items()}
        return {**summarise(self.statistics), "nulls": nulls}

    def summary(self) -> dict[str, Any]:
        """The numbers, by the names of summary.json."""
        return {
            "n_tokens": self.statistics.n_tokens,
            "layers": list(self.layers),
            **self._depth,
            "directions": {
                "pairs": self.pairs.to_dict() if self.pairs else None,
                **(self.words.to_dict() if self.words else {}),
            },
            "unused_fraction": self.statistics.unused_fraction().tolist(),
            "masked_by_norm": self.masked_by_norm,
            "prompt": {"text": self.prompt.prompt, "masked_share": self.prompt.masked_share},
            "seconds": self.seconds,
        }

    to_dict = summary

    def save(self, directory: str | Path, *, progress: bool = False) -> None:
        """Write every number, table and example that was found and, last, summary.json: without it, it is not whole.

        layers.safetensors (the sums over all documents), profile.safetensors (intervals of P(layer | latent), where there
        are documents enough), latents.parquet (a row a latent), examples.parquet, prompt.safetensors, similarity.json.
        """
        directory = Path(directory)
        files.remove(directory / "summary.json")
        self.statistics.whole().save(directory / "layers.safetensors")
        profile = self.statistics.profile_interval(progress=progress)
        if profile is None:
            files.remove(directory / "profile.safetensors")
        else:
            files.save_tensors(directory / "profile.safetensors", dict(zip(("low", "high"), profile, strict=True)))
        save_latents(directory / "latents.parquet", self.statistics, self.pairs, self.words)
        prompt = {"mass": self.prompt.mass, "by_position": self.prompt.by_position, "visible": self.prompt.visible}
        files.save_tensors(directory / "prompt.safetensors", prompt)
        files.write_json(directory / "similarity.json", {"resid": self.means.to_dict(), **self.similarity.to_dict()})
        if self.examples is None:
            files.remove(directory / "examples.parquet")
        else:
            self.examples.save(directory / "examples.parquet", self.blocks, self.layers, progress=progress)
        files.write_json(directory / "summary.json", self.summary())

    def context(self, latent: int) -> tuple[int, str, str, str] | None:
        """Where a latent was most active: the layer, and the words before, there and after; None if that was not kept."""
        if self.examples is None or self.tokenizer is None:
            return None
        found = self.examples.strongest(latent, self.blocks)
        if found is None:
            return None
        row, tokens, centre = found
        words = self.tokenizer.strings(tokens)
        return self.layers[row], "".join(words[:centre]), words[centre], "".join(words[centre + 1 :])


def analyze(
    sae: MLSAE | str | Path,
    lm: LanguageModel | str | Path,
    data: str | TextSource | TokenBlocks,
    *,
    tokens: int = 10_000_000,
    split: str | None = None,
    context_length: int | None = None,
    prompt: str = PROMPT,
    nulls: bool = True,
    directions: bool = True,
    examples: int = 32,
    progress: bool = True,
) -> Analysis:
    """Stream text through the language model and the SAE, adding up where in depth its latents are active.

    Under torchrun its processes share out the text, and each returns the same; what takes the weights alone is done by one.

    Args:
        tokens: tokens to read (or all there are, if fewer).
        split: part of the data; None: the held-out part of the text it was trained on, all of any other.
        context_length: tokens in a sequence; None: 2048 or the language model's limit.
        prompt: the text of the single-prompt heatmap.
        nulls: also add up codes in which depth means nothing.
        directions: also compare decoder rows with each other and with embeddings, which grows with n_latents^2.
        examples: strongest contexts to keep for every latent and layer, and half as many drawn at random; 0: none.

    Raises:
        ModelError: the SAE was trained on another language model.
        DataError: there is no text, or none is left after masking.
    """
    started = time.monotonic()
    reading: dict[str, Any] = {"tokens": tokens, "split": split, "context_length": context_length}
    kept: dict[str, Any] = {"nulls": nulls, "examples": examples}
    with together(lm) as mesh:
        progress = progress and mesh.leads
        pair = mesh.everywhere(lambda: open_pair(sae, lm))
        activity = mesh.by_leader(lambda: prompt_activity(*pair, prompt))  # first: unreadable, it must not cost hours
        blocks = mesh.leaders_first(lambda: open_blocks(*pair, data, **reading, progress=progress))
        check_together(mesh, lambda: work_on("analyze", *pair, blocks, tokens, **kept))
        sums = analysis_sums(*pair, blocks, tokens, **kept, mesh=mesh, progress=progress)
        rest: dict[str, Any] = {"directions": directions, "started": started, "mesh": mesh, "progress": progress}
        return _analysis(*pair, blocks, sums, activity, **rest)


def analyze_shard(
    sae: MLSAE | str | Path,
    lm: LanguageModel | str | Path,
    data: str | TextSource | TokenBlocks,
    out: str | Path,
    shard: TextShard,
    *,
    tokens: int = 10_000_000,
    split: str | None = None,
    context_length: int | None = None,
    prompt: str = PROMPT,
    nulls: bool = True,
    directions: bool = True,
    examples: int = 32,
    asked: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> WrittenShard:
    """Do one part of what `analyze` would do, and write its sums under `out` for `merge_analysis`; see both."""
    started = time.monotonic()
    sae, lm = open_pair(sae, lm)
    prompt_activity(sae, lm, prompt)  # a prompt that cannot be read must not wait for the merge
    blocks = open_blocks(sae, lm, data, tokens=tokens, split=split, context_length=context_length, progress=progress)
    options = {"prompt": prompt, "nulls": nulls, "directions": directions, "examples": examples}
    work = work_on("analyze", sae, lm, blocks, tokens, **options)
    sums = analysis_sums(sae, lm, blocks, tokens, nulls=nulls, examples=examples, shard=shard, progress=progress)

    def save(folder: Path) -> None:
        sums.save(folder, blocks)

    return write(Path(out), shard, work, save, seconds=time.monotonic() - started, asked=asked)


def merge_analysis(
    whole: Whole,
    sae: MLSAE | str | Path,
    lm: LanguageModel | str | Path,
    data: str | TextSource | TokenBlocks,
    *,
    split: str | None = None,
    progress: bool = True,
) -> Analysis:
    """What `analyze` would have returned, from the shards that `shards.gather` found; `seconds` are those of all of them.

    Raises:
        ModelError: the shards are of another SAE or language model.
        DataError: the shards are of another text.
    """
    started = time.monotonic() - whole.seconds
    sae, lm = open_pair(sae, lm)
    work, options = whole.work, whole.work.options
    reading: dict[str, Any] = {"tokens": work.tokens, "context_length": work.context_length, "split": split}
    blocks = open_blocks(sae, lm, data, **reading, progress=progress)
    work.check(sae, lm, blocks)
    kept: dict[str, Any] = {"nulls": options["nulls"], "examples": options["examples"]}
    parts = (AnalysisSums.load(folder, sae, blocks.context_length, **kept) for folder in whole.folders)
    sums = next(parts)
    for part in parts:
        sums.merge(part)
    activity = prompt_activity(sae, lm, str(options["prompt"]))
    directions = bool(options["directions"])
    return _analysis(sae, lm, blocks, sums, activity, directions=directions, started=started, progress=progress)


def _analysis(
    sae: MLSAE,
    lm: LanguageModel,
    blocks: TokenBlocks,
    sums: AnalysisSums,
    activity: PromptActivity,
    *,
    directions: bool,
    started: float,
    mesh: Mesh = ALONE,
    progress: bool,
) -> Analysis:
    """The sums, and what takes the weights alone."""

    def of_weights() -> tuple[Pairs | None, Words | None, float]:
        if not directions:
            return None, None, time.monotonic() - started
        pairs = _pairs(sae, sums.statistics.distribution().centre_of_mass, progress=progress)
        return pairs, words_of(sae, lm, progress=progress), time.monotonic() - started

    pairs, words, seconds = mesh.by_leader(of_weights)
    return Analysis(
        layers=sae.layers,
        statistics=sums.statistics,
        nulls=sums.nulls.statistics if sums.nulls is not None else {},
        means=sums.similarity.means,
        similarity=sums.similarity,
        pairs=pairs,
        words=words,
        examples=sums.examples,
        blocks=blocks,
        prompt=activity,
        masked_by_norm=sums.over_norm.tolist(),
        seconds=seconds,
        tokenizer=lm.tokenizer,
    )


def _pairs(sae: MLSAE, centre_of_mass: Float[Tensor, " n_latents"], *, progress: bool) -> Pairs:
    """Decoder rows against each other, by difference of depth up to 5 layers or as many as there are."""
    max_gap = min(5.0, max(1.0, len(sae.layers) - 1.0))
    return compare_pairs(sae.W_dec, centre_of_mass, max_gap=max_gap, progress=progress)


@torch.no_grad()
def prompt_activity(sae: MLSAE, lm: LanguageModel, prompt: str) -> PromptActivity:
    """What one prompt switches on, summed over its positions."""
    reading = read(lm, sae, lm.tokenize(prompt))
    code = sae.encode(reading.resid[:, 0])
    visible = reading.visible[0]
    mass = torch.zeros(len(sae.layers), sae.config.n_latents, dtype=torch.float64)
    values, indices = (x[:, visible].flatten(1).cpu() for x in (code.values, code.indices))
    mass.scatter_add_(1, indices, values.double())
    tokens = lm.tokenizer.strings(reading.tokens[0].tolist())
    return PromptActivity(prompt, tokens, visible.cpu(), mass, code.values.sum(-1).double().cpu())


def _plain(numbers: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: x.tolist() for name, x in numbers.items()}
