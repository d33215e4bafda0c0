"""The one thread on which the explorer computes: a bounded queue, progress, cancelling, and what prompts activate, cached."""

import asyncio
import copy
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from mlsae.errors import ConfigError, MlsaeError, ModelError
from mlsae.explorer.answers import Refused
from mlsae.heldout import open_pair
from mlsae.lm import LanguageModel
from mlsae.metrics import Moments
from mlsae.reading import MAX_CONTEXT, read
from mlsae.sae import MLSAE, Code

MAX_WAITING = 16
"""Jobs that may wait beside the one that runs."""
MAX_TEXT_BYTES = 64 << 10
"""Of a prompt, as UTF-8."""
CACHE_BYTES = 64 << 20
"""Memory for what prompts activate."""


class Busy(Refused):
    """All places are taken: ask again."""

    def __init__(self):
        super().__init__(503, "queue", None, "as many requests are waiting as may; ask again soon")


class Cancelled(MlsaeError):
    """Whoever asked has left."""

    status = 499


Opened = Any
"""A `library.Library`, or what stands in for it: of it are read `sae`, `lm_name`, `examples`, `similarity`, `statistics`,
`missing`. Not a protocol: to check one at run time would ask for all of them, which reads files."""


@dataclass(frozen=True)
class PromptCode:
    """What a prompt activates at every layer and position, and how well that stands for the residual stream."""

    ids: list[int]
    """Its tokens."""
    strings: list[str]
    """The same as a person reads them."""
    visible: Bool[Tensor, " pos"]
    """Positions the SAE sees."""
    values: Float[Tensor, "layer pos k"]
    """Activations, the strongest of each vector first."""
    indices: Int[Tensor, "layer pos k"]
    """Their latents."""
    error: Float64[Tensor, "layer pos"]
    """|resid - recon|^2."""
    deviation: Float64[Tensor, " layer"]
    """sum |resid - mean|^2 over visible positions."""

    @property
    def n_bytes(self) -> int:
        """Memory it takes."""
        tensors = (self.visible, self.values, self.indices, self.error, self.deviation)
        return sum(x.numel() * x.element_size() for x in tensors) + sum(64 + len(x) for x in self.strings)

    @property
    def n_visible(self) -> int:
        """How many positions the SAE sees."""
        return int(self.visible.sum())

    def tokens(self) -> list[dict[str, Any]]:
        """Each token as the pages have it."""
        columns = zip(self.ids, self.strings, self.visible.tolist(), strict=True)
        return [{"id": i, "string": string, "visible": visible} for i, string, visible in columns]


