"""Triton's attention against the definition, over ragged batches; and what it writes to the pool."""

from __future__ import annotations

import random

import pytest
import torch
from ragged import NUM_SLOTS, Case, by_definition, make_case, tensors
from torch import Tensor

from models.attention import Scoring
from models.batch import build_batch
from models.kernels import triton_attention

RAGGED = {
    "first token": [(0, 1, 0)],
    "chunk after context": [(40, 33, 0)],
    "ragged trees": [(30, 1, 5), (7, 1, 0), (63, 1, 9), (64, 1, 2), (0, 1, 3)],
    "the largest tree": [(9, 1, 63)],
    "everything": [(140, 1, 4), (3, 30, 0), (0, 5, 5), (70, 1, 0), (50, 2, 12)],
}
SINKS = torch.tensor([-1.0, 0.5, 2.0, 0.0, 1.0, 3.0])
SCORINGS = {
    "plain": Scoring(0.25),
    "window": Scoring(0.25, window=4),
    "softcap": Scoring(0.25, softcap=0.7),
    "sinks": Scoring(0.25, sinks=SINKS),
    "all": Scoring(0.4, 9, 1.5, SINKS),
}


def attend(query: Tensor, keys: Tensor, values: Tensor, case: Case, scoring: Scoring, device: torch.device) -> Tensor:
    batch = build_batch(case.segments, torch.tensor(case.positions), torch.tensor(case.slots), device)
    sinks = None if scoring.sinks is None else scoring.sinks.to(device)
    tensors = (tensor.to(device) for tensor in (query, keys, values))
    return triton_attention.attention(*tensors, batch, scoring._replace(sinks=sinks)).cpu()


@pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS)
@pytest.mark.parametrize("sizes", RAGGED.values(), ids=RAGGED)
def test_against_the_definition(sizes: list[tuple[int, int, int]], scoring: Scoring, device: torch.device) -> None:
    case = make_case(sizes)
    query, keys, values = tensors(len(case.slots))
    out = attend(query, keys, values, case, scoring, device)
    torch.testing.assert_close(out.double(), by_definition(query, keys, values, case, scoring), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("scoring", [SCORINGS["plain"], SCORINGS["all"]], ids=["plain", "all"])
def test_spans_are_put_together(scoring: Scoring, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts of one to five spans; windows leave some of them empty."""
    monkeypatch.setattr(triton_attention, "SPAN", 32)
    case = make_case(RAGGED["everything"])
    query, keys, values = tensors(len(case.slots))
    out = attend(query, keys, values, case, scoring, device)
    torch.testing.assert_close(out.double(), by_definition(query, keys, values, case, scoring), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "k_dim", "v_dim"),
    [(4, 4, 8, 8), (8, 1, 16, 16), (9, 3, 64, 64), (4, 2, 24, 40), (70, 1, 16, 16)],
)
def test_head_shapes(heads: int, kv_heads: int, k_dim: int, v_dim: int, device: torch.device) -> None:
    case = make_case(RAGGED["ragged trees"])
    query, keys, values = tensors(len(case.slots), heads, kv_heads, k_dim, v_dim)
    out = attend(query, keys, values, case, Scoring(0.2), device)
    torch.testing.assert_close(
        out.double(), by_definition(query, keys, values, case, Scoring(0.2)), atol=2e-5, rtol=2e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    if dtype == torch.bfloat16 and device.type != "cuda":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16")
    case = make_case(RAGGED["everything"])
    query, keys, values = (tensor.to(dtype) for tensor in tensors(len(case.slots)))
    out = attend(query, keys, values, case, SCORINGS["all"], device)
    assert out.dtype == dtype
    expected = by_definition(query, keys, values, case, SCORINGS["all"])
    torch.testing.assert_close(out.double(), expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("seed", range(2))
def test_a_row_does_not_depend_on_other_segments(seed: int, device: torch.device) -> None:
    """To the bit, as long as the tiles are as large."""
    source = random.Random(seed)
    sizes = [(source.choice([1, 17, 64, 90]), 1, source.choice([0, 3, 8])) for _ in range(4)]
    case, scoring = make_case([*sizes, (5, 1, 8)], seed), Scoring(0.25)
    query, keys, values = tensors(len(case.slots))
    together, start = attend(query, keys, values, case, scoring, device), 0
    for segment in case.segments:
        end = start + segment.num_rows
        alone = Case([segment, case.segments[-1]], [], [], [])
        rows = [*range(start, end), *range(len(case.slots) - 9, len(case.slots))]
        alone.positions, alone.slots = [case.positions[row] for row in rows], [case.slots[row] for row in rows]
        assert torch.equal(
            attend(query[rows], keys, values, alone, scoring, device)[: end - start], together[start:end]
        )
        start = end


def test_writing_puts_every_row_into_its_slot(device: torch.device) -> None:
    keys, values = torch.zeros(20, 3, 24, device=device), torch.zeros(20, 3, 16, device=device)
    key, value = torch.randn(3, 5, 24, device=device).transpose(0, 1), torch.randn(5, 3, 16, device=device)
    slots = torch.tensor([7, 1, 19, 4, 2], device=device)
    triton_attention.write(keys, values, slots, key, value)
    assert torch.equal(keys[slots], key)
    assert torch.equal(values[slots], value)
    others = [slot for slot in range(20) if slot not in slots.tolist()]
    assert not keys[others].any()
    assert not values[others].any()
    half = keys.half()
    triton_attention.write(half, values.half(), slots, 2 * key, value)
    assert torch.equal(half[slots], (2 * key).half())


def test_a_slot_far_behind_in_a_large_pool_is_found(device: torch.device) -> None:
    """Offsets beyond 2^31 must not wrap around."""
    if device.type != "cuda":
        pytest.skip("needs a pool of 5 GB on a GPU")
    num_slots = 2**31 // 64 + NUM_SLOTS
    keys = torch.zeros(num_slots, 1, 64, dtype=torch.float16, device=device)
    slots = torch.tensor([num_slots - 1], device=device)
    row = torch.ones(1, 1, 64, dtype=torch.float16, device=device)
    triton_attention.write(keys, keys, slots, row, row)
    assert keys[-1].eq(1).all()
