"""`python -m tests.bench.drafters`: plain decoding, heads, n-grams and both, on ordinary questions and on text to copy.

Every side is a server of its own, and all but the one whose turn it is are stopped by a signal. Ratios are against
plain decoding. The prefix cache of each has seen every prompt before anything is timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from tests.bench import suite
from tests.bench.client import Prompt
from tests.bench.command import add_options, end_orderly
from tests.bench.launch import Program
from tests.bench.speculation import PLAIN
from tests.bench.workload import Plan, read_prompts

COPYING = Path(__file__).with_name("copying.jsonl")
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
    found = suite.run(programs(options), plans, options)
    suite.publish(found, [PLAIN], options.json)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.drafters", description=__doc__)
    parser.add_argument("--model", help="folder, hub id or GGUF file; the default model if left out")
    parser.add_argument("--only", choices=("chat", "copying"), help="one of the two workloads")
    add_options(parser, (1, 4))
    return parser.parse_args(arguments)


def programs(options: argparse.Namespace) -> list[Program]:
    return suite.programs(FLAGS, options)


def plans(options: argparse.Namespace) -> dict[str, Plan]:
    """What is asked, by workload."""
    prompts = {"chat": read_prompts(options.prompts), "copying": read_texts(COPYING)}
    chosen = [options.only] if options.only else list(prompts)
    return {name: Plan(prompts[name], options.concurrency, options.rounds, options.max_tokens) for name in chosen}


def read_texts(path: Path) -> tuple[Prompt, ...]:
    """One prompt a line, as a JSON string: these have lines of their own."""
    return tuple(Prompt(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines())


if __name__ == "__main__":
    main()
