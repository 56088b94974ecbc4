"""Server-sent events, and clients that go away.

Invariants:
- an event stream ends with `data: [DONE]` where OpenAI's does, also after an error, unless its reader has gone;
- when the client goes away the work for it is cancelled at once, not when the next byte fails to be sent;
- a bug in mid-stream is logged and told as one; `send_end` is the only end there is;
- of the many chunks that differ by one text only, nothing but that text is encoded again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from server.errors import InternalError, MedusaError
from server.visit import note_error

Result = TypeVar("Result")

logger = logging.getLogger(__name__)
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`. Raises ClientDisconnect, with `work` cancelled, when the client goes first."""
    worker = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise ClientDisconnect
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """Sends the events, then the end. Closes the generator when done, and when the client goes away."""

    media_type = "text/event-stream"
    end = DONE

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(HEADERS)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send(send))
        except ClientDisconnect:
            return

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        error: MedusaError | None = None
        try:
            async with aclosing(self._events):
                async for body in self._events:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
        except MedusaError as caught:
            error = caught
        except Exception:
            logger.exception("A stream failed.")
            error = InternalError()
        await send_end(send, error, end=self.end)


async def send_end(send: Send, error: MedusaError | None = None, *, end: bytes = DONE) -> None:
    """End an event stream that has begun; with `error`, say what went wrong."""
    if error is not None:
        note_error(error)
        await send({"type": "http.response.body", "body": event(error.body()), "more_body": True})
    await send({"type": "http.response.body", "body": end, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


class NamedEventStream(EventStream):
    """A stream whose last event says that it is the last."""

    end = b""


_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}  # some clients split lines there
_BLANK = secrets.token_hex()  # nobody can have written it
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def event(content: Mapping[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + _encode(content) + b"\n\n"


def named_event(content: Mapping[str, Any]) -> bytes:
    """One event of a stream whose events have a type."""
    return f"event: {content['type']}\n".encode() + event(content)


class EventTemplate:
    """`event(content(text))` for texts that appear in it once, as a value."""

    def __init__(self, content: Callable[[str], Mapping[str, Any]]) -> None:
        self._before, self._after = event(content(_BLANK)).split(_encode(_BLANK))

    def fill(self, text: str) -> bytes:
        return self._before + _encode(text) + self._after


def _encode(value: Any) -> bytes:
    text = _to_json(value)
    return (text if text.isascii() else text.translate(_LINE_ENDS)).encode()
