"""Our engine and transformers' own ways to decode the same model, by turns in one process.

One stream: `generate` with a static cache, which transformers compiles on a GPU. Many: its continuous batching.
Prompts are random tokens, all sides decode greedily and never stop early; our side is plain decoding and, if there are
heads, Medusa. What is compiled or recorded at first use is not counted: each side runs once before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from statistics import median
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from models.tree import MAX_NODES
from server.engine.core import Engine
from tests.bench.inside import LOSSLESS, PLAIN, Tokens, decode
from tests.bench.turns import by_turns

OURS, MEDUSA = "ours", "ours, Medusa"
STATIC, CONTINUOUS = "transformers, static cache", "transformers, continuous batching"
NUM_PROMPT = 32
BLOCK = 256  # tokens of a block of transformers' cache, as it is by default
ROWS = 512  # most of a step, on both sides

Side = Callable[[], float]  # a run: tokens per second


@dataclass(frozen=True, slots=True)
class Compared:
    """Medians over rounds, ratios within a round."""

    streams: int
    side: str
    speed: float  # tokens per second
    over_theirs: float  # ours over transformers'; 1 for theirs


def num_slots(streams: int, num_tokens: int) -> int:
    """Tokens that our cache must hold; trees need some more."""
    return streams * (NUM_PROMPT + num_tokens + MAX_NODES)


def compare(engine: Engine, model: Any, streams: int, num_tokens: int, rounds: int) -> list[Compared]:
    """`model`: transformers' own, with the same weights, on the same device."""
    dice, vocab = Random(streams), engine.runner.info.vocab_size
    prompts = [tuple(dice.randrange(vocab) for _ in range(NUM_PROMPT)) for _ in range(streams)]
    sides: dict[str, Side] = {OURS: lambda: decode(engine, prompts, num_tokens, PLAIN).speed}
    if engine.runner.info.num_heads:
        sides[MEDUSA] = lambda: decode(engine, prompts, num_tokens, LOSSLESS).speed
    theirs = STATIC if streams == 1 else CONTINUOUS
    run = generate if streams == 1 else generate_batch
    sides[theirs] = lambda: run(model, prompts, num_tokens)
    return [Compared(streams, side, *found) for side, found in medians(sides, theirs, rounds).items()]


def medians(sides: Mapping[str, Side], theirs: str, rounds: int) -> dict[str, tuple[float, float]]:
    """Of each side the median speed, and the median ratio to `theirs`."""
    for run in sides.values():
        run()
    speeds = by_turns(sides, rounds)
    pairs = {side: zip(found, speeds[theirs], strict=True) for side, found in speeds.items()}
    return {side: (median(speeds[side]), median(a / b for a, b in pairs[side])) for side in sides}


@torch.inference_mode()
def generate(model: Any, prompts: Sequence[Tokens], num_tokens: int) -> float:
    """Tokens per second of the second half of an answer: what is done once for each call does not count."""
    inputs = torch.tensor(prompts, device=model.device)
    options = {"do_sample": False, "cache_implementation": "static", "use_cache": True, "pad_token_id": 0}

    def seconds(count: int) -> float:
        finish(model)
        started = time.perf_counter()
        found = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), min_new_tokens=count, max_new_tokens=count, **options
        )
        finish(model)
        assert found.shape[1] == inputs.shape[1] + count
        return time.perf_counter() - started

    half = num_tokens // 2
    return (num_tokens - half) * len(prompts) / (seconds(num_tokens) - seconds(half))


def generate_batch(model: Any, prompts: Sequence[Tokens], num_tokens: int) -> float:
    """Tokens per second of transformers' continuous batching, from the time each token came."""
    settings = GenerationConfig(do_sample=False, max_new_tokens=num_tokens, eos_token_id=-1, pad_token_id=0)
    blocks = len(prompts) * -(-(NUM_PROMPT + num_tokens) // BLOCK)
    cache = ContinuousBatchingConfig(block_size=BLOCK, num_blocks=blocks, max_batch_tokens=ROWS)
    found = model.generate_batch(
        list(map(list, prompts)), settings, continuous_batching_config=cache, record_timestamps=True
    )
    times = [sorted(answer.timestamps) for answer in found.values()]
    began = max(each[0] for each in times)
    counted = sum(stamp > began for each in times for stamp in each)
    return counted / (max(each[-1] for each in times) - began)


def finish(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
