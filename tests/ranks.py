"""Several processes for a test, as torchrun starts them: gloo on this machine's CPU."""

import contextlib
import json
import multiprocessing
import os
import pickle
import random
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tiny import save_tiny_lm

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["pytest", "mlsae.train", "torch._dynamo", "torch._refs", "torch._meta_registrations"]
)  # once; no thread is started before a fork


def run_ranks(n: int, work: Callable[..., Any], *args: Any, seconds: float = 60) -> list[Any]:
    """What `work(*args)` returns on each of n ranks; a rank's error is raised here."""
    ranks, pipes = start_ranks(n, work, *args)
    try:
        until = time.monotonic() + seconds
        answers = [_answer(pipe, max(0.1, until - time.monotonic())) for pipe in pipes]
    finally:
        for rank in ranks:
            rank.join(1)
            rank.kill()
    for answer in answers:
        if isinstance(answer, str):
            raise AssertionError(answer)
    return [answer[0] for answer in answers]


def start_ranks(n: int, work: Callable[..., Any], *args: Any) -> tuple[list[Any], list[Connection]]:
    """The n processes, and where each tells what `work(*args)` gave it; before that, what it told with `tell`."""
    port = free_port()
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(n)]
    ranks = [CONTEXT.Process(target=_rank, args=(i, n, port, pipes[i][1], work, args), daemon=True) for i in range(n)]
    for rank in ranks:
        rank.start()
    for _, end in pipes:
        end.close()
    return ranks, [pipe for pipe, _ in pipes]


def tell(event: dict[str, Any]) -> None:
    """Say something, from a rank, to who started it."""
    _told[0].send_bytes(pickle.dumps(event))


_told: list[Connection] = []


def gathered_rows(own: Any, groups: int, size: int, mesh: Any) -> Any:
    """A tensor with a row for each latent, whose rows the mesh's tp ranks share, in one piece."""
    import torch

    by_group = own.view(groups, len(own) // groups, -1)
    widest = -(-size // mesh.tp)
    parts = mesh.gathered(torch.nn.functional.pad(by_group, (0, 0, 0, widest - by_group.shape[1])))
    shares = zip(parts, mesh.shares(size), strict=True)
    return torch.cat([part[:, : share.stop - share.start] for part, share in shares], 1).flatten(0, 1)


def make_places(folder: Path) -> dict[str, str]:
    """A tiny LM's folder and a corpus, made in a folder, by the names that training knows them by."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(50)]
    (folder / "text").mkdir()
    for split, n_documents in {"train": 80, "validation": 12}.items():
        texts = [" ".join(draw.choices(words, k=draw.randint(3, 20))) for _ in range(n_documents)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / "text" / f"{split}.jsonl").write_text(lines)
    save_tiny_lm(folder / "lm", n_layers=3, d_model=16)
    return {"lm": str(folder / "lm"), "data": str(folder / "text")}


def free_port() -> int:
    """A port that nobody listens to."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _answer(pipe: Connection, seconds: float) -> Any:
    try:
        return pickle.loads(pipe.recv_bytes()) if pipe.poll(seconds) else "a rank did not answer in time"
    except EOFError:
        return "a rank died"


def _rank(rank: int, n: int, port: int, pipe: Connection, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    place = {"RANK": rank, "WORLD_SIZE": n, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": n}
    os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    torch.set_num_threads(1)
    _told.append(pipe)
    try:
        pipe.send_bytes(pickle.dumps((work(*args),)))  # by value: a tensor sent as itself dies with its process
    except BaseException:
        pipe.send_bytes(pickle.dumps(f"rank {rank} of {n}: {traceback.format_exc()}"))
