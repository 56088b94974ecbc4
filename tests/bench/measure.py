"""The order of measuring: rounds at each number of streams, every side in every round, the first place rotating.

Invariants: every side has answered before anything is timed, and by its own count of their tokens it saw the same
prompts as the others; only the side whose turn it is may be awake.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from time import perf_counter, process_time

from tests.bench.client import BenchError, Prompt, Recording, Sample, Side, read, record
from tests.bench.workload import Plan

WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Round:
    """One side, one number of streams, once. `client_seconds` is the processor time that asking itself took."""

    side: str
    concurrency: int
    index: int
    seconds: float
    client_seconds: float
    samples: tuple[Sample, ...]

    @property
    def tokens_per_second(self) -> float:
        return sum(sample.num_tokens for sample in self.samples) / self.seconds

    @property
    def steady_tokens_per_second(self) -> float:
        """While all streams are busy: until fewer requests are left than streams. Each one's tokens come evenly.

        Answers of one length end together if nobody speculates, and one by one if somebody does; in a load that goes
        on, others would take their places.
        """
        begin = min(sample.started for sample in self.samples)
        end = sorted(sample.started + sample.seconds for sample in self.samples)[-self.concurrency :][0]
        return sum(sample.num_tokens * _share(sample, end) for sample in self.samples) / (end - begin)

    @property
    def tokens_per_second_per_stream(self) -> float:
        return median(sample.num_tokens / sample.seconds for sample in self.samples)

    @property
    def prompt_tokens_per_second(self) -> float:
        return median(sample.num_prompt_tokens / sample.first_token_seconds for sample in self.samples)

    @property
    def first_token_seconds(self) -> float:
        return median(sample.first_token_seconds for sample in self.samples)


def _share(sample: Sample, end: float) -> float:
    """Of its tokens, those that had come by `end`."""
    first, last = sample.started + sample.first_token_seconds, sample.started + sample.seconds
    if last <= end:
        return 1.0
    return (end - first) / (last - first) if first < end else 0.0


def always_awake(side: Side) -> AbstractContextManager[None]:
    """For sides that share one server."""
    return nullcontext()


async def measure(
    sides: Sequence[Side], plan: Plan, awake: Callable[[Side], AbstractContextManager[None]] = always_awake
) -> AsyncIterator[Round]:
    """Warm up, then yield every round as it ends. Raises BenchError if any request fails."""
    await warm_up(sides, plan, awake)
    for concurrency in plan.concurrencies:
        for index in range(plan.num_rounds):
            prompts = plan.prompts_of(concurrency, index)
            for side in rotated(sides, index):
                with awake(side):
                    yield await run(side, prompts, concurrency, plan.max_tokens, index)


async def warm_up(
    sides: Sequence[Side], plan: Plan, awake: Callable[[Side], AbstractContextManager[None]] = always_awake
) -> None:
    """Ask every prompt of the list once of every side. Raises BenchError if their chat templates differ."""
    counts: dict[str, list[int]] = {}
    for side in sides:
        with awake(side):
            done = await run(side, plan.prompts, max(plan.concurrencies), WARM_UP_TOKENS)
        counts[side.name] = [sample.num_prompt_tokens for sample in done.samples]
    first = sides[0].name
    for name, count in counts.items():
        if count != counts[first]:
            raise BenchError(f"{name} made {count} tokens of the prompts of which {first} made {counts[first]}")


def rotated(sides: Sequence[Side], turns: int) -> list[Side]:
    """`sides` with another one in the first place each turn."""
    turns %= len(sides)
    return [*sides[turns:], *sides[:turns]]


async def run(side: Side, prompts: Sequence[Prompt], concurrency: int, max_tokens: int, index: int = 0) -> Round:
    """Ask all `prompts`, at most `concurrency` at a time. The samples are in the prompts' order."""
    gate = asyncio.Semaphore(concurrency)

    async def ask(prompt: Prompt) -> Recording:
        async with gate:
            return await record(side, prompt, max_tokens)

    started, busy = perf_counter(), process_time()
    recordings = await asyncio.gather(*map(ask, prompts))
    seconds, client_seconds = perf_counter() - started, process_time() - busy
    samples = tuple(read(side, recording) for recording in recordings)
    return Round(side.name, concurrency, index, seconds, client_seconds, samples)
