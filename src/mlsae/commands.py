"""What every command can be told, and the one call it makes. Nothing heavy is imported until a command runs."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import Field

from mlsae.config import Config, Materials, Positive, TrainConfig
from mlsae.errors import ConfigError

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Sae = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SAE")]


class Output(Config):
    """What every command can be told about its output."""

    json_: Annotated[str | None, tyro.conf.arg(name="json", metavar="FILE")] = None
    """Also write the result as JSON to this file; `-` prints it instead of the table."""
    quiet: bool = False
    """No progress bars."""
    debug: bool = False
    """Show the traceback of an error."""
    offline: bool = False
    """Use no network: folders, and what is in the Hub's cache."""


class Demo(Output):
    """The whole story on a real model with no network: train, evaluate, analyze, report."""

    out: str | None = None
    """Folder to write; None: demo, or demo-2, demo-3 ... if that is taken."""
    minutes: Annotated[float, Field(gt=0)] = 7.0
    """Wall time to aim for; it sets how much text is read."""


class Train(Output, TrainConfig):
    """Train one sparse autoencoder on every layer of a language model."""

    config: str | None = None
    """YAML or JSON file of these same keys; flags win over it."""
    resume: bool = False
    """Go on from the newest checkpoint in the run directory."""


class Reader(Config):
    """What evaluate and analyze read."""

    sae: Sae
    """Run directory, SAE folder or Hub id."""
    lm: str | None = None
    """Language model; None: the one the SAE was trained on."""
    data: str | None = None
    """Text file, folder or Hub dataset; None: the text the SAE was trained on."""
    split: str | None = None
    """Part of the data; None: what was held out from training, or all of any other text."""
    context_length: Positive | None = None
    """Tokens in a sequence; None: 2048 or the language model's limit."""


class Evaluate(Output, Reader):
    """Measure how good an SAE is on held-out text, layer by layer."""

    tokens: Positive = 1_000_000
    """Tokens to read."""
    splice_tokens: Positive | None = None
    """Of these, how many also measure cross-entropy and KL, the costly part; None: all."""


class Analyze(Output, Reader):
    """Read the layers of an SAE: where its latents live, as numbers, figures and a report."""

    out: str | None = None
    """Folder to write; None: analysis in the run directory."""
    tokens: Positive = 10_000_000
    """Tokens to read."""
    prompt: str | None = None
    """Text of the single-prompt heatmap; None: the paper's."""
    nulls: bool = True
    """Also analyze codes in which depth means nothing, to compare with."""
    directions: bool = True
    """Also compare decoder rows with each other and with embeddings; the time grows with the square of the latents."""
    examples: Annotated[int, Field(ge=0)] = 32
    """Strongest contexts to keep for every latent and layer, and half as many at random; 0: none."""


class FitLens(Output, Materials):
    """Train a tuned lens, the map of each layer that best foretells what the model says, to put before an SAE."""

    out: str
    """Folder to write."""
    tokens: Positive = 1_000_000
    """Tokens to train on; past the end of the text it starts again."""
    held_out_tokens: Positive = 20_000
    """Tokens of the validation part to judge it by."""
    context_length: Positive | None = None
    """Tokens in a sequence; None: 2048 or the language model's limit."""
    seed: int = 42
    """Seed of the data order."""
    published: str | None = None
    """Train nothing: take this lens as the tuned-lens library writes it, a folder or a Hub id, and trust its pickle."""


class SweepGrid(Output, TrainConfig):
    """Train an SAE for every combination of k, expansion factor and seed off one reading of the text, and compare them."""

    out: str
    """Folder to write: a run directory for each, sweep.json, sweep.txt and figures/."""
    k: tuple[Annotated[int, Field(ge=1)], ...] | None = None  # ty: ignore[incompatible-attribute-override]
    """Active latents of each residual vector, one or several; None: 32."""
    expansion_factor: tuple[Annotated[float, Field(gt=0)], ...] | None = None  # ty: ignore[incompatible-attribute-override]
    """Latents of one dictionary as a multiple of d_model, one or several; None: 16."""
    seed: tuple[Seed, ...] | None = None  # ty: ignore[incompatible-attribute-override]
    """Seed of the initial weights, one or several; the order of the data is that of data_seed, or the first; None: 42."""
    evaluate_tokens: Positive = 1_000_000
    """Tokens of held-out text to evaluate each SAE on."""
    splice_tokens: Positive | None = None
    """Of these, how many also measure cross-entropy and KL, the costly part; None: all."""
    resume: bool = False
    """Go on with the sweep in that folder, each arm from its newest checkpoint."""


