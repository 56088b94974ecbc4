"""How large a request may be and how long it may take.

Invariants:
- of a body that is too large no more than the limit is kept, whether or not it says its length;
- a request that takes too long is cancelled, which aborts it in the engine; a stream still ends as streams do: an
  `error` event, then `[DONE]`.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import NoReturn

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import RequestTimeoutError, RequestTooLargeError
from server.openai.stream import send_end
from server.visit import HttpMiddleware, current

LAST_WORDS_SECONDS = 1.0  # for a client to take the end of its stream


class BodyLimit(HttpMiddleware):
    """Raises RequestTooLargeError (413), here or where the body is read; notes how long bodies are."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        super().__init__(app)
        self._max_bytes = max_bytes

    async def http(self, scope: Scope, receive: Receive, send: Send) -> None:
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            self._refuse()
        num_bytes, visit = 0, current()

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if visit is not None:
                visit.num_bytes = num_bytes
            if num_bytes > self._max_bytes:
                self._refuse()
            return message

        await self._app(scope, counted, send)

    def _refuse(self) -> NoReturn:
        raise RequestTooLargeError(f"The body is larger than the {self._max_bytes} bytes allowed; send less at a time.")


class Deadline(HttpMiddleware):
    """Raises RequestTimeoutError (504) unless the first byte is sent."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        super().__init__(app)
        self._seconds = seconds

    async def http(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = asyncio.timeout(self._seconds)
        try:
            async with limit:
                await self._app(scope, receive, send)
        except TimeoutError:
            if not limit.expired():
                raise
            await self._end(send)

    async def _end(self, send: Send) -> None:
        error = RequestTimeoutError(f"The request took longer than the {self._seconds:g} seconds allowed.")
        visit = current()
        if visit is None or visit.status is None or not visit.is_stream:
            raise error
        with suppress(TimeoutError):  # whoever does not read is cut off
            async with asyncio.timeout(LAST_WORDS_SECONDS):
                await send_end(send, error)
