"""A small storm in one process, where leaked tasks can be seen, on a real engine process without tensors."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path

import httpx
import psutil
import pytest
import uvicorn

from server.app import create_app
from server.engine.client import EngineClient
from server.engine.messages import EngineConfig
from server.metrics import Metrics
from server.options import DoorOptions, Limits
from server.text.prompt import Tokenizer
from tests.bench.fake_engine import KV_CACHE_TOKENS, run_engine, write_model
from tests.bench.storm import Broken, Plan, _code, _stream_end, _whole_end, settle, storm

OPTIONS = DoorOptions(limits=Limits(max_num_seqs=8, max_queued_requests=20))


@asynccontextmanager
async def serving(folder: Path, options: DoorOptions) -> AsyncIterator[tuple[str, EngineClient, uvicorn.Server]]:
    write_model(folder)
    metrics = Metrics("fake")
    config = EngineConfig(str(folder), kv_cache_tokens=KV_CACHE_TOKENS, max_num_seqs=8)
    engine = EngineClient(config, target=run_engine, on_step=metrics.on_step, on_restart=metrics.on_restart)
    await engine.start()
    app = create_app(engine, Tokenizer.from_folder(folder), model_name="fake", metrics=metrics, options=options)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none", timeout_graceful_shutdown=5))
    server.capture_signals = nullcontext  # type: ignore[method-assign, assignment]
    task = asyncio.create_task(server.serve())
    try:
        async with asyncio.timeout(10):
            while not server.started:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", engine, server
    finally:
        server.should_exit = True
        await task


async def kill(engine: EngineClient) -> None:
    """Once it is ready."""
    async with asyncio.timeout(20):
        while engine.status != "ready":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert engine._process is not None
    engine._process.kill()


async def open_things() -> tuple[int, int]:
    await asyncio.sleep(0.3)
    return len(asyncio.all_tasks()), psutil.Process(os.getpid()).num_fds()


@pytest.mark.timeout(120)
async def test_after_a_storm_everything_is_as_it_was(tmp_path: Path) -> None:
    async with serving(tmp_path / "model", OPTIONS) as (url, engine, server):
        warm_up = await storm(url, "fake", Plan(num_clients=4, num_requests=8, leaving=0, wrong=0), {})
        assert warm_up.ends == {"answered": 8}
        before = await open_things()
        plan = Plan(num_clients=40, num_requests=400, wrong=0.1, patience=0.5, seed=3)
        kills: list[asyncio.Task[None]] = []
        milestones = dict.fromkeys((80, 200), lambda: kills.append(asyncio.create_task(kill(engine))))
        tally = await storm(url, "fake", plan, milestones)
        await asyncio.gather(*kills)
        assert await settle(url) < 2
        assert tally.broken == []
        assert tally.num_done == 400
        assert {"answered", "left", "400 invalid_value", "429 rate_limit_exceeded"} <= tally.ends.keys()
        assert any("engine_dead" in end for end in tally.ends)
        admission = server.config.app.state.service.admission  # type: ignore[union-attr]
        assert (admission.num_open, admission.num_waiting, admission.num_waiting_tokens) == (0, 0, 0)
        assert engine._requests == {}
        async with asyncio.timeout(20):
            while engine.status != "ready":  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert await open_things() == before
        async with httpx.AsyncClient() as client:
            page = (await client.get(f"{url}/metrics")).text
        assert 'medusa_engine_restarts_total{model_name="fake"} 2.0' in page


def test_what_is_no_answer_is_told() -> None:
    chunk = 'data: {"choices": [{"index": 0, "finish_reason": %s}]}\n\n'
    error = 'data: {"error": {"message": "m", "type": "t", "param": null, "code": "engine_dead"}}\n\n'
    done = "data: [DONE]\n\n"
    assert _stream_end(chunk % "null" + chunk % '"stop"' + done, 1) == "answered"
    assert _stream_end(chunk % "null" + error + done, 1) == "stream engine_dead"
    for text in (chunk % '"stop"', chunk % "null" + done, chunk % '"stop"' + chunk % '"stop"' + done, ""):
        with pytest.raises(Broken):
            _stream_end(text, 1)
    with pytest.raises(Broken):
        _whole_end({"choices": [{"finish_reason": None}]}, 1)
    with pytest.raises(Broken):
        _code({"error": {"message": "m"}})
    error_body = {"error": {"message": "m", "type": "t", "param": None, "code": "c"}}
    assert _code(error_body, httpx.Response(400)) == "c"
    with pytest.raises(Broken, match="without a code"):
        _code({"error": error_body["error"] | {"code": None}}, httpx.Response(400))
    with pytest.raises(Broken, match="Retry-After"):
        _code(error_body, httpx.Response(503))
