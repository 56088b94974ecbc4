"""Streams by the `openai` package's own types, and against the same answer in one piece: 100 texts of all kinds."""

from __future__ import annotations

import random
from typing import Any, Literal

import httpx
import pytest
from openai.types import Completion, CompletionChoice
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.completion_choice import Logprobs
from scripted import EOS, ScriptedEngine, say

from server.engine.messages import Delta, Submit

WORDS = [
    "stop",
    "STOP.",
    "😀",
    "👩‍👩‍👧‍👦",
    "🇫🇷",
    "日本語",
    "你好，世界。",
    "é",
    "e\u0301",
    "ß",
    "\n",
    " ",
    "x",
    "<|end",
    "\u2028",
    '"',
    "\\",
    "ﷺ",
]
STOPS = [["stop"], ["世界", "STOP."], ["👧"], ["\n "], ["<|end|>", "日本語x"], ["é", "e\u0301 x"], []]


class ChunkLogprobs(Logprobs):
    """The package's type, with the nulls that OpenAI sends: nothing precedes the first token of an echoed prompt."""

    token_logprobs: list[float | None] | None = None  # type: ignore[assignment]
    top_logprobs: list[dict[str, float] | None] | None = None  # type: ignore[assignment]


class ChunkChoice(CompletionChoice):
    """The package has no type of its own for chunks of completions, whose `finish_reason` is null but at the end."""

    finish_reason: Literal["stop", "length", "content_filter"] | None = None  # type: ignore[assignment]
    logprobs: ChunkLogprobs | None = None


class CompletionChunk(Completion):
    choices: list[ChunkChoice]  # type: ignore[assignment]


class Case:
    """A text with its stop strings, as tokens that cut characters anywhere, in steps of any size; two choices."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        chance = random.Random(seed)
        self.stop = chance.choice(STOPS)
        self.options = {
            "n": 2,
            "stop": self.stop,
            "include_stop_str_in_output": chance.random() < 0.3,
            "return_token_ids": chance.random() < 0.3,
            "max_tokens": 500,
        }
        self.logprobs = chance.choice([None, 0, 3])

    def text(self, choice: int) -> str:
        chance = random.Random(self._seed * 2 + choice)
        return "".join(chance.choices(WORDS, k=chance.randint(1, 30)))

    def script(self, submit: Submit) -> list[Delta]:
        chance = random.Random(self._seed)
        tokens = [*self.text(submit.sampling.choice).encode()]
        if chance.random() < 0.5:
            return say(submit, [*tokens, EOS], finish="stop", by=chance.randint(1, 7))
        return say(submit, tokens, by=chance.randint(1, 7))


def test_the_cases_are_of_all_kinds() -> None:
    cases = [Case(seed) for seed in range(100)]
    assert sum(any(stop in case.text(choice) for stop in case.stop) for case in cases for choice in (0, 1)) > 50
    assert len({case.text(0) for case in cases}) == 100


async def both(client: httpx.AsyncClient, route: str, body: dict) -> tuple[dict, list[str]]:
    """The answer in one piece, and the lines of its stream."""
    whole = await client.post(f"/v1/{route}", json=body)
    stream = {**body, "stream": True, "stream_options": {"include_usage": True}}
    streamed = await client.post(f"/v1/{route}", json=stream)
    assert (whole.status_code, streamed.status_code) == (200, 200), (whole.text, streamed.text)
    lines = streamed.text.splitlines()  # as naive clients do, which must not find an end within a text
    assert lines[1::2] == [""] * (len(lines) // 2)
    assert lines[-2] == "data: [DONE]"
    return whole.json(), [line.removeprefix("data: ") for line in lines[:-2:2]]


def check_ends(finishes: dict[int, list[str | None]], whole: Any) -> None:
    """Every choice ends once, with its last chunk, as it does in one piece."""
    for choice in whole.choices:
        *before, last = finishes[choice.index]
        assert set(before) <= {None}
        assert last == choice.finish_reason


def check_extras(found: Any, allowed: set[str]) -> None:
    assert set(found.model_extra) <= allowed, found.model_extra


@pytest.fixture
def large(engine: ScriptedEngine) -> ScriptedEngine:
    engine.info = engine.info.__class__(**{**_fields(engine.info), "max_model_len": 1024})
    return engine


def _fields(info: Any) -> dict[str, Any]:
    return {name: getattr(info, name) for name in info.__match_args__}


@pytest.mark.parametrize("seed", range(100))
async def test_chat_chunks(client: httpx.AsyncClient, large: ScriptedEngine, seed: int) -> None:
    case = Case(seed)
    large.script = case.script
    scores = {} if case.logprobs is None else {"logprobs": True, "top_logprobs": case.logprobs}
    body = {"messages": [{"role": "user", "content": "Hi"}], **case.options, **scores}
    answer, lines = await both(client, "chat/completions", body)
    whole = ChatCompletion.model_validate(answer, strict=True)
    *chunks, last = [ChatCompletionChunk.model_validate_json(line, strict=True) for line in lines]
    assert (last.choices, last.usage) == ([], whole.usage)
    texts, finishes, scored = {0: "", 1: ""}, {0: [], 1: []}, {0: [], 1: []}
    for chunk in chunks:
        check_extras(chunk, {"prompt_token_ids"})
        (choice,) = chunk.choices
        check_extras(choice, {"stop_reason", "token_ids"})
        assert chunk.usage is None
        assert (chunk.id, chunk.created, chunk.model) == (last.id, last.created, whole.model)
        texts[choice.index] += choice.delta.content or ""
        finishes[choice.index].append(choice.finish_reason)
        scored[choice.index] += choice.logprobs.content if choice.logprobs else []
    check_ends(finishes, whole)
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content
        assert scored[choice.index] == (choice.logprobs.content if choice.logprobs else [])
        if case.logprobs is not None and choice.stop_reason is None:
            said = b"".join(bytes(token.bytes) for token in scored[choice.index] if token.token != "<|end|>")
            assert said.decode() == choice.message.content


@pytest.mark.parametrize("seed", range(100))
async def test_completion_chunks(client: httpx.AsyncClient, large: ScriptedEngine, seed: int) -> None:
    case = Case(seed)
    large.script = case.script
    body = {"prompt": "日本", "echo": seed % 3 == 0, "logprobs": case.logprobs, **case.options}
    answer, lines = await both(client, "completions", body)
    exact = CompletionChunk if body["echo"] else Completion
    whole: Any = exact.model_validate(answer, strict=True)
    *chunks, last = [CompletionChunk.model_validate_json(line, strict=True) for line in lines]
    assert (last.choices, last.usage) == ([], whole.usage)
    texts, finishes = {0: "", 1: ""}, {0: [], 1: []}
    scored: dict[int, list[Any]] = {0: [], 1: []}
    for chunk in chunks:
        check_extras(chunk, set())
        (choice,) = chunk.choices
        check_extras(choice, {"stop_reason", "token_ids", "prompt_token_ids"})
        assert chunk.usage is None
        texts[choice.index] += choice.text
        finishes[choice.index].append(choice.finish_reason)
        scored[choice.index] += entries(choice)
    check_ends(finishes, whole)
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert scored[choice.index] == entries(choice)


def entries(choice: ChunkChoice) -> list[Any]:
    lists = choice.logprobs
    if lists is None:
        return []
    return list(zip(lists.tokens, lists.token_logprobs, lists.top_logprobs, lists.text_offset, strict=True))
