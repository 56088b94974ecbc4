"""The order of measuring: rounds at each level of concurrency, every side in every round, the first place rotating.

Invariants: within one round all sides answer the same prompts in the same order; every prompt was asked once of every
side before anything is timed, so all prefix caches are equally warm.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

from tests.bench.client import Sample, Side, complete, open_client

MIN_PROMPTS = 4  # of one round
WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure."""

    prompts: tuple[str, ...]
    concurrencies: tuple[int, ...] = (1, 4, 16)
    num_rounds: int = 3
    max_tokens: int = 96

    def prompts_of(self, concurrency: int, index: int) -> list[str]:
        """Two waves of `concurrency` or, where the list is too short, one; each round moves on in the list."""
        count = max(concurrency, min(2 * concurrency, len(self.prompts)), MIN_PROMPTS)
        return [self.prompts[(index * count + i) % len(self.prompts)] for i in range(count)]


@dataclass(frozen=True, slots=True)
class Round:
    """One side, one level of concurrency, once."""

    side: str
    concurrency: int
    index: int
    seconds: float
    samples: tuple[Sample, ...]

    @property
    def tokens_per_second(self) -> float:
        return sum(sample.num_tokens for sample in self.samples) / self.seconds

    @property
    def first_token_seconds(self) -> float:
        return median(sample.first_token_seconds for sample in self.samples)


async def measure(sides: Sequence[Side], plan: Plan) -> AsyncIterator[Round]:
    """Warm up, then yield every round as it ends. Raises BenchError if any request fails."""
    for side in sides:
        await run(side, plan.prompts, max(plan.concurrencies), WARM_UP_TOKENS)
    for concurrency in plan.concurrencies:
        for index in range(plan.num_rounds):
            prompts = plan.prompts_of(concurrency, index)
            for side in rotated(sides, index):
                seconds, samples = await run(side, prompts, concurrency, plan.max_tokens)
                yield Round(side.name, concurrency, index, seconds, samples)


def rotated(sides: Sequence[Side], turns: int) -> list[Side]:
    """`sides` with another one in the first place each turn."""
    turns %= len(sides)
    return [*sides[turns:], *sides[:turns]]


async def run(
    side: Side, prompts: Sequence[str], concurrency: int, max_tokens: int
) -> tuple[float, tuple[Sample, ...]]:
    """Ask all `prompts`, at most `concurrency` at a time. Returns the wall seconds and the answers in order."""
    gate = asyncio.Semaphore(concurrency)

    async def ask(prompt: str) -> Sample:
        async with gate:
            return await complete(client, side, prompt, max_tokens)

    async with open_client() as client:
        started = perf_counter()
        samples = await asyncio.gather(*map(ask, prompts))
        return perf_counter() - started, tuple(samples)
