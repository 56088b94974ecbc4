"""A crowd comes and goes: 2 clients, then 64, then 2 again, and how soon the server is as fast as it will be.

Each client asks one question after the other. Tokens are those that the server has counted, by windows of half a
second.

Invariant: every answer that was not cut off is complete, or BenchError is raised.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from statistics import median
from time import perf_counter
from types import TracebackType

import httpx

from tests.bench.client import BenchError, Prompt, Side, read, record
from tests.bench.told import TOKENS, parse

FEW, MANY = 2, 64  # clients
PHASE_SECONDS = 20.0
WINDOW_SECONDS = 0.5
SETTLED = 0.1  # of the steady speed
SMOOTH = 3  # windows, whose median is compared


@dataclass(frozen=True, slots=True)
class Window:
    """Seconds since the number of clients changed, and the tokens between them."""

    begin: float
    end: float
    tokens: float

    @property
    def speed(self) -> float:
        return self.tokens / (self.end - self.begin)


@dataclass(frozen=True, slots=True)
class Phase:
    """A span with one number of clients. Speeds are in tokens per second."""

    side: str
    num_clients: int
    steady_speed: float  # median of the second half
    settled_seconds: float | None  # since the number changed; None: not within the phase
    windows: tuple[Window, ...]


async def jump(side: Side, prompts: Sequence[Prompt], max_tokens: int) -> list[Phase]:
    """Takes three times PHASE_SECONDS. Raises BenchError if a request fails or no tokens come."""
    found = []
    async with _Crowd(side, prompts, max_tokens) as crowd:
        for num_clients in (FEW, MANY, FEW):
            await crowd.resize(num_clients)
            found.append(phase(side.name, num_clients, await _watch(side.port, crowd)))
    return found


def phase(side: str, num_clients: int, windows: Sequence[Window]) -> Phase:
    """What the windows of one phase say."""
    speeds = [window.speed for window in windows]
    steady = median(speeds[len(speeds) // 2 :])
    if not steady:
        raise BenchError(f"{side} says nothing of tokens in {TOKENS}, or made none for {num_clients} clients")
    smooth = [median(speeds[i : i + SMOOTH]) for i in range(len(speeds) - SMOOTH + 1)]
    settled = (window.begin for window, speed in zip(windows, smooth, strict=False) if _is_near(speed, steady))
    return Phase(side, num_clients, steady, next(settled, None), tuple(windows))


def _is_near(speed: float, steady: float) -> bool:
    return abs(speed / steady - 1) <= SETTLED


class _Crowd:
    """Clients that ask until they are sent away."""

    def __init__(self, side: Side, prompts: Sequence[Prompt], max_tokens: int) -> None:
        self._side, self._prompts, self._max_tokens = side, prompts, max_tokens
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> _Crowd:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.resize(0)

    async def resize(self, num_clients: int) -> None:
        """Those who are sent away hang up."""
        leaving, self._tasks = self._tasks[num_clients:], self._tasks[:num_clients]
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        self._tasks += [asyncio.create_task(self._ask(i)) for i in range(len(self._tasks), num_clients)]

    def check(self) -> None:
        """Raise what a client has met."""
        for task in self._tasks:
            if task.done():
                task.result()

    async def _ask(self, first: int) -> None:
        for i in count(first):
            prompt = self._prompts[i % len(self._prompts)]
            read(self._side, await record(self._side, prompt, self._max_tokens))


async def _watch(port: int, crowd: _Crowd) -> list[Window]:
    """The windows of one phase, from now on."""
    windows: list[Window] = []
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
        started, (end, tokens) = perf_counter(), await _count(client)
        while (passed := end - started) < PHASE_SECONDS:
            await asyncio.sleep(max(started + (len(windows) + 1) * WINDOW_SECONDS - perf_counter(), 0))
            crowd.check()
            end, total = await _count(client)
            windows.append(Window(passed, end - started, total - tokens))
            tokens = total
    return windows


async def _count(client: httpx.AsyncClient) -> tuple[float, float]:
    """Now, and the tokens so far."""
    text = (await client.get("/metrics")).raise_for_status().text
    return perf_counter(), parse(text).tokens or 0.0
