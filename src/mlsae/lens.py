"""Tuned lenses: for each layer the affine map of its output that predicts the model's own next-token distribution best.

    y_l = x_l + x_l A_l^T + c_l        trained to minimise KL(softmax(unembed(x_last)), softmax(unembed(y_l))) at the same token

(Belrose et al. 2023, arXiv 2303.08112.) What the last block puts out is what the model unembeds: its map is the identity. An SAE
trained behind a lens (`TrainConfig.lens`) sees every layer in a common space.
"""

import glob
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from mlsae import files, untrusted
from mlsae.config import Config
from mlsae.data import TextSource, TokenBlocks
from mlsae.downloads import fetch
from mlsae.errors import DataError, ModelError, NumericsError, printable
from mlsae.frames import Lens
from mlsae.lm import LanguageModel
from mlsae.metrics import kl_divergence
from mlsae.reading import text_blocks
from mlsae.reporting import bar

LENS_FILE = "lens.safetensors"
PUBLISHED = ("config.json", "params.pt")
"""Files of a lens as the tuned-lens library writes it."""
PUBLISHED_SPACE = "AlignmentResearch/tuned-lens"
"""The Hub Space that holds published lenses, in `lens/{language model}`."""
LOGITS = 2**25
"""Entries of the largest table of logits: 128 MB, of which a few are in use at once."""
MAX_STEPS = 250
"""Optimizer steps of a training, as published; a small one takes fewer, because a step is at least a sequence."""
LR = 3e-3
"""Adam's. On 16,000 tokens of stories15M, 62 steps, the mean KL falls from 5.70 to 1.91; with 1e-3 to 2.36, with 1e-2 to 2.13.

The published SGD (rate 0.1, Nesterov momentum 0.9), meant for steps of 2^18 tokens, ends at 5.87; at a third of the rate at 2.42.
"""

log = logging.getLogger(__name__)


class LensConfig(Config):
    """What a lens belongs to."""

    d_model: Annotated[int, Field(ge=1, le=10**6)]
    """Width of the residual stream."""
    n_layers: Annotated[int, Field(ge=1, le=10**4)]
    """Layers of the language model, the last of which needs no translator."""
    lm: str | None = None
    """Language model, as it was named."""
    tokenizer_fingerprint: str | None = None
    """SHA-256 that tells its tokenizer from others; None: a published lens does not say."""
    tokens: Annotated[int, Field(ge=0)] | None = None
    """Tokens read in training; None: a published lens does not say."""
    format_version: Literal[1] = 1
    """Version of the file's layout."""


class TunedLens(Lens):
    """The maps of every layer of a language model: `apply_to`, `invert`, `condition_numbers`; zero is the logit lens.

    `weight[l]` and `bias[l]` belong to the output of block l.
    """

    def __init__(self, config: LensConfig):
        super().__init__(range(config.n_layers), config.d_model)
        self.config = config

    def save(self, folder: str | Path) -> None:
        """Write `lens.safetensors`, which says in its metadata what it belongs to."""
        config = {"config": files.canonical_json(self.config.to_dict())}
        files.save_tensors(Path(folder) / LENS_FILE, self.state_dict(), config)

    @classmethod
    def load(
        cls,
        folder_or_id: str | Path,
        lm: LanguageModel | None = None,
        *,
        allow_pickle: bool = False,
        alignment: Literal["block_input", "lawson2024"] = "block_input",
    ) -> "TunedLens":
        """The lens in a folder, ours or as the tuned-lens library writes it, or the published one of a language model's Hub id.

        Args:
            lm: the model it is for, against which it is checked; None: no questions asked.
            allow_pickle: read a published lens, which is a pickle, in a process of its own (`untrusted.unpickled`).
            alignment: a published translator i belongs to the input of block i, and so to the output of block i - 1; the code
                of lawson2024 takes it for the output of block i (defect D15).

        Raises:
            ModelError: it is not there, not whole, not finite, not invertible, or of another model.
        """
        folder = Path(folder_or_id)
        if (folder / LENS_FILE).is_file():
            lens = _load_ours(folder / LENS_FILE, lm)
        else:
            lens = _load_published(str(folder_or_id), lm, allow_pickle, 0 if alignment == "lawson2024" else 1)
        if not all(tensor.isfinite().all() for tensor in lens.state_dict().values()):
            raise ModelError(str(folder_or_id), "the lens holds NaN or infinity; train it anew")
        lens.check_invertible()
        return lens.to("cpu" if lm is None else lm.device)


