"""What every route needs of the rest of the house: the engine, the tokenizer, the metrics, the model's name."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol

from fastapi import Depends, Request

from server.admission import Admission
from server.engine.messages import ControllerState, Delta, ModelInfo, Submit
from server.errors import EngineDeadError, ModelNotFoundError
from server.metrics import Metrics
from server.text.prompt import Tokenizer
from server.text.tools import FORMATS, ToolFormat, detect
from server.threads import Threads

Status = Literal["starting", "ready", "restarting", "dead"]


class Engine(Protocol):
    """The asyncio side of the engine, as far as the routes use it."""

    @property
    def info(self) -> ModelInfo: ...
    @property
    def status(self) -> Status: ...
    @property
    def controller(self) -> ControllerState | None:
        """What it last told of costs and gains."""
        ...

    async def stop(self) -> None: ...
    def generate(self, submit: Submit) -> AsyncGenerator[Delta, None]:
        """Deltas up to the terminal one. Closing it earlier aborts the request. Raises EngineDeadError."""
        ...

    def abort(self, request_id: str) -> None:
        """End a request early; its `generate` goes on to the terminal delta."""


@dataclass(frozen=True)
class Service:
    """One served model."""

    engine: Engine
    tokenizer: Tokenizer
    metrics: Metrics
    model_name: str
    trust_request_chat_template: bool = False
    admission: Admission = field(default_factory=Admission)
    threads: Threads = field(default_factory=Threads)
    created: int = field(default_factory=lambda: int(time.time()))
    tool_call_parser: str = "auto"

    @property
    def tool_format(self) -> ToolFormat | None:
        """How the model calls tools; None if nobody knows."""
        if self.tool_call_parser == "auto":
            return detect(self.tokenizer.template or "")
        return FORMATS[self.tool_call_parser]

    def check_ready(self) -> None:
        """Raises ShuttingDownError or EngineDeadError unless requests are taken."""
        self.admission.check_open()
        self.check_alive()

    def check_alive(self) -> None:
        """Raises EngineDeadError unless the engine works."""
        if self.engine.status == "dead":
            raise EngineDeadError("The engine has stopped and does not come back; restart the server.")
        if self.engine.status != "ready":
            raise EngineDeadError(f"The engine is {self.engine.status}; try again in a few seconds.")

    def check_model(self, name: str | None) -> None:
        """Raises ModelNotFoundError unless `name` is the served model, or absent."""
        if name is not None and name != self.model_name:
            raise ModelNotFoundError(
                f"The model '{name}' does not exist; this server has '{self.model_name}'.", param="model"
            )


async def _service(request: Request) -> Service:
    service = request.app.state.service  # in a coroutine: FastAPI would run a function in another thread
    assert isinstance(service, Service)
    return service


ServiceDep = Annotated[Service, Depends(_service)]
