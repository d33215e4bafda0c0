"""The processes of one job as a grid (dp, tp): who holds which tokens and latents, and every word that they exchange.

`dp` ranks each read their own part of every micro-batch; `tp` ranks each hold their own latents. `ALONE` is the one process that
there is without torchrun: it exchanges nothing, and every method gives back what it was given.

A sum over ranks has a derivative here: the gradient of a total is that of this rank's own part. So every rank computes the same
loss, the whole job's, and gradients of what ranks share are added up once, before the optimizer's step.
"""

import contextlib
import itertools
import logging
import os
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from mlsae import errors
from mlsae.errors import ConfigError, MlsaeError, ResourceError

T = TypeVar("T")

PATIENCE = timedelta(hours=6)
"""How long a rank waits for another that lives: tokenizing a large text is done by one while the others wait."""

TURN = timedelta(seconds=1)
"""How long a rank waits for another before it looks whether a signal came, and waits on."""

log = logging.getLogger("mlsae")


class Mesh:
    """This process's place among `dp * tp`, rank = dp_rank * tp + tp_rank."""

    def __init__(self, dp: int = 1, tp: int = 1, device: torch.device | None = None):
        self.dp, self.tp = dp, tp
        self.alone = dp * tp == 1
        self.rank = 0 if self.alone else dist.get_rank()
        self.dp_rank, self.tp_rank = divmod(self.rank, tp)
        self.device = torch.device("cpu") if device is None else device
        self.calls: Counter[str] = Counter()
        """Collectives so far, by the group they went through."""
        self.bytes: Counter[str] = Counter()
        """Of the tensors that this rank handed to them, by the same."""
        self._groups: dict[str, Any] = {}
        if not self.alone:
            grid = dist.init_device_mesh(self.device.type, (dp, tp), mesh_dim_names=("dp", "tp"))
            self._groups = {"dp": grid.get_group("dp"), "tp": grid.get_group("tp"), "all": dist.group.WORLD}

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.rank == 0

    def share(self, n: int, axis: str = "dp") -> slice:
        """This rank's part of n things in a row; parts differ by one at most."""
        rank, size = (self.dp_rank, self.dp) if axis == "dp" else (self.tp_rank, self.tp)
        return slice(n * rank // size, n * (rank + 1) // size)

    def shares(self, n: int) -> list[slice]:
        """Every tp rank's part of n things in a row."""
        return [slice(n * rank // self.tp, n * (rank + 1) // self.tp) for rank in range(self.tp)]

    # ---- sums --------------------------------------------------------------------------------------------------------

    def total(self, tensor: Shaped[Tensor, "*axes"], axis: str = "dp") -> Shaped[Tensor, "*axes"]:
        """The sum over the ranks of an axis; its derivative is that of this rank's own part."""
        return tensor if self._size(axis) == 1 else _Total.apply(self, tensor, axis)

    def token_mean(self, x: Float[Tensor, "layer token d_model"], n_tokens: int) -> Float[Tensor, "layer 1 d_model"]:
        """The mean over the tokens of all dp ranks, which are n_tokens."""
        return x.mean(1, keepdim=True) if self.dp == 1 else self.total(x.sum(1, keepdim=True)) / n_tokens

    def ratio(
        self, x: Float[Tensor, "layer token d_model"], y: Float[Tensor, "layer token d_model"]
    ) -> Float[Tensor, ""]:
        """The mean square of x over that of y, on all dp ranks."""
        if self.dp == 1:
            return x.square().mean() / y.square().mean()
        above, below = self.total(torch.stack([x.square().sum(), y.square().sum()]))
        return above / below

    def scalar_variance(self, x: Float[Tensor, "layer token d_model"], n_tokens: int) -> Float[Tensor, " layer"]:
        """The variance of all the scalars of each layer, on all dp ranks."""
        if self.dp == 1:
            return x.flatten(1).var(1)
        n = n_tokens * x.shape[2]
        mean = self.total(x.sum((1, 2))) / n
        return self.total((x - mean[:, None, None]).square().sum((1, 2))) / (n - 1)

    def union(self, flags: Bool[Tensor, " n"], n_tokens: int) -> tuple[Bool[Tensor, " n"], int]:
        """Flags that are set on any dp rank, and the tokens of all of them."""
        if self.dp == 1:
            return flags, n_tokens
        numbers = torch.cat([flags.to(torch.int32), torch.tensor([n_tokens], dtype=torch.int32, device=flags.device)])
        total = self._reduced(numbers, "dp")
        return total[:-1] > 0, int(total[-1])

    def sum_gradients(self, sharded: list[Tensor], whole: Tensor) -> None:
        """Add up, in place, the gradients of weights whose rows are sharded over tp, and of the one that every rank has."""
        if self.dp > 1:
            for gradient in sharded:
                self._all_reduce(gradient, "dp")
        if not self.alone:
            self._all_reduce(whole, "all")

    def norms(self, norms: dict[str, float], sharded: tuple[str, ...]) -> dict[str, float]:
        """Norms of gradients, where those of sharded ones are so far of this rank's rows alone."""
        if self.tp == 1:
            return norms
        squares = torch.tensor([norms[name] ** 2 for name in sharded], dtype=torch.float64, device=self.device)
        return {**norms, **dict(zip(sharded, self._reduced(squares, "tp").sqrt().tolist(), strict=True))}

    def gathered(self, tensor: Shaped[Tensor, "*axes"], axis: str = "tp") -> list[Tensor]:
        """Tensors of one shape, of every rank of an axis, without derivatives."""
        if self._size(axis) == 1:
            return [tensor]
        tensor = tensor.detach().contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self._size(axis))]
        self._call(axis, lambda: dist.all_gather(parts, tensor, group=self._groups[axis]), tensor.nbytes)
        return parts

    def tokens_by_rank(self, x: Shaped[Tensor, "layer token *rest"]) -> list[Tensor]:
        """The tokens of every dp rank."""
        if self.dp == 1:
            return [x]
        counts = [int(n) for n in self.gathered(torch.tensor(x.shape[1], device=self.device), "dp")]
        missing = (0, 0) * (x.ndim - 2) + (0, max(counts) - x.shape[1])
        parts = self.gathered(torch.nn.functional.pad(x.to(self.device), missing), "dp")
        return [part[:, :n].to(x.device) for part, n in zip(parts, counts, strict=True)]

    # ---- agreement ---------------------------------------------------------------------------------------------------

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank: the same answer on all, so that all do the same."""
        if self.alone:
            return flag
        answer = torch.tensor(int(flag))  # in memory, whatever the device: a rank may wait long, and is to hear signals
        self._all_reduce(answer, "all", dist.ReduceOp.MAX)
        return bool(answer)

    def by_leader(self, work: Callable[[], T]) -> T:
        """What the leader's work gives, on every rank; its error, too."""
        if self.alone:
            return work()
        value, error = _outcome(work) if self.leads else (None, None)
        self.any(False)  # where the others wait for it
        answer: list[Any] = [(value, _told(error))]
        self._call("all", lambda: dist.broadcast_object_list(answer, src=0))
        if error is not None:
            raise error
        value, told = answer[0]
        if told is not None:
            _raise_elsewhere(told)
        return value

    def everywhere(self, work: Callable[[], T]) -> T:
        """Done by every rank, and an error of any of them is everyone's; of several, the first rank says its own."""
        if self.alone:
            return work()
        value, error = _outcome(work)
        if not self.any(error is not None):
            return value
        told = self.of_all(_told(error))
        first, problem = next((rank, each) for rank, each in enumerate(told) if each is not None)
        if error is None:
            _raise_elsewhere(problem)
        error.elsewhere = first != self.rank
        raise error

    def of_all(self, value: T) -> list[T]:
        """Every rank's value, on each, in the order of ranks."""
        found: list[Any] = [value] * (self.dp * self.tp)
        if not self.alone:
            self._call("all", lambda: dist.all_gather_object(found, value))
        return found

    def leaders_first(self, work: Callable[[], T], then: Callable[[], T] | None = None) -> T:
        """Done by one process of every machine; when a cache holds what it made, the others do `then` (None: the same)."""
        if self.alone:
            return work()
        then = work if then is None else then
        leading = os.environ.get("LOCAL_RANK", "0") == "0"
        first = self.everywhere(lambda: work() if leading else None)
        return self.everywhere(lambda: then() if first is None else first)

    def same(self, tensors: Mapping[str, Tensor]) -> None:
        """Give every rank, in place, the leader's bits of tensors that all have."""
        if not self.alone:
            for tensor in tensors.values():
                if tensor.numel():
                    self._call("all", lambda tensor=tensor: dist.broadcast(tensor, src=0))

    def hand_over(self, tensors: Mapping[str, Tensor], rank: int) -> None:
        """Give the leader, in place, the bits that a rank has of tensors in memory that all have."""
        if self.leads or rank == self.rank:
            for tensor in tensors.values():
                if tensor.numel():
                    exchange = dist.recv if self.leads else dist.send
                    self._call("all", lambda x=tensor, go=exchange: go(x, rank if self.leads else 0), tensor.nbytes)

    # ---- the one door ------------------------------------------------------------------------------------------------

    def _size(self, axis: str) -> int:
        return {"dp": self.dp, "tp": self.tp, "all": self.dp * self.tp}[axis]

    def _reduced(self, tensor: Tensor, axis: str, op: Any = dist.ReduceOp.SUM) -> Tensor:
        home = tensor.device
        moved = tensor.detach().to(self.device, copy=True, memory_format=torch.contiguous_format)
        self._all_reduce(moved, axis, op)
        return moved.to(home)

    def _all_reduce(self, tensor: Tensor, axis: str, op: Any = dist.ReduceOp.SUM) -> None:
        group = self._groups[axis]
        self._call(
            axis, lambda: _waited(dist.all_reduce(tensor, op=op, group=group, async_op=True), tensor), tensor.nbytes
        )

    def _call(self, axis: str, collective: Callable[[], Any], n_bytes: int = 0) -> None:
        """Every exchange passes here: a rank that is gone is one sentence on all the others."""
        self.calls[axis] += 1
        self.bytes[axis] += n_bytes
        try:
            collective()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1][:120]
            raise ResourceError(
                "torchrun",
                f"another process of this job is gone, says rank {self.rank} ({reason}); look at the first error above, "
                "then run it again, train with --resume: its last checkpoint stands",
            ) from error


