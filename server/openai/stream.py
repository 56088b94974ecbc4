"""Server-sent events, and clients that go away.

Invariants:
- an event stream ends with `data: [DONE]`, also after an error, unless its reader has gone;
- when the client goes away the work for it is cancelled at once, not when the next byte fails to be sent.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from server.errors import MedusaError

Result = TypeVar("Result")

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


class EventStream(Response):
    """Sends each chunk as one event. Closes the generator when done, and when the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[Mapping[str, Any], None]) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(HEADERS)
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send(send))
        except ClientDisconnect:
            return

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(events(self._chunks)) as encoded:
            async for event in encoded:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def events(chunks: AsyncGenerator[Mapping[str, Any], None]) -> AsyncGenerator[bytes, None]:
    """The bytes of each chunk, of an error if there is one, and of the end."""
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield _event(chunk)
    except MedusaError as error:
        yield _event(error.body())
    yield b"data: [DONE]\n\n"


_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}  # some clients split lines there


def _event(content: Mapping[str, Any]) -> bytes:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.translate(_LINE_ENDS).encode() + b"\n\n"
