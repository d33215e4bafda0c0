"""An SAE put on the Hugging Face Hub with a model card: everything in one commit, or nothing, and nothing that was not listed."""

import contextlib
import os
import re
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from mlsae import files, formats
from mlsae.card import UNNAMED, Record, model_card
from mlsae.config import MLSAEConfig
from mlsae.downloads import SAE_PICKLES, SAE_WEIGHTS
from mlsae.errors import ConfigError, ModelError, printable
from mlsae.formats.weights import Weights

CARD, PICTURE = "README.md", "heatmap.png"
_REPOSITORY = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")


@dataclass(frozen=True)
class Push:
    """What was uploaded or, of a dry run, would be."""

    repo_id: str
    revision: str
    """Branch."""
    private: bool
    """Whether a repository that is not there yet is, or would be, made private."""
    files: dict[str, int]
    """Bytes by path."""
    card: str
    """The text of README.md."""
    commit: str | None = None
    """Its name on the Hub; None: nothing was uploaded."""

    @property
    def url(self) -> str:
        """Where it is, or would be."""
        return f"{constants.ENDPOINT}/{self.repo_id}/tree/{self.revision}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values by field name."""
        return {**asdict(self), "url": self.url}

    def table(self) -> str:
        """Where to, and every file with its size."""
        width = max(map(len, self.files))
        visible = " (private)" if self.private else ""
        lines = [f"  {path:{width}}  {size / 1e6:12,.3f} MB" for path, size in self.files.items()]
        return "\n".join([f"{self.url}{visible}", *lines])


def push(
    weights: Weights,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    run: Path | None = None,
    to: str = "mlsae",
    license: str | None = None,  # noqa: A002
    lm: str | None = None,
    data: str | None = None,
    dry_run: bool = False,
    tell: Callable[[Push], object] = lambda push: None,
) -> Push:
    """Upload an SAE in the format `to`, with a model card, as one commit; `tell` is shown it before.

    Args:
        private: if the repository has to be made, make it so; one that is there and public is refused.
        revision: branch; None: main. It is made from main if it is not there.
        run: directory of the run that trained it: what its card says of training and evaluation, and its figure, come from there.
        license: identifier as the Hub spells it, such as mit; None: the card says that none was chosen.
        lm: the Hub's name of the language model, where the SAE was trained on one in a folder.
        data: the Hub's name of the text, likewise.
        dry_run: upload nothing, and ask nobody.

    Raises:
        ConfigError: a name that cannot be, or a format that has no exact twin of this SAE.
        ModelError: the Hub refuses, or cannot be reached; nothing is there by halves.
    """
    if not _REPOSITORY.fullmatch(repo_id) or ".." in repo_id:
        raise ConfigError("repo", f"'{printable(repo_id)}' given; must be user/name, of letters, digits, '-', '_', '.'")
    if license is not None and not _LICENSE.fullmatch(license):
        raise ConfigError("license", f"'{printable(license)}' given; must be an identifier, such as mit or cc-by-4.0")
    config = public_config(weights.config, lm=lm, data=data)
    with _staged(replace(weights, config=config), to) as folder:
        record = Record() if run is None else Record.of(run)
        pickled = any(folder.rglob("*.pt"))
        card = model_card(config, repo_id, record, licence=license, to=to, pickled=pickled)
        files.write_text(folder / CARD, card)
        if record.heatmap is not None:
            files.write_bytes(folder / PICTURE, record.heatmap.read_bytes())
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
        planned = Push(repo_id, "main" if revision is None else revision, private, sizes, card)
        tell(planned)
        return planned if dry_run else replace(planned, commit=_upload(planned, folder))


def public_config(config: MLSAEConfig, *, lm: str | None = None, data: str | None = None) -> MLSAEConfig:
    """The config without names of files on this machine: `lm` and `data` are given instead, or left out."""
    for name, given in (("lm", lm), ("data", data)):
        if given is not None and not _could_be_public(given):
            raise ConfigError(name, f"'{printable(given)}' given; must be its name on the Hub")
    from_hub = config.lm_revision is not None  # which a folder does not have
    known = _public(config.lm, here=not from_hub)
    return config.replaced(
        expansion_factor=None,
        lm=known if lm is None else lm,
        lm_revision=config.lm_revision if known is not None and lm in (None, known) else None,
        data=_public(config.data) if data is None else data,
        lens=UNNAMED if config.lens is not None and _public(config.lens) is None else config.lens,
    )


def _public(name: str | None, *, here: bool = True) -> str | None:
    """The name, unless it is one of a file or folder, or may be: what is `here` under it, or cannot be on the Hub."""
    return None if name is None or not _could_be_public(name) or (here and os.path.exists(name)) else name


def _could_be_public(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None and ".." not in name


@contextlib.contextmanager
def _staged(weights: Weights, to: str) -> Generator[Path]:
    """The SAE's files in a folder that is removed afterwards."""
    folder = files.cache_directory() / "push" / str(os.getpid())
    try:
        formats.write(weights, folder, to)
        yield folder
    finally:
        files.remove(folder)


def _upload(planned: Push, folder: Path) -> str:
    """Make the repository and the branch, if they are not there, and the commit; returns its name."""
    api, repo_id = HfApi(), planned.repo_id
    branch = None if planned.revision == "main" else planned.revision
    with _one_sentence(repo_id):
        api.create_repo(repo_id, private=True if planned.private else None, exist_ok=True)
        if branch is not None:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        there = api.model_info(repo_id, revision=branch)
        if planned.private and not there.private:
            raise ModelError(
                "repo", f"'{repo_id}' is there and public; make it private on the Hub, or leave out --private"
            )
        _check_replaced(planned, [file.rfilename for file in there.siblings or []])
        done = api.create_commit(
            repo_id,
            [CommitOperationAdd(path, str(folder / path)) for path in planned.files],
            commit_message=f"An SAE, by mlsae {version('mlsae')}",
            revision=branch,
            parent_commit=there.sha,
        )
    return done.oid


def _check_replaced(planned: Push, there: list[str]) -> None:
    """Refuse to leave the weights of another SAE beside these: it would be one of several, or read in their place."""
    for path in there:
        known = any(fnmatchcase(PurePosixPath(path).name, name) for name in (*SAE_WEIGHTS, *SAE_PICKLES))
        if known and path not in planned.files:
            raise ModelError(
                "repo",
                f"'{planned.repo_id}' holds {printable(path)} of another SAE, which would stay beside this one; "
                "delete it there, or push to another repository or --revision",
            )


@contextlib.contextmanager
def _one_sentence(repo_id: str) -> Generator[None]:
    """What the Hub answers to an upload, as a sentence a user can act on; its own text may quote a token."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise ModelError("repo", f"'{repo_id}' cannot be written: offline mode is on; push while online") from None
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        cause = error if error.__cause__ is None else error.__cause__
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status == 400 and "README" in str(error):
            problem = "the Hub refuses the model card; give --license as the Hub spells it, such as mit"
            raise ModelError("license", problem) from None
        if status in (401, 403, 404):
            problem = "the Hub does not let you write it; run 'hf auth login' with a token that may, or check the name"
            raise ModelError("repo", f"'{repo_id}': {problem}") from None
        why = type(error).__name__ if status is None else f"HTTP {status}"
        problem = f"cannot be written ({why}); what is there is whole, as it was or as it should be: push again"
        raise ModelError("repo", f"'{repo_id}' {problem}") from None
