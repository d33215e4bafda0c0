"""An analysis as files that Neuronpedia imports: for each layer a source with its latents and their contexts, as gzipped jsonl.

`MODEL/LAYER-SET/{release,model,sourceset,source}.jsonl`, `features/batch-N.jsonl.gz`, `activations/batch-N.jsonl.gz`, with
the keys of its db_models. There is no axis of layers there: latent j is feature j of every source that has it.
(hijohnnylin/neuronpedia, utils/neuronpedia-utils, convert-saedashboard-to-neuronpedia-export.py.)
"""

import contextlib
import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mlsae import files
from mlsae.analysis.directions import blocks
from mlsae.analysis.example_file import read_about, read_all
from mlsae.analysis.example_rows import Example
from mlsae.analysis.layers import LayerStatistics
from mlsae.downstream import chosen
from mlsae.errors import ConfigError, ModelError
from mlsae.heldout import open_pair
from mlsae.lm import LanguageModel
from mlsae.sae import MLSAE

LATENTS_A_FILE = 512
WORDS, BARS = 10, 40
"""Tokens that a latent promotes, and as many that it suppresses; bars of a histogram."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""What may stand in a path and in a web address."""
EMPTY = (
    *("topkCosSimIndices", "topkCosSimValues", "neuron_alignment_indices", "neuron_alignment_values"),
    *("neuron_alignment_l1", "correlated_neurons_indices", "correlated_neurons_pearson", "correlated_neurons_l1"),
    *("correlated_features_indices", "correlated_features_pearson", "correlated_features_l1", "decoder_weights_dist"),
)
"""Lists of a feature that nothing here fills."""
UNKNOWN = ("dataSource", "dataIndex", "dfaTargetIndex", "dfaMaxValue", "logitContributions", "zIndices", "zValues")
"""The same of an activation."""


@dataclass(frozen=True)
class Names:
    """What Neuronpedia calls things, which no SAE knows."""

    creator_id: str
    """Your id there."""
    creator: str
    """Your name."""
    release: str
    """Of all sources together: letters, digits, `.`, `_` and `-`, as are the next two."""
    source_set: str
    """A source is called `LAYER-SET`."""
    model: str
    """The language model as Neuronpedia (and TransformerLens) calls it."""

    def __post_init__(self) -> None:
        for name in ("release", "source_set", "model"):
            if not NAME.fullmatch(value := getattr(self, name)):
                raise ConfigError(name, f"'{value}' given; letters, digits, '.', '_' and '-' may stand in it")
        if not (self.creator_id and self.creator):
            raise ConfigError("creator_id", "empty; give your id on Neuronpedia, and a name as creator")


@dataclass(frozen=True)
class Exported:
    """What was written."""

    directory: str
    sources: list[str]
    """A folder `MODEL/LAYER-SET` for each layer."""
    n_features: int
    n_activations: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values by name."""
        return asdict(self)


@dataclass(frozen=True)
class Words:
    """What the directions of latents do to the logits."""

    promoted: Int[Tensor, "latent word"]
    promoted_logits: Float[Tensor, "latent word"]
    suppressed: Int[Tensor, "latent word"]
    suppressed_logits: Float[Tensor, "latent word"]
    heights: Int[Tensor, "latent bar"]
    """Tokens of the vocabulary in equal bars from a latent's least logit to its largest."""
    centres: Float[Tensor, "latent bar"]


