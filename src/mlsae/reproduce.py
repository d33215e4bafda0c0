"""Every analysis and figure of the paper, on any language model and text, from one call.

SAEs of several k and sizes, one behind a tuned lens and one made of single-layer dictionaries are trained off one reading
of the text, evaluated and analyzed on what was held out, and set beside each other (Lawson et al. 2024, sections 3 to 5).
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlsae import devices, files, untrusted
from mlsae.analysis.comparison import Point, by_layer, frontier
from mlsae.analysis.figures import Picture, save
from mlsae.analysis.report import number, plain, write_report
from mlsae.analysis.reproduction import KINDS, Arm, depth_curves, lens_kl, similarity_behind
from mlsae.analyze import PROMPT, Analysis, analyze
from mlsae.config import LMShape, TrainConfig, latents_in
from mlsae.data import TokenBlocks
from mlsae.errors import ConfigError
from mlsae.lens import evaluate_lens, train_lens
from mlsae.lm import LanguageModel
from mlsae.lockstep import train_together
from mlsae.stopping import resumable
from mlsae.sweep import EVALUATE_TOKENS, MAX_RECORD_BYTES, Result, aligned, held_out, judged
from mlsae.text import TextSource
from mlsae.train import Run, load_lm

K, EXPANSION_FACTORS = (16, 32, 64), (4.0, 16.0, 64.0)


@dataclass(frozen=True)
class Budget:
    """How much text each part reads."""

    lens_tokens: int | None = None
    """To train the tuned lens on; None: as many as the SAEs."""
    evaluate_tokens: int = EVALUATE_TOKENS
    """Held-out text for the quality of each SAE."""
    splice_tokens: int | None = None
    """Of these, how many also measure cross-entropy, and the lens, the costly part; None: all."""
    analyze_tokens: int = 10_000_000
    """Held-out text for where the latents of each SAE live."""


@dataclass(frozen=True)
class Reproduction:
    """A finished reproduction."""

    directory: str
    """Holds reproduction.json and .txt, figures/, report.html of the main arm, and a run directory for each arm."""
    arms: list[Arm]
    """The first is the main one: the middle k and the middle size; the others differ from it in one thing each."""
    lens: dict[str, Any] | None
    """LensQuality.to_dict() of the tuned lens; None: there was none."""
    seconds: float
    """Wall time."""

    def table(self) -> str:
        """A row an arm, in fixed-width text; brackets hold 95 % intervals over documents."""
        return aligned([[*HEAD], *(_row(arm) for arm in self.arms)])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values by field name."""
        return asdict(self)


HEAD = ("arm", "k", "R", "FVU", "ΔCE", "within/(within+token)", "published", "layers/event", "layers/latent")


@resumable
def reproduce(
    config: TrainConfig,
    *,
    k: Sequence[int] = K,
    expansion_factor: Sequence[float] = EXPANSION_FACTORS,
    lens: bool = True,
    rival: bool = True,
    random_model: bool = True,
    budget: Budget | None = None,
    prompt: str = PROMPT,
    resume: bool = False,
    progress: bool = True,
    lm: LanguageModel | None = None,
) -> Reproduction:
    """Train, evaluate, analyze and draw every arm; all is in `config.out`, and `resume` goes on with what is there.

    Args:
        k: active latents to try at the middle size.
        expansion_factor: sizes to try at the middle k.
        lens: also train a tuned lens, and an SAE behind it.
        rival: also train one dictionary for each layer, together as many latents as the main arm, as nearly as they divide.
        random_model: also train the main arm on the same language model with random weights, a null for what the others show.

    Raises:
        ConfigError: a list that is empty or repeats itself, n_latents, and what `train` refuses.
    """
    started = time.monotonic()
    budget = Budget() if budget is None else budget
    folder = Path(config.out)
    lm = load_lm(config, devices.choose_device(config.device)) if lm is None else lm
    configs = arms_of(config, lm.shape, k, expansion_factor, lens=lens, rival=rival)
    quality = fitted_lens(folder / LENS_FOLDER, lm, config, budget, progress=progress) if lens else None
    whole = _Work(folder, lm, budget, prompt, resume=resume, progress=progress)
    arms = whole.of(configs)
    if random_model:
        twin = untrained(folder / "random-lm", lm, config)
        own = {RANDOM: configs[MAIN].replaced(lm=twin.name, out=str(folder / RANDOM))}
        arms += _Work(folder, twin, budget, prompt, resume=resume, progress=progress).of(own)
    done = Reproduction(str(folder), arms, quality, time.monotonic() - started)
    files.write_json(folder / "reproduction.json", done.to_dict())
    files.write_text(folder / "reproduction.txt", done.table() + "\n")
    for picture in compared(done):
        save(picture, folder / "figures")
    return done


