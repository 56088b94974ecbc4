"""From a generation to the Response object of /v1/responses and the events of its stream.

Invariants:
- every event has the next sequence number; the whole object is made from the same events, unseen;
- a stream ends with `response.completed`, `response.incomplete` or `response.failed`, the whole object in it; before
  the last comes an `error` event;
- what the client asked for is echoed as it was understood.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from fastapi import Request, Response

from server.errors import MedusaError
from server.openai.generation import Generation, Scored
from server.openai.logprobs import chat_logprobs
from server.openai.reply import Json, metrics, unless_gone, usage
from server.openai.responses_output import Output
from server.openai.responses_schema import LOGPROBS, ResponsesRequest
from server.openai.service import Service
from server.openai.stream import NamedEventStream, named_event
from server.visit import note_error

ECHOED = (
    "instructions",
    "max_output_tokens",
    "max_tool_calls",
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "temperature",
    "top_p",
    "truncation",
    "user",
)


@dataclass
class ResponsesReply:
    """One answer, as a whole or as a stream."""

    id: str
    service: Service
    request: ResponsesRequest
    generation: Generation
    created: int = field(default_factory=lambda: int(time.time()))
    output: Output = field(init=False)

    def __post_init__(self) -> None:
        self.output = Output(self._logprobs)

    async def respond(self, http: Request) -> Response:
        """The response to the request, which came by `http`."""
        return NamedEventStream(self.events()) if self.request.stream else await unless_gone(http, self.whole())

    async def whole(self) -> Json:
        """The Response object."""
        async with aclosing(self._said()) as contents:
            async for _ in contents:
                continue
        return self._finished()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """All events, numbered."""
        numbers = count()
        async with aclosing(self._contents()) as contents:
            async for content in contents:
                yield named_event({**content, "sequence_number": next(numbers)})

    async def _contents(self) -> AsyncGenerator[Json, None]:
        begun = self._object("in_progress")
        yield {"type": "response.created", "response": begun}
        yield {"type": "response.in_progress", "response": begun}
        try:
            async with aclosing(self._said()) as contents:
                async for content in contents:
                    yield content
        except MedusaError as error:
            for content in self._failure(error):
                yield content
            return
        yield {"type": f"response.{self.output.status}", "response": self._finished()}

    async def _said(self) -> AsyncGenerator[Json, None]:
        async with aclosing(self.generation.pieces()) as pieces:
            async for piece in pieces:
                for content in self.output.take(piece):
                    yield content

    def _failure(self, error: MedusaError) -> list[Json]:
        note_error(error)
        failed = self._object("failed", error={"code": "server_error", "message": error.message})
        return [
            {"type": "error", "code": error.code, "message": error.message, "param": error.param},
            {"type": "response.failed", "response": failed},
        ]

    def _finished(self) -> Json:
        status = self.output.status
        return self._object(
            status,
            output=self.output.items,
            completed_at=int(time.time()) if status == "completed" else None,
            incomplete_details={"reason": "max_output_tokens"} if status == "incomplete" else None,
            usage=self._usage(),
            metrics=metrics(self.generation.choices),
        )

    def _object(self, status: str, **news: Any) -> Json:
        """The Response object, with what is known of it so far."""
        unknown = ("error", "incomplete_details", "completed_at", "usage", "metrics")
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": self.service.model_name,
            "output": [],
            **dict.fromkeys(unknown),
            **self._echo(),
            **news,
        }

    def _echo(self) -> Json:
        choice = self.request.tool_choice
        return {
            **{name: getattr(self.request, name) for name in ECHOED},
            "text": self.request.text.model_dump(exclude_unset=True) | {"format": self.request.text.format},
            "reasoning": self.request.reasoning and self.request.reasoning.model_dump(),
            "top_logprobs": self.request.top_logprobs or 0,
            "tools": [tool.model_dump() for tool in self.request.tools],
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "background": False,
            "store": False,
            "previous_response_id": None,
            "service_tier": "default",
        }

    def _logprobs(self, tokens: tuple[Scored, ...]) -> list[Json]:
        if LOGPROBS not in self.request.include:
            return []
        content: list[Json] = chat_logprobs(self.service.tokenizer, tokens)["content"]
        return content

    def _usage(self) -> Json:
        """This endpoint's names. Nothing is written to the cache on request, and no reasoning is kept apart."""
        found = usage(self.generation.choices)
        details = found["prompt_tokens_details"] or {"cached_tokens": 0}
        return {
            "input_tokens": found["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": details["cached_tokens"], "cache_write_tokens": 0},
            "output_tokens": found["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": found["total_tokens"],
        }
