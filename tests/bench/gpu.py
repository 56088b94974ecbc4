"""`python -m tests.bench.gpu`: everything that a GPU is asked, in one command; `--part` chooses.

    steps    what a step takes by its rows, against the floor, for models of random weights
    goodput  what verifying guesses brings to a batch of the largest of these, with a drafter that knows the answers
    beside   the default model against transformers' `generate` and its continuous batching
    serving  the default model over HTTP, plain and with Medusa (`tests.bench.load`)

The floor is the time to read the weights and the rows' keys and values once, at the speed of a plain device copy. Each
row is a request of its own that looks back on `--context` tokens. A step is timed from its layout to its logits, with
what Python does in between. Rounds go through all row counts, forth and back; medians, ratios taken within a round.
Without a GPU it runs on the CPU in torch (`--shape tiny`), which proves the command and says nothing about speed.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.box import MARKDOWN
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from models.backbone import Backbone
from models.batch import Segment, build_batch
from models.kv_pool import KVPool
from models.source import DEFAULT_MODEL, resolve, resolve_heads
from models.train.machine import this_machine
from models.train.plot import svg
from server.engine.core import Engine
from server.engine.messages import EngineConfig
from server.engine.runner import Runner
from server.engine.warmup import warm_up
from tests.bench import beside, load
from tests.bench.beside import Compared
from tests.bench.command import integers, output, write
from tests.bench.goodput import NUM_TOKENS, Goodput, Knowing, goodput
from tests.bench.turns import by_turns

PARTS = ("steps", "goodput", "beside", "serving")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BATCHES = (1, 4, 16, 64, 128)
STREAMS = (1, 64)
SERVED = (1, 4, 16, 64, 256)
ACCURACY, DEPTH = 0.7, 4  # of the drafter that knows
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
    output().print(f"{this_machine()}; a context of {options.context} tokens a row")
    found: dict[str, object] = {"machine": this_machine(), "context": options.context}
    names = options.shape or [name for name in SHAPES if name != "tiny"]
    if "steps" in options.part:
        speeds = {}
        for name in names:
            speeds[name] = measure(SHAPES[name], device, options.rows, options.context, options.rounds)
            forget()
        for name, rows in speeds.items():
            output().print(table(name, rows))
        if options.plot is not None:
            lines = {name: [(each.rows, each.share_of_floor) for each in rows] for name, rows in speeds.items()}
            options.plot.write_text(svg("floor / step", "rows of a step", lines), encoding="utf-8")
        found["speeds"] = speeds
    if "goodput" in options.part:
        brought = bring(SHAPES[names[-1]], device, options.batches, options.context, options.rounds)
        forget()
        output().print(goodput_table(names[-1], brought))
        found["goodput"] = brought
    if "beside" in options.part:
        compared = stand_beside(options, device)
        forget()
        output().print(beside_table(compared))
        found["beside"] = compared
    write(options.json, found)
    if "serving" in options.part:
        levels = ",".join(map(str, options.served))
        load.main(["--model", options.model, "--concurrency", levels, "--rounds", "2", "--requests", "1"])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tests.bench.gpu", description=__doc__, formatter_class=form)
    parser.add_argument("--part", action="append", choices=PARTS, help="may be repeated (all)")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="may be repeated (all but tiny)")
    parser.add_argument("--rows", type=integers, default=ROWS, help="rows of a step, such as 1,4,64")
    parser.add_argument("--batches", type=integers, default=BATCHES, help="requests at a time, for goodput")
    parser.add_argument("--streams", type=integers, default=STREAMS, help="beside transformers (1,64)")
    parser.add_argument("--served", type=integers, default=SERVED, help="streams over HTTP")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="beside transformers and over HTTP")
    parser.add_argument("--context", type=int, default=256, help="tokens that each row looks back on (256)")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, beside transformers (128)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds to take the median of (5)")
    parser.add_argument("--plot", type=Path, help="draw the shares of the floor to this SVG file")
    parser.add_argument("--json", type=Path, help="write everything that was measured in this process to this file")
    options = parser.parse_args(arguments)
    options.part = options.part or list(PARTS)
    return options


def forget() -> None:
    """Give back the memory of models that are no longer needed."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def random_model(shape: Shape, device: torch.device) -> Any:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        return AutoModelForCausalLM.from_config(shape.config, dtype=dtype)


