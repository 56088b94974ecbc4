"""Fields that vLLM has and OpenAI has not: what reaches the engine, and what comes back."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio
from scripted import EOS, MODEL, ScriptedEngine, byte_tokenizer, client_of, events, say
from tokenizers.processors import TemplateProcessing

from server.app import create_app
from server.metrics import Metrics

TEMPLATE = (
    "{% for m in messages %}{% generation %}[{{ m.role }}]{{ m.content }}{% endgeneration %}{% endfor %}"
    "{% for d in documents or [] %}<{{ d.text }}>{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
USER = {"role": "user", "content": "Hi"}
SAID = {"role": "assistant", "content": "Well"}


@pytest_asyncio.fixture
async def client(engine: ScriptedEngine) -> AsyncIterator[httpx.AsyncClient]:
    """Of a server that trusts templates, and whose tokenizer puts `<|end|>` before every text."""
    tokenizer = byte_tokenizer(TEMPLATE)
    tokenizer._backend.post_processor = TemplateProcessing(
        single="<|end|> $A", pair=None, special_tokens=[("<|end|>", EOS)]
    )
    app = create_app(engine, tokenizer, model_name=MODEL, metrics=Metrics(MODEL), trust_request_chat_template=True)
    async with client_of(app) as client:
        yield client


async def complete(client: httpx.AsyncClient, **body: object) -> dict:
    return await post(client, "completions", {"prompt": "Hi", "add_special_tokens": False, **body})


async def chat(client: httpx.AsyncClient, **body: object) -> dict:
    return await post(client, "chat/completions", {"messages": [USER], **body})


async def post(client: httpx.AsyncClient, route: str, body: dict) -> dict:
    response = await client.post(f"/v1/{route}", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def prompt_of(engine: ScriptedEngine) -> bytes:
    return b"".join(b"|" if token == EOS else bytes([token]) for token in engine.submits[-1].prompt)


async def test_masks(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await complete(client, allowed_token_ids=[5, 7], bad_words=["ab", " c"])
    sampling = engine.submits[0].sampling
    assert sampling.allowed_token_ids == (5, 7)
    assert sampling.bad_words == ((97, 98), (32, 97, 98), (99,), (32, 99))


async def test_special_tokens_are_added(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await post(client, "completions", {"prompt": "Hi"})
    assert prompt_of(engine) == b"|Hi"
    await complete(client)
    assert prompt_of(engine) == b"Hi"
    await chat(client)
    assert prompt_of(engine) == b"[user]Hi>"
    await chat(client, add_special_tokens=True)
    assert prompt_of(engine) == b"|[user]Hi>"


@pytest.mark.parametrize(
    ("length", "extra", "kept"),
    [
        (9, {"truncate_prompt_tokens": 4}, 4),
        (9, {"truncate_prompt_tokens": 9}, 9),
        (9, {"truncate_prompt_tokens": 40}, 9),
        (99, {"truncate_prompt_tokens": -1}, 64 - 16),
        (99, {"truncate_prompt_tokens": -1, "max_tokens": 5}, 64 - 5),
        (99, {"truncate_prompt_tokens": -1, "max_tokens": 0, "echo": True}, 64),
    ],
)
async def test_prompts_are_cut_at_their_start(
    client: httpx.AsyncClient, engine: ScriptedEngine, length: int, extra: dict, kept: int
) -> None:
    prompt = "".join(chr(48 + i % 70) for i in range(length))
    body = await complete(client, prompt=prompt, **extra)
    assert prompt_of(engine).decode() == prompt[length - kept :]
    assert body["usage"]["prompt_tokens"] == kept


async def test_echo_is_what_was_read(client: httpx.AsyncClient) -> None:
    body = await complete(client, prompt=["abcdef", "xyz"], echo=True, truncate_prompt_tokens=4, logprobs=0)
    assert [choice["text"] for choice in body["choices"]] == ["cdefHello", "xyzHello"]
    assert body["choices"][0]["logprobs"]["text_offset"] == list(range(9))


async def test_chats_are_cut_too(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await chat(client, truncate_prompt_tokens=3)
    assert prompt_of(engine) == b"Hi>"
    await chat(client, messages=[{"role": "user", "content": "x" * 99}], truncate_prompt_tokens=-1)
    assert prompt_of(engine) == b"x" * 62 + b">"


def candidate(text: str, logprob: float, rank: int | None) -> dict:
    return {"logprob": logprob, "rank": rank, "decoded_token": text}


async def test_prompt_logprobs(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    """The scripted engine says of each prompt token: log-probability -1, and -2, -3 of those after it."""
    expected = [None, {"105": candidate("i", -1.0, 1), "106": candidate("j", -2.0, 2)}]
    body = await complete(client, prompt_logprobs=2, n=2)
    assert [choice["prompt_logprobs"] for choice in body["choices"]] == [expected] * 2
    body = await chat(client, prompt_logprobs=2)
    assert body["prompt_logprobs"][0] is None
    assert body["prompt_logprobs"][-1] == {"62": candidate(">", -1.0, 1), "63": candidate("?", -2.0, 2)}
    assert len(body["prompt_logprobs"]) == len(b"[user]Hi>")


async def test_prompt_logprobs_beside_echoed_ones(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    """The engine is asked for the larger number, and each gets what it asked for."""
    choice = (await complete(client, echo=True, logprobs=1, prompt_logprobs=3))["choices"][0]
    assert engine.submits[0].sampling.prompt_logprobs == 3
    assert choice["logprobs"]["tokens"] == list("HiHello")
    assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [1] * 6
    assert len(choice["prompt_logprobs"][1]) == 3
    choice = (await complete(client, echo=True, logprobs=3, prompt_logprobs=0))["choices"][0]
    assert choice["prompt_logprobs"] == [None, {"105": candidate("i", -1.0, 1)}]
    assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [3] * 6


async def test_prompt_logprobs_do_not_echo(client: httpx.AsyncClient) -> None:
    choice = (await complete(client, logprobs=0, prompt_logprobs=0))["choices"][0]
    assert choice["logprobs"]["tokens"] == list("Hello")


async def test_token_ids(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = lambda submit: say(submit, [*"é".encode(), EOS], finish="stop")
    choices = (await complete(client, prompt=["a", "bc"], return_token_ids=True))["choices"]
    assert [choice["prompt_token_ids"] for choice in choices] == [[97], [98, 99]]
    assert [choice["token_ids"] for choice in choices] == [[0xC3, 0xA9, EOS]] * 2
    body = await chat(client, return_token_ids=True, n=2)
    assert body["prompt_token_ids"] == list(b"[user]Hi>")
    assert [choice["token_ids"] for choice in body["choices"]] == [[0xC3, 0xA9, EOS]] * 2
    assert "token_ids" not in (await chat(client))["choices"][0]


async def test_token_ids_end_with_the_stop_string(client: httpx.AsyncClient) -> None:
    choice = (await complete(client, return_token_ids=True, stop="l"))["choices"][0]
    assert (choice["text"], choice["token_ids"]) == ("He", list(b"Hel"))


async def test_token_ids_in_streams(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = lambda submit: say(submit, [*"aé".encode(), EOS], finish="stop")
    extra = {"return_token_ids": True, "stream": True}
    response = await client.post("/v1/completions", json={"prompt": ["a", [98]], **extra})
    choices = [chunk["choices"][0] for chunk in events(response.text)]
    for index, prompt in enumerate([[EOS, 97], [98]]):
        own = [choice for choice in choices if choice["index"] == index]
        assert [choice["token_ids"] for choice in own] == [[97], [0xC3, 0xA9], [EOS]]
        assert [choice["prompt_token_ids"] for choice in own] == [prompt, None, None]
    response = await client.post("/v1/chat/completions", json={"messages": [USER], **extra})
    first, *chunks = events(response.text)
    assert first["prompt_token_ids"] == list(b"[user]Hi>")
    assert all("prompt_token_ids" not in chunk for chunk in chunks)
    assert [chunk["choices"][0]["token_ids"] for chunk in chunks] == [[97], [0xC3, 0xA9], [EOS]]


async def test_a_template_of_ones_own(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await chat(client, chat_template="{{ messages[0].content }}{{ mood }}", chat_template_kwargs={"mood": "!"})
    assert prompt_of(engine) == b"Hi!"


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{% if %}", "{{ messages.x.y }}", "{{ range(10**9) | list }}"])
async def test_a_template_that_fails(client: httpx.AsyncClient, template: str) -> None:
    body = {"messages": [USER], "chat_template": template}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400, response.text
    assert "chat template refuses" in response.json()["error"]["message"]


async def test_documents(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await chat(client, documents=[{"text": "a"}, {"text": "b"}])
    assert prompt_of(engine) == b"[user]Hi<a><b>>"


@pytest.mark.parametrize(
    ("extra", "content"),
    [
        ({"messages": [USER, SAID]}, "WellHello"),
        ({"messages": [USER]}, "Hello"),
        ({"messages": [USER, SAID], "echo": False}, "Hello"),
        ({"messages": [USER], "add_generation_prompt": False, "continue_final_message": True}, "HiHello"),
    ],
)
async def test_chat_echo(client: httpx.AsyncClient, extra: dict, content: str) -> None:
    body = await chat(client, **{"echo": True, "n": 2, **extra})
    assert [choice["message"]["content"] for choice in body["choices"]] == [content] * 2
    response = await client.post("/v1/chat/completions", json={"echo": True, "stream": True, **extra})
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in events(response.text)) == content
