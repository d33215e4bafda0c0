"""A grid of SAEs off one reading of the text: trained side by side, evaluated, in one table and one figure."""

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlsae import files, untrusted
from mlsae.analysis.comparison import Point, frontier
from mlsae.analysis.figures import save
from mlsae.analysis.report import number, percent, plain
from mlsae.config import TrainConfig
from mlsae.data import TokenBlocks
from mlsae.errors import ConfigError
from mlsae.evaluate import evaluate
from mlsae.formats import own
from mlsae.heldout import held_out_split, open_blocks
from mlsae.lm import LanguageModel
from mlsae.lockstep import train_together
from mlsae.sae import MLSAE
from mlsae.stopping import resumable
from mlsae.text import TextSource
from mlsae.train import Run

EVALUATE_TOKENS = 1_000_000
MAX_RECORD_BYTES = 256 << 20
"""Of what was found of all arms: a hundred of thirty layers take some megabytes."""


@dataclass(frozen=True)
class Result:
    """One arm: what was trained, and how good it is."""

    name: str
    """Its folder's name, and its row in the table."""
    config: dict[str, Any]
    """What it was trained with, everything filled in: config.json."""
    run: dict[str, Any]
    """The finished run: `Run.to_dict()`."""
    expansion_factor: float
    """Latents of one dictionary as a multiple of d_model."""
    weights: str
    """SHA-256 of the weights that were evaluated."""
    evaluation: dict[str, Any]
    """The names of evaluation.json."""

    @property
    def worst(self) -> dict[str, Any]:
        """The layer with the largest FVU."""
        return max(self.evaluation["layers"], key=lambda row: plain(row["fvu"]))

    def quality(self) -> list[str]:
        """Its cells under QUALITY."""
        mean, worst = self.evaluation["mean"], self.worst
        delta_ce = number(mean["delta_ce"]) if "delta_ce" in mean else ""
        dead = percent(plain(self.evaluation["dead_fraction"]))
        return [number(mean["fvu"]), f"{number(worst['fvu'])} at {worst['layer']}", delta_ce, dead]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values by field name."""
        return asdict(self)


QUALITY = ["FVU", "worst layer's", "ΔCE", "dead"]
"""Headings: mean FVU over layers, the largest and where, mean rise in cross-entropy, share of dead latents."""


@dataclass(frozen=True)
class Sweep:
    """A finished sweep."""

    directory: str
    """The arms' run directories are in it, and sweep.json, the table and figures/."""
    arms: list[Result]
    evaluate_tokens: int
    """Tokens of held-out text each arm was evaluated on, at most."""
    splice_tokens: int | None
    """Of these, how many also measured cross-entropy and KL; None: all."""
    seconds: float
    """Wall time."""

    def table(self) -> str:
        """A row an arm, in fixed-width text; brackets hold 95 % intervals over documents."""
        rows = [
            [arm.name, number(arm.config["k"]), number(arm.expansion_factor), str(arm.config["seed"]), *arm.quality()]
            for arm in self.arms
        ]
        return aligned([["arm", "k", "R", "seed", *QUALITY], *rows])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values by field name."""
        return asdict(self)


@resumable
def sweep(
    config: TrainConfig,
    *,
    k: Sequence[int] | None = None,
    expansion_factor: Sequence[float] | None = None,
    seed: Sequence[int] | None = None,
    evaluate_tokens: int = EVALUATE_TOKENS,
    splice_tokens: int | None = None,
    resume: bool = False,
    progress: bool = True,
    lm: LanguageModel | None = None,
) -> Sweep:
    """Train an SAE for every combination of the values given, side by side off one reading, and evaluate each.

    The arms are run directories in `config.out`, named like k32-x16-seed1; what a list leaves out, `config` says for all.
    Their order of data is one: `data_seed`, or else the config's own `seed`. Evaluation splices each arm into the
    language model by itself, so that it costs what `evaluate` does, times the arms.

    Raises:
        ConfigError: a value given twice, or what `train` refuses, the arm named.
    """
    started = time.monotonic()
    folder = Path(config.out)
    trained = train_together(grid(config, k, expansion_factor, seed), resume=resume, progress=progress, lm=lm)
    tokens: dict[str, Any] = {"tokens": evaluate_tokens, "splice_tokens": splice_tokens}
    arms = judged(folder / "sweep.json", trained.runs, trained.lm, **tokens, progress=progress)
    done = Sweep(str(folder), arms, evaluate_tokens, splice_tokens, time.monotonic() - started)
    files.write_json(folder / "sweep.json", done.to_dict())
    files.write_text(folder / "sweep.txt", done.table() + "\n")
    save(_picture(arms), folder / "figures")
    return done


def grid(
    config: TrainConfig,
    k: Sequence[int] | None,
    expansion_factor: Sequence[float] | None,
    seed: Sequence[int] | None,
) -> dict[str, TrainConfig]:
    """The config of every combination, by its name."""
    if expansion_factor is None and config.n_latents is not None:
        sizes: list[dict[str, Any]] = [{"n_latents": config.n_latents}]
    else:
        factor = 16.0 if config.expansion_factor is None else config.expansion_factor
        sizes = [
            {"n_latents": None, "expansion_factor": x} for x in _once("expansion_factor", expansion_factor, factor)
        ]
    data_seed = config.seed if config.data_seed is None else config.data_seed
    found = {}
    for each_k, size, each_seed in itertools.product(_once("k", k, config.k), sizes, _once("seed", seed, config.seed)):
        width = f"n{size['n_latents']}" if size["n_latents"] is not None else f"x{size['expansion_factor']:g}"
        name = f"k{each_k}-{width}-seed{each_seed}"
        own = {"k": each_k, **size, "seed": each_seed, "data_seed": data_seed, "out": str(Path(config.out) / name)}
        found[name] = config.replaced(**own)
    return found


def _once(field: str, values: Sequence[Any] | None, otherwise: Any) -> list[Any]:
    """The values of a list in which none stands twice."""
    if values is None:
        return [otherwise]
    if not values:
        raise ConfigError(field, "no value given; name at least one, or leave it out")
    for value in values:
        if list(values).count(value) > 1:
            raise ConfigError(field, f"{value:g} is given twice; name each value once")
    return list(values)


# ---- evaluation ------------------------------------------------------------------------------------------------------


def judged(
    record: Path,
    runs: Mapping[str, Run],
    lm: LanguageModel,
    *,
    tokens: int,
    splice_tokens: int | None = None,
    progress: bool,
) -> list[Result]:
    """Every run's evaluation on held-out text, also written into its directory. What `record` has of these weights stands."""
    budget = {"evaluate_tokens": tokens, "splice_tokens": splice_tokens}
    before = {arm["name"]: arm for arm in _recorded(record, budget)}
    results: list[Result] = []
    blocks: TokenBlocks | None = None
    for name, run in runs.items():
        folder = Path(run.directory)
        weights = own.identity(folder / "sae")
        if name in before and before[name]["weights"] == weights:
            evaluation = before[name]["evaluation"]
        else:
            sae = run.sae
            blocks = held_out(run, sae, lm, tokens=tokens, progress=progress) if blocks is None else blocks
            read: dict[str, Any] = {"tokens": tokens, "splice_tokens": splice_tokens, "progress": progress}
            evaluation = evaluate(sae, lm, blocks, **read).to_dict()
            files.write_json(folder / "evaluation.json", evaluation)
        config = untrusted.read_json(folder / "config.json")
        sizes = untrusted.read_json(folder / "sae" / "config.json")
        results.append(Result(name, config, run.to_dict(), sizes["expansion_factor"], weights, evaluation))
        files.write_json(record, {**budget, "arms": [result.to_dict() for result in results]})
    return results


