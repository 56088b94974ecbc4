"""A made-up server for the benchmark's own tests: every answer is the same, and every request is kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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


METRICS = """\
# TYPE medusa_generation_tokens counter
medusa_generation_tokens_total{{model_name="served"}} {tokens}
# TYPE medusa_engine_seconds counter
medusa_engine_seconds_total{{model_name="served",part="kernels"}} {kernels}
medusa_engine_seconds_total{{model_name="served",part="engine"}} {engine}
# TYPE medusa_seconds_saved counter
medusa_seconds_saved_total{{model_name="served"}} {saved}
# TYPE medusa_seconds_lost counter
medusa_seconds_lost_total{{model_name="served"}} {lost}
# TYPE medusa_speedup_ratio gauge
medusa_speedup_ratio{{model_name="served",batch="1"}} 1.25
medusa_speedup_ratio{{model_name="served",batch="all"}} 1.125
# TYPE medusa_speedup_ratio_low gauge
medusa_speedup_ratio_low{{model_name="served",batch="1"}} 1.125
medusa_speedup_ratio_low{{model_name="served",batch="all"}} 1.0
# TYPE medusa_speedup_ratio_high gauge
medusa_speedup_ratio_high{{model_name="served",batch="1"}} 1.5
medusa_speedup_ratio_high{{model_name="served",batch="all"}} 1.25
"""


def metrics(num_answers: int) -> str:
    """As if each answer had taken 0.2 s, and 0.3 s plainly."""
    each = {"tokens": USAGE["completion_tokens"], "kernels": 0.15, "engine": 0.05, "saved": 0.25, "lost": 0.15}
    return METRICS.format(**{name: amount * num_answers for name, amount in each.items()})


class FakeServer(ThreadingHTTPServer):
    """Knows /health, /v1/models, /metrics and chat completions."""

    request_queue_size = 128  # a connection that finds the queue full is tried again after a second

    def __init__(self, port: int, chunks: Sequence[dict], status: int = 200) -> None:
        self.chunks, self.status = chunks, status
        self.bodies: list[dict] = []
        super().__init__(("127.0.0.1", port), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        said = metrics(len(self.server.bodies)) if self.path == "/metrics" else json.dumps({"data": [{"id": "served"}]})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(said.encode())

    def do_POST(self) -> None:
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(self.server.status)
        self.end_headers()
        with suppress(ConnectionError):  # clients may hang up
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