class Reproduce(Output, TrainConfig):
    """Every figure of the paper on your language model: SAEs of several k and sizes, behind a lens, and one per layer."""

    out: str
    """Folder to write: figures/, report.html, reproduction.json and .txt, and a run directory for each SAE."""
    k: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (16, 32, 64)  # ty: ignore[incompatible-attribute-override]
    """Active latents of each residual vector to try, at the middle size."""
    expansion_factor: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (4.0, 16.0, 64.0)  # ty: ignore[incompatible-attribute-override]
    """Sizes to try, at the middle k: latents as a multiple of d_model."""
    tuned_lens: bool = True
    """Also train a tuned lens, and an SAE behind it."""
    rival: bool = True
    """Also train one dictionary for each layer, together as many latents as the main SAE."""
    random_model: bool = True
    """Also train the main SAE on the same language model with random weights, to compare with."""
    lens_tokens: Positive | None = None
    """Tokens to train the lens on; None: as many as the SAEs."""
    evaluate_tokens: Positive = 1_000_000
    """Tokens of held-out text to evaluate each SAE on."""
    splice_tokens: Positive | None = None
    """Of these, how many also measure cross-entropy and KL, the costly part; None: all."""
    analyze_tokens: Positive = 10_000_000
    """Tokens of held-out text to analyze each SAE on."""
    prompt: str | None = None
    """Text of the single-prompt heatmap; None: the paper's."""
    resume: bool = False
    """Go on with what is in that folder."""


class Compare(Output):
    """Train and compare kinds of SAE at equal budget: multi-layer against groups of layers, or any recipes."""

    comparison: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="COMPARISON.yaml")]
    """YAML file of the comparison: the keys of train, `k: [16, 32, 64]` and `arms` (docs/quickstart.md has one)."""
    out: str | None = None
    """Folder to write; None: the file's."""
    resume: bool = False
    """Go on with the comparison in that folder."""


class Info(Output):
    """Say what is installed, which devices there are, and who computes the sparse operations."""


# ---- the commands --------------------------------------------------------------------------------------------------


def run_demo(command: Demo) -> tuple[Any, str]:
    """Returns the result and what to print."""
    from mlsae.analysis.report import plain_table
    from mlsae.demo import demo

    out = command.out or next(
        name for n in range(1, 1000) if not Path(name := f"demo-{n}" if n > 1 else "demo").exists()
    )
    result = demo(out, minutes=command.minutes, progress=not command.quiet)
    run = shlex.quote(result.run.directory)
    return result, "\n".join(
        [
            plain_table(result.evaluation),
            "",
            result.outlook,
            f"{result.seconds / 60:.1f} minutes. Open {result.report}",
            f"Then look closer: mlsae analyze {run} --tokens 1e5",
        ]
    )


def run_train(command: Train) -> tuple[Any, str]:
    """Returns the result and what to print."""
    from mlsae.train import train

    values = command.model_dump(exclude={"config", "resume", *Output.model_fields})
    run = train(TrainConfig(**values), resume=command.resume, progress=not command.quiet)
    return run, (
        f"{run.steps:,} steps, {run.tokens:,} tokens ({run.passes:.2f} passes) in {run.seconds / 60:.1f} minutes: "
        f"FVU {run.fvu:.3f}, {run.dead_fraction:.1%} dead\n"
        f"{run.directory}/sae\nNext: mlsae evaluate {shlex.quote(run.directory)}"
    )


