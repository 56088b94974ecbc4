"""`python -m tests.bench.policies`: what trees of which size would bring, simulated over recorded drafts.

    python -m tests.bench.policies --record traces.jsonl      record the default model, then simulate
    python -m tests.bench.policies traces.jsonl [--curve curve.json | --floor ROWS] [--plot speeds.svg]

Each policy decodes the same texts at each batch size: no trees, fixed trees, the engine's controller, and an oracle
that knows what is right. Times come from cost curves: those of the machine that recorded, of a file (a GPU's: what
`GET /debug/controller` says will do), or a made-up one that is flat up to so many rows. Nothing is timed here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import MARKDOWN
from rich.table import Table

from models.source import DEFAULT_MODEL, ModelSourceError, resolve, resolve_heads
from models.train.plot import svg
from server.engine.cost import CostModel
from server.errors import StartupError
from tests.bench.client import BenchError
from tests.bench.command import PROMPTS, integers, output, write
from tests.bench.costs import cost_model, floor_costs, read_costs
from tests.bench.recording import record
from tests.bench.replay import Dynamic, Oracle, Plain, Policy, Speed, Static, replay
from tests.bench.traces import Trace, Traces, read_traces, write_traces
from tests.bench.workload import read_prompts

BATCHES = tuple(2**power for power in range(10))
STATIC = (1, 2, 4, 8, 16, 32)
RECORDING: Mapping[str, Any] = {  # with --record only
    "model": DEFAULT_MODEL,
    "heads": None,
    "nodes": 32,
    "max_tokens": 96,
    "prompts": PROMPTS,
}


@dataclass(frozen=True, slots=True)
class Effort:
    """How much to simulate, and within which limits."""

    batches: Sequence[int]
    static: Sequence[int]
    num_tokens: int
    max_rows: int
    control_share: float


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits with 1 and a sentence if something cannot be had."""
    options = parse(arguments)
    try:
        traces = obtain(options)
        costs = chosen_costs(options, traces)
        effort = Effort(options.batch, options.static, options.tokens, options.max_rows, options.control_share)
        speeds = simulate(traces, cost_model(costs), effort)
    except (BenchError, ModelSourceError, StartupError, OSError) as error:
        sys.exit(f"bench: {str(error) or type(error).__name__}")
    publish(speeds, {"about": traces.about, "costs": costs}, options)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tests.bench.policies", description=__doc__, formatter_class=form)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("traces", nargs="?", type=Path, help="a recording")
    source.add_argument("--record", type=Path, metavar="FILE", help="record a model's drafts into this file first")
    recording = parser.add_argument_group("with --record")
    recording.add_argument("--model", help=f"folder, hub id or GGUF file ({DEFAULT_MODEL})")
    recording.add_argument("--heads", help="heads for the model; the default model's own if left out")
    recording.add_argument("--nodes", type=int, help="largest trees to record (32); 63 are the most")
    recording.add_argument("--max-tokens", type=int, help="tokens per answer (96)")
    recording.add_argument("--prompts", type=Path, help="a file with one prompt a line")
    curve = parser.add_mutually_exclusive_group()
    curve.add_argument("--curve", type=Path, metavar="FILE", help="cost curves, as tests/bench/costs.py describes them")
    curve.add_argument("--floor", type=int, metavar="ROWS", help="a curve that is flat up to so many rows, then linear")
    parser.add_argument("--batch", type=integers, default=BATCHES, help="requests at a time (1,2,4,...,512)")
    parser.add_argument("--static", type=integers, default=STATIC, help="nodes of the fixed trees (1,2,4,8,16,32)")
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens that each policy decodes (20000)")
    parser.add_argument("--max-rows", type=int, default=4096, help="rows of a step at most (4096)")
    parser.add_argument("--control-share", type=float, default=0.01, help="of the dynamic policy's steps (0.01)")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--plot", type=Path, help="draw the table to this SVG file")
    return checked(parser, parser.parse_args(arguments))


