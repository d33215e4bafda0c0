"""Every knob, once: a field with its unit in the docstring under it. Flags, help, YAML keys and config.json all derive from here.

This module imports neither torch nor transformers, so a config error costs a fraction of a second.
"""

import contextlib
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import tyro
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mlsae.errors import ConfigError
from mlsae.recipes import RECIPES, FrameName, PrecisionName, Recipe, RecipeName

Impl = Literal["auto", "reference", "cpu", "triton"]


def _whole(value: Any) -> Any:
    """1e8 and "1e8" are the integer 100000000; everything else is left for the type check."""
    if isinstance(value, str):
        for read in (int, float):
            with contextlib.suppress(ValueError):
                value = read(value)
                break
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[
    int,
    BeforeValidator(_whole),
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="COUNT",
        instance_from_str=lambda args: _whole(args[0]),
        is_instance=lambda value: isinstance(value, int | float),
        str_from_instance=lambda value: [f"{value:g}" if value >= 100_000 else str(value)],
    ),
]
"""A whole number that may be written 1e8."""

Layers = Annotated[tuple[Annotated[int, Field(strict=True)], ...], Field(strict=False)]


C = TypeVar("C", bound="Config")  # typing.Self is refused by the shape checker of the test suite


class Config(BaseModel):
    """A frozen set of knobs that refuses unknown keys and wrong types in one sentence."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise config_error(error, type(self)) from None

    def replaced(self: C, **changes: Any) -> C:
        """The same config with some fields changed, validated anew."""
        return type(self)(**{**self.model_dump(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values by field name."""
        return self.model_dump(mode="json")


class DictionaryFields(Config):
    """What training and a saved SAE say alike about the dictionary."""

    k: Annotated[int, Field(ge=1)] = 32
    """Active latents of each residual vector."""
    layers: Layers | None = None
    """Layers the SAE reads, 0-based; None: every layer."""
    groups: Annotated[int, Field(ge=1)] = 1
    """Dictionaries: 1 is shared by all layers (an MLSAE), n_layers makes one for each; between, neighbours share."""
    mask_special_tokens: bool = True
    """Leave out the vectors of special tokens."""

    @model_validator(mode="after")
    def _layers_and_groups(self) -> "DictionaryFields":
        if self.layers == ():
            check_layers(self.layers)
        if self.layers is not None and self.groups > len(self.layers):
            raise ConfigError("groups", f"{self.groups} exceeds the {len(self.layers)} layers; lower it")
        return self


