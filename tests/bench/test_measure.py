"""The order of rounds, and what is checked before them; against a made-up server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.bench.client import BenchError, Prompt, Sample, Side
from tests.bench.fake_server import CHUNKS, USAGE, fake_server
from tests.bench.measure import WARM_UP_TOKENS, Round, measure, rotated, run
from tests.bench.workload import Plan

PROMPTS = tuple(Prompt(name) for name in "abcd")


def test_every_side_comes_first_in_turn() -> None:
    sides = [Side(name, 1, "model") for name in "abc"]
    assert ["".join(side.name for side in rotated(sides, turn)) for turn in range(4)] == ["abc", "bca", "cab", "abc"]


def answer(started: float, first: float, last: float, num_tokens: int = 100) -> Sample:
    return Sample(PROMPTS[0], "", 9, num_tokens, first - started, last - started, started=started)


def test_what_comes_when_streams_run_idle_does_not_count() -> None:
    samples = answer(100, 101, 110), answer(100, 101, 120), answer(110, 111, 131), answer(120, 121, 141)
    done = Round("side", 2, 0, 41.0, 0.1, samples)
    assert done.steady_tokens_per_second == pytest.approx((100 + 100 + 100 + 50) / 31)
    assert Round("side", 1, 0, 41.0, 0.1, samples).steady_tokens_per_second == pytest.approx(400 / 41)
    late = Round("side", 2, 0, 41.0, 0.1, (answer(100, 101, 110), answer(100, 115, 120)))
    assert late.steady_tokens_per_second == pytest.approx(100 / 10)


async def test_a_round_keeps_the_order_of_its_prompts() -> None:
    with fake_server() as (port, _):
        done = await run(Side("side", port, "model"), PROMPTS, 2, 96, index=3)
    assert (done.side, done.concurrency, done.index) == ("side", 2, 3)
    assert tuple(sample.prompt for sample in done.samples) == PROMPTS
    assert max(sample.seconds for sample in done.samples) <= done.seconds
    assert done.client_seconds > 0


async def test_all_sides_see_the_same_prompts_after_one_warm_up() -> None:
    plan = Plan(PROMPTS, concurrencies=(1,), num_rounds=2, max_tokens=5)
    with fake_server() as (port, bodies):
        sides = [Side(name, port, name) for name in ("plain", "medusa")]
        rounds = [item async for item in measure(sides, plan)]
    assert [(item.side, item.index) for item in rounds] == [("plain", 0), ("medusa", 0), ("medusa", 1), ("plain", 1)]
    asked = [(body["model"], body["max_tokens"]) for body in bodies]
    assert asked[:8] == [("plain", WARM_UP_TOKENS)] * 4 + [("medusa", WARM_UP_TOKENS)] * 4
    assert all(tokens == 5 for _, tokens in asked[8:])
    assert len({tuple(sample.prompt for sample in item.samples) for item in rounds}) == 1


async def test_only_the_side_whose_turn_it_is_is_awake() -> None:
    turns: list[str] = []

    @contextmanager
    def awake(side: Side) -> Iterator[None]:
        turns.append(f"{side.name} up")
        yield
        turns.append(f"{side.name} down")

    with fake_server() as (port, _):
        sides = [Side(name, port, name) for name in ("a", "b")]
        async for _ in measure(sides, Plan(PROMPTS, (1,), 1), awake):
            pass
    assert turns == 2 * ["a up", "a down", "b up", "b down"]


async def test_another_chat_template_is_an_error() -> None:
    other = (*CHUNKS[:3], CHUNKS[3] | {"usage": USAGE | {"prompt_tokens": 51}})
    with fake_server() as (port, _), fake_server(other) as (other_port, _):
        sides = [Side("ours", port, "model"), Side("theirs", other_port, "model")]
        with pytest.raises(BenchError, match=r"theirs made \[51, 51, 51, 51\] tokens .* ours made \[50"):
            await anext(measure(sides, Plan(PROMPTS)))
