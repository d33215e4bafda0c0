"""The command line: parse, one call, print. Nothing heavy is imported until a command runs, so --help answers at once."""

import contextlib
import io
import itertools
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import tyro

from mlsae.commands import COMMANDS, HELP
from mlsae.config import Config, TrainConfig, load_config
from mlsae.errors import ConfigError, Interrupted, MlsaeError, ResourceError, did_you_mean, out_of_memory, printable
from mlsae.flags import Output, Train
from mlsae.stopping import interruptible

SHARED_OUT = ("train", "evaluate", "analyze")
"""Commands that several processes under torchrun do together."""

# ---- parse, call, print ---------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (errors.py lists them)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _set_up_logging()
    try:
        return _run(arguments)
    except MlsaeError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        if not (error.elsewhere or (isinstance(error, Interrupted) and _rank())):
            print(f"error: {_speaker()}{printable(str(error))}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        return 0
    except Exception as error:
        if out_of_memory(error):
            print("error: memory: not enough for this; free some, or read shorter sequences", file=sys.stderr)
            return ResourceError.exit_code
        traceback.print_exc()
        print(f"error: a bug in mlsae ({type(error).__name__}); please report it with the lines above", file=sys.stderr)
        return 1


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"mlsae {version('mlsae')}")
        return 0
    if arguments[0] not in COMMANDS:
        hint = did_you_mean(arguments[0], COMMANDS) or f"; choose {', '.join(COMMANDS)}"
        raise ConfigError("command", f"unknown command '{arguments[0]}'{hint}")
    if _n_processes() > 1 and arguments[0] not in SHARED_OUT:
        raise ConfigError(
            "torchrun", f"{arguments[0]} is done by one process; start it without, or {', '.join(SHARED_OUT)} with it"
        )
    model, run = COMMANDS[arguments[0]]
    command: Any = _parse(model, arguments)
    if command is None:
        return 0
    if command.json_ not in (None, "-"):
        _probe(Path(command.json_))
    with interruptible(arguments[0]):
        _set_up_libraries(command)
        result, text = run(command)
    if _rank():
        return 0
    if command.json_ == "-":
        from mlsae.files import finite

        text = json.dumps(finite(result.to_dict()), allow_nan=False, indent=2)
    elif command.json_ is not None:
        from mlsae.files import write_json

        write_json(Path(command.json_), result.to_dict())
    print(text)
    return 0


def _rank() -> int:
    """This process's number among those that torchrun started; the first one speaks for all."""
    return int(os.environ.get("RANK", "0")) if _n_processes() > 1 else 0


def _n_processes() -> int:
    """Processes that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _speaker() -> str:
    return f"rank {_rank()}: " if _rank() else ""


def _probe(path: Path) -> None:
    """Refuse, before the work, a file that cannot be written after it."""
    from mlsae.files import probe_writable

    if path.is_dir():
        raise ConfigError("json", f"'{path}' is a folder; name a file, or - for the terminal")
    probe_writable(path.parent)


def _parse(model: type[Config], arguments: list[str]) -> Config | None:
    """The command's fields from its flags and, for train, its config file; None if help was asked for."""
    given = _file_values(model, arguments)
    if not {"-h", "--help"} & set(arguments):
        _check_flags(model, arguments, set(given))
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(
                model,
                prog=f"mlsae {arguments[0]}",
                args=arguments[1:],
                default=_as_defaults(given) if given else tyro.MISSING_NONPROP,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.UseAppendAction)[:2],
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            return None
        raise _usage_error(shown.getvalue(), model, arguments) from None


def _file_values(model: type[Config], arguments: list[str]) -> dict[str, Any]:
    """The fields that `--config FILE` gives; a flag beside it wins."""
    paths = _values_of("--config", arguments) if model is Train else []
    return load_config(Path(paths[-1])) if paths else {}


def _as_defaults(values: dict[str, Any]) -> Any:
    """A file's fields, checked, as tyro's defaults; what the file lacks stays required."""
    placeholders: dict[str, Any] = {"lm": "-", "data": "-", "out": "-"}
    checked = TrainConfig(**(placeholders | values))
    missing = {key: tyro.MISSING for key in placeholders if key not in values}
    return Train.model_construct(**missing, **{key: getattr(checked, key) for key in values})