def run_evaluate(command: Evaluate) -> tuple[Any, str]:
    """Returns the result and what to print."""
    from mlsae import files
    from mlsae.analysis.report import plain_table
    from mlsae.evaluate import evaluate

    sae, lm, data = _named(command)
    evaluation = evaluate(
        sae,
        lm,
        data,
        tokens=command.tokens,
        splice_tokens=command.splice_tokens,
        split=command.split,
        context_length=command.context_length,
        progress=not command.quiet,
    )
    lines = [plain_table(evaluation), f"{evaluation.n_tokens:,} tokens, {evaluation.dead_fraction:.1%} dead latents"]
    if (run := _run_directory(command.sae)) is not None:
        files.write_json(run / "evaluation.json", evaluation.to_dict())
        lines += [str(run / "evaluation.json"), f"Next: mlsae analyze {shlex.quote(command.sae)}"]
    return evaluation, "\n".join(lines)


def run_analyze(command: Analyze) -> tuple[Any, str]:
    """Returns the result and what to print."""
    from mlsae import files
    from mlsae.analysis.report import write_report
    from mlsae.analyze import PROMPT, analyze

    run = _run_directory(command.sae)
    if command.out is None and run is None:
        raise ConfigError("out", f"'{command.sae}' is not a run directory; give --out")
    out = Path(command.out) if command.out is not None else Path(command.sae) / "analysis"
    files.probe_writable(out)
    known = {} if run is None else _known(run)  # before the work: what cannot be read must not cost it
    sae, lm, data = _named(command)
    analysis = analyze(
        sae,
        lm,
        data,
        tokens=command.tokens,
        split=command.split,
        context_length=command.context_length,
        prompt=PROMPT if command.prompt is None else command.prompt,
        nulls=command.nulls,
        directions=command.directions,
        examples=command.examples,
        progress=not command.quiet,
    )
    analysis.save(out, progress=not command.quiet)
    report, *_ = write_report(
        out / "report.html", title=f"Layers of {Path(command.sae).name}", analysis=analysis, **known
    )
    terms = analysis.statistics.decomposition()
    shares = {name: f"{getattr(terms, name) / terms.total:.0%}" for name in ("within", "token", "latent")}
    return analysis, (
        f"{analysis.statistics.n_tokens:,} tokens. Of the variance of depth {shares['within']} is within one latent on one "
        f"token, {shares['token']} between tokens, {shares['latent']} between latents.\n{report}"
    )


def run_lens(command: FitLens) -> tuple[Any, str]:
    """Returns the result and what to print."""
    from mlsae import files
    from mlsae.analysis.report import thinned
    from mlsae.data import TextSource
    from mlsae.lens import TunedLens, evaluate_lens, train_lens
    from mlsae.lm import LanguageModel
    from mlsae.reading import text_blocks

    files.probe_writable(Path(command.out))
    lm = LanguageModel.from_pretrained(command.lm)
    reading: dict[str, Any] = {"context_length": command.context_length, "progress": not command.quiet}
    held_out = text_blocks(lm, TextSource(command.data, "validation"), tokens=command.held_out_tokens, **reading)
    if command.published is not None:
        lens = TunedLens.load(command.published, lm, allow_pickle=True)
    else:
        lens = train_lens(lm, command.data, tokens=command.tokens, seed=command.seed, **reading)
    lens.save(command.out)
    quality = evaluate_lens(lens, lm, held_out, tokens=command.held_out_tokens, progress=not command.quiet)
    files.write_json(Path(command.out) / "quality.json", quality.to_dict())
    rows = [
        [f"{row['layer']}", *(f"{value:.3f}" for value in list(row.values())[1:])] for row in thinned(quality.layers)
    ]
    table = [["layer", "logit-lens KL", "tuned-lens KL", "condition"], *rows]
    named = " ".join(f"--{name} {shlex.quote(getattr(command, name))}" for name in ("lm", "data"))
    return quality, "\n".join(
        [
            *("  ".join(f"{cell:>13}" for cell in cells) for cells in table),
            f"{command.out}/lens.safetensors",
            f"Next: mlsae train {named} --out RUN --lens {shlex.quote(command.out)}",
        ]
    )


def run_sweep(command: SweepGrid) -> tuple[Any, str]:
    """Returns the result and what to print."""
    from mlsae.sweep import sweep

    swept: dict[str, Any] = {"k": command.k, "expansion_factor": command.expansion_factor, "seed": command.seed}
    values = command.model_dump(exclude={"evaluate_tokens", "splice_tokens", "resume", *swept, *Output.model_fields})
    if command.seed:
        values["seed"] = command.seed[0]
    done = sweep(
        TrainConfig(**values),
        **swept,
        evaluate_tokens=command.evaluate_tokens,
        splice_tokens=command.splice_tokens,
        resume=command.resume,
        progress=not command.quiet,
    )
    return done, "\n".join([done.table(), f"{done.directory}/sweep.json", f"{done.directory}/figures/sweep.png"])


