"""The FastAPI application: routes, lifespan, the door. The engine is started before it and stopped with it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from server import __version__, door, ops
from server.admission import Admission
from server.metrics import Metrics
from server.openai import chat, completions, faults, models, pages, responses, tokens
from server.openai.service import Engine, Service
from server.options import DoorOptions
from server.text.prompt import Tokenizer


def create_app(
    engine: Engine,
    tokenizer: Tokenizer,
    *,
    model_name: str,
    metrics: Metrics,
    trust_request_chat_template: bool = False,
    options: DoorOptions | None = None,
    tool_call_parser: str = "auto",
) -> FastAPI:
    """The application of one started engine. `metrics.on_step` and `on_restart` are the engine's own to call."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await engine.stop()
        service.threads.close()

    options = options or DoorOptions()
    admission = Admission(options.limits, metrics.on_refusal)
    service = Service(
        engine,
        tokenizer,
        metrics,
        model_name,
        trust_request_chat_template=trust_request_chat_template,
        tool_call_parser=tool_call_parser,
        admission=admission,
    )
    app = FastAPI(title="medusa-serve", version=__version__, lifespan=lifespan, responses=faults.DOCUMENTED)
    app.state.service = service
    faults.install(app)
    for room in (completions, chat, responses, models, tokens, ops):
        app.include_router(room.router)
    pages.install(app)
    door.install(app, options, metrics)
    return app
