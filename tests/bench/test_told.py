"""What a server says of its speedup."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from tests.bench.fake_server import metrics
from tests.bench.told import Said, listen, overhead, parse, speedup


def said(taken: float | None = 0.0, saved: float | None = 0.0, kernels: float | None = 0.0) -> Said:
    return Said(0.0, taken, kernels, saved, {})


def test_parts_are_summed_and_batch_sizes_are_not() -> None:
    found = parse(metrics(10))
    assert (found.tokens, found.ratios) == (70, {"1": (1.125, 1.25, 1.5), "all": (1.0, 1.125, 1.25)})
    assert (found.taken, found.saved) == (pytest.approx(2.0), pytest.approx(1.0))
    assert found.kernels == pytest.approx(1.5)


def test_what_is_saved_is_nothing_without_what_is_lost() -> None:
    text = "# TYPE medusa_seconds_saved counter\nmedusa_seconds_saved_total 3\n"
    assert parse(text).saved is None
    assert parse(f"{text}# TYPE medusa_seconds_lost counter\nmedusa_seconds_lost_total 5\n").saved == -2


def test_what_is_not_said_is_none() -> None:
    assert parse("# TYPE up gauge\nup 1\n") == Said(None, None, None, None, {})


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (said(2, 1), said(6, 3), 1.5),
        (said(2, 1), said(6, 0), 0.75),
        (said(), said(), None),
        (said(0, None), said(4, None), None),
        (said(None, 0), said(None, 4), None),
    ],
)
def test_speedup_is_of_the_time_between(before: Said, after: Said, expected: float | None) -> None:
    assert speedup(before, after) == expected


def test_overhead_is_the_share_between_that_no_kernel_took() -> None:
    assert overhead(said(taken=2, kernels=1), said(taken=6, kernels=4)) == 0.25
    assert overhead(said(), said()) is None
    assert overhead(said(kernels=None), said(taken=4)) is None


@contextmanager
def answering(answers: dict[str, str]) -> Iterator[int]:
    """A server with these pages."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in answers else 404)
            self.end_headers()
            self.wfile.write(answers.get(self.path, "").encode())

        def log_message(self, format: str, *args: object) -> None:
            """Silence."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def test_without_the_gauge_the_controller_is_asked() -> None:
    state = {
        "speedups": [
            {"batch": "1", "ratio": 1.5, "low": 1.4, "high": 1.6},
            {"batch": "all", "ratio": 1, "low": 0, "high": 2},
        ]
    }
    with answering({"/metrics": "", "/debug/controller": json.dumps(state)}) as port:
        assert listen(port).ratios == {"1": (1.4, 1.5, 1.6), "all": (0, 1, 2)}


def test_a_server_with_neither_says_nothing() -> None:
    with answering({"/metrics": ""}) as port:
        assert listen(port) == Said(None, None, None, None, {})
