"""A run with everything the explorer shows: a tiny trained SAE, its evaluation, and its analysis with examples."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from mlsae import LanguageModel, TrainConfig, analyze, evaluate, files, train
from mlsae.analysis.layers import LayerStatistics
from mlsae.config import MLSAEConfig
from mlsae.explorer.inference import Session, Shared
from mlsae.frames import Lens
from mlsae.sae import MLSAE
from tiny import save_tiny_lm

N_LAYERS, D_MODEL, N_LATENTS, K = 6, 32, 128, 4
PROMPT = "the cat sat on a mat by the house"
"""33 tokens of the byte tokenizer."""


@dataclass
class Sums:
    """Of an analysis, what the views ask of library.Statistics."""

    whole: LayerStatistics

    @property
    def n_tokens(self) -> int:
        return self.whole.n_tokens

    def of(self, latent: int) -> dict[str, torch.Tensor]:
        return {name: getattr(self.whole, name)[:, latent : latent + 1] for name in ("totals", "counts")}


@dataclass
class Shelf:
    """What the views ask of a library, from what a test has made."""

    sae: MLSAE | None
    lm_name: str | None = None
    examples: Path | None = None
    similarity: dict[str, Any] | None = None
    statistics: Any = None
    gone: list[dict[str, Any]] = field(default_factory=list)
    lm_options: dict[str, Any] = field(default_factory=dict)

    def missing(self, *names: str) -> list[dict[str, Any]]:
        return self.gone

    @classmethod
    def of_run(cls, run: Path) -> "Shelf":
        sae = MLSAE.from_pretrained(run).eval().requires_grad_(False)
        analysis = run / "analysis"
        similarity = json.loads((analysis / "similarity.json").read_text())
        statistics = Sums(LayerStatistics.load(analysis / "layers.safetensors"))
        return cls(sae, sae.config.lm, analysis / "examples.parquet", similarity, statistics)


def session_of(shelf: Shelf, lm: LanguageModel) -> Session:
    """What a view takes first, with a language model that is there already."""
    shared = Shared(shelf)
    assert shelf.sae is not None
    shared._pair = (shelf.sae, shelf.sae, lm)
    return Session(shared)


def made_sae(
    frame: str = "layer", *, lens: bool = False, layers: Sequence[int] = range(N_LAYERS), **changes: Any
) -> MLSAE:
    """A random SAE whose frame and lens go with the layer's id, so that mixed-up layers show."""
    torch.manual_seed(1)
    shape: dict[str, Any] = {
        "d_model": D_MODEL,
        "n_latents": N_LATENTS,
        "k": K,
        "frame": frame,
        "layers": tuple(layers),
    }
    shape |= {"mask_norm_factor": None, "lens": "somewhere" if lens else None}
    sae = MLSAE(MLSAEConfig(**shape | changes)).eval().requires_grad_(False)
    sae.b_pre.copy_(0.1 * torch.randn(sae.b_pre.shape))
    if frame == "layer":
        means = torch.randn(N_LAYERS, D_MODEL)[list(layers)]
        sae.frame.fit(means, torch.tensor([(1.0 + layer) ** 2 for layer in layers]))
    if lens:
        maps = Lens(range(N_LAYERS), D_MODEL)
        maps.weight.copy_(0.1 * torch.randn(maps.weight.shape))
        maps.bias.copy_(torch.randn(maps.bias.shape))
        sae.set_lens(maps)
    return sae


@pytest.fixture(scope="session")
def tiny_lm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 6 layers, d_model 32, context 64, with a byte tokenizer."""
    return save_tiny_lm(tmp_path_factory.mktemp("explorer-lm") / "tiny-llama", n_layers=N_LAYERS, d_model=D_MODEL)


@pytest.fixture(scope="session")
def tiny_lm(tiny_lm_folder: Path) -> LanguageModel:
    """The same, loaded."""
    return LanguageModel.from_pretrained(tiny_lm_folder, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_lm_folder: Path, corpus: Path) -> Path:
    """A run directory: 128 latents, k = 4, six layers, `evaluation.json` and `analysis/`; copy it before changing it."""
    torch.manual_seed(0)
    run = tmp_path_factory.mktemp("explorer-runs") / "run"
    sizes = {"k": K, "expansion_factor": N_LATENTS // D_MODEL, "tokens": 2048, "init_tokens": 512}
    config = TrainConfig(lm=str(tiny_lm_folder), data=str(corpus), out=str(run), **sizes)
    sae = train(config, progress=False).sae
    found = evaluate(sae, tiny_lm_folder, str(corpus), tokens=2048, progress=False)
    files.write_json(run / "evaluation.json", found.to_dict())
    analyze(sae, tiny_lm_folder, str(corpus), tokens=2048, examples=6, progress=False).save(run / "analysis")
    return run
