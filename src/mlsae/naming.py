"""What a command's flags name: the SAE, and the language model and text, given or those it was trained with."""

from pathlib import Path
from typing import Any

from mlsae.errors import ConfigError
from mlsae.flags import Analyze, Evaluate, Export, Merge, Rows


def opened(command: Evaluate | Analyze | Export) -> tuple[Any, Any, Any]:
    """The SAE, the language model and the text that were named, or else those it was trained with."""
    from mlsae.lm import LanguageModel

    sae, lm, data = names(command)
    source = text(command, sae, data)
    return (
        sae,
        LanguageModel.from_pretrained(lm, separator_token=sae.config.separator_token, **command.lm_options()),
        source,
    )


def names(command: Evaluate | Analyze | Export) -> tuple[Any, str, str]:
    """The same, but only the name of the text."""
    from mlsae.sae import MLSAE

    sae = MLSAE.from_pretrained(command.sae)
    lm = sae.config.lm if command.lm is None else command.lm
    data = sae.config.data if command.data is None else command.data
    if lm is None:
        raise ConfigError("lm", "the SAE does not say what it was trained on; give --lm")
    if data is None:
        raise ConfigError("data", "the SAE does not say what it was trained on; give --data")
    return sae, lm, data


def text(command: Evaluate | Analyze | Export, sae: Any, data: str) -> Any:
    """The part of the text to judge by; the text that a run was trained on is read as the run read it."""
    from mlsae import untrusted
    from mlsae.heldout import held_out_split, trained_on
    from mlsae.text import TextSource

    run, rows = run_directory(command.sae), Rows()
    if run is not None and (run / "config.json").is_file() and trained_on(sae, data):
        known = untrusted.read_json(run / "config.json")
        rows = Rows(**{name: known[name] for name in Rows.model_fields if name in known})
    column = rows.text_column if command.text_column is None else command.text_column
    skip_bad_rows, streaming = command.skip_bad_rows | rows.skip_bad_rows, command.streaming | rows.streaming
    split = held_out_split(sae, data, streaming=streaming) if command.split is None else command.split
    return TextSource(data, split, column, skip_bad_rows, streaming)


def run_directory(sae: str) -> Path | None:
    """The run that an SAE is named by, if it is."""
    run = Path(sae)
    return run if (run / "sae" / "config.json").is_file() or any(run.glob("step-*/manifest.json")) else None


def asked_anew(command: Merge, asked: dict[str, Any]) -> dict[str, Any]:
    """The flags that the shards were given, but what this command names."""
    named = {name: getattr(command, name) for name in ("sae", "lm", "data")}
    return {**asked, **{name: x for name, x in named.items() if x is not None}, "quiet": command.quiet}


def asked(command: Evaluate | Analyze, lm: Any, data: Any) -> dict[str, Any]:
    """The flags that name these three in any folder and, for what they left open, as it was found."""
    local = {"sae": command.sae, "lm": lm.name, "data": data.data}
    flags = {name: str(Path(x).absolute()) if Path(x).exists() else x for name, x in local.items()}
    read = {name: getattr(data, name) for name in ("split", "text_column", "skip_bad_rows", "streaming")}
    return {
        **flags,
        **read,
        "context_length": command.context_length,
        "lm_dtype": str(lm.hf.dtype).removeprefix("torch."),
    }


def known_of(run: Path) -> dict[str, Any]:
    """What a run directory can add to a report."""
    from mlsae import untrusted

    metrics, evaluation = run / "metrics.jsonl", run / "evaluation.json"
    return {
        "run": untrusted.read_json(run / "config.json"),
        "evaluation": untrusted.read_json(evaluation) if evaluation.is_file() else None,
        "metrics": untrusted.read_jsonl(metrics) if metrics.is_file() else [],
    }
