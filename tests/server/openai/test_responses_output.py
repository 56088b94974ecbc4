"""The output of /v1/responses when there are tools: items and events, however the model's text comes in pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from openai.types.responses import ResponseFunctionToolCall
from scripted import EOS, ScriptedEngine, say
from test_responses import post, stream

from server.openai.responses_answers import ResponseObject, ResponseStreamEvent
from server.openai.responses_schema import LOGPROBS

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "name": "weather", "description": "Sky.", "parameters": CITY}
NOW = {"type": "function", "name": "now", "strict": False}
ARGUMENTS = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
CUT = CALL[: CALL.index('is"')]
SECOND = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(max_model_len=4096)


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
