"""Attention of every target against torch on random ragged batches, and bit for bit against each row alone."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from ragged import Case, by_definition, make_case, tensors
from torch import Tensor

from models.attention import Scoring, tree_attention
from models.batch import Segment, build_batch
from models.kernels import cpu

pytestmark = pytest.mark.usefixtures("target")

SHAPES = [  # heads, kv_heads, k_dim, v_dim
    (4, 4, 16, 16),
    (6, 2, 32, 32),
    (9, 1, 64, 64),
    (9, 3, 64, 64),
    (14, 2, 64, 64),
    (5, 5, 80, 80),
    (8, 2, 128, 128),
    (4, 2, 192, 128),
    (2, 1, 256, 256),
    (6, 3, 32, 80),
]


def random_sizes(source: random.Random) -> list[tuple[int, int, int]]:
    """(context, chain, nodes) of each segment: decoding, prompts, chunks and trees."""
    kinds = [(1, 0), (1, 4), (1, 63), (2, 7), (70, 0), (31, 0), (33, 5), (5, 1)]
    contexts = [0, 1, 17, 31, 32, 33, 64, 200]
    return [(source.choice(contexts), *source.choice(kinds)) for _ in range(source.randint(1, 6))]


def attend(case: Case, query: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    return cpu.attention(query, keys, values, case.batch, query.shape[-1] ** -0.5, window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_what_torch_computes(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    source = random.Random(str((shape, dtype)))
    for seed, window in enumerate((None, None, 1, 5, 32, 40)):
        case = make_case(random_sizes(source), seed)
        query, keys, values = tensors(len(case.slots), *shape)
        keys, values = keys.to(dtype), values.to(dtype)
        out = attend(case, query, keys, values, window)
        scoring = Scoring(query.shape[-1] ** -0.5, window)
        expected = tree_attention(query, keys, values, case.batch, scoring)
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)


def test_sharp_scores_and_slots_that_nobody_sees() -> None:
    """Scores in the hundreds must not overflow, and garbage in other slots must not be touched, not even times 0."""
    case = make_case([(50, 1, 9), (0, 40, 3), (100, 1, 0)])
    query, keys, values = tensors(len(case.slots), 4, 2, 64, 64)
    seen = torch.tensor(sorted({slot for row in case.seen for slot, _ in row}))
    for pool in (keys, values):
        kept = pool[seen].clone()
        pool.fill_(torch.nan)
        pool[seen] = kept
    out = attend(case, query * 40, keys, values, None)
    expected = by_definition(query * 40, keys, values, case, Scoring(64**-0.5))
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-4)


def one_by_one(query: Tensor, keys: Tensor, values: Tensor, case: Case, window: int | None) -> Tensor:
    """Each row as the only row of its step, all that it sees in its context."""
    out = []
    for row, (position, slot, seen) in enumerate(zip(case.positions, case.slots, case.seen, strict=True)):
        context = torch.tensor([slot for slot, _ in seen[:-1]], dtype=torch.int64)
        batch = build_batch([Segment(1, context, 1, ())], torch.tensor([position]), torch.tensor([slot]), "cpu")
        out.append(cpu.attention(query[row : row + 1], keys, values, batch, query.shape[-1] ** -0.5, window))
    return torch.cat(out)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_is_bitwise_what_it_is_alone(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    source = random.Random(str((dtype, shape)))
    for seed, window in enumerate((None, 5, 33)):
        case = make_case(random_sizes(source), seed)
        query, keys, values = tensors(len(case.slots), *shape)
        keys, values = keys.to(dtype), values.to(dtype)
        alone = one_by_one(query, keys, values, case, window)
        assert torch.equal(attend(case, query, keys, values, window), alone)


@pytest.mark.parametrize("window", [None, 20])
def test_how_a_prompt_is_cut_into_chunks_changes_no_bit(window: int | None) -> None:
    source = random.Random(0)
    whole = make_case([(0, 150, 0)])
    query, keys, values = tensors(150, 6, 2, 64, 64)
    expected = attend(whole, query, keys, values, window)
    slots = torch.tensor(whole.slots)
    for _ in range(10):
        cuts = [0, *sorted(source.sample(range(1, 150), source.randint(1, 12))), 150]
        for begin, end in itertools.pairwise(cuts):
            segment = Segment(end - begin, slots[:begin], end - begin, ())
            batch = build_batch([segment], torch.arange(begin, end), slots[begin:end], "cpu")
            out = cpu.attention(query[begin:end], keys, values, batch, 64**-0.5, window)
            assert torch.equal(out, expected[begin:end])


def test_where_the_slots_lie_changes_no_bit() -> None:
    case = make_case([(40, 3, 6), (33, 1, 0)])
    query, keys, values = tensors(len(case.slots), 6, 2, 64, 64)
    expected = attend(case, query, keys, values, None)
    order = torch.randperm(len(keys))
    moved_keys, moved_values = torch.empty_like(keys), torch.empty_like(values)
    moved_keys[order], moved_values[order] = keys, values
    case.slots = order[case.slots].tolist()
    case.segments = [Segment(s.num_rows, order[s.context], s.num_chain, s.parents) for s in case.segments]
    assert torch.equal(attend(case, query, moved_keys, moved_values, None), expected)


def test_more_threads_than_work() -> None:
    case = make_case([(3, 1, 0)])
    query, keys, values = tensors(1, 2, 1, 32, 32)
    expected, before = attend(case, query, keys, values, None), torch.get_num_threads()
    torch.set_num_threads(7)
    found = attend(case, query, keys, values, None)
    torch.set_num_threads(before)
    assert torch.equal(found, expected)
