"""Starts our server for a measurement and always ends it, children included."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import httpx

from tests.bench.client import BenchError

STOP_SECONDS = 15.0
POLL_SECONDS = 0.2


@contextmanager
def our_server(arguments: Sequence[str], *, start_seconds: float) -> Iterator[int]:
    """`medusa-serve serve` with `arguments` on a free port, which is yielded once the server is healthy.

    Raises BenchError if it exits or is not healthy after `start_seconds`.
    """
    port = free_port()
    ours = ["--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]
    command = [sys.executable, "-m", "server", "serve", *ours, *arguments]
    process = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True)
    try:
        await_health(process, port, start_seconds)
        yield port
    finally:
        stop(process)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def await_health(process: subprocess.Popen[bytes], port: int, seconds: float) -> None:
    """Return once /health says 200."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise BenchError(f"the server exited with code {process.returncode}; its own words are above")
        with suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5, trust_env=False).is_success:
                return
        time.sleep(POLL_SECONDS)
    raise BenchError(f"the server was not healthy after {seconds:.0f} s; give it more with --start-timeout")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end; after STOP_SECONDS, end its whole process group."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
