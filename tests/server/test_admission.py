"""The bounded queue, each key's share, and the closed door; first by itself, then over HTTP."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import HANG, MODEL, ScriptedEngine, app_of, client_of, live, say, wait_for

from server.admission import Admission
from server.engine.messages import Delta, SamplingParams, Submit
from server.errors import InvalidRequestError, RateLimitError, ShuttingDownError
from server.options import DoorOptions, Limits

PROMPT = {"prompt": "Hi"}


def submits(count: int, num_tokens: int = 1) -> list[Submit]:
    return [Submit(str(n), (1,) * num_tokens, SamplingParams(4, choice=n)) for n in range(count)]


def test_seats_and_queue_are_filled_to_the_last_place() -> None:
    refusals: list[str] = []
    admission = Admission(Limits(max_num_seqs=2, max_queued_requests=3), refusals.append)
    tickets = [*admission.admit(submits(4)), *admission.admit(submits(1))]
    with pytest.raises(RateLimitError, match="5 choices of 5") as caught:
        admission.admit(submits(1))
    assert (caught.value.status, caught.value.type, caught.value.code) == (429, "requests", "rate_limit_exceeded")
    tickets[0].close()
    with pytest.raises(RateLimitError):
        admission.admit(submits(2))
    admission.admit(submits(1))
    assert refusals == ["requests", "requests"]


def test_what_could_never_be_admitted_is_no_matter_of_trying_again() -> None:
    admission = Admission(Limits(max_num_seqs=2, max_queued_requests=0))
    with pytest.raises(InvalidRequestError, match=r"3 choices.*at most 2") as caught:
        admission.admit(submits(3))
    assert caught.value.status == 400


def test_prompt_tokens_wait_until_their_choice_begins() -> None:
    admission = Admission(Limits(max_queued_tokens=10))
    (first,) = admission.admit(submits(1, 50))  # nobody waits: it is begun at once
    with pytest.raises(RateLimitError, match="50 prompt tokens of 10") as caught:
        admission.admit(submits(1))
    assert caught.value.type == "tokens"
    first.start()
    admission.admit(submits(2, 4))
    with pytest.raises(RateLimitError, match="8 prompt tokens of 10"):
        admission.admit(submits(1, 3))
    admission.admit(submits(1, 2))


@given(st.lists(st.tuples(st.sampled_from(["admit", "start", "close"]), st.integers(1, 4), st.integers(0, 9))))
def test_the_counts_are_those_of_the_open_tickets(moves: list[tuple[str, int, int]]) -> None:
    admission = Admission(Limits(max_num_seqs=3, max_queued_requests=5, max_queued_tokens=20))
    waiting, begun = [], []
    for move, count, which in moves:
        if move == "admit":
            try:
                waiting += [(ticket, count) for ticket in admission.admit(submits(count, count))]
            except RateLimitError:
                continue
        elif move == "start" and waiting:
            begun.append(waiting.pop(which % len(waiting)))
            begun[-1][0].start()
        elif move == "close" and (crowd := waiting if which % 2 else begun):
            ticket, _ = crowd.pop(which % len(crowd))
            ticket.close()
            ticket.close()
        assert admission.num_open == len(waiting) + len(begun) <= 8
        assert (admission.num_waiting, admission.num_waiting_tokens) == (len(waiting), sum(n for _, n in waiting))


async def test_a_closed_door_and_an_empty_house() -> None:
    admission = Admission()
    (ticket,) = admission.admit(submits(1))
    admission.close()
    with pytest.raises(ShuttingDownError):
        admission.admit(submits(1))
    emptied = asyncio.create_task(admission.empty())
    await asyncio.sleep(0)
    assert not emptied.done()
    ticket.close()
    await emptied


def limited(**limits: int) -> DoorOptions:
    return DoorOptions(("secret-a", "secret-b"), limits=Limits(**limits))


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def hanging(text: str = "") -> ScriptedEngine:
    return ScriptedEngine(lambda submit: [*say(submit, text + "!")[: len(text)], HANG])


def test_a_full_queue_is_429_and_a_place_comes_back_when_its_client_leaves() -> None:
    engine = hanging("abc")
    app = app_of(engine, options=limited(max_num_seqs=2, max_queued_requests=1))
    with live(app) as url, httpx.Client(base_url=url, headers=bearer("secret-a")) as client:
        with client.stream("POST", "/v1/completions", json=PROMPT | {"n": 3, "stream": True}) as stream:
            lines = stream.iter_lines()  # held: its end would close the stream
            assert next(lines)
            refused = client.post("/v1/completions", json=PROMPT)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            assert refused.headers["retry-after"] == "1"
            assert len(engine.submits) == 3
        wait_for(lambda: app.state.service.admission.num_open == 0)
        engine.script = lambda submit: say(submit, "ok")
        assert client.post("/v1/completions", json=PROMPT | {"n": 3}).status_code == 200
        assert f'refused_total{{model_name="{MODEL}",reason="requests"}} 1.0' in client.get("/metrics").text


def test_a_key_has_its_share_and_others_have_theirs() -> None:
    app = app_of(hanging("ab"), options=limited(max_concurrent_requests_per_key=1))
    with live(app) as url, httpx.Client(base_url=url) as client:
        body = PROMPT | {"n": 2, "stream": True}
        with client.stream("POST", "/v1/completions", json=body, headers=bearer("secret-a")) as stream:
            lines = stream.iter_lines()  # held: its end would close the stream
            assert next(lines)
            refused = client.post("/v1/completions", json=PROMPT, headers=bearer("secret-a"))
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert "1 open requests" in refused.json()["error"]["message"]
            with client.stream("POST", "/v1/completions", json=body, headers=bearer("secret-b")) as other:
                assert other.status_code == 200
        wait_for(lambda: app.state.service.admission.num_open == 0)
        with client.stream("POST", "/v1/completions", json=body, headers=bearer("secret-a")) as stream:
            assert stream.status_code == 200


async def test_a_choice_waits_until_its_first_delta_even_an_empty_one() -> None:
    engine = ScriptedEngine(lambda submit: [HANG] if submit.prompt[0] == ord("w") else [Delta(submit.request_id), HANG])
    app = app_of(engine, options=DoorOptions(limits=Limits(max_queued_tokens=10)))
    admission = app.state.service.admission
    async with client_of(app) as client:
        posts = [
            asyncio.create_task(client.post("/v1/completions", json={"prompt": prompt}))
            for prompt in ("begun", "waits")
        ]
        async with asyncio.timeout(5):
            while len(engine.submits) < 2 or admission.num_waiting != 1:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert (admission.num_open, admission.num_waiting_tokens) == (2, 5)
        refused = await client.post("/v1/completions", json={"prompt": "longer"})
        assert refused.json()["error"]["type"] == "tokens"
        for post in posts:
            post.cancel()
        await asyncio.gather(*posts, return_exceptions=True)
    assert (admission.num_open, admission.num_waiting, admission.num_waiting_tokens) == (0, 0, 0)


async def test_a_request_that_fails_before_it_began_gives_its_place_back() -> None:
    engine = ScriptedEngine(lambda submit: [RuntimeError("bug")])
    app = app_of(engine)
    async with client_of(app) as client:
        assert (await client.post("/v1/completions", json=PROMPT | {"n": 4})).status_code == 500
    assert app.state.service.admission.num_open == 0