def write_export(
    sae: MLSAE | str | Path,
    lm: LanguageModel | str | Path,
    analysis: str | Path,
    out: str | Path,
    names: Names,
    *,
    layers: Sequence[int] | None = None,
    data: str | None = None,
    progress: bool = True,
) -> Exported:
    """Write what `analyze` saved, statistics and examples, to the new folder `out`, in memory a latent at a time.

    A feature's `vector` is what one unit of its activation adds to the residual stream; of frame `vector`, before that vector's
    own deviation. Its logits are those of `LanguageModel.logits_along`. The histogram of activations is of the sample that the
    analysis kept, scaled to their number.

    Args:
        analysis: the folder that `mlsae analyze` wrote.
        layers: of the language model; None: all the SAE's.
        data: name of the text; None: that of the SAE's training.

    Raises:
        ConfigError: a layer that the SAE does not read.
        ModelError: the analysis is not there, not whole, or of another SAE or language model.
        ResourceError: `out` is a folder that holds something.
    """
    analysis, out = Path(analysis), Path(out)
    files.probe_empty(out)
    sae, lm = open_pair(sae, lm)
    layers = chosen(sae, layers)
    statistics, context_length = _opened(analysis, sae, lm)
    text = {"dataset": sae.config.data if data is None else data, "num_tokens_in_prompt": context_length}
    text["num_prompts"] = statistics.n_tokens // context_length
    made = datetime.now(UTC).replace(tzinfo=None).isoformat(timespec="milliseconds")
    sources = [_Source(names, sae, layer, statistics, made) for layer in layers]
    strings = _Strings(lm)
    words = _words(sae.W_dec.detach(), lm, progress=progress)
    examples = _by_latent(analysis / "examples.parquet", sae.config.n_latents)
    with files.staged_directory(out) as staged:
        for source in sources:
            source.write_about(staged, text)
        for at in blocks(sae.config.n_latents, LATENTS_A_FILE, "features", progress=progress):
            _write_batch(staged, sources, at, examples, words, strings)
    n_features = sum(len(source.latents) for source in sources)
    n_activations = sum(source.n_activations for source in sources)
    return Exported(str(out), [f"{names.model}/{source.id}" for source in sources], n_features, n_activations)


def _write_batch(
    folder: Path,
    sources: "list[_Source]",
    at: slice,
    examples: Iterator[list[Example]],
    words: Words,
    strings: "_Strings",
) -> None:
    """A file of features and one of activations for every source."""
    with contextlib.ExitStack() as stack:
        opened = [(*source.open(stack, folder, at), source.directions(at)) for source in sources]
        for latent in range(at.start, at.stop):
            found, said = next(examples), _said(words, strings, latent)
            for source, (features, activations, directions) in zip(sources, opened, strict=True):
                if latent not in source.latents:
                    continue
                here = [example for example in found if example.layer == source.layer]
                features.write(_line(source.feature(latent, here, directions[latent - at.start].tolist(), said)))
                activations.writelines(_line(source.activation(example, here, strings)) for example in here)
                source.n_activations += len(here)


