"""POST /v1/chat/completions: OpenAI's objects from scripted tokens."""

from __future__ import annotations

import httpx
import pytest
from scripted import EOS, MODEL, ScriptedEngine, app_of, client_of, events, say

USER = {"role": "user", "content": "Hi"}


async def post(client: httpx.AsyncClient, **body: object) -> dict:
    response = await client.post("/v1/chat/completions", json={"messages": [USER], **body})
    assert response.status_code == 200, response.text
    return response.json()


def prompt_of(engine: ScriptedEngine) -> str:
    return bytes(engine.submits[-1].prompt).decode()


async def test_object(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = lambda submit: say(submit, [*b"Hello", EOS], finish="stop")
    body = await post(client, model=MODEL)
    assert body["id"].startswith("chatcmpl-")
    assert (body["object"], body["model"], body["system_fingerprint"]) == ("chat.completion", MODEL, None)
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert body["usage"]["completion_tokens"] == 6
    assert prompt_of(engine) == "[user]Hi>"


async def test_chat_defaults_to_all_that_fits(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await post(client)
    assert engine.submits[0].sampling.max_tokens == 64 - len("[user]Hi>")


@pytest.mark.parametrize("limit", [{"max_tokens": 3}, {"max_completion_tokens": 3}])
async def test_limits(client: httpx.AsyncClient, engine: ScriptedEngine, limit: dict) -> None:
    await post(client, **limit)
    assert engine.submits[0].sampling.max_tokens == 3


async def test_messages(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    """Parts are joined, a developer is a system, and an answer may come back as it was sent."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    empty = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    messages = [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": parts, "name": "Ada"},
        {"role": "assistant", "content": "c", **empty},
    ]
    await post(client, messages=messages)
    assert prompt_of(engine) == "[system]d[user]a\nb[assistant]c>"


async def test_template_options(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await post(client, add_generation_prompt=False)
    assert prompt_of(engine) == "[user]Hi"
    messages = [USER, {"role": "assistant", "content": "Well"}]
    await post(client, messages=messages, add_generation_prompt=False, continue_final_message=True)
    assert prompt_of(engine) == "[user]Hi[assistant]Well"


@pytest.mark.parametrize("top", [{}, {"top_logprobs": 2}])
async def test_logprobs(client: httpx.AsyncClient, engine: ScriptedEngine, top: dict) -> None:
    engine.script = lambda submit: say(submit, "é")
    logprobs = (await post(client, logprobs=True, **top))["choices"][0]["logprobs"]
    assert logprobs["refusal"] is None
    first = logprobs["content"][0]
    assert (first["token"], first["logprob"], first["bytes"]) == ("\ufffd", -1.0, [0xC3])
    bytes_and_logprobs = [(other["bytes"], other["logprob"]) for other in first["top_logprobs"]]
    assert bytes_and_logprobs == ([([0xC3], -1.0), ([0xC4], -2.0)] if top else [])


async def test_stream(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = lambda submit: say(submit, [*"aé".encode(), EOS], finish="stop")
    response = await client.post(
        "/v1/chat/completions",
        json={"messages": [USER], "stream": True, "stream_options": {"include_usage": True}, "logprobs": True},
    )
    *chunks, last = events(response.text)
    assert {chunk["object"] for chunk in [*chunks, last]} == {"chat.completion.chunk"}
    choices = [chunk["choices"][0] for chunk in chunks]
    role = {"role": "assistant", "content": "", "refusal": None}
    assert [choice["delta"] for choice in choices] == [role, {"content": "a"}, {"content": "é"}, {}]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]
    tokens = [len(choice["logprobs"]["content"]) if choice["logprobs"] else 0 for choice in choices]
    assert tokens == [0, 1, 2, 1]
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 4)


async def test_choices_have_their_own_roles(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/chat/completions", json={"messages": [USER], "stream": True, "n": 2})
    choices = [chunk["choices"][0] for chunk in events(response.text)]
    assert [(choice["index"], choice["delta"].get("role")) for choice in choices[:2]] == [
        (0, "assistant"),
        (1, "assistant"),
    ]
    for index in (0, 1):
        own = [choice for choice in choices if choice["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in own) == "Hello"
        assert [choice["finish_reason"] for choice in own].count("length") == 1


async def test_harmless_fields_are_tolerated(client: httpx.AsyncClient) -> None:
    known = {"user": "u", "metadata": {"a": "b"}, "store": False, "safety_identifier": "s", "prompt_cache_key": "k"}
    none = {"tools": [], "functions": [], "tool_choice": "none", "response_format": {"type": "text"}}
    await post(client, **known, **none, temperature=None, stop=None)


@pytest.mark.parametrize("content", ["a\nb", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]])
async def test_prediction(client: httpx.AsyncClient, engine: ScriptedEngine, content: object) -> None:
    counts = {"num_accepted_prediction_tokens": 3, "num_rejected_prediction_tokens": 1}
    engine.script = lambda submit: say(submit, "Hello", speculation=counts)
    body = await post(client, prediction={"type": "content", "content": content}, n=2)
    assert [submit.prediction for submit in engine.submits] == [tuple(b"a\nb")] * 2
    details = {"accepted_prediction_tokens": 6, "rejected_prediction_tokens": 2}
    assert body["usage"]["completion_tokens_details"] == details


async def test_what_became_of_a_prediction_is_unknown_until_the_end(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"messages": [USER], "stream": True, "stream_options": options}
    response = await client.post("/v1/chat/completions", json=body)
    details = [chunk["usage"]["completion_tokens_details"] for chunk in events(response.text)]
    assert details[0] is None
    assert details[-1] == {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}


@pytest.mark.parametrize(
    ("prediction", "param"),
    [
        ("Hello", "prediction"),
        ({"type": "content"}, "prediction.content"),
        ({"type": "text", "content": "a"}, "prediction.type"),
        ({"type": "content", "content": [{"type": "image_url"}]}, "prediction.content"),
        ({"type": "content", "content": "a", "more": 1}, "prediction.more"),
    ],
)
async def test_what_is_no_prediction_is_refused(client: httpx.AsyncClient, prediction: object, param: str) -> None:
    response = await client.post("/v1/chat/completions", json={"messages": [USER], "prediction": prediction})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_completions_have_no_prediction(client: httpx.AsyncClient) -> None:
    body = {"prompt": "Hi", "prediction": {"type": "content", "content": "a"}}
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prediction"


async def test_template_refuses(client: httpx.AsyncClient) -> None:
    messages = [{"role": "assistant", "content": "first"}]
    response = await client.post("/v1/chat/completions", json={"messages": messages})
    assert response.status_code == 400
    assert "user first" in response.json()["error"]["message"]


async def test_no_template() -> None:
    async with client_of(app_of(ScriptedEngine(), template=None)) as client:
        response = await client.post("/v1/chat/completions", json={"messages": [USER]})
    assert response.status_code == 400
    assert "no chat template" in response.json()["error"]["message"]
