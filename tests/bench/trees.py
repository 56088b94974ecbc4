"""`python -m tests.bench.trees`: trees that fit the moment against trees of a fixed size, by category of prompt.

Fixed sizes are a second server's (`--static-trees`), asked for by each request; the server whose turn it is not is
stopped by a signal. Ratios are against the fastest fixed size of the category and number of streams, and against plain
decoding. Fixed are the numbers of nodes alone: which nodes are the likeliest is decided at each step on both servers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from models.tree import MAX_NODES
from tests.bench import suite
from tests.bench.client import Prompt, Side
from tests.bench.command import add_options, end_orderly
from tests.bench.launch import Program
from tests.bench.peers import Field
from tests.bench.speculation import PLAIN
from tests.bench.workload import Plan, read_prompts

CATEGORIES = Path(__file__).with_name("categories.jsonl")
SIZES = (1, 2, 3, 4, 6, 8, 16, 32)
DYNAMIC, STATIC = "dynamic", "static"
FLAGS = {DYNAMIC: [], STATIC: ["--static-trees", "--num-nodes", str(MAX_NODES)]}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits with 1 and a sentence if a measurement fails."""
    options = parse(arguments)
    end_orderly()
    arranged = partial(sides, sizes=options.nodes or SIZES)
    found = suite.run(programs(options), plans, options, arranged)
    suite.publish(found, [STATIC, PLAIN], options.json)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.trees", description=__doc__)
    parser.add_argument("--model", help="folder, hub id or GGUF file; the default model if left out")
    add_options(parser, (1,))
    parser.set_defaults(prompts=CATEGORIES)
    return parser.parse_args(arguments)


def programs(options: argparse.Namespace) -> list[Program]:
    return suite.programs(FLAGS, options)


def sides(servers: Field, sizes: Sequence[int]) -> Field:
    """The same servers, the second of them once per size."""
    dynamic, static = servers.sides
    asked = [Side(PLAIN, dynamic.port, dynamic.model, {"speculation": {"mode": "off"}})]
    asked.append(Side(DYNAMIC, dynamic.port, dynamic.model))
    asked += [Side(f"{STATIC} {n}", static.port, static.model, {"speculation": {"max_nodes": n}}) for n in sizes]
    by_port = {side.port: servers.servers[side.name] for side in servers.sides}
    return Field({side.name: by_port[side.port] for side in asked}, asked)


def plans(options: argparse.Namespace) -> dict[str, Plan]:
    """What is asked, by category: as the file says, or all of it."""
    prompts = read_categories(CATEGORIES) if options.prompts == CATEGORIES else {"": read_prompts(options.prompts)}
    return {
        name: Plan(asked, options.concurrency, options.rounds, options.max_tokens) for name, asked in prompts.items()
    }


def read_categories(path: Path) -> dict[str, tuple[Prompt, ...]]:
    """Prompts of a file of lines with `category` and `q`, in its order."""
    found: dict[str, list[Prompt]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["category"], []).append(Prompt(row["q"]))
    return {name: tuple(prompts) for name, prompts in found.items()}


if __name__ == "__main__":
    main()
