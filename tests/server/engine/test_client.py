"""The engine's process seen from asyncio, with small workers in place of the engine."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from server.engine import client as client_module
from server.engine.client import EngineClient
from server.engine.messages import (
    Abort,
    ControllerState,
    Delta,
    EngineConfig,
    Failed,
    ModelInfo,
    Ready,
    SamplingParams,
    Shutdown,
    StepOutput,
    Steps,
    StepStats,
    Submit,
    TokenLogprobs,
)
from server.errors import EngineDeadError, StartupError

CRASH = 666
INFO = ModelInfo("", 10, 100, (0,), 0, 1000, "cpu", "float32", "none")


def echo(config: EngineConfig, inbox: Connection, outbox: Connection) -> None:
    """Answers every prompt with itself, one token a step; dies at CRASH."""
    outbox.send(Ready(INFO))
    while not isinstance(message := inbox.recv(), Shutdown):
        if isinstance(message, Submit):
            for n, token in enumerate(message.prompt, 1):
                if token == CRASH:
                    os._exit(3)
                finish = "stop" if n == len(message.prompt) else None
                outbox.send(
                    Steps(
                        (StepOutput((Delta(message.request_id, (token,), finish=finish),), StepStats(num_running=1)),)
                    )
                )


def slow(config: EngineConfig, inbox: Connection, outbox: Connection) -> None:
    """One token and then silence; writes what it hears into the file that the configuration calls the model."""
    outbox.send(Ready(INFO))
    while not isinstance(message := inbox.recv(), Shutdown):
        with Path(config.model).open("a") as log:
            log.write(f"{type(message).__name__} {message.request_id}\n")
        if isinstance(message, Submit):
            outbox.send(Steps((StepOutput((Delta(message.request_id, (1,)),), StepStats()),)))
        if isinstance(message, Abort):
            outbox.send(Steps((StepOutput((Delta(message.request_id, finish="abort"),), StepStats()),)))


def torrent(config: EngineConfig, inbox: Connection, outbox: Connection) -> None:
    """Answers with one token at a time and far more log-probabilities than fit into a pipe; then dies."""
    outbox.send(Ready(INFO))
    name = inbox.recv().request_id
    top = tuple((token, -1.0) for token in range(20_000))
    first = TokenLogprobs(0, -1.0, top)
    outbox.send(Steps((StepOutput((Delta(name, (0,), (first,), prompt_logprobs=(None,)),), StepStats()),)))
    for token in range(1, 5):
        outbox.send(Steps((StepOutput((Delta(name, (token,), (TokenLogprobs(token, -1.0, top),)),), StepStats()),)))
    inbox.recv()
    os._exit(3)


def telling(config: EngineConfig, inbox: Connection, outbox: Connection) -> None:
    """Every second step tells what it knows, with the prompt's token as its error; dies at CRASH."""
    outbox.send(Ready(INFO))
    while not isinstance(message := inbox.recv(), Shutdown):
        if isinstance(message, Submit):
            token = message.prompt[0]
            if token == CRASH:
                os._exit(3)
            state = ControllerState((), (), (), (), (), (), float(token), (), (), ())
            outbox.send(Steps((StepOutput((Delta(message.request_id, (token,)),), StepStats(controller=state)),)))
            outbox.send(Steps((StepOutput((Delta(message.request_id, (token,), finish="stop"),), StepStats()),)))


def refusing(config: EngineConfig, inbox: Connection, outbox: Connection) -> None:
    outbox.send(Failed("No such device: pass --device cpu."))


def dying(config: EngineConfig, inbox: Connection, outbox: Connection) -> None:
    os._exit(9)


def ready_once(config: EngineConfig, inbox: Connection, outbox: Connection) -> None:
    """Ready in its first life; every later one fails to start."""
    if Path(config.model).exists():
        outbox.send(Failed("Out of memory."))
        return
    Path(config.model).touch()
    outbox.send(Ready(INFO))


def deaf(config: EngineConfig, inbox: Connection, outbox: Connection) -> None:
    outbox.send(Ready(INFO))
    time.sleep(600)


def stuck_once(config: EngineConfig, inbox: Connection, outbox: Connection) -> None:
    """In its first life begins every request and reads no more; later it echoes."""
    if Path(config.model).exists():
        echo(config, inbox, outbox)
        return
    Path(config.model).touch()
    outbox.send(Ready(INFO))
    outbox.send(Steps((StepOutput((Delta(inbox.recv().request_id, (7,)),), StepStats()),)))
    time.sleep(600)


