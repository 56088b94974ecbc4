"""`make bench`: plain decoding against Medusa on one server, over HTTP, side by side.

One server answers both sides (`speculation.mode` is a field of the request), so nothing differs but speculation.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import httpx
from rich.console import Console

from tests.bench import report
from tests.bench.client import BenchError, Side, served_model
from tests.bench.launch import our_server
from tests.bench.machine import this_machine
from tests.bench.measure import Plan, Round, measure

PROMPTS = Path(__file__).with_name("prompts.txt")
PLAIN = "plain"
TABLE_WIDTH = 120  # where no terminal says another


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits with 1 and a sentence if a measurement fails."""
    options = parse(arguments)
    try:
        with server(options) as port:
            rounds = asyncio.run(collect(sides(port, options.nodes), plan(options)))
    except (BenchError, httpx.HTTPError, OSError) as error:
        sys.exit(f"bench: {str(error) or type(error).__name__}")
    publish(rounds, options.json)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.speculation", description=__doc__)
    parser.add_argument("--model", help="folder, hub id or GGUF file; the default model if left out")
    parser.add_argument("--heads", help="heads for the model")
    parser.add_argument("--port", type=int, help="measure the server that already listens on this port of 127.0.0.1")
    parser.add_argument("--nodes", type=integers, default=(), help="compare these tree sizes, such as 1,2,4,8")
    parser.add_argument("--concurrency", type=integers, default=(1, 4, 16), help="streams at a time (1,4,16)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds to take the median of (3)")
    parser.add_argument("--max-tokens", type=int, default=96, help="tokens per answer (96)")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="a file with one prompt a line")
    parser.add_argument("--start-timeout", type=float, default=300, help="seconds until the server is healthy (300)")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    parser.add_argument("rest", nargs="*", help="after --: further arguments of `medusa-serve serve`")
    return parser.parse_args(arguments)


def integers(text: str) -> tuple[int, ...]:
    """'1,2,4' as (1, 2, 4), each at least 1."""
    values = tuple(int(part) for part in text.split(","))
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} holds a number below 1")
    return values


def plan(options: argparse.Namespace) -> Plan:
    prompts = tuple(options.prompts.read_text(encoding="utf-8").split("\n"))
    return Plan(tuple(filter(None, prompts)), options.concurrency, options.rounds, options.max_tokens)


def server(options: argparse.Namespace) -> AbstractContextManager[int]:
    """The port of the running server that was named, or of one started for us."""
    if options.port:
        return nullcontext(options.port)
    arguments = [options.model] if options.model else []
    heads = ["--heads", options.heads] if options.heads else []
    return our_server([*arguments, *heads, *options.rest], start_seconds=options.start_timeout)


def sides(port: int, nodes: Sequence[int]) -> list[Side]:
    """Plain decoding first; then Medusa as the server is set, or once per tree size."""
    model = served_model(port)
    trees = {f"medusa, {n} nodes": {"mode": "lossless", "max_nodes": n} for n in nodes}
    speculations = {PLAIN: {"mode": "off"}, **(trees or {"medusa": {"mode": "lossless"}})}
    return [Side(name, port, model, {"speculation": options}) for name, options in speculations.items()]


async def collect(sides: Sequence[Side], plan: Plan) -> list[Round]:
    """Measure, and say on stderr how it goes."""
    console = Console(stderr=True)
    rounds = []
    async for item in measure(sides, plan):
        rounds.append(item)
        console.print(
            f"{item.concurrency} streams, round {item.index + 1}, {item.side}: {item.tokens_per_second:.1f} tokens/s"
        )
    return rounds


def publish(rounds: Sequence[Round], path: Path | None) -> None:
    """The table on stdout and, if asked for, everything in a file."""
    machine, summaries = this_machine(), report.summarize(rounds, PLAIN)
    console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
    console.print(str(machine), report.table(summaries), sep="\n")
    if all(item.mean_acceptance_length is None for item in summaries):
        console.print("No guess was verified: the server has no heads, so both sides decoded plainly.")
    if path:
        content = {"machine": machine, "summaries": summaries, "rounds": rounds}
        path.write_text(json.dumps(content, default=asdict, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
