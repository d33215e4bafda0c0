"""Rivals at equal budget: a multi-layer SAE against dictionaries for fewer layers each, at several k, on one stream of text."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mlsae import files, untrusted
from mlsae.analysis.comparison import Point, by_layer, frontier, off_layer
from mlsae.analysis.figures import save
from mlsae.analysis.report import number, plain
from mlsae.config import Config, LMShape, Positive, TrainConfig
from mlsae.costs import flops_per_token, parameters
from mlsae.errors import ConfigError, did_you_mean
from mlsae.lm import LanguageModel, read_shape
from mlsae.lockstep import Trained, of_arm, train_together
from mlsae.offlayer import OffLayer, off_layer_matrix
from mlsae.resolving import resolve
from mlsae.stopping import resumable
from mlsae.sweep import EVALUATE_TOKENS, QUALITY, Result, aligned, held_out, judged

Match = Literal["latents", "parameters", "flops", "vectors"]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""What an arm may be called: it begins the name of a folder."""


class ArmConfig(Config):
    """One kind of SAE in a comparison."""

    name: str
    """Its name in tables and figures, and the beginning of its folders' names."""
    groups: Annotated[int, Field(ge=1)] | Literal["layers"] = 1
    """Dictionaries; `layers`: one for each layer."""
    match: Match | None = None
    """What it has as much of as the first arm, and its size follows: `latents` in all, `parameters` in all, training
    `flops` of a token (each dictionary as wide as the first arm's), or the same and as many `vectors` for each
    dictionary, which takes a longer stream of text. None: its own keys say its size."""
    train: dict[str, Any] = Field(default_factory=dict)
    """Other keys of TrainConfig that are its own."""


class CompareConfig(Config):
    """What `compare` needs to know."""

    out: str
    """Folder to write: a run directory for each arm and k, comparison.json, comparison.txt and figures/."""
    arms: Annotated[tuple[ArmConfig, ...], Field(min_length=1, strict=False)]
    """The kinds of SAE. The first has one dictionary and is what others are matched to."""
    k: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1, strict=False)] = (16, 32, 64)
    """Active latents of each residual vector: every arm is trained with each of these."""
    evaluate_tokens: Positive = EVALUATE_TOKENS
    """Tokens of held-out text to evaluate each SAE on."""
    splice_tokens: Positive | None = None
    """Of these, how many also measure cross-entropy and KL, the costly part; None: all."""
    off_layer_tokens: Annotated[int, Field(ge=0)] = 100_000
    """Tokens of held-out text for the matrix of dictionaries away from their layers; 0: none."""
    off_layer_splice_tokens: Annotated[int, Field(ge=0)] = 0
    """Of these, how many also measure the rise in cross-entropy: half a pass for each dictionary and layer."""
    train: dict[str, Any]
    """Keys of TrainConfig that all arms have in common."""

    @classmethod
    def load(cls, path: str | Path, **changes: Any) -> "CompareConfig":
        """The comparison in a YAML file, in which keys of TrainConfig stand beside the others; `changes` win over it.

        Raises ConfigError for a key that neither has.
        """
        return cls.of({**untrusted.read_yaml(Path(path)), **changes}, str(path))

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str = "arms") -> "CompareConfig":
        """The comparison in plain values as they stand in a YAML file."""
        own, train = _split(values, cls, where)
        arms = own.get("arms")
        if not isinstance(arms, list) or not arms:
            raise ConfigError("arms", "no arm given; list at least one as {name: mlsae}")
        found = []
        for arm in arms:
            if not isinstance(arm, dict):
                raise ConfigError("arms", f"{arm!r} given; an arm is a mapping such as {{name: mlsae}}")
            mine, its = _split(arm, ArmConfig, f"arm '{arm.get('name', '?')}'")
            found.append(ArmConfig(**mine, train=its))
        fields: dict[str, Any] = {**own, "arms": found, "train": train}
        return cls(**fields)


@dataclass(frozen=True)
class Row:
    """One SAE of the comparison: what it had, and how good it is."""

    arm: str
    k: int
    groups: int
    n_latents: int
    """In all its dictionaries."""
    parameters: int
    """In all: two weights of a latent's width for each, and a bias for each dictionary."""
    flops: int
    """Training, in all: see `costs.flops_per_token`."""
    vectors: float
    """Residual vectors that each dictionary was trained on, masked ones included; the mean where they differ."""
    tokens: int
    """Read in training, masked ones included."""
    match: str | None
    matched: float | None
    """What it was to have as much of, as a multiple of the first arm's; None: nothing was to be matched."""
    result: Result


