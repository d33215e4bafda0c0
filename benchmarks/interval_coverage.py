"""How often the 95 % intervals of the depth statistics hold the truth, on documents drawn from a known world.

A world is a dictionary whose latents have homes in depth; a document talks of a few of them, and moves each one's home a
little for all of its tokens, so tokens of one document resemble each other. The truth is a very long text of that world.
Beside the jackknife: a percentile bootstrap of the same document shards, and one that takes tokens for independent.

    python benchmarks/interval_coverage.py [--draws 400] [--documents 200]
"""

import argparse
import statistics
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from mlsae.analysis.layers import LayerStatistics, PlainCode
from mlsae.analysis.summary import headlines
from mlsae.intervals import N_SHARDS, Estimate, shard_of

N_LAYERS, N_LATENTS, K, TOPICS = 6, 64, 4, 12
SHOWN = (
    "decomposition.mass.within",
    "decomposition.mass.token",
    "decomposition.mass.latent",
    "decomposition.mass.total",
    "decomposition.mass.rel_f",
    "decomposition.mass.rel_t",
    "decomposition.count.rel_t",
    "events.mean_active_layers",
    "events.mean_effective_layers",
    "events.mean_longest_run",
    "distribution.effective_layers.mean",
    "distribution.std.mean",
    "persistence",
)
"""Of a number per layer, the second is looked at."""


def draw(n_documents: int, generator: torch.Generator) -> tuple[PlainCode, Tensor]:
    """The code of random documents of 5 to 75 tokens, and the document of every token."""
    length = torch.randint(5, 76, (n_documents,), generator=generator)
    document = torch.repeat_interleave(torch.arange(n_documents), length)
    topics = torch.rand(n_documents, N_LATENTS, generator=generator).topk(TOPICS).indices
    moved = torch.randn(n_documents, N_LATENTS, generator=generator)
    among = torch.rand(len(document), TOPICS, generator=generator).topk(K).indices
    latent = topics[document].gather(1, among)
    home = latent / N_LATENTS * N_LAYERS + moved[document].gather(1, latent)
    centre = (home + torch.randn(home.shape, generator=generator) * 0.5).clamp(0, N_LAYERS - 1)
    reach = torch.rand(home.shape, generator=generator) * 1.5 + 0.5
    z = torch.rand(home.shape, generator=generator).exp()
    layer = torch.arange(N_LAYERS)[:, None, None]
    values = torch.where((layer - centre).abs() < reach, z / (1 + (layer - centre).abs()), 0.0)
    return PlainCode(values, latent.expand(N_LAYERS, -1, -1)), document


def accumulated(code: PlainCode, shard: Tensor, n_shards: int) -> LayerStatistics:
    """The statistics of a code, its tokens dealt into shards."""
    found = LayerStatistics(N_LAYERS, N_LATENTS, n_shards)
    found.update(code, shard=shard)
    return found


def by_documents(code: PlainCode, document: Tensor, generator: torch.Generator) -> dict[str, Estimate]:
    """What the package reports."""
    return accumulated(code, shard_of(document), N_SHARDS).estimates(headlines)


def by_tokens(code: PlainCode, document: Tensor, generator: torch.Generator) -> dict[str, Estimate]:
    """The same, were every token a document."""
    return accumulated(code, shard_of(torch.arange(len(document))), N_SHARDS).estimates(headlines)


def bootstrap(code: PlainCode, document: Tensor, generator: torch.Generator) -> dict[str, Estimate]:
    """Percentiles of 200 resamples of the document shards."""
    found = accumulated(code, shard_of(document), N_SHARDS)
    weights = torch.ones(N_SHARDS).multinomial(200 * N_SHARDS, replacement=True, generator=generator).view(200, -1)
    draws = []
    for chosen in weights:
        times = torch.bincount(chosen, minlength=N_SHARDS)
        resampled = LayerStatistics(N_LAYERS, N_LATENTS)
        for name, parts in found.by_shard.items():
            resampled.by_shard[name] = torch.einsum("s,s...->...", times.to(parts.dtype), parts)[None]
        draws.append(headlines(resampled))
    value = headlines(found)
    ends = {name: torch.stack([d[name].double() for d in draws]).nanquantile(_ENDS, dim=0) for name in value}
    return {name: Estimate(x, *ends[name]) for name, x in value.items()}


_ENDS = torch.tensor([0.025, 0.975], dtype=torch.float64)
METHODS: dict[str, Callable[[PlainCode, Tensor, torch.Generator], dict[str, Estimate]]] = {
    "jackknife of documents": by_documents,
    "bootstrap of documents": bootstrap,
    "jackknife of tokens": by_tokens,
}


def coverage(method: str, n_draws: int, n_documents: int, world_documents: int = 200_000) -> dict[str, float]:
    """Share of the draws whose interval holds the truth, of each number."""
    truth = {name: plain(x) for name, x in headlines(world(world_documents)).items()}
    held: dict[str, list[bool]] = {name: [] for name in SHOWN}
    for n in range(n_draws):
        generator = torch.Generator().manual_seed(n)
        found = METHODS[method](*draw(n_documents, generator), generator)
        for name in SHOWN:
            held[name].append(plain(found[name].low) <= truth[name] <= plain(found[name].high))
    return {name: statistics.mean(map(float, hits)) for name, hits in held.items()}


@cache
def world(n_documents: int) -> LayerStatistics:
    """A text so long that what it says is the truth."""
    generator = torch.Generator().manual_seed(-1)
    found = LayerStatistics(N_LAYERS, N_LATENTS)
    for _ in range(n_documents // 5000):
        found.update(draw(5000, generator)[0])
    return found


def plain(x: Tensor) -> float:
    """A number, or the second of several."""
    return float(x if x.ndim == 0 else x[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--documents", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = {method: coverage(method, arguments.draws, arguments.documents) for method in METHODS}
    print(
        f"{arguments.draws} draws of {arguments.documents} documents in {N_SHARDS} shards; share that holds the truth"
    )
    print(f"{'':36}" + "".join(f"{method:>25}" for method in METHODS))
    for name in SHOWN:
        print(f"{name:36}" + "".join(f"{found[name]:25.3f}" for found in table.values()))


if __name__ == "__main__":
    main()