MAIN, LENS, RIVAL, RANDOM = "main", *KINDS
LENS_FOLDER = "tuned-lens"


def arms_of(
    config: TrainConfig,
    shape: LMShape,
    k: Sequence[int],
    expansion_factor: Sequence[float],
    *,
    lens: bool,
    rival: bool,
) -> dict[str, TrainConfig]:
    """The config of every arm by its name, the main one first."""
    if config.n_latents is not None:
        raise ConfigError("n_latents", f"{config.n_latents} given; sizes are tried as expansion_factor: give that")
    for field, values in (("k", k), ("expansion_factor", expansion_factor)):
        if not values or len(set(values)) < len(values):
            raise ConfigError(field, f"{list(values)} given; name at least one value, and each once")
    middle_k, middle_size = (sorted(values)[len(values) // 2] for values in (k, expansion_factor))
    own: dict[str, dict[str, Any]] = {MAIN: {}}
    own |= {f"k{each}": {"k": each} for each in sorted(k) if each != middle_k}
    own |= {f"x{each:g}": {"expansion_factor": each} for each in sorted(expansion_factor) if each != middle_size}
    if lens:
        own[LENS] = {"lens": str(Path(config.out) / LENS_FOLDER)}
    if rival:
        groups = shape.n_layers if config.layers is None else len(config.layers)
        each_latents = max(1, round(latents_in(shape.d_model, middle_size) / groups))
        own[RIVAL] = {"groups": groups, "n_latents": each_latents * groups, "expansion_factor": None}
    data_seed = config.seed if config.data_seed is None else config.data_seed
    common = {"k": middle_k, "expansion_factor": middle_size, "n_latents": None, "data_seed": data_seed}
    return {
        name: config.replaced(**{**common, **changes, "out": str(Path(config.out) / name)})
        for name, changes in own.items()
    }


def fitted_lens(
    folder: Path, lm: LanguageModel, config: TrainConfig, budget: Budget, *, progress: bool
) -> dict[str, Any]:
    """The quality of the tuned lens in a folder, trained first if there is none."""
    if not (folder / "quality.json").is_file():
        reading: dict[str, Any] = {"context_length": config.context_length, "progress": progress}
        tokens = config.tokens if budget.lens_tokens is None else budget.lens_tokens
        train, held = (
            TextSource(config.data, split, config.text_column, config.skip_bad_rows, config.streaming)
            for split in (config.split, "validation")
        )
        lens = train_lens(lm, train, tokens=tokens, seed=config.seed, **reading)
        lens.save(folder)
        costly = budget.evaluate_tokens if budget.splice_tokens is None else budget.splice_tokens
        quality = evaluate_lens(lens, lm, held, tokens=min(20_000, costly), **reading)
        files.write_json(folder / "quality.json", quality.to_dict())
    return untrusted.read_json(folder / "quality.json")


def untrained(folder: Path, lm: LanguageModel, config: TrainConfig) -> LanguageModel:
    """The same language model with random weights, made once."""
    if not folder.exists():
        lm.save_random_twin(folder, seed=config.seed)
    return load_lm(config.replaced(lm=str(folder)), lm.device)


class _Work:
    """What is done with the arms that read one language model; what an interrupted call has done stands."""

    def __init__(self, folder: Path, lm: LanguageModel, budget: Budget, prompt: str, *, resume: bool, progress: bool):
        self.folder, self.lm, self.budget, self.prompt = folder, lm, budget, prompt
        self.resume, self.progress = resume, progress
        self.blocks: TokenBlocks | None = None

    def of(self, configs: Mapping[str, TrainConfig]) -> list[Arm]:
        """Every arm trained, evaluated and analyzed; the first one's name is that of their records."""
        first = next(iter(configs))
        resume = self.resume and any(path for each in configs.values() for path in Path(each.out).glob("step-*"))
        runs = train_together(configs, resume=resume, progress=self.progress, lm=self.lm).runs
        tokens: dict[str, Any] = {
            "tokens": self.budget.evaluate_tokens,
            "splice_tokens": self.budget.splice_tokens,
        }
        results = judged(self.folder / first / "evaluations.json", runs, self.lm, **tokens, progress=self.progress)
        return self._analyzed(self.folder / first / "analyses.json", results, runs)

    def _analyzed(self, record: Path, results: Sequence[Result], runs: Mapping[str, Run]) -> list[Arm]:
        """Where the latents of every arm live, all on one held-out text."""
        tokens = {"analyze_tokens": self.budget.analyze_tokens}
        found = untrusted.read_json(record, max_bytes=MAX_RECORD_BYTES) if record.is_file() else {}
        known: dict[str, Any] = found.get("arms", {}) if found.get("analyze_tokens") == tokens["analyze_tokens"] else {}
        arms = []
        for result in results:
            if known.get(result.name, {}).get("weights") != result.weights:
                known[result.name] = {"weights": result.weights, **self._found(result, runs[result.name])}
                files.write_json(record, {**tokens, "arms": known})
            sizes: dict[str, Any] = {"k": result.config["k"], "expansion_factor": result.expansion_factor}
            depth = {name: known[result.name][name] for name in ("summary", "similarity")}
            arms.append(Arm(result.name, **sizes, evaluation=result.evaluation, **depth))
        return arms

    def _found(self, result: Result, run: Run) -> dict[str, Any]:
        """One arm's numbers; of the main arm and the one behind the lens also nulls, examples and pictures."""
        sae, whole = run.sae, result.name in (MAIN, LENS)
        if self.blocks is None:
            self.blocks = held_out(run, sae, self.lm, tokens=self.budget.analyze_tokens, progress=self.progress)
        analysis = analyze(
            sae,
            self.lm,
            self.blocks,
            tokens=self.budget.analyze_tokens,
            prompt=self.prompt,
            nulls=whole,
            examples=32 if whole else 0,
            progress=self.progress,
        )
        analysis.save(Path(run.directory) / "analysis", progress=self.progress)
        if whole:
            self._report(result, run, analysis)
        similarity = {"raw": analysis.similarity.interval("raw"), "centred": analysis.similarity.interval("centred")}
        return {
            "summary": analysis.summary(),
            "similarity": {name: found.to_dict() for name, found in similarity.items()},
        }

    def _report(self, result: Result, run: Run, analysis: Analysis) -> None:
        place = self.folder if result.name == MAIN else Path(run.directory)
        write_report(
            place / "report.html",
            title=f"Layers of {Path(str(self.lm.name)).name}" + ("" if result.name == MAIN else " behind a tuned lens"),
            run={**result.config, **run.to_dict()},
            analysis=analysis,
            evaluation=result.evaluation,
            metrics=untrusted.read_jsonl(Path(run.directory) / "metrics.jsonl"),
        )


def compared(done: Reproduction) -> list[Picture]:
    """The figures of several arms."""
    main = done.arms[0]
    about = "Every SAE differs from the main one in one thing."
    found = []
    for x, label in (
        ("k", "active latents per vector (k)"),
        ("expansion_factor", "expansion factor R (latents / d_model)"),
    ):
        these = [arm for arm in done.arms if arm.differs_in(main) in (None, x)]
        others = [arm for arm in done.arms if arm.name in (LENS, RIVAL)]
        if len(these) > 1:
            points = [Point("MLSAE", getattr(arm, x), arm.evaluation) for arm in these]
            points += [Point(arm.name, getattr(arm, x), arm.evaluation) for arm in others if x == "k"]
            words = f"quality_{x}", f"Quality against {'k' if x == 'k' else 'size'}"
            found.append(frontier(points, name=words[0], title=words[1], x_label=label, about=about))
            found.append(depth_curves(these, x, label))
    variants = [arm for arm in done.arms if arm.name in (MAIN, *KINDS)]
    found.append(by_layer([Point(arm.name, main.k, arm.evaluation) for arm in variants], x_label="k ="))
    if done.lens is not None:
        found += [lens_kl(done.lens), similarity_behind([arm for arm in variants if arm.name in (MAIN, LENS)])]
    return found


def _row(arm: Arm) -> list[str]:
    terms, events = arm.summary["decomposition"]["mass"], arm.summary["events"]
    mean = arm.evaluation["mean"]
    return [
        arm.name,
        number(arm.k),
        number(arm.expansion_factor),
        number(mean["fvu"]),
        number(mean["delta_ce"]) if "delta_ce" in mean else "",
        number(terms["rel_t"]),
        number(plain(arm.summary["lawson2024"]["rel_t"])),
        number(events["mean_effective_layers"]),
        number(arm.summary["distribution"]["effective_layers"]["mean"]),
    ]
