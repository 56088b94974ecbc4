"""Copied guesses in the engine: the text stays what it is, the counts are true, and somebody gains."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_runner import PROMPTS, SAMPLINGS
from tiny import PREDICTABLE, random_heads, run, tiny_llama, tokens
from transformers import LlamaForCausalLM

from models.backbone import Backbone
from server.engine.core import Engine
from server.engine.messages import (
    DRAFT_SOURCES,
    Delta,
    EngineConfig,
    SamplingParams,
    SpeculationParams,
    SpeculationStats,
    StepStats,
    Submit,
)
from server.engine.runner import Runner

OPTIONS = {
    "heads, ngram": {},
    "ngram": {"has_heads": False},
    "heads": {"ngram": False},
    "dynamic": {"static_trees": False},
    "chunks": {"max_num_batched_rows": 12, "max_num_seqs": 3},
    "preemption": {"kv_cache_tokens": 70, "max_num_batched_rows": 20},
    "preemption without heads": {"kv_cache_tokens": 70, "max_num_batched_rows": 20, "has_heads": False},
    "no cache": {"prefix_cache": False, "ngram_min": 1, "ngram_max_nodes": 30},
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama(64, scale=2.0)


def make_engine(model: LlamaForCausalLM, *, has_heads: bool = True, **config: object) -> Engine:
    backbone = Backbone(model)
    options = EngineConfig("tiny", **{**PREDICTABLE, **config})  # type: ignore[arg-type]
    return Engine(options, Runner(backbone, random_heads(backbone) if has_heads else None, options))


def submits(sampling: SamplingParams, predictions: list[list[int]], mode: str = "lossless") -> list[Submit]:
    params = SpeculationParams(mode)  # type: ignore[arg-type]
    return [
        Submit(str(i), tuple(prompt), sampling, params, prediction=tuple(prediction))
        for i, (prompt, prediction) in enumerate(zip(PROMPTS, predictions, strict=True))
    ]


def outputs(engine: Engine, jobs: list[Submit], together: bool = True) -> list[list[int]]:
    groups = [jobs] if together else [[job] for job in jobs]
    deltas = {name: found for group in groups for name, found in run(engine, group).items()}
    return [tokens(deltas[job.request_id]) for job in jobs]


def end(deltas: list[Delta]) -> SpeculationStats:
    stats = deltas[-1].stats
    assert stats is not None
    return stats.speculation


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["greedy", "penalties"])
def test_the_text_is_the_same_with_and_without_copies(
    model: LlamaForCausalLM, name: str, options: dict[str, object]
) -> None:
    sampling, nothing = SAMPLINGS[name], [[]] * len(PROMPTS)
    plain = outputs(make_engine(model), submits(sampling, nothing, "off"), together=False)
    halves = [[*text[:5], 1, 2, *text[4:9], *text[12:]] for text in plain]
    for predictions in (nothing, plain, halves):
        assert outputs(make_engine(model, **options), submits(sampling, predictions)) == plain
    assert outputs(make_engine(model, **options), submits(sampling, halves), together=False) == plain
    assert outputs(make_engine(model, **options), submits(sampling, plain, "off")) == plain


@pytest.mark.parametrize("has_heads", [True, False])
def test_a_right_prediction_saves_nearly_all_steps(model: LlamaForCausalLM, has_heads: bool) -> None:
    sampling = replace(SAMPLINGS["plain"], max_tokens=100)
    engine = make_engine(model, has_heads=has_heads, ngram=False)
    (plain,) = run(engine, [Submit("a", (5, 9), sampling, SpeculationParams("off"))]).values()
    (found,) = run(engine, [Submit("b", (5, 9), sampling, prediction=tuple(tokens(plain)))]).values()
    assert tokens(found) == tokens(plain)
    assert len(plain) == 100
    assert len(found) == 7  # 15 guesses and a bonus a step, the prompt's own included; the last has room for three
    assert end(found).num_accepted_prediction_tokens == 6 * 15 + 3
    assert end(found).num_rejected_prediction_tokens == 0


def test_repeats_save_steps_where_the_text_repeats_itself(model: LlamaForCausalLM) -> None:
    """This tiny model falls into a loop, as small models do."""
    sampling = SamplingParams(150, temperature=0, ignore_eos=True)
    job = Submit("a", tuple(PROMPTS[1]), sampling)
    with_copies = run(make_engine(model, has_heads=False), [job])["a"]
    without = run(make_engine(model, has_heads=False, ngram=False), [job])["a"]
    assert tokens(with_copies) == tokens(without)
    assert len(without) == 150
    assert len(with_copies) < 75


def scripted(model: LlamaForCausalLM, **options: object) -> tuple[Engine, list[int]]:
    """An engine that only knows predictions, and what it says after [5, 9]: twelve tokens."""
    engine = make_engine(model, has_heads=False, ngram=False, **options)
    (plain,) = run(engine, [Submit("plain", (5, 9), TWELVE, SpeculationParams("off"))]).values()
    assert len(set(tokens(plain))) == 12
    return engine, tokens(plain)


TWELVE = SamplingParams(12, temperature=3.0, seed=8, ignore_eos=True)
WRONG = 63


def test_tokens_of_a_prediction_are_counted_once(model: LlamaForCausalLM) -> None:
    engine, said = scripted(model)
    assert WRONG not in said
    prediction = (*said[:3], WRONG, *said[4:6], WRONG, WRONG, *said[6:])
    found = run(engine, [Submit("a", (5, 9), TWELVE, prediction=prediction)])["a"]
    assert tokens(found) == said
    # The first step verifies places 0 to 10, all that could be emitted but the last: three are right, and the bonus is
    # what should have been at 3. The second tries behind it: 4 and 5 are right, and the bonus is found at 8. The third
    # verifies 9 to 11, all right; nobody guesses the last two tokens. In vain were 3, 6, 7 and 8.
    assert [len(delta.token_ids) for delta in found] == [4, 3, 4, 1]
    stats = end(found)
    assert stats.num_accepted_prediction_tokens == 3 + 2 + 3
    assert stats.num_rejected_prediction_tokens == 4
    assert stats.num_draft_tokens == 11 + 2 + 3
    assert stats.num_accepted_draft_tokens == 8


def test_a_prediction_that_never_comes_true_is_rejected(model: LlamaForCausalLM) -> None:
    engine, said = scripted(model)
    found = run(engine, [Submit("a", (5, 9), TWELVE, prediction=(WRONG,) * 30)])["a"]
    assert tokens(found) == said
    stats = end(found)
    assert stats.num_accepted_prediction_tokens == 0
    assert stats.num_rejected_prediction_tokens == 11  # the first step's; two of them again later


def test_a_request_without_speculation_copies_nothing(model: LlamaForCausalLM) -> None:
    engine, said = scripted(model)
    job = Submit("a", (5, 9), TWELVE, SpeculationParams("off"), prediction=tuple(said))
    stats = end(run(engine, [job])["a"])
    assert replace(stats, num_steps=0, step_seconds=0.0, plain_seconds=0.0) == SpeculationStats()
    assert stats.num_steps == 11


@pytest.mark.parametrize("max_nodes", [0, 1, 3])
def test_max_nodes_bounds_the_whole_tree(model: LlamaForCausalLM, max_nodes: int) -> None:
    engine, said = scripted(model)
    job = Submit("a", (5, 9), TWELVE, SpeculationParams(max_nodes=max_nodes), prediction=tuple(said))
    stats = end(run(engine, [job])["a"])
    assert stats.num_draft_tokens <= max_nodes * stats.num_spec_steps
    assert (stats.num_accepted_prediction_tokens > 0) == (max_nodes > 0)


def test_steps_say_who_guessed(model: LlamaForCausalLM) -> None:
    engine = make_engine(model)
    sampling = SamplingParams(60, temperature=0, ignore_eos=True)
    plain = tokens(run(engine, [Submit("a", (5, 9), sampling)])["a"])
    engine.submit(Submit("b", (5, 9), sampling, prediction=tuple(plain[:20])))
    steps: list[StepStats] = []
    while engine.has_work:
        steps.append(engine.step().stats)
    steps = [step for step in steps if step.num_drafts]
    drafted = [sum(counts) for counts in zip(*(step.drafted_by_source for step in steps), strict=True)]
    accepted = [sum(counts) for counts in zip(*(step.accepted_by_source for step in steps), strict=True)]
    assert all(step.num_draft_tokens == sum(step.drafted_by_source) for step in steps)
    assert all(step.num_accepted_tokens == sum(step.accepted_by_source) for step in steps)
    by_source = dict(zip(DRAFT_SOURCES, drafted, strict=True))
    assert [source for source, count in by_source.items() if count == 0] == ["grammar"]
    assert accepted[DRAFT_SOURCES.index("prediction")] >= 18
    assert all(right <= count for right, count in zip(accepted, drafted, strict=True))


def test_a_preempted_request_keeps_its_counts(model: LlamaForCausalLM) -> None:
    sampling = SAMPLINGS["greedy"]
    plain = outputs(make_engine(model), submits(sampling, [[]] * len(PROMPTS), "off"))
    engine = make_engine(model, kv_cache_tokens=70, max_num_batched_rows=20, has_heads=False)
    found = run(engine, submits(sampling, plain))
    assert sum(deltas[-1].stats.num_preemptions for deltas in found.values() if deltas[-1].stats) > 0
    assert all(end(deltas).num_accepted_prediction_tokens > 12 for deltas in found.values())
    assert all(end(deltas).num_rejected_prediction_tokens <= 24 for deltas in found.values())


def test_a_prediction_outside_the_vocabulary_is_refused(model: LlamaForCausalLM) -> None:
    refusal = make_engine(model).submit(Submit("a", (5,), TWELVE, prediction=(64,)))
    assert refusal is not None
    assert "vocabulary" in (refusal.error or "")
