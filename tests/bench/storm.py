"""A storm on a server: `python -m tests.bench.storm [--fake] [--requests 10000] [-- arguments of serve]`.

Many clients ask for many things of random length, some of them wrong; a third goes away at a random moment, and the
engine process is killed twice. Then the server must be as it was.

Invariants, and what is reported when they do not hold:
- every request is answered completely, or refused or ended by an error in OpenAI's shape; there is no third way;
- 2 s after the last of them the engine's gauges, slots included, are zero;
- the API process has the file descriptors that it had before, and about the memory that it had after a fifth.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx
import psutil

from tests.bench import command
from tests.bench.client import BenchError, served_model
from tests.bench.launch import Program, Server, ours, serving

ANSWER_SECONDS = 300.0  # more is no answer
SETTLE_SECONDS = 2.0
KEEP_ALIVE_SECONDS = 2.0  # less than the server's: nobody asks on a connection that is just being closed
MAX_GROWTH_BYTES = 32 * 2**20  # after the first fifth, whose growth is warming up
GAUGES = ("medusa_num_requests_running", "medusa_num_requests_waiting", "medusa_kv_cache_usage_perc")


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of it. `patience` is the longest that somebody who will leave stays, in seconds."""

    num_clients: int = 200
    num_requests: int = 1000
    leaving: float = 1 / 3
    wrong: float = 0.05
    patience: float = 1.0
    retry_seconds: float = 1.0  # at most, after a refusal
    max_tokens: int = 64
    seed: int = 0


@dataclass(slots=True)
class Tally:
    """How the requests ended; `broken` are those that must not be."""

    ends: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)

    @property
    def num_done(self) -> int:
        return self.ends.total() + len(self.broken)


class Broken(Exception):
    """An answer that is none."""


async def storm(url: str, model: str, plan: Plan, milestones: dict[int, Callable[[], None]]) -> Tally:
    """All requests of the plan. `milestones` are called when so many have ended."""
    tally, dice = Tally(), random.Random(plan.seed)
    todo = iter(range(plan.num_requests))
    limits = httpx.Limits(
        max_connections=None,
        max_keepalive_connections=plan.num_clients,
        keepalive_expiry=KEEP_ALIVE_SECONDS,
    )

    async def client_loop(client: httpx.AsyncClient) -> None:
        for _ in todo:
            end = await one(client, request(model, plan, dice), plan, dice, tally)
            if action := milestones.get(tally.num_done):
                action()
            if end.startswith(("503", "429")):
                await asyncio.sleep(dice.uniform(0.5, 1) * plan.retry_seconds)

    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=None, trust_env=False) as client:
        await asyncio.gather(*(client_loop(client) for _ in range(plan.num_clients)))
    return tally


def request(model: str, plan: Plan, dice: random.Random) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": "".join(dice.choices("abcdefgh ", k=int(dice.paretovariate(0.7)) % 500 + 1)),
        "max_tokens": dice.randint(1, plan.max_tokens),
        "temperature": 99 if dice.random() < plan.wrong else dice.choice((0, 1)),
        "n": dice.choice((1, 1, 1, 2, 3)),
        "stream": dice.random() < 0.5,
        "ignore_eos": dice.random() < 0.5,
    }


async def one(client: httpx.AsyncClient, body: dict[str, Any], plan: Plan, dice: random.Random, tally: Tally) -> str:
    """Ask, perhaps leave; note and return how it ended."""
    leaves = dice.random() < plan.leaving
    try:
        async with asyncio.timeout(dice.uniform(0, plan.patience) if leaves else ANSWER_SECONDS):
            end = await ask(client, body)
    except TimeoutError:
        if not leaves:
            tally.broken.append(f"no answer within {ANSWER_SECONDS:.0f} s")
        end = "left"
    except (Broken, httpx.TransportError, ValueError, KeyError) as error:
        tally.broken.append(f"{type(error).__name__}: {error}")
        return "broken"
    tally.ends[end] += 1
    return end


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    """How a request ended: `answered`, or the status and code of its error. Raises Broken."""
    async with client.stream("POST", "/v1/completions", json=body) as response:
        text = (await response.aread()).decode()
    if response.status_code != httpx.codes.OK:
        return f"{response.status_code} {_code(json.loads(text), response)}"
    if body["temperature"] == 99:
        raise Broken(f"a wrong request was answered: {text[:200]}")
    return _stream_end(text, body["n"]) if body["stream"] else _whole_end(json.loads(text), body["n"])


def _code(body: dict[str, Any], response: httpx.Response | None = None) -> str:
    error = body["error"]
    if set(error) != {"message", "type", "param", "code"}:
        raise Broken(f"an error of another shape: {body}")
    if response is not None and response.status_code in (429, 503) and "retry-after" not in response.headers:
        raise Broken(f"no Retry-After: {body}")
    if not isinstance(error["code"], str):
        raise Broken(f"an error without a code: {body}")
    return error["code"]


def _whole_end(answer: dict[str, Any], n: int) -> str:
    if [choice["finish_reason"] in ("stop", "length") for choice in answer["choices"]] != [True] * n:
        raise Broken(f"an answer without its end: {answer}")
    return "answered"


