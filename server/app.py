"""The FastAPI application: routes, lifespan, middleware. The engine is started before, and stopped with it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import perf_counter

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import __version__, ops
from server.metrics import Metrics
from server.openai import chat, completions, faults, models
from server.openai.service import Engine, Service
from server.text.prompt import Tokenizer


def create_app(
    engine: Engine, tokenizer: Tokenizer, *, model_name: str, metrics: Metrics, tool_call_parser: str = "auto"
) -> FastAPI:
    """The application of one started engine. `metrics.on_step` and `on_restart` are the engine's own to call."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await engine.stop()

    app = FastAPI(title="medusa-serve", version=__version__, lifespan=lifespan, responses=faults.DOCUMENTED)
    app.state.service = Service(engine, tokenizer, metrics, model_name, tool_call_parser=tool_call_parser)
    faults.install(app)
    for room in (completions, chat, models, ops):
        app.include_router(room.router)
    app.add_middleware(CountRequests, metrics=metrics)
    return app


class CountRequests:
    """Counts HTTP requests and their seconds, until the last byte. Plain ASGI: disconnects pass through."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = perf_counter(), 500

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note_status)
        finally:
            handler = getattr(scope.get("route"), "path", "none")
            self._metrics.http(handler, scope["method"], status, perf_counter() - started)