class MLSAEConfig(DictionaryFields):
    """The shape and conventions of one SAE: everything `from_pretrained` needs besides the weights."""

    d_model: Annotated[int, Field(ge=1, le=10**6)]
    """Width of the residual stream."""
    n_latents: Annotated[int, Field(ge=1, le=10**10)] = 0
    """Latents in all, over all groups; 0: expansion_factor says it."""
    expansion_factor: Annotated[float, Field(gt=0)] = 0.0
    """Latents of one dictionary as a multiple of d_model; 0: n_latents says it, or 16."""
    frame: FrameName = "layer"
    """Map before the encoder: `layer` centres and scales each layer, `vector` standardises each vector, `none` does nothing."""
    mask_first_position: bool = True
    """Leave out the first position of every sequence."""
    mask_norm_factor: Annotated[float, Field(gt=1)] | None = 10.0
    """Leave out tokens whose norm exceeds this many times their layer's median; None: off."""
    special_tokens: Literal["drop", "zero"] = "drop"
    """What masking does: leave vectors out, or set them to zero (lawson2024)."""
    recipe: RecipeName = "standard"
    """Training rules the weights come from."""
    lm: str | None = None
    """Language model the SAE reads: Hub id or folder."""
    lm_revision: str | None = None
    """Commit of the language model, if known."""
    separator_token: str | None = None
    """Token between documents; None: the tokenizer's end of sequence."""
    data: str | None = None
    """Text it was trained on: evaluation on the same text keeps to its held-out part."""
    tokenizer_fingerprint: str | None = None
    """SHA-256 that tells this language model's tokenizer from others."""
    lens: str | None = None
    """Where the tuned lens before the frame came from; its maps are among the weights. None: there is none."""
    activation: Literal["topk", "jumprelu"] = "topk"
    """`topk`: the k largest pre-activations, rectified; `jumprelu`, of imported SAEs: all above thresholds, however many."""
    latent_bias: bool = False
    """Each latent adds a bias to its pre-activation, as in SAEs of other libraries."""
    format_version: Literal[1] = 1
    """Version of this file's layout."""

    @model_validator(mode="before")
    @classmethod
    def _sizes(cls, values: Any) -> Any:
        """Fill n_latents from expansion_factor or the reverse; refuse a pair that disagrees."""
        sizes = ("d_model", "groups", "n_latents", "expansion_factor")
        if not isinstance(values, Mapping) or any(
            isinstance(values.get(name), str | bool | list | dict) for name in sizes
        ):
            return values  # left for the type check
        if values.get("d_model") is None or values["d_model"] < 1 or values.get("groups", 1) < 1:
            return values
        d_model, groups = values["d_model"], values.get("groups", 1)
        n_latents, factor = values.get("n_latents"), values.get("expansion_factor")
        if n_latents is None:
            n_latents = latents_in(d_model, 16.0 if factor is None else float(factor)) * groups
        if not isinstance(n_latents, int) or n_latents % groups or d_model < 1:
            raise ConfigError("n_latents", f"{n_latents} does not split into {groups} groups; choose a multiple")
        if factor is not None and not math.isclose(n_latents, factor * d_model * groups):
            raise ConfigError(
                "n_latents",
                f"{n_latents} is not expansion_factor x d_model x groups = {factor:g} x {d_model} x {groups}; give one",
            )
        return {**values, "n_latents": n_latents, "expansion_factor": n_latents / groups / d_model}

    def group_of(self, row: int) -> int:
        """The group of one of the layers, by its place among them: neighbours share one, and sizes differ by at most a layer."""
        return 0 if self.groups == 1 else row * self.groups // len(self.layers or ())

    @model_validator(mode="after")
    def _k_and_layers_fit(self) -> "MLSAEConfig":
        if self.layers is not None:
            check_layers(self.layers)
        n_latents = self.n_latents // self.groups
        if self.k > n_latents:
            raise ConfigError(
                "k",
                f"{self.k} exceeds n_latents {n_latents} (= {self.d_model} x {self.expansion_factor:g}); "
                "lower k or raise expansion_factor",
            )
        return self


def latents_in(d_model: int, expansion_factor: float) -> int:
    """expansion_factor x d_model, refused unless it is a whole number of at least one."""
    product = d_model * expansion_factor
    if not (product >= 1 and float(product).is_integer()):
        raise ConfigError(
            "expansion_factor",
            f"{expansion_factor:g} x d_model {d_model} = {product:g} latents; choose a factor that gives a whole number",
        )
    return int(product)


def default_lr(n_latents: int) -> float:
    """The learning rate for a dictionary of this size, 2e-4 at 2^14 latents (Gao et al. 2024's scaling)."""
    return 2e-4 / math.sqrt(n_latents / 2**14)


Positive = Annotated[Count, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class TrainerConfig(Config):
    """What one optimizer step needs to know: `Trainer` takes this much, `train` adds the rest."""

    recipe: RecipeName = "standard"
    """`standard` is right; `lawson2024` trains as the published code does."""
    lr: Annotated[float, Field(gt=0, le=1)] | None = None
    """Peak learning rate; None: 2e-4 / sqrt(n_latents / 2^14), lawson2024 1e-4."""
    warmup_fraction: Fraction | None = None
    """Share of the steps in which the learning rate rises from zero; None: the recipe's."""
    decay_fraction: Fraction | None = None
    """Share of the steps, at the end, in which it falls to zero; None: the recipe's."""
    adam_betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.999), strict=False)
    """Adam's decay rates."""
    adam_eps: Annotated[float, Field(gt=0)] = 6.25e-10
    """Adam's epsilon."""
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest gradient norm; None: no clipping."""
    k_aux: Annotated[int, Field(ge=0)] | None = None
    """Dead latents that AuxK revives per vector; 0: off; None: 256, or all there are."""
    aux_coef: Annotated[float, Field(ge=0)] = 1 / 32
    """Weight of the AuxK loss."""
    dead_after_tokens: Positive | None = None
    """Tokens without a value above dead_threshold that make a latent dead; None: 10,000,000, or a tenth of the run if less."""
    dead_threshold: Annotated[float, Field(ge=0)] = 1e-3
    """Value a latent must exceed to count as alive."""
    init_tokens: Positive = 32_768
    """Unmasked tokens that fix the frame, the variances and the bias before the first step."""
    precision: PrecisionName | None = None
    """Precision of the SAE's matrix products (weights stay float32); None: bfloat16 on CUDA that has it, else float32."""
    impl: Impl = "auto"
    """Who computes the sparse operations: `reference` is plain torch; `auto` the fastest there is for the device."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> "TrainerConfig":
        if (self.warmup_fraction or 0.0) + (self.decay_fraction or 0.0) > 1:
            raise ConfigError("warmup_fraction", "with decay_fraction more than the whole run; lower one of them")
        return self

    @property
    def rules(self) -> Recipe:
        """The recipe's row of the table."""
        return RECIPES[self.recipe]


