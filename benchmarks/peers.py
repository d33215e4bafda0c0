"""One adapter per peer: where its published code is, and how its own training step is made to run on the vectors we give it.

A peer runs in the Python that MLSAE_BENCH_<PEER>_PYTHON names (default: the one that runs the benchmark); official mlsae and
dictionary_learning, which are no packages, are read from the checkout that MLSAE_BENCH_<PEER>_DIR names. An adapter notes every
modification it makes. Where a library has a loop of its own, that loop runs and draws its data from `turns`.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import Absent, Turns
from workload import QUIET, StepWork, dead_ids, kill, residuals

CHECKOUTS = {
    "official": "tim-lawson/mlsae at ba90c51",
    "dictionary-learning": "saprmarks/dictionary_learning at 60ec6bf",
}
DICTIONARY_LEARNING_WARMUP = 1001
"""Its steps differ in cost up to the 1,000th."""


@dataclass(frozen=True)
class Contender:
    """A way of doing some work."""

    family: str
    """Whose code it is: variants of one peer share a Python and a checkout, and a goal is about the fastest of them."""
    run: Callable[[Any, Turns], None]
    """Sets up, then does what `turns` asks for."""


def interpreter(family: str) -> str:
    """The Python that a family runs in."""
    return os.environ.get(f"MLSAE_BENCH_{_shout(family)}_PYTHON", sys.executable)


def checkout(family: str) -> Path:
    """The folder a family is read from. Raises Absent if none is named."""
    variable = f"MLSAE_BENCH_{_shout(family)}_DIR"
    if not (folder := os.environ.get(variable)):
        raise Absent(f"set {variable} to a checkout of {CHECKOUTS[family]}")
    if not Path(folder).is_dir():
        raise Absent(f"{variable}={folder} is no folder")
    return Path(folder).resolve()


def need(package: str, distribution: str, family: str) -> None:
    """Fail fast, before torch is imported, where a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise Absent(
            f"{distribution} is not installed; set MLSAE_BENCH_{_shout(family)}_PYTHON to a Python that has it"
        )


def note_versions(turns: Turns, *distributions: str) -> None:
    """Say which versions a contender runs on, and with how many threads."""
    import torch

    turns.versions |= {"torch": torch.__version__}
    turns.versions |= {name: importlib.metadata.version(name) for name in distributions}
    turns.versions |= {"threads": str(torch.get_num_threads())}


def bypass(name: str, folder: Path) -> None:
    """Make a package importable without running its __init__."""
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


def _shout(family: str) -> str:
    return family.upper().replace("-", "_")


# ---- ours ------------------------------------------------------------------------------------------------------------


def ours(work: StepWork, turns: Turns, *, impl: str = "auto", recipe: str = "standard", micro: int = 1) -> None:
    """`Trainer.step`, or the same from `micro` micro-batches."""
    import torch

    from mlsae import MLSAE, MLSAEConfig, Trainer

    torch.manual_seed(0)
    config = our_config(impl, recipe=recipe, k_aux=work.k_aux)
    frame: Any = {"frame": "vector", "special_tokens": "zero", "recipe": recipe} if recipe == "lawson2024" else {}
    layers = tuple(range(work.n_layers))
    sae = MLSAE(MLSAEConfig(d_model=work.d_model, n_latents=work.n_latents, k=work.k, layers=layers, **frame))
    batches, dead = residuals(work), dead_ids(work)
    kill(sae.W_enc, dead)
    trainer = Trainer(sae, config)
    note_versions(turns, "mlsae")
    for i in turns:
        trainer.quiet[dead] = QUIET
        for part in batches[i % len(batches)].chunk(micro, dim=1):
            trainer.accumulate(part)
        turns.value = trainer.update().loss


def our_config(impl: str, **knobs: Any) -> Any:
    """A TrainerConfig for an implementation of our ops. Raises Absent where the installed version cannot choose one."""
    from mlsae import TrainerConfig

    if "impl" in TrainerConfig.model_fields:
        knobs["impl"] = impl
    elif impl != "auto":
        raise Absent("the TrainerConfig of the mlsae that is installed has no impl")
    return TrainerConfig(**knobs)


def sgemm(work: StepWork, turns: Turns) -> None:
    """The encoder's one dense product in float32: everything else in a step is sparse beside it."""
    import torch

    rows = [batch.flatten(0, 1) for batch in residuals(work)]
    weights = torch.empty(work.n_latents, work.d_model).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    out = torch.empty(len(rows[0]), work.n_latents)
    note_versions(turns)
    for i in turns:
        torch.mm(rows[i % len(rows)], weights.T, out=out)


# ---- official mlsae --------------------------------------------------------------------------------------------------