ALONE = Mesh()
"""The mesh of one process."""
_opened: list[Mesh] = []
"""The mesh that is open, if one is."""
_openings = itertools.count()


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mesh: Mesh, tensor: Tensor, axis: str) -> Tensor:
        return mesh._reduced(tensor, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return None, grads[0], None


@contextlib.contextmanager
def open_mesh(dp: int | None, tp: int | None, device: torch.device) -> Generator[Mesh]:
    """The mesh of the processes that torchrun started, or ALONE; inside another of the same layout, that one.

    None: all that are left, on dp. Raises ConfigError if dp * tp is not their number.
    """
    dp, tp = check_layout(dp, tp)
    if dp * tp == 1:
        yield ALONE
        return
    if _opened:
        if (dp, tp) != (_opened[0].dp, _opened[0].tp):
            raise ConfigError(
                "dp", f"{dp} with tp {tp}; processes are at work as {_opened[0].dp} with tp {_opened[0].tp}"
            )
        yield _opened[0]
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=PATIENCE))
        store = dist.PrefixStore(
            f"start-{_restarts()}-{next(_openings)}", store
        )  # where torchrun keeps the addresses of those that failed
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
        mesh = Mesh(dp, tp, device)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:120]
        raise ResourceError("torchrun", f"the processes do not find each other ({reason})") from error
    if not mesh.leads:
        log.setLevel(max(log.level, logging.ERROR))  # what all see, one says
    _opened.append(mesh)
    try:
        yield mesh
    finally:
        _opened.clear()
    dist.destroy_process_group()  # not after an error: others may be gone, or wait