def run_reproduce(command: Reproduce) -> tuple[Any, str]:
    """Returns the result and what to print."""
    from mlsae.analyze import PROMPT
    from mlsae.reproduce import Budget, reproduce

    own = ("k", "expansion_factor", "tuned_lens", "rival", "random_model", "prompt", "resume")
    read = ("lens_tokens", "evaluate_tokens", "splice_tokens", "analyze_tokens")
    done = reproduce(
        TrainConfig(**command.model_dump(exclude={*own, *read, *Output.model_fields})),
        k=command.k,
        expansion_factor=command.expansion_factor,
        lens=command.tuned_lens,
        rival=command.rival,
        random_model=command.random_model,
        budget=Budget(**{name: getattr(command, name) for name in read}),
        prompt=PROMPT if command.prompt is None else command.prompt,
        resume=command.resume,
        progress=not command.quiet,
    )
    return done, "\n".join([done.table(), f"{done.directory}/reproduction.json", f"{done.directory}/report.html"])


def run_compare(command: Compare) -> tuple[Any, str]:
    """Returns the result and what to print."""
    from mlsae.compare import CompareConfig, compare

    changes = {} if command.out is None else {"out": command.out}
    config = CompareConfig.load(command.comparison, **changes)
    done = compare(config, resume=command.resume, progress=not command.quiet)
    return done, "\n".join([done.table(), f"{done.directory}/comparison.json", f"{done.directory}/figures/pareto.png"])


def run_info(command: Info) -> tuple[Any, str]:
    """Returns the result and what to print."""
    from mlsae.info import info

    found = info()
    return found, str(found)


def _named(command: Evaluate | Analyze) -> tuple[Any, str, str]:
    """The SAE, and the language model and text that were named, or else those it was trained with."""
    from mlsae.sae import MLSAE

    sae = MLSAE.from_pretrained(command.sae)
    lm = sae.config.lm if command.lm is None else command.lm
    data = sae.config.data if command.data is None else command.data
    if lm is None:
        raise ConfigError("lm", "the SAE does not say what it was trained on; give --lm")
    if data is None:
        raise ConfigError("data", "the SAE does not say what it was trained on; give --data")
    return sae, lm, data


def _run_directory(sae: str) -> Path | None:
    return Path(sae) if (Path(sae) / "sae" / "config.json").is_file() else None


def _known(run: Path) -> dict[str, Any]:
    """What a run directory can add to a report."""
    from mlsae import files

    metrics, evaluation = run / "metrics.jsonl", run / "evaluation.json"
    return {
        "run": files.read_json(run / "config.json"),
        "evaluation": files.read_json(evaluation) if evaluation.is_file() else None,
        "metrics": files.read_jsonl(metrics) if metrics.is_file() else [],
    }


COMMANDS: dict[str, tuple[type[Config], Callable[[Any], tuple[Any, str]]]] = {
    "demo": (Demo, run_demo),
    "train": (Train, run_train),
    "evaluate": (Evaluate, run_evaluate),
    "analyze": (Analyze, run_analyze),
    "lens": (FitLens, run_lens),
    "sweep": (SweepGrid, run_sweep),
    "compare": (Compare, run_compare),
    "reproduce": (Reproduce, run_reproduce),
    "info": (Info, run_info),
}
HELP = """usage: mlsae COMMAND ...

Train one sparse autoencoder on every layer of a language model, and see where its latents live.

  demo       the whole story on a real model with no network, in minutes
  train      train an SAE on every layer of a language model
  evaluate   how good it is on held-out text, layer by layer
  analyze    where in depth its latents live: numbers, figures, a report
  lens       train a tuned lens, to put before an SAE
  sweep      several k, sizes and seeds off one reading of the text
  compare    kinds of SAE at equal budget, set beside each other
  reproduce  every figure of the paper, on any language model
  info       what is installed, and who computes the sparse operations

mlsae COMMAND --help says more. Start with: mlsae demo
"""