class _Source:
    """One layer: what Neuronpedia calls a source."""

    def __init__(self, names: Names, sae: MLSAE, layer: int, statistics: LayerStatistics, made: str):
        row, size = sae.layers.index(layer), sae.config.n_latents // sae.config.groups
        first = sae.config.group_of(row) * size
        self.names, self.layer, self.made = names, layer, made
        self.id = f"{layer}-{names.source_set}"
        self.latents = range(first, first + size)
        self.n_activations = 0
        self._sae, self._row = sae, row
        self._n_active, self._density = statistics.counts[row].tolist(), statistics.density()[row].tolist()

    @torch.no_grad()
    def directions(self, latents: slice) -> Float[Tensor, "latent d_model"]:
        """What one unit of each latent adds to the residual stream: a row of W_dec, scaled, back through the lens."""
        rows, frame, lens = self._sae.W_dec[latents], self._sae.frame, self._sae.lens
        rows = rows * frame.scale[self._row] if frame.name == "layer" else rows
        if lens is not None:
            zero = torch.zeros_like(rows[None])
            rows = (lens.invert(rows[None], [self.layer]) - lens.invert(zero, [self.layer]))[0]
        return rows.cpu()

    def write_about(self, folder: Path, text: dict[str, Any]) -> None:
        """The four files that say what this is."""
        names, made = self.names, {"creatorId": self.names.creator_id, "createdAt": self.made}
        about = {
            "release": {
                "name": names.release,
                "description": names.release,
                "descriptionShort": names.release,
                "urls": [],
                "creatorNameShort": names.creator,
                "creatorName": names.creator,
                **made,
            },
            "model": {
                "id": names.model,
                "instruct": False,
                "displayNameShort": names.model,
                "displayName": names.model,
                **made,
            },
            "sourceset": {
                "modelId": names.model,
                "name": names.source_set,
                "creatorName": names.creator,
                "releaseName": names.release,
                "description": "Residual stream after each block, one dictionary for all of them",
                "visibility": "PUBLIC",
                **made,
            },
            "source": {
                "id": self.id,
                "modelId": names.model,
                "setName": names.source_set,
                "hfRepoId": None,
                "hfFolderId": None,
                "visibility": "PUBLIC",
                **text,
                **made,
            },
        }
        for name, value in about.items():
            files.write_bytes(folder / names.model / self.id / f"{name}.jsonl", _line(value))

    def open(self, stack: contextlib.ExitStack, folder: Path, at: slice) -> tuple[gzip.GzipFile, gzip.GzipFile]:
        """Where features and activations of one batch go."""

        def opened(kind: str) -> gzip.GzipFile:
            path = folder / self.names.model / self.id / kind / f"batch-{at.start // LATENTS_A_FILE}.jsonl.gz"
            path.parent.mkdir(exist_ok=True)
            file = stack.enter_context(files.new_file(path))
            return stack.enter_context(gzip.GzipFile("", "wb", 5, file, mtime=0))

        return opened("features"), opened("activations")

    def feature(
        self, latent: int, examples: Sequence[Example], vector: list[float], said: dict[str, Any]
    ) -> dict[str, Any]:
        """A latent at this layer, by Neuronpedia's keys."""
        largest = max((example.value for example in examples), default=0.0)
        sample = [example.value for example in examples if example.kind == "sampled"]
        heights, edges = np.histogram(sample, BARS, (0, largest)) if sample else (np.zeros(0), np.zeros(1))
        return {
            **self._named(latent),
            "maxActApprox": largest,
            "hasVector": True,
            "vector": vector,
            "vectorLabel": None,
            "vectorDefaultSteerStrength": largest,
            "hookName": f"blocks.{self.layer}.hook_resid_post",
            **{name: [] for name in EMPTY},
            **said,
            "frac_nonzero": self._density[latent],
            "freq_hist_data_bar_heights": (heights * (self._n_active[latent] / max(1, len(sample)))).tolist(),
            "freq_hist_data_bar_values": ((edges[1:] + edges[:-1]) / 2).tolist(),
            "sourceSetName": self.names.source_set,
        }

    def activation(self, example: Example, examples: Sequence[Example], strings: "_Strings") -> dict[str, Any]:
        """An example in its context. The sample stands in intervals of equal shares, the strongest in none: -1 there."""
        values = example.activations
        interval = {"binMin": -1.0, "binMax": max(each.value for each in examples), "binContains": -1.0}
        if example.kind == "sampled":
            sample = [each for each in examples if each.kind == "sampled"]
            alike = [each.value for each in sample if each.quantile == example.quantile]
            share = self._density[example.latent] * len(alike) / len(sample)
            interval = {"binMin": min(alike), "binMax": max(alike), "binContains": share}
        place = f"{self.names.model}/{self.id}/{example.latent}/{example.kind}/{example.rank}"
        return {
            "id": "c" + hashlib.sha256(place.encode()).hexdigest()[:24],
            "tokens": [strings[token] for token in example.tokens],
            **self._named(example.latent),
            "maxValue": max(values),
            "maxValueTokenIndex": values.index(max(values)),
            "minValue": min(values),
            "values": values,
            **interval,
            "qualifyingTokenIndex": example.centre,
            "dfaValues": [],
            "lossValues": [],
            **dict.fromkeys(UNKNOWN),
        }

    def _named(self, latent: int) -> dict[str, str]:
        who = {"creatorId": self.names.creator_id, "createdAt": self.made}
        return {"modelId": self.names.model, "layer": self.id, "index": str(latent), **who}


