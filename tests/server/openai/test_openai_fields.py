"""Every field of OpenAI's request types, as the installed `openai` package knows them: honoured, tolerated or refused.

A field that a later version of the package adds fails here until somebody has decided about it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from openai.types import completion_create_params as completion
from openai.types.chat import completion_create_params as chat
from scripted import MODEL, ScriptedEngine, app_of, client_of, events, say

from server.engine.messages import Submit
from server.openai.schema import TOLERATED

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{{ reasoning_effort }}{{ verbosity }}"
USER = {"role": "user", "content": "Hi"}
Seen = Callable[[list[Submit], Any], bool]  # the submits and the answer: was the value honoured?


def sampling(**expected: Any) -> Seen:
    return lambda submits, body: all(getattr(submits[0].sampling, key) == value for key, value in expected.items())


def text(body: Any) -> str:
    choice = body["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


COMMON: dict[str, tuple[Any, Seen]] = {
    "model": (MODEL, lambda submits, body: body["model"] == MODEL),
    "frequency_penalty": (0.5, sampling(frequency_penalty=0.5)),
    "presence_penalty": (0.5, sampling(presence_penalty=0.5)),
    "logit_bias": ({"7": 5}, sampling(logit_bias=((7, 5.0),))),
    "n": (2, lambda submits, body: len(submits) == len(body["choices"]) == 2),
    "seed": (5, sampling(seed=5)),
    "stop": ("l", lambda submits, body: text(body) == "He"),
    "temperature": (0.5, sampling(temperature=0.5)),
    "top_p": (0.5, sampling(top_p=0.5)),
    "max_tokens": (3, sampling(max_tokens=3)),
    "stream": (True, lambda submits, body: isinstance(body, list)),
}
COMPLETION = COMMON | {
    "prompt": ("abc", lambda submits, body: submits[0].prompt == tuple(b"abc")),
    "best_of": (3, lambda submits, body: (len(submits), len(body["choices"])) == (3, 1)),
    "echo": (True, lambda submits, body: text(body) == "HiHello"),
    "logprobs": (2, sampling(logprobs=2)),
}
CHAT = COMMON | {
    "messages": ([{"role": "user", "content": "abc"}], lambda submits, body: submits[0].prompt == tuple(b"abc")),
    "logprobs": (True, sampling(logprobs=0)),
    "max_completion_tokens": (3, sampling(max_tokens=3)),
    "modalities": (["text"], lambda submits, body: text(body) == "Hello"),
    "service_tier": ("default", lambda submits, body: text(body) == "Hello"),
    "reasoning_effort": ("low", lambda submits, body: submits[0].prompt == tuple(b"Hilow")),
    "verbosity": ("high", lambda submits, body: submits[0].prompt == tuple(b"Hihigh")),
    "function_call": ("none", lambda submits, body: text(body) == "Hello"),
}
TOGETHER = {
    "top_logprobs": ({"logprobs": True, "top_logprobs": 2}, sampling(logprobs=2)),
    "stream_options": (
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
        lambda submits, body: body[-1]["usage"]["completion_tokens"] == 5,
    ),
}
TOLERABLE = {
    "user": "u",
    "metadata": {"a": "b"},
    "store": True,
    "safety_identifier": "s",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
}
REFUSED = {
    "suffix": "x",
    "audio": {"voice": "alloy", "format": "wav"},
    "functions": [{"name": "f"}],
    "moderation": {"model": "m"},
    "prompt_cache_options": {"mode": "explicit"},
    "web_search_options": {},
}
ELSEWHERE = {"response_format", "tools", "tool_choice", "parallel_tool_calls", "prediction"}  # have tests of their own


def fields(params: Any) -> set[str]:
    """Of a request that streams or not."""
    both = (params.CompletionCreateParamsStreaming, params.CompletionCreateParamsNonStreaming)
    return set().union(*(kind.__required_keys__ | kind.__optional_keys__ for kind in both))


def test_every_field_is_decided() -> None:
    decided = TOGETHER.keys() | TOLERABLE.keys() | REFUSED.keys() | ELSEWHERE
    assert fields(completion) - decided == COMPLETION.keys()
    assert fields(chat) - decided == CHAT.keys()


def test_the_tolerated_are_documented() -> None:
    assert set(TOLERATED) == set(TOLERABLE)


def cases(table: dict[str, tuple[Any, Seen]], params: Any) -> list[Any]:
    alone = [({name: value}, seen) for name, (value, seen) in table.items()]
    together = [case for name, case in TOGETHER.items() if name in fields(params)]
    return [pytest.param(*case, id=", ".join(case[0])) for case in alone + together]


@pytest.mark.parametrize(("extra", "seen"), cases(COMPLETION, completion))
async def test_completions_honour(extra: dict, seen: Seen) -> None:
    await check_honoured("completions", {"prompt": "Hi", **extra}, seen)


@pytest.mark.parametrize(("extra", "seen"), cases(CHAT, chat))
async def test_chat_honours(extra: dict, seen: Seen) -> None:
    await check_honoured("chat/completions", {"messages": [USER], **extra}, seen)


async def check_honoured(route: str, body: dict, seen: Seen) -> None:
    engine = ScriptedEngine(lambda submit: say(submit, "Hello"))
    async with client_of(app_of(engine, template=TEMPLATE)) as client:
        response = await client.post(f"/v1/{route}", json=body)
    assert response.status_code == 200, response.text
    assert seen(engine.submits, events(response.text) if body.get("stream") else response.json())


ROUTES = [("completions", {"prompt": "Hi"}, completion), ("chat/completions", {"messages": [USER]}, chat)]


@pytest.mark.parametrize(("route", "body", "params"), ROUTES)
async def test_tolerated_fields_change_nothing(
    client: httpx.AsyncClient, engine: ScriptedEngine, route: str, body: dict, params: Any
) -> None:
    tolerable = {name: value for name, value in TOLERABLE.items() if name in fields(params)}
    answers = [await client.post(f"/v1/{route}", json={"seed": 1, **body, **extra}) for extra in ({}, tolerable)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert engine.submits[0].sampling == engine.submits[1].sampling
    assert engine.submits[0].prompt == engine.submits[1].prompt


@pytest.mark.parametrize(
    ("route", "body", "name"),
    [(route, body, name) for route, body, params in ROUTES for name in REFUSED if name in fields(params)],
)
async def test_refused_fields_say_why(client: httpx.AsyncClient, route: str, body: dict, name: str) -> None:
    response = await client.post(f"/v1/{route}", json={**body, name: REFUSED[name]})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, name)
    assert "not supported" in error["message"]
    assert (await client.post(f"/v1/{route}", json={**body, name: None})).status_code == 200


async def test_every_field_of_the_documentation_is_described(client: httpx.AsyncClient) -> None:
    schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    mine = ("CompletionRequest", "ChatRequest", "Message", "StreamOptions", "SpeculationOptions")
    bare = [
        name
        for schema in mine
        for name, field in schemas[schema]["properties"].items()
        if not field.get("description") and name not in ELSEWHERE
    ]
    assert bare == []
