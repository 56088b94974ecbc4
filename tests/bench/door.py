"""How long a refusal takes while the server is busy: `python -m tests.bench.door [-- arguments of serve]`.

Starts the server, keeps 64 streams running, and asks for a 400 again and again: first beside the streams alone, then
while prompts of 100 kB come in, several at a time, which are too long for the model: reading them is all they cost.
It tells the percentiles of the time from sending a request to the first byte of its answer.

Invariant: every refusal is a 400 and every long prompt is one of its context's length; anything else is a BenchError.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from statistics import quantiles
from time import perf_counter
from typing import Any

from tests.bench import command
from tests.bench.client import BenchError, served_model
from tests.bench.launch import ours, serving

WORDS = "The quick brown fox jumps over the lazy dog, 1234 times; "


def post(body: dict[str, object]) -> bytes:
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()


async def refused(port: int, request: bytes, reason: bytes) -> float:
    """Seconds until the first byte of a 400 that says `reason`."""
    async with connected(port) as (reader, writer):
        started = perf_counter()
        writer.write(request)
        answer = await reader.read(1)
        seconds = perf_counter() - started
        answer += await reader.read()
    if not answer.startswith(b"HTTP/1.1 400") or reason not in answer:
        raise BenchError(f"instead of a 400 came {answer[:300]!r}")
    return seconds


async def drain(port: int, request: bytes) -> None:
    """Read a stream to its end, again and again."""
    while True:
        async with connected(port) as (reader, writer):
            writer.write(request)
            answer = await reader.read(2**16)
            if not answer.startswith(b"HTTP/1.1 200"):
                raise BenchError(f"instead of a stream came {answer[:300]!r}")
            while await reader.read(2**16):
                continue


async def repeat_long(port: int, request: bytes, seconds: list[float]) -> None:
    while True:
        seconds.append(await refused(port, request, b"context_length_exceeded"))


@asynccontextmanager
async def running(work: Sequence[Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Let all of it run while the context lasts; none may fail."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        yield
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def probe(port: int, request: bytes, count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        seconds.append(await refused(port, request, b"temperature"))
        await asyncio.sleep(0.01)
    return seconds


def percentiles(name: str, seconds: Sequence[float]) -> str:
    cuts = quantiles(seconds, n=100)
    said = ", ".join(f"p{p} {cuts[p - 1] * 1000:.1f} ms" for p in (50, 90, 99))
    return f"{name}: {said}, max {max(seconds) * 1000:.1f} ms ({len(seconds)} requests)"


async def measure(port: int, args: argparse.Namespace) -> AsyncIterator[str]:
    """One line for each situation."""
    model = served_model(port)
    stream = post({"model": model, "prompt": "Once", "stream": True, "max_tokens": 500, "ignore_eos": True})
    bad = post({"model": model, "prompt": "Hi", "temperature": 99})
    long = post({"model": model, "prompt": (WORDS * (args.kilobytes * 1000 // len(WORDS) + 1))})
    yield percentiles("a 400, server idle", await probe(port, bad, args.probes))
    async with running([drain(port, stream) for _ in range(args.streams)]):
        await asyncio.sleep(2)
        yield percentiles(f"a 400, {args.streams} streams", await probe(port, bad, args.probes))
        taken: list[float] = []
        async with running([repeat_long(port, long, taken) for _ in range(args.long)]):
            await asyncio.sleep(1)
            yield percentiles(
                f"a 400, {args.streams} streams and {args.long} prompts of {args.kilobytes} kB at a time",
                await probe(port, bad, args.probes),
            )
        yield percentiles("    those prompts' own 400", taken)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.door", description=__doc__)
    parser.add_argument("--streams", type=int, default=64, help="streams that run (64)")
    parser.add_argument("--long", type=int, default=8, help="long prompts at a time (8)")
    parser.add_argument("--kilobytes", type=int, default=100, help="size of a long prompt (100)")
    parser.add_argument("--probes", type=int, default=500, help="refusals to time in each situation (500)")
    parser.add_argument("--start-timeout", type=float, default=300, help="seconds until the server is healthy (300)")
    parser.add_argument("rest", nargs="*", help="after --: arguments of `medusa-serve serve`")
    return parser.parse_args(argv)


async def report(port: int, args: argparse.Namespace) -> None:
    async for line in measure(port, args):
        print(line, flush=True)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    command.end_orderly()
    try:
        with serving(ours("medusa-serve", args.rest), start_seconds=args.start_timeout) as server:
            asyncio.run(report(server.port, args))
    except BenchError as error:
        command.progress.print(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