def _recorded(record: Path, budget: Mapping[str, int | None]) -> list[dict[str, Any]]:
    """The arms that an earlier, interrupted call evaluated on as many tokens."""
    if not record.is_file():
        return []
    found = untrusted.read_json(record, max_bytes=MAX_RECORD_BYTES)
    return found["arms"] if all(found.get(name) == n for name, n in budget.items()) else []


def held_out(run: Run, sae: MLSAE, lm: LanguageModel, *, tokens: int, progress: bool) -> TokenBlocks:
    """The held-out part of the text that a run was trained on."""
    config = TrainConfig(**untrusted.read_json(Path(run.directory) / "config.json"))
    split = held_out_split(sae, config.data)
    source = TextSource(config.data, split, config.text_column, config.skip_bad_rows, config.streaming)
    return open_blocks(sae, lm, source, tokens=tokens, split=None, context_length=None, progress=progress)


# ---- words and picture -----------------------------------------------------------------------------------------------


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """A table in fixed-width text, its first column to the left."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rows = ([cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in cells)
    return "\n".join("  ".join([row[0].strip().ljust(widths[0]), *row[1:]]).rstrip() for row in rows)


def _picture(arms: Sequence[Result]) -> Any:
    """Quality against k, a line for each size; of a sweep of sizes alone, against size."""
    sizes_only = len({arm.config["k"] for arm in arms}) == 1
    if sizes_only:
        points = [Point("", arm.expansion_factor, arm.evaluation) for arm in arms]
    else:
        points = [Point(f"R = {arm.expansion_factor:g}", arm.config["k"], arm.evaluation) for arm in arms]
    seeds = len({arm.config["seed"] for arm in arms})
    about = f"Each point is an SAE{f'; lines join means over {seeds} seeds' if seeds > 1 else ''}."
    x_label = "expansion factor R (latents / d_model)" if sizes_only else "active latents per vector (k)"
    return frontier(points, name="sweep", title="Quality against sparsity and size", x_label=x_label, about=about)
