"""Time and memory of the depth statistics of given codes, beside the published scripts' own arithmetic on the same codes.

    python benchmarks/depth.py                    32,768 latents on 6 layers, then the size of an SAE of stories15M

`ours` is everything that LayerStatistics keeps, in shards of documents for intervals. `official` is what the published code runs
for its two files of statistics, dists.py (totals and counts) and variances.py (the ratios): its own classes, on the dense
[layer, token, latent] array that it makes of the top k. The last column, the published rel_t, shows that they count alike.
"""

import argparse
import importlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import harness
import peers
from harness import OURS, Contest, Goal, Launch, Turns

TIMES = 20
"""How much faster and leaner than the published arithmetic we mean to be, at the larger size."""
TOKENS_PER_SECOND = 100_000
"""On one core, at the size of stories15M."""


@dataclass(frozen=True)
class CodeWork:
    """The codes of one sequence."""

    n_layers: int = 6
    n_tokens: int = 2048
    n_latents: int = 32_768
    k: int = 32
    document: int = 300
    """Tokens of a document."""

    def __str__(self) -> str:
        return f"{self.n_layers} layers x {self.n_tokens:,} tokens, {self.n_latents:,} latents, k {self.k}"


WORKS = {"32,768 latents": CodeWork(), "stories15M": CodeWork(n_latents=4608)}


def codes(work: CodeWork) -> tuple[Any, Any]:
    """Values and indices [layer, token, k]: about two in three latents of a token go on to its next layer."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape, each = (work.n_tokens, work.k), work.n_latents // work.k
    layers = [torch.randint(each, shape, generator=generator)]
    for _ in range(1, work.n_layers):
        goes_on = torch.rand(shape, generator=generator) < 2 / 3
        layers.append(torch.where(goes_on, layers[-1], torch.randint(each, shape, generator=generator)))
    indices = torch.stack(layers) + torch.arange(work.k) * each  # every place has latents of its own: none comes twice
    return torch.rand(indices.shape, generator=generator) + 0.1, indices


def ours(work: CodeWork, turns: Turns) -> None:
    """`LayerStatistics`."""
    import torch

    from mlsae.analysis.layers import LayerStatistics, PlainCode
    from mlsae.intervals import N_SHARDS, shard_of

    code = PlainCode(*codes(work))
    document, statistics = torch.arange(work.n_tokens) // work.document, None
    peers.note_versions(turns, "mlsae", "numpy")
    for i in turns:
        if statistics is None:
            statistics = LayerStatistics(work.n_layers, work.n_latents, N_SHARDS)
        statistics.update(code, shard=shard_of(document + i * work.n_tokens // work.document))
        turns.value = statistics.lawson2024().rel_t


def official(work: CodeWork, turns: Turns) -> None:
    """`Metric` of dists.py and of variances.py."""
    root = peers.checkout("official") / "mlsae"
    import torch

    for package in ("mlsae", "mlsae.model"):
        peers.bypass(package, root.joinpath(*package.split(".")[1:]))
    scatter_topk = importlib.import_module("mlsae.model.decoder").scatter_topk
    top_k: Any = importlib.import_module("mlsae.model.types").TopK
    dists, variances = (_metric(root / "analysis" / f"{name}.py", top_k) for name in ("dists", "variances"))
    turns.modifications.append(
        "class Metric is taken out of its two files: what else is in them needs the network and Python 3.12"
    )
    values, indices = (x[:, None] for x in codes(work))  # [layer, batch, pos, k]
    counts, ratios = dists(work.n_layers, work.n_latents), variances(work.n_layers, work.n_tokens, work.n_latents)
    peers.note_versions(turns)
    with torch.no_grad():
        for _ in turns:
            top = top_k(values, indices)
            counts.update(top)
            ratios.update(scatter_topk(top, work.n_latents).flatten(1, 2))
            turns.value = ratios.compute()["rel_var_t"]


def _metric(path: Any, top_k: Any) -> Any:
    """A file's class of that name, as it stands there."""
    import torch

    source = path.read_text()
    names: dict[str, Any] = {"torch": torch, "TopK": top_k}
    end = source.index("@torch.no_grad()") if "variances" in path.name else source.index("def get_stats")
    exec(source[source.index("class Metric") : end], names)  # the peer's own code
    return names["Metric"]


CONTENDERS = {OURS: ours, "official": official}


def main() -> None:
    """Be a worker, or measure what is asked for."""
    options = harness.parser(__doc__, list(CONTENDERS), list(CONTENDERS)).parse_args()
    options.threads = options.threads or 1
    if options.worker is not None:
        work = CodeWork(**options.worker_work)
        harness.serve(lambda turns: CONTENDERS[options.worker](work, turns))
    harness.print_header(options)
    contests = {}
    for name, work in WORKS.items():
        print(f"\n{name}: {work}", flush=True)
        contests[name] = harness.compete(
            [launch(each, work, options) for each in harness.chosen(options)], options.rounds
        )
        harness.print_contest(contests[name], work.n_tokens, "tokens", "rel_t")
    harness.print_modifications(list(contests.values()))
    found = goals(contests)
    harness.print_goals(found)
    harness.write_json(options, {name: asdict(work) for name, work in WORKS.items()}, contests, found)


def launch(name: str, work: CodeWork, options: argparse.Namespace) -> Launch:
    """How to start a contender as this script's worker."""
    python = peers.interpreter(name)
    return Launch(
        name, [python, __file__, "--worker", name, "--worker-work", json.dumps(asdict(work))], options.threads
    )


def goals(contests: dict[str, Contest]) -> list[Goal]:
    """Times faster and leaner where the published arithmetic is at its largest; tokens per second where models are small."""
    large, small = contests["32,768 latents"], contests["stories15M"]
    added = [large.added_mib(name) if name in large.turns else None for name in ("official", OURS)]
    leaner = None if None in added else added[0] / max(added[1], 1.0)
    seconds = harness.median(small.turns[OURS], "cpu") if OURS in small.turns else None
    return [
        Goal("32,768 latents: official / ours, CPU", TIMES, large.ratio("official", OURS)),
        Goal("32,768 latents: official / ours, memory added", TIMES, leaner),
        Goal(
            "stories15M: ours, tokens per CPU second",
            TOKENS_PER_SECOND,
            None if seconds is None else WORKS["stories15M"].n_tokens / seconds,
        ),
    ]


if __name__ == "__main__":
    main()
