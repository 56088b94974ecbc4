"""The clients that people have, against the real server: each gets the text that the others get."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import test_end_to_end
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseCompletedEvent, ResponseIncompleteEvent
from test_end_to_end import MODEL, Server, serving

pytestmark = test_end_to_end.pytestmark

QUESTION = "Name three colours, each with an emoji."
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
LIMIT = 24


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def text(server: Server) -> str:
    """What the server says to QUESTION, as httpx sees it."""
    answer: Any = server.post(messages=MESSAGES, temperature=0, max_tokens=LIMIT)
    return answer["choices"][0]["message"]["content"]


def test_openai_chat(server: Server, text: str) -> None:
    asked: Any = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_completion_tokens": LIMIT}
    with server.client as client:
        whole = client.chat.completions.create(**asked)
        assert whole.choices[0].message.content == text
        assert whole.usage is not None
        with client.chat.completions.create(**asked, stream=True) as stream:
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text


def test_openai_completions(server: Server) -> None:
    asked: Any = {"model": MODEL, "prompt": "One, two, three,", "temperature": 0, "max_tokens": 8}
    with server.client as client:
        whole = client.completions.create(**asked).choices[0].text
        with client.completions.create(**asked, stream=True) as stream:
            assert "".join(chunk.choices[0].text for chunk in stream) == whole != ""


def test_openai_responses(server: Server, text: str) -> None:
    asked: Any = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": LIMIT}
    with server.client as client:
        whole = client.responses.create(**asked, metadata={"a": "b"})
        assert whole.output_text == text
        assert (whole.metadata, whole.usage and whole.usage.output_tokens) == ({"a": "b"}, LIMIT)
        Response.model_validate(whole.model_dump())
        with client.responses.stream(**asked) as stream:
            deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(deltas) == text
        with client.responses.create(**asked, stream=True) as events:
            *_, last = events
    assert isinstance(last, ResponseCompletedEvent | ResponseIncompleteEvent)
    assert last.response.output_text == text


def test_openai_responses_goes_on_with_what_it_said(server: Server) -> None:
    """Without a store the conversation is the client's: output items come back as input."""
    with server.client as client:
        first = client.responses.create(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=8)
        more = {"role": "user", "content": "More."}
        items: Any = [*MESSAGES, *(item.model_dump() for item in first.output), more]
        second = client.responses.create(model=MODEL, input=items, instructions="Be brief.", max_output_tokens=8)
        system, answer = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": first.output_text}
        seen = httpx.post(f"{server.url}/tokenize", json={"messages": [system, *MESSAGES, answer, more]}).json()
        assert second.usage is not None
        assert second.usage.input_tokens == seen["count"]
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(model=MODEL, input="More.", previous_response_id=first.id)
    assert refused.value.param == "previous_response_id"


def test_openai_models(server: Server) -> None:
    with server.client as client:
        assert [model.id for model in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).owned_by == "medusa-serve"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other/model")


async def test_openai_async(server: Server, text: str) -> None:
    asked: Any = {"model": MODEL, "temperature": 0}
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:

        async def chat() -> str | None:
            whole = await client.chat.completions.create(messages=MESSAGES, max_tokens=LIMIT, **asked)
            return whole.choices[0].message.content

        async def streamed_chat() -> str:
            stream = await client.chat.completions.create(messages=MESSAGES, max_tokens=LIMIT, stream=True, **asked)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        async def streamed_response() -> str:
            async with client.responses.stream(input=QUESTION, max_output_tokens=LIMIT, **asked) as stream:
                return "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])

        async def completion() -> str:
            return (await client.completions.create(prompt="One,", max_tokens=4, **asked)).choices[0].text

        *texts, counted = await asyncio.gather(chat(), streamed_chat(), streamed_response(), completion())
        assert texts == [text] * 3
        assert counted
        assert [model.id async for model in client.models.list()] == [MODEL]


@pytest.mark.parametrize("use_responses_api", [False, True])
def test_langchain(server: Server, text: str, use_responses_api: bool) -> None:
    model = ChatOpenAI(
        model=MODEL,
        base_url=f"{server.url}/v1",
        api_key="none",  # type: ignore[arg-type]
        temperature=0,
        max_completion_tokens=LIMIT,
        use_responses_api=use_responses_api,
    )
    whole = model.invoke([HumanMessage(QUESTION)])
    assert whole.text == text
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == LIMIT
    chunks = list(model.stream(QUESTION))
    assert "".join(chunk.text for chunk in chunks) == text
    assert len(chunks) > 3
    assert [answer.text for answer in model.batch([QUESTION, "Hi.", QUESTION])][::2] == [text, text]