def checked(parser: argparse.ArgumentParser, options: argparse.Namespace) -> argparse.Namespace:
    """Numbers in range, and defaults where something is recorded; else nothing may ask for it."""
    for name, default in RECORDING.items():
        if options.record is None and getattr(options, name) is not None:
            parser.error(f"--{name.replace('_', '-')} is for --record")
        if getattr(options, name) is None:
            setattr(options, name, default)
    if options.floor is not None and options.floor < 1:
        parser.error("--floor needs at least 1 row")
    if not 1 <= options.nodes <= 63:
        parser.error("--nodes are 1 to 63")
    if not 0 <= options.control_share < 1:
        parser.error("--control-share is at least 0 and below 1")
    return options


def obtain(options: argparse.Namespace) -> Traces:
    """Read a recording, or make one."""
    if options.record is None:
        return read_traces(options.traces)
    heads = resolve_heads(options.heads, options.model)
    prompts = read_prompts(options.prompts)
    write_traces(options.record, record(resolve(options.model), heads, prompts, options.nodes, options.max_tokens))
    return read_traces(options.record)


def chosen_costs(options: argparse.Namespace, traces: Traces) -> Mapping[str, Any]:
    if options.curve is not None:
        return read_costs(options.curve)
    if options.floor is not None:
        return floor_costs(options.floor)
    costs: Mapping[str, Any] | None = traces.about.get("costs")
    if costs is None:
        raise BenchError("the recording says nothing of costs: name a --curve, or --floor")
    return costs


def simulate(traces: Traces, cost: CostModel, effort: Effort) -> list[Speed]:
    """By batch size, then policy."""
    num_nodes = max(len(step.values) for text in traces.texts for step in text)
    return [
        replay(policy, cost, traces.texts, batch, effort.num_tokens)
        for batch in effort.batches
        for policy in policies(traces.texts, cost, num_nodes, effort)
    ]


def policies(texts: Sequence[Trace], cost: CostModel, num_nodes: int, effort: Effort) -> list[Policy]:
    """New ones, that have learnt nothing."""
    return [
        Plain(),
        *(Static(texts, size, effort.max_rows) for size in effort.static),
        Dynamic(cost, num_nodes, effort.max_rows, effort.control_share),
        Oracle(cost, effort.max_rows),
    ]


def relative(speeds: Sequence[Speed]) -> dict[str, dict[int, float]]:
    """By policy and batch size: tokens per second over those of plain decoding."""
    plain = {speed.batch: speed.tokens_per_second for speed in speeds if speed.policy == Plain.name}
    found: dict[str, dict[int, float]] = {}
    for speed in speeds:
        found.setdefault(speed.policy, {})[speed.batch] = speed.tokens_per_second / plain[speed.batch]
    return found


def publish(speeds: Sequence[Speed], facts: Mapping[str, object], options: argparse.Namespace) -> None:
    """The table on stdout and, if asked for, everything in a file and a picture."""
    ratios = relative(speeds)
    output().print("tokens/s relative to plain decoding, simulated", table(ratios, speeds), sep="\n")
    write(options.json, {**facts, "relative": ratios, "speeds": speeds})
    if options.plot is not None:
        lines = {name: sorted(by_batch.items()) for name, by_batch in ratios.items()}
        picture = svg("tokens/s relative to plain decoding, simulated", "requests at a time", lines)
        options.plot.write_text(picture, encoding="utf-8")


def table(ratios: Mapping[str, Mapping[int, float]], speeds: Sequence[Speed]) -> Table:
    """For people; in Markdown, to be pasted. Beside the ratios: the controller's nodes per request and step."""
    result = Table(box=MARKDOWN)
    for name in ("batch", *ratios, "nodes of dynamic"):
        result.add_column(name, justify="right", no_wrap=True)
    nodes = {speed.batch: speed.nodes_per_request for speed in speeds if speed.policy == Dynamic.name}
    for batch in nodes:
        result.add_row(str(batch), *(f"{by[batch]:.2f}" for by in ratios.values()), f"{nodes[batch]:.1f}")
    return result


if __name__ == "__main__":
    main()