def problem_of(text: str) -> str | None:
    """Why a text cannot be a prompt, as far as that shows before it is tokenized; None: it can."""
    if not text:
        return "empty; give at least one character"
    surrogate = next((i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
    if surrogate is not None:
        return f"has half of a surrogate pair at character {surrogate}; give valid Unicode"
    if (n_bytes := len(text.encode())) > MAX_TEXT_BYTES:
        return f"{n_bytes:,} bytes; at most {MAX_TEXT_BYTES:,} are read"
    return None


# ---- what a job has to work with -------------------------------------------------------------------------------------


class Shared:
    """The models and the cache, which live on the worker's thread."""

    def __init__(self, library: Opened, cache_bytes: int = CACHE_BYTES, settle: Callable[[], None] = lambda: None):
        self.library = library
        self._settle = settle
        self.lm_state = "absent"
        self._pair: tuple[MLSAE, MLSAE, LanguageModel] | None = None
        self._codes: OrderedDict[str, PromptCode] = OrderedDict()
        self._cache_bytes = cache_bytes

    def pair(self) -> tuple[MLSAE, LanguageModel]:
        """The SAE and its language model, loaded and checked on first need. Raises ModelError if there is none."""
        source = self.library.sae
        if source is None:
            raise ModelError("sae", "the run has saved none yet; wait until it has")
        if self._pair is None or self._pair[0] is not source:
            self._codes.clear()
            self._pair = (source, *self._opened(source))
        return self._pair[1:]

    def _opened(self, source: MLSAE) -> tuple[MLSAE, LanguageModel]:
        if (name := self.library.lm_name) is None:
            raise ModelError("lm", "the SAE does not say which language model it reads; start again with --lm")
        state, self.lm_state = self.lm_state, "loading"
        try:
            config = source.config
            revision = config.lm_revision if name == config.lm and not Path(name).is_dir() else None
            options = {"revision": revision, "separator_token": config.separator_token, **self.library.lm_options}
            lm = LanguageModel.from_pretrained(name, **options)
            # Pages read the library's own SAE from other threads, so that one stays where it is.
            sae = source if source.W_enc.device == lm.device else copy.deepcopy(source)
            found = open_pair(sae, lm)
            state = "ready"
            self._settle()
            return found
        finally:
            self.lm_state = state

    def cached(self, text: str) -> PromptCode | None:
        """What a prompt activated when it was last asked for."""
        if (known := self._codes.get(text)) is not None:
            self._codes.move_to_end(text)
        return known

    def keep(self, text: str, code: PromptCode) -> None:
        """Cache it, and drop what was not asked for longest until all fits; what alone is too large is not kept."""
        if code.n_bytes + 4 * len(text) > self._cache_bytes:
            return
        self._codes[text] = code
        while self.cache_bytes > self._cache_bytes:
            self._codes.popitem(last=False)

    @property
    def cache_bytes(self) -> int:
        """Memory that the cache takes."""
        return sum(code.n_bytes + 4 * len(text) for text, code in self._codes.items())


class Session:
    """One job's view of all that: every view takes it first. `step` says how far it is, and ends it if nobody waits."""

    def __init__(self, shared: Shared, what: str = ""):
        self._shared, self.what = shared, what
        self.done, self.of = 0, 0
        self.cancelled = False

    @property
    def library(self) -> Opened:
        """What there is to show."""
        return self._shared.library

    def expect(self, steps: int) -> None:
        """So many more steps are to come."""
        self.of += steps

    def step(self) -> None:
        """One step is done. Raises Cancelled if whoever asked has left."""
        if self.cancelled:
            raise Cancelled(self.what, "was given up")
        self.done += 1

    def sae(self) -> MLSAE:
        """The SAE, beside its language model, which is loaded."""
        return self._shared.pair()[0]

    def lm(self) -> LanguageModel:
        """The language model, loaded once and known to be the SAE's."""
        return self._shared.pair()[1]

    def check_latent(self, latent: int | None, field: str = "latent") -> None:
        """Refuse a latent that is not there, before any language model is loaded."""
        if latent is not None and (sae := self.library.sae) is not None and not 0 <= latent < sae.config.n_latents:
            raise ConfigError(field, f"{latent}; this SAE has latents 0 to {sae.config.n_latents - 1}")

    def tokens_of(self, text: str) -> Int[Tensor, "1 pos"]:
        """A prompt's token ids. Raises ConfigError if it is empty or too long."""
        if (problem := problem_of(text)) is not None:
            raise ConfigError("text", problem)
        lm = self.lm()
        tokens = lm.tokenize(text)
        if (n_tokens := tokens.shape[1]) > (limit := self.max_tokens()):
            raise ConfigError("text", f"{n_tokens} tokens; {Path(lm.name).name} is given at most {limit}; shorten it")
        return tokens

    def max_tokens(self) -> int:
        """Tokens of the longest sequence that the language model is given."""
        limit = self.lm().context_length
        return MAX_CONTEXT if limit is None or limit == 0 else min(limit, MAX_CONTEXT)

    def code_of(self, text: str) -> PromptCode:
        """What a prompt activates: one forward pass, or none if it was asked for a short while ago."""
        tokens, known = self.tokens_of(text), self._shared.cached(text)
        if known is None:
            known = self._read(tokens)
            self._shared.keep(text, known)
        return known

    def _read(self, tokens: Int[Tensor, "1 pos"]) -> PromptCode:
        lm, sae = self.lm(), self.sae()
        self.expect(1 + len(sae.layers))
        reading = read(lm, sae, tokens)
        self.step()
        resid, vectors = reading.resid[:, 0], reading.vectors
        moments = Moments(len(sae.layers), sae.config.d_model)
        moments.update(vectors)
        code = sae.encode(resid)
        error = torch.empty(resid.shape[:2], dtype=torch.float64)
        for row, x in enumerate(resid):  # a layer at a time: all at once would take the memory of the stream again
            error[row] = (x - sae.decode(at_row(code, row))[0]).double().square().sum(-1).cpu()
            self.step()
        values, order = code.values.sort(dim=-1, descending=True, stable=True)
        return PromptCode(
            ids=tokens[0].tolist(),
            strings=lm.tokenizer.strings(tokens[0].tolist()),
            visible=reading.visible[0].cpu(),
            values=values.cpu(),
            indices=code.indices.gather(-1, order).to(torch.int32).cpu(),
            error=error,
            deviation=moments.deviation,
        )


def at_row(code: Code, row: int) -> Code:
    """The code of one of its layers."""
    shift, scale = (x if len(x) == 1 else x[row : row + 1] for x in (code.shift, code.scale))
    part = slice(row, row + 1)
    return Code(code.values[part], code.indices[part], shift, scale, code.rows[part], code.n_latents)


# ---- the thread ------------------------------------------------------------------------------------------------------


class Worker:
    """Runs views one at a time, first come first served, off the event loop. Use it from one event loop.

    `settle` is called when the language model has been loaded.
    """

    def __init__(
        self,
        library: Opened,
        *,
        max_waiting: int = MAX_WAITING,
        cache_bytes: int = CACHE_BYTES,
        settle: Callable[[], None] = lambda: None,
    ):
        self._shared = Shared(library, cache_bytes, settle)
        threads = (max(1, torch.get_num_threads() - 1),)  # one core is left to the event loop
        self._pool = ThreadPoolExecutor(1, "mlsae-inference", torch.set_num_threads, threads)
        self._max_waiting = max_waiting
        self._turn = asyncio.Lock()  # hands over in the order of asking
        self._waiting = 0
        self._running: Session | None = None

    async def run(self, what: str, view: Callable[..., Any], *args: Any) -> Any:
        """What `view(session, *args)` returns or raises, once its turn has come.

        To cancel the task that waits here frees the place in the queue at once; a running view ends at its next step.
        Raises Busy if too many are waiting.
        """
        session = Session(self._shared, what)
        await self._take_turn()
        try:
            done = asyncio.wrap_future(self._pool.submit(_run, session, view, *args))
        except RuntimeError:  # closed
            self._turn.release()
            raise
        self._running = session
        done.add_done_callback(self._hand_over)
        try:
            return await asyncio.shield(done)
        finally:
            session.cancelled = True  # of one that is done, this says nothing

    def progress(self) -> dict[str, Any]:
        """How many wait, what runs and how far it is, and whether the language model is there: /progress.json."""
        session = self._running
        running = None if session is None else {"what": session.what, "done": session.done, "of": session.of}
        return {"queued": self._waiting, "running": running, "lm": self._shared.lm_state}

    def close(self) -> None:
        """Let the running view end at its next step, and the thread with it."""
        if self._running is not None:
            self._running.cancelled = True
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def is_full(self) -> bool:
        """Whether `run` would raise Busy."""
        return self._waiting >= self._max_waiting

    async def _take_turn(self) -> None:
        if self.is_full:
            raise Busy
        self._waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self._waiting -= 1

    def _hand_over(self, done: "asyncio.Future[Any]") -> None:
        if not done.cancelled():
            done.exception()  # whoever asked may have left without looking at it
        self._running = None
        self._turn.release()


@torch.no_grad()
def _run(session: Session, view: Callable[..., Any], *args: Any) -> Any:
    """What the view returns or raises, but that nothing ends the event loop that waits for it."""
    try:
        if session.cancelled:
            raise Cancelled(session.what, "was given up")
        return view(session, *args)
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, StopIteration | StopAsyncIteration):
            raise
        raise RuntimeError(f"{session.what} was ended by {type(error).__name__}") from error
