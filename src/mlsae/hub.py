"""A Hugging Face model's files, found and loaded without running code from them or reading a pickle.

transformers never sees a config.json that was not walked first; downloads.py brings what is on the Hub.
"""

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoTokenizer

from mlsae.config import LMShape
from mlsae.downloads import fetch
from mlsae.errors import ModelError, printable
from mlsae.untrusted import check_header, read_json

_PYTHIA_SIZES = ("14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b")
_WELL_KNOWN = (
    *(f"EleutherAI/pythia-{size}{data}" for size in _PYTHIA_SIZES for data in ("", "-deduped")),
    *("gpt2", "gpt2-medium", "openai-community/gpt2", "HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-360M"),
    *("Qwen/Qwen2.5-0.5B", "Qwen/Qwen3-0.6B", "google/gemma-2-2b", "google/gemma-3-1b-pt", "facebook/opt-125m"),
    *("meta-llama/Llama-3.2-1B", "mistralai/Mistral-7B-v0.1", "bigscience/bloom-560m", "allenai/OLMo-2-0425-1B"),
)
SUPPORTED = "models built like GPT-2, GPT-NeoX, Llama, Mistral, Qwen, Gemma, Phi, OPT, BLOOM or Falcon are supported"
SAFE_TRANSFORMERS = (5, 3)
"""Before it, a config.json could choose code to run: ours are walked, but one lock is less than two."""
FILES = ("*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja")
"""What a model consists of: its configs, weights and tokenizer, and no second copy of the weights in another format."""
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES, MAX_SIDE_BYTES = 64 << 20, 100 << 20
"""The largest index of weights or tokenizer config that is read, and the largest file beside the weights."""
_ATTENTION = (None, "eager", "sdpa", "flash_attention_2")
_REFUSED_KEYS = ("trust_remote_code", "quantization_config", "transformers_weights")
_INERT_KEYS = (
    *("_name_or_path", "_model_name_or_path", "_commit_hash", "_num_labels", "_sliding_window_pattern"),
    *("_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled", "_from_model_config"),
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Where a model's files are: a folder, given or downloaded."""

    name: str
    folder: Path
    revision: str | None
    """Commit on the Hub, if it comes from there."""


def locate(name: str, revision: str | None, *, weights: bool) -> Source:
    """Find a model in a folder, on the Hub or, where that cannot be reached, in its cache; without `weights`, only its config."""
    folder = Path(os.path.expanduser(name))
    if not os.path.isdir(folder):  # which, unlike Path's, says no to a name that is too long
        found = fetch(
            "model",
            name,
            revision,
            FILES if weights else ("config.json", INDEX),
            check=lambda sizes: _check_files(name, sizes),
            needed=("config.json",),
            known=_WELL_KNOWN,
        )
        return Source(name, found, found.name)
    _check_files(name, {path.name for path in folder.iterdir()})
    return Source(str(folder), folder, None)


def _check_files(name: str, files: Iterable[str]) -> None:
    name = printable(name)
    if "config.json" not in files:
        raise ModelError("model", f"'{name}' has no config.json; name a language model in Hugging Face format")
    if "adapter_config.json" in files:  # transformers would load the model that this names instead
        raise ModelError(
            "model", f"'{name}' is an adapter of another model; merge it into that model and name the result"
        )
    if not any(file.startswith("model") and file.endswith(".safetensors") for file in files):
        raise ModelError("model", f"'{name}' has no safetensors weights; see 'mlsae convert'")


def read_config(source: Source) -> Any:
    """The Hugging Face config of a causal language model, built from a file that was walked first."""
    name, found = printable(source.name), read_json(source.folder / "config.json")
    found = found if isinstance(found, dict) else {}
    values = _walked(found, name)
    _check_index(source, whole=source.revision is None)  # of a model on the Hub, the weights may come later
    model_type = str(values.pop("model_type", ""))
    if model_type not in CONFIG_MAPPING:
        if "auto_map" in found:
            raise ModelError("model", f"'{name}' needs code from its repository; not supported")
        raise ModelError(
            "model", f"'{name}' is of type '{printable(model_type)}', unknown to transformers; {SUPPORTED}"
        )
    if "auto_map" in found:  # transformers knows the architecture itself
        _log.warning("model: '%s' ships its own code, which is not used", name)
    try:
        config = CONFIG_MAPPING[model_type].from_dict(values)
    except (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
        raise ModelError("model", f"'{name}' has an unusable config.json ({printable(str(error))})") from error
    _check_causal(name, config)
    return config


def _walked(value: Any, name: str, file: str = "config.json") -> Any:
    """A config without the keys that choose code; a key that could load code, at any depth, is refused."""
    if isinstance(value, list):
        return [_walked(item, name, file) for item in value]
    if not isinstance(value, dict):
        return value
    for key, item in value.items():
        attention = "attn_implementation" in key and (isinstance(item, dict) or item not in _ATTENTION)
        private = key.startswith("_") and item and key not in _INERT_KEYS
        if key in _REFUSED_KEYS or attention or private:
            raise ModelError("model", f"'{name}' has '{printable(key)}' in its {file}; not supported")
    chosen_by_us = ("auto_map", *(key for key in value if key.startswith("_") or "attn_implementation" in key))
    return {key: _walked(item, name, file) for key, item in value.items() if key not in chosen_by_us}


def _check_index(source: Source, *, whole: bool) -> None:
    """Every file that an index of weights names is one of the model's own."""
    path = source.folder / INDEX
    if not path.is_file() or (source.folder / "model.safetensors").is_file():
        return
    index, name = read_json(path, MAX_INDEX_BYTES), printable(source.name)
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(file, str) for file in weights.values()):
        raise ModelError("model", f"'{name}' has an unusable {INDEX}; download it again")
    for file in sorted(set(weights.values())):
        if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise ModelError("model", f"'{name}' names '{printable(file)}' in its {INDEX}, which is no file of its own")
        if whole and not (source.folder / file).is_file():
            raise ModelError("model", f"'{name}' is not whole: {printable(file)} is missing; download it again")


def _check_weights(source: Source, shape: LMShape) -> None:
    """Headers that can be true, and weights enough for the layers that the config claims: nothing is built before."""
    weights = [path for path in source.folder.glob("model*.safetensors") if path.is_file()]
    for path in weights:
        check_header(path)
    if (size := sum(path.stat().st_size for path in weights)) < shape.n_layers * shape.d_model**2:
        claims = f"{shape.n_layers} layers of width {shape.d_model} in its config.json"
        raise ModelError("model", f"'{printable(source.name)}' has {claims} and {size} bytes of weights; get it again")


def _check_tokenizer(source: Source) -> None:
    """The tokenizer's and generation's configs may no more choose code than the model's own."""
    name = printable(source.name)
    for path in (*source.folder.glob("*.json"), *source.folder.glob("*.model")):
        if path.stat().st_size > MAX_SIDE_BYTES:
            raise ModelError("model", f"'{name}' has a {printable(path.name)} of {path.stat().st_size} bytes; not read")
    for file in ("tokenizer_config.json", "generation_config.json"):
        path = source.folder / file
        found = read_json(path, MAX_INDEX_BYTES) if path.is_file() else {}
        _walked(found, name, file)
        chosen = found.get("tokenizer_class") if isinstance(found, dict) else None
        if isinstance(found, dict) and "auto_map" in found:
            raise ModelError("model", f"'{name}' has a tokenizer that needs code from its repository; not supported")
        if chosen is not None and not (isinstance(chosen, str) and chosen.isidentifier()):
            raise ModelError(
                "model", f"'{name}' has no name of a class as tokenizer_class in its {file}; not supported"
            )


def _check_causal(name: str, config: Any) -> None:
    """The class that wrote the weights must be its type's causal class: BERT's type has one too, but few are of it."""
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    written_by = config.architectures or []
    if causal is None or config.is_encoder_decoder or (written_by and causal.__name__ not in written_by):
        raise not_causal(name, str(written_by[0]) if written_by else type(config).__name__)


def not_causal(name: str, kind: str) -> ModelError:
    return ModelError("model", f"'{printable(name)}' is {printable(kind)}, not a causal language model; {SUPPORTED}")


def shape_of(name: str, config: Any) -> LMShape:
    text = config.get_text_config()
    n_layers, d_model = (getattr(text, key, None) for key in ("num_hidden_layers", "hidden_size"))
    if not (isinstance(n_layers, int) and isinstance(d_model, int) and n_layers > 0 and d_model > 0):
        raise ModelError("model", f"'{printable(name)}' does not say how many layers of what width it has; {SUPPORTED}")
    limit = getattr(text, "max_position_embeddings", None)  # none where positions are a bias on attention (BLOOM)
    return LMShape(name=name, n_layers=n_layers, d_model=d_model, context_length=limit or None)


def count_parameters(config: Any) -> tuple[int, int]:
    """Of the model that a config describes: all parameters, and those of its blocks that compute on one token.

    It is built of shapes alone. Of experts, which share one tensor, those are counted that a token is sent to.
    """
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    text = config.get_text_config()
    chosen = getattr(text, "num_experts_per_tok", None)
    n_experts = next((n for key in ("num_local_experts", "num_experts") if (n := getattr(text, key, None))), None)
    tables = {id(layer.weight) for layer in (hf.get_input_embeddings(), hf.get_output_embeddings())}
    used = 0
    for name, weight in hf.named_parameters():
        if id(weight) not in tables:
            routed = ".experts." in name and chosen and n_experts
            used += weight.numel() * chosen // n_experts if routed else weight.numel()
    return sum(weight.numel() for weight in hf.parameters()), used


def load_weights(
    source: Source, config: Any, dtype: str | torch.dtype, device_map: str | Mapping[str, str | int] | None = None
) -> Any:
    """The Hugging Face model, every weight of it from the file and every weight of the file in it; None: on the CPU."""
    name = printable(source.name)
    _check_index(source, whole=True)
    _check_weights(source, shape_of(source.name, config))
    if tuple(map(int, transformers.__version__.split(".")[:2])) < SAFE_TRANSFORMERS:
        _log.warning("transformers %s has flaws that 5.3 mended (CVE-2026-4372); upgrade it", transformers.__version__)
    auto: Any = AutoModelForCausalLM  # its annotations know nothing of the loading info
    try:
        hf, info = auto.from_pretrained(
            source.folder,
            config=config,
            local_files_only=True,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            device_map=device_map if device_map is None or isinstance(device_map, str) else dict(device_map),
        )
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError) or getattr(error, "errno", None):
            raise  # this machine's fault, not the model's
        raise ModelError("model", f"'{name}' cannot be loaded ({printable(str(error))[:300]})") from error
    for kind in ("missing", "unexpected", "mismatched"):
        if keys := sorted(map(str, info[f"{kind}_keys"])):
            raise ModelError("model", f"'{name}' has {len(keys)} {kind} weights, such as {printable(keys[0])}")
    return hf


def load_tokenizer(source: Source, config: Any) -> Any:
    _check_tokenizer(source)
    try:
        return AutoTokenizer.from_pretrained(
            source.folder,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:  # each tokenizer class fails in its own way
        problem = f"'{printable(source.name)}' has no usable tokenizer ({printable(str(error))[:300]})"
        raise ModelError("model", problem) from error