def _load_ours(path: Path, lm: LanguageModel | None) -> TunedLens:
    config = untrusted.parse_json(untrusted.tensors_metadata(path).get("config", "null"), path)
    if not isinstance(config, dict):
        raise ModelError(str(path), "does not say what it belongs to; name a folder that mlsae lens wrote")
    with torch.device("meta"):
        lens = TunedLens(LensConfig(**config))
    if lm is not None:
        _check_sizes(path, lens.config, lm)
        if lens.config.tokenizer_fingerprint not in (None, lm.tokenizer.fingerprint):
            problem = f"is a lens of {printable(str(lens.config.lm))}, which has another tokenizer than {lm.name}"
            raise ModelError(str(path), f"{problem}; train one with mlsae lens")
    expected = {name: (torch.float32, tuple(tensor.shape)) for name, tensor in lens.state_dict().items()}
    lens.load_state_dict(untrusted.load_tensors(path, expected), assign=True)
    return lens


# ---- published lenses ------------------------------------------------------------------------------------------------


def _load_published(name: str, lm: LanguageModel | None, allow_pickle: bool, first: int) -> TunedLens:
    """A lens in the layout of the tuned-lens library; translator `first` + l becomes the map of layer l."""
    if not allow_pickle:
        problem = f"'{name}' holds no {LENS_FILE}, and published lenses are pickles, which can carry code"
        raise ModelError("lens", f"{problem}; train one with mlsae lens, or read this one with allow_pickle=True")
    folder = _find_published(name)
    config = untrusted.read_json(folder / PUBLISHED[0])
    if not isinstance(config, dict) or config.get("lens_type", "linear_tuned_lens") != "linear_tuned_lens":
        raise ModelError(str(folder), f"{PUBLISHED[0]} describes no linear tuned lens")
    base = str(config.get("base_model_name_or_path"))
    ours = LensConfig(d_model=config.get("d_model"), n_layers=config.get("num_hidden_layers"), lm=base)
    if lm is not None:
        _check_sizes(folder, ours, lm)
        _check_base(folder, base, config.get("unembed_hash"), lm)
    width = (ours.d_model,)
    expected = {f"{i}.weight": width * 2 for i in range(ours.n_layers)}
    if config.get("bias", True):
        expected |= {f"{i}.bias": width for i in range(ours.n_layers)}
    tensors = untrusted.load_pickled_tensors(folder / PUBLISHED[1], expected)
    lens = TunedLens(ours)
    for layer, i in enumerate(range(first, ours.n_layers)):
        lens.weight[layer] = tensors[f"{i}.weight"]
        if f"{i}.bias" in tensors:
            lens.bias[layer] = tensors[f"{i}.bias"]
    return lens


def _find_published(name: str) -> Path:
    folder = Path(name)
    if all((folder / file).is_file() for file in PUBLISHED):
        return folder
    if folder.exists():
        raise ModelError(
            "lens", f"'{name}' holds neither {LENS_FILE} nor {' with '.join(PUBLISHED)}; name another folder"
        )
    there = f"lens/{name}"

    def check(sizes: Mapping[str, int]) -> None:
        if any(f"{there}/{file}" not in sizes for file in PUBLISHED):
            problem = f"'{printable(name)}' is no folder, and {PUBLISHED_SPACE} has no lens of that name"
            raise ModelError("lens", f"{problem}; train one with mlsae lens")

    wanted = [f"{there}/{file}" for file in PUBLISHED]
    patterns = [glob.escape(file) for file in wanted]
    root = fetch("lens", PUBLISHED_SPACE, None, patterns, kind="space", check=check, needed=wanted)
    return files.contained(root, there)


