"""Tools and formats over /v1/responses: what becomes of them in the chat, and the items that come back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from openai.types.responses import ResponseFunctionToolCall
from scripted import EOS, ScriptedEngine, app_of, client_of, say
from test_responses import post, prompt_of, refused, stream

from server.openai.responses_answers import ResponseObject, ResponseStreamEvent
from server.openai.responses_schema import LOGPROBS

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "name": "weather", "description": "Sky.", "parameters": CITY}
NOW = {"type": "function", "name": "now", "strict": False}
ARGUMENTS = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
CUT = CALL[: CALL.index('is"')]
SECOND = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
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


def saying(text: str, *, by: int = 1, is_cut: bool = False) -> Callable[..., Any]:
    return lambda submit: say(
        submit, [*text.encode(), *([] if is_cut else [EOS])], by=by, finish="length" if is_cut else "stop"
    )


def told(output: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The items without what is made up for them, which is checked."""
    ids = [item["id"] for item in output] + [item["call_id"] for item in output if "call_id" in item]
    assert len(set(ids)) == len(ids)
    found = []
    for item in output:
        if item["type"] == "message":
            assert item["id"].startswith("msg_")
            found.append(("text", item["content"][0]["text"], item["status"]))
        else:
            ResponseFunctionToolCall.model_validate(item)
            assert item["id"].startswith("fc_")
            assert item["call_id"].startswith("call_")
            found.append((item["name"], item["arguments"], item["status"]))
    return found


PARIS = ("weather", ARGUMENTS, "completed")
ANSWERS = {
    "text": ("No <tool for that.", [("text", "No <tool for that.", "completed")]),
    "nothing": ("", [("text", "", "completed")]),
    "call": (CALL, [PARIS]),
    "text and calls": (
        f"Let me see.\n{CALL}\n{SECOND}",
        [("text", "Let me see.", "completed"), PARIS, ("now", "{}", "completed")],
    ),
    "text after a call": (f"{CALL}\nThat's it.", [PARIS, ("text", "That's it.", "completed")]),
    "text between calls": (
        f"é {CALL} b {CALL}c",
        [("text", "é", "completed"), PARIS, ("text", "b", "completed"), PARIS, ("text", "c", "completed")],
    ),
    "a call that the model gave up": (CUT, [("weather", '{"city": "Par', "incomplete")]),
}


def ran(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


@pytest.mark.parametrize("by", [1, 2, 5, 1000])
@pytest.mark.parametrize("case", ANSWERS)
async def test_items_and_events(client: httpx.AsyncClient, engine: ScriptedEngine, case: str, by: int) -> None:
    text, items = ANSWERS[case]
    engine.script = saying(text, by=by)
    whole = await post(client, tools=[WEATHER, NOW])
    ResponseObject.model_validate(whole, strict=True)
    assert told(whole["output"]) == items
    assert whole["status"] == "completed"
    events = await stream(client, tools=[WEATHER, NOW])
    for event in events:
        ResponseStreamEvent.model_validate(event, strict=True)
    assert told(events[-1]["response"]["output"]) == items
    rebuilt = follow(events[2:-1])
    assert rebuilt == events[-1]["response"]["output"]


def follow(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items of a stream, each put together from its own events; no two at a time."""
    items: list[dict[str, Any]] = []
    is_open, deltas = False, ""
    for event, kind in zip(events, ran(events), strict=True):
        if kind == "output_item.added":
            assert not is_open
            assert event["output_index"] == len(items)
            assert event["item"]["status"] == "in_progress"
            is_open, deltas = True, ""
            items.append(event["item"])
            continue
        assert is_open
        assert event["output_index"] == len(items) - 1
        assert event.get("item_id", items[-1]["id"]) == items[-1]["id"]
        if kind.endswith(".delta"):
            deltas += event["delta"]
        elif kind == "output_text.done":
            assert event["text"] == deltas
            items[-1]["content"] = [{"type": "output_text", "text": deltas, "annotations": [], "logprobs": []}]
        elif kind == "function_call_arguments.done":
            assert (event["name"], event["arguments"]) == (items[-1]["name"], deltas)
            items[-1]["arguments"] += deltas
        elif kind == "output_item.done":
            items[-1]["status"] = event["item"]["status"]
            assert event["item"] == items[-1]
            is_open = False
    assert not is_open
    return items


async def test_events_of_a_call(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = saying(CALL)
    events = await stream(client, tools=[WEATHER])
    assert ran(events) == [
        "created",
        "in_progress",
        "output_item.added",
        *["function_call_arguments.delta"] * len(ARGUMENTS),
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]


async def test_what_was_cut_is_incomplete(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = saying(f"See:\n{CALL}\n{CUT}", is_cut=True)
    body = await post(client, tools=[WEATHER])
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert told(body["output"]) == [("text", "See:", "completed"), PARIS, ("weather", '{"city": "Par', "incomplete")]
    assert (await stream(client, tools=[WEATHER]))[-1]["type"] == "response.incomplete"
    engine.script = saying(CALL, is_cut=True)
    assert told((await post(client, tools=[WEATHER]))["output"]) == [PARIS]


async def test_logprobs_are_those_of_texts(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = saying(f"ab{CALL}")
    events = await stream(client, tools=[WEATHER], include=[LOGPROBS])
    message, call = events[-1]["response"]["output"]
    assert [token["token"] for token in message["content"][0]["logprobs"]] == ["a", "b"]
    assert "logprobs" not in call
    engine.script = saying(CALL)
    assert told((await post(client, tools=[WEATHER], include=[LOGPROBS]))["output"]) == [PARIS]


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
