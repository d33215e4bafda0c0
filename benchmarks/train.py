"""Time training from end to end: tokens in, language model, SAE, optimizer, in tokens per second.

    python benchmarks/train.py [--accumulation 4] [--n-latents 32768]

The language model is a GPT-NeoX of Pythia-70m's shape with random weights, and all its six layers are trained on. Ours and
official mlsae train one SAE for all layers; sparsify trains one of the same size for each, which is as many products. Each runs
its own loop: README.md beside this file says how to have the peers take part.
"""

import argparse
import json
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
import peers
from harness import OURS, Goal, Launch, Turns
from workload import QUIET, TextWork, neox, save_neox, tokens, word_tokenizer

TIMES_OURS = 6
"""How many times our wall time official mlsae's should be."""


def main() -> None:
    """Be a worker, or measure what is asked for."""
    options = arguments()
    if options.worker is not None:
        work = TextWork(**options.worker_work)
        harness.serve(lambda turns: CONTENDERS[options.worker].run(work, turns))
    harness.print_header(options)
    work = TextWork(
        batch=options.batch,
        context=options.context,
        accumulation=options.accumulation,
        n_latents=options.n_latents,
    )
    print(f"\n{work}, n_latents {work.n_latents:,}, k {work.k}", flush=True)
    launches = [launch(name, work, options) for name in harness.chosen(options)]
    contest = harness.compete(launches, options.rounds, warmup=3)  # a loop may fetch its batches ahead
    harness.print_contest(contest, work.n_tokens, "tokens")
    harness.print_modifications([contest])
    claim = "ours / official, tokens per second"
    goals = [Goal(claim, TIMES_OURS, contest.ratio("official", OURS, "wall"))]
    harness.print_goals(goals)
    harness.write_json(options, {"train": asdict(work)}, {"train": contest}, goals)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = harness.parser(__doc__, list(CONTENDERS), list(CONTENDERS))
    parser.add_argument(
        "--batch", type=int, default=1, help="sequences in a forward pass (default 1, as official mlsae)"
    )
    parser.add_argument("--context", type=int, default=2048, help="tokens of a sequence (default 2048)")
    parser.add_argument("--accumulation", type=int, default=1, help="forward passes in an optimizer step (default 1)")
    parser.add_argument("--n-latents", type=int, default=8192, help="a multiple of 512 (default 8192)")
    return parser.parse_args()


def launch(name: str, work: TextWork, options: argparse.Namespace) -> Launch:
    """How to start a contender as this script's worker."""
    python = peers.interpreter(CONTENDERS[name].family)
    command = [python, __file__, "--worker", name, "--worker-work", json.dumps(asdict(work))]
    return Launch(name, command, options.threads)


@dataclass
class Batches:
    """An endless loader of micro-batches; the first of each optimizer step waits for its turn."""

    work: TextWork
    turns: Turns

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = tokens(self.work, self.work.d_vocab)
        for i in self.turns:
            for _ in range(self.work.accumulation):
                yield {"input_ids": batches[i % len(batches)]}


def ours(work: TextWork, turns: Turns, *, impl: str = "auto") -> None:
    """What `train` does in a step."""
    import torch

    from mlsae import MLSAE, LanguageModel, MLSAEConfig, Trainer
    from mlsae.reading import read

    torch.manual_seed(0)
    lm = LanguageModel(neox(work), word_tokenizer(work.d_vocab), name="random")
    layers = tuple(range(lm.n_layers))
    sae = MLSAE(MLSAEConfig(d_model=lm.d_model, n_latents=work.n_latents, k=work.k, layers=layers))
    trainer = Trainer(sae, peers.our_config(impl, k_aux=work.k_aux))
    turns.modifications += ["tokens are given, not read from text; nothing is written to disk"]
    peers.note_versions(turns, "mlsae", "transformers")
    batches = tokens(work, work.d_vocab)
    for i in turns:
        for _ in range(work.accumulation):
            trainer.accumulate(read(lm, sae, batches[i % len(batches)]).to_train(sae))
        turns.value = trainer.update().loss


