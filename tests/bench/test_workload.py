"""Which prompts are asked, and that new ones are new."""

from __future__ import annotations

import json

import pytest

from models.train.data import VALIDATION_FRACTION, is_held_out
from tests.bench.client import Prompt
from tests.bench.workload import MIN_PROMPTS, FreshPlan, LoadPlan, MixedPlan, Plan, PrefillPlan, read_prompts


def prompts(names: str) -> tuple[Prompt, ...]:
    return tuple(Prompt(name) for name in names)


@pytest.mark.parametrize(("concurrency", "expected"), [(1, 4), (4, 8), (8, 16), (16, 16), (40, 40)])
def test_a_round_keeps_its_streams_busy(concurrency: int, expected: int) -> None:
    assert len(Plan(prompts("abcdefghijklmnop")).prompts_of(concurrency, 0)) == expected


def test_rounds_walk_through_the_prompts() -> None:
    plan = Plan(prompts("abcdef"))
    assert [plan.prompts_of(1, index) for index in range(2)] == [list(prompts("abcd")), list(prompts("efab"))]


def test_fresh_prompts_never_come_again() -> None:
    plan = FreshPlan(prompts("ab"), (1, 4, 16), 3)
    asked = [
        prompt.user
        for level in plan.concurrencies
        for index in range(plan.num_rounds)
        for prompt in plan.prompts_of(level, index)
    ]
    assert len(set(asked)) == len(asked)
    assert all(text.endswith((": a", ": b")) for text in asked)


def test_long_prompts_have_the_asked_number_of_words_and_no_common_beginning() -> None:
    plan = PrefillPlan(prompts("ab"), num_rounds=3, num_words=100)
    asked = [prompt for index in range(plan.num_rounds) for prompt in plan.prompts_of(1, index)]
    words = [str(prompt.system).split() for prompt in asked]
    assert len(asked) == 3 * MIN_PROMPTS
    assert {len(each) for each in words} == {100}
    assert len({tuple(each[:4]) for each in words}) == len(asked)
    assert [prompt.user for prompt in asked[:3]] == ["a", "b", "a"]


def test_a_system_message_is_sent_only_where_there_is_one() -> None:
    assert Prompt("a").messages == [{"role": "user", "content": "a"}]
    assert [message["role"] for message in Prompt("a", "b").messages] == ["system", "user"]


def test_prompts_are_lines(tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\ntwo, and a bit\n")
    assert read_prompts(tmp_path / "prompts.txt") == (Prompt("one"), Prompt("two, and a bit"))


def test_of_training_data_only_held_out_questions_are_asked(tmp_path) -> None:
    rows = [{"q": f"question {i}", "a": "answer"} for i in range(400)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = [prompt.user for prompt in read_prompts(tmp_path / "data.jsonl")]
    assert asked == [row["q"] for row in rows if is_held_out(row["q"], VALIDATION_FRACTION)]
    assert 10 < len(asked) < 40


def test_a_load_is_so_many_requests_of_each_stream() -> None:
    plan = LoadPlan(prompts("abc"), num_requests=3)
    assert [len(plan.prompts_of(streams, 0)) for streams in (1, 2, 128)] == [MIN_PROMPTS, 6, 384]
    assert plan.prompts_of(2, 1)[:2] == list(prompts("ab"))


def test_mixed_lengths_cover_their_range_and_are_the_same_each_time() -> None:
    plan = MixedPlan(prompts("ab"), max_tokens=128, num_words=600)
    asked = plan.prompts_of(128, 0)
    limits = [prompt.max_tokens or 0 for prompt in asked]
    words = [len(str(prompt.system).split()) for prompt in asked]
    assert asked == plan.prompts_of(128, 0) != plan.prompts_of(128, 1)
    assert (4 <= min(limits) < 8, 100 < max(limits) <= 128) == (True, True)
    assert (1 <= min(words) < 4, 400 < max(words) <= 600) == (True, True)
    assert 0.3 < sum(limit < 23 for limit in limits) / len(limits) < 0.7  # half way by the logarithm


def test_mixed_answers_may_be_shorter_than_usual() -> None:
    limits = [prompt.max_tokens for prompt in MixedPlan(prompts("a"), max_tokens=2).prompts_of(4, 0)]
    assert limits == [2] * 8
