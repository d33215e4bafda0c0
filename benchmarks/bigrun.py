"""A run directory of many latents and layers with made-up statistics: what the explorer is given to show at full size."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from mlsae import files
from mlsae.analysis.example_file import new_file
from mlsae.analysis.example_rows import About, Rows, Settings
from mlsae.analysis.latents import save_columns
from mlsae.analysis.layers import LayerStatistics
from mlsae.config import MLSAEConfig
from mlsae.sae import MLSAE

N_LATENTS, N_LAYERS, D_MODEL, K, N_TOKENS = 196_608, 28, 512, 32, 1_000_000
N_WITH_EXAMPLES, N_TOP, N_SAMPLED, REACH = 4000, 16, 8, 20
N_STRINGS, D_VOCAB = 50_000, 32_000
WORDS = ("the", "cat", "dog", "run", "blue", "time", "water", "light", "house", "moon", "tree", "stone", "bird", "sea")


def make(run: Path, *, n_latents: int = N_LATENTS, n_layers: int = N_LAYERS, lm: str | None = None) -> Path:
    """Write the run, seeded; about a minute and a gigabyte at full size."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    layers = tuple(range(n_layers))
    shape: dict[str, Any] = {"d_model": D_MODEL, "n_latents": n_latents, "k": K, "layers": layers, "lm": lm}
    MLSAE(MLSAEConfig(**shape, frame="layer")).save_pretrained(run / "sae")
    counts = _counts(rng, n_latents, n_layers)
    sums = _sums(rng, counts)
    sums.save(run / "analysis/layers.safetensors")
    share = sums.distribution().probability.float()
    files.save_tensors(run / "analysis/profile.safetensors", {"low": 0.9 * share - 1e-3, "high": 1.1 * share + 1e-3})
    save_columns(run / "analysis/latents.parquet", _columns(rng, sums))
    _save_examples(rng, run / "analysis/examples.parquet", counts)
    for name, value in _reports(sums, lm, run).items():
        files.write_json(run / name, value)
    with files.JsonLines(run / "metrics.jsonl") as metrics:
        for step in range(1, 1221):
            quality = {"loss": 0.2 + 1 / step, "fvu": 0.2 + 1 / step, "dead_fraction": 0.06}
            metrics.append({"step": step, "tokens": step * 8192, **quality, "tokens_per_second": 1e4})
    (run / "run.lock").write_text("pid 0 on nowhere since 2020-01-01 00:00:00")
    return run


def _counts(rng: np.random.Generator, n_latents: int, n_layers: int) -> np.ndarray:
    """Tokens at which each latent is active at each layer [layer, latent]: a bell over depth, and some that never are."""
    centre, width = rng.uniform(-1, n_layers, n_latents), rng.gamma(2.0, 1.2, n_latents) + 0.3
    rate = np.exp(rng.normal(-8, 1.5, n_latents)).clip(1e-6, 0.2)
    n = np.where(rng.random(n_latents) > 0.06, np.maximum(1, rate * N_TOKENS).astype(np.int64), 0)
    counts = np.zeros((n_layers, n_latents), np.int64)
    for layer in range(n_layers):
        density = np.exp(-0.5 * ((layer - centre) / width) ** 2)
        counts[layer] = np.where(density > 0.02, density * n, 0)
    counts[np.clip(centre.round().astype(int), 0, n_layers - 1), np.arange(n_latents)] += n > 0
    return counts


