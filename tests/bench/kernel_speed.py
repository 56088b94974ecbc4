"""`python -m tests.bench.kernel_speed`: the CPU kernels alone, at the sizes of the default model.

Side by side in every round, each round in the reverse order of the one before: plain reads of the memory; all linear
layers (--bits 8 or 4) and the LM head, a call each; the whole model in its one call, on an empty context; torch's
float32 layers of the same shapes; the attention of all layers, a call each, and torch's. Medians over rounds, ratios
taken within one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich.box import MARKDOWN
from rich.table import Table

from models.kernels.build import KernelError
from models.train.machine import Machine, this_machine
from tests.bench.command import integers, output, write
from tests.bench.kernel_runs import Run, Sizes, attention_runs, linear_runs, memory_reads
from tests.bench.turns import by_turns

ROWS = (1, 2, 4, 5, 8, 9, 16, 32, 64, 512)
CONTEXTS = (200, 1000)
TREES = (1, 8)  # rows of a request that attend

Seconds = Mapping[str, Sequence[float]]  # by name, one a round


@dataclass(frozen=True, slots=True)
class Effort:
    """How much to measure."""

    rounds: int
    seconds: float = 0.05  # that a run is repeated for
    read_bytes: int = 512 << 20  # of a plain read
    cached_bytes: int = 128 << 20  # that no cache of a machine holds


@dataclass(frozen=True, slots=True)
class LinearSpeed:
    """All linear layers of one step of `rows` rows; medians over rounds, ratios taken within a round."""

    rows: int
    seconds: float
    to_one_row: float
    tokens_per_second: float
    weight_bytes_per_second: float
    share_of_memory: float  # of a plain read
    torch_seconds: float
    torch_ratio: float  # torch's time over ours
    model_seconds: float  # the whole model in one call
    model_to_one_row: float


@dataclass(frozen=True, slots=True)
class AttentionSpeed:
    """The attention of all layers for `rows` rows of one request: its last token, and a tree under it."""

    context: int
    rows: int
    seconds: float
    seconds_per_row_and_layer: float
    torch_ratio: float


@dataclass(frozen=True, slots=True)
class Report:
    machine: Machine
    threads: int
    memory_bytes_per_second: float  # of the fastest way
    memory_way: str
    weight_bytes: int
    linear: list[LinearSpeed]
    attention: list[AttentionSpeed]
    seconds: Seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits with 1 and a sentence if there are no kernels."""
    options = parse(arguments)
    try:
        found = measure(Sizes(bits=options.bits), options.rows, options.contexts, Effort(options.rounds))
    except KernelError as error:
        sys.exit(f"bench: {error}")
    publish(found, options.json)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.kernel_speed", description=__doc__)
    parser.add_argument("--rows", type=integers, default=ROWS, help="rows of a step, such as 1,4,8")
    parser.add_argument("--bits", type=int, choices=(8, 4), default=8, help="of the weights (8)")
    parser.add_argument("--contexts", type=integers, default=CONTEXTS, help="tokens that attention looks back on")
    parser.add_argument("--rounds", type=int, default=7, help="rounds to take the median of (7)")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    return parser.parse_args(arguments)


def measure(sizes: Sizes, rows: Sequence[int], contexts: Sequence[int], effort: Effort) -> Report:
    """One row is always measured: it is what others are compared with."""
    rows = sorted({1, *rows})
    pairs = [(context, count) for context in contexts for count in TREES]
    with torch.inference_mode():
        reads = memory_reads(effort.read_bytes)
        runs = {**reads, **linear_runs(sizes, rows)}
        for context, count in pairs:
            runs |= attention_runs(sizes, context, count, requests(sizes, context, effort))
        seconds = alternate(runs, effort)
    fastest = min(reads, key=lambda way: median(seconds[way]))
    return Report(
        machine=this_machine(),
        threads=torch.get_num_threads(),
        memory_way=fastest.partition(": ")[2],
        memory_bytes_per_second=effort.read_bytes / median(seconds[fastest]),
        weight_bytes=sizes.weight_bytes,
        linear=[linear_speed(seconds, sizes, count, effort.read_bytes, fastest) for count in rows],
        attention=[attention_speed(seconds, sizes, *pair, requests(sizes, pair[0], effort)) for pair in pairs],
        seconds=seconds,
    )


