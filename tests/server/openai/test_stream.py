"""Streams and clients over a real connection: what arrives when, and what happens when the reader leaves."""

from __future__ import annotations

import asyncio
import json
import threading

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import EOS, HANG, MODEL, ScriptedEngine, app_of, live, say, wait_for
from starlette.requests import ClientDisconnect

from server.openai.stream import EventTemplate, event, until_disconnect

BODY = {"prompt": "Hi", "n": 2}


def hanging() -> ScriptedEngine:
    return ScriptedEngine(lambda submit: [*say(submit, "ab")[:1], HANG])


def test_leaving_a_stream_aborts_all_choices() -> None:
    engine = hanging()
    with live(app_of(engine)) as url:
        with httpx.stream("POST", f"{url}/v1/completions", json=BODY | {"stream": True}) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: {")
            assert engine.aborted == []
        wait_for(lambda: len(engine.aborted) == 2, 1)


def test_leaving_while_waiting_aborts_all_choices() -> None:
    engine = hanging()
    with live(app_of(engine)) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json=BODY, timeout=0.3)
        wait_for(lambda: len(engine.aborted) == 2, 1)
        page = httpx.get(f"{url}/metrics").text
    assert f'medusa_request_success_total{{finished_reason="abort",model_name="{MODEL}"}} 2.0' in page
    assert 'http_requests_total{handler="/v1/completions",method="POST",status="4xx"} 1.0' in page


def test_chunks_arrive_as_they_are_made() -> None:
    with live(app_of(hanging())) as url:
        body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=5) as response:
            lines = (line for line in response.iter_lines() if line)
            assert '"role":"assistant"' in next(lines)
            assert '"content":"a"' in next(lines)


def test_characters_that_end_lines_elsewhere_do_not_end_an_event() -> None:
    text = "a\u2028b\u2029c\x85d"
    with live(app_of(ScriptedEngine(lambda submit: say(submit, text, by=99)))) as url:
        body = {"prompt": "Hi", "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
            events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == text


@given(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")))
def test_a_filled_template_is_the_event_itself(model: str, text: str) -> None:
    def content(text: str) -> dict:
        return {"model": model, "choices": [{"index": 0, "delta": {"content": text}, "logprobs": None}]}

    assert EventTemplate(content).fill(text) == event(content(text))


def test_the_end_of_the_server_stops_the_engine() -> None:
    engine = ScriptedEngine()
    with live(app_of(engine)):
        assert not engine.stopped
    assert engine.stopped


async def test_work_is_cancelled_before_it_is_left() -> None:
    left = threading.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            left.set()

    async def receive() -> dict:
        await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    with pytest.raises(ClientDisconnect):
        await until_disconnect(receive, work())
    assert left.is_set()


def answering() -> ScriptedEngine:
    return ScriptedEngine(lambda submit: say(submit, [*"Grüße".encode(), EOS], finish="stop", by=2))


def test_openai_client_chat() -> None:
    with live(app_of(answering())) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x") as client:
        messages = [{"role": "user", "content": "Hi"}]
        whole = client.chat.completions.create(model=MODEL, messages=messages, logprobs=True, top_logprobs=2)
        assert whole.choices[0].message.content == "Grüße"
        assert whole.choices[0].finish_reason == "stop"
        assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens == 8
        assert whole.usage.prompt_tokens_details.cached_tokens == 2
        answer = whole.choices[0].message.model_dump()
        client.chat.completions.create(model=MODEL, messages=[*messages, answer, messages[0]])
        options = {"include_usage": True}
        chunks = list(
            client.chat.completions.create(model=MODEL, messages=messages, stream=True, stream_options=options)
        )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Grüße"
    assert chunks[-1].usage.completion_tokens == 8


def test_openai_client_completions() -> None:
    with live(app_of(answering())) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x") as client:
        whole = client.completions.create(
            model=MODEL, prompt=["a", "b"], logprobs=1, extra_body={"speculation": {"mode": "off"}}
        )
        assert [choice.text for choice in whole.choices] == ["Grüße"] * 2
        assert whole.choices[0].logprobs.text_offset == [0, 1, 2, 2, 3, 3, 4, 5]
        chunks = list(client.completions.create(model=MODEL, prompt="a", stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == "Grüße"
        assert [model.id for model in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).id == MODEL


def test_openai_client_errors() -> None:
    engine = ScriptedEngine()
    engine.status = "restarting"
    with live(app_of(engine)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        with client, pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(model="other", prompt="a")
        assert missing.value.code == "model_not_found"
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        with client, pytest.raises(openai.InternalServerError) as dead:
            client.completions.create(model=MODEL, prompt="a")
        assert dead.value.status_code == 503
