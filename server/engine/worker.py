"""The engine process: loads the model, then serves its inbox until told to stop or orphaned.

Invariants:
- `Ready` or `Failed` is the first message out;
- one thread reads the inbox all the time, so the API process never blocks on a send;
- aborts and submits that arrive during a step take effect before the next one;
- a request's first token and its end are sent at once, what is between waits `SEND_SECONDS` at most and one step: where
  steps are shorter than that, the API process, which shares the processor, has fewer messages to take and to pass on.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import queue
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from time import monotonic

from server.engine.core import Engine
from server.engine.messages import (
    Abort,
    Delta,
    EngineConfig,
    Failed,
    Ready,
    Shutdown,
    StepOutput,
    Steps,
    Submit,
    ToEngine,
)
from server.engine.warmup import warm_up
from server.errors import StartupError

Inbox = queue.SimpleQueue[ToEngine]
SEND_SECONDS = 0.01
IDLE_SECONDS = 1.0  # before the slots are checked, which takes a large pool some tens of milliseconds


def run_worker(config: EngineConfig, inbox: Connection, outbox: Connection) -> None:
    """Entry point of the child process. Messages in and out are those of `messages`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business; it sends Shutdown
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    with contextlib.suppress(BrokenPipeError):  # the parent is gone
        try:
            engine = _load(config)
        except StartupError as error:
            outbox.send(Failed(error.message))
            return
        messages: Inbox = queue.SimpleQueue()
        threading.Thread(target=_read, args=(inbox, messages), daemon=True, name="inbox").start()
        outbox.send(Ready(engine.runner.info))
        serve(engine, messages, outbox)


def _load(config: EngineConfig) -> Engine:
    from server.engine.runner import Runner  # brings torch along

    runner = Runner.load(config)
    engine = Engine(config, runner)
    warm_up(engine)
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps what loading has freed: some 60 MB
        ctypes.CDLL(None).malloc_trim(0)
    gc.freeze()  # collecting what torch and transformers brought along would take as long as 30 steps
    return engine


def _read(inbox: Connection, messages: Inbox) -> None:
    try:
        while True:
            messages.put(inbox.recv())
    except (EOFError, OSError):
        messages.put(Shutdown())


def serve(engine: Engine, messages: Inbox, outbox: Connection) -> None:
    """Take messages, step, send; sleep when there is nothing to do."""
    news = _News(outbox)
    while True:
        received = _pending(messages) if engine.has_work else _wait(messages, engine.scheduler.check)
        if received:
            news.send()  # a prompt's step can take long
        deltas = [delta for message in received if (delta := _apply(engine, message)) is not None]
        if any(isinstance(message, Shutdown) for message in received):
            news.add(_joined(deltas, engine.shutdown()))
            news.send()
            return
        news.add(_joined(deltas, engine.step()))
        if news.are_urgent or not engine.has_work:
            news.send()


class _News:
    """Steps that the API process has not heard of."""

    def __init__(self, outbox: Connection) -> None:
        self._outbox = outbox
        self._outputs: list[StepOutput] = []
        self._sent_at = monotonic()
        self._begun: set[str] = set()  # requests whose first tokens were sent, or wait here
        self._has_first_or_last = False

    @property
    def are_urgent(self) -> bool:
        return self._has_first_or_last or monotonic() - self._sent_at >= SEND_SECONDS

    def add(self, output: StepOutput) -> None:
        if output.deltas or output.stats.num_rows:
            self._outputs.append(output)
        for delta in output.deltas:
            if delta.finish is not None:
                self._begun.discard(delta.request_id)
                self._has_first_or_last = True
            elif delta.request_id not in self._begun:
                self._begun.add(delta.request_id)
                self._has_first_or_last = True

    def send(self) -> None:
        if self._outputs:
            self._outbox.send(Steps(tuple(self._outputs)))
            self._outputs.clear()
        self._sent_at = monotonic()
        self._has_first_or_last = False


def _wait(messages: Inbox, on_idle: Callable[[], None]) -> list[ToEngine]:
    """At least one message. `on_idle` runs once if none comes for a while."""
    try:
        first = messages.get(timeout=IDLE_SECONDS)
    except queue.Empty:
        on_idle()
        first = messages.get()
    return [first, *_pending(messages)]


def _pending(messages: Inbox) -> list[ToEngine]:
    """All messages that are there."""
    received: list[ToEngine] = []
    while not messages.empty():
        received.append(messages.get())
    return received


def _apply(engine: Engine, message: ToEngine) -> Delta | None:
    if isinstance(message, Submit):
        return engine.submit(message)
    if isinstance(message, Abort):
        return engine.abort(message.request_id)
    return None


def _joined(deltas: list[Delta], output: StepOutput) -> StepOutput:
    return StepOutput((*deltas, *output.deltas), output.stats) if deltas else output