# ---- what the analysis says ---------------------------------------------------------------------------------------------


def _opened(analysis: Path, sae: MLSAE, lm: LanguageModel) -> tuple[LayerStatistics, int]:
    """The statistics, and the tokens of a sequence. Raises ModelError unless both files are there, and of this pair."""
    about = read_about(analysis / "examples.parquet")
    statistics = LayerStatistics.load(analysis / "layers.safetensors")
    sizes = (len(sae.layers), sae.config.n_latents)
    if (statistics.n_layers, statistics.n_latents) != sizes or about.layers != sae.layers:
        raise ModelError(
            str(analysis), f"is of another SAE; analyze this one, of {sizes[0]} layers x {sizes[1]} latents"
        )
    if about.settings.n_latents != sizes[1] or about.tokenizer_fingerprint != lm.tokenizer.fingerprint:
        raise ModelError(
            str(analysis), f"holds examples of another SAE or tokenizer than {lm.name}'s; analyze this one"
        )
    return statistics, about.settings.context_length


def _by_latent(path: Path, n_latents: int) -> Iterator[list[Example]]:
    """The examples of latent 0, of latent 1, ...: the file is sorted by them."""
    groups = groupby(chain.from_iterable(read_all(path)), key=lambda example: example.latent)
    following = next(groups, None)
    for latent in range(n_latents):
        if following is None or following[0] != latent:
            yield []
        else:
            yield list(following[1])
            following = next(groups, None)


@torch.no_grad()
def _words(directions: Float[Tensor, "latent d_model"], lm: LanguageModel, *, progress: bool) -> Words:
    """Promoted and suppressed tokens of all latents, and how many tokens lie where between; a block of logits at a time."""
    n_tokens = min(lm.d_vocab, len(lm.tokenizer.hf))  # embeddings may be padded beyond the tokenizer's tokens
    parts = []
    for at in blocks(len(directions), 256, "logits of latents", progress=progress):
        logits = lm.logits_along(directions[at])[:, :n_tokens].cpu()
        ends = [logits.topk(min(WORDS, n_tokens), largest=largest) for largest in (True, False)]
        least, width = logits.amin(1, keepdim=True), (logits.amax(1) - logits.amin(1))[:, None] / BARS
        bars = ((logits - least) / width.clamp_min(1e-30)).long().clamp_(max=BARS - 1)
        heights = torch.zeros(len(logits), BARS, dtype=torch.int64).scatter_add_(1, bars, torch.ones_like(bars))
        tensors = [x for end in ends for x in (end.indices, end.values)]
        parts.append([*tensors, heights, least + width * (torch.arange(BARS) + 0.5)])
    return Words(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _said(words: Words, strings: "_Strings", latent: int) -> dict[str, Any]:
    """A latent's words by Neuronpedia's keys."""
    return {
        "pos_str": [strings[token] for token in words.promoted[latent].tolist()],
        "pos_values": words.promoted_logits[latent].tolist(),
        "neg_str": [strings[token] for token in words.suppressed[latent].tolist()],
        "neg_values": words.suppressed_logits[latent].tolist(),
        "logits_hist_data_bar_heights": words.heights[latent].tolist(),
        "logits_hist_data_bar_values": words.centres[latent].tolist(),
    }


class _Strings(dict[int, str]):
    """Tokens as a person reads them, with the space that begins one, which decoding one alone can lose."""

    def __init__(self, lm: LanguageModel):
        super().__init__()
        self._tokenizer = lm.tokenizer

    def __missing__(self, token: int) -> str:
        (string,), (piece,) = self._tokenizer.strings([token]), self._tokenizer.pieces([token])
        spaced = piece is not None and piece.startswith(("▁", "Ġ")) and not string.startswith(" ")
        self[token] = f" {string}" if spaced else string
        return self[token]


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(files.finite(value), allow_nan=False, ensure_ascii=False).encode() + b"\n"
