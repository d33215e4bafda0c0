"""The work that contenders share: residual vectors with structure, and a language model of Pythia-70m's shape. All of it seeded.

Only torch is needed here, and transformers for the language model: it runs in every contender's environment.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

N_BATCHES = 2
"""Batches of vectors or tokens that the steps of one contender go through in turn."""
QUIET = 10**9
"""A count of tokens, or of steps, that every library takes for dead."""


@dataclass(frozen=True)
class StepWork:
    """One training step on given vectors."""

    n_layers: int = 6
    n_tokens: int = 2048
    """Of each layer."""
    d_model: int = 512
    n_latents: int = 8192
    k: int = 32
    k_aux: int = 256
    dead: float = 0.0
    """Share of the latents that are dead, so that AuxK runs on them."""

    @property
    def n_vectors(self) -> int:
        """Over all layers."""
        return self.n_layers * self.n_tokens

    def __str__(self) -> str:
        dead = f"{self.dead:.0%} dead" if self.dead else "none dead"
        return (
            f"{self.n_layers} layers x {self.n_tokens:,} tokens = {self.n_vectors:,} vectors, d_model {self.d_model}, "
            f"n_latents {self.n_latents:,}, k {self.k}, {dead}"
        )


@dataclass(frozen=True)
class TextWork:
    """Sequences of tokens for a language model, and an SAE for its residual stream."""

    batch: int = 1
    context: int = 2048
    accumulation: int = 1
    """Forward passes in one optimizer step."""
    n_latents: int = 8192
    k: int = 32
    k_aux: int = 256
    lm: str | None = None
    """Folder of a real language model; None: random weights in the shape of Pythia-70m."""
    n_layers: int = 6
    """Of the random one."""
    d_vocab: int = 50304

    @property
    def n_tokens(self) -> int:
        """In one step."""
        return self.batch * self.context * self.accumulation

    def __str__(self) -> str:
        lm = self.lm or f"GPT-NeoX of {self.n_layers} layers, d_model 512, random weights"
        passes = f"{self.accumulation} x " if self.accumulation > 1 else ""
        return f"{lm}; {passes}{self.batch} x {self.context:,} tokens a step"


def residuals(work: StepWork) -> list[Any]:
    """Batches `[layer, token, d_model]` that stand in for a residual stream.

    Sixteen of 2,048 shared directions with exponential amplitudes, common ones more often, a mean per layer and dense noise,
    all growing with depth.
    """
    import torch

    atoms = torch.nn.functional.normalize(torch.randn(2048, work.d_model, generator=_generator(1234)))
    popularity = torch.arange(1, 2049).float().rsqrt()
    batches = []
    for number in range(N_BATCHES):
        means, draws = _generator(4321), _generator(number)
        batch = torch.empty(work.n_layers, work.n_tokens, work.d_model)
        for layer in range(work.n_layers):
            mean = torch.randn(work.d_model, generator=means)
            ids = torch.multinomial(popularity.expand(work.n_tokens, -1), 16, generator=draws)
            amplitudes = torch.empty(work.n_tokens, 16).exponential_(generator=draws) * 6
            signal = torch.nn.functional.embedding_bag(ids, atoms, per_sample_weights=amplitudes, mode="sum")
            noise = 0.3 * torch.randn(work.n_tokens, work.d_model, generator=draws)
            batch[layer] = (1 + 0.3 * layer) * (signal + mean + noise)
        batches.append(batch)
    return batches


def dead_ids(work: StepWork) -> Any:
    """The latents that are dead."""
    import torch

    order = torch.randperm(work.n_latents, generator=_generator(7))
    return order[: int(work.n_latents * work.dead)].sort().values


def kill(encoder: Any, dead: Any, dim: int = 0) -> None:
    """Make latents too weak ever to be among the k largest; `dim` is the encoder's axis of latents."""
    import torch

    with torch.no_grad():
        encoder.index_copy_(dim, dead, encoder.index_select(dim, dead) * 0.02)


def tokens(work: TextWork, d_vocab: int) -> list[Any]:
    """Batches `[batch, pos]` of token ids, common ones more often, none of them special."""
    import torch

    popularity = 1 / torch.arange(10, d_vocab).float()
    shape = N_BATCHES, work.batch * work.context
    ids = 10 + torch.multinomial(popularity.expand(N_BATCHES, -1), shape[1], replacement=True, generator=_generator(0))
    return list(ids.view(N_BATCHES, work.batch, work.context))


def neox(work: TextWork) -> Any:
    """A Hugging Face GPT-NeoX of Pythia-70m's shape whose weights depend on their names alone, not on the version."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        hidden_size=512,
        num_hidden_layers=work.n_layers,
        num_attention_heads=8,
        intermediate_size=2048,
        vocab_size=work.d_vocab,
        rotary_pct=0.25,
        max_position_embeddings=2048,
        use_parallel_residual=True,
    )
    lm = GPTNeoXForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in lm.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.02, generator=_generator(zlib.crc32(name.encode())))
    return lm


def word_tokenizer(d_vocab: int) -> Any:
    """A tokenizer with as many words as the language model has tokens, the first of them special."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<|endoftext|>": 0, **{f"w{i}": i for i in range(1, d_vocab)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def save_neox(work: TextWork, folder: Path) -> str:
    """Write the language model and its tokenizer where a library can load them from; returns the folder's name."""
    neox(work).save_pretrained(folder)
    word_tokenizer(work.d_vocab).save_pretrained(folder)
    return str(folder)


def _generator(seed: int) -> Any:
    import torch

    return torch.Generator().manual_seed(seed)
