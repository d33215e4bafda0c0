"""A Hugging Face tokenizer under one policy for separators, special tokens and BOS: the one place where text becomes ids."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mlsae.errors import ConfigError, ModelError, printable

# Every tokenizer that differs in merges, pre-tokenizer, digits, white space or special tokens gives other ids for this.
_PROBE = (
    "When Mary and John went to the store, John gave a drink to\n\n  def f(x):\n\treturn x**2 + 1234567.89  # naïve café\n"
    "El niño comió 3 manzanas. Übergrößenträger; 日本語のテキスト, русский текст, العربية, 한국어 🙂👩‍👩‍👧\r\n"
    "DON'T won't they'll I'd; A_B-C/D\\E <|endoftext|> </s> <s> [CLS] https://example.org/?q=1&r=%20 ....!!??  \u00a0end"
    " Then the other three thought that although both brothers had gathered together, neither would whether the weather"
    " changed; which children, should they quickly question strange things, might judge, enough? Because every night light"
    " brings back what people work for: his first world, her great year, our own small school. Just before, somewhere under"
    " an opening, they moved along with clever jazz musicians, vexing fixed boxes, and zigzag quartz wizards; pack my box"
    " with five dozen liquor jugs. Information, communication, organisation and government of the international economy;"
    " he was not able to say it, as she had been there. UPPER lower CamelCase snake_case kebab-case 3.14159 1,000,000 0x1F"
    " <div class='a'>&amp;</div> {\"k\": [1, 2, null]} $x_1^2$ #tag @user 50% A&B (c) [d] 'e' ~ ` ^ | \\ / + = * _ - : ;"
)


class Tokenizer:
    """Text to token ids and back, the same way for training, evaluation, analysis and prompts.

    `separator_id` joins documents (the end-of-sequence token unless another is named); `bos_id` is the token that the
    tokenizer itself puts before a text, or None. Every packed sequence starts with `bos_id` where there is one.
    """

    def __init__(self, hf_tokenizer: Any, separator_token: str | None = None):
        self.hf = hf_tokenizer
        self._separator_token = separator_token

    @cached_property
    def separator_id(self) -> int:
        """Id of the token between documents. Raises ConfigError if the tokenizer has none and none was named."""
        if self._separator_token is not None:
            found = self.hf.convert_tokens_to_ids(self._separator_token)
            if found is None or self.hf.convert_ids_to_tokens(found) != self._separator_token:
                raise ConfigError("separator_token", f"'{self._separator_token}' is no token of this tokenizer")
            return int(found)
        if self.hf.eos_token_id is None:
            raise ConfigError("separator_token", "this tokenizer has no end-of-sequence token; set --separator-token")
        return int(self.hf.eos_token_id)

    @cached_property
    def bos_id(self) -> int | None:
        """The token that the tokenizer puts before every text, or None."""
        first = self._ids("a")[:1]
        return int(first[0]) if first and first[0] == self.hf.bos_token_id else None

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """BOS, EOS, padding and the separator: the positions that masking leaves out."""
        named = (self.hf.bos_token_id, self.hf.eos_token_id, self.hf.pad_token_id)
        ids = {int(i) for i in named if i is not None}
        return frozenset(ids if self._separator_token is None else ids | {self.separator_id})

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the ids of a fixed text and of the special ids: tells tokenizers of the same size apart."""
        ids = self._ids(_PROBE, add_special_tokens=False)
        return hashlib.sha256(repr((ids, sorted(self.special_ids), self.bos_id)).encode()).hexdigest()

    def documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each document, without BOS, EOS or truncation."""
        return self._ids(list(texts), add_special_tokens=False) if texts else []

    def prompts(self, texts: str | Sequence[str]) -> Int[Tensor, "batch pos"]:
        """Token ids as the tokenizer itself would send them to its model, padded on the right with a special token."""
        rows = [self._ids(text) for text in ([texts] if isinstance(texts, str) else texts)]
        if not rows or not all(rows):
            raise ConfigError("text", "empty; give at least one character")
        width = max(map(len, rows))
        return torch.tensor([row + [self._padding_id] * (width - len(row)) for row in rows])

    def strings(self, ids: Sequence[int]) -> list[str]:
        """Each token as a person reads it, with the space it may begin with, control characters escaped."""
        return [printable(self._in_a_text(i)) for i in ids]

    def _in_a_text(self, token: int) -> str:
        """What a token adds to a text: at the beginning of one, some tokenizers leave its space out."""
        before = self._letter
        after = self.hf.decode([*before, token])
        start = self.hf.decode(before)
        return after.removeprefix(start) if start and after.startswith(start) else self.hf.decode([token])

    @cached_property
    def _letter(self) -> list[int]:
        """Tokens of a text to which others may be added; none of a tokenizer that does not know the letter."""
        return [i for i in self._ids("a", add_special_tokens=False) if i != self.hf.unk_token_id]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token as the vocabulary writes it."""
        return list(self.hf.convert_ids_to_tokens(list(ids)))

    def text(self, ids: Sequence[int]) -> str:
        """The text that these tokens are, as it is: not for a terminal."""
        return self.hf.decode(list(ids))

    def _ids(self, text: str | list[str], **options: Any) -> Any:
        try:
            return self.hf(text, verbose=False, **options).input_ids
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # how Rust fails: no Exception, and of no module to import
                raise
            raise ModelError("model", f"its tokenizer failed on a text ({printable(str(error))[:200]})") from error

    @property
    def _padding_id(self) -> int:
        return self.separator_id if self.hf.pad_token_id is None else int(self.hf.pad_token_id)
