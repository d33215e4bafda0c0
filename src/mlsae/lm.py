"""Any Hugging Face causal language model: the residual stream after every block, and passes with blocks replaced.

One mechanism does all of it: edits that stand in for decoder blocks during one pass (blocks.py).
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from mlsae import devices, files, hub
from mlsae.blocks import Block, Edit, check_shape, keep_in, pass_through, replace_by, watch
from mlsae.config import LMShape, check_layers
from mlsae.errors import ConfigError, DataError, ModelError, printable
from mlsae.tokens import Tokenizer


class LanguageModel:
    """A frozen causal language model read and edited at the output of its blocks, layer 0 being the first block's.

    The Hugging Face model is put into eval mode and its parameters no longer ask for gradients.
    """

    def __init__(
        self,
        hf_model: Any,
        tokenizer: Any,
        *,
        name: str | None = None,
        revision: str | None = None,
        device: torch.device | None = None,
    ):
        """Wrap Hugging Face objects, or our Tokenizer. Raises ModelError if the model fails its self-check.

        Args:
            device: where tokens are taken and tensors given, if the model's weights are elsewhere or in several places.
        """
        self.hf = hf_model.eval().requires_grad_(False)
        self.tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer(tokenizer)
        self.spread = getattr(hf_model, "hf_device_map", None) is not None
        """Whether its blocks are in several places, or read from the disk as they are needed."""
        self._device = device
        self.name = name or hf_model.name_or_path or type(hf_model).__name__
        self.revision = revision or getattr(hf_model.config, "_commit_hash", None)
        self.shape = hub.shape_of(self.name, hf_model.config)
        self.n_layers, self.d_model = self.shape.n_layers, self.shape.d_model
        self.context_length = self.shape.context_length
        self.d_vocab = int(hf_model.config.get_text_config().vocab_size)
        self._blocks = [Block(module) for module in self._find_blocks()]
        self._goes_on: bool | None = None
        self._can_keep = "logits_to_keep" in inspect.signature(hf_model.forward).parameters
        self._check_itself()

    @classmethod
    def from_pretrained(
        cls,
        id_or_dir: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        device_map: str | Mapping[str, str | int] | None = None,
        revision: str | None = None,
        separator_token: str | None = None,
    ) -> "LanguageModel":
        """Load from the Hub or a folder, never running code from either and never reading a pickle.

        Args:
            device: None is the first accelerator, else the CPU.
            dtype: None is bfloat16 on a CUDA device that has it, else float32.
            device_map: where the model's modules go, as `devices.lm_placement` takes it; None: all to `device`, where
                tensors that the model gives are in any case.
            separator_token: the token between documents; None is the tokenizer's end of sequence.

        Raises:
            ConfigError: a device that is not here.
            ModelError: the model is missing, unreachable, damaged or unsupported.
        """
        device = device if isinstance(device, torch.device) else devices.choose_device(device)
        placement = devices.lm_placement(device_map, device)
        dtype = dtype if isinstance(dtype, torch.dtype) else devices.lm_dtype(dtype, devices.lm_device(placement))
        source = hub.locate(str(id_or_dir), revision, weights=True)
        config = hub.read_config(source)
        hub.shape_of(source.name, config)
        tokenizer = Tokenizer(hub.load_tokenizer(source, config), separator_token)
        one = isinstance(placement, torch.device)
        hf = hub.load_weights(source, config, dtype, None if one else placement)
        hf = hf.to(placement) if one else hf
        home = torch.empty(0, device=device).device  # cuda is cuda:0
        return cls(hf, tokenizer, name=source.name, revision=source.revision, device=home)

    @property
    def device(self) -> torch.device:
        """Where tokens are taken and the tensors it returns are: where the model is, unless it was put elsewhere."""
        return self.hf.device if self._device is None else self._device

    @property
    def embedding(self) -> Float[Tensor, "{self.d_vocab} d_embed"]:
        """Row of each token at the model's input; d_embed is d_model but for a few models that project it."""
        return self._weight(self.hf.get_input_embeddings()).to(self.device)

    @property
    def unembedding(self) -> Float[Tensor, "{self.d_vocab} d_embed"]:
        """Row of each token at the model's output: the same tensor as `embedding` where the two are tied."""
        return self._weight(self.hf.get_output_embeddings()).to(self.device)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter once, with its name, wherever it is; those on the disk are read one at a time."""
        tied = getattr(self.hf, "all_tied_weights_keys", None) or {}
        for name, weight in self.hf.named_parameters():
            if not (self.spread and name in tied):
                owner, _, last = name.rpartition(".")
                yield name, self._weight(self.hf.get_submodule(owner), last) if weight.is_meta else weight

    def _weight(self, module: nn.Module, name: str = "weight") -> Tensor:
        """A parameter, read from where accelerate keeps it, if that is where it is."""
        if not getattr(module, name).is_meta:
            return getattr(module, name)
        from accelerate.utils import align_module_device

        with align_module_device(module):
            return getattr(module, name).detach()

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
        edits: dict[int, Edit] = dict.fromkeys(range(max(wanted) + 1, self.n_layers), pass_through)
        self._run(self.hf.base_model, tokens, edits | {layer: keep_in(row) for layer, row in zip(wanted, out)})
        return out

    def logits(
        self,
        tokens: Int[Tensor, "batch pos"],
        replace: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
        *,
        last: int | None = None,
        past: Any = None,
    ) -> Float[Tensor, "batch shown {self.d_vocab}"]:
        """Logits in the model's dtype, with the output of each layer in `replace` replaced as it flows by.

        Each function receives its layer's output, which earlier replacements have already changed, as float32
        [batch, pos, d_model], and returns its replacement. No grad.

        Args:
            last: only those of so many last positions; others are not even computed, where the model can leave them out.
            past: what `begin` gave: `tokens` follow those of the passes before, which are not computed again, and are
                remembered with them. Equal to the pass over all of them to rounding.
        """
        if replace:
            check_layers(tuple(replace), self.shape)
        if last is not None and not 1 <= last <= tokens.shape[1]:
            raise ConfigError("last", f"{last}; give 1 to {tokens.shape[1]}, the positions that there are")
        edits = {layer: replace_by(fn, layer, self.device) for layer, fn in (replace or {}).items()}
        keep = {"logits_to_keep": last} if last is not None and self._can_keep else {}
        logits = self._logits(tokens, edits, past=past, **keep)
        return logits if last is None else logits[:, -last:]

    def begin(self) -> Any:
        """Keys and values of no tokens yet, for `logits` to go on from; None if this model cannot, or not to the same logits."""
        if self._goes_on is None:
            self._goes_on = self._check_past()
        return DynamicCache(config=self.hf.config) if self._goes_on else None

    def run_from(
        self, resid: Float[Tensor, "batch pos {self.d_model}"], layer: int, tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos {self.d_vocab}"]:
        """Logits of the pass in which block `layer` puts out `resid`; blocks up to it are not computed. No grad."""
        check_layers((layer,), self.shape)
        check_shape(resid, (*tokens.shape, self.d_model), layer)
        edits: dict[int, Edit] = dict.fromkeys(range(layer), pass_through)
        return self._logits(tokens, edits | {layer: lambda run, flowing: resid.to(flowing)})

    def unembed(self, resid: Float[Tensor, "batch pos {self.d_model}"]) -> Float[Tensor, "batch pos {self.d_vocab}"]:
        """Logits that the final norm and the unembedding make of the last block's output; differentiable in `resid`.

        Nothing else reaches them, so any vector can be read so: at an earlier layer this is the logit lens.
        """
        tokens = torch.zeros(resid.shape[:2], dtype=torch.int64, device=self.device)
        edits: dict[int, Edit] = dict.fromkeys(range(self.n_layers), pass_through)
        edits[self.n_layers - 1] = lambda run, flowing: resid.to(flowing)
        return self._pass(self.hf, tokens, edits).logits.to(self.device)

    @torch.no_grad()
    def logits_along(self, directions: Float[Tensor, "row {self.d_model}"]) -> Float[Tensor, "row {self.d_vocab}"]:
        """Logits of a residual vector that lies wholly along each direction, less those of the zero vector; float32.

        A direction has no length, and the final norm would remove it: each is read at root mean square 1. Through the
        norm that leaves its gain (and centring, where it centres); its bias and the unembedding's cancel.
        """
        unit = nn.functional.normalize(directions.to(self.device).float(), dim=-1) * self.d_model**0.5
        return (self.unembed(unit[:, None]).float() - self.unembed(torch.zeros_like(unit[:1, None])).float())[:, 0]

    @torch.no_grad()  # not inference_mode, whose tensors an SAE could not be trained on
    def _run(self, module: Any, tokens: Tensor, edits: Mapping[int, Edit], **more: Any) -> Any:
        """`_pass`, without gradient."""
        return self._pass(module, tokens, edits, **more)

    def _logits(self, tokens: Tensor, edits: Mapping[int, Edit], **more: Any) -> Tensor:
        """Those of `_run`, from wherever the head is."""
        return self._run(self.hf, tokens, edits, **more).logits.to(self.device)

    def save_random_twin(self, folder: str | Path, seed: int = 0) -> None:
        """Write a model of the same architecture and tokenizer whose weights were never trained: a null for any finding.

        It is a folder like any other: name it as the language model. Raises ResourceError if it cannot be written.
        """
        with torch.random.fork_rng(), torch.device("cpu"):
            torch.manual_seed(seed)
            twin = type(self.hf)(self.hf.config)
        with files.staged_directory(Path(folder)) as staged:
            twin.save_pretrained(staged)
            self.tokenizer.hf.save_pretrained(staged)

    def _pass(self, module: Any, tokens: Tensor, edits: Mapping[int, Edit], *, past: Any = None, **more: Any) -> Any:
        """One pass of the whole model, or of what lies below its unembedding, with `edits` standing in for blocks.

        There is never an attention mask. Padding is on the right, where no earlier position sees it, so prompts take
        the path of packed text, and models that count positions from the mask count as from a mask of ones.
        """
        n_pos = tokens.shape[1] + (0 if past is None else past.get_seq_length())
        if self.context_length and n_pos > self.context_length:
            raise DataError("tokens", f"{n_pos} in a sequence; {self.name} takes at most {self.context_length}")
        with contextlib.ExitStack() as stack:
            for layer, edit in edits.items():
                stack.enter_context(self._blocks[layer].edited(edit))
            more |= {} if past is None else {"past_key_values": past}
            return module(input_ids=tokens.to(self.device), use_cache=past is not None, **more)

    def _find_blocks(self) -> nn.ModuleList:
        """The list of decoder blocks: outermost ModuleList of the decoder with one module per layer."""
        if self.hf.config.is_encoder_decoder or self.hf.get_output_embeddings() is None:
            raise hub.not_causal(self.name, type(self.hf).__name__)
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
        clean = self._logits(tokens, {i: watch(i, inputs, outputs) for i in range(self.n_layers)})
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
        with torch.no_grad():
            self._check_equal(self.unembed(resid[-1]), clean, "unembeds its last layer with the help of the tokens")

    def _check_past(self) -> bool:
        """Whether a pass in three parts, each going on from the one before, gives the logits of the whole."""
        tokens = (torch.arange(6, device=self.device)[None] * 5 + 2) % self.d_vocab
        whole, past = self.logits(tokens), DynamicCache(config=self.hf.config)
        try:
            parts = [self.logits(part, past=past) for part in tokens.split([3, 1, 2], 1)]
            self._check_equal(torch.cat(parts, 1), whole, "forgets")
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError, ModelError):
            return False
        return True

    def _check_equal(self, got: Tensor, want: Tensor, complaint: str, *, exactly: bool = False) -> None:
        if torch.equal(got, want):
            return
        difference = ((got - want).abs().max() / want.abs().max()).item()
        # Sums of a mixture of experts come in any order on an accelerator, so bits are promised on the CPU only.
        tolerance = 0 if exactly and self._on_cpu() else max(1e-4, 4 * torch.finfo(want.dtype).eps)
        if not difference <= tolerance:  # NaN fails too
            raise self._unfit(f"{complaint} (relative difference {difference:.1e})")

    def _on_cpu(self) -> bool:
        """Whether all is computed there."""
        placed = {str(where) for where in getattr(self.hf, "hf_device_map", {}).values()}
        return self.device.type == "cpu" and self.hf.device.type in ("cpu", "meta") and placed <= {"cpu", "disk"}

    def _unfit(self, complaint: str) -> ModelError:
        return ModelError("model", f"'{printable(self.name)}' ({type(self.hf).__name__}) {complaint}; {hub.SUPPORTED}")


def read_shape(id_or_dir: str | Path, revision: str | None = None) -> LMShape:
    """Layers, width and context length from the config alone, of a Hub id one small file; no weights are read.

    Raises:
        ModelError: the model is missing, unreachable or unsupported, as far as its config and its list of files tell.
    """
    source = hub.locate(str(id_or_dir), revision, weights=False)
    return hub.shape_of(source.name, hub.read_config(source))
