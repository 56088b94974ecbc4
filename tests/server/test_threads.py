"""Large requests share few threads; small ones do not wait for them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from scripted import ScriptedEngine, app_of, byte_tokenizer, client_of

from server.openai import completions
from server.openai.service import Service
from server.threads import LARGE_BYTES, NUM_LARGE, Threads
from server.visit import Visit, current


@contextmanager
def visited(num_bytes: int) -> Iterator[None]:
    from server import visit

    token = visit._current.set(Visit("id", "POST", "/", None, num_bytes=num_bytes))
    try:
        yield
    finally:
        visit._current.reset(token)


async def test_large_work_is_bounded_and_small_work_passes_it() -> None:
    threads, gate, begun = Threads(), threading.Event(), threading.Semaphore(0)

    def wait() -> int:
        begun.release()
        assert gate.wait(10)
        visit = current()
        return 0 if visit is None else visit.num_bytes

    with visited(LARGE_BYTES):
        large = [asyncio.create_task(threads.run(wait)) for _ in range(NUM_LARGE + 3)]
        await asyncio.sleep(0.05)
    for _ in range(NUM_LARGE):
        assert begun.acquire(timeout=5)
    assert not begun.acquire(timeout=0.05)
    with visited(LARGE_BYTES - 1):
        assert await threads.run(lambda: "small") == "small"
    large[-1].cancel()
    await asyncio.wait(large[-1:])  # until then a thread that is free may still begin it
    gate.set()
    results = await asyncio.gather(*large, return_exceptions=True)
    assert results[:-1] == [LARGE_BYTES] * (NUM_LARGE + 2)
    assert isinstance(results[-1], asyncio.CancelledError)
    assert sum(begun.acquire(timeout=0.01) for _ in range(5)) == 2  # the cancelled one was never begun
    threads.close()


async def test_a_long_prompt_goes_where_large_work_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    prepare = completions._prepare

    def noted(*args: object) -> object:
        names.append(threading.current_thread().name.split("_")[0])
        return prepare(*args)

    monkeypatch.setattr(completions, "_prepare", noted)
    async with client_of(app_of(ScriptedEngine(max_model_len=10**6))) as client:
        for size in (10, LARGE_BYTES):
            response = await client.post("/v1/completions", json={"prompt": "x" * size, "max_tokens": 5})
            assert response.status_code == 200
    assert names == ["asyncio", "large"]


def test_tokenizing_lets_other_threads_run() -> None:
    tokenizer = byte_tokenizer()
    text = "x" * 1_000_000
    done = threading.Event()
    thread = threading.Thread(target=lambda: (tokenizer.encode(text), done.set()))
    thread.start()
    ticks = 0
    while not done.wait(0.001):
        ticks += 1
    thread.join()
    assert ticks > 5


async def test_the_end_of_the_application_closes_its_threads() -> None:
    app = app_of(ScriptedEngine())
    service: Service = app.state.service
    async with app.router.lifespan_context(app):
        pass
    with visited(LARGE_BYTES), pytest.raises(RuntimeError, match="shutdown"):
        await service.threads.run(int)
