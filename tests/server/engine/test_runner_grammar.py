"""Grammars through the engine: the same valid text with trees and without, alone and together, after preemption."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from llguidance import LLMatcher
from tiny import random_heads, run, submit, tiny_llama, tokens
from transformers import LlamaForCausalLM

from models.backbone import Backbone
from models.grammar import Grammars, GrammarState
from server.engine.core import Engine
from server.engine.messages import Delta, EngineConfig, SamplingParams, SpeculationParams, Submit
from server.engine.runner import Runner

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))
from json_tokens import EOS, VOCAB_SIZE, json_tokenizer

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
GREEDY = SamplingParams(200, temperature=0)
SAMPLED = SamplingParams(200, seed=3)
SHAPED = SamplingParams(
    200, temperature=0.8, top_p=0.9, top_k=40, seed=5, repetition_penalty=1.2, frequency_penalty=0.3, min_tokens=4
)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama(VOCAB_SIZE)


def grammar_engine(model: LlamaForCausalLM, *, heads: bool = True, **config: object) -> Engine:
    backbone = Backbone(model)
    options = EngineConfig("tiny", **{"kv_cache_tokens": 4096, "num_nodes": 8, **config})  # type: ignore[arg-type]
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
    assert outputs(grammar_engine(model, kv_cache_tokens=300, max_num_batched_rows=24), sampling) == plain
    assert outputs(grammar_engine(model, speculative_disable_by_batch_size=1), sampling) == plain
