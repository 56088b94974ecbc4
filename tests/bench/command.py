"""What the benchmarks' command lines have in common: options, progress, and the file with everything."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from tests.bench.measure import Round
from tests.bench.report import DECODING, Speed

PROMPTS = Path(__file__).with_name("prompts.txt")
TABLE_WIDTH = 160  # where no terminal says another

progress = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)


def add_options(parser: argparse.ArgumentParser, concurrencies: tuple[int, ...]) -> None:
    """How much to measure, with which heads, and where to write it."""
    levels = ",".join(map(str, concurrencies))
    parser.add_argument("--heads", help="heads for the model")
    parser.add_argument("--nodes", type=integers, default=(), help="compare these tree sizes, such as 1,2,4,8")
    parser.add_argument("--concurrency", type=integers, default=concurrencies, help=f"streams at a time ({levels})")
    parser.add_argument("--rounds", type=int, default=3, help="rounds to take the median of (3)")
    parser.add_argument("--max-tokens", type=int, default=96, help="tokens per answer (96)")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="one prompt a line, or training data: .jsonl")
    parser.add_argument("--start-timeout", type=float, default=300, help="seconds until a server is healthy (300)")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    parser.add_argument("rest", nargs="*", help="after --: further arguments of `medusa-serve serve`")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How tokens are drawn; with one seed, so that every side writes the same text."""
    parser.add_argument("--temperature", type=float, default=0.0, help="of the answers (0: greedy)")
    parser.add_argument("--top-p", type=float, default=1.0, help="the likeliest tokens that have this probability (1)")


def sampling(options: argparse.Namespace) -> dict[str, object]:
    """The same as fields of a request."""
    return {"temperature": options.temperature, "top_p": options.top_p, "seed": 1}


def sampling_in_words(options: argparse.Namespace) -> str:
    """One line above a table."""
    return f"temperature {options.temperature:g}, top_p {options.top_p:g}" if options.temperature else "greedy"


def integers(text: str) -> tuple[int, ...]:
    """'1,2,4' as (1, 2, 4), each at least 1."""
    values = tuple(int(part) for part in text.split(","))
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} holds a number below 1")
    return values


def end_orderly() -> None:
    """Let SIGTERM end this process as Ctrl-C does, so that it ends the servers it has started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


async def collect(rounds: AsyncIterator[Round], speed: Speed = DECODING) -> list[Round]:
    """All rounds; each is told on stderr as it ends."""
    done = []
    async for item in rounds:
        done.append(item)
        progress.print(
            f"{item.concurrency} streams, round {item.index + 1}, {item.side}: {speed(item):.1f} tokens/s", style="dim"
        )
    return done


def output() -> Console:
    return Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)


def write(path: Path | None, content: dict[str, object]) -> None:
    """`content`, dataclasses included, as JSON."""
    if path is not None:
        path.write_text(json.dumps(content, default=asdict, indent=1) + "\n", encoding="utf-8")
