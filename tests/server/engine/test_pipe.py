"""Messages through a pipe that nobody reads for a while, or ever."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest

from server.engine.messages import SamplingParams, Submit
from server.engine.pipe import PipeWriter


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
