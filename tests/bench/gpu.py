"""`python -m tests.bench.gpu`: what a step of a model of random weights takes on a GPU, by its rows, against the floor.

The floor is the time to read the weights and the rows' keys and values once, at the speed of a plain device copy. Each
row is a request of its own that looks back on `--context` tokens. A step is timed from its layout to its logits, with
what Python does in between. Rounds go through all row counts, forth and back; medians, ratios taken within a round.
Without a GPU it runs on the CPU in torch (`--shape tiny`), which proves the command and says nothing about speed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from rich.box import MARKDOWN
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from models.backbone import Backbone
from models.batch import Segment, build_batch
from models.kv_pool import KVPool
from models.train.machine import this_machine
from tests.bench.command import integers, output, write

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
COPY_BYTES = 1 << 30
WARM_UPS = 2


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama-like model's sizes."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int
    is_tied: bool = True

    @property
    def config(self) -> LlamaConfig:
        return LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            tie_word_embeddings=self.is_tied,
            max_position_embeddings=1 << 17,
        )


SHAPES = {
    "SmolLM2-135M": Shape(30, 576, 1536, 9, 3, 49152),
    "Llama-3.2-1B": Shape(16, 2048, 8192, 32, 8, 128256),
    "Llama-3.1-8B": Shape(32, 4096, 14336, 32, 8, 128256, is_tied=False),
    "tiny": Shape(2, 64, 96, 4, 2, 160),
}


@dataclass(frozen=True, slots=True)
class Speed:
    """A step of `rows` rows; medians over rounds."""

    rows: int
    seconds: float
    to_one_row: float
    floor_seconds: float
    share_of_floor: float  # the floor over the step


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = options.shape or [name for name in SHAPES if name != "tiny"]
    found = {name: measure(SHAPES[name], device, options.rows, options.context, options.rounds) for name in names}
    output().print(f"{this_machine()}; a context of {options.context} tokens a row")
    for name, speeds in found.items():
        output().print(table(name, speeds))
    write(options.json, {"machine": this_machine(), "context": options.context, "speeds": found})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu", description=__doc__)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="may be repeated (all but tiny)")
    parser.add_argument("--rows", type=integers, default=ROWS, help="rows of a step, such as 1,4,64")
    parser.add_argument("--context", type=int, default=256, help="tokens that each row looks back on (256)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds to take the median of (7)")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    return parser.parse_args(arguments)


@torch.inference_mode()
def measure(shape: Shape, device: torch.device, rows: Sequence[int], context: int, rounds: int) -> list[Speed]:
    """One row is always measured: it is what others are compared with."""
    rows = sorted({1, *rows})
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model = AutoModelForCausalLM.from_config(shape.config, dtype=dtype)
    weight_bytes = sum(weight.nbytes for weight in {id(weight): weight for weight in model.parameters()}.values())
    weight_bytes -= 0 if shape.is_tied else shape.vocab * shape.hidden * dtype.itemsize  # of a table few rows are read
    backbone = Backbone(model)
    pool = KVPool(backbone.kv_shapes, max(rows) * (context + 1), dtype=dtype, device=device)
    key_bytes = KVPool.bytes_per_token(backbone.kv_shapes, dtype) * (context + 1)
    steps = {count: step_of(backbone, pool, count, context, device) for count in rows}
    copied = copy_of(COPY_BYTES if device.type == "cuda" else 1 << 24, device)
    for run in (*steps.values(), copied):
        for _ in range(WARM_UPS):
            run()
    times: dict[int, list[float]] = {count: [] for count in rows}
    floors: dict[int, list[float]] = {count: [] for count in rows}
    for index in range(rounds):
        per_byte = copied()
        for count in rows[:: -1 if index % 2 else 1]:
            times[count].append(steps[count]())
            floors[count].append((weight_bytes + count * key_bytes) * per_byte)
    return [speed(count, times[count], times[1], floors[count]) for count in rows]


def speed(rows: int, seconds: Sequence[float], of_one_row: Sequence[float], floors: Sequence[float]) -> Speed:
    return Speed(
        rows,
        median(seconds),
        median(mine / one for mine, one in zip(seconds, of_one_row, strict=True)),
        median(floors),
        median(floor / mine for floor, mine in zip(floors, seconds, strict=True)),
    )


def step_of(backbone: Backbone, pool: KVPool, rows: int, context: int, device: torch.device) -> Callable[[], float]:
    """A step of `rows` requests. It returns its seconds."""
    contexts = [torch.arange(i * (context + 1) + 1, (i + 1) * (context + 1)) for i in range(rows)]
    positions, slots = torch.full((rows,), context), torch.arange(1, rows + 1) * (context + 1)
    tokens, asked = torch.arange(rows, device=device) % backbone.vocab_size, torch.arange(rows, device=device)

    def run() -> float:
        finish(device)
        started = time.perf_counter()
        batch = build_batch([Segment(1, each, 1, ()) for each in contexts], positions, slots, device)
        logits, _ = backbone.forward(tokens, batch, pool, asked)
        drawn: Tensor = logits.argmax(-1)
        drawn.cpu()
        return time.perf_counter() - started

    return run


def copy_of(size: int, device: torch.device) -> Callable[[], float]:
    """A plain copy. It returns its seconds for each byte, read or written."""
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=device)

    def run() -> float:
        finish(device)
        started = time.perf_counter()
        target.copy_(source)
        finish(device)
        return (time.perf_counter() - started) / (2 * size)

    return run


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def table(name: str, speeds: Sequence[Speed]) -> Table:
    made = Table(name, "step, ms", "/ 1 row", "floor, ms", "floor / step", "tokens/s", box=MARKDOWN)
    for each in speeds:
        times = f"{1000 * each.seconds:.3f}", f"{each.to_one_row:.2f}", f"{1000 * each.floor_seconds:.3f}"
        made.add_row(str(each.rows), *times, f"{each.share_of_floor:.2f}", f"{each.rows / each.seconds:.0f}")
    return made


if __name__ == "__main__":
    main()