def submit(name: str, *prompt: int) -> Submit:
    return Submit(name, prompt, SamplingParams(max_tokens=16))


async def collect(engine: EngineClient, name: str, *prompt: int) -> list[int]:
    return [token async for delta in engine.generate(submit(name, *prompt)) for token in delta.token_ids]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  what it waits for tells nobody
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running(engine: EngineClient) -> AsyncIterator[EngineClient]:
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def test_requests_are_answered_side_by_side() -> None:
    steps: list[StepStats] = []
    async with running(EngineClient(EngineConfig(""), target=echo, on_step=steps.append)) as engine:
        assert (engine.status, engine.info) == ("ready", INFO)
        prompts = [range(n, n + 5) for n in range(20)]
        answers = await asyncio.gather(*(collect(engine, str(n), *prompt) for n, prompt in enumerate(prompts)))
        assert answers == [list(prompt) for prompt in prompts]
        assert sum(step.num_running for step in steps) == 100
    assert engine.status == "dead"
    with pytest.raises(EngineDeadError, match="dead"):
        await collect(engine, "late", 1)


async def test_a_crash_fails_the_open_requests_and_the_engine_comes_back() -> None:
    restarts: list[None] = []
    async with running(EngineClient(EngineConfig(""), target=echo, on_restart=lambda: restarts.append(None))) as engine:
        with pytest.raises(EngineDeadError, match="restarted"):
            await collect(engine, "bad", 1, CRASH, 2)
        assert engine.status == "restarting"
        with pytest.raises(EngineDeadError, match="restarting"):
            await collect(engine, "early", 1)
        await until(lambda: engine.status == "ready")
        assert await collect(engine, "good", 1, 2) == [1, 2]
        assert len(restarts) == 1


async def test_the_last_state_is_kept_and_dies_with_its_process() -> None:
    async with running(EngineClient(EngineConfig(""), target=telling)) as engine:
        assert engine.controller is None
        for token in (1, 2):
            assert await collect(engine, str(token), token) == [token, token]
            assert engine.controller is not None
            assert engine.controller.calibration_error == token
        with pytest.raises(EngineDeadError):
            await collect(engine, "bad", CRASH)
        await until(lambda: engine.status == "ready")
        assert engine.controller is None


async def test_leaving_a_request_early_aborts_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with running(EngineClient(EngineConfig(str(log)), target=slow)) as engine:
        closed = engine.generate(submit("closed", 1))
        assert (await anext(closed)).token_ids == (1,)
        await closed.aclose()
        cancelled = asyncio.create_task(collect(engine, "cancelled", 1))
        await until(lambda: "Submit cancelled" in log.read_text())
        cancelled.cancel()
        await until(lambda: "Abort cancelled" in log.read_text())
        assert log.read_text().split("\n")[1] == "Abort closed"
        again = engine.generate(submit("closed", 1))
        assert (await anext(again)).finish is None  # the late terminal delta of the first is not the second's
        await again.aclose()


async def test_a_reader_that_falls_behind_finds_all_it_has_missed() -> None:
    steps: list[StepStats] = []
    async with running(EngineClient(EngineConfig(""), target=torrent, on_step=steps.append)) as engine:
        request = engine.generate(submit("a", 1))
        deltas = [await anext(request)]
        await until(lambda: len(steps) == 5)
        deltas.append(await anext(request))
        assert len(deltas) == 2
        assert [token for delta in deltas for token in delta.token_ids] == [0, 1, 2, 3, 4]
        assert [scored.token_id for delta in deltas for scored in delta.logprobs] == [0, 1, 2, 3, 4]
        assert all(len(scored.top) == 20_000 for delta in deltas for scored in delta.logprobs)
        assert deltas[0].prompt_logprobs == (None,)
        engine.abort("a")
        with pytest.raises(EngineDeadError):
            await anext(request)


async def test_what_came_before_the_end_of_the_engine_is_told_before_it() -> None:
    async with running(EngineClient(EngineConfig(""), target=echo)) as engine:
        request = engine.generate(submit("a", 1, 2, CRASH))
        reader = asyncio.create_task(anext(request))
        await until(lambda: engine.status == "restarting")
        assert (await reader).token_ids[0] == 1
        with pytest.raises(EngineDeadError, match="restarted"):
            [None async for _ in request]