def requests(sizes: Sizes, context: int, effort: Effort) -> int:
    """How many requests one after another have more K and V, in binary16, than caches hold."""
    return -(-effort.cached_bytes // (context * sizes.layers * sizes.kv_heads * sizes.dim * 4))


def alternate(runs: Mapping[str, Run], effort: Effort) -> dict[str, list[float]]:
    """Seconds of each, one a round."""
    for run in runs.values():
        run()
    return by_turns({name: partial(sample, run, effort.seconds) for name, run in runs.items()}, effort.rounds)


def sample(run: Run, span: float) -> float:
    """Mean time of as many passes as fill `span` seconds, at least one."""
    started, passes, spent = time.perf_counter(), 0, 0.0
    while spent < span or not passes:
        run()
        passes, spent = passes + 1, time.perf_counter() - started
    return spent / passes


def ratio(seconds: Seconds, name: str, other: str) -> float:
    """The median over rounds of one time over another of the same round."""
    return median(ours / theirs for ours, theirs in zip(seconds[name], seconds[other], strict=True))


def linear_speed(seconds: Seconds, sizes: Sizes, rows: int, read_bytes: int, read: str) -> LinearSpeed:
    ours, model, torchs = f"ours: {rows}", f"model: {rows}", f"torch: {rows}"
    spent = median(seconds[ours])
    return LinearSpeed(
        rows=rows,
        seconds=spent,
        to_one_row=ratio(seconds, ours, "ours: 1"),
        tokens_per_second=rows / spent,
        weight_bytes_per_second=sizes.weight_bytes / spent,
        share_of_memory=ratio(seconds, read, ours) * sizes.weight_bytes / read_bytes,
        torch_seconds=median(seconds[torchs]),
        torch_ratio=ratio(seconds, torchs, ours),
        model_seconds=median(seconds[model]),
        model_to_one_row=ratio(seconds, model, "model: 1"),
    )


def attention_speed(seconds: Seconds, sizes: Sizes, context: int, rows: int, requests: int) -> AttentionSpeed:
    name = f"attention: {context}, {rows}"
    spent = median(seconds[name]) / requests
    torch_ratio = ratio(seconds, f"torch {name}", name)
    return AttentionSpeed(context, rows, spent, spent / rows / sizes.layers, torch_ratio)


def publish(found: Report, path: Path | None) -> None:
    """Tables on stdout and, if asked for, everything in a file."""
    one = found.linear[0]
    output().print(
        f"{found.machine}; {found.threads} threads",
        f"memory read: {found.memory_bytes_per_second / 1e9:.1f} GB/s ({found.memory_way})",
        f"weights at 1 row: {found.weight_bytes / 1e6:.0f} MB, {one.weight_bytes_per_second / 1e9:.1f} GB/s, "
        f"{one.share_of_memory:.0%} of the memory read",
        linear_table(found.linear),
        attention_table(found.attention),
        sep="\n",
    )
    write(path, {"report": found})


def linear_table(rows: Sequence[LinearSpeed]) -> Table:
    names = ("rows", "ours, ms", "/ 1 row", "tokens/s", "torch fp32, ms", "torch / ours", "whole model, ms", "/ 1 row")
    table = Table(*names, box=MARKDOWN)
    for row in rows:
        cells = (f"{1000 * row.seconds:.2f}", f"{row.to_one_row:.2f}", f"{row.tokens_per_second:.0f}")
        torchs = (f"{1000 * row.torch_seconds:.1f}", f"{row.torch_ratio:.1f}")
        table.add_row(str(row.rows), *cells, *torchs, f"{1000 * row.model_seconds:.2f}", f"{row.model_to_one_row:.2f}")
    return table


def attention_table(rows: Sequence[AttentionSpeed]) -> Table:
    names = ("context", "rows", "attention of all layers, ms", "us per row and layer", "torch / ours")
    table = Table(*names, box=MARKDOWN)
    for row in rows:
        each = f"{1e6 * row.seconds_per_row_and_layer:.1f}"
        table.add_row(str(row.context), str(row.rows), f"{1000 * row.seconds:.2f}", each, f"{row.torch_ratio:.1f}")
    return table


if __name__ == "__main__":
    main()
