"""Sums over a text of which several processes read a part each, put together again: those of one job, or from disk.

On disk a part is one folder, checked when it is read:

DIR/shards/analyze/0001-of-0004/    files of sums, and shard.json, which says what they are sums of
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from mlsae import files, fingerprint, untrusted
from mlsae.config import Config
from mlsae.errors import ConfigError, DataError, ModelError, ResourceError
from mlsae.mesh import Mesh

if TYPE_CHECKING:
    from mlsae.data import TokenBlocks
    from mlsae.lm import LanguageModel
    from mlsae.sae import MLSAE

FORMAT_VERSION = 1
RECORD = "shard.json"
SUMS = "sums.safetensors"
MAX_SHARDS = 9999
KINDS = ("evaluate", "analyze")
Kind = Literal["evaluate", "analyze"]
T = TypeVar("T")


@runtime_checkable
class Sums(Protocol):
    """What is added up over a text."""

    def merge(self, other: Any) -> Any:
        """The sums over both texts."""
        ...


S = TypeVar("S", bound=Sums)


# ---- which part ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextShard:
    """One of `of` parts of the batches that one process would read, counted from 1."""

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of <= MAX_SHARDS:
            raise ConfigError("shard", f"'{self}' given; 1/n to n/n are allowed, n up to {MAX_SHARDS}")

    @classmethod
    def parse(cls, text: str) -> "TextShard":
        """What `2/4` means."""
        if (found := re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)) is None:
            raise ConfigError("shard", f"'{text}' given; write i/n, such as 2/4")
        return cls(int(found[1]), int(found[2]))

    @classmethod
    def of_rank(cls, mesh: Mesh) -> "TextShard":
        """The part of one process of a job."""
        return cls(mesh.rank + 1, mesh.dp * mesh.tp)

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return f"{self.number:04}-of-{self.of:04}"

    def part(self, positions: range) -> range:
        """Every `of`-th of the positions where batches begin, so that shards cost alike whatever the first tokens cost.

        Batches stay whole: each is computed as one process would.
        """
        return positions[self.number - 1 :: self.of]


class Work(Config):
    """What is summed over which text: all shards of one whole say the same."""

    kind: Kind
    """The command."""
    sae: str
    """Hash of the SAE's config and weights."""
    lm: str
    """Hash of numbers from every weight of the language model."""
    text: str
    """Hash of the token blocks."""
    tokens: int
    """Tokens to read, in all."""
    context_length: int
    """Tokens in a sequence."""
    options: dict[str, int | bool | str | None]
    """The command's other settings."""

    def check(self, sae: "MLSAE", lm: "LanguageModel | None" = None, blocks: "TokenBlocks | None" = None) -> None:
        """Refuse what the shards did not read."""
        if fingerprint.of_weights(sae) != self.sae:
            raise ModelError("sae", "is not the one that the shards read; name that one with --sae")
        if lm is not None and fingerprint.of_lm(lm) != self.lm:
            raise ModelError("lm", f"{lm.name} is not the one that the shards read; name that one with --lm")
        if blocks is not None and blocks.sha256() != self.text:
            raise DataError("data", "is not the text that the shards read; name that one with --data")


def work_on(
    kind: Kind,
    sae: "MLSAE",
    lm: "LanguageModel",
    blocks: "TokenBlocks",
    tokens: int,
    **options: int | bool | str | None,
) -> Work:
    """The work of a command, by what identifies SAE, language model and text wherever they lie."""
    identity = {"sae": fingerprint.of_weights(sae), "lm": fingerprint.of_lm(lm), "text": blocks.sha256()}
    return Work(kind=kind, **identity, tokens=tokens, context_length=blocks.context_length, options=options)


# ---- within a job ----------------------------------------------------------------------------------------------------


def check_together(mesh: Mesh, work: Callable[[], Work]) -> None:
    """Refuse processes of one job that were given different work: their sums would be of nothing."""
    if mesh.alone:
        return
    mine = mesh.everywhere(work)
    leaders = mesh.by_leader(lambda: mine)

    def check() -> None:
        if (odd := _work_difference(leaders, mine)) is not None:
            raise ConfigError("torchrun", f"rank {mesh.rank} {odd}, unlike rank 0; give all processes the same")

    mesh.everywhere(check)


