"""The worker: one job at a time in the order of asking, places bounded and freed, and nothing that a job does hurts another."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from explorer.conftest import PROMPT, Shelf, made_sae, session_of
from mlsae import LanguageModel
from mlsae.errors import ConfigError, ModelError
from mlsae.explorer import inference
from mlsae.explorer.inference import MAX_TEXT_BYTES, MAX_WAITING, Busy, Cancelled, Session, Worker
from tiny import save_tiny_lm


def driven(test: Callable[[Worker], Awaitable[Any]], shelf: Shelf | None = None) -> Any:
    """A test's coroutine, given a worker of its own, whose thread is gone at the end."""

    async def run() -> Any:
        worker = Worker(Shelf(None) if shelf is None else shelf)
        try:
            return await asyncio.wait_for(test(worker), 60)
        finally:
            worker.close()

    before = set(threading.enumerate())
    result = asyncio.run(run())
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()
    return result


class Gate:
    """A job that runs until it is let go, one step after another."""

    def __init__(self):
        self.entered, self.open, self.ended = threading.Event(), threading.Event(), ""

    def __call__(self, session: Session) -> str:
        self.entered.set()
        session.expect(1000)
        try:
            while not self.open.wait(0.002):
                session.step()
        except Cancelled:
            self.ended = "cancelled"
            raise
        return "done"


async def until(true: Callable[[], bool]) -> None:
    for _ in range(2000):
        if true():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("never came true")


def echo(session: Session, x: Any) -> Any:
    return x


async def held(worker: Worker) -> tuple[Gate, asyncio.Task[Any]]:
    """A worker whose one thread is taken."""
    gate = Gate()
    task = asyncio.create_task(worker.run("gate", gate))
    await until(gate.entered.is_set)
    return gate, task


# ---- the queue -------------------------------------------------------------------------------------------------------


def test_jobs_run_in_the_order_of_asking_and_each_asker_gets_its_own_answer():
    ran = []

    def job(session: Session, i: int) -> int:
        ran.append(i)
        return i * i

    async def test(worker: Worker) -> None:
        gate, first = await held(worker)
        tasks = [asyncio.create_task(worker.run("job", job, i)) for i in range(MAX_WAITING)]
        await asyncio.sleep(0)
        gate.open.set()
        assert await first == "done"
        assert await asyncio.gather(*tasks) == [i * i for i in range(MAX_WAITING)]
        assert ran == list(range(MAX_WAITING))

    driven(test)


def test_one_more_than_the_places_is_refused_and_hurts_no_other():
    async def test(worker: Worker) -> None:
        gate, first = await held(worker)
        tasks = [asyncio.create_task(worker.run("job", echo, i)) for i in range(MAX_WAITING + 3)]
        await until(lambda: sum(task.done() for task in tasks) == 3)
        refused = [task for task in tasks if task.done()]
        assert refused == tasks[-3:]
        assert all(isinstance(task.exception(), Busy) for task in refused)
        assert worker.progress()["queued"] == MAX_WAITING
        gate.open.set()
        assert await asyncio.gather(first, *tasks[:-3]) == ["done", *range(MAX_WAITING)]

    driven(test)


