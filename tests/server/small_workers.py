"""Engine processes for tests of the command line: one answers, one never gets ready, one cannot start."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection

from server.engine.messages import (
    Delta,
    EngineConfig,
    Failed,
    ModelInfo,
    Ready,
    RequestStats,
    Shutdown,
    SpeculationStats,
    StepOutput,
    StepStats,
    Submit,
)


def echo(config: EngineConfig, inbox: Connection, outbox: Connection) -> None:
    outbox.send(Ready(ModelInfo(config.model, 256, 100, (0,), 0, 1000, "cpu", "float32", "none")))
    while not isinstance(message := inbox.recv(), Shutdown):
        if isinstance(message, Submit):
            size = len(message.prompt)
            stats = RequestStats(size, 0, size, 0, 0.0, 0.0, 0.0, SpeculationStats())
            delta = Delta(message.request_id, message.prompt, finish="length", stats=stats)
            outbox.send(StepOutput((delta,), StepStats()))


def loading(config: EngineConfig, inbox: Connection, outbox: Connection) -> None:
    os.write(2, b"loading\n")
    time.sleep(600)


def refusing(config: EngineConfig, inbox: Connection, outbox: Connection) -> None:
    outbox.send(Failed("There is no such device: pass --device cpu."))
