"""The rows of one step, laid out once for every layer.

A step is a list of rows packed one after another. A `Segment` says what the rows of one request may look at. The C
kernels read them from a table (`Layout`); torch needs segments of like size padded into rectangles (`Group`).

Invariants:
- a row sees the context of its own segment, the chain up to itself, its ancestors in the tree and itself, nothing else;
- no row is without a visible key, padding rows included: they repeat the first row of their segment;
- keys lie in the order of the sequence and are padded to a multiple of KEY_BLOCK, so that the sums of a row are made in
  the same order whatever else is in the batch, as far as torch allows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")

KEY_BLOCK = 64
MAX_PADDING = 2048  # units of `_work`; one more group costs a CPU as much, 50 us a layer (measured)


@dataclass(frozen=True, slots=True)
class Segment:
    """The rows of one request in this step, packed one after another: first a chain, then tree nodes."""

    num_rows: int
    context: Tensor  # [context_len] int64, on the host; slots of the tokens at positions 0 .. context_len - 1
    num_chain: int  # consecutive tokens (a chunk of the prompt, or the root), at least one
    parents: tuple[int, ...]  # of each node: its parent's index among the nodes, or -1 for the last row of the chain


@dataclass(frozen=True, slots=True)
class Group:
    """Segments padded to one rectangle: B segments of T rows and K keys."""

    rows: Tensor  # [B * T] packed index of each query row
    keys: Tensor  # [B * K] slots
    visible: Tensor  # [B, T, K] bool
    query_positions: Tensor  # [B, T]
    key_positions: Tensor  # [B, K]
    packed: Tensor  # [rows of the group] packed index of each row that is not padding
    places: Tensor  # [rows of the group] the same rows' places in [B * T]
    is_whole: bool  # the group is the batch, in order and without padding rows
    biases: dict[tuple[int | None, torch.dtype, int], Tensor] = field(default_factory=dict)

    def bias(self, window: int | None, dtype: torch.dtype, num_queries: int) -> Tensor:
        """What to add to the scores of `num_queries` query heads per kv head: [B, 1, num_queries * T, K], 0 or -inf."""
        key = (window, dtype, num_queries)
        if key not in self.biases:
            visible = self.visible
            if window is not None:
                visible = visible & (self.query_positions[:, :, None] - self.key_positions[:, None, :] < window)
            bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
            self.biases[key] = bias.repeat(1, num_queries, 1)[:, None]
        return self.biases[key]


@dataclass(frozen=True, slots=True)
class Layout:
    """The same as tables, all int64 but parents."""

    segments: Tensor  # [segments, 5]: place in `table`, context length, first packed row, chain rows, rows
    table: Tensor  # slots of each segment in the order of the sequence: context, then chain
    parents: Tensor  # [rows] int32; the packed row of a tree node's parent, -1 under the chain and in it


class Batch:
    """One step, ready for every layer. Layouts are made, and go to the device, when a kernel first asks."""

    def __init__(
        self, segments: Sequence[Segment], positions: Tensor, slots: Tensor, device: torch.device | str
    ) -> None:
        self.segments = segments
        self.on_host = positions, slots  # as below
        self._device = device
        self._remembered: dict[object, Any] = {}
        ends = list(itertools.accumulate(segment.num_rows for segment in segments))
        assert ends
        assert ends[-1] == positions.shape[0] == slots.shape[0]
        self._starts = [0, *ends[:-1]]

    @cached_property
    def positions(self) -> Tensor:
        """[rows] int64."""
        return self.on_host[0].to(self._device, non_blocking=True)

    @cached_property
    def slots(self) -> Tensor:
        """[rows] int64; where the K and V of each row go."""
        return self.on_host[1].to(self._device, non_blocking=True)

    def remember(self, name: object, make: Callable[[], T]) -> T:
        """What a kernel has made of the step for itself, for the layers to come."""
        if name not in self._remembered:
            self._remembered[name] = make()
        made: T = self._remembered[name]
        return made

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        return tuple(
            _build_group(
                [self.segments[i] for i in members], [self._starts[i] for i in members], self.positions, self.slots
            )
            for members in _partition(self.segments)
        )

    @cached_property
    def layout(self) -> Layout:
        rows, tables, parents, place = [], [], [], 0
        for segment, start in zip(self.segments, self._starts, strict=True):
            num_context, first_node = segment.context.shape[0], start + segment.num_chain
            rows.append((place, num_context, start, segment.num_chain, segment.num_rows))
            tables += [segment.context, self.slots[start:first_node]]
            parents += [-1] * segment.num_chain
            parents += [parent if parent < 0 else first_node + parent for parent in segment.parents]
            place += num_context + segment.num_chain
        segments = torch.from_numpy(np.array(rows, dtype=np.int64))
        return Layout(segments, torch.cat(tables), torch.from_numpy(np.array(parents, dtype=np.int32)))


def integers(values: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """int64, a copy: an array whose buffer is lent could not grow. `torch.tensor` takes several times as long."""
    return torch.from_numpy(np.array(values, dtype=np.int64)).to(device)


def build_batch(segments: Sequence[Segment], positions: Tensor, slots: Tensor, device: torch.device | str) -> Batch:
    """Lay out one step. `positions` and `slots`: [rows] int64 on the host, in the order of the segments' rows."""
    return Batch(segments, positions, slots, device)


