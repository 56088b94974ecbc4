"""POST /v1/responses: OpenAI's objects from scripted tokens, judged by the types of the `openai` package."""

from __future__ import annotations

import json
from typing import Any, get_args, get_type_hints

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseIncludable, ResponseStreamEvent
from openai.types.responses.response_create_params import ResponseCreateParamsStreaming
from pydantic import TypeAdapter
from scripted import EOS, HANG, MODEL, ScriptedEngine, app_of, client_of, live, say, wait_for

from server.engine.messages import Delta
from server.openai.responses_schema import LOGPROBS, SHARED, ResponsesRequest
from server.openai.schema import ChatRequest

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
TERMINAL = {"response.completed", "response.incomplete", "response.failed"}


async def post(client: httpx.AsyncClient, **body: object) -> dict[str, Any]:
    response = await client.post("/v1/responses", json={"input": "Hi", **body})
    assert response.status_code == 200, response.text
    Response.model_validate(response.json())
    return response.json()


async def refused(client: httpx.AsyncClient, **body: object) -> dict[str, Any]:
    response = await client.post("/v1/responses", json={"input": "Hi", **body})
    assert response.status_code == 400, response.text
    return response.json()["error"]


async def stream(client: httpx.AsyncClient, **body: object) -> list[dict[str, Any]]:
    """The events, each checked on its own; then all of them together."""
    response = await client.post("/v1/responses", json={"input": "Hi", "stream": True, **body})
    assert response.headers["content-type"].startswith("text/event-stream")
    *parts, rest = response.text.split("\n\n")
    assert rest == ""
    found = []
    for part in parts:
        name, data = part.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENT.validate_python(event)
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert [event["type"] in TERMINAL for event in found] == [False] * (len(found) - 1) + [True]
    return found


def prompt_of(engine: ScriptedEngine) -> str:
    return bytes(engine.submits[-1].prompt).decode()


