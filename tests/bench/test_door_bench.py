"""The benchmark of refusals, on a scripted engine."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.bench.client import BenchError
from tests.bench.door import measure, parse, percentiles, post, refused
from tests.server.scripted import ScriptedEngine, app_of, live, say

ARGS = parse(["--streams", "2", "--long", "1", "--probes", "20", "--kilobytes", "5"])


def test_each_situation_is_one_line() -> None:
    async def lines(port: int) -> list[str]:
        return [line async for line in measure(port, ARGS)]

    engine = ScriptedEngine(lambda submit: say(submit, "x" * 500), max_model_len=1000)
    with live(app_of(engine)) as url:
        idle, busy, long, own = asyncio.run(lines(httpx.URL(url).port or 0))
    assert idle.startswith("a 400, server idle: p50 ")
    assert busy.startswith("a 400, 2 streams: p50 ")
    assert long.startswith("a 400, 2 streams and 1 prompts of 5 kB at a time: p50 ")
    assert own.startswith("    those prompts' own 400")
    assert all(line.endswith("(20 requests)") for line in (idle, busy, long))


def test_streams_that_are_refused_and_refusals_that_are_answered_are_errors() -> None:
    async def all_lines(port: int) -> None:
        async for _ in measure(port, ARGS):
            pass

    with live(app_of(ScriptedEngine(max_model_len=64))) as url:
        port = httpx.URL(url).port or 0
        with pytest.raises(BenchError, match="instead of a stream"):
            asyncio.run(all_lines(port))
        with pytest.raises(BenchError, match="instead of a 400"):
            asyncio.run(refused(port, post({"prompt": "Hi", "max_tokens": 5}), b""))


def test_percentiles_are_milliseconds() -> None:
    assert percentiles("name", [n / 1000 for n in range(1, 100)]) == (
        "name: p50 50.0 ms, p90 90.0 ms, p99 99.0 ms, max 99.0 ms (99 requests)"
    )