def official(work: TextWork, turns: Turns) -> None:
    """The published `MLSAETransformer` in Lightning's own loop."""
    sys.path.insert(0, str(peers.checkout("official")))
    for package in ("lightning", "tuned_lens", "wandb"):
        peers.need(package, package.replace("_", "-"), "official")
    from lightning.pytorch import Callback, Trainer
    from mlsae.model import MLSAETransformer
    from mlsae.trainer.config import initialize

    initialize(42)
    model = MLSAETransformer(
        save_neox(work, Path.cwd() / "lm"),
        expansion_factor=work.n_latents // 512,
        k=work.k,
        auxk=work.k_aux,
        max_length=work.context,
        batch_size=work.batch,
        accumulate_grad_batches=work.accumulation,
    )

    losses = deque[Any](maxlen=work.accumulation)

    class Note(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            losses.append(outputs["loss"].detach())  # already divided by the number of passes
            turns.value = sum(losses)

    trainer = Trainer(
        accelerator="cpu",
        precision="32-true",
        logger=False,
        callbacks=[Note()],
        max_epochs=1,
        limit_val_batches=0,
        accumulate_grad_batches=work.accumulation,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    turns.modifications += [
        "tokens are given, not read from text; no validation, checkpoints, progress bar or wandb; a callback notes the loss",
        "precision 32-true: on a CPU the published 16-mixed becomes bfloat16, which its sparse product refuses",
        "deterministic off: the published on costs time",
    ]
    peers.note_versions(turns, "lightning", "transformers", "tuned-lens")
    trainer.fit(model, train_dataloaders=Batches(work, turns))


def sparsify(work: TextWork, turns: Turns, *, micro_batches: int = 1) -> None:
    """The published `Trainer.fit`, with an SAE on every layer."""
    peers.need("sparsify", "eai-sparsify", "sparsify")
    import torch
    from sparsify import SparseCoderConfig, Trainer
    from sparsify.config import TrainConfig

    torch.manual_seed(0)
    lm = neox(work)
    batches = tokens(work, work.d_vocab)
    step_rows = work.batch * work.accumulation

    class Rows:
        """A dataset of one row per sequence."""

        now = 0

        def __len__(self) -> int:
            return QUIET

        def __getitem__(self, index: int) -> dict[str, Any]:
            if index % step_rows == 0:
                self.now, turns.value = next(turns), None
            return {"input_ids": batches[self.now % len(batches)][index % work.batch]}

    config = TrainConfig(
        SparseCoderConfig(num_latents=work.n_latents, k=work.k),
        batch_size=work.batch,
        grad_acc_steps=work.accumulation,
        micro_acc_steps=micro_batches,
        auxk_alpha=1 / 32,
        optimizer="adam",
        log_to_wandb=False,
    )
    trainer = Trainer(config, Rows(), lm)
    n_parts = len(trainer.saes) * work.accumulation

    def note(module: Any, inputs: Any, out: Any) -> None:
        turns.value = (turns.value or 0.0) + out.fvu.detach() / n_parts

    for sae in trainer.saes.values():
        sae.register_forward_hook(note)
    turns.modifications += [
        "tokens are given, not read from text; wandb off; forward hooks note the loss",
        "auxk_alpha 1/32 (its default is 0: no AuxK); optimizer adam, which the others use (its default is signum)",
    ]
    if micro_batches > 1:
        turns.modifications.append(f"micro_acc_steps {micro_batches} (default 1)")
    peers.note_versions(turns, "eai-sparsify", "transformers")
    trainer.fit()


CONTENDERS = {
    OURS: peers.Contender("ours", ours),
    "ours-reference": peers.Contender("ours-reference", lambda work, turns: ours(work, turns, impl="reference")),
    "official": peers.Contender("official", official),
    "sparsify": peers.Contender("sparsify", sparsify),
}


if __name__ == "__main__":
    main()
