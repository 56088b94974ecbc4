"""Tools and formats over /v1/responses: what becomes of them in the chat, and what is refused."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from openai.types.responses import ResponseFunctionToolCall
from scripted import ScriptedEngine, app_of, client_of
from test_responses import post, prompt_of, refused
from test_responses_output import CALL, CITY, NOW, SECOND, WEATHER, saying

AWARE = "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
AWARE += "{% for c in m.tool_calls or [] %}({{ c.id }}:{{ c.function.name }}:{{ c.function.arguments.a }}){% endfor %}"
AWARE += "{% if m.role == 'tool' %}({{ m.tool_call_id }}:{{ m.name }}){% endif %}{% endfor %}"
USER = {"role": "user", "content": "Hi"}


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(max_model_len=4096)


@pytest.fixture
async def aware(engine: ScriptedEngine) -> AsyncIterator[httpx.AsyncClient]:
    """Of a server whose chat template knows tools."""
    async with client_of(app_of(engine, template=AWARE)) as client:
        yield client


async def test_tools_are_echoed(client: httpx.AsyncClient) -> None:
    choice = {"type": "function", "name": "now"}
    body = await post(client, tools=[WEATHER, NOW], tool_choice=choice, parallel_tool_calls=False)
    assert body["tools"] == [{**WEATHER, "strict": True}, {**NOW, "description": None, "parameters": None}]
    assert (body["tool_choice"], body["parallel_tool_calls"]) == (choice, False)
    assert (await post(client))["tool_choice"] == "auto"


async def test_what_the_model_may_say(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    async def grammar(**body: object) -> str | None:
        await post(client, **body)
        found: str | None = engine.submits[-1].sampling.grammar
        return found

    free = await grammar(tools=[WEATHER, NOW]) or ""
    assert "TEXT" in free
    assert '"city"' in free
    assert await grammar(tools=[NOW]) is None
    assert await grammar(tools=[WEATHER], tool_choice="none") is None
    assert "{0,15}" in (await grammar(tools=[NOW], tool_choice="required") or "")
    assert "{0,15}" not in (await grammar(tools=[NOW], tool_choice="required", parallel_tool_calls=False) or "")
    named = await grammar(tools=[WEATHER, NOW], tool_choice={"type": "function", "name": "now"}) or ""
    assert "now" in named
    assert "weather" not in named
    assert "answer: %json" in (await grammar(tools=[NOW], text={"format": {"type": "json_object"}}) or "")


async def test_formats(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    schema = {"type": "json_schema", "name": "city", "strict": True, "schema": CITY}
    body = await post(client, text={"format": schema})
    assert body["text"] == {"format": schema}
    chat = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    await client.post("/v1/chat/completions", json={"messages": [USER], "response_format": chat})
    assert '"city"' in (engine.submits[0].sampling.grammar or "")
    assert engine.submits[0].sampling.grammar == engine.submits[1].sampling.grammar
    await post(client, text={"format": {"type": "json_object"}})
    assert "%json" in (engine.submits[-1].sampling.grammar or "")
    await post(client, text={"format": {"type": "text"}})
    assert engine.submits[-1].sampling.grammar is None
    bad = {"type": "json_schema", "name": "bad", "schema": {"type": "foo"}}
    error = await refused(client, text={"format": bad})
    assert error["param"] == "text.format"
    assert "Invalid type: foo" in error["message"]
    assert (await refused(client, text={"format": {**bad, "name": "no spaces"}}))["param"] == "text.format.name"


def call(id: str, **fields: object) -> dict[str, Any]:
    return {"type": "function_call", "call_id": id, "name": "f", "arguments": '{"a": 7}', **fields}


def result(id: str, output: object, **fields: object) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": id, "output": output, **fields}


async def test_conversation(aware: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    """Calls join the assistant's message before them; results are messages of their own."""
    said = {"role": "assistant", "content": "Let me see."}
    parts = [{"type": "input_text", "text": "sun"}, {"type": "input_text", "text": "ny"}]
    items = [USER, said, call("c1"), call("c2"), result("c1", "x"), result("c2", parts, name="f"), call("c3")]
    items += [result("c3", ""), {"role": "assistant", "content": "So."}, USER]
    await post(aware, input=items, tools=[WEATHER])
    tools, _, prompt = prompt_of(engine).partition("[user]")
    function = {key: value for key, value in WEATHER.items() if key != "type"}
    assert json.loads(tools.removeprefix("<tool_call>")) == [{"type": "function", "function": function}]
    assert prompt == (
        "Hi[assistant]Let me see.(c1:f:7)(c2:f:7)[tool]x(c1:)[tool]sun\nny(c2:f)"
        "[assistant](c3:f:7)[tool](c3:)[assistant]So.[user]Hi"
    )


