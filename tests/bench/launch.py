"""Starts the measured servers, lets one at a time run, and always ends them, children included.

Invariant: a server is a process group of its own, so that a signal reaches all of it and nothing else.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import httpx

from tests.bench.client import BenchError

STOP_SECONDS = 15.0
POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Program:
    """How a server is started; it is told its port by `--port`. The model is the first one it lists, or `model`."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None


def ours(name: str, arguments: Sequence[str]) -> Program:
    """`medusa-serve serve` with `arguments`, and without an access log among the results."""
    command = (sys.executable, "-m", "server", "serve", "--host", "127.0.0.1", "--log-level", "warning")
    return Program(name, (*command, "--no-access-log", *arguments))


@dataclass(frozen=True, slots=True)
class Server:
    """A running program."""

    process: subprocess.Popen[bytes]
    port: int

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let a sleeping server run while the context lasts."""
        os.killpg(self.process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            self.sleep()

    def sleep(self) -> None:
        """Stop it where it stands. Nobody is to ask it anything until it is awake."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGSTOP)


@contextmanager
def serving(program: Program, *, start_seconds: float) -> Iterator[Server]:
    """`program` on a free port, once it is healthy.

    Raises BenchError if it exits or is not healthy after `start_seconds`.
    """
    port = free_port()
    process = subprocess.Popen(
        [*program.command, "--port", str(port)],
        stdout=sys.stderr,
        env={**os.environ, **program.environment},
        start_new_session=True,
    )
    try:
        await_health(program.name, process, port, start_seconds)
        yield Server(process, port)
    finally:
        stop(process)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def await_health(name: str, process: subprocess.Popen[bytes], port: int, seconds: float) -> None:
    """Return once /health says 200."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise BenchError(f"{name} exited with code {process.returncode}; its own words are above")
        with suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5, trust_env=False).is_success:
                return
        time.sleep(POLL_SECONDS)
    raise BenchError(f"{name} was not healthy after {seconds:.0f} s; give it more with --start-timeout")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, asleep or not; after STOP_SECONDS, end its whole process group."""
    process.terminate()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGCONT)
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
