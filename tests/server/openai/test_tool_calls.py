"""Tools over chat: what the model is told, what it may say, and how its calls are shown and streamed."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from scripted import EOS, ScriptedEngine, app_of, byte_tokenizer, client_of, events, say

from server.app import create_app
from server.metrics import Metrics

USER = {"role": "user", "content": "Hi"}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Sky.", "parameters": CITY}}
NOW = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
ARGUMENTS = '{"city": "Paris"}'
AWARE = "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
AWARE += "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments.a }}{% endfor %}{% endfor %}"


def engine_saying(text: str, *, by: int = 1, finish: str = "stop") -> ScriptedEngine:
    said = [*text.encode(), *([EOS] if finish == "stop" else [])]
    return ScriptedEngine(lambda submit: say(submit, said, finish=finish, by=by), max_model_len=4096)  # type: ignore[arg-type]


async def post(engine: ScriptedEngine, template: str | None = None, **body: object) -> httpx.Response:
    app = app_of(engine) if template is None else app_of(engine, template=template)
    async with client_of(app) as client:
        return await client.post("/v1/chat/completions", json={"messages": [USER], "tools": [WEATHER, NOW], **body})


async def choice(engine: ScriptedEngine, **body: object) -> dict[str, Any]:
    response = await post(engine, **body)
    assert response.status_code == 200, response.text
    ChatCompletion.model_validate(response.json())
    found: dict[str, Any] = response.json()["choices"][0]
    return found


def functions(message: dict[str, Any]) -> list[tuple[str, str]]:
    calls = message.get("tool_calls", [])
    assert all(call["type"] == "function" and call["id"].startswith("call_") for call in calls)
    assert len({call["id"] for call in calls}) == len(calls)
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


async def test_calls_and_content() -> None:
    found = await choice(engine_saying(f"Let me see.\n{CALL}\n{CALL}"))
    assert found["finish_reason"] == "tool_calls"
    assert found["message"]["content"] == "Let me see."
    assert functions(found["message"]) == [("weather", ARGUMENTS)] * 2
    silent = await choice(engine_saying(CALL))
    assert silent["message"]["content"] is None


async def test_no_call() -> None:
    found = await choice(engine_saying("No <tool for that."))
    assert (found["finish_reason"], found["message"]["content"]) == ("stop", "No <tool for that.")
    assert "tool_calls" not in found["message"]


async def test_a_cut_call_is_what_there_is() -> None:
    found = await choice(engine_saying(CALL[: CALL.index('is"')], finish="length"))
    assert found["finish_reason"] == "length"
    assert functions(found["message"]) == [("weather", '{"city": "Par')]


@pytest.mark.parametrize("by", [1, 2, 5, 1000])
@pytest.mark.parametrize("text", [f"See:\n{CALL}\n{CALL}", CALL, "Just text", "<tool_call>no", CALL[:-20]])
async def test_deltas_joined_are_the_message(text: str, by: int) -> None:
    whole = await choice(engine_saying(text, by=by))
    response = await post(engine_saying(text, by=by), stream=True)
    content, calls, finish = None, {}, []
    for chunk in events(response.text):
        ChatCompletionChunk.model_validate(chunk)
        part = chunk["choices"][0]
        delta = part["delta"]
        content = content if delta.get("content") is None else (content or "") + delta["content"]
        for call in delta.get("tool_calls", []):
            function = call.pop("function")
            if "id" in call:
                assert call["index"] not in calls
                calls[call["index"]] = [function["name"], ""]
            calls[call["index"]][1] += function["arguments"]
        finish += [part["finish_reason"]] if part["finish_reason"] else []
    assert content == whole["message"]["content"]
    assert [tuple(call) for _, call in sorted(calls.items())] == functions(whole["message"])
    assert finish == [whole["finish_reason"]]


async def test_arguments_stream_as_they_come() -> None:
    response = await post(engine_saying(CALL), stream=True)
    deltas = [chunk["choices"][0]["delta"] for chunk in events(response.text)]
    pieces = [delta["tool_calls"][0]["function"]["arguments"] for delta in deltas if "tool_calls" in delta]
    assert "".join(pieces) == ARGUMENTS
    assert len(pieces) == len(ARGUMENTS)


async def test_what_each_tool_choice_allows() -> None:
    engine = engine_saying(CALL)

    async def grammar(**body: object) -> str | None:
        await choice(engine, **body)
        found: str | None = engine.submits[-1].sampling.grammar
        return found

    assert await grammar() is None
    assert await grammar(tool_choice="none") is None
    required = await grammar(tool_choice="required") or ""
    assert all(part in required for part in ("weather", "now", "{0,15}"))
    assert "{0,15}" not in (await grammar(tool_choice="required", parallel_tool_calls=False) or "")
    named = await grammar(tool_choice={"type": "function", "function": {"name": "now"}}) or ""
    assert "now" in named
    assert "weather" not in named
    assert "TEXT" in (await grammar(parallel_tool_calls=False) or "")
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    assert "TEXT" in (await grammar(tools=[strict]) or "")
    assert "answer: %json" in (await grammar(response_format={"type": "json_object"}) or "")


async def test_none_calls_nobody() -> None:
    engine = engine_saying(CALL)
    found = await choice(engine, tool_choice="none")
    assert (found["finish_reason"], found["message"]["content"]) == ("stop", CALL)
    assert b"weather" not in bytes(engine.submits[0].prompt)


async def test_what_the_model_is_told() -> None:
    engine = engine_saying("ok")
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 7}'}}
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages += [{"role": "tool", "tool_call_id": "c1", "content": "sunny"}]
    await post(engine, template=AWARE, messages=messages)
    aware = bytes(engine.submits[-1].prompt).decode()
    assert aware.startswith("<tool_call>[{")
    assert json.loads(aware[len("<tool_call>") : aware.index("[user]")])[0] == WEATHER
    assert aware.endswith("[user]Hi[assistant]f7[tool]sunny")
    await post(engine, messages=messages)
    told = bytes(engine.submits[-1].prompt).decode()
    assert told.startswith("[system]# Tools")
    assert told.endswith("[user]<tool_response>\nsunny\n</tool_response>>")


BAD = [
    ({"tools": [], "tool_choice": "required"}, "tool_choice", "only allowed when tools"),
    ({"tools": [], "parallel_tool_calls": True}, "parallel_tool_calls", "only allowed when tools"),
    ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "'x' is not among the tools"),
    ({"structured_outputs": {"regex": "a"}}, "structured_outputs", "cannot be combined"),
    (
        {"tools": [NOW, {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "x"}}}]},
        "tools[1].function.parameters",
        "Invalid schema for function 'f': Invalid type: x.",
    ),
    ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools[0].function.name", ""),
    ({"tools": [NOW] * 129}, "tools", ""),
    ({"functions": [{"name": "f"}]}, "functions", "send tools"),
    ({"messages": [USER, {"role": "tool", "content": "x"}]}, "messages[1]", "tool_call_id"),
    ({"messages": [{**USER, "tool_call_id": "x"}]}, "messages[0]", "tool_call_id"),
    (
        {
            "messages": [
                USER,
                {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "["}}]},
            ]
        },
        "messages[1].tool_calls[0].function.arguments",
        "JSON object",
    ),
]


@pytest.mark.parametrize(("body", "param", "sentence"), BAD)
async def test_refused(body: dict, param: str, sentence: str) -> None:
    engine = engine_saying("ok")
    response = await post(engine, **body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert sentence in error["message"]
    assert engine.submits == []


async def test_a_format_that_nobody_knows_is_refused() -> None:
    response = await post(engine_saying("ok"), template="{% if tools %}[TOOL_CALLS]{% endif %}")
    assert response.status_code == 400
    assert "--tool-call-parser" in response.json()["error"]["message"]


async def test_the_format_can_be_set() -> None:
    engine = engine_saying('{"name": "weather", "parameters": {"city": "Paris"}}')
    app = create_app(engine, byte_tokenizer(), model_name="m", metrics=Metrics("m"), tool_call_parser="llama3_json")
    async with client_of(app) as client:
        response = await client.post("/v1/chat/completions", json={"messages": [USER], "tools": [WEATHER]})
    assert functions(response.json()["choices"][0]["message"]) == [("weather", ARGUMENTS)]
