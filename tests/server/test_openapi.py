"""The OpenAPI document and its page: valid, complete, and what is really answered."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from pydantic import BaseModel
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR
from scripted import ScriptedEngine, app_of, events, say

from server.openai.answers import ChatCompletion, ChatCompletionChunk, Completion, CompletionChunk, ErrorAnswer
from server.openai.pages import EXAMPLES
from server.openai.responses_answers import ResponseObject, ResponseStreamEvent

COMPLETION = {"prompt": ["a", [98]], "echo": True, "logprobs": 2, "n": 2}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 2}
RESPONSE = {"input": "Hi", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
SHAPES = [
    ("/v1/completions", COMPLETION, Completion, CompletionChunk),
    ("/v1/chat/completions", CHAT, ChatCompletion, ChatCompletionChunk),
    ("/v1/responses", RESPONSE, ResponseObject, ResponseStreamEvent),
]


@pytest.fixture
def engine() -> ScriptedEngine:
    speculation = {"num_spec_steps": 2, "num_draft_tokens": 4, "num_accepted_draft_tokens": 1}
    speculation |= {"num_steps": 3, "step_seconds": 0.5, "plain_seconds": 0.75}
    return ScriptedEngine(lambda submit: say(submit, "Hello", speculation=speculation), max_model_len=256)


@pytest.fixture
def document() -> dict[str, Any]:
    return app_of(ScriptedEngine()).openapi()


def test_the_document_is_openapi(document: dict[str, Any]) -> None:
    assert document["openapi"] == "3.1.0"
    assert [str(error) for error in OPENAPI_31_VALIDATOR.iter_errors(document)] == []


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    names = json.dumps(document).split('"#/components/schemas/')[1:]
    assert {name.partition('"')[0] for name in names} <= document["components"]["schemas"].keys()


def test_every_route_says_what_it_does_and_answers(document: dict[str, Any]) -> None:
    tags = {tag["name"] for tag in document["tags"]}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert operation["summary"], path
            assert operation["description"], path
            assert set(operation["tags"]) <= tags, path
            for status in ("200", "4XX", "5XX"):
                for content in operation["responses"][status]["content"].values():
                    assert "$ref" in content["schema"] or content["schema"]["type"] in ("string", "object"), path


def test_the_document_is_made_once() -> None:
    app = app_of(ScriptedEngine())
    assert app.openapi() is app.openapi()


async def test_the_page(client: httpx.AsyncClient) -> None:
    assert "/openapi.json" in (await client.get("/docs")).text
    assert (await client.get("/openapi.json")).json()["info"]["title"] == "medusa-serve"


@pytest.mark.parametrize("path", EXAMPLES)
async def test_examples_work(client: httpx.AsyncClient, path: str) -> None:
    response = await client.post(path, json=EXAMPLES[path])
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(("path", "body", "answer", "_"), SHAPES)
async def test_answers(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], answer: type[BaseModel], _: object
) -> None:
    answer.model_validate((await client.post(path, json=body)).json(), strict=True)
    ErrorAnswer.model_validate((await client.post(path, json=body | {"no_such_field": 1})).json(), strict=True)


@pytest.mark.parametrize(("path", "body", "_", "event"), SHAPES)
async def test_events(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], _: object, event: type[BaseModel]
) -> None:
    text = (await client.post(path, json=body | {"stream": True})).text
    named = path == "/v1/responses"
    found = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")] if named else events(text)
    assert len(found) > 5
    for content in found:
        event.model_validate(content, strict=True)


async def test_events_with_usage(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    response = await client.post("/v1/chat/completions", json=CHAT | {"stream": True, "stream_options": options})
    for content in events(response.text):
        ChatCompletionChunk.model_validate(content, strict=True)