def official(work: StepWork, turns: Turns) -> None:
    """The published module, losses and decoder rules, in the order in which Lightning calls them.

    In float32: its sparse product refuses the bfloat16 that Lightning makes of the published precision on a CPU.
    """
    root = checkout("official") / "mlsae"
    for package in ("mlsae", "mlsae.model", "mlsae.metrics"):
        bypass(package, root.joinpath(*package.split(".")[1:]))
    turns.modifications += [
        "package __init__ files are bypassed: they import Lightning, wandb and tuned_lens, which a step does not need",
        "Lightning's loop, the training metrics and the logging are left out: losses, backward, decoder rules, Adam remain",
        "float32: on a CPU the published 16-mixed becomes bfloat16, which its sparse product refuses",
    ]
    autoencoder = importlib.import_module("mlsae.model.autoencoder")
    geometric_median = importlib.import_module("mlsae.model.geom_median").geometric_median
    mse_loss = importlib.import_module("mlsae.metrics.mse_loss").MSELoss(work.n_layers)
    aux_loss = importlib.import_module("mlsae.metrics.auxiliary_loss").AuxiliaryLoss(1 / 32)
    import torch

    torch.manual_seed(0)
    steps_to_death = 10_000_000 // 131_072
    sae = autoencoder.MLSAE(work.d_model, work.n_latents, work.k, steps_to_death, 1e-3, work.k_aux, True)
    batches, dead = [batch.unsqueeze(1) for batch in residuals(work)], dead_ids(work)
    kill(sae.encoder.weight, dead)
    adam = torch.optim.Adam(sae.parameters(), lr=1e-4, eps=6.25e-10)
    note_versions(turns)
    for i in turns:
        inputs = batches[i % len(batches)]
        sae.last_nonzero[dead] = QUIET
        if i == 0:
            sae.pre_encoder_bias.data = geometric_median(inputs)
        out = sae.forward(inputs)
        loss = mse_loss.forward(inputs=inputs, recons=out.recons)
        loss = loss + aux_loss.forward(inputs=inputs, recons=out.recons, auxk_recons=out.auxk_recons)
        adam.zero_grad()
        loss.backward()
        autoencoder.unit_norm_decoder(sae.decoder)
        autoencoder.unit_norm_decoder_gradient(sae.decoder)
        adam.step()
        turns.value = loss.detach()


# ---- EleutherAI sparsify ---------------------------------------------------------------------------------------------


def sparsify(work: StepWork, turns: Turns, *, optimizer: str = "adam", micro_batches: int = 1) -> None:
    """The published `Trainer.fit`, on a language model that does nothing but hand over our vectors."""
    need("sparsify", "eai-sparsify", "sparsify")
    import torch
    from sparsify import SparseCoderConfig, Trainer
    from sparsify.config import TrainConfig

    batches, dead = [batch.flatten(0, 1)[None] for batch in residuals(work)], dead_ids(work)

    class HandsOver(torch.nn.Module):
        """Stands in for the language model: its one block puts out the batch whose turn it is."""

        device = torch.device("cpu")
        dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}  # noqa: RUF012 - as in transformers

        def __init__(self) -> None:
            super().__init__()
            self.block = torch.nn.Identity()
            self.number = 0

        @property
        def base_model(self) -> torch.nn.Module:
            return self

        def forward(self, input_ids: Any) -> Any:
            return self.block(batches[self.number % len(batches)])

    class Rows:
        """A dataset of one row per step."""

        def __len__(self) -> int:
            return QUIET

        def __getitem__(self, index: int) -> dict[str, Any]:
            lm.number, turns.value = next(turns), None
            for since_fired in trainer.num_tokens_since_fired.values():
                since_fired[dead] = QUIET
            return {"input_ids": torch.zeros(work.n_vectors, dtype=torch.long)}

    def note(fvu: Any) -> None:
        turns.value = fvu if turns.value is None else turns.value + fvu

    lm = HandsOver()
    config = TrainConfig(
        SparseCoderConfig(num_latents=work.n_latents, k=work.k),
        batch_size=1,
        hookpoints=["block"],
        auxk_alpha=1 / 32,
        optimizer=optimizer,
        micro_acc_steps=micro_batches,
        log_to_wandb=False,
    )
    trainer = Trainer(config, Rows(), lm)
    sae = trainer.saes["block"]
    kill(sae.encoder.weight, dead)
    sae.register_forward_hook(lambda module, inputs, out: note(out.fvu.detach()))
    turns.modifications += [
        "the language model is a stand-in that hands over the given vectors; Trainer.fit is the published one",
        "auxk_alpha 1/32 (its default is 0: no AuxK); wandb off; a forward hook notes the loss",
    ]
    turns.modifications += {
        "adam": ["optimizer adam, which the others use (its default is signum)"],
        "signum": [],
    }[optimizer]
    if micro_batches > 1:
        turns.modifications.append(f"micro_acc_steps {micro_batches} (default 1)")
    note_versions(turns, "eai-sparsify", "transformers")
    trainer.fit()