def added_up(mesh: Mesh, sums: S) -> S:
    """The sums of all dp ranks, on every rank: the leader adds them in the order of ranks, as `mlsae merge` adds parts."""
    if mesh.dp == 1:
        return sums
    other = copy.deepcopy(sums) if mesh.leads else sums
    for rank in range(mesh.tp, mesh.dp * mesh.tp, mesh.tp):
        numbers = _in_memory(other)
        mesh.hand_over(numbers, rank)
        if mesh.leads:
            sums = sums.merge(_filled(other, numbers))
    numbers = _in_memory(sums)
    mesh.same(numbers)
    return _filled(sums, numbers)


def _in_memory(sums: object) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in _numbers(sums).items()}


# ---- on disk ---------------------------------------------------------------------------------------------------------


class Record(Config):
    """What shard.json holds."""

    format_version: int
    number: int
    of: int
    work: Work
    asked: dict[str, str | bool | int | None]
    """Flags that named SAE, language model and text, for `mlsae merge`."""
    seconds: float
    """Wall time."""
    checksums: dict[str, str]
    """SHA-256 of each of the other files."""


@dataclass(frozen=True)
class WrittenShard:
    """One part that is done."""

    folder: str
    shard: str
    missing: list[str]
    """Parts of the same whole that are not there yet."""
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """By name."""
        return asdict(self)


@dataclass(frozen=True)
class Whole:
    """All parts of one whole, each found undamaged."""

    work: Work
    asked: dict[str, Any]
    """The first part's."""
    folders: tuple[Path, ...]
    """In the order of the text, so that sums are added in one order, whatever was done first."""
    seconds: float
    """Wall time of all parts together."""


@dataclass(frozen=True)
class Merged:
    """What was put together, by command."""

    results: Mapping[str, Any]
    """An Evaluation, an Analysis, or both."""

    def to_dict(self) -> dict[str, Any]:
        """The results as plain values, by command."""
        return {kind: result.to_dict() for kind, result in self.results.items()}


def write(
    directory: Path,
    shard: TextShard,
    work: Work,
    save: Callable[[Path], None],
    *,
    seconds: float,
    asked: Mapping[str, Any] | None = None,
) -> WrittenShard:
    """Have the sums of one part saved into a folder of their own, which is there whole or not at all."""
    folder = directory / "shards" / work.kind / shard.folder
    with files.staged_directory(folder) as staged:
        save(staged)
        record = Record(
            format_version=FORMAT_VERSION,
            number=shard.number,
            of=shard.of,
            work=work,
            asked={} if asked is None else dict(asked),
            seconds=seconds,
            checksums={path.name: files.sha256(path) for path in sorted(staged.iterdir())},
        )
        files.write_sealed(staged / RECORD, record.to_dict())
    others = (TextShard(number, shard.of) for number in range(1, shard.of + 1))
    missing = [str(other) for other in others if not (folder.parent / other.folder).is_dir()]
    return WrittenShard(str(folder), str(shard), missing, seconds)


def kinds_in(directory: Path) -> list[Kind]:
    """The commands that left shards in a folder."""
    return [kind for kind in KINDS if (directory / "shards" / kind).is_dir()]


def gather(directory: str | Path, kind: Kind) -> Whole:
    """All shards of one whole, in order.

    Raises:
        ResourceError: one is missing, damaged, there twice, or of something else; the message names it.
    """
    place = Path(directory) / "shards" / kind
    found = {path: _read(path) for path in _folders(place)}
    if not found:
        raise ResourceError(str(directory), f"holds no shards; mlsae {kind} --shard i/n writes them")
    first, *others = found
    for path in others:
        if (odd := _difference(found[first], found[path])) is not None:
            raise ResourceError(str(path), f"{odd}, unlike {first.name}; delete the one that is not wanted")
    n = found[first].of
    if missing := sorted({*range(1, n + 1)} - {record.number for record in found.values()}):
        raise ResourceError(
            str(place), f"{_listed(f'{number}/{n}' for number in missing)} missing; run --shard of each"
        )
    return Whole(found[first].work, found[first].asked, tuple(found), sum(x.seconds for x in found.values()))