def _check_sizes(where: Path, config: LensConfig, lm: LanguageModel) -> None:
    if (config.n_layers, config.d_model) != (lm.n_layers, lm.d_model):
        sizes = f"{config.n_layers} layers of {config.d_model} entries; {lm.name} has {lm.n_layers} of {lm.d_model}"
        raise ModelError(str(where), f"is a lens for {sizes}; use the lens of this model")


def _check_base(where: Path, base: str, unembed_hash: Any, lm: LanguageModel) -> None:
    """Refuse the lens of a model of another name, unless its unembedding is known to be this one."""
    if unembed_hash is not None and unembed_hash == _unembed_hash(lm):
        return
    if Path(base).name != Path(lm.name).name:
        problem = f"is a lens of '{printable(base)}', not of {lm.name}"
        raise ModelError(str(where), f"{problem}; if these are the same weights, load it with lm=None")
    if unembed_hash is not None:
        log.warning("%s: made for another unembedding of that name than %s has", where, lm.name)


def _unembed_hash(lm: LanguageModel) -> str:
    """What the tuned-lens library tells models by: the unembedding's corners as numpy prints them, to one digit."""
    import numpy as np

    return sha256(np.array_str(lm.unembedding.float().numpy(force=True), precision=1).encode()).hexdigest()


# ---- training --------------------------------------------------------------------------------------------------------


