"""One measured request: a streamed chat completion, timed from send to last byte. Knows the wire, no statistics.

Invariants: every request opens a connection of its own (some servers drop kept-alive ones, and all sides are treated
alike), and only 127.0.0.1 is ever spoken to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import httpx


class BenchError(Exception):
    """The measurement is impossible or would be wrong; the message says why."""


@dataclass(frozen=True, slots=True)
class Side:
    """What is measured: the server on `port` of this machine, asked with `extra` fields in every request's body."""

    name: str
    port: int
    model: str
    extra: Mapping[str, object] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/chat/completions"

    def body(self, prompt: str, max_tokens: int) -> dict[str, object]:
        """A greedy, streamed request that reports its usage."""
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer. Times are seconds since the request was sent; the counts are the server's own."""

    prompt: str
    text: str
    num_tokens: int
    first_token_seconds: float
    seconds: float
    num_spec_steps: int = 0
    num_accepted: int = 0


@dataclass(slots=True)
class _Reply:
    """Gathers the chunks of one stream."""

    text: list[str] = field(default_factory=list)
    first: float | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    speculation: dict[str, Any] = field(default_factory=dict)

    def read(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            raise BenchError(f"the server failed in mid-stream: {chunk['error']['message']}")
        for choice in chunk.get("choices", []):
            if content := choice["delta"].get("content"):
                self.first = self.first or perf_counter()
                self.text.append(content)
        self.usage = chunk.get("usage") or self.usage
        self.speculation = (chunk.get("metrics") or {}).get("speculative_decoding") or self.speculation

    def sample(self, prompt: str, started: float, ended: float) -> Sample:
        if self.first is None or not self.usage:
            raise BenchError(f"the server answered {prompt!r} without any text or without its usage")
        return Sample(
            prompt=prompt,
            text="".join(self.text),
            num_tokens=self.usage["completion_tokens"],
            first_token_seconds=self.first - started,
            seconds=ended - started,
            num_spec_steps=self.speculation.get("num_spec_steps", 0),
            num_accepted=self.speculation.get("num_accepted_draft_tokens", 0),
        )


def open_client() -> httpx.AsyncClient:
    """A client that opens a new connection per request and ignores the environment's proxies."""
    return httpx.AsyncClient(limits=httpx.Limits(max_keepalive_connections=0), timeout=600, trust_env=False)


async def complete(client: httpx.AsyncClient, side: Side, prompt: str, max_tokens: int) -> Sample:
    """Ask `side` once. Raises BenchError for any answer but a complete one."""
    reply = _Reply()
    started = perf_counter()
    async with client.stream("POST", side.url, json=side.body(prompt, max_tokens)) as response:
        if response.status_code != httpx.codes.OK:
            raise BenchError(f"{side.name} answered {response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                reply.read(json.loads(line.removeprefix("data: ")))
    return reply.sample(prompt, started, perf_counter())


def served_model(port: int) -> str:
    """The first model that the server on `port` lists."""
    reply = httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=10, trust_env=False)
    name: str = reply.raise_for_status().json()["data"][0]["id"]
    return name
