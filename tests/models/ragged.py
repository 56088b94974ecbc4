"""Random ragged batches, and attention over them by its definition."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from models.attention import Scoring
from models.batch import Batch, Segment, build_batch

NUM_SLOTS = 3000


@dataclass
class Case:
    """A ragged batch: segments, and per row its position and the slots it sees in the order of the sequence."""

    segments: list[Segment]
    positions: list[int]
    slots: list[int]
    seen: list[list[tuple[int, int]]]  # per row (slot, position)

    @property
    def batch(self) -> Batch:
        return build_batch(self.segments, torch.tensor(self.positions), torch.tensor(self.slots), "cpu")


def make_case(sizes: list[tuple[int, int, int]], seed: int = 0) -> Case:
    """`sizes`: per segment (context, chain, nodes). Trees and slots are random."""
    source = random.Random(seed)
    free = source.sample(range(1, NUM_SLOTS), NUM_SLOTS - 1)
    case = Case([], [], [], [])
    for num_context, num_chain, num_nodes in sizes:
        context = [free.pop() for _ in range(num_context)]
        rows = [free.pop() for _ in range(num_chain + num_nodes)]
        parents = tuple(source.randrange(-1, node) for node in range(num_nodes))
        path = list(zip(context, range(num_context), strict=True))
        seen = []
        for slot in rows[:num_chain]:
            path = [*path, (slot, len(path))]
            seen.append(path)
        for slot, parent in zip(rows[num_chain:], parents, strict=True):
            above = seen[num_chain - 1 if parent < 0 else num_chain + parent]
            seen.append([*above, (slot, len(above))])
        case.segments.append(Segment(len(rows), torch.tensor(context, dtype=torch.int64), num_chain, parents))
        case.positions += [len(path) - 1 for path in seen]
        case.slots += rows
        case.seen += seen
    return case


def by_definition(query: Tensor, keys: Tensor, values: Tensor, case: Case, scoring: Scoring) -> Tensor:
    """[rows, heads, k_dim] -> [rows, heads, v_dim], in float64."""
    query, keys, values = query.double(), keys.double(), values.double()
    shared = query.shape[1] // keys.shape[1]
    out = []
    for row, position, seen in zip(query, case.positions, case.seen, strict=True):
        slots = [slot for slot, at in seen if scoring.window is None or position - at < scoring.window]
        k = keys[slots].repeat_interleave(shared, dim=1)  # [seen, heads, k_dim]
        v = values[slots].repeat_interleave(shared, dim=1)
        scores = torch.einsum("hd,shd->hs", row, k) * scoring.scaling
        if scoring.softcap is not None:
            scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
        weights = scores.exp()
        total = weights.sum(-1, keepdim=True)
        if scoring.sinks is not None:
            total = total + scoring.sinks.double().exp()[:, None]
        out.append(torch.einsum("hs,shd->hd", weights / total, v))
    return torch.stack(out)


def tensors(num_rows: int, heads: int = 6, kv_heads: int = 2, k_dim: int = 16, v_dim: int = 16) -> list[Tensor]:
    """Query, keys and values; slot 0 is zero, and slots that nobody wrote hold garbage that must not matter."""
    generator = torch.Generator().manual_seed(num_rows)
    query = torch.randn(num_rows, heads, k_dim, generator=generator)
    keys = torch.randn(NUM_SLOTS, kv_heads, k_dim, generator=generator)
    values = torch.randn(NUM_SLOTS, kv_heads, v_dim, generator=generator)
    keys[0] = values[0] = 0
    return [query, keys, values]