SUBJECTS = ["海", "Straße 🏡", "наука", "a cat 🐈‍⬛", "数学", "naïveté", "🎲", "العربية", "π", "tea"]
TASKS = ["Say it twice: {}", "{}? Answer with emoji.", "用中文写: {}", "Spell {}", "{}, {}, {},"] * 2


def prompts() -> list[tuple[str, list[str]]]:
    """A hundred, every second one with stop strings."""
    texts = [task.replace("{}", subject) for subject in SUBJECTS for task in TASKS]
    return [(text, [" ", "。", "!"] if number % 2 else []) for number, text in enumerate(texts)]


async def test_streams_of_a_hundred_prompts(server: Server) -> None:
    """Every chunk is of the client's type; joined they are the text that comes in one piece."""
    few = asyncio.Semaphore(16)

    async def both(client: httpx.AsyncClient, prompt: str, stop: list[str]) -> str:
        body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 12, "stop": stop, "seed": len(prompt)}
        async with few:
            whole = (await client.post("/v1/chat/completions", json=body)).json()
            stream = (await client.post("/v1/chat/completions", json=body | {"stream": True})).text
        *lines, end = [line.removeprefix("data: ") for line in stream.splitlines() if line]
        chunks = [ChatCompletionChunk.model_validate_json(line) for line in lines]
        content = ChatCompletion.model_validate(whole).choices[0].message.content
        assert end == "[DONE]"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == content
        assert content is not None
        assert not any(text in content for text in stop)
        return content

    async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
        texts = await asyncio.gather(*(both(client, *prompt) for prompt in prompts()))
    assert len(texts) == 100
    assert not all(text.isascii() for text in texts)


LITELLM = """
import json, os, socket, sys
connect = socket.socket.connect
def only_here(self, address):
    assert address[0] == "127.0.0.1", f"litellm calls {address}"
    return connect(self, address)
socket.socket.connect = only_here
import litellm
litellm.telemetry = False
url, model, messages, limit = json.loads(sys.argv[1])
asked = {"api_base": url + "/v1", "api_key": "none", "temperature": 0, "max_tokens": limit}
chat = {"model": "openai/" + model, "messages": messages, **asked}
said = litellm.completion(**chat)
stream = litellm.completion(**chat, stream=True)
text = litellm.text_completion(model="text-completion-openai/" + model, prompt="One, two, three,", **asked)
print(json.dumps({
    "whole": said.choices[0].message.content,
    "tokens": said.usage.completion_tokens,
    "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in stream),
    "completed": text.choices[0].text,
}))
"""


def test_litellm(server: Server, text: str) -> None:
    """In a process of its own: it takes seconds to import, warns a lot, and must call nobody but us."""
    given = json.dumps([server.url, MODEL, MESSAGES, LIMIT])
    environment = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(
        [sys.executable, "-c", LITELLM, given], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("completed")
    assert found == {"whole": text, "tokens": LIMIT, "streamed": text}


def curl(*arguments: str) -> str:
    done = subprocess.run(
        ["curl", "--silent", "--show-error", "--max-time", "120", *arguments], capture_output=True, check=True
    )
    return done.stdout.decode()


@pytest.mark.skipif(not any(Path(folder, "curl").exists() for folder in os.get_exec_path()), reason="needs curl")
def test_curl(server: Server, text: str) -> None:
    json_body = ("--header", "Content-Type: application/json", "--data")
    body: dict[str, Any] = {"messages": MESSAGES, "temperature": 0, "max_tokens": LIMIT}
    chat = f"{server.url}/v1/chat/completions"
    assert json.loads(curl(chat, *json_body, json.dumps(body)))["choices"][0]["message"]["content"] == text
    lines = curl("--no-buffer", chat, *json_body, json.dumps(body | {"stream": True})).splitlines()
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2] if line]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text
    tokens = json.loads(curl(f"{server.url}/tokenize", *json_body, json.dumps({"prompt": QUESTION})))["tokens"]
    back = curl(f"{server.url}/detokenize", *json_body, json.dumps({"tokens": tokens}))
    assert json.loads(back) == {"prompt": QUESTION}
    status = curl("--output", os.devnull, "--write-out", "%{http_code}", f"{server.url}/v1/models/nobody")
    assert status == "404"