def train_lens(
    lm: LanguageModel,
    data: str | TextSource | TokenBlocks,
    *,
    tokens: int = 1_000_000,
    split: str = "train",
    context_length: int | None = None,
    lr: float = LR,
    seed: int = 42,
    progress: bool = True,
) -> TunedLens:
    """A lens fitted to text by Adam with linear decay, from the logit lens, on the tokens an SAE would see.

    The gradient is exact, and logits are held for one layer at a time.

    Args:
        tokens: tokens to read, in at most MAX_STEPS steps; past the end of the text it starts again.
        lr: learning rate of the first step.
        seed: of the order of the text; the maps begin at zero.

    Raises:
        DataError: the text cannot be read, is too short, or nothing of a step is left after masking.
        NumericsError: the loss is not finite.
    """
    if isinstance(data, str):
        data = TextSource(data, split)
    blocks = text_blocks(lm, data, tokens=tokens, context_length=context_length, progress=progress)
    length = blocks.context_length
    size = max(1, tokens // MAX_STEPS // length)
    n_steps = max(1, tokens // (size * length))
    maps = [nn.Linear(lm.d_model, lm.d_model, device=lm.device) for _ in range(lm.n_layers - 1)]
    parameters = [nn.init.zeros_(parameter) for linear in maps for parameter in linear.parameters()]
    optimizer = torch.optim.Adam(parameters, lr)
    steps = ((size * length, step) for step in range(n_steps))
    for step in bar(steps, total=n_steps * size * length, desc="lens", progress=progress):
        optimizer.zero_grad()
        loss = _gradients(lm, maps, blocks.read(step * size, size, seed=seed))
        if not math.isfinite(loss):
            raise NumericsError("loss", f"{loss} at step {step + 1} of the lens; lower lr, or look at the text")
        optimizer.param_groups[0]["lr"] = lr * (1 - step / n_steps)
        optimizer.step()
    config = LensConfig(
        d_model=lm.d_model,
        n_layers=lm.n_layers,
        lm=lm.name,
        tokenizer_fingerprint=lm.tokenizer.fingerprint,
        tokens=n_steps * size * length,
    )
    lens = TunedLens(config).to(lm.device)
    for layer, linear in enumerate(maps):
        lens.weight[layer], lens.bias[layer] = linear.weight.detach(), linear.bias.detach()
    lens.check_invertible()
    return lens


def _gradients(lm: LanguageModel, maps: Sequence[nn.Linear], tokens: Int[Tensor, "batch pos"]) -> float:
    """Add the gradients of every layer's mean KL on these tokens; returns the mean over layers."""
    vectors, total = _visible(lm, tokens), 0.0
    for part in _parts(lm, vectors):
        with torch.no_grad():
            clean = _log_probs(lm, part[-1])
        for x, linear in zip(part[:-1], maps, strict=True):
            kl = kl_divergence(clean, _log_probs(lm, x + linear(x))).sum() / vectors.shape[1]
            kl.backward()
            total += kl.item() / len(maps)
    return total


def _visible(lm: LanguageModel, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "layer token d_model"]:
    """The vectors of every layer, but those of special tokens and first positions, whose norms are far from all others'."""
    tokens = tokens.to(lm.device)
    keep = lm.keep_mask(tokens)
    if not keep.any():
        raise DataError("data", "no token is left after masking; use longer text")
    return lm.resid(tokens)[:, keep]


def _parts(lm: LanguageModel, vectors: Float[Tensor, "layer token d_model"]) -> tuple[Tensor, ...]:
    """The tokens in as many parts as keep a table of logits small."""
    return vectors.split(max(1, LOGITS // lm.d_vocab), 1)


def _log_probs(lm: LanguageModel, resid: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_vocab"]:
    return lm.unembed(resid[:, None])[:, 0].float().log_softmax(-1)


# ---- judging ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LensQuality:
    """How near each layer's prediction, through the lens and without it, is to what the model says in the end."""

    n_tokens: int
    """Tokens of held-out text, masked ones not counted."""
    layers: list[dict[str, Any]]
    """For each layer: layer, logit_lens_kl and tuned_lens_kl, KL(model, layer) in nats a token, and condition_number."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values by field name."""
        return asdict(self)


@torch.no_grad()
def evaluate_lens(
    lens: TunedLens,
    lm: LanguageModel,
    data: str | TextSource | TokenBlocks,
    *,
    tokens: int = 20_000,
    split: str = "validation",
    context_length: int | None = None,
    progress: bool = True,
) -> LensQuality:
    """The KL divergence of each layer's prediction, read through the lens and directly, from the model's own.

    Raises DataError if there is no such text, or nothing is left of it after masking.
    """
    if isinstance(data, str):
        data = TextSource(data, split)
    blocks = text_blocks(lm, data, tokens=tokens, context_length=context_length, progress=progress)
    n_blocks = min(len(blocks), max(1, tokens // blocks.context_length))
    sums, n_tokens = torch.zeros(2, lm.n_layers, dtype=torch.float64), 0
    batches = ((blocks.context_length, blocks.read(position, 1)) for position in range(n_blocks))
    for batch in bar(batches, total=n_blocks * blocks.context_length, desc="evaluate", progress=progress):
        vectors = _visible(lm, batch)
        n_tokens += vectors.shape[1]
        for part in _parts(lm, vectors):
            sums += _divergences(lens, lm, part)
    columns = *(sums / n_tokens).tolist(), lens.condition_numbers.tolist()
    names = ("layer", "logit_lens_kl", "tuned_lens_kl", "condition_number")
    rows = zip(range(lm.n_layers), *columns, strict=True)
    return LensQuality(n_tokens, [dict(zip(names, row, strict=True)) for row in rows])


def _divergences(
    lens: TunedLens, lm: LanguageModel, vectors: Float[Tensor, "layer token d_model"]
) -> Float[Tensor, "2 layer"]:
    """Summed KL of each layer's prediction, without and with the lens; 0 for the last layer, which is the model."""
    clean, sums = _log_probs(lm, vectors[-1]), torch.zeros(2, lm.n_layers, dtype=torch.float64)
    for row, stream in enumerate((vectors, lens.apply_to(vectors))):
        for layer, resid in enumerate(stream):
            sums[row, layer] = kl_divergence(clean, _log_probs(lm, resid)).double().sum()
    return sums