def test_whoever_leaves_the_queue_frees_a_place_at_once_and_never_runs():
    ran = []

    async def test(worker: Worker) -> None:
        gate, first = await held(worker)
        tasks = [asyncio.create_task(worker.run("job", lambda session: ran.append(1))) for _ in range(MAX_WAITING)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert worker.progress()["queued"] == 0
        last = asyncio.create_task(worker.run("last", echo, "here"))
        gate.open.set()
        assert await asyncio.gather(first, last) == ["done", "here"]
        assert ran == []

    driven(test)


def test_a_running_job_whose_asker_leaves_ends_at_its_next_step():
    async def test(worker: Worker) -> None:
        gate, first = await held(worker)
        first.cancel()
        assert await asyncio.wait_for(worker.run("next", echo, 1), 1) == 1
        assert gate.ended == "cancelled"
        assert worker.progress()["running"] is None

    driven(test)


def test_a_job_goes_to_the_thread_only_when_the_one_before_has_ended():
    """An asker who leaves does not make two jobs overlap."""
    inside, most, gate = [], [], threading.Event()

    def stubborn(session: Session) -> None:
        inside.append(1)
        most.append(len(inside))
        gate.wait(10)
        inside.pop()

    async def test(worker: Worker) -> None:
        for _ in range(3):
            gate.clear()
            task = asyncio.create_task(worker.run("stubborn", stubborn))
            await until(lambda: len(inside) == 1)
            task.cancel()
            queued = asyncio.create_task(worker.run("stubborn", stubborn))
            await asyncio.sleep(0.02)
            assert worker.progress()["queued"] == 1
            gate.set()
            await queued

    driven(test)
    assert most == [1] * 6


def test_a_hundred_who_leave_leave_no_thread_behind():
    async def test(worker: Worker) -> None:
        await worker.run("start", echo, 0)
        n_threads = threading.active_count()
        for _ in range(100):
            gate, task = await held(worker)
            task.cancel()
            await until(lambda gate=gate: gate.ended == "cancelled")
        assert await worker.run("after", echo, 5) == 5
        assert threading.active_count() == n_threads

    driven(test)


ENDINGS = [ValueError, MemoryError, SystemExit, KeyboardInterrupt, StopIteration, GeneratorExit, asyncio.CancelledError]


@pytest.mark.parametrize("kind", [*ENDINGS, ConfigError])
def test_an_error_reaches_its_asker_alone_and_the_next_job_runs(kind: type[BaseException]):
    def fails(session: Session) -> None:
        raise kind("field", "problem") if kind is ConfigError else kind("no")

    async def test(worker: Worker) -> None:
        results = await asyncio.gather(
            worker.run("before", echo, 1),
            worker.run("fails", fails),
            worker.run("after", echo, 2),
            return_exceptions=True,
        )
        assert results[::2] == [1, 2]
        wanted = kind if kind in (ValueError, MemoryError, ConfigError) else RuntimeError
        assert type(results[1]) is wanted

    driven(test)


def test_the_event_loop_goes_on_while_a_job_runs():
    async def test(worker: Worker) -> None:
        task, ticks = asyncio.create_task(worker.run("sleep", lambda session: time.sleep(0.3))), 0
        while not task.done():
            await asyncio.sleep(0.01)
            ticks += 1
        assert ticks > 5

    driven(test)


def test_jobs_share_one_thread_which_takes_no_gradients():
    def where(session: Session) -> tuple[int, bool]:
        return threading.get_ident(), torch.is_grad_enabled()

    async def test(worker: Worker) -> None:
        found = {await worker.run("where", where) for _ in range(5)}
        (thread, grad) = found.pop()
        assert (found, grad) == (set(), False)
        assert thread != threading.get_ident()

    driven(test)


def test_progress_says_what_runs_how_far_it_is_and_how_many_wait():
    def job(session: Session, gate: Gate) -> None:
        session.expect(3)
        session.step()
        session.step()
        gate.entered.set()
        gate.open.wait(10)

    async def test(worker: Worker) -> None:
        assert worker.progress() == {"queued": 0, "running": None, "lm": "absent"}
        gate = Gate()
        tasks = [asyncio.create_task(worker.run("prompt", job, gate)) for _ in range(3)]
        await until(gate.entered.is_set)
        assert worker.progress() == {
            "queued": 2,
            "running": {"what": "prompt", "done": 2, "of": 3},
            "lm": "absent",
        }
        gate.open.set()
        await asyncio.gather(*tasks)
        assert worker.progress()["running"] is None

    driven(test)


def test_a_closed_worker_ends_what_runs_and_refuses_what_comes():
    async def test(worker: Worker) -> None:
        _, first = await held(worker)
        worker.close()
        with pytest.raises(Cancelled):
            await first
        for _ in range(2):
            with pytest.raises(RuntimeError):
                await worker.run("late", echo, 1)

    driven(test)


# ---- the models ------------------------------------------------------------------------------------------------------


def test_the_language_model_is_loaded_once_and_only_when_it_is_needed(tiny_run: Path, monkeypatch):
    loaded = []
    load = LanguageModel.from_pretrained

    def counted(*args: Any, **kw: Any) -> LanguageModel:
        loaded.append(worker_states[-1].progress()["lm"])
        return load(*args, **kw)

    worker_states: list[Worker] = []
    monkeypatch.setattr(inference.LanguageModel, "from_pretrained", counted)

    async def test(worker: Worker) -> None:
        worker_states.append(worker)
        await worker.run("nothing", echo, 1)
        assert (loaded, worker.progress()["lm"]) == ([], "absent")
        for _ in range(3):
            await worker.run("prompt", lambda session: session.code_of(PROMPT).n_bytes)
        assert (loaded, worker.progress()["lm"]) == (["loading"], "ready")

    driven(test, Shelf.of_run(tiny_run))


def test_what_is_loaded_settles_once_when_the_language_model_is_there(tiny_run: Path):
    settled: list[int] = []

    async def test() -> None:
        worker = Worker(Shelf.of_run(tiny_run), settle=lambda: settled.append(1))
        await worker.run("nothing", echo, 1)
        assert settled == []
        for text in ("a", "b"):
            await worker.run("prompt", lambda session, text=text: session.code_of(text).n_bytes)
        worker.close()

    asyncio.run(test())
    assert settled == [1]


def test_a_language_model_that_cannot_be_had_is_asked_for_again(tiny_run: Path, tmp_path: Path):
    shelf = Shelf.of_run(tiny_run)
    there, shelf.lm_name = shelf.lm_name, str(tmp_path / "nowhere")

    async def test(worker: Worker) -> None:
        for _ in range(2):
            with pytest.raises(ModelError, match="nowhere"):
                await worker.run("prompt", lambda session: session.code_of(PROMPT))
            assert worker.progress()["lm"] == "absent"
        shelf.lm_name = there
        await worker.run("prompt", lambda session: session.code_of(PROMPT))
        assert worker.progress()["lm"] == "ready"

    driven(test, shelf)


def test_what_does_not_fit_together_is_refused(tiny_run: Path, tmp_path: Path):
    shelf = Shelf.of_run(tiny_run)
    other = str(save_tiny_lm(tmp_path / "other", n_layers=4))
    cases = [replace(shelf, lm_name=other), replace(shelf, lm_name=None), replace(shelf, sae=None)]
    for case, words in zip(cases, ("has layers 0-3", "--lm", "saved none"), strict=True):
        with pytest.raises(ModelError, match=words):
            driven(lambda worker: worker.run("prompt", lambda session: session.code_of(PROMPT)), case)


def test_an_sae_that_takes_the_place_of_another_is_read_with_from_then_on(tiny_lm: LanguageModel):
    shelf = Shelf(made_sae(), tiny_lm.name)
    session = session_of(shelf, tiny_lm)
    before = session.code_of(PROMPT)
    shelf.sae = made_sae("none")
    after = session.code_of(PROMPT)
    assert session.sae() is shelf.sae
    assert not torch.equal(before.values, after.values)


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_answers_to_many_at_once_are_those_to_one_alone(tiny_lm: LanguageModel, tiny_run: Path):
    shelf = Shelf.of_run(tiny_run)
    texts = [PROMPT, "dogs ran far", "x", "<|endoftext|> moon light moon"]
    wanted = {text: session_of(shelf, tiny_lm).code_of(text) for text in texts}

    async def test(worker: Worker) -> None:
        worker._max_waiting = 200
        asked = [texts[i % 4] for i in range(120)]
        found = await asyncio.gather(*(worker.run("p", lambda session, t: session.code_of(t), text) for text in asked))
        for text, code in zip(asked, found, strict=True):
            assert code.ids == wanted[text].ids
            assert torch.equal(code.values, wanted[text].values)
            assert torch.equal(code.indices, wanted[text].indices)

    driven(test, shelf)


def test_a_prompt_asked_for_again_is_not_read_again(tiny_lm: LanguageModel, monkeypatch):
    session, reads = session_of(Shelf(made_sae()), tiny_lm), []
    read = inference.read
    monkeypatch.setattr(inference, "read", lambda *args: reads.append(1) or read(*args))
    first = session.code_of(PROMPT)
    assert session.code_of(PROMPT) is first
    assert len(reads) == 1


def test_the_cache_is_bounded_in_bytes_and_drops_what_was_not_asked_for_longest(tiny_lm: LanguageModel):
    session = session_of(Shelf(made_sae()), tiny_lm)
    shared = session._shared
    size = session.code_of("aaaa").n_bytes + 4 * 4
    shared._cache_bytes = 3 * size
    session.code_of("bbbb")
    session.code_of("cccc")
    session.code_of("aaaa")
    session.code_of("dddd")
    assert list(shared._codes) == ["cccc", "aaaa", "dddd"]
    session.code_of("e" * 60)
    assert list(shared._codes) == ["cccc", "aaaa", "dddd"]
    assert shared.cache_bytes <= 3 * size


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("ab\ud800c", "character 2"),
        ("\udfff", "character 0"),
        ("a" * (MAX_TEXT_BYTES + 1), "65,537 bytes; at most 65,536"),
        ("é" * (MAX_TEXT_BYTES // 2 + 1), "65,538 bytes"),
        ("a" * 65, "65 tokens; tiny-llama is given at most 64"),
        ("a" * 200, "200 tokens"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_refused_with_limit_and_count(tiny_lm: LanguageModel, text: str, words: str):
    with pytest.raises(ConfigError, match=f"text: .*{words}"):
        session_of(Shelf(made_sae()), tiny_lm).code_of(text)


@pytest.mark.parametrize("text", ["a" * 64, "a", "\x00", "\u202e", "👩‍👩‍👧", "\u2028<|endoftext|>"])
def test_any_other_text_is_read(tiny_lm: LanguageModel, text: str):
    code = session_of(Shelf(made_sae()), tiny_lm).code_of(text)
    assert len(code.ids) == len(code.strings) == code.values.shape[1] == len(code.visible)


def test_a_job_given_up_while_a_prompt_is_read_ends(tiny_lm: LanguageModel):
    session = session_of(Shelf(made_sae()), tiny_lm)
    session.cancelled = True
    with pytest.raises(Cancelled):
        session.code_of(PROMPT)
    assert session._shared.cached(PROMPT) is None
