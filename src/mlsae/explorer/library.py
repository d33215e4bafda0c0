"""What there is to show of a run, an SAE folder or a repository: read when asked for, again when it changed, never trusted.

A file that is absent, damaged or of another SAE leaves a sentence in `Library.missing`, and the pages show what is left.
"""

import contextlib
import os
import shlex
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from mlsae import formats, untrusted
from mlsae.analysis.example_file import read_about
from mlsae.analysis.example_rows import About
from mlsae.config import MLSAEConfig
from mlsae.errors import ConfigError, DataError, MlsaeError, ModelError
from mlsae.explorer.kept import Kept, named, signature
from mlsae.explorer.notes import Notes
from mlsae.explorer.statistics import Statistics, check_intervals
from mlsae.explorer.table import Peaks, Table
from mlsae.explorer.training import Training
from mlsae.sae import MLSAE
from mlsae.tokens import Tokenizer

PAUSE_SECONDS = 30.0
"""Before a tokenizer that could not be had is asked for again."""


class Library:
    """Everything the explorer shows that is on the disk. Safe to use from several threads at once.

    `open` one. What may be absent is None, and `missing` says why. Nothing here loads a language model.
    """

    def __init__(
        self,
        source: str,
        place: Path,
        run: Path | None,
        analysis: Path | None,
        lm: str | None,
        sae: MLSAE | None = None,
    ):
        self.source, self.run, self.analysis_folder = source, run, analysis
        self._place, self._lm, self._sae = place, lm, sae
        self.lm_options: dict[str, Any] = {}
        """Where the language model goes, and in which precision: `Placement.lm_options`."""
        self._sae_seen: object = None
        self._sae_problem: MlsaeError | None = None
        self._sae_lock = threading.Lock()
        self._lock = threading.RLock()
        self._tokenizer: tuple[float, Tokenizer | ModelError] | None = None
        self._strings: dict[int, str] = {}
        own = [place / "config.json", place / "model.safetensors"]
        self._config = Kept(own, self._read_config)
        self.training = Training(run)
        beside = place if run is None else run
        places = [folder for folder in (run, analysis, place) if folder is not None and folder.is_dir()]
        self.notes = Notes(places[0] if places else None)
        self._evaluation = Kept([beside / "evaluation.json"], lambda: _mapping(beside / "evaluation.json"))
        at = beside / "analysis" if analysis is None else analysis
        self._at = at
        whole = [at / "summary.json"]  # written last
        self._summary = Kept(whole, self._read_summary, own)
        self._similarity = Kept([at / "similarity.json", *whole], lambda: _mapping(at / "similarity.json"))
        self._statistics = Kept([at / "layers.safetensors", *whole], self._read_statistics, own)
        self._intervals = Kept([at / "profile.safetensors", *whole], self._read_intervals, own)
        self._table = Kept([at / "latents.parquet", at / "layers.safetensors", *whole], self._read_table, own)
        self._about = Kept([at / "examples.parquet", *whole], self._read_about, own)
        self._peaks = Kept([at / "examples.parquet", *whole], self._read_peaks)

    @classmethod
    def open(cls, source: str | Path, *, analysis: Path | None = None, lm: str | None = None) -> "Library":
        """What is in a run directory (a run that goes on included), an SAE folder of any format, or a repository on the Hub.

        Args:
            analysis: folder that `mlsae analyze` wrote; None: `analysis` in the run or folder.
            lm: the language model, where the SAE's files do not say; None: what they say.

        Raises ModelError if there is no SAE, and no run that will have one.
        """
        folder = Path(source)
        if not os.path.isdir(folder) or not (_is_run(folder) or formats.own.recognises(folder)):
            sae = MLSAE.from_pretrained(source, lm=lm).eval().requires_grad_(False)
            return cls(str(source), folder, None, analysis, lm, sae)
        if _is_run(folder):
            return cls(str(source), folder / "sae", folder, analysis, lm)
        run = folder.parent if folder.name == "sae" and _is_run(folder.parent) else None
        return cls(str(source), folder, run, analysis, lm)

    # ---- the SAE and its language model ----------------------------------------------------------------------------

    @property
    def config(self) -> MLSAEConfig | None:
        """The SAE's shape and conventions; its weights are not read for them."""
        return self._sae.config if self._sae is not None else self._config.get()

    @property
    def sae(self) -> MLSAE | None:
        """The SAE, read when first asked for and kept as it was then; None while a run has none yet.

        Raises ModelError if its files are damaged.
        """
        with self._sae_lock:
            seen = signature(self._place / "model.safetensors")
            if self._sae is None and self.config is not None and seen != self._sae_seen:
                self._sae_seen, self._sae_problem = seen, None
                try:
                    self._sae = MLSAE.from_pretrained(self._place).eval().requires_grad_(False)
                except MlsaeError as error:
                    self._sae_problem = error
            if self._sae is None and self._sae_problem is not None:
                raise self._sae_problem
            return self._sae

    @property
    def name(self) -> str:
        """What to call it: the last part of where it is."""
        folder = self.run if self.run is not None else Path(self.source)
        return folder.resolve().name if folder.exists() else self.source

    @property
    def lm_name(self) -> str | None:
        """The language model: as given, else as the SAE says, else as the run's config does."""
        if self._lm is not None:
            return self._lm
        named = None if self.config is None else self.config.lm
        trained_on = self.training.config.get("lm")
        return named if named is not None or not isinstance(trained_on, str) else trained_on

    @property
    def layers(self) -> tuple[int, ...]:
        """The language model's layers that the SAE reads, in the order of every layer axis."""
        return () if self.config is None or self.config.layers is None else self.config.layers

    @property
    def n_latents(self) -> int:
        """Size of the dictionary, 0 while there is none."""
        return 0 if self.config is None else self.config.n_latents

    def load_tokenizer(self) -> Tokenizer:
        """The language model's tokenizer, and no more of it. May take seconds: not for the event loop.

        Raises ModelError if it is not to be had, or is not the one that the SAE was trained with.
        """
        with self._lock:
            found = self._tokenizer
            if found is None or (isinstance(found[1], ModelError) and time.monotonic() - found[0] > PAUSE_SECONDS):
                try:
                    found = time.monotonic(), self._read_tokenizer()
                except ModelError as error:
                    found = time.monotonic(), error
                self._tokenizer = found
        if isinstance(found[1], ModelError):
            raise found[1]
        return found[1]

    def strings(self, ids: Sequence[int]) -> list[str]:
        """Each token as a person reads it, `#id` where there is no tokenizer."""
        try:
            tokenizer = self.load_tokenizer()
        except ModelError:
            return [f"#{i}" for i in ids]
        n_tokens = len(tokenizer.hf)
        new = [i for i in ids if i not in self._strings and 0 <= i < n_tokens]
        self._strings.update(zip(new, tokenizer.strings(new), strict=True))
        return [self._strings.get(i, f"#{i}") for i in ids]

    # ---- evaluation and analysis -----------------------------------------------------------------------------------

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """evaluation.json."""
        return self._evaluation.get()

    @property
    def summary(self) -> dict[str, Any] | None:
        """summary.json of an analysis of this SAE."""
        return self._summary.get()

    @property
    def similarity(self) -> dict[str, Any] | None:
        """similarity.json."""
        return None if self.summary is None else self._similarity.get()

    @property
    def statistics(self) -> Statistics | None:
        """Where and how often every latent is active."""
        return None if self.summary is None else self._statistics.get()

    @property
    def table(self) -> Table | None:
        """A row for every latent."""
        return None if self.summary is None else self._table.get()

    @property
    def analysis(self) -> Path | None:
        """The folder of the analysis, if there is a whole one of this SAE."""
        return None if self.summary is None else self._at

    @property
    def examples(self) -> Path | None:
        """The file of examples, for `read_examples`, if there is one of this SAE."""
        return None if self.summary is None or self._about.get() is None else self._at / "examples.parquet"

    @property
    def intervals(self) -> Path | None:
        """The file of the intervals of P(layer | latent), if there is one of this SAE."""
        return None if self.summary is None else self._intervals.get()

    def peaks(self) -> Peaks | None:
        """On which tokens every latent is most active. Reads all examples once: not for the event loop."""
        return None if self.examples is None else self._peaks.get()

    def needed_statistics(self) -> Statistics:
        """`statistics`, or a DataError that says how to get them."""
        if (found := self.statistics) is None:
            raise DataError("analysis", f"there is none to show; run {self._analyze()}")
        return found

    def needed_sae(self) -> MLSAE:
        """`sae`, or a ModelError while a run has none yet."""
        if (found := self.sae) is None:
            raise _no_sae()
        return found

    def checked_latent(self, latent: int) -> int:
        """An id that there is. Raises ConfigError otherwise, ModelError without any."""
        if not self.n_latents:
            raise _no_sae()
        if not 0 <= latent < self.n_latents:
            raise ConfigError("latent", f"{latent} is none of this SAE's; give 0 to {self.n_latents - 1}")
        return latent

    def warm(self) -> None:
        """Read now what the first pages will ask for: for a thread at the start."""
        if (found := self.statistics) is not None:
            found.ordered  # noqa: B018 - kept from now on
        self.missing()
        with contextlib.suppress(MlsaeError):  # whoever needs it is told
            self.sae  # noqa: B018 - kept from now on

    # ---- what is not there -----------------------------------------------------------------------------------------

    def missing(self, *names: str) -> list[dict[str, str | None]]:
        """What is absent or unreadable among `names` (none: all): `{"what", "why", "command"}`, a command to mend it or None.

        sae, evaluation, analysis, table, words, intervals, examples, tokenizer, notes. The tokenizer only once it was asked for.
        """
        found = [item for item in self._all_missing() if item is not None]
        return [
            dict(zip(("what", "why", "command"), item, strict=True)) for item in found if not names or item[0] in names
        ]

    def _all_missing(self) -> Iterable[tuple[str, str, str | None] | None]:
        yield self._missing_sae()
        if (problem := self.notes.problem) is not None:
            yield "notes", f"Notes cannot be shown or saved: {problem}", None
        if self.evaluation is None:
            why = self._evaluation.problem or "How good the SAE is, layer by layer, was not measured yet."
            yield "evaluation", why, self._command("evaluate")
        if self.summary is None:
            why = self._summary.problem or "Where in depth the latents are active was not measured yet."
            yield "analysis", why, self._analyze()
            return
        for kept, what in ((self._statistics, "analysis"), (self._similarity, "similarity")):
            if kept.get() is None:
                yield what, kept.problem or "The analysis is not whole.", self._analyze()
        table = self.table
        if table is None:
            yield "table", self._table.problem or "The analysis has no latents.parquet.", self._analyze()
        elif table.promoted is None:
            yield "words", table.problem or "Decoder rows were not compared with the LM's tokens.", self._analyze()
        if self.intervals is None:
            why = self._intervals.problem or "There are too few documents, or the analysis is an older one."
            yield "intervals", f"No intervals of profiles: {why}", self._analyze()
        if self.examples is None:
            yield "examples", self._about.problem or "No contexts were kept of this analysis.", self._analyze()
        yield self._missing_tokenizer()

    def _missing_sae(self) -> tuple[str, str, str | None] | None:
        if self.config is None:
            going = self.training.is_running()
            why = self._config.problem or "This run has not saved its SAE yet."
            return "sae", why, None if going else self.training.resume_command()
        if self._sae is None and self._sae_problem is not None:
            return "sae", f"{named(self._sae_problem)}: {self._sae_problem.problem}", None
        if self._sae_seen is not None and signature(self._place / "model.safetensors") != self._sae_seen:
            return "sae", "It was saved anew since it was read; start again to see that.", self._command("explore")
        return None

    def _missing_tokenizer(self) -> tuple[str, str, str | None] | None:
        if self._tokenizer is None or not isinstance(self._tokenizer[1], ModelError):
            return None
        again = None if self.lm_name else f"{self._command('explore')} --lm LM"
        return "tokenizer", f"Tokens are shown as numbers: {self._tokenizer[1].problem}", again

    def _command(self, name: str) -> str:
        return f"mlsae {name} {shlex.quote(self.source)}"

    def _analyze(self) -> str:
        if self.run is not None and self.analysis_folder is None:
            return self._command("analyze")
        out = "DIR" if self.analysis_folder is None else shlex.quote(str(self.analysis_folder))
        return f"{self._command('analyze')} --out {out}"

    # ---- reading ---------------------------------------------------------------------------------------------------

    def _read_config(self) -> MLSAEConfig:
        values = _mapping(self._place / "config.json")
        return MLSAEConfig(**values)

    def _read_tokenizer(self) -> Tokenizer:
        from mlsae import hub  # transformers: seconds
        from mlsae.downloads import fetch

        if self.lm_name is None:
            raise ModelError("lm", "the SAE does not say what language model it reads; give --lm")
        revision = self.config.lm_revision if self.config is not None and self._lm is None else None
        separator = None if self.config is None else self.config.separator_token
        here = Path(self.lm_name).expanduser().is_dir()
        source = hub.locate(self.lm_name, None if here else revision, weights=False)
        if source.revision is not None:
            patterns = [pattern for pattern in hub.FILES if "safetensors" not in pattern]
            folder = fetch("model", self.lm_name, revision, patterns, needed=("config.json",))
            source = hub.Source(source.name, folder, source.revision)
        found = Tokenizer(hub.load_tokenizer(source, hub.read_config(source)), separator)
        wanted = None if self.config is None else self.config.tokenizer_fingerprint
        if wanted is not None and found.fingerprint != wanted:
            raise ModelError("lm", f"{self.lm_name} has another tokenizer than the SAE was trained with")
        return found

    def _read_summary(self) -> dict[str, Any]:
        found = _mapping(self._at / "summary.json")
        if self.config is not None and found.get("layers") != list(self.layers):
            raise ModelError("summary.json", "is of an SAE of other layers; analyze this one")
        n_tokens = found.get("n_tokens")
        if not isinstance(n_tokens, int) or isinstance(n_tokens, bool) or n_tokens < 0:
            raise ModelError("summary.json", "says of no number of tokens; analyze again")
        return found

    def _read_statistics(self) -> Statistics:
        return Statistics.read(self._at / "layers.safetensors", self.layers, self.n_latents)

    def _read_intervals(self) -> Path:
        return check_intervals(self._at / "profile.safetensors", len(self.layers), self.n_latents)

    def _read_table(self) -> Table:
        if (found := self._statistics.get()) is None:
            raise ModelError("layers.safetensors", self._statistics.problem or "is not there")
        table = Table.read(self._at / "latents.parquet", found)
        pa.default_memory_pool().release_unused()
        return table

    def _read_peaks(self) -> Peaks:
        peaks = Peaks.read(self._at / "examples.parquet")
        pa.default_memory_pool().release_unused()
        return peaks

    def _read_about(self) -> About:
        about = read_about(self._at / "examples.parquet")
        if (about.settings.n_latents, about.layers) != (self.n_latents, self.layers):
            raise ModelError("examples.parquet", "is of another SAE; analyze this one")
        wanted = None if self.config is None else self.config.tokenizer_fingerprint
        if wanted is not None and about.tokenizer_fingerprint != wanted:
            raise ModelError("examples.parquet", "was made with another tokenizer; analyze again")
        return about


def _no_sae() -> ModelError:
    return ModelError("sae", "this run has not saved one yet; wait for its first checkpoint")


def _is_run(folder: Path) -> bool:
    """A run directory, with an SAE or on the way to one."""
    begun = all((folder / name).is_file() for name in ("config.json", "run.lock"))
    return any((begun, (folder / "metrics.jsonl").is_file(), formats.own.recognises(folder / "sae")))


def _mapping(path: Path) -> dict[str, Any]:
    value = untrusted.read_json(path)
    if not isinstance(value, dict):
        raise ModelError(path.name, "holds no mapping of keys")
    return value