# ---- SAELens ---------------------------------------------------------------------------------------------------------


def saelens(work: StepWork, turns: Turns, *, sparse: bool = False, bfloat16: bool = False) -> None:
    """The published `SAETrainer.fit` on a `TopKTrainingSAE`."""
    need("sae_lens", "sae-lens", "saelens")
    import torch
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    config = TopKTrainingSAEConfig(
        d_in=work.d_model,
        d_sae=work.n_latents,
        k=work.k,
        use_sparse_activations=sparse,
        rescale_acts_by_decoder_norm=not sparse,
        device="cpu",
        dtype="float32",
    )
    sae = TopKTrainingSAE(config)
    batches, dead = [batch.flatten(0, 1) for batch in residuals(work)], dead_ids(work)
    kill(sae.W_enc, dead, dim=1)

    def rows() -> Iterator[Any]:
        for i in turns:
            trainer.n_forward_passes_since_fired[dead] = QUIET
            yield batches[i % len(batches)]

    settings = SAETrainerConfig(
        total_training_samples=QUIET * work.n_vectors,
        train_batch_size_samples=work.n_vectors,
        lr_end=3e-5,
        autocast=bfloat16,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(settings, sae, data_provider=rows())
    step = trainer.step

    def noting(batch: Any) -> Any:
        out = step(batch)
        turns.value = out.loss.detach()
        return out

    trainer.step = noting
    turns.modifications.append(
        "wandb off; SAETrainer.step is wrapped to note the loss; SAETrainer.fit is the published one"
    )
    if sparse:
        turns.modifications.append(
            "use_sparse_activations on (default off); rescale_acts_by_decoder_norm off, for on a CPU its backward pass fails"
        )
    if bfloat16:
        turns.modifications.append("autocast on (default off)")
    note_versions(turns, "sae-lens", "transformer-lens")
    trainer.fit()


# ---- dictionary_learning ---------------------------------------------------------------------------------------------


def dictionary_learning(work: StepWork, turns: Turns) -> None:
    """The published `TopKTrainer.update`, which is all that its loop calls."""
    root = checkout("dictionary-learning") / "dictionary_learning"
    bypass("dictionary_learning", root)
    bypass("dictionary_learning.trainers", root / "trainers")
    top_k = importlib.import_module("dictionary_learning.trainers.top_k")
    turns.modifications += [
        "package __init__ files are bypassed: they import nnsight, which a step does not need",
        f"steps are numbered from {DICTIONARY_LEARNING_WARMUP}: its steps cost less before; the bias is set by its "
        "geometric median, as at its step 0",
    ]
    trainer = top_k.TopKTrainer(
        steps=QUIET,
        activation_dim=work.d_model,
        dict_size=work.n_latents,
        k=work.k,
        layer=0,
        lm_name="none",
        device="cpu",
        seed=0,
    )
    batches, dead = [batch.flatten(0, 1) for batch in residuals(work)], dead_ids(work)
    kill(trainer.ae.encoder.weight, dead)
    note_versions(turns)
    for i in turns:
        batch = batches[i % len(batches)]
        if i == 0:
            trainer.ae.b_dec.data = top_k.geometric_median(batch)
        trainer.num_tokens_since_fired[dead] = QUIET
        turns.value = trainer.update(i + DICTIONARY_LEARNING_WARMUP, batch)


CONTENDERS = {
    "ours": Contender("ours", ours),
    "ours-micro6": Contender("ours-micro6", lambda work, turns: ours(work, turns, micro=6)),
    "ours-reference": Contender("ours-reference", lambda work, turns: ours(work, turns, impl="reference")),
    "ours-lawson2024": Contender("ours-lawson2024", lambda work, turns: ours(work, turns, recipe="lawson2024")),
    "sgemm": Contender("sgemm", sgemm),
    "official": Contender("official", official),
    "sparsify": Contender("sparsify", sparsify),
    "sparsify-signum": Contender("sparsify", lambda work, turns: sparsify(work, turns, optimizer="signum")),
    "sparsify-micro6": Contender("sparsify", lambda work, turns: sparsify(work, turns, micro_batches=6)),
    "saelens": Contender("saelens", saelens),
    "saelens-sparse": Contender("saelens", lambda work, turns: saelens(work, turns, sparse=True)),
    "saelens-bf16": Contender("saelens", lambda work, turns: saelens(work, turns, bfloat16=True)),
    "dictionary-learning": Contender("dictionary-learning", dictionary_learning),
}
PEERS = ("official", "sparsify", "saelens", "dictionary-learning")
"""Families that are not ours."""
