"""From a generation to OpenAI's response objects and chunks, whatever the endpoint.

Invariants:
- a prompt's tokens count once in the usage, however many choices it has;
- numbers that the engine did not say are null, never made up: it says nothing of choices that a stop string ended.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import cache
from itertools import zip_longest
from typing import Any, Protocol

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from server.engine.messages import SpeculationStats
from server.openai.generation import Choice, Generation, Piece
from server.openai.schema import GenerationRequest, StreamOptions
from server.openai.stream import EventStream, EventTemplate, event, until_disconnect

CLIENT_CLOSED_REQUEST = 499  # nginx's; nobody reads it but the metrics
Json = dict[str, Any]


class Shape(Protocol):
    """What an endpoint's objects look like."""

    object: str
    chunk_object: str

    def opening(self, index: int) -> Json | None:
        """The first chunk's choice, before any text."""
        ...

    def chunk(self, piece: Piece) -> Json:
        """A later chunk's choice."""
        ...

    def choice(self, piece: Piece) -> Json:
        """A whole choice."""
        ...


@dataclass(frozen=True)
class Reply:
    """One answer, as a whole or as a stream."""

    id: str
    model: str
    generation: Generation
    shape: Shape
    created: int = field(default_factory=lambda: int(time.time()))
    extra: Callable[[Sequence[Piece]], Json] = lambda pieces: {}  # said once: with all pieces, or in the first chunk

    async def respond(self, http: Request, request: GenerationRequest) -> Response:
        """The response to `request`, which came by `http`."""
        if request.stream:
            return EventStream(self.events(request.stream_options or StreamOptions()))
        return await unless_gone(http, self.whole())

    async def whole(self) -> Json:
        """The response object."""
        pieces = await self.generation.complete()
        return {
            **self._header(self.shape.object),
            "choices": [self.shape.choice(piece) for piece in pieces],
            **self.extra(pieces),
            "usage": self._usage(),
            "metrics": self._metrics(),
        }

    async def events(self, options: StreamOptions) -> AsyncGenerator[bytes, None]:
        """The chunks of a stream; the metrics are in the last one."""
        header = self._header(self.shape.chunk_object)

        def chunk(choice: Json) -> Json:
            return {**header, "choices": [choice], **self._usage_so_far(options)}

        @cache
        def template(index: int) -> EventTemplate:
            return EventTemplate(lambda text: chunk(self.shape.chunk(Piece(index, text))))

        extra = self.extra(())
        for choice in self.generation.choices:
            opening = self.shape.opening(choice.index)
            if opening is not None:
                yield event({**chunk(opening), **extra})
                extra = {}
        num_open = len(self.generation.choices)
        async with aclosing(self.generation.pieces()) as pieces:
            async for piece in pieces:
                num_open -= piece.finish is not None
                is_last = num_open == 0 and not options.include_usage
                if piece.is_text and not options.continuous_usage_stats:
                    yield template(piece.index).fill(piece.text)
                else:
                    metrics = {"metrics": self._metrics()} if is_last else {}
                    yield event({**chunk(self.shape.chunk(piece)), **metrics})
        if options.include_usage:
            yield event({**header, "choices": [], "usage": self._usage(), "metrics": self._metrics()})

    def _header(self, object: str) -> Json:
        return {
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
        }

    def _usage_so_far(self, options: StreamOptions) -> Json:
        if options.continuous_usage_stats:
            return {"usage": self._usage()}
        return {"usage": None} if options.include_usage else {}

    def _usage(self) -> Json:
        return usage(self.generation.choices)

    def _metrics(self) -> Json:
        return metrics(self.generation.choices)


async def unless_gone(http: Request, work: Coroutine[Any, Any, Json]) -> Response:
    """What `work` returns, as a response; the work ends when the client leaves."""
    try:
        return JSONResponse(await until_disconnect(http.receive, work))
    except ClientDisconnect:
        return Response(status_code=CLIENT_CLOSED_REQUEST)


def metrics(choices: Sequence[Choice]) -> Json:
    """Ours. Null while the engine has not said it of every choice."""
    stats = [choice.stats for choice in choices]
    known = [stat.speculation for stat in stats if stat is not None]
    is_complete = len(known) == len(stats)
    return {
        "speculative_decoding": speculation(known) if is_complete else None,
        "speedup": speedup(known) if is_complete else None,
    }


def usage(choices: Sequence[Choice]) -> Json:
    """OpenAI's usage object. Details are null while the engine has not said them."""
    firsts = [choice for choice in choices if choice.submit.sampling.choice == 0]
    cached = [choice.stats.num_cached_tokens for choice in firsts if choice.stats is not None]
    speculations = [choice.stats.speculation for choice in choices if choice.stats is not None]
    num_prompt = sum(len(choice.submit.prompt) for choice in firsts)
    num_completion = sum(choice.num_tokens for choice in choices)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": sum(cached)} if len(cached) == len(firsts) else None,
        "completion_tokens_details": _predicted(speculations) if len(speculations) == len(choices) else None,
    }


def _predicted(stats: Sequence[SpeculationStats]) -> Json:
    """What became of the prediction, see `SpeculationStats`; zeros without one."""
    return {
        "accepted_prediction_tokens": sum(stat.num_accepted_prediction_tokens for stat in stats),
        "rejected_prediction_tokens": sum(stat.num_rejected_prediction_tokens for stat in stats),
    }


def speculation(stats: Sequence[SpeculationStats]) -> Json:
    """vLLM's object, summed over choices. Means of nothing are null."""
    steps = sum(stat.num_spec_steps for stat in stats)
    drafted = sum(stat.num_draft_tokens for stat in stats)
    accepted = sum(stat.num_accepted_draft_tokens for stat in stats)
    histograms = [stat.acceptance_histogram for stat in stats]
    return {
        "num_spec_steps": steps,
        "num_draft_tokens": drafted,
        "num_accepted_draft_tokens": accepted,
        "mean_acceptance_length": 1 + accepted / steps if steps else None,
        "draft_acceptance_rate": accepted / drafted if drafted else None,
        "acceptance_histogram": [sum(counts) for counts in zip_longest(*histograms, fillvalue=0)],
    }


def speedup(stats: Sequence[SpeculationStats]) -> float | None:
    """Of all choices: what plain decoding would have taken, by the engine's estimate, over what was taken."""
    taken = sum(stat.step_seconds for stat in stats)
    return sum(stat.plain_seconds for stat in stats) / taken if taken > 0 else None