def _stream_end(text: str, n: int) -> str:
    events = [event.removeprefix("data: ") for event in text.split("\n\n")]
    if events[-2:] != ["[DONE]", ""]:
        raise Broken(f"a stream without its end: {text[-200:]!r}")
    chunks = [json.loads(event) for event in events[:-2]]
    if chunks and "error" in chunks[-1]:
        return f"stream {_code(chunks[-1])}"
    finished = [choice["index"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    if sorted(finished) != list(range(n)):
        raise Broken(f"a stream whose choices {finished} of {n} ended: {text[-200:]!r}")
    return "answered"


async def settle(url: str) -> float:
    """Seconds until the gauges are zero. Raises BenchError if they take longer than SETTLE_SECONDS."""
    started = perf_counter()
    async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
        while True:
            lines = (await client.get("/metrics")).text.splitlines()
            wrong = [line for line in lines if line.startswith(GAUGES) and float(line.rsplit(" ", 1)[1])]
            seconds = perf_counter() - started
            if not wrong:
                return seconds
            if seconds > SETTLE_SECONDS:
                raise BenchError(f"after {seconds:.1f} s there is still {wrong}")
            await asyncio.sleep(0.02)


async def healthy(url: str) -> None:
    """Wait until the engine works."""
    async with asyncio.timeout(ANSWER_SECONDS), httpx.AsyncClient(base_url=url, trust_env=False) as client:
        while (await client.get("/health")).status_code != httpx.codes.OK:  # noqa: ASYNC110  it tells nobody
            await asyncio.sleep(0.05)


async def kill_engine(url: str, api: psutil.Process) -> None:
    """SIGKILL to the child that is the engine, once it works."""
    await healthy(url)
    for child in api.children():
        if "multiprocessing.spawn" in " ".join(child.cmdline()):
            child.kill()


async def report(server: Server, plan: Plan) -> bool:
    """Storm, then tell what it did. True if every invariant held."""
    url, api = f"http://127.0.0.1:{server.port}", psutil.Process(server.process.pid)
    model, total = served_model(server.port), plan.num_requests
    calm = Plan(num_clients=8, num_requests=16, leaving=0, wrong=0)
    await storm(url, model, calm, {})
    await asyncio.sleep(0.5)
    num_fds, memory = api.num_fds(), [api.memory_info().rss]
    kills: list[asyncio.Task[None]] = []

    def kill() -> None:
        kills.append(asyncio.create_task(kill_engine(url, api)))

    started = perf_counter()
    marks = {total // 5: lambda: memory.append(api.memory_info().rss), total * 2 // 5: kill, total * 3 // 5: kill}
    tally = await storm(url, model, plan, marks)
    seconds, settled = perf_counter() - started, await settle(url)
    await asyncio.gather(*kills)
    await healthy(url)
    after = await storm(url, model, calm, {})
    await asyncio.sleep(0.5)
    memory.append(api.memory_info().rss)
    print(f"{total} requests of {plan.num_clients} clients in {seconds:.1f} s; gauges at zero {settled:.2f} s later")
    for end, count in tally.ends.most_common():
        print(f"  {count:6d}  {end}")
    print(
        "memory of the API process: " + ", ".join(f"{rss / 2**20:.1f} MiB" for rss in memory) + " (before, 1/5, after)"
    )
    print(f"file descriptors: {num_fds} before, {api.num_fds()} after; then {dict(after.ends)} of {calm.num_requests}")
    for line in tally.broken:
        print(f"BROKEN: {line}")
    is_calm = after.ends == {"answered": calm.num_requests}
    return is_calm and not tally.broken and api.num_fds() <= num_fds and memory[-1] - memory[1] < MAX_GROWTH_BYTES


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.storm", description=__doc__)
    parser.add_argument("--clients", type=int, default=200, help="clients at a time (200)")
    parser.add_argument("--requests", type=int, default=1000, help="requests of all of them (1000)")
    parser.add_argument("--patience", type=float, default=1.0, help="seconds before whoever leaves has left (1)")
    parser.add_argument("--retry", type=float, default=1.0, help="seconds at most before the next after a 503 (1)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (0)")
    parser.add_argument("--fake", action="store_true", help="an engine without tensors; everything else is real")
    parser.add_argument("--start-timeout", type=float, default=300, help="seconds until the server is healthy (300)")
    parser.add_argument("rest", nargs="*", help="after --: arguments of `medusa-serve serve`")
    return parser.parse_args(argv)


def program(args: argparse.Namespace, folder: Path) -> Program:
    if not args.fake:
        return ours("medusa-serve", args.rest)
    from tests.bench.fake_engine import write_model

    write_model(folder)
    start = (sys.executable, "-m", "tests.bench.fake_engine", "serve", str(folder), "--no-access-log")
    return Program("fake engine", (*start, *args.rest))


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    command.end_orderly()
    plan = Plan(args.clients, args.requests, patience=args.patience, retry_seconds=args.retry, seed=args.seed)
    with tempfile.TemporaryDirectory() as folder:
        try:
            with serving(program(args, Path(folder)), start_seconds=args.start_timeout) as server:
                return int(not asyncio.run(report(server, plan)))
        except BenchError as error:
            command.progress.print(f"error: {error}")
            return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
