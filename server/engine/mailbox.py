"""What one request has not heard yet.

Invariants:
- news are never held back: a reader that waits is woken by the first;
- a reader that falls behind finds all it has missed in one delta, so what waits for a slow client stays one object;
- an error comes after all that was said before it.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from server.engine.messages import Delta
from server.errors import EngineDeadError


class Mailbox:
    """One writer, one reader, one event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._delta: Delta | None = None
        self._error: EngineDeadError | None = None
        self._reader: asyncio.Future[None] | None = None

    def put(self, delta: Delta) -> None:
        self._delta = delta if self._delta is None else _merged(self._delta, delta)
        self._wake()

    def fail(self, error: EngineDeadError) -> None:
        self._error = error
        self._wake()

    async def get(self) -> Delta:
        """Wait for news. Raises the error when there are none before it."""
        if self._delta is None and self._error is None:
            self._reader = self._loop.create_future()
            await self._reader
        if self._delta is None:
            assert self._error is not None
            raise self._error
        delta, self._delta = self._delta, None
        return delta

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


def _merged(first: Delta, then: Delta) -> Delta:
    prompt_logprobs = then.prompt_logprobs if first.prompt_logprobs is None else first.prompt_logprobs
    return replace(
        then,
        token_ids=first.token_ids + then.token_ids,
        logprobs=first.logprobs + then.logprobs,
        prompt_logprobs=prompt_logprobs,
    )
