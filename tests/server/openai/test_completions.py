"""POST /v1/completions: OpenAI's objects from scripted tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import httpx
import pytest
from scripted import EOS, MODEL, ScriptedEngine, events, say

from server.engine.messages import Delta, Submit, TokenLogprobs
from server.errors import EngineDeadError


async def post(client: httpx.AsyncClient, **body: object) -> dict:
    response = await client.post("/v1/completions", json={"model": MODEL, "prompt": "Hi", **body})
    assert response.status_code == 200, response.text
    return response.json()


async def stream(client: httpx.AsyncClient, **body: object) -> list[dict]:
    response = await client.post("/v1/completions", json={"prompt": "Hi", "stream": True, **body})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["cache-control"] == "no-cache"
    return events(response.text)


async def test_object(client: httpx.AsyncClient) -> None:
    body = await post(client)
    assert body.pop("id").startswith("cmpl-")
    assert isinstance(body.pop("created"), int)
    nothing = {"num_spec_steps": 0, "num_draft_tokens": 0, "num_accepted_draft_tokens": 0}
    rates = {"mean_acceptance_length": None, "draft_acceptance_rate": None, "acceptance_histogram": []}
    assert body == {
        "object": "text_completion",
        "model": MODEL,
        "system_fingerprint": None,
        "choices": [
            {"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "length", "stop_reason": None},
        ],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 5,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 2},
            "completion_tokens_details": {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0},
        },
        "metrics": {"speculative_decoding": nothing | rates, "speedup": None},
    }


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [("ab", [(97, 98)]), (["a", "b"], [(97,), (98,)]), ([1, 2], [(1, 2)]), ([[1], [2, 3]], [(1,), (2, 3)])],
)
async def test_forms_of_prompts(
    client: httpx.AsyncClient, engine: ScriptedEngine, prompt: object, tokens: list
) -> None:
    body = await post(client, prompt=prompt)
    assert [submit.prompt for submit in engine.submits] == tokens
    assert [choice["index"] for choice in body["choices"]] == list(range(len(tokens)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, tokens))


async def test_choices_of_prompts_keep_their_order(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = lambda submit: say(submit, f"{chr(submit.prompt[0])}{submit.sampling.choice}")
    body = await post(client, prompt=["a", "b"], n=2, seed=7)
    assert [choice["text"] for choice in body["choices"]] == ["a0", "a1", "b0", "b1"]
    assert {submit.sampling.seed for submit in engine.submits} == {7}
    assert len({submit.request_id for submit in engine.submits}) == 4
    assert body["usage"]["prompt_tokens"] == 2
    assert body["usage"]["completion_tokens"] == 8


async def test_choices_run_side_by_side(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = lambda submit: say(submit, "abcd")
    chunks = await stream(client, n=2)
    order = [chunk["choices"][0]["index"] for chunk in chunks]
    assert sorted(order) == [0] * 4 + [1] * 4
    assert order != sorted(order)


async def test_speculation_is_summed(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    one = {
        "num_spec_steps": 4,
        "num_draft_tokens": 8,
        "num_accepted_draft_tokens": 4,
        "acceptance_histogram": (1, 2, 1),
    }
    two = {"num_spec_steps": 1, "num_draft_tokens": 2, "num_accepted_draft_tokens": 1, "acceptance_histogram": (0, 1)}
    engine.script = lambda submit: say(submit, "x", speculation=two if submit.sampling.choice else one)
    assert (await post(client, n=2))["metrics"]["speculative_decoding"] == {
        "num_spec_steps": 5,
        "num_draft_tokens": 10,
        "num_accepted_draft_tokens": 5,
        "mean_acceptance_length": 2.0,
        "draft_acceptance_rate": 0.5,
        "acceptance_histogram": [1, 3, 1],
    }


async def test_speedup_is_of_all_choices(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    one = {"num_steps": 2, "step_seconds": 1.0, "plain_seconds": 2.5}
    two = {"num_steps": 3, "step_seconds": 3.0, "plain_seconds": 3.5}
    engine.script = lambda submit: say(submit, "x", speculation=two if submit.sampling.choice else one)
    assert (await post(client))["metrics"]["speedup"] == 2.5
    assert (await post(client, n=2))["metrics"]["speedup"] == 1.5
    assert (await stream(client, n=2))[-1]["metrics"]["speedup"] == 1.5


async def test_end_of_sequence_counts_unseen(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = lambda submit: say(submit, [72, 105, EOS], finish="stop")
    body = await post(client, skip_special_tokens=False)
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("Hi", "stop", None)
    assert body["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(("include", "text"), [(False, "Hi"), (True, "Hi.")])
async def test_stop_token(client: httpx.AsyncClient, engine: ScriptedEngine, include: bool, text: str) -> None:
    engine.script = lambda submit: say(submit, "Hi.", finish="stop", by=3)
    body = await post(client, stop_token_ids=[46], include_stop_str_in_output=include)
    assert engine.submits[0].sampling.stop_token_ids == (46,)
    assert (body["choices"][0]["text"], body["choices"][0]["stop_reason"]) == (text, 46)
    assert body["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(("include", "text"), [(False, "on"), (True, "one")])
@pytest.mark.parametrize("by", [1, 2, 8])
async def test_stop_string(
    client: httpx.AsyncClient, engine: ScriptedEngine, include: bool, text: str, by: int
) -> None:
    engine.script = lambda submit: say(submit, "one two ", by=by)
    body = await post(client, stop="e", include_stop_str_in_output=include, logprobs=0)
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text, "stop", "e")
    assert choice["logprobs"]["tokens"] == ["o", "n", "e"]
    assert body["usage"]["completion_tokens"] == 3
    assert engine.aborted == ([] if by == 8 else [engine.submits[0].request_id])


async def test_a_stop_string_still_tells_what_it_has_cost(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = lambda submit: say(submit, "one two ")
    body = await post(client, stop="e")
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert body["metrics"]["speculative_decoding"]["num_spec_steps"] == 2


async def test_what_the_engine_did_not_say_is_null(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = lambda submit: [*say(submit, "one two ")[:3], EngineDeadError("gone")]
    body = await post(client, stop="e")
    assert body["choices"][0]["text"] == "on"
    assert body["usage"]["prompt_tokens_details"] is None
    assert body["metrics"] == {"speculative_decoding": None, "speedup": None}


async def test_logprobs(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = lambda submit: say(submit, "aéb")
    logprobs = (await post(client, logprobs=2))["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["a", "\ufffd", "\ufffd", "b"],
        "token_logprobs": [-1.0] * 4,
        "top_logprobs": [{"a": -1.0, "b": -2.0}, {"\ufffd": -1.0}, {"\ufffd": -1.0}, {"b": -1.0, "c": -2.0}],
        "text_offset": [0, 1, 1, 2],
    }


async def test_zero_logprobs_are_the_sampled_token(client: httpx.AsyncClient) -> None:
    logprobs = (await post(client, logprobs=0))["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"][0] == {"H": -1.0}


async def test_impossible_tokens_have_a_number(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    def script(submit: Submit) -> list[Delta]:
        (delta,) = say(submit, "a")
        impossible = TokenLogprobs(97, -math.inf, ((98, -math.inf),))
        return [replace(delta, logprobs=(impossible,))]

    engine.script = script
    logprobs = (await post(client, logprobs=1))["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [-9999.0]
    assert logprobs["top_logprobs"] == [{"a": -9999.0, "b": -9999.0}]


async def test_echo_scores_the_prompt(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    """How evaluation harnesses score a text: nothing is generated."""
    engine.script = lambda submit: say(submit, "")
    body = await post(client, prompt="abc", echo=True, logprobs=1, max_tokens=0)
    assert engine.submits[0].sampling.max_tokens == 0
    assert engine.submits[0].sampling.prompt_logprobs == 1
    assert body["choices"][0]["text"] == "abc"
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [None, -1.0, -1.0],
        "top_logprobs": [None, {"b": -1.0}, {"c": -1.0}],
        "text_offset": [0, 1, 2],
    }
    assert body["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("prompt", ["Hi", [72, 105]])
async def test_echo_comes_first(client: httpx.AsyncClient, prompt: object) -> None:
    body = await post(client, prompt=prompt, echo=True, n=2)
    assert [choice["text"] for choice in body["choices"]] == ["HiHello"] * 2
    chunks = await stream(client, prompt=prompt, echo=True, logprobs=0)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "HiHello"
    offsets = [offset for chunk in chunks for offset in chunk["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == list(range(7))


async def test_streamed_is_returned(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = lambda submit: say(submit, "日本 stop!here", by=2)
    asked = {"stop": ["stop?", "!h"], "logprobs": 1}
    whole = (await post(client, **asked))["choices"][0]
    chunks = [chunk["choices"][0] for chunk in await stream(client, **asked)]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"] == "日本 stop"
    for key, values in whole["logprobs"].items():
        assert [value for chunk in chunks for value in chunk["logprobs"][key]] == values
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk["text"] for chunk in chunks[:-1])


async def test_stream_usage(client: httpx.AsyncClient) -> None:
    *chunks, last = await stream(client, stream_options={"include_usage": True})
    assert [chunk["usage"] for chunk in chunks] == [None] * 5
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 7
    assert last["metrics"]["speculative_decoding"]["num_spec_steps"] == 0
    assert all("metrics" not in chunk for chunk in chunks)
    assert len({(chunk["id"], chunk["created"]) for chunk in [*chunks, last]}) == 1


async def test_stream_usage_so_far(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await stream(client, stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 5, 5]


async def test_plain_stream_has_no_usage(client: httpx.AsyncClient) -> None:
    chunks = await stream(client)
    assert all("usage" not in chunk for chunk in chunks)
    assert ["metrics" in chunk for chunk in chunks] == [False] * 4 + [True]


async def test_completions_default_to_16_tokens(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await post(client)
    await post(client, prompt="x" * 60)
    assert [submit.sampling.max_tokens for submit in engine.submits] == [16, 4]
