"""The benchmark's order of rounds, reading of a stream, and command line; against a made-up server."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from tests.bench.client import BenchError, Side
from tests.bench.machine import cpu_model, this_machine
from tests.bench.measure import WARM_UP_TOKENS, Plan, measure, rotated, run
from tests.bench.speculation import integers, main


def test_every_side_comes_first_in_turn() -> None:
    sides = [Side(name, 1, "model") for name in "abc"]
    assert ["".join(side.name for side in rotated(sides, turn)) for turn in range(4)] == ["abc", "bca", "cab", "abc"]


@pytest.mark.parametrize(("concurrency", "expected"), [(1, 4), (4, 8), (8, 16), (16, 16), (40, 40)])
def test_a_round_keeps_its_streams_busy(concurrency: int, expected: int) -> None:
    plan = Plan(tuple(str(number) for number in range(16)))
    assert len(plan.prompts_of(concurrency, 0)) == expected


def test_rounds_walk_through_the_prompts() -> None:
    plan = Plan(("a", "b", "c", "d", "e", "f"))
    assert [plan.prompts_of(1, index) for index in range(2)] == [["a", "b", "c", "d"], ["e", "f", "a", "b"]]


def test_numbers_on_the_command_line() -> None:
    assert integers("1,2,8") == (1, 2, 8)
    with pytest.raises(argparse.ArgumentTypeError, match="below 1"):
        integers("4,0")


def test_the_machine_has_a_name(tmp_path) -> None:
    assert str(this_machine().num_cores) in str(this_machine())
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n")
    assert cpu_model(tmp_path / "cpuinfo") == "Some CPU @ 2 GHz"
    assert cpu_model(tmp_path / "missing")


CHUNKS = (
    {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"delta": {"content": "Hé"}}]},
    {"choices": [{"delta": {"content": "llo"}, "finish_reason": "length"}]},
    {
        "choices": [],
        "usage": {"completion_tokens": 7},
        "metrics": {"speculative_decoding": {"num_spec_steps": 3, "num_accepted_draft_tokens": 4}},
    },
)


@contextmanager
def fake_server(chunks: tuple[dict, ...], status: int = 200) -> Iterator[tuple[int, list[dict]]]:
    """Yields the port and the list of request bodies seen so far."""
    bodies: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"data": [{"id": "served"}]}).encode())

        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.end_headers()
            for chunk in chunks:
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, format: str, *args: object) -> None:
            """Silence: the base class writes every request to stderr."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1], bodies
        finally:
            server.shutdown()
            thread.join()


async def test_a_stream_becomes_a_sample() -> None:
    with fake_server(CHUNKS) as (port, bodies):
        side = Side("medusa", port, "model", {"speculation": {"mode": "lossless"}})
        seconds, samples = await run(side, ["one", "two"], 2, 96)
    assert [(s.prompt, s.text, s.num_tokens, s.num_spec_steps, s.num_accepted) for s in samples] == [
        ("one", "Héllo", 7, 3, 4),
        ("two", "Héllo", 7, 3, 4),
    ]
    assert all(0 < item.first_token_seconds <= item.seconds <= seconds for item in samples)
    assert bodies[0]["speculation"] == {"mode": "lossless"}
    assert (bodies[0]["temperature"], bodies[0]["max_tokens"], bodies[0]["stream"]) == (0, 96, True)


async def test_all_sides_see_the_same_prompts_after_one_warm_up() -> None:
    plan = Plan(("a", "b", "c", "d"), concurrencies=(1,), num_rounds=2, max_tokens=5)
    with fake_server(CHUNKS) as (port, bodies):
        sides = [Side(name, port, name) for name in ("plain", "medusa")]
        rounds = [item async for item in measure(sides, plan)]
    assert [(item.side, item.index) for item in rounds] == [("plain", 0), ("medusa", 0), ("medusa", 1), ("plain", 1)]
    asked = [(body["model"], body["max_tokens"]) for body in bodies]
    assert asked[:8] == [("plain", WARM_UP_TOKENS)] * 4 + [("medusa", WARM_UP_TOKENS)] * 4
    assert all(tokens == 5 for _, tokens in asked[8:])
    assert len({tuple(sample.prompt for sample in item.samples) for item in rounds}) == 1


@pytest.mark.parametrize(
    ("chunks", "status", "message"),
    [
        (CHUNKS, 500, "answered 500"),
        (({"error": {"message": "engine gone"}},), 200, "engine gone"),
        (CHUNKS[:3], 200, "usage"),
        (CHUNKS[3:], 200, "without any text"),
    ],
)
async def test_incomplete_answers_are_errors(chunks: tuple[dict, ...], status: int, message: str) -> None:
    with fake_server(chunks, status) as (port, _), pytest.raises(BenchError, match=message):
        await run(Side("plain", port, "model"), ["prompt"], 1, 96)


def test_the_command_compares_tree_sizes_with_plain_decoding(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--nodes", "2,8", "--concurrency", "1,2", "--rounds", "1", "--json", str(tmp_path / "bench.json")]
    with fake_server(CHUNKS) as (port, bodies):
        main(["--port", str(port), *options])
    written = json.loads((tmp_path / "bench.json").read_text())
    assert [(item["concurrency"], item["side"]) for item in written["summaries"]] == [
        (level, side) for level in (1, 2) for side in ("plain", "medusa, 2 nodes", "medusa, 8 nodes")
    ]
    assert {body["model"] for body in bodies} == {"served"}
    assert {body["speculation"].get("max_nodes") for body in bodies} == {None, 2, 8}
    output = capsys.readouterr().out
    assert written["machine"]["cpu"] in output
    assert "| medusa, 8 nodes |" in output
    assert "no heads" not in output


def test_a_server_without_heads_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server((*CHUNKS[:3], CHUNKS[3] | {"metrics": None})) as (port, _):
        main(["--port", str(port), "--concurrency", "1", "--rounds", "1"])
    assert "has no heads" in capsys.readouterr().out


def test_the_command_fails_with_a_sentence() -> None:
    with fake_server(CHUNKS, status=503) as (port, _), pytest.raises(SystemExit, match="bench: plain answered 503"):
        main(["--port", str(port)])
