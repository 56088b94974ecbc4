"""`best_of`: the choices of the highest mean log-probability, and all of them in the usage."""

from __future__ import annotations

from dataclasses import replace

import httpx
import pytest
from scripted import MODEL, ScriptedEngine, app_of, client_of, say

from server.engine.messages import Delta, Submit, TokenLogprobs
from server.options import DoorOptions, Limits

LOGPROBS = {0: (-1.0, -1.0), 1: (-0.5,), 2: (-0.1, -0.2, -0.3), 3: (-3.0,), 4: (-0.5,)}  # of each choice's tokens


def script(submit: Submit) -> list[Delta]:
    """Choice 2 of prompt `a` says `a2.`, with log-probabilities as above."""
    logprobs = LOGPROBS[submit.sampling.choice]
    text = (chr(submit.prompt[-1]) + str(submit.sampling.choice) + ".")[: len(logprobs)]
    if submit.sampling.logprobs is None:
        return say(submit, text)
    scored = tuple(TokenLogprobs(token, logprob, ()) for token, logprob in zip(text.encode(), logprobs, strict=True))
    return [
        replace(delta, logprobs=scored[i : i + 1], prompt_logprobs=delta.prompt_logprobs)
        for i, delta in enumerate(say(submit, text))
    ]


async def post(client: httpx.AsyncClient, engine: ScriptedEngine, **body: object) -> dict:
    engine.script = script
    response = await client.post("/v1/completions", json={"prompt": "a", **body})
    assert response.status_code == 200, response.text
    return response.json()


async def test_the_best_are_returned_best_first(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    body = await post(client, engine, best_of=5, n=3)
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(0, "a2."), (1, "a"), (2, "a")]
    assert [choice["logprobs"] for choice in body["choices"]] == [None] * 3
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (1, 8)
    assert {submit.sampling.logprobs for submit in engine.submits} == {0}


async def test_each_prompt_has_its_best(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    body = await post(client, engine, prompt=["a", "b"], best_of=4, echo=True, logprobs=1)
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(0, "aa2."), (1, "bb2.")]
    assert body["choices"][1]["logprobs"]["tokens"] == ["b", "b", "2", "."]
    assert body["choices"][1]["logprobs"]["token_logprobs"] == [None, -0.1, -0.2, -0.3]


@pytest.mark.parametrize("n", [1, 3])
async def test_as_many_as_are_returned_is_no_contest(client: httpx.AsyncClient, engine: ScriptedEngine, n: int) -> None:
    body = await post(client, engine, n=n, best_of=n)
    assert [choice["index"] for choice in body["choices"]] == list(range(n))
    assert [choice["text"] for choice in body["choices"]] == ["a0", "a", "a2."][:n]
    assert {submit.sampling.logprobs for submit in engine.submits} == {None}


async def test_nothing_said_is_no_error(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = lambda submit: say(submit, "")
    response = await client.post("/v1/completions", json={"prompt": "a", "best_of": 2, "max_tokens": 0})
    assert response.json()["choices"][0]["text"] == ""


async def test_each_choice_is_admitted_once() -> None:
    engine = ScriptedEngine(script)
    app = app_of(engine, options=DoorOptions(limits=Limits(max_num_seqs=3, max_queued_requests=2)))
    async with client_of(app) as client:
        await post(client, engine, best_of=5, n=1)
        refused = await client.post("/v1/completions", json={"prompt": "a", "best_of": 6})
    assert refused.status_code == 400
    text = app.state.service.metrics.render().decode()
    assert f'medusa_request_params_max_tokens_count{{model_name="{MODEL}"}} 5.0' in text
