"""Files of a repository on the Hugging Face Hub, downloaded or found in its cache; what fails is one sentence.

A download that was cut off goes on where it stopped, and without a network what was downloaded before is used.
"""

import contextlib
import fnmatch
import glob
import logging
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mlsae import files
from mlsae.errors import ModelError, did_you_mean, printable
from mlsae.recipes import FormatName

ANSWER_SECONDS = 10
"""To wait for the Hub's first answer, before the cache is asked."""
LARGE_DOWNLOAD = 10**9
"""Bytes; more are told of before they are downloaded."""
SAE_CONFIGS = ("config.json", "cfg.json")
SAE_WEIGHTS = ("model.safetensors", "sae_weights.safetensors", "sae.safetensors")
SAE_PICKLES = ("ae.pt", "[0-9].pt", "[0-9][0-9].pt", "[0-9][0-9][0-9].pt")
"""Names that the formats (formats/) give the files of an SAE."""
_REVISION = re.compile(r"\w[\w./-]*")
_log = logging.getLogger(__name__)

Check = Callable[[Mapping[str, int]], None]


def fetch(
    field: str,
    name: str,
    revision: str | None,
    patterns: Sequence[str],
    *,
    kind: Literal["model", "space"] = "model",
    check: Check = lambda sizes: None,
    needed: Sequence[str] = (),
    known: Sequence[str] = (),
) -> Path:
    """The files of a repository that match, in a folder named by their commit; the Hub is asked first, then its cache.

    Args:
        field: what errors are about.
        check: refuses a repository by the sizes of its files, in bytes, before one is downloaded.
        needed: files without which a cached copy is not one.
        known: names to choose from when this one is not there.

    Raises ModelError if they are not to be had.
    """
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise ModelError(field, f"'{printable(revision)}' is no revision; name a branch, tag or commit")
    with _one_sentence(field, name, revision, known):
        unreachable = _ask(name, revision, patterns, kind, check)
        try:
            folder = Path(
                snapshot_download(
                    name,
                    repo_type=kind,
                    revision=revision,
                    local_files_only=unreachable is not None,
                    allow_patterns=list(patterns),
                )
            )
        except LocalEntryNotFoundError as error:
            raise _not_cached(field, name, kind, error if unreachable is None else unreachable) from error
    if not all((folder / file).is_file() for file in needed):
        raise _not_cached(field, name, kind, FileNotFoundError() if unreachable is None else unreachable)
    if unreachable is not None and not isinstance(unreachable, OfflineModeIsEnabled):
        _log.warning("the Hub cannot be reached (%s); '%s' is the copy in the cache", type(unreachable).__name__, name)
    return folder


def _ask(name: str, revision: str | None, patterns: Sequence[str], kind: str, check: Check) -> Exception | None:
    """Let the Hub's list of files be checked. Returns what kept the Hub from answering, if something did."""
    try:
        ask = HfApi().model_info if kind == "model" else HfApi().space_info
        info = ask(name, revision=revision, timeout=ANSWER_SECONDS, files_metadata=True)
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        raise
    except Exception as error:  # no network, a proxy, a busy server: types differ between versions of the client
        if _status(error) in (401, 403):
            raise
        return error
    sizes = {file.rfilename: (0 if file.size is None else file.size) for file in info.siblings or []}
    check(sizes)
    wanted = [file for file in sizes if _match(file, patterns)]
    cached = (try_to_load_from_cache(name, file, revision=info.sha, repo_type=kind) for file in wanted)
    missing = sum(sizes[file] for file, path in zip(wanted, cached, strict=True) if not isinstance(path, str))
    if missing > LARGE_DOWNLOAD:
        _log.warning("'%s': %.1f GB to download", printable(name), missing / 1e9)
    return None


def _status(error: Exception) -> int | None:
    """The HTTP status of an answer; None: there was none."""
    return getattr(getattr(error, "response", None), "status_code", None)


