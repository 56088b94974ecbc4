"""`python -m tests.bench.load`: one server, plain and with Medusa by turns, at 1 to 128 streams.

Which of the two is a field of the request, so nothing differs but speculation, and no server is started in between.
Tokens are counted while all streams are busy (`Round.steady_tokens_per_second`). Speedups are medians of paired rounds.
Beside them stands what the server says itself: by its counters over the very rounds, and by its gauge after the last of
them (which remembers the plain rounds too); and which share of its engine's time went by outside of kernels, plain and
with Medusa.

    --random-heads   heads that know nothing: what must never be much slower than plain decoding
    --mixed          prompts and answers of very different lengths, and no prefix cache
    --jump           besides: 2 clients, then 64, then 2 again, and when the server has settled
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import httpx
from rich.box import MARKDOWN
from rich.table import Table

from models.source import DEFAULT_MODEL, ModelSourceError, resolve
from models.train.machine import this_machine
from server.engine.controller import bucket, bucket_name
from tests.bench import jump, report
from tests.bench.client import BenchError, Side
from tests.bench.command import (
    add_options,
    add_sampling,
    collect,
    end_orderly,
    output,
    progress,
    sampling,
    sampling_in_words,
    write,
)
from tests.bench.launch import Program, ours, serving
from tests.bench.measure import Round, measure
from tests.bench.random_heads import write_random_heads
from tests.bench.report import Ratio, Summary
from tests.bench.speculation import PLAIN, sides
from tests.bench.told import Said, listen, overhead, speedup
from tests.bench.workload import LEAST_ANSWER, LoadPlan, MixedPlan, read_prompts

LEVELS = (1, 2, 4, 8, 16, 32, 64, 128)
LEAST_SEQS = 64  # the server's default


@dataclass(frozen=True, slots=True)
class Told:
    """What the server says of one round."""

    side: str
    concurrency: int
    index: int
    counted: float | None  # speedup by its counters
    gauge: Ratio | None  # at the end, of batches of this size
    overhead: float | None  # share of the engine's time that went by outside of kernels


@dataclass(frozen=True, slots=True)
class Found:
    """Everything that was measured."""

    rounds: list[Round]
    told: list[Told]
    phases: list[jump.Phase]


class Watch:
    """Listens to the server before and after each turn of a side."""

    def __init__(self) -> None:
        self.turns: list[tuple[Said, Said]] = []

    @contextmanager
    def awake(self, side: Side) -> Iterator[None]:
        before = listen(side.port)
        yield
        self.turns.append((before, listen(side.port)))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits with 1 and a sentence if a measurement fails."""
    options = parse(arguments)
    end_orderly()
    try:
        with chosen_heads(options) as heads:
            started = program(options, heads)
            with serving(started, start_seconds=options.start_timeout) as server:
                found = asyncio.run(measured(field(server.port, options), options))
    except (BenchError, ModelSourceError, httpx.HTTPError, OSError) as error:
        sys.exit(f"bench: {str(error) or type(error).__name__}")
    publish(started, found, options)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tests.bench.load", description=__doc__, formatter_class=form)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder, hub id or GGUF file; else the default model")
    parser.add_argument("--random-heads", action="store_true", help="instead of --heads: such as guess at random")
    parser.add_argument("--mixed", action="store_true", help="up to 600 words and --max-tokens, drawn by a fixed seed")
    parser.add_argument("--jump", action="store_true", help="at the end let a crowd come and go")
    parser.add_argument("--requests", type=int, default=2, help="of each stream and round (2); 4 a round at least")
    add_options(parser, LEVELS)
    add_sampling(parser)
    options = parser.parse_args(arguments)
    if options.random_heads and options.heads:
        parser.error("--random-heads stands for --heads: name one of them")
    return options


@contextmanager
def chosen_heads(options: argparse.Namespace) -> Iterator[str | None]:
    """What the server is told; random heads are there as long as it is."""
    if not options.random_heads:
        yield options.heads
        return
    with tempfile.TemporaryDirectory(prefix="random-heads-") as folder:
        write_random_heads(Path(folder), resolve(options.model))
        yield folder


def program(options: argparse.Namespace, heads: str | None) -> Program:
    """A server with room for all streams."""
    num_seqs = max(*options.concurrency, LEAST_SEQS, jump.MANY if options.jump else 1)
    arguments = [options.model, "--max-num-seqs", str(num_seqs)]
    arguments += ["--heads", heads] if heads else []
    arguments += ["--no-prefix-cache"] if options.mixed else []
    return ours("medusa-serve", [*arguments, *options.rest])