def bring(shape: Shape, device: torch.device, batches: Sequence[int], context: int, rounds: int) -> list[Goodput]:
    """Goodput of a model of random weights, by the requests at a time.

    Its layers add nothing, so each token decides the next: with other random weights two tokens are often as likely,
    and which of them is said depends on how products of so many rows are rounded.
    """
    most, longest = max(batches), context + NUM_TOKENS + DEPTH + 1
    config = EngineConfig(
        "random",
        device=device.type,
        max_model_len=longest,
        max_num_seqs=most,
        max_num_batched_rows=beside.ROWS,
        kv_cache_tokens=most * longest,
        ngram=False,
        prefix_cache=False,
    )
    model = random_model(shape, device)
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            torch.nn.init.zeros_(linear.weight)
    backbone = Backbone(model)
    runner = Runner(backbone, None, config)
    runner.record(config)
    engine = Engine(config, runner)
    warm_up(engine)
    drafter = Knowing(runner.info.vocab_size, ACCURACY, DEPTH)
    return [goodput(engine, runner, drafter, batch, context, rounds) for batch in batches]


def stand_beside(options: argparse.Namespace, device: torch.device) -> list[Compared]:
    """The same weights in our engine and in transformers."""
    path = str(resolve(options.model))
    heads, streams = resolve_heads(None, options.model), max(options.streams)
    config = EngineConfig(
        path,
        heads=heads and str(heads),
        device=device.type,
        quantization="none",
        max_num_seqs=streams,
        max_num_batched_rows=beside.ROWS,
        kv_cache_tokens=beside.num_slots(streams, options.tokens),
    )
    engine = Engine(config, Runner.load(config))
    warm_up(engine)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, engine.runner.info.dtype)).to(device)
    return [
        each
        for count in options.streams
        for each in beside.compare(engine, theirs, count, options.tokens, options.rounds)
    ]


@torch.inference_mode()
def measure(shape: Shape, device: torch.device, rows: Sequence[int], context: int, rounds: int) -> list[Speed]:
    """One row is always measured: it is what others are compared with."""
    rows = sorted({1, *rows})
    model = random_model(shape, device)
    dtype = model.dtype
    weight_bytes = sum(weight.nbytes for weight in {id(weight): weight for weight in model.parameters()}.values())
    weight_bytes -= 0 if shape.is_tied else shape.vocab * shape.hidden * dtype.itemsize  # of a table few rows are read
    backbone = Backbone(model)
    pool = KVPool(backbone.kv_shapes, max(rows) * (context + 1), dtype=dtype, device=device)
    backbone.record(pool, most_rows=max(rows), longest=context + 1)
    key_bytes = KVPool.bytes_per_token(backbone.kv_shapes, dtype) * (context + 1)
    steps = {count: step_of(backbone, pool, count, context, device) for count in rows}
    copied = copy_of(COPY_BYTES if device.type == "cuda" else 1 << 24, device)
    for run in (*steps.values(), copied):
        for _ in range(WARM_UPS):
            run()
    times = by_turns({0: copied, **steps}, rounds)

    def floors(count: int) -> list[float]:
        return [(weight_bytes + count * key_bytes) * per_byte for per_byte in times[0]]

    return [speed(count, times[count], times[1], floors(count)) for count in rows]


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


def goodput_table(name: str, found: Sequence[Goodput]) -> Table:
    made = Table(f"{name}, requests", "plain, tokens/s", "guesses / plain", "tokens a step", box=MARKDOWN)
    for each in found:
        made.add_row(str(each.batch), f"{each.plain:.1f}", f"{each.ratio:.2f}", f"{each.tokens_per_step:.2f}")
    return made


def beside_table(found: Sequence[Compared]) -> Table:
    made = Table("streams", "side", "tokens/s", "over transformers", box=MARKDOWN)
    for each in found:
        made.add_row(str(each.streams), each.side, f"{each.speed:.1f}", f"{each.over_theirs:.2f}")
    return made


if __name__ == "__main__":
    main()
