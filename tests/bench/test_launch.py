"""Starting and ending the measured server, with stand-in processes."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tests.bench import launch
from tests.bench.client import BenchError

HEALTHY = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def log_message(self, *args): pass
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"


def start(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)


def end(process: subprocess.Popen[bytes]) -> None:
    launch.stop(process)
    assert process.stdout is not None
    process.stdout.close()


def test_a_healthy_server_is_waited_for() -> None:
    port = launch.free_port()
    process = start(HEALTHY, str(port))
    launch.await_health(process, port, 20)
    end(process)
    assert process.returncode == -15


def test_a_server_that_exits_is_reported() -> None:
    process = start("raise SystemExit(2)")
    with pytest.raises(BenchError, match="exited with code 2"):
        launch.await_health(process, launch.free_port(), 20)
    end(process)


def test_a_silent_server_is_given_up() -> None:
    process = start("import time; time.sleep(60)")
    with pytest.raises(BenchError, match="not healthy"):
        launch.await_health(process, launch.free_port(), 0.3)
    end(process)


def test_a_stubborn_server_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "STOP_SECONDS", 0.2)
    process = start(STUBBORN)
    assert process.stdout is not None
    process.stdout.readline()
    started = time.monotonic()
    end(process)
    assert process.returncode == -9
    assert time.monotonic() - started < 10
