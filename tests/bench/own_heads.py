"""`python -m tests.bench.own_heads MODEL --data FILES`: tokens per forward pass of a multi-token model, over HTTP.

For what `medusa-serve train pretrain` writes. Prompts are cut from the text that its training held out (the same FILES
and pattern must be given), the server drafts with the model's own heads and nothing else, and every forward pass of a
request is counted, the prompt's included: each brings one token that no head guessed. For a vocabulary of bytes, tokens
are bytes. Nothing is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.table import Table

from models.errors import UsageError
from models.train.corpus import encode_corpus, read_documents, spread_windows
from tests.bench.client import BenchError, served_model
from tests.bench.command import end_orderly, integers, output
from tests.bench.launch import ours, serving


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one prompt: the text, and how many tokens of it a head had guessed."""

    text: str
    num_tokens: int
    num_accepted: int

    @property
    def num_forwards(self) -> int:
        """Every pass brings one token that is not accepted but drawn."""
        return self.num_tokens - self.num_accepted


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits with 1 and a sentence if a measurement fails."""
    options = parse(arguments)
    end_orderly()
    try:
        prompts = held_out_prompts(options)
        program = ours("medusa-serve", [options.model, "--no-ngram", "--static-trees", "--num-nodes", "63"])
        with serving(program, start_seconds=options.start_timeout) as server:
            table = measured(server.port, prompts, options)
    except (BenchError, UsageError, httpx.HTTPError, OSError) as error:
        sys.exit(f"bench: {str(error) or type(error).__name__}")
    output().print(table)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.own_heads", description=__doc__)
    parser.add_argument("model", help="folder of a multi-token model with a vocabulary of bytes")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="the files given to training")
    parser.add_argument("--pattern", default="*", help="as in training")
    parser.add_argument("--validation-fraction", type=float, default=0.05, help="as in training")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=96, help="of an answer")
    parser.add_argument("--nodes", type=integers, default=(1, 4, 8, 16, 32, 63))
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--start-timeout", type=float, default=300)
    return parser.parse_args(arguments)


def held_out_prompts(options: argparse.Namespace) -> list[list[int]]:
    """Token ids. Raises DataError."""
    documents = read_documents(options.data, options.pattern)
    corpus = encode_corpus(documents, None, validation_fraction=options.validation_fraction)
    windows: list[list[int]] = spread_windows(corpus.held_out, options.prompt_tokens, options.prompts).tolist()
    return windows


def measured(port: int, prompts: Sequence[Sequence[int]], options: argparse.Namespace) -> Table:
    """A row for each temperature and number of nodes. Raises BenchError if a tree changed an answer."""
    table = Table("temperature", "nodes", "tokens", "forward passes", "tokens per forward pass")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}/v1", timeout=600, trust_env=False) as client:
        model = served_model(port)
        for temperature in options.temperature:
            body = {"model": model, "max_tokens": options.max_tokens, "temperature": temperature, "ignore_eos": True}
            plain = [ask(client, {**body, "prompt": prompt, "seed": i}, 0) for i, prompt in enumerate(prompts)]
            for nodes in options.nodes:
                told = [ask(client, {**body, "prompt": prompt, "seed": i}, nodes) for i, prompt in enumerate(prompts)]
                if changed := sum(one.text != other.text for one, other in zip(plain, told, strict=True)):
                    raise BenchError(f"{changed} of {len(told)} answers with {nodes} nodes are not those without")
                tokens, passes = sum(a.num_tokens for a in told), sum(a.num_forwards for a in told)
                table.add_row(str(temperature), str(nodes), str(tokens), str(passes), f"{tokens / passes:.2f}")
    return table


def ask(client: httpx.Client, body: dict[str, object], nodes: int) -> Answer:
    """One completion. Raises BenchError with the server's words if it is refused."""
    speculation = {"mode": "lossless", "max_nodes": nodes} if nodes else {"mode": "off"}
    reply = client.post("/completions", json={**body, "speculation": speculation})
    if not reply.is_success:
        raise BenchError(f"the server answered {reply.status_code}: {reply.text}")
    answer = reply.json()
    told = (answer.get("metrics") or {}).get("speculative_decoding") or {}
    accepted = told.get("num_accepted_draft_tokens", 0)
    return Answer(answer["choices"][0]["text"], answer["usage"]["completion_tokens"], accepted)


if __name__ == "__main__":
    main()
