"""The asyncio side of the engine process: starts it, talks to it, starts it again when it dies.

Invariants:
- a `generate` ends with a terminal delta or with EngineDeadError; leaving it earlier sends `Abort`;
- a process that has work and takes no step for `timeout_seconds` is killed, which is a death like any other;
- nothing waits for a process to read: `PipeWriter` keeps what it does not take;
- only the event loop's thread touches requests, status and pipes, and a message wakes it once; it reads a message when
  its beginning has come, and waits for the rest of a large one no longer than the engine takes to write it;
- the end of the engine's pipe is the death of its process;
- the parent keeps no end of a pipe that is the child's, so that death is end-of-file on both sides;
- the child is spawned with SIGINT blocked: Ctrl-C is the parent's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import signal
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from multiprocessing.connection import Connection
from typing import Literal

from server.engine.mailbox import Mailbox
from server.engine.messages import (
    Abort,
    ControllerState,
    Delta,
    EngineConfig,
    Failed,
    FromEngine,
    ModelInfo,
    Ready,
    Shutdown,
    StepOutput,
    Steps,
    StepStats,
    Submit,
    ToEngine,
)
from server.engine.pipe import PipeReader, PipeWriter
from server.engine.watchdog import Watchdog
from server.errors import EngineDeadError, StartupError

Target = Callable[[EngineConfig, Connection, Connection], None]
Status = Literal["starting", "ready", "restarting", "dead"]

MAX_DEATHS = 5  # in a row, before it is given up
HEALTHY_SECONDS = 60.0  # a process that served this long was no failure
FIRST_BACKOFF_SECONDS = 0.1  # doubles with every death in a row
STOP_SECONDS = 5.0  # between `Shutdown` and the kill
HANG_SECONDS = 300.0  # without a step, though there is work

logger = logging.getLogger(__name__)


def _run_worker(config: EngineConfig, inbox: Connection, outbox: Connection) -> None:
    from server.engine.worker import run_worker  # imports torch: in the child only

    run_worker(config, inbox, outbox)


def _ignore(*_: object) -> None:
    return


class EngineClient:
    """The engine, seen from the event loop. `info` is valid once `start()` has returned.

    `controller` is what the present process has last told of costs and gains, None until it has.
    `on_step` hears of every step, `on_restart` of every process after the first, `on_dead` when no more are started.
    """

    info: ModelInfo

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_step: Callable[[StepStats], None] = _ignore,
        on_restart: Callable[[], None] = _ignore,
        on_dead: Callable[[], None] = _ignore,
        timeout_seconds: float = HANG_SECONDS,
        target: Target = _run_worker,
    ) -> None:
        self.status: Status = "starting"
        self.controller: ControllerState | None = None
        self._config = config
        self._on_step = on_step
        self._on_restart = on_restart
        self._on_dead = on_dead
        self._target = target
        self._requests: dict[str, Mailbox] = {}
        self._watchdog = Watchdog(timeout_seconds, lambda: bool(self._requests))
        self._process: _EngineProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the process and wait until it is ready. Raises StartupError with the engine's own sentence."""
        try:
            process = self._launch()
            self.info = await process.ready
        except BaseException:
            await self.stop()
            raise
        self.status = "ready"
        self._supervisor = asyncio.create_task(self._supervise(process))

    async def stop(self, grace: float = STOP_SECONDS) -> None:
        """End the process; what is still open ends with `abort`, or with EngineDeadError if it must be killed.

        It is killed after `grace` seconds, and at once if it is still loading.
        """
        grace = grace if self.status == "ready" else 0.0
        self.status = "dead"
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
        if self._process is not None:
            self._process.send(Shutdown())
            await self._process.join(grace)
        self._fail_requests("The engine is stopped.")

    async def generate(self, submit: Submit) -> AsyncGenerator[Delta]:
        """Yield the request's deltas, the terminal one included. Closing it earlier aborts the request.

        Raises EngineDeadError when the engine is not ready, or dies.
        """
        process = self._process
        if self.status != "ready" or process is None:
            raise EngineDeadError(f"The engine is {self.status}: try again later.")
        assert submit.request_id not in self._requests, f"two open requests are called {submit.request_id}"
        mailbox = self._requests[submit.request_id] = Mailbox()
        process.send(submit)
        try:
            finished = False
            while not finished:
                delta = await mailbox.get()
                yield delta
                finished = delta.finish is not None
        finally:
            if self._requests.get(submit.request_id) is mailbox:
                del self._requests[submit.request_id]
                process.send(Abort(submit.request_id))

    def abort(self, request_id: str) -> None:
        """End a request early; its `generate` goes on to the terminal delta."""
        if self._process is not None:
            self._process.send(Abort(request_id))

    def _launch(self) -> _EngineProcess:
        self.controller = None
        self._process = _EngineProcess(self._target, self._config, self._hear)
        return self._process

    async def _supervise(self, process: _EngineProcess) -> None:
        """Replace every process that dies, until MAX_DEATHS of them have died in a row."""
        ready_at, deaths = time.monotonic(), 0
        while True:
            await self._outlive(process)
            self.status = "restarting"
            self._fail_requests("The engine process died and is being restarted: try again in a moment.")
            logger.error("The engine process died with exit code %s.", await process.join(STOP_SECONDS))
            deaths = 1 if time.monotonic() - ready_at > HEALTHY_SECONDS else deaths + 1
            if deaths == MAX_DEATHS:
                break
            await asyncio.sleep(FIRST_BACKOFF_SECONDS * 2 ** (deaths - 1))
            process = self._launch()
            self._on_restart()
            await self._wait_ready(process)
            ready_at = time.monotonic()
        self.status = "dead"
        logger.critical("The engine process died %d times in a row and is given up.", deaths)
        self._on_dead()

    async def _outlive(self, process: _EngineProcess) -> None:
        """Wait for the end of the process, and bring it about if it hangs."""
        barking = asyncio.create_task(self._watchdog.bark())
        exited = asyncio.create_task(process.exited.wait())
        try:
            await asyncio.wait({barking, exited}, return_when=asyncio.FIRST_COMPLETED)
            if not exited.done():
                logger.error("The engine process hangs and is killed.")
                process.kill()
                await exited
        finally:
            barking.cancel()
            exited.cancel()

    async def _wait_ready(self, process: _EngineProcess) -> None:
        try:
            self.info = await process.ready
            self.status = "ready"
        except StartupError as error:
            logger.error("The engine could not start again: %s", error)

    def _hear(self, output: StepOutput) -> None:
        self._watchdog.hear()
        for delta in output.deltas:
            if (mailbox := self._requests.get(delta.request_id)) is not None:
                mailbox.put(delta)
                if delta.finish is not None:
                    del self._requests[delta.request_id]
        self.controller = output.stats.controller or self.controller
        self._on_step(output.stats)

    def _fail_requests(self, message: str) -> None:
        for mailbox in self._requests.values():
            mailbox.fail(EngineDeadError(message))
        self._requests.clear()


