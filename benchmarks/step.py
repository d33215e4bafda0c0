"""Time one training step beside its floor: the encoder's one dense product, which everything else in the step is sparse to.

    python benchmarks/step.py [--rounds 9] [--threads 2]

Prints medians over rounds in which step and floor alternate, because the machine may be shared and noisy.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from mlsae import MLSAE, MLSAEConfig, Trainer

SIZES = ((30, 128, 576, 2304), (6, 2048, 512, 8192))
"""(layers, tokens, d_model, n_latents): the demo's step, and a Pythia-70m's."""


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(layers: int, tokens: int, d_model: int, n_latents: int, rounds: int) -> None:
    """Print one size: milliseconds of a step, of the floor, and the median of their per-round ratios."""
    torch.manual_seed(0)
    sae = MLSAE(MLSAEConfig(d_model=d_model, n_latents=n_latents, layers=tuple(range(layers))))
    trainer = Trainer(sae)
    resid = torch.randn(layers, tokens, d_model)
    rows, weights = resid.flatten(0, 1), sae.W_enc.detach()
    out = torch.empty(len(rows), n_latents)
    trainer.step(resid)
    steps, floors = [], []
    for _ in range(rounds):
        steps.append(seconds(lambda: trainer.step(resid)))
        floors.append(seconds(lambda: torch.mm(rows, weights.T, out=out)))
    ratio = statistics.median(step / floor for step, floor in zip(steps, floors, strict=True))
    gflops = 2 * len(rows) * d_model * n_latents / 1e9
    print(
        f"{layers} layers x {tokens} tokens, d_model {d_model}, n_latents {n_latents}: "
        f"step {1e3 * statistics.median(steps):.0f} ms, encoder product {1e3 * statistics.median(floors):.0f} ms "
        f"({gflops:.0f} GFLOP), ratio {ratio:.2f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for size in SIZES:
        measure(*size, options.rounds)
