"""Starting and ending the measured server, with stand-in processes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.bench import fake_server, launch
from tests.bench.client import BenchError, served_model
from tests.bench.launch import Program, Server, serving

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
    launch.await_health("side", process, port, 20)
    end(process)
    assert process.returncode == -15


def test_a_server_that_exits_is_reported() -> None:
    process = start("raise SystemExit(2)")
    with pytest.raises(BenchError, match="side exited with code 2"):
        launch.await_health("side", process, launch.free_port(), 20)
    end(process)


def test_a_program_is_served_on_a_port_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    program = Program("fake", (sys.executable, fake_server.__file__))
    with serving(program, start_seconds=20) as one, serving(program, start_seconds=20) as other:
        assert (served_model(one.port), one.port != other.port) == ("served", True)
    assert [one.process.poll(), other.process.poll()] == [-15, -15]


def state(server: Server) -> str:
    """As Linux's ps has it: T is stopped."""
    return Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the state of a process from Linux's /proc")
def test_a_sleeping_server_wakes_for_its_turn_and_ends_asleep(capfd: pytest.CaptureFixture[str]) -> None:
    with serving(Program("fake", (sys.executable, fake_server.__file__)), start_seconds=20) as server:
        server.sleep()
        await_state(server, "T")
        with server.awake():
            assert served_model(server.port) == "served"
        await_state(server, "T")
    assert server.process.returncode == -15


def await_state(server: Server, expected: str) -> None:
    deadline = time.monotonic() + 10
    while state(server) != expected:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_silent_server_is_given_up() -> None:
    process = start("import time; time.sleep(60)")
    with pytest.raises(BenchError, match="side was not healthy"):
        launch.await_health("side", process, launch.free_port(), 0.3)
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