def _work(num_rows: int, num_keys: int) -> int:
    """Cost of a rectangle: every row uses every key; to gather a key costs a CPU as much as 8 more rows (measured)."""
    return num_keys * (num_rows + 8)


def _partition(segments: Sequence[Segment]) -> list[list[int]]:
    """Indices of segments to pad together, so that a group's padding costs less than another group would."""
    sizes = [(segment.num_rows, len(segment.context) + segment.num_rows) for segment in segments]
    groups: list[list[int]] = []
    height = width = real = 0
    for i in sorted(range(len(sizes)), key=lambda i: _work(*sizes[i]), reverse=True):
        height, width, real = max(height, sizes[i][0]), max(width, sizes[i][1]), real + _work(*sizes[i])
        if groups and (len(groups[-1]) + 1) * _work(height, width) - real <= MAX_PADDING:
            groups[-1].append(i)
        else:
            groups.append([i])
            (height, width), real = sizes[i], _work(*sizes[i])
    return [sorted(group) for group in groups]


def _build_group(segments: Sequence[Segment], starts: Sequence[int], positions: Tensor, slots: Tensor) -> Group:
    size, height = len(segments), max(segment.num_rows for segment in segments)
    width = -(-max(len(segment.context) + segment.num_rows for segment in segments) // KEY_BLOCK) * KEY_BLOCK
    device = slots.device
    keys = torch.zeros(size, width, dtype=torch.int64, device=device)
    visible = torch.zeros(size, height, width, dtype=torch.bool, device=device)
    key_positions = torch.arange(width, device=device).repeat(size, 1)
    for i, (segment, start) in enumerate(zip(segments, starts, strict=True)):
        num_context, end = len(segment.context), start + segment.num_rows
        own = slice(num_context, num_context + segment.num_rows)
        keys[i, :num_context] = segment.context
        keys[i, own] = slots[start:end]
        key_positions[i, own] = positions[start:end]
        visible[i, : segment.num_rows, :num_context] = True
        visible[i, : segment.num_rows, own].fill_(True).tril_()
        if segment.parents:
            nodes = slice(num_context + segment.num_chain, num_context + segment.num_rows)
            visible[i, segment.num_chain : segment.num_rows, nodes] = _ancestors(segment.parents).to(device)
        visible[i, segment.num_rows :] = visible[i, 0]
    lengths = torch.tensor([segment.num_rows for segment in segments])[:, None]
    offsets = torch.arange(height).expand(size, height)
    is_row = offsets < lengths
    rows = (torch.tensor(starts)[:, None] + offsets.where(is_row, 0)).flatten()
    packed = rows[is_row.flatten()]
    rows_on_device = rows.to(device)
    return Group(
        rows=rows_on_device,
        keys=keys.flatten(),
        visible=visible,
        query_positions=positions[rows_on_device].view(size, height),
        key_positions=key_positions,
        packed=packed.to(device),
        places=is_row.flatten().nonzero().flatten().to(device),
        is_whole=len(packed) == len(rows) == len(slots),
    )


@lru_cache(maxsize=4096)
def _ancestors(parents: tuple[int, ...]) -> Tensor:
    """Which nodes a node sees, itself and its ancestors: [nodes, nodes] bool. A tree comes back in many steps."""
    sees = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        assert -1 <= parent < node
        if parent >= 0:
            sees[node] |= sees[parent]
    return sees
