"""Any Hugging Face causal language model: the residual stream after every block, and passes with blocks replaced.

One mechanism does all of it. An *edit* stands in for a decoder block during one pass: it is given a function that runs
the block, and the block's input, and returns the block's output. Reading a layer runs the block and keeps what it
returned, replacing a layer changes it, and a block that need not be computed passes its input through.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoTokenizer

from mlsae.config import LMShape, check_layers
from mlsae.errors import ConfigError, DataError, ModelError, did_you_mean, printable
from mlsae.files import read_json
from mlsae.tokens import Tokenizer

Edit = Callable[[Callable[[], Tensor], Tensor], Tensor]
"""(function that runs the block, the block's input) -> what the next block receives."""

_PYTHIA_SIZES = ("14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b")
_WELL_KNOWN = (
    *(f"EleutherAI/pythia-{size}{data}" for size in _PYTHIA_SIZES for data in ("", "-deduped")),
    *("gpt2", "gpt2-medium", "openai-community/gpt2", "HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-360M"),
    *("Qwen/Qwen2.5-0.5B", "Qwen/Qwen3-0.6B", "google/gemma-2-2b", "google/gemma-3-1b-pt", "facebook/opt-125m"),
    *("meta-llama/Llama-3.2-1B", "mistralai/Mistral-7B-v0.1", "bigscience/bloom-560m", "allenai/OLMo-2-0425-1B"),
)
_KINDS = "models built like GPT-2, GPT-NeoX, Llama, Mistral, Qwen, Gemma, Phi, OPT, BLOOM or Falcon are supported"
_ATTENTION = (None, "eager", "sdpa", "flash_attention_2")
_INERT_KEYS = (
    *("_name_or_path", "_model_name_or_path", "_commit_hash", "_num_labels", "_sliding_window_pattern"),
    *("_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled", "_from_model_config"),
)
_log = logging.getLogger(__name__)


class LanguageModel:
    """A frozen causal language model read and edited at the output of its blocks, layer 0 being the first block's.

    The Hugging Face model is put into eval mode and its parameters no longer ask for gradients.
    """

    def __init__(self, hf_model: Any, tokenizer: Any, *, name: str | None = None, revision: str | None = None):
        """Wrap Hugging Face objects, or our Tokenizer. Raises ModelError if the model fails its self-check."""
        self.hf = hf_model.eval().requires_grad_(False)
        self.tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer(tokenizer)
        self.name = name or hf_model.name_or_path or type(hf_model).__name__
        self.revision = revision or getattr(hf_model.config, "_commit_hash", None)
        self.shape = _shape(self.name, hf_model.config)
        self.n_layers, self.d_model = self.shape.n_layers, self.shape.d_model
        self.context_length = self.shape.context_length
        self.d_vocab = int(hf_model.config.get_text_config().vocab_size)
        self._blocks = [_Block(module) for module in self._find_blocks()]
        self._check_itself()

    @classmethod
    def from_pretrained(
        cls,
        id_or_dir: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        separator_token: str | None = None,
    ) -> "LanguageModel":
        """Load from the Hub or a folder, never running code from either and never reading a pickle.

        Args:
            device: None is the first accelerator, else the CPU.
            dtype: None is bfloat16 on a CUDA device that has it, else float32.
            separator_token: the token between documents; None is the tokenizer's end of sequence.

        Raises:
            ModelError: the model is missing, unreachable, damaged or unsupported.
        """
        source = _locate(str(id_or_dir), revision)
        config = _read_config(source)
        _shape(source.name, config)
        device = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        hf = _load_weights(source, config, _default_dtype(device) if dtype is None else dtype).to(device)
        tokenizer = Tokenizer(_load_tokenizer(source), separator_token)
        return cls(hf, tokenizer, name=source.name, revision=source.revision)

    @property
    def device(self) -> torch.device:
        """Where the model is, and where the tensors it returns are."""
        return self.hf.device

    def tokenize(self, text: str | Sequence[str]) -> Int[Tensor, "batch pos"]:
        """Token ids of prompts, shorter ones padded on the right, on the model's device."""
        return self.tokenizer.prompts(text).to(self.device)

    def keep_mask(
        self, tokens: Int[Tensor, "batch pos"], *, special_tokens: bool = True, first_position: bool = True
    ) -> Bool[Tensor, "batch pos"]:
        """The positions an SAE sees: no BOS, EOS, padding or separator, and not the first of a sequence, by default."""
        keep = torch.ones_like(tokens, dtype=torch.bool)
        if special_tokens:
            keep &= ~torch.isin(tokens, torch.tensor(sorted(self.tokenizer.special_ids), device=tokens.device))
        if first_position:
            keep[:, :1] = False
        return keep

    def resid(
        self, tokens: Int[Tensor, "batch pos"], layers: Sequence[int] | None = None
    ) -> Float[Tensor, "layer batch pos {self.d_model}"]:
        """The output of every block, or of the blocks in `layers` in that order, before the final norm.

        float32, without gradient, from one forward pass without the unembedding or any block after the last one needed.
        """
        wanted = tuple(range(self.n_layers)) if layers is None else tuple(layers)
        check_layers(wanted, self.shape)
        out = torch.empty(len(wanted), *tokens.shape, self.d_model, dtype=torch.float32, device=self.device)
        edits: dict[int, Edit] = dict.fromkeys(range(max(wanted) + 1, self.n_layers), _pass_through)
        self._run(self.hf.base_model, tokens, edits | {layer: _keep_in(row) for layer, row in zip(wanted, out)})
        return out

    def logits(
        self, tokens: Int[Tensor, "batch pos"], replace: Mapping[int, Callable[[Tensor], Tensor]] | None = None
    ) -> Float[Tensor, "batch pos {self.d_vocab}"]:
        """Logits in the model's dtype, with the output of each layer in `replace` replaced as it flows by.

        Each function receives its layer's output, which earlier replacements have already changed, as float32
        [batch, pos, d_model], and returns its replacement. No grad.
        """
        if replace:
            check_layers(tuple(replace), self.shape)
        edits = {layer: _replace_by(fn, layer) for layer, fn in (replace or {}).items()}
        return self._run(self.hf, tokens, edits).logits

    def run_from(
        self, resid: Float[Tensor, "batch pos {self.d_model}"], layer: int, tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos {self.d_vocab}"]:
        """Logits of the pass in which block `layer` puts out `resid`; blocks up to it are not computed. No grad."""
        check_layers((layer,), self.shape)
        _check_shape(resid, (*tokens.shape, self.d_model), layer)
        edits: dict[int, Edit] = dict.fromkeys(range(layer), _pass_through)
        return self._run(self.hf, tokens, edits | {layer: lambda run, flowing: resid.to(flowing)}).logits

    @torch.no_grad()  # not inference_mode, whose tensors an SAE could not be trained on
    def _run(self, module: Any, tokens: Tensor, edits: Mapping[int, Edit]) -> Any:
        """One pass of the whole model, or of what lies below its unembedding, with `edits` standing in for blocks.

        There is never an attention mask. Padding is on the right, where no earlier position sees it, so prompts take
        the path of packed text, and models that count positions from the mask count as from a mask of ones.
        """
        n_pos = tokens.shape[1]
        if self.context_length and n_pos > self.context_length:
            raise DataError("tokens", f"{n_pos} in a sequence; {self.name} takes at most {self.context_length}")
        with contextlib.ExitStack() as stack:
            for layer, edit in edits.items():
                stack.enter_context(self._blocks[layer].edited(edit))
            return module(input_ids=tokens.to(self.device), use_cache=False)

    def _find_blocks(self) -> nn.ModuleList:
        """The list of decoder blocks: outermost ModuleList of the decoder with one module per layer."""
        if self.hf.config.is_encoder_decoder or self.hf.get_output_embeddings() is None:
            raise _not_causal(self.name, type(self.hf).__name__)
        for root in (self.hf.get_decoder(), self.hf.base_model):
            for module in root.modules() if isinstance(root, nn.Module) else ():
                if isinstance(module, nn.ModuleList) and len(module) == self.n_layers:
                    return module
        raise self._unfit(f"has no list of {self.n_layers} decoder blocks")

    def _check_itself(self) -> None:
        """A few tokens through the laws everything else rests on. Raises ModelError with the layer that breaks one."""
        tokens = (torch.arange(8, device=self.device).reshape(2, 4) * 7 + 1) % self.d_vocab
        tokens[1, :3] = tokens[0, :3]
        try:
            clean = self._check_stream(tokens)
            self._check_edits(tokens, clean)
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # blocks that are called in another way
            raise self._unfit(f"cannot be run block by block ({printable(str(error))})") from error

    def _check_stream(self, tokens: Tensor) -> Tensor:
        """Block l puts out one vector per token, blind to later tokens, and block l+1 takes it. Returns the logits."""
        inputs: dict[int, Tensor] = {}
        outputs: dict[int, Tensor] = {}
        clean = self._run(self.hf, tokens, {i: _watch(i, inputs, outputs) for i in range(self.n_layers)}).logits
        for layer in range(self.n_layers):
            out = outputs[layer]
            if out.shape != (*tokens.shape, self.d_model):
                raise self._unfit(f"has no single residual stream: layer {layer} puts out {tuple(out.shape)}")
            self._check_equal(out[0, :3], out[1, :3], f"is not causal: layer {layer} sees later tokens")
            if layer + 1 < self.n_layers:
                complaint = f"changes layer {layer} on its way to the next block"
                self._check_equal(inputs[layer + 1], out, complaint, exactly=True)
        return clean

    def _check_edits(self, tokens: Tensor, clean: Tensor) -> None:
        """A layer replaced by itself, and a pass resumed from it, give the clean logits: first and last layer."""
        resid = self.resid(tokens)
        for layer in {0, self.n_layers - 1}:
            itself = self.logits(tokens, {layer: lambda x: x})
            self._check_equal(itself, clean, f"is changed by replacing layer {layer} by itself", exactly=True)
            resumed = self.run_from(resid[layer], layer, tokens)
            self._check_equal(resumed, clean, f"cannot be resumed from layer {layer}")

    def _check_equal(self, got: Tensor, want: Tensor, complaint: str, *, exactly: bool = False) -> None:
        if torch.equal(got, want):
            return
        difference = ((got - want).abs().max() / want.abs().max()).item()
        # Sums of a mixture of experts come in any order on an accelerator, so bits are promised on the CPU only.
        tolerance = 0 if exactly and self.device.type == "cpu" else max(1e-4, 4 * torch.finfo(want.dtype).eps)
        if not difference <= tolerance:  # NaN fails too
            raise self._unfit(f"{complaint} (relative difference {difference:.1e})")

    def _unfit(self, complaint: str) -> ModelError:
        return ModelError("model", f"'{printable(self.name)}' ({type(self.hf).__name__}) {complaint}; {_KINDS}")


def read_shape(id_or_dir: str | Path, revision: str | None = None) -> LMShape:
    """Layers, width and context length from the config alone, of a Hub id one small file; no weights are read.

    Raises:
        ModelError: the model is missing, unreachable or unsupported, as far as its config and its list of files tell.
    """
    source = _locate(str(id_or_dir), revision)
    return _shape(source.name, _read_config(source))


# ---- editing blocks --------------------------------------------------------------------------------------------------


class _Block:
    """A decoder block whose forward an edit can stand in for."""

    def __init__(self, module: nn.Module):
        self._module = module
        self._rest: tuple[None, ...] | None = None  # what a block that is not run returns beside the stream

    @contextlib.contextmanager
    def edited(self, edit: Edit) -> Iterator[None]:
        """While open, the block returns what `edit` says, in the block's own kind: a tensor or a tuple."""
        own = self._module.__dict__.get("forward")  # set by others, such as accelerate
        self._module.forward = self._standing_in(self._module.forward, edit)
        try:
            yield
        finally:
            del self._module.forward
            if own is not None:
                self._module.forward = own

    def _standing_in(self, forward: Callable[..., Any], edit: Edit) -> Callable[..., Any]:
        def stand_in(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            rest: tuple[Any, ...] | None = self._rest

            def run() -> Tensor:
                nonlocal rest
                output = forward(hidden_states, *args, **kwargs)
                if not isinstance(output, tuple):
                    return output
                rest = output[1:]
                self._rest = (None,) * len(rest)
                return output[0]

            resid = edit(run, hidden_states)
            return resid if rest is None else (resid, *rest)

        return stand_in


def _pass_through(run: Callable[[], Tensor], flowing: Tensor) -> Tensor:
    return flowing


def _keep_in(row: Tensor) -> Edit:
    def edit(run: Callable[[], Tensor], flowing: Tensor) -> Tensor:
        resid = run()
        row.copy_(resid)
        return resid

    return edit


def _replace_by(fn: Callable[[Tensor], Tensor], layer: int) -> Edit:
    def edit(run: Callable[[], Tensor], flowing: Tensor) -> Tensor:
        resid = run()
        replacement = fn(resid.float())
        _check_shape(replacement, tuple(resid.shape), layer)
        return replacement.to(resid)

    return edit


def _watch(layer: int, inputs: dict[int, Tensor], outputs: dict[int, Tensor]) -> Edit:
    def edit(run: Callable[[], Tensor], flowing: Tensor) -> Tensor:
        inputs[layer] = flowing.clone()
        resid = run()
        outputs[layer] = resid.clone()
        return resid

    return edit


def _check_shape(resid: Any, expected: tuple[int, ...], layer: int) -> None:
    shape = tuple(resid.shape) if isinstance(resid, Tensor) else type(resid).__name__
    if shape != expected:
        raise ConfigError("resid", f"{shape} given for layer {layer}; it must be [batch, pos, d_model] = {expected}")


# ---- loading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Where a model's files are."""

    name: str
    config: Path
    revision: str | None
    """Commit on the Hub, if known."""
    local_only: bool
    """A folder, or a Hub that cannot be reached: only what is on this disk."""


def _locate(name: str, revision: str | None) -> _Source:
    """Find the config in a folder, on the Hub or, where that cannot be reached, in its cache."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return _locate_on_hub(name, revision)
    _check_files(name, [path.name for path in folder.iterdir()])
    return _Source(str(folder), folder / "config.json", None, local_only=True)


def _locate_on_hub(name: str, revision: str | None) -> _Source:
    unreachable = None
    with _hub_errors(name, revision):
        try:
            info = HfApi().model_info(name, revision=revision, timeout=10)
            _check_files(name, [file.rfilename for file in info.siblings or []])
            revision = info.sha
        except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError, ModelError):
            raise
        except Exception as error:  # no network, a proxy, a busy server: types differ between versions of the client
            unreachable = error
        try:
            local = unreachable is not None
            config = Path(hf_hub_download(name, "config.json", revision=revision, local_files_only=local))
        except LocalEntryNotFoundError as error:
            raise _not_cached(name, unreachable or error) from error
    commit = config.parent.name if config.parent.parent.name == "snapshots" else revision
    return _Source(name, config, commit, local_only=local)


@contextlib.contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Answers of the Hub as the one sentence a user can act on; their own text may quote a token, so it is left out."""
    name = printable(name)
    login = "run 'hf auth login'"
    try:
        yield
    except GatedRepoError:
        raise ModelError("model", f"'{name}' is gated; ask for access on huggingface.co/{name} and {login}") from None
    except (RepositoryNotFoundError, HFValidationError):
        hint = did_you_mean(name, _WELL_KNOWN) or f"; check the name, or {login} if it is private"
        raise ModelError("model", f"'{name}' not found on the Hub or as a folder{hint}") from None
    except RevisionNotFoundError:
        raise ModelError("model", f"'{name}' has no revision '{revision}'; name a branch, tag or commit") from None
    except (EntryNotFoundError, HfHubHTTPError) as error:
        raise ModelError("model", f"'{name}' cannot be read from the Hub ({type(error).__name__}); try again") from None


def _not_cached(name: str, unreachable: Exception) -> ModelError:
    offline = isinstance(unreachable, OfflineModeIsEnabled)
    why = "offline mode is on" if offline else f"the Hub cannot be reached ({type(unreachable).__name__})"
    return ModelError("model", f"'{name}' is not in the local cache and {why}; run 'hf download {name}' while online")


def _check_files(name: str, files: Sequence[str]) -> None:
    name = printable(name)
    if "config.json" not in files:
        raise ModelError("model", f"'{name}' has no config.json; name a language model in Hugging Face format")
    if not any(file.endswith(".safetensors") for file in files):
        raise ModelError("model", f"'{name}' has no safetensors weights; see 'mlsae convert'")


def _read_config(source: _Source) -> Any:
    """The Hugging Face config of a causal language model, built from a file that was walked first."""
    name, found = printable(source.name), read_json(source.config)
    found = found if isinstance(found, dict) else {}
    values = _walked(found, name)
    model_type = str(values.pop("model_type", ""))
    if model_type not in CONFIG_MAPPING:
        if "auto_map" in found:
            raise ModelError("model", f"'{name}' needs code from its repository; not supported")
        raise ModelError("model", f"'{name}' is of type '{printable(model_type)}', unknown to transformers; {_KINDS}")
    if "auto_map" in found:  # transformers knows the architecture itself
        _log.warning("model: '%s' ships its own code, which is not used", name)
    try:
        config = CONFIG_MAPPING[model_type].from_dict(values)
    except (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
        raise ModelError("model", f"'{name}' has an unusable config.json ({printable(str(error))})") from error
    _check_causal(name, config)
    return config


def _walked(value: Any, name: str) -> Any:
    """A config without the keys that choose code; a key that could load code, at any depth, is refused."""
    if isinstance(value, list):
        return [_walked(item, name) for item in value]
    if not isinstance(value, dict):
        return value
    for key, item in value.items():
        attention = "attn_implementation" in key and (isinstance(item, dict) or item not in _ATTENTION)
        private = key.startswith("_") and item and key not in _INERT_KEYS
        if key in ("trust_remote_code", "quantization_config") or attention or private:
            raise ModelError("model", f"'{name}' has '{printable(key)}' in its config.json; not supported")
    chosen_by_us = ("auto_map", *(key for key in value if key.startswith("_") or "attn_implementation" in key))
    return {key: _walked(item, name) for key, item in value.items() if key not in chosen_by_us}


def _check_causal(name: str, config: Any) -> None:
    """The class that wrote the weights must be its type's causal class: BERT's type has one too, but few are of it."""
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    written_by = config.architectures or []
    if causal is None or config.is_encoder_decoder or (written_by and causal.__name__ not in written_by):
        raise _not_causal(name, str(written_by[0]) if written_by else type(config).__name__)


def _not_causal(name: str, kind: str) -> ModelError:
    return ModelError("model", f"'{printable(name)}' is {printable(kind)}, not a causal language model; {_KINDS}")


def _shape(name: str, config: Any) -> LMShape:
    text = config.get_text_config()
    n_layers, d_model = (getattr(text, key, None) for key in ("num_hidden_layers", "hidden_size"))
    if not (isinstance(n_layers, int) and isinstance(d_model, int) and n_layers > 0 and d_model > 0):
        raise ModelError("model", f"'{printable(name)}' does not say how many layers of what width it has; {_KINDS}")
    limit = getattr(text, "max_position_embeddings", None)  # none where positions are a bias on attention (BLOOM)
    return LMShape(name=name, n_layers=n_layers, d_model=d_model, context_length=limit or None)


def _default_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def _load_weights(source: _Source, config: Any, dtype: str | torch.dtype) -> Any:
    """The Hugging Face model, every weight of it from the file and every weight of the file in it."""
    name = printable(source.name)
    auto: Any = AutoModelForCausalLM  # its annotations know nothing of the loading info
    try:
        hf, info = auto.from_pretrained(
            source.name,
            config=config,
            revision=source.revision or "main",
            local_files_only=source.local_only,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError) or getattr(error, "errno", None):
            raise  # this machine's fault, not the model's
        raise ModelError("model", f"'{name}' cannot be loaded ({printable(str(error))[:300]})") from error
    for kind in ("missing", "unexpected", "mismatched"):
        if keys := sorted(map(str, info[f"{kind}_keys"])):
            raise ModelError("model", f"'{name}' has {len(keys)} {kind} weights, such as {printable(keys[0])}")
    return hf


def _load_tokenizer(source: _Source) -> Any:
    try:
        return AutoTokenizer.from_pretrained(
            source.name,
            revision=source.revision or "main",
            local_files_only=source.local_only,
            trust_remote_code=False,
        )
    except Exception as error:  # each tokenizer class fails in its own way
        problem = f"'{printable(source.name)}' has no usable tokenizer ({printable(str(error))[:300]})"
        raise ModelError("model", problem) from error