@contextlib.contextmanager
def _one_sentence(field: str, name: str, revision: str | None, known: Sequence[str]) -> Generator[None]:
    """What the Hub answers, as a sentence a user can act on; its own text may quote a token, so it is left out."""
    name, login = printable(name), "run 'hf auth login'"
    try:
        yield
    except GatedRepoError:
        raise ModelError(field, f"'{name}' is gated; ask for access on huggingface.co/{name} and {login}") from None
    except (RepositoryNotFoundError, HFValidationError):
        hint = did_you_mean(name, known) or f"; check the name, or {login} if it is private"
        raise ModelError(field, f"'{name}' not found on the Hub or as a folder{hint}") from None
    except RevisionNotFoundError:
        raise ModelError(field, f"'{name}' has no revision '{revision}'; name a branch, tag or commit") from None
    except (EntryNotFoundError, HTTPError, OSError, RuntimeError) as error:
        if _status(error) in (401, 403):
            raise ModelError(field, f"the Hub does not let your token read '{name}'; {login}") from None
        network = isinstance(error, ConnectionError | TimeoutError | HfHubHTTPError)
        if isinstance(error, OSError) and error.errno and not network:  # this machine's fault
            with files.disk_errors(Path(constants.HF_HUB_CACHE)):
                raise
        raise ModelError(field, f"'{name}' cannot be read from the Hub ({type(error).__name__}); try again") from None


def _not_cached(field: str, name: str, kind: str, unreachable: Exception) -> ModelError:
    offline = isinstance(unreachable, OfflineModeIsEnabled)
    why = "offline mode is on" if offline else f"the Hub cannot be reached ({type(unreachable).__name__})"
    command = f"hf download {name}" if kind == "model" else f"hf download --repo-type {kind} {name}"
    return ModelError(field, f"'{name}' is not in the local cache and {why}; run '{command}' while online")


# ---- SAEs ----------------------------------------------------------------------------------------------------------------


def fetch_sae(name: str, revision: str | None, *, allow_pickle: bool = False) -> Path:
    """The folder of the SAEs in a repository, `user/repo`, or of one in a folder or file of it, `user/repo/sub/folder`.

    Only files that some format needs are downloaded; pickles only if they are allowed. Raises ModelError if there are none.
    """
    parts = name.split("/")
    repository, inside = "/".join(parts[:2]), PurePosixPath(*parts[2:])
    if name.startswith(("/", ".", "~")) or ".." in parts:
        raise ModelError("sae", f"'{printable(name)}' not found on the Hub or as a folder; check the name")
    safe, pickles = _patterns(inside, SAE_WEIGHTS), _patterns(inside, SAE_PICKLES)
    above = [
        glob.escape(str(folder / SAE_CONFIGS[0])) for folder in inside.parents
    ]  # which may name the language model
    weights = [*safe, *(pickles if allow_pickle else ())]

    def check(sizes: Mapping[str, int]) -> None:
        there = [file for file in sizes if inside in (PurePosixPath(file), *PurePosixPath(file).parents)]
        if not there:
            folders = {str(folder) for file in sizes for folder in PurePosixPath(file).parents}
            hint = did_you_mean(str(inside), folders) or "; look at its files"
            raise ModelError("sae", f"'{repository}' has no '{printable(str(inside))}'{hint}")
        if not any(_match(file, weights) for file in there):
            raise _no_sae(printable(name), [file for file in there if _match(file, pickles)])

    patterns = [*above, *_patterns(inside, SAE_CONFIGS), *weights]
    return fetch("sae", repository, revision, patterns, check=check) / inside


def _patterns(inside: PurePosixPath, names: Sequence[str]) -> list[str]:
    """Of files of these names in a folder and below it, or of the folder itself where it is such a file."""
    if inside.suffix == ".pt":
        return [glob.escape(str(inside))] if names is SAE_PICKLES else []
    prefix = f"{glob.escape(str(inside))}/" if inside.parts else ""
    return [f"{prefix}{below}{name}" for name in names for below in ("", "*/")]


def _match(file: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns)


def _no_sae(name: str, pickles: Sequence[str]) -> ModelError:
    if pickles:
        problem = f"'{name}' is in a pickle ({printable(pickles[0])}), which can carry code; give --allow-pickle"
        return ModelError("sae", f"{problem} (allow_pickle=True) if you trust where it comes from")
    known = ", ".join(get_args(FormatName))
    return ModelError(
        "sae", f"'{name}' holds no SAE of a known format ({known}); name a repository that does, or a folder of one"
    )