async def test_an_aborted_request_is_heard_to_its_end(tmp_path: Path) -> None:
    async with running(EngineClient(EngineConfig(str(tmp_path / "log")), target=slow)) as engine:
        request = engine.generate(submit("a", 1))
        await anext(request)
        engine.abort("a")
        assert [delta.finish async for delta in request] == ["abort"]


async def test_an_aborted_request_goes_on_to_its_terminal_delta(tmp_path: Path) -> None:
    async with running(EngineClient(EngineConfig(str(tmp_path / "log")), target=slow)) as engine:
        request = engine.generate(submit("open", 1))
        assert (await anext(request)).finish is None
        engine.abort("open")
        assert [delta.finish async for delta in request] == ["abort"]


async def test_a_finished_request_is_not_aborted() -> None:
    sent: list[object] = []
    async with running(EngineClient(EngineConfig(""), target=echo)) as engine:
        assert engine._process is not None
        send = engine._process.send
        engine._process.send = lambda message: (sent.append(message), send(message))[1]  # type: ignore[method-assign]
        request = engine.generate(submit("done", 1))
        assert (await anext(request)).finish == "stop"
        await request.aclose()
        assert [type(message) for message in sent] == [Submit]


@pytest.mark.parametrize(("worker", "sentence"), [(refusing, "--device cpu"), (dying, "died while it was starting")])
async def test_an_engine_that_cannot_start_says_why(worker: client_module.Target, sentence: str) -> None:
    with pytest.raises(StartupError, match=sentence):
        await EngineClient(EngineConfig(""), target=worker).start()


async def test_an_engine_that_keeps_dying_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_BACKOFF_SECONDS", 0.0)
    monkeypatch.setattr(client_module, "MAX_DEATHS", 3)
    restarts: list[None] = []
    deaths: list[None] = []
    client = EngineClient(
        EngineConfig(str(tmp_path / "born")),
        target=ready_once,
        on_restart=lambda: restarts.append(None),
        on_dead=lambda: deaths.append(None),
    )
    async with running(client) as engine:
        await until(lambda: engine.status == "dead")
        assert len(restarts) == 2
        assert len(deaths) == 1


async def test_stop_kills_a_process_that_does_not_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "STOP_SECONDS", 0.1)
    engine = EngineClient(EngineConfig(""), target=deaf)
    await engine.start()
    assert engine._process is not None
    open_request = asyncio.create_task(collect(engine, "open", 1))
    await asyncio.sleep(0)
    await engine.stop()
    with pytest.raises(EngineDeadError, match="stopped"):
        await open_request
    assert engine._process.exit_code == -signal.SIGKILL


async def test_a_cancelled_start_leaves_no_process() -> None:
    engine = EngineClient(EngineConfig(""), target=deaf)
    start = asyncio.create_task(engine.start())
    await asyncio.sleep(0)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert engine._process is not None
    assert engine._process.exit_code is not None


async def test_an_interrupt_is_the_parents_alone() -> None:
    async with running(EngineClient(EngineConfig(""), target=echo)) as engine:
        assert engine._process is not None
        os.kill(engine._process._process.pid or 0, signal.SIGINT)
        assert await collect(engine, "alive", 1) == [1]


async def test_an_engine_that_hangs_is_killed_and_started_again(tmp_path: Path) -> None:
    restarts: list[None] = []
    client = EngineClient(
        EngineConfig(str(tmp_path / "born")),
        target=stuck_once,
        timeout_seconds=0.5,
        on_restart=lambda: restarts.append(None),
    )
    async with running(client) as engine:
        await asyncio.sleep(1)
        assert engine.status == "ready"  # without work silence means nothing
        request = engine.generate(submit("stuck", 1))
        assert (await anext(request)).token_ids == (7,)
        started = time.monotonic()
        long_prompts = [asyncio.create_task(collect(engine, str(n), *range(50_000))) for n in range(5)]
        with pytest.raises(EngineDeadError, match="restarted"):
            await anext(request)
        assert 0.4 < time.monotonic() - started < 5
        assert all(
            isinstance(end, EngineDeadError) for end in await asyncio.gather(*long_prompts, return_exceptions=True)
        )
        await until(lambda: engine.status == "ready")
        assert await collect(engine, "good", 1, 2) == [1, 2]
        assert len(restarts) == 1