async def test_an_answer_can_be_sent_back(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = saying(f"Let me see.\n{CALL}\n{SECOND}")
    answer = (await post(client, tools=[WEATHER, NOW]))["output"]
    as_client_has_it = [*answer[:1], *(ResponseFunctionToolCall(**item).model_dump() for item in answer[1:])]
    results = [result(item["call_id"], "sunny", caller=None) for item in answer[1:]]
    await post(client, input=[USER, *as_client_has_it, *results], tools=[WEATHER, NOW])
    prompt = prompt_of(engine)
    assert f"[assistant]Let me see.\n{CALL}\n{SECOND}[user]<tool_response>" in prompt
    assert prompt.count("sunny") == 2


async def test_truncation_keeps_calls_with_their_results(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    turn = [{"role": "user", "content": "x" * 2000}, call("c1"), result("c1", "old")]
    later = [USER, call("c2"), result("c2", "new")]
    await post(client, input=[*turn, *turn, *later], truncation="auto", max_output_tokens=1000)
    assert prompt_of(engine).count("x") < 2010
    assert (prompt_of(engine).count("old"), prompt_of(engine).count("new")) == (1, 1)


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [NOW, {"type": "web_search"}]}, "tools[1]", "tools of type web_search are not supported"),
    ({"tools": [{"type": "function", "function": NOW}]}, "tools[0].name", "Missing"),
    ({"tools": [{"type": "function", "name": "no spaces"}]}, "tools[0].name", ""),
    ({"tools": [{**NOW, "defer_loading": True}]}, "tools[0].defer_loading", "Unrecognized"),
    ({"tools": [NOW] * 129}, "tools", ""),
    ({"tools": [NOW, {**WEATHER, "parameters": {"type": "x"}}]}, "tools[1].parameters", "Invalid type: x."),
    ({"tool_choice": "required"}, "tool_choice", "only allowed when tools"),
    ({"tools": [NOW], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "'x' is not among the tools"),
    ({"tools": [NOW], "tool_choice": {"type": "function"}}, "tool_choice.name", "Missing"),
    ({"tools": [NOW], "tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice", "can be chosen"),
    ({"tools": [NOW], "tool_choice": ["none"]}, "tool_choice", "can be chosen"),
    ({"input": [USER, call("1", arguments="[")]}, "input[1].arguments", "JSON object"),
    ({"input": [USER, call("1", namespace="x")]}, "input[1].namespace", "namespaces"),
    ({"input": [USER, {"type": "function_call", "name": "f"}]}, "input[1].call_id", "Missing"),
    ({"input": [USER, result("1", 3)]}, "input[1].output", "list"),
    ({"input": [USER, result("1", [{"type": "input_image"}])]}, "input[1].output[0]", "input_text"),
    ({"input": [USER, {"type": ["function_call"]}]}, "input[1]", "function_call_output"),
]


@pytest.mark.parametrize(("body", "param", "sentence"), BAD)
async def test_refused(
    client: httpx.AsyncClient, engine: ScriptedEngine, body: dict[str, Any], param: str, sentence: str
) -> None:
    error = await refused(client, **body)
    assert error["param"] == param
    assert sentence in error["message"]
    assert engine.submits == []


async def test_a_format_that_nobody_knows_is_refused(engine: ScriptedEngine) -> None:
    async with client_of(app_of(engine, template="{% if tools %}[TOOL_CALLS]{% endif %}")) as client:
        error = await refused(client, tools=[NOW])
    assert error["param"] == "tools"
    assert "--tool-call-parser" in error["message"]
