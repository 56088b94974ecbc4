"""Steps of a GPU as recorded CUDA graphs: one launch in place of some hundreds.

A graph runs the same kernels on the same addresses each time. So there is one for each of some numbers of rows, and of
spans of the longest context; a step takes the next larger one. Its tables lie in one buffer, which one copy fills.

Invariants:
- inputs, tables and outputs, which graphs read and write, live as long as `Graphs`, whose graphs share them;
- rows that only fill up see slot 0 alone, which stays zero: nothing is written there;
- what a step returns holds until the next one runs, but hidden states for good;
- inputs are uploaded before a step is run, which waits for the device, so the staging buffer is free by then.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.batch import Batch
from models.kernels.triton_attention import SPAN, Tables, Tiles, least_width, tables
from models.kv_pool import KVPool

ROWS: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
SPANS: Final = (1, 4, 16, 64)
MAX_KEYS: Final = 1 << 22  # that a step's tables name: 32 MiB
FIELDS: Final = 9  # of each row in the buffer: position, slot, 6 of a tile, ancestors

Integers = NDArray[np.int64]
EMPTY: Final[Integers] = np.empty(0, dtype=np.int64)
NOTHING: Final = (EMPTY, EMPTY, Tables(EMPTY.reshape(0, 6), EMPTY, EMPTY, 0, 0))  # positions, slots, tables
Found = tuple[Tensor, Tensor]  # logits and hidden states, [rows, ...] both


class Forward(Protocol):
    """What is recorded. `inputs`: of all rows."""

    def __call__(self, inputs: Sequence[Tensor], batch: Batch, pool: KVPool, rows: Tensor) -> Found: ...


Recorder = Callable[[Callable[[], None]], Callable[[], None]]  # of a run makes what repeats it


class Plan(Batch):
    """A step of so many rows and spans of which only the tables are known: places in `buffer`, whatever is there."""

    def __init__(self, buffer: Tensor, num_rows: int, num_spans: int, shared: int) -> None:
        self.num_rows, self.num_spans = num_rows, num_spans
        self.positions, self.slots, tiles, ancestors = buffer[: FIELDS * num_rows].split_with_sizes(
            [num_rows, num_rows, 6 * num_rows, num_rows]
        )
        table = buffer[FIELDS * num_rows :]
        self._tiles = Tiles(tiles.view(-1, 6), ancestors, table, num_spans, least_width(shared))
        self._name = "tiles", shared

    def remember(self, name: object, make: Callable[[], Any]) -> Any:
        assert name == self._name, "all layers share their kv heads alike"
        return self._tiles


class Graphs:
    """Those of one model on one pool."""

    def __init__(
        self,
        forward: Forward,
        inputs: Sequence[Tensor],
        pool: KVPool,
        *,
        shared: int,
        longest: int,
        record: Recorder,
    ) -> None:
        """Record `forward` for steps of as many rows as `inputs` have and for sequences of at most `longest` tokens.

        `inputs` [rows, ...] are kept: steps write theirs there. `shared`: query heads of each kv head, in all layers.
        """
        self.pool = pool
        self._shared = shared
        device = pool.keys[0].device
        self._rows = [rows for rows in ROWS if rows <= len(inputs[0])]
        self._spans = SPANS[: bisect_left(SPANS, -(-longest // SPAN)) + 1]
        most = self._rows[-1]
        self._buffer = torch.zeros(FIELDS * most + MAX_KEYS, dtype=torch.int64, device=device)
        self._staged = torch.zeros_like(self._buffer, device="cpu", pin_memory=device.type == "cuda")
        self._inputs, self._every = inputs, torch.arange(most, device=device)
        self._stage(most, *NOTHING)
        plan = Plan(self._buffer, most, 1, shared)
        self._outputs = tuple(map(torch.empty_like, forward(inputs, plan, pool, self._every)))
        self._replays: dict[tuple[int, int], Callable[[], None]] = {}
        for num_rows in reversed(self._rows):  # the largest first: the others use its memory
            self._stage(num_rows, *NOTHING)
            for num_spans in self._spans:
                plan = Plan(self._buffer, num_rows, num_spans, shared)
                self._replays[num_rows, num_spans] = record(partial(self._run, forward, plan))

    @property
    def num_graphs(self) -> int:
        return len(self._replays)

    def run(self, inputs: Sequence[Tensor], batch: Batch) -> Found | None:
        """All rows of a step; None if it fits no graph."""
        count = len(inputs[0])
        if count > self._rows[-1]:
            return None
        found = tables(batch, self._shared, least_width(self._shared))
        row, span = bisect_left(self._rows, count), bisect_left(self._spans, found.num_spans)
        num_keys = len(found.table)
        if span == len(self._spans) or num_keys >= MAX_KEYS:
            return None
        num_rows, num_spans = self._rows[row], self._spans[span]
        positions, slots = batch.on_host
        self._stage(num_rows, positions.numpy(), slots.numpy(), found)
        for place, values in zip(self._inputs, inputs, strict=True):
            place[:count].copy_(values)
        self._replays[num_rows, num_spans]()
        logits, hidden = self._outputs
        return logits[:count], hidden[:count].clone()

    def _run(self, forward: Forward, plan: Plan) -> None:
        """What is recorded."""
        num_rows = plan.num_rows
        found = forward([each[:num_rows] for each in self._inputs], plan, self.pool, self._every[:num_rows])
        for place, values in zip(self._outputs, found, strict=True):
            place[:num_rows].copy_(values)

    def _stage(self, num_rows: int, positions: Integers, slots: Integers, found: Tables) -> None:
        """Fill the buffer for a plan of so many rows. positions, slots: [rows of the step]."""
        count, num_keys = len(positions), len(found.table)
        filling = np.zeros((num_rows - count, 6), dtype=np.int64)  # tiles of one row that begins a text
        filling[:, 0], filling[:, 2:4], filling[:, 4] = num_keys, 1, np.arange(count, num_rows)
        fixed, end = FIELDS * num_rows, FIELDS * num_rows + num_keys + 1
        starts = 0, num_rows, 2 * num_rows, 8 * num_rows, fixed
        tiles = np.concatenate([found.tiles, filling]).reshape(-1)
        staged = self._staged.numpy()
        staged[:fixed] = staged[end - 1] = 0
        for start, numbers in zip(starts, (positions, slots, tiles, found.ancestors, found.table), strict=True):
            staged[start : start + len(numbers)] = numbers
        self._buffer[:end].copy_(self._staged[:end], non_blocking=True)


class CudaRecorder:
    """Records CUDA graphs, which share the memory of what they compute on the way: only one runs at a time."""

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # one: cuBLAS keeps memory for each

    @torch.inference_mode()
    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()  # what is compiled or allocated at first use
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, stream=self._stream):
            run()
        return graph.replay
