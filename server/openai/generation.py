"""One HTTP request at the engine: its choices run side by side, tokens become text, counts and times are kept.

Invariants:
- a choice ends with exactly one piece whose `finish` is set, or with an error;
- the texts of a choice's pieces joined are its whole text, and so with its tokens;
- tokens after a stop string do not exist: not in the counts, not in the log-probabilities;
- choices are admitted when they are made, all or none, and let go when they end;
- leaving early, for whatever reason, closes the engine's generators, and that aborts what still runs there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Literal

from server.admission import Ticket
from server.engine.messages import Delta, FinishReason, RequestStats, Submit, TokenLogprobs
from server.errors import EngineDeadError, MedusaError
from server.metrics import RequestTimer
from server.openai.service import Service
from server.text.calls import CallDelta, CallParser
from server.text.detokenizer import Detokenizer

Scored = tuple[int, TokenLogprobs | None]  # a token and its log-probabilities; the first prompt token has none


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How tokens become text."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    scores_prompt: bool = False  # the prompt's log-probabilities come before the tokens' own
    token_ids: bool = False  # pieces tell their token ids
    parser: Callable[[], CallParser] | None = None  # finds tool calls


@dataclass(slots=True)
class Piece:
    """News of one choice that can be shown."""

    index: int
    text: str
    tokens: tuple[Scored, ...] = ()
    finish: Literal["stop", "length", "tool_calls"] | None = None
    stop_reason: str | int | None = None
    token_ids: tuple[int, ...] | None = None  # if asked for
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None  # if asked for; once
    calls: tuple[CallDelta, ...] = ()

    @property
    def is_text(self) -> bool:
        """Is there nothing else to say?"""
        return self.finish is None and not (self.tokens or self.calls) and self.token_ids is None


class Choice:
    """One submit. `echo` is said before its text."""

    def __init__(
        self,
        service: Service,
        submit: Submit,
        index: int,
        options: TextOptions,
        arrival: float,
        ticket: Ticket,
        echo: str = "",
    ) -> None:
        self.index = index
        self.submit = submit
        self.num_tokens = 0
        self.stats: RequestStats | None = None
        self._engine = service.engine
        self._options = options
        self._ticket = ticket
        self._detokenizer = Detokenizer(
            service.tokenizer,
            stop=options.stop,
            include_stop=options.include_stop,
            skip_special_tokens=options.skip_special_tokens,
            min_tokens=submit.sampling.min_tokens,
        )
        self._timer = RequestTimer(service.metrics, arrival, len(submit.prompt), submit.sampling.max_tokens)
        self._text = echo  # not shown yet, like the tokens
        self._tokens: list[Scored] = []
        self._token_ids: list[int] = []
        self._prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self._logprob = 0.0  # of all tokens so far
        self._parser = options.parser() if options.parser is not None else None
        self._calls: list[CallDelta] = []
        self._end: FinishReason = "abort"

    @property
    def mean_logprob(self) -> float:
        """Log-probability per token; 0 without tokens."""
        return self._logprob / max(self.num_tokens, 1)

    async def run(self) -> AsyncGenerator[Piece, None]:
        """Raises EngineDeadError and MedusaError."""
        try:
            async with aclosing(self._engine.generate(self.submit)) as deltas:
                async for delta in deltas:
                    self._ticket.start()
                    piece = self._take(delta)
                    if piece is not None and piece.finish is not None and delta.finish is None:
                        await self._stop(deltas)
                    if piece is not None:
                        yield piece
                        if piece.finish is not None:
                            return
        except MedusaError:
            self._end = "error"
            raise
        finally:
            self._timer.end(self._end, self.stats)
            self._ticket.note_tokens(self.num_tokens)
            self._ticket.close()

    async def _stop(self, deltas: AsyncGenerator[Delta, None]) -> None:
        """End the request at a stop string, which only we can see, and hear what it has cost."""
        self._engine.abort(self.submit.request_id)
        with suppress(EngineDeadError):  # the text is complete all the same
            async for delta in deltas:
                self.stats = delta.stats

    def _take(self, delta: Delta) -> Piece | None:
        """Take in a delta; return what can be shown, or None while there is nothing."""
        self.stats = delta.stats
        _raise_for(delta)
        text, count = self._detokenize(delta)
        self._timer.tokens(count)
        self.num_tokens += count
        self._text += self._parse(text, is_end=delta.finish is not None or self._detokenizer.stopped is not None)
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs = delta.prompt_logprobs
            if self._options.scores_prompt:
                self._tokens += zip(self.submit.prompt, delta.prompt_logprobs, strict=True)
        self._tokens += [(scored.token_id, scored) for scored in delta.logprobs[:count]]
        self._logprob += sum([scored.logprob for scored in delta.logprobs[:count]])
        if self._options.token_ids:
            self._token_ids += delta.token_ids[:count]
        return self._show(delta)

    def _detokenize(self, delta: Delta) -> tuple[str, int]:
        """Text that is safe to show, and how many of the tokens count. A token that ended the text counts unseen."""
        hidden = delta.stop_token_id is not None and not self._options.include_stop
        before = self._detokenizer.num_tokens
        text = self._detokenizer.push(delta.token_ids[:-1] if hidden else delta.token_ids)
        if delta.finish is not None:
            text += self._detokenizer.finish()
        if self._detokenizer.stopped is not None:
            return text, self._detokenizer.num_tokens - before
        return text, len(delta.token_ids)

    def _parse(self, text: str, *, is_end: bool) -> str:
        """The content of `text`; the calls in it are kept beside."""
        if self._parser is None:
            return text
        parts = [self._parser.push(text), *([self._parser.finish()] if is_end else [])]
        self._calls += [call for part in parts for call in part.calls]
        return "".join(part.content for part in parts)

    def _show(self, delta: Delta) -> Piece | None:
        finish, reason = self._finish(delta)
        if not self._text and not self._calls and finish is None:
            return None
        if finish is not None:
            self._end = finish
        token_ids = tuple(self._token_ids) if self._options.token_ids else None
        has_called = finish == "stop" and self._parser is not None and self._parser.num_calls > 0
        piece = Piece(
            self.index,
            self._text,
            tuple(self._tokens),
            "tool_calls" if has_called else finish,
            reason,
            token_ids,
            self._prompt_logprobs,
            tuple(self._calls),
        )
        self._text, self._tokens, self._token_ids, self._prompt_logprobs, self._calls = "", [], [], None, []
        return piece

    def _finish(self, delta: Delta) -> tuple[Literal["stop", "length"] | None, str | int | None]:
        if self._detokenizer.stopped is not None:
            return "stop", self._detokenizer.stopped
        if delta.finish == "stop":
            is_eos = delta.stop_token_id in self._engine.info.eos_token_ids
            return "stop", None if is_eos else delta.stop_token_id
        return ("length" if delta.finish == "length" else None), None


def _raise_for(delta: Delta) -> None:
    if delta.finish == "error":
        raise MedusaError(delta.error or "The engine failed on this request.", code="engine_error")
    if delta.finish == "abort":
        raise EngineDeadError("The server is shutting down; send the request again.", code="shutting_down")


class Generation:
    """All choices of one HTTP request, in the order of their index. Raises RateLimitError and ShuttingDownError."""

    def __init__(
        self,
        service: Service,
        submits: Sequence[Submit],
        options: TextOptions,
        arrival: float,
        echoes: Sequence[str] = (),
    ) -> None:
        said = echoes or [""] * len(submits)
        tickets = service.admission.admit(submits)
        self.choices = [
            Choice(service, submit, index, options, arrival, ticket, echo)
            for index, (submit, ticket, echo) in enumerate(zip(submits, tickets, said, strict=True))
        ]

    def pieces(self) -> AsyncGenerator[Piece, None]:
        """News of all choices as they come."""
        first, *others = self.choices
        return merge([choice.run() for choice in self.choices]) if others else first.run()

    async def complete(self) -> list[Piece]:
        """Wait for the end; one piece for each choice."""
        parts: list[list[Piece]] = [[] for _ in self.choices]
        async with aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                parts[piece.index].append(piece)
        return [join(part) for part in parts]


def join(parts: Sequence[Piece]) -> Piece:
    """The pieces of a choice as one."""
    text = "".join(part.text for part in parts)
    tokens = tuple(token for part in parts for token in part.tokens)
    has_ids = parts[-1].token_ids is not None
    return replace(
        parts[-1],
        text=text,
        tokens=tokens,
        token_ids=tuple(id for part in parts for id in part.token_ids or ()) if has_ids else None,
        prompt_logprobs=parts[0].prompt_logprobs,
        calls=tuple(call for part in parts for call in part.calls),
    )


async def merge(streams: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """Run all streams at once and yield what comes. The first error, or leaving, closes them all."""
    queue: asyncio.Queue[Piece | asyncio.Task[None]] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[Piece, None]) -> None:
        async with aclosing(stream):
            async for piece in stream:
                queue.put_nowait(piece)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    for task in tasks:
        task.add_done_callback(queue.put_nowait)
    try:
        open_streams = len(tasks)
        while open_streams:
            item = await queue.get()
            if isinstance(item, asyncio.Task):
                item.result()
                open_streams -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
