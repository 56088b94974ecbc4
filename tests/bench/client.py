"""One measured request: a streamed chat completion, timed from send to last byte. Knows the wire, no statistics.

Invariants:
- every request opens a connection of its own (some servers drop kept-alive ones, and all sides are treated alike), and
  only 127.0.0.1 is ever spoken to;
- while answers stream in, bytes and their times are kept and nothing else is done with them: `read` makes sense of them
  when the clock has stopped, so that the client takes next to nothing from the cores that the servers need.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import httptools
import httpx

MAX_SECONDS = 600.0


class BenchError(Exception):
    """The measurement is impossible or would be wrong; the message says why."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a user asks; the system message is the chat template's own unless there is one here."""

    user: str
    system: str | None = None
    max_tokens: int | None = None  # of the answer, where they are to differ

    @property
    def messages(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*system, {"role": "user", "content": self.user}]


@dataclass(frozen=True, slots=True)
class Side:
    """What is measured: the server on `port` of this machine, asked with `extra` fields in every request's body."""

    name: str
    port: int
    model: str
    extra: Mapping[str, object] = field(default_factory=dict)

    def request(self, prompt: Prompt, max_tokens: int) -> bytes:
        """A streamed request that reports its usage, as it goes over the wire; greedy unless `extra` says otherwise."""
        body = {
            "model": self.model,
            "messages": prompt.messages,
            "max_tokens": min(max_tokens, prompt.max_tokens or max_tokens),
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }
        content = json.dumps(body).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1",
            f"Host: 127.0.0.1:{self.port}",
            "Content-Type: application/json",
            f"Content-Length: {len(content)}",
            "Connection: close",
        )
        return "\r\n".join((*head, "", "")).encode() + content


@dataclass(frozen=True, slots=True)
class Recording:
    """All that came back for one prompt: the pieces in order, each with the time of its arrival."""

    prompt: Prompt
    started: float
    pieces: tuple[tuple[float, bytes], ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer. Times are seconds since the request was sent; the counts are the server's own."""

    prompt: Prompt
    text: str
    num_prompt_tokens: int
    num_tokens: int
    first_token_seconds: float
    seconds: float
    num_spec_steps: int = 0
    num_accepted: int = 0
    started: float = 0.0  # by `perf_counter`


class _Recorder(asyncio.Protocol):
    """Sends one request and notes what comes until the server closes the connection."""

    def __init__(self, request: bytes) -> None:
        self.pieces: list[tuple[float, bytes]] = []
        self.ended = asyncio.get_running_loop().create_future()
        self._request = request

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((perf_counter(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


async def record(side: Side, prompt: Prompt, max_tokens: int) -> Recording:
    """Ask `side` once. Raises OSError if nobody listens and TimeoutError after MAX_SECONDS."""
    request = side.request(prompt, max_tokens)
    started = perf_counter()
    loop = asyncio.get_running_loop()
    transport, recorder = await loop.create_connection(lambda: _Recorder(request), "127.0.0.1", side.port)
    try:
        async with asyncio.timeout(MAX_SECONDS):
            await recorder.ended
    finally:
        transport.close()
    return Recording(prompt, started, tuple(recorder.pieces))


class _Reply:
    """The parser's callbacks, and what the stream's events have said so far."""

    def __init__(self) -> None:
        self.now = 0.0
        self.first: float | None = None
        self.text: list[str] = []
        self.usage: dict[str, Any] = {}
        self.speculation: dict[str, Any] = {}
        self.body = bytearray()
        self._num_read = 0

    def on_body(self, body: bytes) -> None:
        self.body += body
        while (end := self.body.find(b"\n", self._num_read)) >= 0:
            line = bytes(self.body[self._num_read : end]).strip()
            self._num_read = end + 1
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                self._read_event(json.loads(line.removeprefix(b"data: ")))

    def _read_event(self, event: dict[str, Any]) -> None:
        if "error" in event:
            raise BenchError(f"the server failed in mid-stream: {event['error']['message']}")
        for choice in event.get("choices", []):
            if content := choice["delta"].get("content"):
                self.first = self.first or self.now
                self.text.append(content)
        self.usage = event.get("usage") or self.usage
        self.speculation = (event.get("metrics") or {}).get("speculative_decoding") or self.speculation


def read(side: Side, recording: Recording) -> Sample:
    """What the recorded bytes say. Raises BenchError for any answer but a complete one, which may be empty."""
    reply, prompt = _parse(side, recording), recording.prompt
    if not reply.usage:
        raise BenchError(f"{side.name} answered {prompt.user[:80]!r} without its usage")
    return Sample(
        prompt=prompt,
        text="".join(reply.text),
        num_prompt_tokens=reply.usage["prompt_tokens"],
        num_tokens=reply.usage["completion_tokens"],
        first_token_seconds=(reply.first or reply.now) - recording.started,
        seconds=reply.now - recording.started,
        num_spec_steps=reply.speculation.get("num_spec_steps", 0),
        num_accepted=reply.speculation.get("num_accepted_draft_tokens", 0),
        started=recording.started,
    )


def _parse(side: Side, recording: Recording) -> _Reply:
    reply = _Reply()
    parser = httptools.HttpResponseParser(reply)
    try:
        for reply.now, data in recording.pieces:
            parser.feed_data(data)
    except httptools.HttpParserCallbackError as error:
        raise error.__context__ or error from None
    except httptools.HttpParserError as error:
        raise BenchError(f"{side.name} sent no HTTP: {error}") from error
    if not recording.pieces:
        raise BenchError(f"{side.name} closed the connection without an answer")
    if (status := parser.get_status_code()) != httpx.codes.OK:
        raise BenchError(f"{side.name} answered {status}: {reply.body.decode()}")
    return reply


def served_model(port: int) -> str:
    """The first model that the server on `port` lists."""
    reply = httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=10, trust_env=False)
    name: str = reply.raise_for_status().json()["data"][0]["id"]
    return name
