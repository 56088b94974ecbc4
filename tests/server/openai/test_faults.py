"""Whatever goes wrong has OpenAI's shape."""

from __future__ import annotations

import httpx
import pytest
from pydantic import ValidationError
from scripted import HANG, ScriptedEngine, events, say

from server.engine.messages import Delta
from server.errors import EngineDeadError
from server.openai.schema import ChatRequest

JSON = {"content-type": "application/json"}


def error_of(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["code"], str)
    return error


@pytest.mark.parametrize("body", [b"{", b"", b"[]", b"3", b"\xff", b'"x"', b"[" * 100_000])
async def test_malformed_bodies(client: httpx.AsyncClient, body: bytes) -> None:
    response = await client.post("/v1/completions", content=body, headers=JSON)
    error = error_of(response, 400)
    assert (error["type"], error["code"] in ("invalid_json", "invalid_type")) == ("invalid_request_error", True)


CODES = [
    ({}, "messages", "missing_required_parameter"),
    ({"messages": [{"content": "a"}]}, "messages[0].role", "missing_required_parameter"),
    ({"mesages": []}, "messages", "missing_required_parameter"),
    ({"surprise": 1}, "surprise", "unknown_parameter"),
    ({"speculation": {"surprise": 1}}, "speculation.surprise", "unknown_parameter"),
    ({"temperature": "hot"}, "temperature", "invalid_type"),
    ({"stop": [""]}, "stop[0]", "invalid_value"),
    ({"stop": ""}, "stop", "invalid_value"),
    ({"temperature": 3}, "temperature", "invalid_value"),
    ({"audio": {}}, "audio", "unsupported_value"),
    ({"spaces_between_special_tokens": False}, "spaces_between_special_tokens", "unsupported_value"),
    ({"tool_choice": "never"}, "tool_choice", "invalid_value"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 3}}},
        "response_format.json_schema.schema",
        "invalid_type",
    ),
    ({"metadata": {str(n): "x" for n in range(17)}}, "metadata", "invalid_value"),
    ({"top_logprobs": 1}, "top_logprobs", "invalid_value"),
    ({"max_tokens": 1000}, "messages", "context_length_exceeded"),
]


@pytest.mark.parametrize(("body", "param", "code"), CODES)
async def test_param_and_code(client: httpx.AsyncClient, body: dict, param: str, code: str) -> None:
    whole = (
        body
        if {"messages", "mesages"} & body.keys() or not body
        else {"messages": [{"role": "user", "content": "a"}], **body}
    )
    error = error_of(await client.post("/v1/chat/completions", json=whole), 400)
    assert (error["param"], error["code"]) == (param, code)


@pytest.mark.parametrize(
    "flood",
    [
        {str(n): 1 for n in range(50_000)},
        {"speculation": {str(n): 1 for n in range(50_000)}},
        {"allowed_token_ids": ["x"] * 50_000},
        {"logit_bias": {str(n): "x" for n in range(50_000)}},
        {"metadata": {str(n): 1 for n in range(50_000)}},
        {"messages": [{}] * 50_000},
        {"modalities": [1] * 50_000},
    ],
)
def test_a_body_full_of_errors_has_one(flood: dict) -> None:
    """Each error costs ten microseconds, in which nobody else is served."""
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate({"messages": [{"role": "user", "content": "a"}], **flood})
    assert caught.value.error_count() == 1


@pytest.mark.parametrize("value", [b"NaN", b"Infinity", b"1e999"])
async def test_no_number(client: httpx.AsyncClient, value: bytes) -> None:
    body = b'{"prompt": "a", "temperature": ' + value + b"}"
    error = error_of(await client.post("/v1/completions", content=body, headers=JSON), 400)
    assert error["param"] == "temperature"


@pytest.mark.parametrize(
    "body", [rb'{"prompt": "\ud800"}', rb'{"prompt": "a", "\ud800": 1}', rb'{"prompt": "a", "stop": ["\ud800"]}']
)
async def test_lone_surrogates(client: httpx.AsyncClient, body: bytes) -> None:
    error = error_of(await client.post("/v1/completions", content=body, headers=JSON), 400)
    assert "surrogate" in error["message"]


@pytest.mark.parametrize("headers", [{}, {"content-type": "text/plain"}])
async def test_content_type(client: httpx.AsyncClient, headers: dict) -> None:
    response = await client.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)
    assert "application/json" in error_of(response, 415)["message"]


async def test_unknown_route(client: httpx.AsyncClient) -> None:
    error = error_of(await client.get("/v2/models"), 404)
    assert ("GET /v2/models" in error["message"], error["code"]) == (True, "unknown_url")


async def test_wrong_method(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/completions")
    assert error_of(response, 405)["code"] == "method_not_supported"
    assert response.headers["allow"] == "POST"


async def test_wrong_model(client: httpx.AsyncClient) -> None:
    error = error_of(await client.post("/v1/completions", json={"model": "gpt-5", "prompt": "a"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


async def test_bug(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    def script(submit: object) -> list:
        raise ZeroDivisionError("secret")

    engine.script = script
    error = error_of(await client.post("/v1/completions", json={"prompt": "a"}), 500)
    assert (error["type"], "secret" in error["message"]) == ("server_error", False)


def failing(kind: str) -> object:
    def script(submit: object) -> list:
        first = say(submit, "ab")[0]
        ends = {
            "error": Delta(submit.request_id, finish="error", error="Out of luck."),
            "abort": Delta(submit.request_id, finish="abort"),
            "dead": EngineDeadError("The engine died."),
        }
        return [first, ends[kind]]

    return script


FAILURES = [("error", 500, "engine_error"), ("abort", 503, "shutting_down"), ("dead", 503, "engine_dead")]


@pytest.mark.parametrize(("kind", "status", "code"), FAILURES)
async def test_engine_fails(
    client: httpx.AsyncClient, engine: ScriptedEngine, kind: str, status: int, code: str
) -> None:
    engine.script = failing(kind)
    response = await client.post("/v1/completions", json={"prompt": "a"})
    error = error_of(response, status)
    assert (error["type"], error["code"]) == ("server_error", code)
    assert ("retry-after" in response.headers) == (status == 503)


@pytest.mark.parametrize(("kind", "status", "code"), FAILURES)
async def test_engine_fails_in_a_stream(
    client: httpx.AsyncClient, engine: ScriptedEngine, kind: str, status: int, code: str
) -> None:
    engine.script = failing(kind)
    response = await client.post("/v1/completions", json={"prompt": "a", "stream": True})
    first, last = events(response.text)
    assert first["choices"][0]["text"] == "a"
    assert (set(last), last["error"]["code"]) == ({"error"}, code)


async def test_one_failure_ends_all_choices(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    fail = failing("error")
    engine.script = lambda submit: fail(submit) if submit.sampling.choice else [HANG]
    error_of(await client.post("/v1/completions", json={"prompt": "a", "n": 3}), 500)
    assert [name[-2:] for name in engine.aborted][:1] == ["-0"]


@pytest.mark.parametrize("status", ["starting", "restarting", "dead"])
@pytest.mark.parametrize("stream", [False, True])
async def test_engine_not_ready(client: httpx.AsyncClient, engine: ScriptedEngine, status: str, stream: bool) -> None:
    engine.status = status
    response = await client.post("/v1/completions", json={"prompt": "a", "stream": stream})
    assert error_of(response, 503)["code"] == "engine_dead"
    assert engine.submits == []
