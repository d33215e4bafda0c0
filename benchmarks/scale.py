"""One SAE over several processes: each one's memory, what it hands to the others, and tokens per second, beside the formulas.

    python benchmarks/scale.py                                   1, 2 and 4 processes on this CPU, in a minute
    python benchmarks/scale.py --layouts 1x1 2x2 --n-latents 131072

Memory is anonymous resident memory above what libraries and the process group take, at its most while training steps are taken
(`state`), and while a checkpoint and the SAE as one file are saved as well (`saving`). Linux only.
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch

from mlsae import costs, fingerprint
from mlsae.checkpoint import Checkpoint, RunDirectory, export_sae
from mlsae.config import MLSAEConfig, TrainerConfig
from mlsae.mesh import Mesh, open_mesh
from mlsae.parallel import make_sae
from mlsae.trainer import Trainer
from ranks import run_ranks

STEPS = 4


@dataclass(frozen=True)
class Work:
    """What every layout does."""

    n_latents: int
    d_model: int
    n_layers: int
    tokens: int
    """Of a micro-batch, over all processes."""
    k: int


@dataclass(frozen=True)
class Measured:
    """What one rank saw."""

    state: int
    """Most bytes above the baseline while it trained."""
    saving: int
    """The same, a save included."""
    calls: dict[str, int]
    """Collectives of one micro-batch, its optimizer step not counted."""
    payload: dict[str, int]
    """Bytes handed to them."""
    step_payload: dict[str, int]
    """The same of the optimizer step."""
    tokens_per_second: float


class Peak:
    """The most anonymous memory that this process has had since it was made, looked at every millisecond."""

    def __init__(self) -> None:
        self.most, self._over = anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(0.001):
            self.most = max(self.most, anonymous())

    def stop(self) -> None:
        """Look no more."""
        self._over.set()
        self._thread.join()


def anonymous() -> int:
    """Resident bytes that are not of a file: what this process allocated."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in /proc/self/status")


def measured(work: Work, dp: int, tp: int, folder: str) -> Measured:
    """One rank's part: a small SAE first, which wakes everything up, and then the one that is measured."""
    os.fsync = lambda _: None
    with open_mesh(dp, tp, torch.device("cpu")) as mesh:
        trained(Work(64 * tp, work.d_model, work.n_layers, work.tokens, work.k), mesh)
        base, peak = anonymous(), Peak()
        trainer, calls, payload, step_payload, speed = trained(work, mesh)
        state = peak.most - base
        save(trainer, mesh, folder)
        peak.stop()
        return Measured(state, peak.most - base, calls, payload, step_payload, speed)


def trained(work: Work, mesh: Mesh) -> tuple[Trainer, dict[str, int], dict[str, int], dict[str, int], float]:
    """A trainer after a few steps, what one micro-batch and one update exchanged, and tokens per second."""
    torch.manual_seed(0)
    layers = tuple(range(work.n_layers))
    config = MLSAEConfig(layers=layers, d_model=work.d_model, n_latents=work.n_latents, k=work.k)
    sae = make_sae(config, mesh)
    trainer = Trainer(sae, TrainerConfig(lr=1e-4, init_tokens=64), mesh=mesh)
    draw = torch.Generator().manual_seed(1)
    resid = torch.randn(work.n_layers, work.tokens, work.d_model, generator=draw)
    own = resid[:, mesh.share(work.tokens)]
    trainer.initialise([resid])
    exchanged, seconds = [], []
    for _ in range(STEPS):
        began = time.monotonic()
        exchanged = []
        for part in (lambda: trainer.accumulate(own), trainer.update):
            mesh.calls.clear()
            mesh.bytes.clear()
            part()
            exchanged.append((dict(mesh.calls), dict(mesh.bytes)))
        seconds.append(time.monotonic() - began)
    (calls, payload), (_, step_payload) = exchanged
    return trainer, calls, payload, step_payload, work.tokens / min(seconds)


def save(trainer: Trainer, mesh: Mesh, folder: str) -> None:
    """What the loop does every `save_every_steps`."""
    out = Path(folder) / "run"
    config = {"n_latents": trainer.sae.config.n_latents, "groups": 1}
    run = RunDirectory(out, config, resume=False, mesh=mesh)
    info = {"sae": trainer.sae.config.to_dict()}
    run.save(Checkpoint(trainer.steps, dict(trainer.sae.state_dict()), trainer.state(), info), 2)
    if mesh.tp == 1:
        mesh.by_leader(lambda: trainer.sae.save_pretrained(out / "sae"))
    else:
        behaviour = fingerprint.behaviour(trainer.sae)
        mesh.by_leader(lambda: export_sae(run.steps()[-1], out / "sae", behaviour))


def expected(work: Work, dp: int, tp: int) -> dict[str, tuple[int, int]]:
    """Payload of a micro-batch and of a step, by axis, from the formulas."""
    tokens = -(-work.tokens // dp)
    over_tp = costs.code_payload(work.n_layers, tokens, work.k)
    over_tp += costs.sums_payload(work.n_layers, tokens, work.d_model)
    over_dp = (
        costs.clock_payload(work.n_latents, work.n_layers),
        costs.gradient_payload(work.n_latents, work.d_model, 1 / tp),
    )
    return {"tp": (over_tp if tp > 1 else 0, 0), "dp": over_dp if dp > 1 else (0, 0)}


def main() -> int:
    """Print the table; 1 if a rank holds more of the state than its share and a tenth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=["1x1", "1x2", "1x4", "2x1", "2x2"], help="dp x tp")
    parser.add_argument("--n-latents", type=int, default=32_768)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--n-layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--k", type=int, default=32)
    options = parser.parse_args()
    work = Work(options.n_latents, options.d_model, options.n_layers, options.tokens, options.k)
    whole = costs.state_bytes(work.n_latents, work.d_model)
    print(f"{work}; the whole state by formula: {whole / 1e6:.0f} MB")
    print(
        "layout   state MB  of whole  formula   saving MB   micro-batch: calls, kB tp (formula), kB dp (formula)   tokens/s"
    )
    alone, worst = None, 0.0
    for layout in options.layouts:
        dp, tp = map(int, layout.split("x"))
        with tempfile.TemporaryDirectory(prefix="mlsae-scale-") as folder:
            ranks: list[Any] = run_ranks(dp * tp, measured, work, dp, tp, folder, seconds=600)
        state, saving = max(rank.state for rank in ranks), max(rank.saving for rank in ranks)
        alone = state if alone is None else alone
        excess = state / alone - 1 / tp
        worst = max(worst, excess if tp > 1 else 0.0)
        formula = costs.state_bytes(work.n_latents, work.d_model, 1 / tp)
        wanted, first = expected(work, dp, tp), ranks[0]
        kb = {axis: f"{first.payload.get(axis, 0) / 1e3:.1f} ({wanted[axis][0] / 1e3:.1f})" for axis in ("tp", "dp")}
        print(
            f"dp{dp} tp{tp} {state / 1e6:9.0f} {state / alone:9.3f} {formula / 1e6:8.0f} {saving / 1e6:11.0f}   "
            f"{first.calls}, {kb['tp']}, {kb['dp']}; a step {first.step_payload}   {first.tokens_per_second:8.0f}",
            flush=True,
        )
    print(f"a rank holds at most 1 / tp + {100 * worst:.1f} % of the state of one process")
    return 0 if worst <= 0.1 else 1


if __name__ == "__main__":
    sys.exit(main())
