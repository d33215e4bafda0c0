"""The model card of an SAE: what it is, how it was trained, how good it is, how to use it. No path of this machine is in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mlsae import untrusted
from mlsae.config import MLSAEConfig
from mlsae.errors import printable

HEATMAP = Path("analysis", "figures", "heatmap.png")
"""Of a run directory: which latents are active at which layer."""
TAGS = ["sparse-autoencoder", "multi-layer-sae", "interpretability", "mlsae"]
METRICS = {
    "fvu": "FVU",
    "lens_fvu": "FVU behind the lens",
    "cosine": "cosine",
    "l0": "L0",
    "delta_ce": "ΔCE",
    "kl": "KL",
}
"""Columns of the table, by their names in evaluation.json."""
FRAMES = {
    "layer": "each layer is centred and scaled by constants of its own",
    "vector": "each vector is standardised",
    "none": "vectors are taken as they are",
}
DICTIONARIES = {1: "one dictionary, shared by all of these layers"}
UNNAMED = "unnamed"
"""What a config says of a lens that came from a folder."""
CITATIONS = """```bibtex
@inproceedings{lawson2025residual,
  title     = {Residual Stream Analysis with Multi-Layer {SAE}s},
  author    = {Tim Lawson and Lucy Farnik and Conor Houghton and Laurence Aitchison},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  note      = {arXiv:2409.04185}
}
@software{mlsae,
  title     = {mlsae: one sparse autoencoder on every layer of a language model},
  author    = {{the mlsae authors}},
  year      = {2026},
  note      = {version VERSION}
}
```"""


@dataclass(frozen=True)
class Record:
    """What a run directory says of its SAE, beside the SAE itself."""

    config: Mapping[str, Any] = field(default_factory=dict)
    """config.json: how it was asked to train, with every default filled in."""
    last: Mapping[str, Any] = field(default_factory=dict)
    """The last line of metrics.jsonl."""
    software: Mapping[str, Any] = field(default_factory=dict)
    """Versions and device, of the newest checkpoint."""
    evaluation: Mapping[str, Any] | None = None
    """evaluation.json."""
    heatmap: Path | None = None
    """The picture, if there is one."""

    @classmethod
    def of(cls, run: Path) -> "Record":
        """The record of a run directory; what is not there stays empty."""
        evaluation, heatmap = run / "evaluation.json", run / HEATMAP
        metrics = untrusted.read_jsonl(run / "metrics.jsonl", 1 << 20) if (run / "metrics.jsonl").is_file() else []
        manifests = sorted(run.glob("step-*/manifest.json"))
        return cls(
            config=untrusted.read_json(run / "config.json") if (run / "config.json").is_file() else {},
            last=next((line for line in reversed(metrics) if "tokens" in line), {}),
            software=untrusted.read_sealed(manifests[-1]) if manifests else {},
            evaluation=untrusted.read_json(evaluation) if evaluation.is_file() else None,
            heatmap=heatmap if heatmap.is_file() else None,
        )


def model_card(
    config: MLSAEConfig,
    repo_id: str,
    record: Record,
    *,
    licence: str | None,
    to: str,
    pickled: bool,
) -> str:
    """The text of README.md: metadata for the Hub, then the page.

    Args:
        config: of the SAE, without names of files on this machine.
        licence: identifier as the Hub spells it; None: the card says that none was chosen.
        to: the format of the files.
        pickled: whether they are pickles.
    """
    opened = f'"{repo_id}"' + (", allow_pickle=True" if pickled else "")
    lm = config.lm if config.lm is not None else "LANGUAGE-MODEL"
    page = [
        f"# {repo_id.partition('/')[2]}",
        _what(config),
        "## How it was trained",
        _table(["", ""], _training(config, record)),
        "## How good it is",
        _quality(record.evaluation),
        *(["![Which latents are active at which layer](heatmap.png)"] if record.heatmap is not None else []),
        "## Use it",
        f"The files are in the format of {'`mlsae`' if to == 'mlsae' else f'`{to}`, which `mlsae` reads too'}.",
        "\n".join(
            [
                "```python",
                "from mlsae import MLSAE, LanguageModel",
                f'sae, lm = MLSAE.from_pretrained({opened}), LanguageModel.from_pretrained("{_plain(lm)}")',
                'code = sae.encode(lm.resid(lm.tokenize("Some text."), layers=sae.layers))',
                "```",
            ]
        ),
        "`code.values` and `code.indices` are the active latents of every token at every layer; `sae.decode(code)` gives the "
        "residual stream back.",
        "## Licence",
        _licence(licence),
        "## Citation",
        "The idea is that of Lawson, Farnik, Houghton and Aitchison (2025); `mlsae` wrote these files.",
        CITATIONS.replace("VERSION", str(record.software.get("mlsae", version("mlsae")))),
    ]
    return f"{ModelCard(_metadata(config, repo_id, record.evaluation, licence))}" + "\n\n".join(page) + "\n"


def _metadata(config: MLSAEConfig, repo_id: str, evaluation: Mapping[str, Any] | None, licence: str | None) -> str:
    data = ModelCardData(
        license=licence,
        library_name="mlsae",
        base_model=config.lm,
        datasets=None if config.data is None else [config.data.partition(":")[0]],
        tags=TAGS,
        model_name=repo_id.partition("/")[2],
        eval_results=None if evaluation is None else _results(config, evaluation),
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _results(config: MLSAEConfig, evaluation: Mapping[str, Any]) -> list[EvalResult]:
    text = "text" if config.data is None else config.data
    found = {name: _value(evaluation["mean"].get(name)) for name in METRICS}
    return [
        EvalResult(
            task_type="feature-extraction",
            dataset_type=text,
            dataset_name=text,
            metric_type=name,
            metric_name=f"{METRICS[name]}, mean over layers",
            metric_value=round(value, 4),
        )
        for name, value in found.items()
        if value is not None
    ]


def _what(config: MLSAEConfig) -> str:
    """The SAE in a sentence and a table."""
    layers = config.layers
    where = "the residual stream" if layers is None else f"the residual stream of {len(layers)} layers"
    rows = [
        ("Language model", _named(config.lm, config.lm_revision)),
        ("Layers", "not said" if layers is None else _ranges(layers) + ", each the output of that block"),
        ("Latents", f"{config.n_latents:,} = {config.n_latents / config.d_model:g} x d_model {config.d_model:,}"),
        ("Active", f"{'at most ' if config.activation == 'jumprelu' else ''}{config.k} latents of each vector"),
        ("Dictionaries", DICTIONARIES.get(config.groups, f"{config.groups}, for as many runs of layers")),
        ("Frame", f"`{config.frame}`: {FRAMES[config.frame]}"),
        ("Left out", _masked(config)),
    ]
    if config.lens is not None:
        source = "" if config.lens == UNNAMED else f", `{_plain(config.lens)}`"
        rows.append(("Tuned lens", f"before the frame, its maps among the weights{source}"))
    return f"A sparse autoencoder on {where} of {_named(config.lm, None)}.\n\n" + _table(["", ""], rows)


def _masked(config: MLSAEConfig) -> str:
    found = ["special tokens"] if config.mask_special_tokens else []
    found += ["first positions"] if config.mask_first_position else []
    factor = config.mask_norm_factor
    found += [f"tokens of more than {factor:g} times the median norm"] if factor is not None else []
    return ", ".join(found) if found else "nothing"


def _training(config: MLSAEConfig, record: Record) -> list[tuple[str, str]]:
    """Rows of what is known of the training; a field that the run does not say is left out."""
    asked, last, software = record.config, record.last, record.software
    split = f", split `{_plain(str(asked['split']))}`" if "split" in asked else ""
    rows = [("Recipe", f"`{config.recipe}`"), ("Text", _named(config.data, None) + split)]
    if "tokens" in last:
        rows.append(("Read", f"{last['tokens']:,} tokens in {last['step']:,} steps"))
    for name, label in (
        ("context_length", "Tokens in a sequence"),
        ("lr", "Learning rate"),
        ("k_aux", "Dead latents that AuxK revives"),
        ("dead_after_tokens", "Tokens until a latent is dead"),
        ("precision", "Precision"),
        ("seed", "Seed"),
    ):
        if asked.get(name) is not None:
            rows.append((label, f"{asked[name]:.4g}" if isinstance(asked[name], float) else _plain(str(asked[name]))))
    if "fvu" in last:
        rows.append(("At the end", f"FVU {last['fvu']:.3f} on training text, {last['dead_fraction']:.1%} dead latents"))
    named = [f"{name} {_plain(str(software[name]))}" for name in ("mlsae", "torch", "transformers") if name in software]
    rows.append(("Software", ", ".join(named) if named else f"mlsae {version('mlsae')} wrote the files"))
    return rows


def _quality(evaluation: Mapping[str, Any] | None) -> str:
    """The table of layers, their mean and all layers replaced at once, and what its columns are."""
    if evaluation is None:
        return "Not measured; `mlsae evaluate` does."
    layers, mean = evaluation["layers"], evaluation["mean"]
    columns = [name for name in METRICS if name in mean]
    rows = [(str(row["layer"]), row) for row in layers]
    rows += [("mean", mean)] + ([("all at once", evaluation["all_layers"])] if evaluation["all_layers"] else [])
    cells = [[label, *(_number(name, row.get(name)) for name in columns)] for label, row in rows]
    return "\n\n".join(
        [
            f"On {evaluation['n_tokens']:,} tokens (`mlsae evaluate` reads what was held out from training, unless told "
            f"otherwise); {evaluation['dead_fraction']:.1%} of the latents are never active on them. Brackets hold 95 % "
            "intervals over documents.",
            _table(["layer", *(METRICS[name] for name in columns)], cells),
            "FVU is the fraction of variance unexplained (0 is perfect, 1 is the mean), L0 the number of active latents; ΔCE and "
            "KL, in nats a token, are what replacing that layer's vectors by their reconstructions adds to the cross-entropy, "
            "and the divergence from the untouched model.",
        ]
    )


def _number(name: str, found: Any) -> str:
    value = _value(found)
    if value is None:
        return ""
    ends = found.get("ci95") if isinstance(found, Mapping) else None
    places = 1 if name == "l0" else 3
    known = isinstance(ends, list) and None not in ends and name != "l0"
    return f"{value:.{places}f}" + (f" [{ends[0]:.{places}f}, {ends[1]:.{places}f}]" if known else "")


def _value(found: Any) -> float | None:
    return found.get("value") if isinstance(found, Mapping) else found


def _licence(licence: str | None) -> str:
    own = "The language model and the text have licences of their own."
    return f"`{licence}`. {own}" if licence is not None else f"None was chosen: ask whoever published this. {own}"


def _named(name: str | None, commit: str | None) -> str:
    """A name on the Hub, or that there is none."""
    if name is None:
        return "not named"
    return f"`{_plain(name)}`" + (f" at commit `{_plain(commit)}`" if commit is not None else "")


def _plain(text: str) -> str:
    """Fit to stand in a table and between backticks."""
    return printable(text).replace("`", "'").replace("|", "/").replace('"', "'")


def _ranges(layers: Sequence[int]) -> str:
    """`0-5, 9`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