async def test_object(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = lambda submit: say(submit, [*b"Hello", EOS], finish="stop")
    body = await post(client, model=MODEL)
    assert body["id"].startswith("resp_")
    assert (body["object"], body["model"], body["status"], body["error"]) == ("response", MODEL, "completed", None)
    (item,) = body["output"]
    assert item.pop("id").startswith("msg_")
    part = {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}
    assert item == {"type": "message", "role": "assistant", "status": "completed", "content": [part]}
    assert body["usage"] == {
        "input_tokens": 9,
        "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
        "output_tokens": 6,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 15,
    }
    assert body["completed_at"] >= body["created_at"]
    assert prompt_of(engine) == "[user]Hi>"


async def test_a_text_that_was_cut_is_incomplete(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    body = await post(client, max_output_tokens=5)
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (body["output"][0]["status"], body["completed_at"]) == ("incomplete", None)
    assert engine.submits[0].sampling.max_tokens == 5


async def test_what_was_asked_is_echoed(client: httpx.AsyncClient) -> None:
    asked = {
        "instructions": "Be brief",
        "max_output_tokens": 3,
        "max_tool_calls": 1,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "prompt_cache_key": "key",
        "safety_identifier": "safe",
        "temperature": 0.5,
        "top_p": 0.5,
        "top_logprobs": 2,
        "tool_choice": "none",
        "truncation": "auto",
        "user": "Ada",
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "reasoning": {"effort": "none"},
    }
    body = await post(client, include=[LOGPROBS], **asked)
    assert {name: body[name] for name in asked} == asked


async def test_conversation(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    """Short and long forms, and an answer that comes back as it was sent."""
    engine.script = lambda submit: say(submit, "c")
    answer = (await post(client, include=[LOGPROBS]))["output"][0]
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    items = [{"role": "developer", "content": "d"}, {"type": "message", "role": "user", "content": parts}, answer]
    await post(client, input=items, instructions="i")
    assert prompt_of(engine) == "[system]i[system]d[user]a\nb[assistant]c>"


@pytest.mark.parametrize(
    ("item", "why"),
    [
        ({"type": "item_reference", "id": "msg_1"}, "not stored"),
        ({"type": "reasoning", "id": "rs_1", "summary": []}, "type message"),
        ({"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}, "type input_text"),
        ({"role": "user", "content": []}, "at least 1"),
        ({"role": "tool", "content": "x"}, "'user', 'assistant'"),
        ({"role": "user", "content": 3}, "list"),
    ],
)
async def test_items_that_cannot_be_read(client: httpx.AsyncClient, item: dict[str, Any], why: str) -> None:
    error = await refused(client, input=[{"role": "user", "content": "a"}, item])
    assert error["param"].startswith("input[1]")
    assert why in error["message"]


@pytest.mark.parametrize("value", [[], None, 3, {}])
async def test_input_is_needed(client: httpx.AsyncClient, value: object) -> None:
    assert (await refused(client, input=value))["param"] == "input"


REFUSED: dict[str, object] = {
    "background": True,
    "context_management": [{"type": "compaction"}],
    "conversation": "conv_1",
    "include": ["everything"],
    "max_output_tokens": 0,
    "metadata": {"key": "x" * 513},
    "moderation": {"model": "m"},
    "previous_response_id": "resp_1",
    "prompt": {"id": "pmpt_1"},
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "reasoning": {"effort": "high"},
    "service_tier": "priority",
    "store": True,
    "stream_options": {"include_obfuscation": True},
    "text": {"format": {"type": "rhyme"}},
    "tool_choice": "required",
    "tools": [{"type": "web_search"}],
    "top_logprobs": 1,
    "truncation": "middle",
    "no_such_field": 1,
}


@pytest.mark.parametrize("field", REFUSED)
async def test_refusals_name_their_field(client: httpx.AsyncClient, engine: ScriptedEngine, field: str) -> None:
    error = await refused(client, **{field: REFUSED[field]})
    assert error["param"].partition(".")[0].partition("[")[0] == field
    assert error["message"].endswith(".")
    assert engine.submits == []


ACCEPTED: dict[str, object] = {
    "background": False,
    "context_management": [],
    "conversation": None,
    "include": list(get_args(ResponseIncludable)),
    "input": "Hi",
    "instructions": "i",
    "max_output_tokens": 7,
    "max_tool_calls": 0,
    "metadata": {},
    "model": MODEL,
    "moderation": None,
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "prompt": None,
    "prompt_cache_key": "k",
    "prompt_cache_options": {},
    "prompt_cache_retention": "in_memory",
    "reasoning": {},
    "safety_identifier": "s",
    "service_tier": "auto",
    "store": False,
    "stream": False,
    "stream_options": None,
    "temperature": 0.0,
    "text": {},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": None,
    "top_p": 1.0,
    "truncation": "disabled",
    "user": "u",
}


@pytest.mark.parametrize("field", get_type_hints(ResponseCreateParamsStreaming))
async def test_every_field_of_the_client_is_known(client: httpx.AsyncClient, field: str) -> None:
    await post(client, **{field: ACCEPTED[field]})


def test_shared_fields_are_those_of_chat() -> None:
    ours, chats = ResponsesRequest.model_json_schema()["properties"], ChatRequest.model_json_schema()["properties"]
    words = {"description", "title"}
    for name in SHARED:
        assert {k: v for k, v in ours[name].items() if k not in words} == {
            k: v for k, v in chats[name].items() if k not in words
        }, name


async def test_sampling_reaches_the_engine(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    asked = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "min_tokens": 2, "seed": 7}
    penalties = {"presence_penalty": 0.1, "frequency_penalty": 0.2, "repetition_penalty": 1.1, "ignore_eos": True}
    await post(client, **asked, **penalties, priority=3, speculation={"mode": "typical", "epsilon": 0.2})
    (submit,) = engine.submits
    for name, value in (asked | penalties).items():
        assert getattr(submit.sampling, name) == value
    assert (submit.priority, submit.speculation.mode, submit.speculation.epsilon) == (3, "typical", 0.2)


async def test_errors_of_the_chat_have_our_names(client: httpx.AsyncClient) -> None:
    error = await refused(client, text={"format": {"type": "rhyme"}})
    assert error["param"].startswith("text.format")
    assert error["message"].startswith("Invalid 'text.format")


async def test_stop(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    body = await post(client, stop="lo")
    assert (body["output"][0]["content"][0]["text"], body["status"]) == ("Hel", "completed")


async def test_logprobs(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = lambda submit: say(submit, "é")
    body = await post(client, include=[LOGPROBS], top_logprobs=2)
    first, second = body["output"][0]["content"][0]["logprobs"]
    assert (first["bytes"], first["logprob"]) == ([0xC3], -1.0)
    assert [other["logprob"] for other in second["top_logprobs"]] == [-1.0, -2.0]
    assert (await post(client))["output"][0]["content"][0]["logprobs"] == []


async def test_stream(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = lambda submit: say(submit, [*"aé\u2028".encode(), EOS], finish="stop")
    found = await stream(client, metadata={"a": "b"})
    assert [event["type"].removeprefix("response.") for event in found] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * 3,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert "".join(event["delta"] for event in found[4:7]) == "aé\u2028" == found[7]["text"]
    first, last = found[0]["response"], found[-1]["response"]
    assert (first["status"], first["output"], first["metadata"]) == ("in_progress", [], {"a": "b"})
    assert last["output"] == [found[-2]["item"]]
    assert last["output"][0]["content"] == [found[-3]["part"]]
    whole = await post(client, metadata={"a": "b"})
    changing = ("id", "created_at", "completed_at", "output")
    assert {k: v for k, v in last.items() if k not in changing} == {k: v for k, v in whole.items() if k not in changing}
    assert last["output"][0]["content"] == whole["output"][0]["content"]


@settings(max_examples=30)
@given(
    text=st.text(st.characters(codec="utf-8"), min_size=1),
    by=st.integers(1, 5),
    stop=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=2), max_size=4),
)
async def test_deltas_joined_are_the_text(text: str, by: int, stop: list[str]) -> None:
    engine = ScriptedEngine(lambda submit: say(submit, text, by=by))
    async with client_of(app_of(engine)) as client:
        whole = (await post(client, stop=stop))["output"][0]["content"][0]["text"]
        found = await stream(client, stop=stop)
    deltas = [event["delta"] for event in found if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == whole == text[: min((text.find(s) for s in stop if s in text), default=len(text))]
    assert found[-1]["response"]["output"][0]["content"][0]["text"] == whole


def test_leaving_a_stream_aborts() -> None:
    engine = ScriptedEngine(lambda submit: [say(submit, "ab")[0], HANG])
    with live(app_of(engine)) as url:
        with httpx.stream("POST", f"{url}/v1/responses", json={"input": "Hi", "stream": True}) as response:
            lines = response.iter_lines()
            assert next(lines) == "event: response.created"
            assert engine.aborted == []
        wait_for(lambda: len(engine.aborted) == 1, 1)


async def test_stream_of_logprobs(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = lambda submit: say(submit, [*"aé".encode(), EOS], finish="stop")
    found = await stream(client, include=[LOGPROBS], top_logprobs=1)
    deltas = [event for event in found if event["type"] == "response.output_text.delta"]
    assert [len(event["logprobs"]) for event in deltas] == [1, 2, 1]
    (done,) = (event for event in found if event["type"] == "response.output_text.done")
    assert [token for event in deltas for token in event["logprobs"]] == done["logprobs"]
    assert found[-1]["response"]["output"][0]["content"][0]["logprobs"] == done["logprobs"]


async def test_stream_that_is_cut(client: httpx.AsyncClient) -> None:
    assert (await stream(client))[-1]["type"] == "response.incomplete"


async def test_stream_that_fails(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = lambda submit: [say(submit, "ab")[0], Delta(submit.request_id, finish="error", error="Bad luck.")]
    *_, delta, error, last = await stream(client)
    assert delta["delta"] == "a"
    assert (error["type"], error["code"], error["message"]) == ("error", "engine_error", "Bad luck.")
    assert last["response"]["error"] == {"code": "server_error", "message": "Bad luck."}
    assert last["response"]["status"] == "failed"


async def test_failure(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = lambda submit: [Delta(submit.request_id, finish="error", error="Bad luck.")]
    response = await client.post("/v1/responses", json={"input": "Hi"})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_error")


async def test_stream_options_need_a_stream(client: httpx.AsyncClient) -> None:
    assert (await refused(client, stream_options={}))["param"] == "stream_options"
    await stream(client, stream_options={"include_obfuscation": False})


async def test_lone_surrogates(client: httpx.AsyncClient) -> None:
    body = rb'{"input": "a", "metadata": {"a": "\ud800"}}'
    response = await client.post("/v1/responses", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert "surrogate" in response.json()["error"]["message"]


TURNS = [
    {"role": "user", "content": "first " * 4},
    {"role": "assistant", "content": "second"},
    {"role": "system", "content": "s"},
    {"role": "user", "content": "third"},
    {"role": "assistant", "content": "fourth"},
    {"role": "user", "content": "fifth"},
]


@pytest.mark.parametrize(
    ("max_output_tokens", "prompt"),
    [
        (1, "[system]s[user]third[assistant]fourth[user]fifth>"),
        (20, "[system]s[user]fifth>"),
    ],
)
async def test_truncation(
    client: httpx.AsyncClient, engine: ScriptedEngine, max_output_tokens: int, prompt: str
) -> None:
    error = await refused(client, input=TURNS, max_output_tokens=max_output_tokens)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
    await post(client, input=TURNS, max_output_tokens=max_output_tokens, truncation="auto")
    assert prompt_of(engine) == prompt
    await post(client, input=TURNS[3:], truncation="auto")
    assert prompt_of(engine) == "[user]third[assistant]fourth[user]fifth>"


async def test_truncation_that_cannot_help(client: httpx.AsyncClient) -> None:
    error = await refused(client, input=[*TURNS, {"role": "user", "content": "x" * 64}], truncation="auto")
    assert error["code"] == "context_length_exceeded"


async def test_no_template() -> None:
    async with client_of(app_of(ScriptedEngine(), template=None)) as client:
        error = await refused(client)
    assert "no chat template" in error["message"]


async def test_template_refuses(client: httpx.AsyncClient) -> None:
    error = await refused(client, input=[{"role": "assistant", "content": "first"}])
    assert error["param"] == "input"