def field(port: int, options: argparse.Namespace) -> list[Side]:
    """Plain decoding first. Where answers may be short, they are never empty."""
    least = {"min_tokens": min(LEAST_ANSWER, options.max_tokens)} if options.mixed else {}
    return [replace(side, extra={**side.extra, **least}) for side in sides(port, options)]


async def measured(field: Sequence[Side], options: argparse.Namespace) -> Found:
    kind = MixedPlan if options.mixed else LoadPlan
    prompts = read_prompts(options.prompts)
    plan = kind(prompts, options.concurrency, options.rounds, options.max_tokens, num_requests=options.requests)
    watch = Watch()
    rounds = await collect(measure(field, plan, watch.awake))
    turns = watch.turns[len(field) :]  # before them every side has warmed up
    told = [_told(item, *turn) for item, turn in zip(rounds, turns, strict=True)]
    phases = []
    if options.jump:
        for side in field:
            progress.print(f"{side.name}: {jump.FEW}, {jump.MANY}, {jump.FEW} clients", style="dim")
            phases += await jump.jump(side, plan.prompts_of(jump.MANY, 0), plan.max_tokens)
    return Found(rounds, told, phases)


def _told(item: Round, before: Said, after: Said) -> Told:
    batch = bucket_name(bucket(item.concurrency))
    said = speedup(before, after), after.ratios.get(batch), overhead(before, after)
    return Told(item.side, item.concurrency, item.index, *said)


def publish(program: Program, found: Found, options: argparse.Namespace) -> None:
    """The tables on stdout and, if asked for, everything in a file."""
    machine = this_machine()
    twins = {item.side: PLAIN for item in found.rounds if item.side != PLAIN}
    summaries = report.summarize(found.rounds, [PLAIN], twins, report.STEADY)
    output().print(str(machine), sampling_in_words(options), table(summaries, found.told), sep="\n")
    if all(item.mean_acceptance_length is None for item in summaries):
        output().print("No guess was verified: the server has no heads, or none of their guesses paid.")
    if found.phases:
        output().print(jump_table(found.phases))
    content = {"summaries": summaries, "told": found.told, "phases": found.phases, "rounds": found.rounds}
    write(options.json, {"machine": machine, "program": program, "sampling": sampling(options), **content})


def table(summaries: Sequence[Summary], told: Sequence[Told]) -> Table:
    """For people; in Markdown, to be pasted. A row for each number of streams and side but the plain one."""
    names = ("streams", "plain, tokens/s", "side", "tokens/s", "speedup (low..high)", "server says (low..high)")
    result = Table(box=MARKDOWN)
    for name in (*names, "its gauge (95 %)", "outside kernels", "accepted + 1", "same text"):
        result.add_column(name, justify="left" if name == "side" else "right", no_wrap=True)
    plain = {item.concurrency: item.speed for item in summaries if item.side == PLAIN}
    for item in summaries:
        if item.side == PLAIN:
            continue
        here = [each for each in told if each.concurrency == item.concurrency]
        mine = [each for each in here if each.side == item.side]
        outside = " / ".join(_share([each for each in here if each.side == side]) for side in (PLAIN, item.side))
        speeds = (f"{plain[item.concurrency]:.1f}", item.side, f"{item.speed:.1f}")
        ratios = (_range(item.ratios[PLAIN]), _range(counted(mine)), _range(mine[-1].gauge))
        texts = f"{item.num_same_text}/{item.num_answers}"
        result.add_row(str(item.concurrency), *speeds, *ratios, outside, _number(item.mean_acceptance_length), texts)
    return result


def counted(told: Sequence[Told]) -> Ratio | None:
    """Over rounds, as `report` does with what was measured. None if the server did not say it of every round."""
    said = [each.counted for each in told if each.counted is not None]
    return (min(said), median(said), max(said)) if said and len(said) == len(told) else None


def jump_table(phases: Sequence[jump.Phase]) -> Table:
    result = Table("side", "clients", "tokens/s, steady", "settled after, s", box=MARKDOWN)
    for item in phases:
        settled = "-" if item.settled_seconds is None else f"{item.settled_seconds:.1f}"
        result.add_row(item.side, str(item.num_clients), f"{item.steady_speed:.1f}", settled)
    return result


def _range(ratio: Ratio | None) -> str:
    return "-" if ratio is None else "{1:.2f} ({0:.2f}..{2:.2f})".format(*ratio)


def _share(told: Sequence[Told]) -> str:
    said = [each.overhead for each in told if each.overhead is not None]
    return f"{median(said):.0%}" if said else "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
