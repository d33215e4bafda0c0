"""Several processes for a test, as torchrun starts them: gloo on this machine's CPU."""

import contextlib
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["mlsae.train", "ranks"])  # torch is imported once, and threads are not started before a fork


def run_ranks(n: int, work: Callable[..., Any], *args: Any, seconds: float = 120) -> list[Any]:
    """What `work(*args)` returns on each of n ranks; a rank's error is raised here."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(n)]
    ranks = [CONTEXT.Process(target=_rank, args=(i, n, port, pipes[i][1], work, args), daemon=True) for i in range(n)]
    for rank in ranks:
        rank.start()
    for _, end in pipes:
        end.close()
    try:
        answers = [_answer(pipe, seconds) for pipe, _ in pipes]
    finally:
        for rank in ranks:
            rank.join(1)
            rank.kill()
    for answer in answers:
        if isinstance(answer, str):
            raise AssertionError(answer)
    return [answer[0] for answer in answers]


def _answer(pipe: Connection, seconds: float) -> Any:
    try:
        return pipe.recv() if pipe.poll(seconds) else "a rank did not answer in time"
    except EOFError:
        return "a rank died"


def _rank(rank: int, n: int, port: int, pipe: Connection, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    place = {"RANK": rank, "WORLD_SIZE": n, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": n}
    os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    torch.set_num_threads(1)
    try:
        pipe.send((work(*args),))
    except BaseException:
        pipe.send(f"rank {rank} of {n}: {traceback.format_exc()}")