def _values_of(flag: str, arguments: list[str]) -> list[str]:
    """Every value given for a flag, written `--flag VALUE ...` or `--flag=VALUE`; several words after it are one value."""
    values = []
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == flag:
            words = itertools.takewhile(lambda word: not word.startswith("--"), arguments[i + 1 :])
            values.append(value if equals else " ".join(words))
    return values


def _flags(model: type[Config]) -> dict[str, Any]:
    """The command's flags and the fields behind them."""
    return {"--" + name.rstrip("_").replace("_", "-"): field for name, field in model.model_fields.items()}


def _check_flags(model: type[Config], arguments: list[str], given: set[str]) -> None:
    """Refuse an unknown flag and a missing one in our own words."""
    flags = _flags(model)
    negated = [f"--no-{flag[2:]}" for flag in flags]
    for argument in arguments[1:]:
        flag = argument.split("=", 1)[0].replace("_", "-")
        if flag.startswith("--") and flag not in flags and flag not in negated:
            raise ConfigError(
                flag[2:], f"unknown flag '{flag}'{did_you_mean(flag, flags) or f'; see mlsae {arguments[0]} --help'}"
            )
    present = {argument.split("=", 1)[0].replace("_", "-") for argument in arguments}
    for flag, field in flags.items():
        if (
            field.is_required()
            and tyro.conf.Positional not in field.metadata
            and flag not in present
            and flag[2:] not in given
        ):
            raise ConfigError(flag[2:], f"missing; give {flag}")


def _usage_error(shown: str, model: type[Config], arguments: list[str]) -> ConfigError:
    """What the parser drew in a box, in one sentence of ours: a flag's value, a missing SAE, or words too many."""
    text = " ".join(line.strip(" │|╭╮╰╯─-") for line in re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines())
    flags = _flags(model)
    for flag in re.findall(r"--[a-z0-9-]+", text):
        if flag in flags and flag in {argument.partition("=")[0].replace("_", "-") for argument in arguments}:
            given = _values_of(flag, arguments)[-1] or "nothing"
            field = flag[2:].replace("-", "_")
            return ConfigError(field, f"'{given}' given; must be {_allowed(flags[flag].annotation)}")
    if extra := re.search(r"Unrecognized options: (.+?) (?:For full|$)", text):
        return ConfigError(
            arguments[0], f"'{extra.group(1).strip()}' is not understood; see mlsae {arguments[0]} --help"
        )
    positional = [name for name, field in model.model_fields.items() if tyro.conf.Positional in field.metadata]
    n_given = len([*itertools.takewhile(lambda word: not word.startswith("--"), arguments[1:])])
    name = positional[min(n_given, len(positional) - 1)]
    return ConfigError(name, f"missing; name {MISSING[name]}")


MISSING = {
    "comparison": "its YAML file",
    "directory": "the run directory, or the folder that the shards were told to write to",
    "out": "a new folder to write",
    "repo": "a repository of yours on the Hub, user/name",
    "sae": "a run directory, an SAE folder or a Hub id",
    "source": "an SAE folder or a Hub id",
}
"""What stands in place of a flag, in words."""


def _allowed(annotation: Any) -> str:
    """What a field takes, in words."""
    parts = [part for part in get_args(annotation) if part is not type(None)]
    if get_origin(annotation) is Literal:
        return " or ".join(map(str, parts))
    if get_origin(annotation) is tuple:
        return f"{_allowed(parts[0])}s".removeprefix("a ")
    if parts:
        return _allowed(parts[0])
    return {int: "a whole number", float: "a number"}.get(annotation, "a text")


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return printable(f"{level}{record.getMessage()}")


def _set_up_logging() -> None:
    """Our own messages on stderr, one escaped line each."""
    logger = logging.getLogger("mlsae")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Plain())
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.WARNING)


def _set_up_libraries(command: Output) -> None:
    """No advice or telemetry of libraries, and no bars and no network if none are wanted; they look when they are imported."""
    if command.offline:
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="offline")
    if command.quiet:
        os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("ACCELERATE_LOG_LEVEL", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
