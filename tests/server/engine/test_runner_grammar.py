"""Grammars through the engine: the same valid text with trees and without, alone and together, after preemption."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from llguidance import LLMatcher
from tiny import PREDICTABLE, random_heads, run, submit, tiny_llama, tokens
from transformers import LlamaForCausalLM

from models.backbone import Backbone
from models.grammar import Grammars
from server.engine.core import Engine
from server.engine.messages import Delta, EngineConfig, SamplingParams
from server.engine.runner import Runner
from tests.models.json_tokens import EOS, VOCAB_SIZE, json_tokenizer

TOKENIZER = json_tokenizer()
PROMPTS = [[5, 9, 33, 7], [8] * 30, [1, 2, 3, 4, 5, 6, 7], list(range(40, 57)), [60], [11, 13, 11, 13]]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "count": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "grey"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "count", "tags"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "},
}
JSON = LLMatcher.grammar_from_json_schema(json.dumps(SCHEMA))
REGEX = LLMatcher.grammar_from_regex("[a-f]{3,9}(name|count)!?")
CHOICE = 'start: "red" | "green" | "redder" | "grey"'


def is_object(text: str) -> bool:
    found = json.loads(text)
    return list(found) == ["name", "count", "tags"] and 1 <= len(found["tags"]) <= 3


CASES: dict[str, tuple[str, Callable[[str], object]]] = {
    "json": (JSON, is_object),
    "regex": (REGEX, re.compile("[a-f]{3,9}(name|count)!?").fullmatch),
    "choice": (CHOICE, ["red", "green", "redder", "grey"].__contains__),
}
GREEDY = SamplingParams(60, temperature=0)
SAMPLED = SamplingParams(60, seed=3)
SHAPED = SamplingParams(
    60, temperature=0.8, top_p=0.9, top_k=40, seed=5, repetition_penalty=1.2, frequency_penalty=0.3, min_tokens=4
)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama(VOCAB_SIZE)


def grammar_engine(model: LlamaForCausalLM, *, heads: bool = True, **config: object) -> Engine:
    backbone = Backbone(model)
    options = EngineConfig("tiny", **{**PREDICTABLE, "num_nodes": 8, **config})  # type: ignore[arg-type]
    runner = Runner(backbone, random_heads(backbone) if heads else None, options)
    runner.grammars = Grammars(TOKENIZER.to_str(), [EOS])
    return Engine(options, runner)


def text(deltas: list[Delta]) -> str:
    return TOKENIZER.decode(tokens(deltas), skip_special_tokens=True)


def outputs(engine: Engine, sampling: SamplingParams, mode: str = "lossless", together: bool = True) -> list[list[int]]:
    jobs = [submit(str(i), prompt, replace(sampling, choice=i), mode) for i, prompt in enumerate(PROMPTS)]
    groups = [jobs] if together else [[job] for job in jobs]
    found = {name: deltas for group in groups for name, deltas in run(engine, group).items()}
    assert all(deltas[-1].finish == "stop" for deltas in found.values())
    return [tokens(found[job.request_id]) for job in jobs]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, SHAPED], ids=["greedy", "sampled", "shaped"])
@pytest.mark.parametrize("case", CASES)
def test_text_is_valid_and_does_not_depend_on_the_tree_the_batch_or_preemption(
    model: LlamaForCausalLM, case: str, sampling: SamplingParams
) -> None:
    grammar, is_valid = CASES[case]
    sampling = replace(sampling, grammar=grammar)
    plain = outputs(grammar_engine(model, prefix_cache=False), sampling, "off", together=False)
    assert all(is_valid(TOKENIZER.decode(output)) for output in plain)
    assert outputs(grammar_engine(model), sampling) == plain
    assert outputs(grammar_engine(model, num_nodes=40), sampling, together=False) == plain
    assert outputs(grammar_engine(model, num_nodes=1), sampling) == plain
    assert outputs(grammar_engine(model, heads=False), sampling) == plain
    assert outputs(grammar_engine(model, kv_cache_tokens=100, max_num_batched_rows=24), sampling) == plain
    assert outputs(grammar_engine(model, static_trees=False), sampling) == plain


@pytest.mark.parametrize("case", CASES)
def test_a_hundred_of_a_hundred_are_valid(model: LlamaForCausalLM, case: str) -> None:
    grammar, is_valid = CASES[case]
    jobs = [submit(str(i), PROMPTS[0], SamplingParams(200, seed=i, grammar=grammar)) for i in range(100)]
    found = [text(deltas) for deltas in run(grammar_engine(model), jobs).values()]
    assert sum(bool(is_valid(output)) for output in found) == 100
    assert len(set(found)) > 2


def test_a_small_pool_preempts_grammars_too(model: LlamaForCausalLM) -> None:
    engine = grammar_engine(model, kv_cache_tokens=100, max_num_batched_rows=24)
    jobs = [submit(str(i), prompt, replace(GREEDY, grammar=JSON)) for i, prompt in enumerate(PROMPTS)]
    ends = [deltas[-1].stats for deltas in run(engine, jobs).values()]
    assert sum(end.num_preemptions for end in ends if end) > 0


def test_forced_tokens_save_steps_without_heads_and_none_when_off(model: LlamaForCausalLM) -> None:
    sampling = replace(GREEDY, grammar=JSON)
    engine = grammar_engine(model, heads=False)
    free, off = (run(engine, [submit("a", PROMPTS[0], sampling, mode)])["a"] for mode in ("lossless", "off"))
    assert tokens(free) == tokens(off)
    assert free[-1].stats is not None
    speculation = free[-1].stats.speculation
    assert speculation.num_accepted_draft_tokens > len(tokens(free)) / 3
    assert speculation.num_accepted_draft_tokens > 0.8 * speculation.num_draft_tokens
    assert len(free) < 0.7 * len(off)
    assert off[-1].stats is not None
    assert off[-1].stats.speculation.num_draft_tokens == 0


def test_max_nodes_is_a_limit_for_forced_tokens_too(model: LlamaForCausalLM) -> None:
    sampling = replace(GREEDY, grammar=JSON)
    stats = run(grammar_engine(model), [submit("a", PROMPTS[0], sampling, max_nodes=1)])["a"][-1].stats
    assert stats is not None
    assert 0 < stats.speculation.num_draft_tokens <= stats.speculation.num_spec_steps


def test_the_end_of_the_grammar_is_the_end(model: LlamaForCausalLM) -> None:
    """Without waiting for the model to say so, and whatever min_tokens or ignore_eos wish."""
    for sampling in (GREEDY, replace(GREEDY, min_tokens=50), replace(GREEDY, ignore_eos=True)):
        for mode in ("lossless", "off"):
            last = run(grammar_engine(model), [submit("a", PROMPTS[0], replace(sampling, grammar=JSON), mode)])["a"][-1]
            assert (last.finish, last.stop_token_id) == ("stop", None)
            assert EOS not in last.token_ids


def test_where_the_grammar_goes_on_the_model_says_when_to_end(model: LlamaForCausalLM) -> None:
    letters = LLMatcher.grammar_from_regex("[a-z]*")
    sampling = SamplingParams(200, seed=1, grammar=letters, logit_bias=((EOS, 3.0),))
    early = run(grammar_engine(model), [submit("a", PROMPTS[0], sampling)])["a"]
    assert (early[-1].finish, early[-1].stop_token_id) == ("stop", EOS)
    late = run(grammar_engine(model), [submit("a", PROMPTS[0], replace(sampling, min_tokens=40))])["a"]
    assert len(tokens(late)) >= 40
    assert re.fullmatch("[a-z]*", text(late))


def test_max_tokens_cuts(model: LlamaForCausalLM) -> None:
    deltas = run(grammar_engine(model), [submit("a", PROMPTS[0], SamplingParams(5, temperature=0, grammar=JSON))])["a"]
    assert deltas[-1].finish == "length"
    assert len(tokens(deltas)) == 5


def test_logprobs_stay_the_models_own(model: LlamaForCausalLM) -> None:
    sampling = replace(GREEDY, grammar=JSON, logprobs=2)
    for mode in ("lossless", "off"):
        deltas = run(grammar_engine(model), [submit("a", PROMPTS[0], sampling, mode)])["a"]
        scored = [entry for delta in deltas for entry in delta.logprobs]
        assert [entry.token_id for entry in scored] == tokens(deltas)
        assert all(entry.logprob > -100 for entry in scored)
        assert any(entry.token_id not in [token for token, _ in entry.top] for entry in scored)


def test_a_grammar_that_fails_ends_its_own_request_only(model: LlamaForCausalLM) -> None:
    names = [f"x{n}" for n in range(3000)]
    wide = 'start: "a" wide\nwide: ' + " | ".join(f'{name} "z"' for name in names)
    wide += "\n" + "\n".join(f'{name}: "b"' for name in names)
    for mode in ("lossless", "off"):
        engine = grammar_engine(model)
        jobs = [
            submit("bad", PROMPTS[0], replace(GREEDY, grammar=wide), mode),
            submit("good", PROMPTS[1], replace(GREEDY, grammar=JSON), mode),
            submit("plain", PROMPTS[2], SamplingParams(9, ignore_eos=True), mode),
        ]
        found = run(engine, jobs)
        assert found["bad"][-1].finish == "error"
        assert "The grammar could not be followed" in (found["bad"][-1].error or "")
        assert is_object(text(found["good"]))
        assert len(tokens(found["plain"])) == 9


def test_a_grammar_that_does_not_compile_is_refused(model: LlamaForCausalLM) -> None:
    engine = grammar_engine(model)
    refusal = engine.submit(submit("a", PROMPTS[0], replace(GREEDY, grammar="start: nobody")))
    assert refusal is not None
    assert refusal.finish == "error"
    assert "unknown name" in (refusal.error or "")
    assert not engine.has_work


def test_typical_acceptance_follows_the_grammar(model: LlamaForCausalLM) -> None:
    sampling = SamplingParams(200, temperature=0.9, seed=2, grammar=JSON)
    jobs = [submit(str(i), prompt, sampling, "typical") for i, prompt in enumerate(PROMPTS)]
    assert all(is_object(text(deltas)) for deltas in run(grammar_engine(model, num_nodes=20), jobs).values())
