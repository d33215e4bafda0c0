"""What evaluate, analyze and merge do: measure an SAE, whole or a part of the work, and write what was found.

Of torchrun's processes all measure, and the leader alone looks, writes and prints.
"""

import shlex
from pathlib import Path
from typing import Any

from mlsae import naming
from mlsae.errors import ConfigError
from mlsae.flags import Analyze, Evaluate, Merge


def run_evaluate(command: Evaluate) -> tuple[Any, str]:
    """Returns the result and what to print."""
    from mlsae import files
    from mlsae.evaluate import evaluate, evaluate_shard
    from mlsae.heldout import together

    out = naming.run_directory(command.sae) if command.out is None else Path(command.out)
    given: dict[str, Any] = {name: getattr(command, name) for name in ("tokens", "splice_tokens", "context_length")}
    given["progress"] = not command.quiet
    with together(device=command.device) as mesh:

        def check() -> Any:
            shard = _shard_asked(command, mesh)
            if out is not None:
                files.probe_writable(out)
            return shard

        shard = mesh.by_leader(check)
        if shard is None:
            found = evaluate(*mesh.everywhere(lambda: naming.opened(command)), **given)
            return mesh.everywhere(lambda: _written_evaluation(command, found, out) if mesh.leads else (found, ""))
    if out is None:
        raise ConfigError("out", f"'{command.sae}' is not a run directory; give --out")
    sae, lm, data = naming.opened(command)
    asked = naming.asked(command, lm, data)
    return _shard_written(evaluate_shard(sae, lm, data, out, shard, **given, asked=asked), out)


def _shard_asked(command: Evaluate | Analyze, mesh: Any) -> Any:
    """The part that the command is told to do; None: all of it."""
    from mlsae.shards import TextShard

    if command.shard is None:
        return None
    if not mesh.alone:
        raise ConfigError("shard", f"'{command.shard}' given; under torchrun the processes share out all: leave it out")
    return TextShard.parse(command.shard)


def _written_evaluation(command: Evaluate, evaluation: Any, out: Path | None) -> tuple[Any, str]:
    """Write evaluation.json, if there is where to."""
    from mlsae import files
    from mlsae.analysis.report import plain_table

    lines = [plain_table(evaluation), f"{evaluation.n_tokens:,} tokens, {evaluation.dead_fraction:.1%} dead latents"]
    if out is not None:
        files.write_json(out / "evaluation.json", evaluation.to_dict())
        lines.append(str(out / "evaluation.json"))
    if naming.run_directory(command.sae) is not None:
        lines.append(f"Next: mlsae analyze {shlex.quote(command.sae)}")
    return evaluation, "\n".join(lines)


def run_analyze(command: Analyze) -> tuple[Any, str]:
    """Returns the result and what to print."""
    from mlsae import files
    from mlsae.analyze import PROMPT, analyze, analyze_shard
    from mlsae.heldout import together

    run = naming.run_directory(command.sae)
    out = Path(command.out) if command.out is not None else Path(command.sae) / "analysis"
    given: dict[str, Any] = {
        "tokens": command.tokens,
        "context_length": command.context_length,
        "prompt": PROMPT if command.prompt is None else command.prompt,
        "nulls": command.nulls,
        "directions": command.directions,
        "examples": command.examples,
        "progress": not command.quiet,
    }
    with together(device=command.device) as mesh:

        def check() -> tuple[Any, dict[str, Any]]:
            shard = _shard_asked(command, mesh)
            if command.out is None and run is None:
                raise ConfigError("out", f"'{command.sae}' is not a run directory; give --out")
            files.probe_writable(out)
            return shard, {} if run is None else naming.known_of(run)  # what cannot be read must not cost the work

        shard, known = mesh.by_leader(check)
        if shard is None:
            found = analyze(*mesh.everywhere(lambda: naming.opened(command)), **given)
            return mesh.everywhere(lambda: _written_analysis(command, found, out, known) if mesh.leads else (found, ""))
    sae, lm, data = naming.opened(command)
    asked = naming.asked(command, lm, data)
    return _shard_written(analyze_shard(sae, lm, data, out, shard, **given, asked=asked), out)


def _written_analysis(command: Analyze, analysis: Any, out: Path, known: dict[str, Any]) -> tuple[Any, str]:
    """Write the files of an analysis, and its report."""
    from mlsae.analysis.report import write_report

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


def run_merge(command: Merge) -> tuple[Any, str]:
    """Returns the result and what to print."""
    from mlsae import shards
    from mlsae.errors import ResourceError

    places = [Path(command.directory), Path(command.directory) / "analysis"]
    found = [(kind, place) for place in places for kind in shards.kinds_in(place)]
    if not found:
        raise ResourceError(command.directory, "holds no shards; evaluate --shard and analyze --shard write them")
    done: dict[str, Any] = {}
    shown = []
    for kind, place in found:
        done[kind], text = {"evaluate": _merge_evaluation, "analyze": _merge_analysis}[kind](command, place)
        shown.append(text)
    return shards.Merged(done), "\n\n".join(shown)


def _merge_evaluation(command: Merge, place: Path) -> tuple[Any, str]:
    from mlsae import shards
    from mlsae.evaluate import merge_evaluation
    from mlsae.sae import MLSAE

    whole = shards.gather(place, "evaluate")
    asked = Evaluate(**naming.asked_anew(command, whole.asked))
    return _written_evaluation(asked, merge_evaluation(whole, MLSAE.from_pretrained(asked.sae)), place)


def _merge_analysis(command: Merge, place: Path) -> tuple[Any, str]:
    from mlsae import shards
    from mlsae.analyze import merge_analysis

    whole = shards.gather(place, "analyze")
    asked = Analyze(**naming.asked_anew(command, whole.asked))
    run = naming.run_directory(asked.sae)
    known = {} if run is None else naming.known_of(run)
    analysis = merge_analysis(whole, *naming.opened(asked), progress=not command.quiet)
    return _written_analysis(asked, analysis, place, known)


def _shard_written(done: Any, out: Path) -> tuple[Any, str]:
    """What one shard says when it is done."""
    missing = f"still missing: {', '.join(done.missing)}" if len(done.missing) < 9 else f"{len(done.missing)} missing"
    return done, f"{done.folder}\n{missing if done.missing else f'Next: mlsae merge {shlex.quote(str(out))}'}"
