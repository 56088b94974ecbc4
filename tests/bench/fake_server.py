"""A made-up server for the benchmark's own tests: every answer is the same, and every request is kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

USAGE = {"prompt_tokens": 50, "completion_tokens": 7}
CHUNKS: tuple[dict, ...] = (
    {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"delta": {"content": "Hé"}}]},
    {"choices": [{"delta": {"content": "llo"}, "finish_reason": "length"}]},
    {
        "choices": [],
        "usage": USAGE,
        "metrics": {"speculative_decoding": {"num_spec_steps": 3, "num_accepted_draft_tokens": 4}},
    },
)


class FakeServer(ThreadingHTTPServer):
    """Knows /health, /v1/models and chat completions."""

    def __init__(self, port: int, chunks: Sequence[dict], status: int = 200) -> None:
        self.chunks, self.status = chunks, status
        self.bodies: list[dict] = []
        super().__init__(("127.0.0.1", port), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": "served"}]}).encode())

    def do_POST(self) -> None:
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(self.server.status)
        self.end_headers()
        for chunk in self.server.chunks:
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: object) -> None:
        """Silence: the base class writes every request to stderr."""


@contextmanager
def fake_server(chunks: Sequence[dict] = CHUNKS, status: int = 200) -> Iterator[tuple[int, list[dict]]]:
    """Yields the port and the list of request bodies seen so far."""
    with FakeServer(0, chunks, status) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1], server.bodies
        finally:
            server.shutdown()
            thread.join()


if __name__ == "__main__":
    FakeServer(int(sys.argv[sys.argv.index("--port") + 1]), CHUNKS).serve_forever()
