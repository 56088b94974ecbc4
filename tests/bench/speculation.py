"""`make bench`: plain decoding against Medusa on one server, over HTTP, side by side.

One server answers both sides (`speculation.mode` is a field of the request), so nothing differs but speculation. Its
prefix cache has seen every prompt before anything is timed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import httpx

from models.train.machine import this_machine
from tests.bench import report
from tests.bench.client import BenchError, Side, served_model
from tests.bench.command import (
    add_options,
    add_sampling,
    collect,
    end_orderly,
    output,
    sampling,
    sampling_in_words,
    write,
)
from tests.bench.launch import ours, serving
from tests.bench.measure import Round, measure
from tests.bench.workload import Plan, read_prompts

PLAIN = "plain"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits with 1 and a sentence if a measurement fails."""
    options = parse(arguments)
    end_orderly()
    try:
        with server(options) as port:
            rounds = asyncio.run(collect(measure(sides(port, options), plan(options))))
    except (BenchError, httpx.HTTPError, OSError) as error:
        sys.exit(f"bench: {str(error) or type(error).__name__}")
    publish(rounds, options)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.speculation", description=__doc__)
    parser.add_argument("--model", help="folder, hub id or GGUF file; the default model if left out")
    parser.add_argument("--port", type=int, help="measure the server that already listens on this port of 127.0.0.1")
    add_options(parser, (1, 4, 16))
    add_sampling(parser)
    return parser.parse_args(arguments)


def plan(options: argparse.Namespace) -> Plan:
    return Plan(read_prompts(options.prompts), options.concurrency, options.rounds, options.max_tokens)


@contextmanager
def server(options: argparse.Namespace) -> Iterator[int]:
    """The port of the running server that was named, or of one started for us."""
    if options.port:
        yield options.port
        return
    arguments = [options.model] if options.model else []
    heads = ["--heads", options.heads] if options.heads else []
    program = ours("medusa-serve", [*arguments, *heads, *options.rest])
    with serving(program, start_seconds=options.start_timeout) as started:
        yield started.port


def sides(port: int, options: argparse.Namespace) -> list[Side]:
    """Plain decoding first; then Medusa as the server is set, or once per tree size."""
    model = served_model(port)
    trees = {f"medusa, {n} nodes": {"mode": "lossless", "max_nodes": n} for n in options.nodes}
    speculations = {PLAIN: {"mode": "off"}, **(trees or {"medusa": {"mode": "lossless"}})}
    fields = sampling(options)
    return [Side(name, port, model, {**fields, "speculation": mode}) for name, mode in speculations.items()]


def publish(rounds: Sequence[Round], options: argparse.Namespace) -> None:
    """The table on stdout and, if asked for, everything in a file."""
    twins = {item.side: PLAIN for item in rounds if item.side != PLAIN}
    machine, summaries = this_machine(), report.summarize(rounds, [PLAIN], twins)
    output().print(str(machine), sampling_in_words(options), report.table(summaries), sep="\n")
    if all(item.mean_acceptance_length is None for item in summaries):
        output().print("No guess was verified: the server has no heads, so both sides decoded plainly.")
    write(options.json, {"machine": machine, "sampling": sampling(options), "summaries": summaries, "rounds": rounds})


if __name__ == "__main__":
    main()