class Materials(Config):
    """What no training run can do without."""

    lm: str
    """Language model to read: a Hugging Face id or a folder."""
    data: str
    """Text to train on: a .txt, .jsonl, .csv, .parquet or .arrow file (also .zst or .gz), a folder of them, or a Hub dataset."""
    out: str
    """Run directory to write."""
    tokens: Annotated[Positive, Field(le=10**18)] = 100_000_000
    """Tokens to train on; past the end of the text it starts again, in a new order."""


class Placement(Config):
    """Where everything is computed: the SAE on one device, and the language model there or wherever a map puts it."""

    device: str | None = None
    """cpu, cuda, cuda:1, mps, for all but what lm_device_map puts elsewhere; None: the first accelerator, else cpu."""
    lm_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the language model; None: float32 on a CPU, bfloat16 on an accelerator that has it."""
    lm_device_map: str | None = None
    """Spread the language model: auto, balanced, balanced_low_0, sequential, a device, or a YAML file of module: device."""

    def lm_options(self) -> dict[str, Any]:
        """The same as `LanguageModel.from_pretrained` takes it."""
        return {"device": self.device, "dtype": self.lm_dtype, "device_map": self.lm_device_map}


class TrainConfig(TrainerConfig, DictionaryFields, Placement, Materials):
    """What `train` needs to know. A field that is None is filled in at the start and written to RUN/config.json."""

    expansion_factor: Annotated[float, Field(gt=0)] | None = None
    """Latents of one dictionary as a multiple of d_model; None: 16."""
    n_latents: Positive | None = None
    """Latents in all, instead of expansion_factor."""
    frame: FrameName | None = None
    """Map before the encoder; None: the recipe's (standard: layer, lawson2024: vector)."""
    mask_first_position: bool | None = None
    """Leave out the first position of every sequence; None: the recipe's."""
    mask_norm_factor: Annotated[float, Field(ge=0)] | None = None
    """Leave out tokens whose norm exceeds this many times their layer's median; 0: off; None: the recipe's (standard: 10)."""
    lens: str | None = None
    """Folder of a tuned lens, which `mlsae lens` writes, to put before the frame; None: none."""
    context_length: Positive | None = None
    """Tokens in a sequence; None: 2048 or the language model's limit."""
    batch_size: Positive | None = None
    """Sequences in one forward pass; None: about 8,192 tokens."""
    accumulation_steps: Positive | None = None
    """Forward passes in one optimizer step; None: 131,072 tokens a step, or a thousandth of the run if that is less."""
    text_column: str = "text"
    """Column or key that holds the text."""
    split: str = "train"
    """Part of the data to train on: a split it has, or `all`; data without splits is divided by document 96/2/2."""
    skip_bad_rows: bool = False
    """Count rows whose text is no string instead of stopping."""
    streaming: bool = False
    """Read the text, a Hub dataset row by row, only as far as `tokens` needs."""
    separator_token: str | None = None
    """Token between documents; None: the tokenizer's end of sequence."""
    repeat: bool = True
    """Start over when the text ends; off: stop cleanly and say how many tokens were used."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 42
    """Seed of the initial weights and, unless data_seed says otherwise, of the data order."""
    data_seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Seed of the data order; None: seed. Runs that share it read the same text in the same order."""
    log_every_steps: Positive | None = None
    """Steps between lines of metrics.jsonl; None: two hundred lines a run."""
    save_every_steps: Positive | None = None
    """Steps between checkpoints; None: ten a run."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Checkpoints to keep."""
    validate_every_steps: Positive | None = None
    """Steps between validations on held-out text; None: never, lawson2024 every 4,096 forward passes."""
    validation_sequences: Positive = 512
    """Sequences in one validation."""
    log_to: Literal["wandb", "trackio", "tensorboard"] | None = None
    """Also send metrics here; None: files only, nothing leaves this machine."""

    @model_validator(mode="after")
    def _combinations(self) -> "TrainConfig":
        if self.n_latents is not None and self.expansion_factor is not None:
            raise ConfigError("n_latents", "given together with expansion_factor; give one of them")
        return self