def check_layout(dp: int | None, tp: int | None) -> tuple[int, int]:
    """(dp, tp), whose product is the number of processes."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    wanted = (1 if dp is None else dp) * (1 if tp is None else tp)
    if world == 1 and wanted > 1:
        raise ConfigError(
            "tp" if dp is None or dp == 1 else "dp",
            f"{wanted} processes are needed; start it with torchrun --nproc-per-node {wanted} -m mlsae train",
        )
    if tp is None:
        tp = world // dp if dp else 1
    if dp is None:
        dp = world // tp
    if dp * tp != world:
        raise ConfigError("dp", f"{dp} with tp {tp} makes {dp * tp}; torchrun started {world} processes")
    return dp, tp


def local_device(device: torch.device) -> torch.device:
    """The accelerator of this process, where several share a machine."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        torch.cuda.set_device(device)
    return device


def share_of_latents(mesh: Mesh) -> float:
    """Of all latents, those on this process's device: on a CPU, those of all processes of the machine."""
    together = 1 if mesh.device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 1.0 if mesh.alone else together / mesh.tp


def restarted() -> bool:
    """Whether torchrun has started this process in the place of one that failed."""
    return _restarts() > 0


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _waited(work: Any, tensor: Tensor) -> None:
    """Wait for a collective: in turns where waiting keeps the interpreter from hearing a signal."""
    if tensor.is_cuda:
        work.wait()
        return
    while not work.is_completed():
        with contextlib.suppress(RuntimeError):  # the turn is over, or it failed: then it says so again
            work.wait(TURN)
    work.wait()


def _outcome(work: Callable[[], Any]) -> tuple[Any, MlsaeError | None]:
    try:
        return work(), None
    except MlsaeError as error:
        return None, error


def _told(error: MlsaeError | None) -> tuple[str, str, str] | None:
    return None if error is None else (type(error).__name__, error.field, error.problem)


def _raise_elsewhere(told: tuple[str, str, str]) -> NoReturn:
    """Raise what another process raised; that one says it."""
    error = getattr(errors, told[0])(*told[1:])
    error.elsewhere = True
    raise error
