"""Reading of one stream, against a made-up server and from bytes that come in any pieces."""

from __future__ import annotations

import json

import pytest

from tests.bench.client import BenchError, Prompt, Recording, Sample, Side, read, record, served_model
from tests.bench.fake_server import CHUNKS, fake_server
from tests.bench.launch import free_port

PROMPT = Prompt("prompt")
EVENTS = (
    "".join(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n" for chunk in CHUNKS).encode() + b"data: [DONE]\n\n"
)


def chunked(body: bytes) -> bytes:
    """As HTTP/1.1 sends it, in two chunks that meet in the middle of an event."""
    half = len(body) // 2
    parts = (body[:half], body[half:], b"")
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in parts)


async def ask(port: int, **extra: object) -> Sample:
    side = Side("medusa", port, "model", extra)
    return read(side, await record(side, PROMPT, 96))


async def test_a_stream_becomes_a_sample() -> None:
    with fake_server() as (port, bodies):
        sample = await ask(port, speculation={"mode": "lossless"})
    assert (sample.prompt, sample.text, sample.num_prompt_tokens, sample.num_tokens) == (PROMPT, "Héllo", 50, 7)
    assert (sample.num_spec_steps, sample.num_accepted) == (3, 4)
    assert 0 < sample.first_token_seconds <= sample.seconds
    assert bodies[0]["speculation"] == {"mode": "lossless"}
    assert bodies[0]["messages"] == PROMPT.messages
    assert (bodies[0]["temperature"], bodies[0]["max_tokens"], bodies[0]["stream"]) == (0, 96, True)


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_bytes_may_come_in_any_pieces(size: int) -> None:
    data = chunked(EVENTS)
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    recording = Recording(PROMPT, 10.0, tuple((11.0 + n, piece) for n, piece in enumerate(pieces)))
    sample = read(Side("side", 1, "model"), recording)
    assert (sample.text, sample.num_tokens, sample.seconds) == ("Héllo", 7, float(len(pieces)))


def test_the_first_token_is_the_first_text() -> None:
    head, *events = chunked(EVENTS).partition(b'data: {"choices": [{"delta": {"content": "H')
    pieces = ((1.0, head), (3.0, b"".join(events)))
    assert read(Side("side", 1, "model"), Recording(PROMPT, 0.5, pieces)).first_token_seconds == 2.5


async def test_an_answer_may_end_before_any_text() -> None:
    with fake_server(CHUNKS[3:], 200) as (port, _):
        sample = await ask(port)
    assert sample.text == ""
    assert sample.first_token_seconds == sample.seconds > 0


@pytest.mark.parametrize(
    ("chunks", "status", "message"),
    [
        (CHUNKS, 500, "answered 500"),
        (({"error": {"message": "engine gone"}},), 200, "engine gone"),
        (CHUNKS[:3], 200, "usage"),
    ],
)
async def test_incomplete_answers_are_errors(chunks: tuple[dict, ...], status: int, message: str) -> None:
    with fake_server(chunks, status) as (port, _), pytest.raises(BenchError, match=message):
        await ask(port)


def test_a_closed_connection_is_an_error() -> None:
    with pytest.raises(BenchError, match="side closed the connection"):
        read(Side("side", 1, "model"), Recording(PROMPT, 0.0, ()))


def test_no_http_at_all_is_an_error() -> None:
    with pytest.raises(BenchError, match="side sent no HTTP"):
        read(Side("side", 1, "model"), Recording(PROMPT, 0.0, ((1.0, b"SSH-2.0\r\n"),)))


async def test_nobody_listens() -> None:
    with pytest.raises(OSError, match="Connect"):
        await ask(free_port())


def test_the_served_model_is_the_first() -> None:
    with fake_server() as (port, _):
        assert served_model(port) == "served"


@pytest.mark.parametrize(("own", "sent"), [(None, 96), (7, 7), (200, 96)])
def test_a_prompt_may_limit_its_answer(own: int | None, sent: int) -> None:
    request = Side("side", 1, "model").request(Prompt("prompt", max_tokens=own), 96)
    assert json.loads(request.partition(b"\r\n\r\n")[2])["max_tokens"] == sent
