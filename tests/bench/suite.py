"""Several workloads, one after the other, on the same servers: what `drafters` and `trees` have in common.

Every side writes the texts of the one named PLAIN.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx

from models.train.machine import this_machine
from tests.bench import report
from tests.bench.client import BenchError
from tests.bench.command import collect, output, write
from tests.bench.launch import Program, ours
from tests.bench.measure import Round
from tests.bench.peers import Field, start
from tests.bench.speculation import PLAIN
from tests.bench.workload import Plan

Found = dict[str, list[Round]]  # by workload


def programs(flags: Mapping[str, Sequence[str]], options: argparse.Namespace) -> list[Program]:
    """A server for each name, which differ by these flags only."""
    model = [options.model] if options.model else []
    heads = ["--heads", options.heads] if options.heads else []
    return [ours(name, [*model, *heads, *own, *options.rest]) for name, own in flags.items()]


def run(
    started: Sequence[Program],
    plans: Callable[[argparse.Namespace], Mapping[str, Plan]],
    options: argparse.Namespace,
    sides: Callable[[Field], Field] = lambda field: field,
) -> Found:
    """All rounds; `sides` says what is asked of the servers. Exits with 1 and a sentence if a measurement fails."""
    try:
        with ExitStack() as stack:
            field = sides(start(started, options.start_timeout, stack))
            return {name: asyncio.run(collect(field.measure(plan))) for name, plan in plans(options).items()}
    except (BenchError, httpx.HTTPError, OSError) as error:
        sys.exit(f"bench: {str(error) or type(error).__name__}")


def publish(found: Found, baselines: Sequence[str], path: Path | None) -> None:
    """A table for each workload on stdout and, if asked for, everything in a file."""
    machine = this_machine()
    twins = {item.side: PLAIN for rounds in found.values() for item in rounds if item.side != PLAIN}
    summaries = {name: report.summarize(rounds, baselines, twins) for name, rounds in found.items()}
    output().print(str(machine))
    for name, summary in summaries.items():
        output().print(f"\n{name}", report.table(summary), sep="\n")
    write(path, {"machine": machine, "summaries": summaries, "rounds": found})
