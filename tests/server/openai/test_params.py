"""What reaches the engine, and what is refused with a reason."""

from __future__ import annotations

import httpx
import pytest
from scripted import EOS, VOCAB, ScriptedEngine

from server.engine.messages import SamplingParams, SpeculationParams

USER = {"role": "user", "content": "Hi"}


async def test_defaults(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await client.post("/v1/completions", json={"prompt": "Hi", "seed": 1})
    assert engine.submits[0].sampling == SamplingParams(max_tokens=16, seed=1)
    assert engine.submits[0].speculation == SpeculationParams()
    assert engine.submits[0].priority == 0


async def test_everything(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    same = {
        "temperature": 0.5,
        "top_p": 0.9,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -2,
        "repetition_penalty": 1.5,
        "min_tokens": 3,
        "ignore_eos": True,
        "max_tokens": 9,
        "seed": -(2**63),
        "logprobs": 20,
    }
    ours = {"mode": "typical", "max_nodes": 5, "epsilon": 0.1, "delta": 0.2}
    sent = {"prompt": "Hi", "logit_bias": {"5": -100, "6": 1}, "stop_token_ids": [7], "top_k": -1, "priority": -4}
    response = await client.post("/v1/completions", json=same | sent | {"speculation": ours})
    assert response.status_code == 200, response.text
    submit = engine.submits[0]
    assert submit.sampling == SamplingParams(**same, logit_bias=((5, -100.0), (6, 1.0)), stop_token_ids=(7,))
    assert submit.speculation == SpeculationParams(**ours)
    assert submit.priority == -4


@pytest.mark.parametrize(("given", "used"), [(1e-300, 0.0), (9e-6, 0.0), (1e-5, 1e-5)])
async def test_temperatures_that_would_overflow_are_greedy(
    client: httpx.AsyncClient, engine: ScriptedEngine, given: float, used: float
) -> None:
    await client.post("/v1/completions", json={"prompt": "Hi", "temperature": given})
    assert engine.submits[0].sampling.temperature == used


async def test_a_long_logit_bias_is_refused(client: httpx.AsyncClient) -> None:
    bias = {str(id): 1 for id in range(1025)}
    error = (await client.post("/v1/completions", json={"prompt": "Hi", "logit_bias": bias})).json()["error"]
    assert error["param"] == "logit_bias"
    assert "at most 1024" in error["message"]


async def test_seeds_are_drawn(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    for _ in range(2):
        await client.post("/v1/completions", json={"prompt": "Hi", "n": 2})
    seeds = [submit.sampling.seed for submit in engine.submits]
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]


BAD = [
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 1, "01": 2}}, "logit_bias"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    ({"logit_bias": {str(VOCAB): 1}}, "logit_bias"),
    ({"stop_token_ids": [VOCAB]}, "stop_token_ids"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [VOCAB]}, "allowed_token_ids"),
    ({"allowed_token_ids": [97], "bad_words": ["a"]}, "allowed_token_ids"),
    ({"allowed_token_ids": [EOS], "min_tokens": 1}, "allowed_token_ids"),
    ({"bad_words": [""]}, "bad_words[0]"),
    ({"bad_words": ["a"] * 1025}, "bad_words"),
    ({"bad_words": "a"}, "bad_words"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"spaces_between_special_tokens": False}, "spaces_between_special_tokens"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"stop": ""}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"min_tokens": 17, "max_tokens": 16}, "min_tokens"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"seed": 2**64}, "seed"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    ({"speculation": {"mode": "fast"}}, "speculation.mode"),
    ({"speculation": {"max_nodes": 64}}, "speculation.max_nodes"),
    ({"speculation": {"epsilon": 0.1}}, "speculation"),
    ({"speculation": {"mode": "off", "max_nodes": 2}}, "speculation.max_nodes"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"nonsense": 1}, "nonsense"),
    ({"nonsense": None}, "nonsense"),
]


@pytest.mark.parametrize(("extra", "param"), BAD)
@pytest.mark.parametrize("route", ["completions", "chat/completions"])
async def test_refused(client: httpx.AsyncClient, engine: ScriptedEngine, route: str, extra: dict, param: str) -> None:
    prompt = {"prompt": "Hi"} if route == "completions" else {"messages": [USER]}
    await check_refused(client, f"/v1/{route}", prompt | extra, param)
    assert engine.submits == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [VOCAB]}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 100}, "prompt"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "best_of": 1, "n": 2}, "best_of"),
        ({"prompt": "a", "best_of": 129}, "best_of"),
        ({"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
        ({"prompt": ["a"] * 100, "best_of": 100}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
    ],
)
async def test_completion_refused(client: httpx.AsyncClient, body: dict, param: str) -> None:
    await check_refused(client, "/v1/completions", body, param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [USER | {"content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
        ({"messages": [USER | {"tool_calls": [{"type": "function"}]}]}, "messages[0].tool_calls[0].id"),
        ({"messages": [USER], "tools": [{"type": "function"}]}, "tools[0].function"),
        ({"messages": [USER], "functions": [{}]}, "functions"),
        ({"messages": [USER], "top_logprobs": 2}, "top_logprobs"),
        ({"messages": [USER], "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": [USER], "max_tokens": 0}, "max_tokens"),
        ({"messages": [USER], "chat_template": "x"}, "chat_template"),
        ({"messages": [USER], "documents": [{"text": "x"}]}, "documents"),
        ({"messages": [USER], "function_call": {"name": "f"}}, "function_call"),
        ({"messages": [USER], "modalities": ["text", "audio"]}, "modalities[1]"),
        ({"messages": [USER], "service_tier": "flex"}, "service_tier"),
        ({"messages": [USER], "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"messages": [USER], "prompt": "x"}, "prompt"),
    ],
)
async def test_chat_refused(client: httpx.AsyncClient, body: dict, param: str) -> None:
    await check_refused(client, "/v1/chat/completions", body, param)


async def check_refused(client: httpx.AsyncClient, url: str, body: dict, param: str) -> None:
    response = await client.post(url, json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["message"].endswith(".")


@pytest.mark.parametrize(
    ("body", "asked"),
    [
        ({"prompt": "x" * 64}, "64 tokens (64 in the prompt)"),
        ({"prompt": "x", "max_tokens": 64}, "65 tokens (1 in the"),
    ],
)
async def test_too_long(client: httpx.AsyncClient, body: dict, asked: str) -> None:
    error = (await client.post("/v1/completions", json=body)).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "prompt"
    assert "maximum context length is 64 tokens" in error["message"]
    assert asked in error["message"]


async def test_all_that_fits_is_taken(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    full = {"prompt": "x" * 64, "max_tokens": 0, "echo": True}
    assert (await client.post("/v1/completions", json=full)).status_code == 200
    assert (await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 63})).status_code == 200
