"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import EOS, MODEL, ScriptedEngine

USER = {"role": "user", "content": "Hi"}


async def post(client: httpx.AsyncClient, path: str, **body: object) -> dict[str, Any]:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_prompt(client: httpx.AsyncClient) -> None:
    answer = await post(client, "/tokenize", model=MODEL, prompt="é!")
    assert answer == {"count": 3, "max_model_len": 64, "tokens": [0xC3, 0xA9, 0x21], "token_strs": None}


async def test_names(client: httpx.AsyncClient) -> None:
    """As the vocabulary has them, so that halves of a character differ."""
    answer = await post(client, "/tokenize", prompt="é <|end|>", return_token_strs=True)
    assert answer["token_strs"] == ["Ã", "©", "Ġ", "<|end|>"]


async def test_messages_are_what_a_chat_sees(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    for options in ({}, {"add_generation_prompt": False}):
        answer = await post(client, "/tokenize", messages=[USER], **options)
        await post(client, "/v1/chat/completions", messages=[USER], **options)
        assert tuple(answer["tokens"]) == engine.submits[-1].prompt
    messages = [USER, {"role": "assistant", "content": "Well"}]
    open_end = {"add_generation_prompt": False, "continue_final_message": True}
    answer = await post(client, "/tokenize", messages=messages, **open_end)
    assert bytes(answer["tokens"]).decode() == "[user]Hi[assistant]Well"


async def test_detokenize(client: httpx.AsyncClient) -> None:
    assert await post(client, "/detokenize", tokens=[*b"Hi", EOS]) == {"prompt": "Hi<|end|>"}
    assert await post(client, "/detokenize", tokens=[]) == {"prompt": ""}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.text(st.characters(codec="utf-8")))
async def test_there_and_back(client: httpx.AsyncClient, text: str) -> None:
    tokens = (await post(client, "/tokenize", prompt=text))["tokens"]
    assert await post(client, "/detokenize", tokens=tokens) == {"prompt": text}


@pytest.mark.parametrize("status", ["starting", "dead"])
async def test_they_need_no_engine(client: httpx.AsyncClient, engine: ScriptedEngine, status: str) -> None:
    engine.status = status
    assert (await post(client, "/tokenize", prompt="a"))["count"] == 1
    assert await post(client, "/detokenize", tokens=[97]) == {"prompt": "a"}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, None),
        ("/tokenize", {"prompt": "a", "messages": [USER]}, 400, None),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, 400, None),
        ("/tokenize", {"messages": [USER], "continue_final_message": True}, 400, None),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/tokenize", {"prompt": "a", "no_such_field": 1}, 400, "no_such_field"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [300]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [97], "model": "other"}, 404, "model"),
    ],
)
async def test_refusals(client: httpx.AsyncClient, path: str, body: dict[str, Any], status: int, param: str) -> None:
    response = await client.post(path, json=body)
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param
