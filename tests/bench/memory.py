"""`python -m tests.bench.memory`: what serving the default model takes, API and engine process together (Linux).

Once the server is healthy, and after different prompts have used every slot of the KV pool; the peak of loading is the
sum of what each process held at most. Resident memory counts what processes share once for each of them.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

import httpx
import psutil

from tests.bench import command
from tests.bench.client import BenchError, served_model
from tests.bench.launch import ours, serving

PROMPT_TOKENS = 2000
NUM_WORDS = 1000  # ids that prompts are drawn from; every model has so many tokens


def held(pid: int, field: str = "VmRSS") -> int:
    """Bytes of a process and all of its children; `VmHWM`: what each held at most, so far."""
    first = psutil.Process(pid)
    status = [Path(f"/proc/{each.pid}/status").read_text() for each in (first, *first.children(recursive=True))]
    return sum(int(found[1]) << 10 for text in status if (found := re.search(rf"^{field}:\s+(\d+) kB", text, re.M)))


def fill(port: int, num_slots: int) -> int:
    """Compute different prompts, one after the other, until every slot was used. Returns the number of their tokens."""
    random, model, computed = Random(0), served_model(port), 0
    while computed < num_slots:
        prompt = [random.randrange(NUM_WORDS) for _ in range(PROMPT_TOKENS)]
        body = {"model": model, "prompt": prompt, "max_tokens": 1}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=600, trust_env=False)
        computed += answer.raise_for_status().json()["usage"]["prompt_tokens"]
    return computed


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.memory", description=__doc__)
    parser.add_argument("--kv-cache-tokens", type=int, default=32768, help="slots (32768)")
    parser.add_argument("--start-timeout", type=float, default=300, help="seconds until the server is healthy (300)")
    parser.add_argument("rest", nargs="*", help="after --: further arguments of `medusa-serve serve`")
    args = parser.parse_args(argv)
    command.end_orderly()
    program = ours("medusa-serve", [*args.rest, "--kv-cache-tokens", str(args.kv_cache_tokens)])
    try:
        with serving(program, start_seconds=args.start_timeout) as server:
            pid = server.process.pid
            print(f"loaded: {held(pid) / 1e9:.2f} GB, at the peak {held(pid, 'VmHWM') / 1e9:.2f} GB", flush=True)
            tokens = fill(server.port, args.kv_cache_tokens)
            print(f"{args.kv_cache_tokens} slots filled by {tokens} tokens: {held(pid) / 1e9:.2f} GB")
    except BenchError as error:
        command.progress.print(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