def _sums(rng: np.random.Generator, counts: np.ndarray) -> LayerStatistics:
    sums = LayerStatistics(*counts.shape)
    parts = {name: part[0] for name, part in sums.by_shard.items()}
    for layer, row in enumerate(counts):
        parts["counts"][layer] = torch.from_numpy(row)
        parts["totals"][layer] = torch.from_numpy(row * rng.gamma(4, 0.3, len(row)))
        parts["shares"][layer] = parts["counts"][layer].double() / 3
    parts["persisted"][: len(counts) - 1] = torch.from_numpy(np.minimum(counts[1:], counts[:-1]) // 2)
    parts["n_events"].copy_(torch.from_numpy(counts.max(0)))
    parts["effective_layers"].copy_(parts["n_events"].double() * 2)
    parts["tokens"].fill_(N_TOKENS)
    parts["sequences"].fill_(100)
    parts["active_layers"][0] = int(parts["n_events"].sum())
    return sums


def _columns(rng: np.random.Generator, sums: LayerStatistics) -> dict[str, pa.Array]:
    found, n = sums.distribution(), sums.n_latents
    columns = {"latent": pa.array(np.arange(n, dtype=np.int32)), "n_events": pa.array(sums.n_events.numpy())}
    estimates = {name: getattr(found, name) for name in ("centre_of_mass", "std", "effective_layers")}
    estimates["event_effective_layers"] = sums.effective_layers / sums.n_events
    estimates["rate"] = sums.n_events / N_TOKENS
    for name, x in estimates.items():
        for ending, factor in (("", 1.0), ("_low", 0.97), ("_high", 1.03)):
            columns[name + ending] = pa.array(x.double().numpy() * factor, from_pandas=True)
    for name in ("entropy", "n_active_layers", "birth", "death", "bimodality"):
        columns[name] = pa.array(getattr(found, name).numpy(), from_pandas=True)
    columns["max_cosine"] = pa.array(rng.uniform(0.1, 0.9, n).astype(np.float32))
    columns["neighbour"] = pa.array(rng.integers(0, n, n))
    strings = pa.array([f"{WORDS[i % len(WORDS)]}{i // len(WORDS) or ''}" for i in range(N_STRINGS)])
    ends = pa.array(np.arange(0, 8 * n + 1, 8, dtype=np.int32))
    for name in ("promoted", "suppressed"):
        ids = pa.array(rng.integers(0, N_STRINGS, 8 * n, dtype=np.int32))
        logits = np.sort(rng.normal(size=(n, 8)).astype(np.float32))[:, ::-1].ravel()
        columns[name] = pa.ListArray.from_arrays(ends, strings.take(ids))
        columns[f"{name}_logits"] = pa.ListArray.from_arrays(ends, pa.array(logits))
    return columns


class _Text:
    """Stands in for packed text: any tokens."""

    length = 1024

    def __init__(self, rng: np.random.Generator):
        self._rng = rng

    def around(self, place: np.ndarray, window: int) -> Any:
        tokens = self._rng.integers(0, D_VOCAB, (len(place), 2 * window + 1)).astype(np.int32)
        return tokens, np.ones_like(tokens, bool), place // 3000


def _save_examples(rng: np.random.Generator, path: Path, counts: np.ndarray) -> None:
    n_layers, n_latents = counts.shape
    alive = np.flatnonzero(counts.any(0))
    chosen = alive[:: max(1, len(alive) // N_WITH_EXAMPLES)]
    settings = Settings(n_layers, n_latents, _Text.length, N_TOP, N_SAMPLED, REACH, seed=0)
    n, text = N_TOP + N_SAMPLED, _Text(rng)
    with new_file(path, About(settings, tuple(range(n_layers)), "synthetic")) as file:
        for start in range(0, len(chosen), n):
            latent = np.repeat(chosen[start : start + n], n_layers * n)
            each = len(latent) // n
            layer = np.tile(np.repeat(np.arange(n_layers), n), each // n_layers)
            kind = np.tile(np.repeat([0, 1], [N_TOP, N_SAMPLED]), each)
            rank = np.tile(np.concatenate([np.arange(N_TOP), np.arange(N_SAMPLED)]), each)
            keep = counts[layer, latent] > 0
            ids = [x[keep].astype(np.int64) for x in (latent, layer, kind, rank, rank)]
            size = (len(ids[0]), 2 * REACH + 1)
            windows = np.where(rng.random(size) < 0.1, rng.gamma(4, 0.3, size), 0).astype(np.float16)
            value, place = rng.gamma(4, 0.4, size[0]).astype(np.float32), rng.integers(0, N_TOKENS, size[0])
            file.write(Rows(*ids, place, value, windows), text)  # ty: ignore[invalid-argument-type]


def _reports(sums: LayerStatistics, lm: str | None, run: Path) -> Mapping[str, Any]:
    """What `train`, `evaluate` and `analyze` write as JSON."""
    n_layers, n_latents = sums.n_layers, sums.n_latents
    layers = list(range(n_layers))
    terms = {"within": 3.1, "token": 4.2, "latent": 30.5, "total": 37.8, "rel_f": 0.193, "rel_t": 0.425}
    intervals = {name: {"value": x, "ci95": [0.98 * x, 1.02 * x]} for name, x in terms.items()}
    counted = ("active_layers", "longest_run", "runs", "first_layer", "last_layer")
    events = {name: getattr(sums, name).tolist() for name in counted}
    depth = {
        "decomposition": dict.fromkeys(("mass", "event", "count"), intervals),
        "lawson2024": {name: intervals[name] for name in ("rel_f", "rel_t")},
        "events": {**events, "mean_active_layers": {"value": 2.0, "ci95": [1.9, 2.1]}},
        "persistence": [{"value": 0.5, "ci95": [0.4, 0.6]}] * (n_layers - 1),
    }
    pairs = {"mean": 0.8, "std": 0.1, "sem": 0.001, "ci95": [0.79, 0.81]}
    similarity = {name: [x] * (n_layers - 1) for name, x in pairs.items()}
    norm = {"mean": [10.0 + i for i in layers], "std": [1.0] * n_layers, "sem": [0.1] * n_layers}
    quality = {"fvu": 0.2, "mse": 1.0, "cosine": 0.9, "l0": 32.0, "l1": 20.0, "unused_fraction": 0.1}
    quality |= {"delta_ce": 0.05, "kl": 0.04}
    shape = {"k": K, "n_latents": n_latents, "layers": layers, "frame": "layer", "groups": 1, "recipe": "standard"}
    text = {"tokens": 10_000_000, "batch_size": 8, "accumulation_steps": 1, "context_length": 1024}
    return {
        "analysis/similarity.json": {
            "resid": {"n_tokens": 65_536, "norm": norm, "gamma": [1.0] * n_layers},
            "n_tokens": N_TOKENS,
            "centred": similarity,
            "raw": similarity,
        },
        "analysis/summary.json": {
            "n_tokens": N_TOKENS,
            "layers": layers,
            "seconds": 1.0,
            **depth,
            "nulls": {"independent": depth, "shuffled_layers": depth},
            "distribution": {"n_used": int((sums.n_events > 0).sum())},
        },
        "evaluation.json": {
            "n_tokens": N_TOKENS,
            "layers": [{"layer": i, **quality} for i in layers],
            "mean": quality,
            "all_layers": {"delta_ce": 0.4, "kl": 0.3},
            "clean_ce": 3.0,
            "dead_fraction": 0.06,
            "lawson2024": {"layers": [], "mean": {}},
        },
        "config.json": {"lm": lm, "data": "synthetic", "out": str(run), **text, **shape},
    }
