"""One HTTP request from its first byte to its last: its id, what is noted of it, and what must happen at its end.

Invariants:
- every response carries `X-Request-Id`: the client's own if it is well formed, else one made here;
- what was left with `at_end` happens exactly once, however the request ends;
- middleware is plain ASGI, so that disconnects pass through.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, field
from time import perf_counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import MedusaError

_WELL_FORMED = re.compile(rb"[\w.:/+=@-]{1,128}", re.ASCII)


@dataclass(slots=True)
class Visit:
    """What is known so far. `status` is None until the first byte is sent."""

    id: str
    method: str
    path: str
    client: str | None
    started: float = field(default_factory=perf_counter)
    status: int | None = None
    route: str | None = None
    is_stream: bool = False
    is_complete: bool = False  # the last byte was sent
    error: str | None = None  # code of the error that was told
    key: str | None = None  # the name of the API key
    num_bytes: int = 0  # of the body
    num_prompt_tokens: int | None = None
    num_completion_tokens: int | None = None
    at_end: ExitStack = field(default_factory=ExitStack)

    @property
    def seconds(self) -> float:
        return perf_counter() - self.started


_current: ContextVar[Visit | None] = ContextVar("visit", default=None)


def current() -> Visit | None:
    """The request that this task works for; None outside of any."""
    return _current.get()


def note_error(error: MedusaError) -> None:
    """For the access log: the client is told of `error`."""
    if (visit := current()) is not None:
        visit.error = error.code


class HttpMiddleware:
    """Middleware that only looks at HTTP."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self.http(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def http(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError


class Visits(HttpMiddleware):
    """The outermost: makes the visit, and tells the `observers` when it is over."""

    def __init__(self, app: ASGIApp, observers: Sequence[Callable[[Visit], None]] = ()) -> None:
        super().__init__(app)
        self._observers = observers

    async def http(self, scope: Scope, receive: Receive, send: Send) -> None:
        visit = _begin(scope)
        token = _current.set(visit)

        async def note(message: Message) -> None:
            if message["type"] == "http.response.start":
                _note_start(visit, message)
            elif not message.get("more_body", False):
                visit.is_complete = True
            await send(message)

        try:
            with visit.at_end:
                await self._app(scope, receive, note)
        finally:
            _current.reset(token)
            visit.route = getattr(scope.get("route"), "path", None)
            for observe in self._observers:
                observe(visit)


def _begin(scope: Scope) -> Visit:
    client = scope.get("client")
    return Visit(_request_id(scope), scope["method"], scope["path"], client[0] if client else None)


def _request_id(scope: Scope) -> str:
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode() if _WELL_FORMED.fullmatch(given) else uuid.uuid4().hex


def _note_start(visit: Visit, message: Message) -> None:
    visit.status = message["status"]
    headers = list(message.get("headers", ()))
    visit.is_stream = any(name == b"content-type" and b"event-stream" in value for name, value in headers)
    message["headers"] = [*headers, (b"x-request-id", visit.id.encode())]