@dataclass(frozen=True)
class LMShape:
    """What a language model's config tells before its weights are read."""

    name: str
    n_layers: int
    d_model: int
    context_length: int | None
    """Longest sequence, tokens; None: no limit."""


def check_layers(layers: tuple[int, ...], lm: LMShape | None = None) -> None:
    """Refuse an empty, repeated, negative or (with `lm`) too large layer; layers are ids, so -1 never wraps."""
    if not layers:
        raise ConfigError("layers", "empty; name at least one layer or leave it out for all")
    for layer in layers:
        if layer < 0:
            last = f"use {lm.n_layers - 1} for the last" if lm else "count from 0"
            raise ConfigError("layers", f"{layer} is out of range; {last}")
        if layers.count(layer) > 1:
            raise ConfigError("layers", f"{layer} is given twice; name each layer once")
        if lm is not None and layer >= lm.n_layers:
            raise ConfigError("layers", f"{layer} is out of range; {lm.name} has layers 0-{lm.n_layers - 1}")


def config_error(error: ValidationError, model: type[BaseModel]) -> ConfigError:
    """The first complaint of a validation, in our one-sentence form."""
    first = error.errors(include_url=False)[0]
    if isinstance(cause := first.get("ctx", {}).get("error"), ConfigError):
        return cause
    field = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("function-", "constrained-")))
    given = first["input"]
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, list(model.model_fields), n=1, cutoff=0.7)
        remedy = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(model.model_fields)}"
        return ConfigError(field, f"unknown key '{field}'; {remedy}")
    if first["type"] == "missing":
        return ConfigError(field, f"missing; give --{field.replace('_', '-')}")
    if first["type"] == "finite_number":
        return ConfigError(field, f"{given!r} given; must be {_range(model, field)}")
    allowed = first["msg"].replace("Input should be ", "must be ").replace("greater than or equal to", "at least")
    return ConfigError(field, f"{given!r} given; {allowed}")


def _range(model: type[BaseModel], field: str) -> str:
    """The bounds of a number, in words."""
    names = {"Gt": "greater than", "Ge": "at least", "Lt": "less than", "Le": "at most"}
    found = model.model_fields[field.partition(".")[0]]
    bounds = [bound for part in (found, *get_args(found.annotation)) for bound in _bounds(part)]
    words = [f"{names[type(bound).__name__]} {getattr(bound, type(bound).__name__.lower()):g}" for bound in bounds]
    return " and ".join(words) or "a finite number"


def _bounds(part: Any) -> list[Any]:
    """The annotated-types bounds of a field or of an Annotated type."""
    metadata = [*getattr(part, "metadata", ()), *getattr(part, "__metadata__", ())]
    nested = [bound for item in metadata for bound in getattr(item, "metadata", ())]
    return [bound for bound in [*metadata, *nested] if type(bound).__name__ in ("Gt", "Ge", "Lt", "Le")]


def load_config(path: Path) -> dict[str, Any]:
    """The keys of a YAML or JSON file, refused if TrainConfig has no such key."""
    from mlsae.untrusted import read_yaml

    values = read_yaml(path)
    for key in values:
        if key not in TrainConfig.model_fields:
            near = difflib.get_close_matches(str(key), list(TrainConfig.model_fields), n=1, cutoff=0.7)
            raise ConfigError(str(path), f"unknown key '{key}'" + (f"; did you mean '{near[0]}'?" if near else ""))
    return values