@dataclass(frozen=True)
class Comparison:
    """A finished comparison."""

    directory: str
    rows: list[Row]
    off_layer: dict[str, OffLayer] = field(default_factory=dict)
    """For each arm of several dictionaries, at the middle k: every dictionary on every layer."""
    seconds: float = 0.0
    """Wall time."""

    def table(self) -> str:
        """A row for each SAE, in fixed-width text; brackets hold 95 % intervals over documents."""
        head = ["arm", "k", "groups", "latents", "parameters", "FLOPs", "vectors each", "tokens", "matched", *QUALITY]
        rows = [
            [
                *(row.arm, number(row.k), number(row.groups), number(row.n_latents), number(row.parameters)),
                *(f"{row.flops:.3g}", number(round(row.vectors)), number(row.tokens), _matched(row)),
                *row.result.quality(),
            ]
            for row in self.rows
        ]
        return aligned([head, *rows])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values by field name."""
        matrices = {name: matrix.to_dict() for name, matrix in self.off_layer.items()}
        rows = [asdict(row) for row in self.rows]
        return {"directory": self.directory, "rows": rows, "off_layer": matrices, "seconds": self.seconds}


@resumable
def compare(
    config: CompareConfig, *, resume: bool = False, progress: bool = True, lm: LanguageModel | None = None
) -> Comparison:
    """Train every arm at every k side by side, evaluate them, and set them beside each other.

    All read one stream; an arm with `match: vectors` goes on reading after the others have ended. Everything is in
    `config.out`; `resume` goes on with what is there.

    Raises:
        ConfigError: an arm that cannot be, named.
    """
    started = time.monotonic()
    folder, record = Path(config.out), Path(config.out) / "comparison.json"
    shape = lm.shape if lm is not None else read_shape(str(config.train.get("lm", "")))
    planned = plan(config, shape)
    trained = train_together(
        {name: each.config for name, each in planned.items()}, resume=resume, progress=progress, lm=lm
    )
    tokens: dict[str, Any] = {"tokens": config.evaluate_tokens, "splice_tokens": config.splice_tokens}
    results = judged(record, trained.runs, trained.lm, **tokens, progress=progress)
    rows = _rows(planned, results)
    matrices = _matrices(config, planned, trained, progress=progress) if config.off_layer_tokens else {}
    done = Comparison(str(folder), rows, matrices, time.monotonic() - started)
    read = {"evaluate_tokens": config.evaluate_tokens, "splice_tokens": config.splice_tokens}
    summary = {**read, "arms": [result.to_dict() for result in results]}
    files.write_json(record, {**summary, **done.to_dict()})
    files.write_text(folder / "comparison.txt", done.table() + "\n")
    for picture in _pictures(done):
        save(picture, folder / "figures")
    return done


# ---- equal budgets -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """One SAE to be trained."""

    arm: ArmConfig
    config: TrainConfig


def plan(config: CompareConfig, shape: LMShape) -> dict[str, Planned]:
    """Every arm at every k by the name of its folder, matched to the first arm; refuses what cannot be."""
    _check(config)
    found: dict[str, Planned] = {}
    for k in config.k:
        first: TrainConfig | None = None
        for arm in config.arms:
            name = f"{arm.name}-k{k}"
            with of_arm(arm.name):
                made = _config_of(config, arm, k, name, shape, first)
            found[name] = Planned(arm, made)
            first = made if first is None else first
    return found


def _check(config: CompareConfig) -> None:
    """Refuse what is wrong with the arms whatever the language model."""
    names = [arm.name for arm in config.arms]
    for arm in config.arms:
        if not NAME.fullmatch(arm.name):
            raise ConfigError("arms", f"'{arm.name}' is no name for a folder; use letters, digits, '.', '_' and '-'")
        if names.count(arm.name) > 1:
            raise ConfigError("arms", f"'{arm.name}' is the name of two arms; give each its own")
        for key in ("k", "out"):
            if key in arm.train:
                raise ConfigError(key, f"given in arm '{arm.name}'; it is the same for all: give it beside 'arms'")
        sized = [key for key in ("n_latents", "expansion_factor") if key in arm.train]
        sized += ["tokens"] if arm.match == "vectors" and "tokens" in arm.train else []
        if arm.match is not None and sized:
            raise ConfigError(
                sized[0], f"given in arm '{arm.name}', where match: {arm.match} says it; drop one of them"
            )
    for k in config.k:
        if config.k.count(k) > 1:
            raise ConfigError("k", f"{k} is given twice; name each value once")
    if config.arms[0].match is not None:
        raise ConfigError("match", f"given in '{names[0]}', the first arm, which others are matched to; drop it there")
    if config.arms[0].groups != 1 and any(arm.match for arm in config.arms):
        raise ConfigError(
            "arms", f"'{names[0]}' comes first and has groups; others are matched to one dictionary for all"
        )


def _config_of(
    config: CompareConfig, arm: ArmConfig, k: int, name: str, shape: LMShape, first: TrainConfig | None
) -> TrainConfig:
    """The training config of one arm at one k; `first` is the first arm's, resolved."""
    layers = arm.train.get("layers", config.train.get("layers"))
    n_layers = shape.n_layers if layers is None else len(layers)
    groups = n_layers if arm.groups == "layers" else arm.groups
    own = {"k": k, "groups": groups, "out": str(Path(config.out) / name)}
    values: dict[str, Any] = {**config.train, **arm.train, **own}
    if first is None:
        return resolve(TrainConfig(**values), shape)
    values |= {key: getattr(first, key) for key in ("batch_size", "accumulation_steps", "data_seed")} | arm.train
    if arm.match is not None:
        values.pop("expansion_factor", None)
        values["n_latents"] = _latents(arm.match, groups, k, first, shape.d_model)
        if arm.match == "vectors":
            values["tokens"] = first.tokens * groups
    return resolve(TrainConfig(**values), shape)


