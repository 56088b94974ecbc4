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
    Steps,
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
            outbox.send(Steps((StepOutput((delta,), StepStats()),)))


def steady(config: EngineConfig, inbox: Connection, outbox: Connection) -> None:
    """A token every 10 ms for each open request; like the engine, it ends what is open when it is told to leave."""
    outbox.send(Ready(ModelInfo(config.model, 256, 100_000, (0,), 0, 1000, "cpu", "float32", "none")))
    left: dict[str, int] = {}
    while True:
        while inbox.poll(0.01 if left else None):
            message = inbox.recv()
            if isinstance(message, Submit):
                left[message.request_id] = message.sampling.max_tokens
            elif isinstance(message, Shutdown):
                outbox.send(Steps((StepOutput(tuple(Delta(name, finish="abort") for name in left), StepStats()),)))
                return
            elif left.pop(message.request_id, None):
                outbox.send(Steps((StepOutput((Delta(message.request_id, finish="abort"),), StepStats()),)))
        left = {name: count - 1 for name, count in left.items()}
        deltas = tuple(Delta(name, (65,), finish=None if count else "length") for name, count in left.items())
        outbox.send(Steps((StepOutput(deltas, StepStats(num_running=len(left))),)))
        left = {name: count for name, count in left.items() if count}


def loading(config: EngineConfig, inbox: Connection, outbox: Connection) -> None:
    os.write(2, b"loading\n")
    time.sleep(600)


def refusing(config: EngineConfig, inbox: Connection, outbox: Connection) -> None:
    outbox.send(Failed("There is no such device: pass --device cpu."))