class _EngineProcess:
    """One life of the engine process: `ready` is its first word, `exited` its last."""

    def __init__(self, target: Target, config: EngineConfig, hear: Callable[[StepOutput], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[ModelInfo] = self._loop.create_future()
        self.exited = asyncio.Event()
        self.exit_code: int | None = None  # known once it was joined
        self._hear = hear
        context = multiprocessing.get_context("spawn")
        child_inbox, inbox = context.Pipe(duplex=False)
        outbox, child_outbox = context.Pipe(duplex=False)
        self._process = context.Process(
            target=target, args=(config, child_inbox, child_outbox), name="medusa-engine", daemon=True
        )
        with _sigint_blocked():
            self._process.start()
        child_inbox.close()
        child_outbox.close()
        self._inbox = PipeWriter(inbox)
        self._outbox, self._words = outbox, PipeReader(outbox)
        self._loop.add_reader(outbox.fileno(), self._read)

    def send(self, message: ToEngine) -> None:
        """A dead process hears nothing; the end of its own pipe reports it."""
        self._inbox.send(message)

    def kill(self) -> None:
        """End it now; `exited` tells when."""
        self._process.kill()

    async def join(self, grace: float) -> int | None:
        """Wait for the end of the process, kill it after `grace` seconds, and return its exit code."""
        if self.exit_code is None:
            await asyncio.to_thread(self._process.join, grace)
            if self._process.is_alive():
                self._process.kill()
            await self.exited.wait()
            await asyncio.to_thread(self._process.join)
            self._inbox.close()
            self.exit_code = self._process.exitcode
            self._process.close()
        return self.exit_code

    def _read(self) -> None:
        """One message, a part of it, or the end. With more to come the loop calls again, after whoever is due."""
        try:
            message = self._words.receive()
        except (EOFError, OSError):
            self._loop.remove_reader(self._outbox.fileno())
            self._outbox.close()
            self._end()
        else:
            if message is not None:
                self._receive(message)

    def _receive(self, message: FromEngine) -> None:
        match message:
            case Steps(outputs):
                for output in outputs:
                    self._hear(output)
            case Ready(info) if not self.ready.done():
                self.ready.set_result(info)
            case Failed(sentence):
                self._fail(sentence)

    def _end(self) -> None:
        self._fail("The engine process died while it was starting; its output above says why.")
        self.exited.set()

    def _fail(self, sentence: str) -> None:
        if not self.ready.done():
            self.ready.set_exception(StartupError(sentence))


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
