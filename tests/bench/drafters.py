"""`python -m tests.bench.drafters`: plain decoding, heads, n-grams and both, on ordinary questions and on text to copy.

Every side is a server of its own, and all but the one whose turn it is are stopped by a signal. Ratios are against
plain decoding. The prefix cache of each has seen every prompt before anything is timed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx

from models.train.machine import this_machine
from tests.bench import report
from tests.bench.client import BenchError, Prompt
from tests.bench.command import add_options, collect, end_orderly, output, write
from tests.bench.launch import Program, ours
from tests.bench.measure import Round
from tests.bench.peers import Field, start
from tests.bench.workload import Plan, read_prompts

COPYING = Path(__file__).with_name("copying.jsonl")
PLAIN = "plain"
FLAGS = {
    PLAIN: ["--num-nodes", "0"],
    "heads": ["--no-ngram"],
    "n-gram": ["--heads", "none"],
    "heads, n-gram": [],
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits with 1 and a sentence if a measurement fails."""
    options = parse(arguments)
    end_orderly()
    try:
        with ExitStack() as stack:
            field = start(programs(options), options.start_timeout, stack)
            found = {name: measured(field, plan) for name, plan in plans(options).items()}
    except (BenchError, httpx.HTTPError, OSError) as error:
        sys.exit(f"bench: {str(error) or type(error).__name__}")
    publish(found, options.json)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.drafters", description=__doc__)
    parser.add_argument("--model", help="folder, hub id or GGUF file; the default model if left out")
    parser.add_argument("--only", choices=("chat", "copying"), help="one of the two workloads")
    add_options(parser, (1, 4))
    return parser.parse_args(arguments)


def programs(options: argparse.Namespace) -> list[Program]:
    model = [options.model] if options.model else []
    heads = ["--heads", options.heads] if options.heads else []
    return [ours(name, [*model, *heads, *flags, *options.rest]) for name, flags in FLAGS.items()]


def plans(options: argparse.Namespace) -> dict[str, Plan]:
    """What is asked, by workload."""
    prompts = {"chat": read_prompts(options.prompts), "copying": read_texts(COPYING)}
    chosen = [options.only] if options.only else list(prompts)
    return {name: Plan(prompts[name], options.concurrency, options.rounds, options.max_tokens) for name in chosen}


def read_texts(path: Path) -> tuple[Prompt, ...]:
    """One prompt a line, as a JSON string: these have lines of their own."""
    return tuple(Prompt(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines())


def measured(field: Field, plan: Plan) -> list[Round]:
    return asyncio.run(collect(field.measure(plan)))


def publish(found: dict[str, list[Round]], path: Path | None) -> None:
    """A table for each workload on stdout and, if asked for, everything in a file."""
    machine = this_machine()
    twins = {name: PLAIN for name in FLAGS if name != PLAIN}
    summaries = {name: report.summarize(rounds, [PLAIN], twins) for name, rounds in found.items()}
    output().print(str(machine))
    for name, summary in summaries.items():
        output().print(f"\n{name}", report.table(summary), sep="\n")
    write(path, {"machine": machine, "summaries": summaries, "rounds": found})


if __name__ == "__main__":
    main()