def _folders(place: Path) -> Iterator[Path]:
    """What is there by the order of names, but for what an interrupted write left."""
    return (path for path in sorted(place.glob("*")) if not path.name.startswith("."))


def _read(folder: Path) -> Record:
    """What a shard says of itself; its files are as they were written."""
    fields = untrusted.read_sealed(folder / RECORD)
    if fields.get("format_version") != FORMAT_VERSION:
        raise ResourceError(str(folder), "was written by another version of mlsae; run it again")
    record = Record(**fields)
    shard = TextShard(record.number, record.of)
    if folder.name != shard.folder:
        raise ResourceError(str(folder), f"holds shard {shard}, which belongs in {shard.folder}; delete one of them")
    for name, checksum in record.checksums.items():
        path = files.contained(folder, name)
        if not path.is_file() or files.sha256(path) != checksum:
            raise ResourceError(str(path), f"is missing or failed its checksum; run --shard {shard} again")
    return record


def _difference(first: Record, other: Record) -> str | None:
    """In what two shards do not belong together, in words."""
    if first.of != other.of:
        return f"is one of {other.of} shards"
    return _work_difference(first.work, other.work)


def _work_difference(first: Work, other: Work) -> str | None:
    mine, theirs = first.to_dict(), other.to_dict()
    names = {"sae": "SAE", "lm": "language model", "text": "text"}
    if odd := [word for name, word in names.items() if mine[name] != theirs[name]]:
        return f"is of another {odd[0]}"
    mine, theirs = ({**work.pop("options"), **work} for work in (mine, theirs))
    odd = [name for name in theirs if mine.get(name) != theirs[name]]
    return f"was made with {odd[0]} {theirs[odd[0]]!r}" if odd else None


def _listed(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more} {'is' if len(names) == 1 else 'are'}"


# ---- sums as tensors -------------------------------------------------------------------------------------------------


def save_sums(path: Path, sums: object) -> None:
    """Write every tensor and count that sums, and the sums they are made of, hold as attributes; None is left out."""
    files.save_tensors(path, _numbers(sums))


def load_sums(path: Path, empty: T) -> T:
    """What `save_sums` wrote, put into sums of the same sizes. Raises ModelError if the file is of others."""
    expected = {name: (x.dtype, tuple(x.shape)) for name, x in _numbers(empty).items()}
    return _filled(empty, untrusted.load_tensors(path, expected))


def _parts(sums: Any) -> dict[Any, Any]:
    """The members of a mapping, a list or an object, by name."""
    if isinstance(sums, dict):
        return sums
    return dict(enumerate(sums)) if isinstance(sums, list) else vars(sums)


def _numbers(sums: Any, name: str = "") -> dict[str, Tensor]:
    if sums is None:
        return {}
    if isinstance(sums, np.ndarray):
        sums = torch.from_numpy(sums)
    if isinstance(sums, Tensor):
        return {name: sums.byte() if sums.dtype == torch.bool else sums}
    if isinstance(sums, int):
        return {name: torch.tensor(sums)}
    return {k: x for key, part in _parts(sums).items() for k, x in _numbers(part, f"{name}.{key}").items()}


def _filled(sums: Any, numbers: Mapping[str, Tensor], name: str = "") -> Any:
    if sums is None:
        return None
    if isinstance(sums, np.ndarray):
        return numbers[name].numpy()
    if isinstance(sums, Tensor):
        return numbers[name].to(sums)
    if isinstance(sums, int):
        return int(numbers[name])
    filled = {key: _filled(part, numbers, f"{name}.{key}") for key, part in _parts(sums).items()}
    if isinstance(sums, dict):
        return filled
    if isinstance(sums, list):
        return list(filled.values())
    vars(sums).update(filled)
    return sums
