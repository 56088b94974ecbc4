"""Recording a tiny model's drafts."""

from __future__ import annotations

import pytest

from server.engine.core import Engine
from server.engine.messages import EngineConfig, SamplingParams
from server.engine.runner import Runner
from tests.bench.client import BenchError
from tests.bench.costs import cost_model
from tests.bench.recording import record_from
from tests.server.engine.tiny import run, submit, tiny_engine, tiny_llama, tokens

PROMPTS = [(2, 3), (3, 4), (20, 21)]  # with answers of 24, 10 and 23 tokens
MAX_TOKENS = 24


@pytest.fixture(params=["heads", "sequential"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return tiny_engine(tiny_llama(64), drafter=request.param, ngram=False, quantization="none")


def test_there_is_a_draft_at_every_token_that_can_be_guessed(engine: Engine) -> None:
    found = record_from(engine, PROMPTS, 8, MAX_TOKENS)
    greedy = SamplingParams(MAX_TOKENS, temperature=0)
    plain = run(engine, [submit(str(i), list(prompt), greedy, "off") for i, prompt in enumerate(PROMPTS)])
    for prompt, steps, deltas in zip(PROMPTS, found.texts, plain.values(), strict=True):
        num_roots = min(len(tokens(deltas)) - 1, MAX_TOKENS - 2)  # the last tokens leave nothing to guess
        assert num_roots > 5
        assert [step.num_keys for step in steps] == [len(prompt) + i for i in range(num_roots)]


def test_drafts_are_trees_best_first_and_some_are_right(engine: Engine) -> None:
    steps = [step for text in record_from(engine, PROMPTS, 8, MAX_TOKENS).texts for step in text]
    assert all(parent < node for step in steps for node, parent in enumerate(step.parents))
    assert all(list(step.values) == sorted(step.values, reverse=True) for step in steps)
    assert 4 < max(len(step.values) for step in steps) <= 8
    assert any(step.right for step in steps)
    assert all(step.parents[b] == a for step in steps for a, b in zip((-1, *step.right), step.right, strict=False))


def test_nothing_is_right_beyond_the_end_of_a_text(engine: Engine) -> None:
    for steps in record_from(engine, PROMPTS, 8, MAX_TOKENS).texts:
        assert all(len(step.right) <= len(steps) + 1 - place for place, step in enumerate(steps))


def test_the_recording_says_what_steps_cost(engine: Engine) -> None:
    about = record_from(engine, PROMPTS, 8, MAX_TOKENS).about
    assert about["model"] == "tiny"
    assert cost_model(about["costs"]).run.seconds(4) > 0


def test_without_heads_there_is_nothing_to_record(engine: Engine) -> None:
    assert isinstance(engine.runner, Runner)
    config = EngineConfig("tiny", kv_cache_tokens=512)
    with pytest.raises(BenchError, match="name some with --heads"):
        record_from(Engine(config, Runner(engine.runner.backbone, None, config)), PROMPTS, 8, MAX_TOKENS)
