"""The one call that every command makes, and what it prints. Nothing heavy is imported until a command runs."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlsae import naming
from mlsae.config import Config, TrainConfig
from mlsae.errors import ConfigError
from mlsae.flags import (
    Analyze,
    Compare,
    Convert,
    Demo,
    Evaluate,
    Explore,
    Export,
    FitLens,
    Info,
    Merge,
    Output,
    Plan,
    Push,
    Reproduce,
    Rows,
    SweepGrid,
    Train,
)
from mlsae.measuring import run_analyze, run_evaluate, run_merge


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
            f"Then look closer: mlsae explore {run} --open",
        ]
    )


def run_train(command: Train) -> tuple[Any, str]:
    """Returns the result and what to print."""
    from mlsae.train import train

    values = command.model_dump(exclude={"config", "resume", "dp", "tp", *Output.model_fields})
    config, progress = TrainConfig(**values), not command.quiet
    run = train(config, resume=command.resume, progress=progress, dp=command.dp, tp=command.tp)
    return run, (
        f"{run.steps:,} steps, {run.tokens:,} tokens ({run.passes:.2f} passes) in {run.seconds / 60:.1f} minutes: "
        f"FVU {run.fvu:.3f}, {run.dead_fraction:.1%} dead\n"
        f"{run.directory}/sae\nNext: mlsae evaluate {shlex.quote(run.directory)}"
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
    lm = LanguageModel.from_pretrained(command.lm, **command.lm_options())
    reading: dict[str, Any] = {"context_length": command.context_length, "progress": not command.quiet}
    rows = {name: getattr(command, name) for name in Rows.model_fields}
    held_out = text_blocks(
        lm, TextSource(command.data, "validation", **rows), tokens=command.held_out_tokens, **reading
    )
    if command.published is not None:
        lens = TunedLens.load(command.published, lm, allow_pickle=True)
    else:
        source = TextSource(command.data, command.split, **rows)
        lens = train_lens(lm, source, tokens=command.tokens, seed=command.seed, **reading)
    lens.save(command.out)
    quality = evaluate_lens(lens, lm, held_out, tokens=command.held_out_tokens, progress=not command.quiet)
    files.write_json(Path(command.out) / "quality.json", quality.to_dict())
    shown = [(row["layer"], list(row.values())[1:]) for row in thinned(quality.layers)]
    table = [["layer", "logit-lens KL", "tuned-lens KL", "condition"]]
    table += [[f"{layer}", *(f"{value:.3f}" for value in values)] for layer, values in shown]
    named = _again(command, "lm", "data", "split", *Rows.model_fields)
    return quality, "\n".join(
        [
            *("  ".join(f"{cell:>13}" for cell in cells) for cells in table),
            f"{command.out}/lens.safetensors",
            f"Next: mlsae train{named} --out RUN --lens {shlex.quote(command.out)}",
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


def run_explore(command: Explore) -> tuple[Any, str]:
    """Returns the result and what to print."""
    from mlsae.explorer import explore

    explored = explore(
        command.sae,
        analysis=command.analysis,
        lm=command.lm,
        port=command.port,
        host=command.host,
        allow_remote=command.allow_remote,
        allow_hosts=command.allow_host,
        placement=command,
        open_browser=command.open,
    )
    return explored, "closed"


def run_convert(command: Convert) -> tuple[Any, str]:
    """Returns the result and what to print."""
    from mlsae.convert import convert

    options = command.model_dump(exclude={"source", "out", *Output.model_fields})
    done = convert(command.source, command.out, **options)
    more = f" and {len(done.folders) - 1} more" if len(done.folders) > 1 else ""
    return done, f"{done.folders[0]}{more}\nReconstructions of fixed vectors differ by {done.difference:.1e} at most."


def run_export(command: Export) -> tuple[Any, str]:
    """Returns the result and what to print."""
    if command.to == "neuronpedia":
        return _export_neuronpedia(command)
    from mlsae.downstream.delphi import write_cache

    sae, lm, data = naming.opened(command)
    cache = write_cache(
        sae,
        lm,
        data,
        command.out,
        tokens=command.tokens,
        layers=command.layers,
        context_length=command.context_length,
        n_splits=command.n_splits,
        progress=not command.quiet,
    )
    n_entries = f"{sum(cache.n_entries):,} activations at {len(cache.hookpoints)} layers"
    return cache, f"{cache.n_tokens:,} tokens, {n_entries}\n{cache.directory}/latents"


def _export_neuronpedia(command: Export) -> tuple[Any, str]:
    from mlsae.downstream.neuronpedia import Names, write_export

    if command.creator_id is None:
        raise ConfigError("creator_id", "missing; give --creator-id, your id on Neuronpedia")
    if command.analysis is None and naming.run_directory(command.sae) is None:
        raise ConfigError("analysis", f"'{command.sae}' is not a run directory; give --analysis")
    analysis = Path(command.sae) / "analysis" if command.analysis is None else command.analysis
    sae, lm, data = naming.names(command)
    names = Names(
        creator_id=command.creator_id,
        creator=command.creator_id if command.creator is None else command.creator,
        release=command.release,
        source_set=command.source_set,
        model=Path(lm).name if command.model is None else command.model,
    )
    done = write_export(
        sae, lm, analysis, command.out, names, layers=command.layers, data=data, progress=not command.quiet
    )
    return done, f"{done.n_features:,} features, {done.n_activations:,} activations\n{done.directory}/{names.model}"


def run_push(command: Push) -> tuple[Any, str]:
    """Returns the result and what to print; where to, and which files, is said before they leave."""
    import sys

    from mlsae.sae import MLSAE

    def tell(planned: Any) -> None:
        if not command.dry_run:
            print(planned.table(), file=sys.stderr)

    options = command.model_dump(exclude={"sae", "repo", *Output.model_fields})
    run = naming.run_directory(command.sae)
    done = MLSAE.from_pretrained(command.sae).push_to_hub(command.repo, run=run, tell=tell, **options)
    if command.dry_run:
        return done, f"Nothing is uploaded. It would be:\n{done.table()}\n\n{done.card}"
    return done, f"{done.url}\ncommit {done.commit}"


def run_plan(command: Plan) -> tuple[Any, str]:
    """Returns the result and what to print."""
    from mlsae.plan import plan

    done = plan(command)
    return done, str(done)


def run_info(command: Info) -> tuple[Any, str]:
    """Returns the result and what to print."""
    from mlsae.info import info

    found = info()
    return found, str(found)


def _again(command: Config, *names: str) -> str:
    """The flags that say these fields of a command once more, but for what needs no saying."""
    said = ""
    for name in names:
        if (value := getattr(command, name)) != type(command).model_fields[name].default:
            flag = "--" + name.replace("_", "-")
            said += f" {flag}" if value is True else f" {flag} {shlex.quote(str(value))}"
    return said


COMMANDS: dict[str, tuple[type[Config], Callable[[Any], tuple[Any, str]]]] = {
    "demo": (Demo, run_demo),
    "train": (Train, run_train),
    "evaluate": (Evaluate, run_evaluate),
    "analyze": (Analyze, run_analyze),
    "merge": (Merge, run_merge),
    "lens": (FitLens, run_lens),
    "sweep": (SweepGrid, run_sweep),
    "compare": (Compare, run_compare),
    "reproduce": (Reproduce, run_reproduce),
    "explore": (Explore, run_explore),
    "convert": (Convert, run_convert),
    "export": (Export, run_export),
    "push": (Push, run_push),
    "plan": (Plan, run_plan),
    "info": (Info, run_info),
}
HELP = """usage: mlsae COMMAND ...

Train one sparse autoencoder on every layer of a language model, and see where its latents live.

  demo       the whole story on a real model with no network, in minutes
  train      train an SAE on every layer of a language model
  evaluate   how good it is on held-out text, layer by layer
  analyze    where in depth its latents live: numbers, figures, a report
  merge      parts of either, done by several processes, put together
  lens       train a tuned lens, to put before an SAE
  sweep      several k, sizes and seeds off one reading of the text
  compare    kinds of SAE at equal budget, set beside each other
  reproduce  every figure of the paper, on any language model
  explore    every latent at every layer, in the browser
  convert    an SAE from one library's files into another's
  export     activations for delphi, an analysis for Neuronpedia
  push       an SAE and its model card onto the Hugging Face Hub
  plan       what a training run will take, before it starts
  info       what is installed, and who computes the sparse operations

mlsae COMMAND --help says more. Start with: mlsae demo
"""
