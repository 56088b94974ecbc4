"""Messages through a pipe that nobody reads for a while, or ever, and messages that arrive in pieces."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import struct
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler

import pytest

from server.engine.messages import SamplingParams, Submit
from server.engine.pipe import PipeReader, PipeWriter


@pytest.fixture
def pipe() -> Iterator[tuple[Connection, Connection]]:
    reader, writer = multiprocessing.Pipe(duplex=False)
    yield reader, writer
    reader.close()
    writer.close()


def large(name: int) -> Submit:
    return Submit(str(name), tuple(range(50_000)), SamplingParams(1))


async def test_more_than_fits_is_written_when_it_is_read(pipe: tuple[Connection, Connection]) -> None:
    reader, connection = pipe
    writer = PipeWriter(connection)
    messages = [large(n) for n in range(5)] + [Submit("small", (1,), SamplingParams(1))]
    for message in messages:
        writer.send(message)
    assert [await asyncio.to_thread(reader.recv) for _ in messages] == messages
    writer.send("later")
    assert reader.recv() == "later"
    writer.close()
    with pytest.raises(EOFError):
        reader.recv()


async def test_a_reader_that_goes_away_is_no_error(pipe: tuple[Connection, Connection]) -> None:
    reader, connection = pipe
    writer = PipeWriter(connection)
    writer.send(large(0))
    writer.send(large(1))
    reader.close()
    await asyncio.sleep(0.05)
    writer.send("nobody hears it")
    writer.close()
    writer.close()
    writer.send("nor that")


def test_a_message_in_pieces_is_read_when_it_is_whole(pipe: tuple[Connection, Connection]) -> None:
    """Its length alone, half of its body, the rest and the beginning of the next."""
    connection, writer = pipe
    reader = PipeReader(connection)
    body = bytes(ForkingPickler.dumps(["a", "message"]))
    frame = struct.pack("!i", len(body)) + body
    for piece in (b"", frame[:2], frame[2:4], frame[4:9]):
        os.write(writer.fileno(), piece)
        assert reader.receive() is None
    os.write(writer.fileno(), frame[9:] + frame[:5])
    assert reader.receive() == ["a", "message"]
    assert reader.receive() is None
    os.write(writer.fileno(), frame[5:])
    assert reader.receive() == ["a", "message"]


def test_messages_larger_than_the_pipe_arrive_in_order(pipe: tuple[Connection, Connection]) -> None:
    connection, writer = pipe
    reader = PipeReader(connection)
    messages = [large(n) for n in range(3)]
    sending = threading.Thread(target=lambda: [writer.send(message) for message in messages])
    sending.start()
    received: list[object] = []
    while len(received) < 3:
        if (message := reader.receive()) is not None:
            received.append(message)
    sending.join()
    assert received == messages


def test_the_end_of_the_other_process_ends_reading(pipe: tuple[Connection, Connection]) -> None:
    connection, writer = pipe
    reader = PipeReader(connection)
    os.write(writer.fileno(), b"\0\0")
    assert reader.receive() is None
    writer.close()
    with pytest.raises(EOFError):
        reader.receive()