def _latents(match: Match, groups: int, k: int, first: TrainConfig, d_model: int) -> int:
    """Latents in all that give so many dictionaries the first arm's budget, as nearly as equal dictionaries can."""
    n_latents: float = first.n_latents or 0
    if match == "parameters":
        n_latents = (parameters(n_latents, 1, d_model) - groups * d_model) / (2 * d_model)
    elif match in ("flops", "vectors"):
        n_latents *= groups
    return max(1, round(n_latents / groups)) * groups


def _rows(planned: Mapping[str, Planned], results: Sequence[Result]) -> list[Row]:
    """What each SAE had, beside the first arm's at the same k."""
    rows: list[Row] = []
    for result in results:
        each = planned[result.name]
        config, tokens = each.config, result.run["tokens"]
        n_latents, groups = config.n_latents or 0, config.groups
        layers, d_model = len(config.layers or ()), round(n_latents / groups / result.expansion_factor)
        amounts: dict[str, Any] = {
            "n_latents": n_latents,
            "parameters": parameters(n_latents, groups, d_model),
            "flops": flops_per_token(n_latents, groups, config.k, layers, d_model) * tokens,
            "vectors": tokens * layers / groups,
        }
        first, match = next((row for row in rows if row.k == config.k), None), each.arm.match
        amount = "n_latents" if match == "latents" else match
        matched = None if amount is None or first is None else amounts[amount] / getattr(first, amount)
        own: dict[str, Any] = {"arm": each.arm.name, "k": config.k, "groups": groups, "tokens": tokens}
        rows.append(Row(**own, **amounts, match=match, matched=matched, result=result))
    return rows


def _matched(row: Row) -> str:
    return "" if row.matched is None else f"{row.match} × {row.matched:.4g}"


# ---- off their layers, and pictures --------------------------------------------------------------------------------------


def _matrices(
    config: CompareConfig, planned: Mapping[str, Planned], trained: Trained, *, progress: bool
) -> dict[str, OffLayer]:
    """At the middle k, the dictionaries of each arm that has several on every layer, the first arm's SAE last."""
    k = sorted(config.k)[len(config.k) // 2]
    first, *others = (name for name, each in planned.items() if each.config.k == k)
    found = {}
    blocks, mlsae = None, trained.runs[first].sae
    for name in others:
        each, run = planned[name], trained.runs[name]
        if each.config.groups > 1:
            tokens = config.off_layer_tokens
            if blocks is None:
                blocks = held_out(run, run.sae, trained.lm, tokens=tokens, progress=progress)
            found[name] = off_layer_matrix(
                run.sae,
                trained.lm,
                blocks,
                tokens=tokens,
                splice_tokens=config.off_layer_splice_tokens,
                mlsae=mlsae if mlsae.config.groups == 1 else None,
                progress=progress,
            )
    return found


def _pictures(done: Comparison) -> list[Any]:
    points = [Point(row.arm, plain(row.result.evaluation["mean"]["l0"]), row.result.evaluation) for row in done.rows]
    about = "Each line is one kind of SAE, matched to the first as the table says."
    names = {"name": "pareto", "title": "Quality against sparsity", "x_label": "active latents per vector (L0)"}
    panels = [Point(row.arm, row.k, row.result.evaluation) for row in done.rows]
    matrices = [off_layer(matrix.to_dict(), name=f"off_layer_{name}") for name, matrix in done.off_layer.items()]
    return [frontier(points, **names, about=about), by_layer(panels, x_label="k ="), *matrices]


def _split(values: Mapping[str, Any], model: type[Config], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys of a model, and keys of TrainConfig, apart; one that neither has is refused."""
    mine = {key: value for key, value in values.items() if key in model.model_fields and key != "train"}
    its = {key: value for key, value in values.items() if key in TrainConfig.model_fields and key not in mine}
    for key in values:
        if key not in mine and key not in its:
            known = {*model.model_fields, *TrainConfig.model_fields} - {"train"}
            raise ConfigError(where, f"unknown key '{key}'{did_you_mean(str(key), known)}")
    return mine, its
