"""The torch kernel on random ragged batches, against its definition; what the C kernel does and what it leaves."""

from __future__ import annotations

import random

import pytest
import torch
from ragged import NUM_SLOTS, by_definition, make_case, tensors
from torch import nn
from transformers import AttentionInterface

from models.attention import PagedTreeAttention, Scoring, c_attention, tree_attention
from models.batch import KEY_BLOCK, Segment, build_batch
from models.kernels import cpu
from models.kv_pool import KVPool

RAGGED = {
    "one decode": [(50, 1, 0)],
    "first token": [(0, 1, 0)],
    "prompt": [(0, 70, 0)],
    "chunk after context": [(40, 33, 0)],
    "equal trees": [(30, 1, 5), (30, 1, 5)],
    "ragged trees": [(30, 1, 5), (7, 1, 0), (63, 1, 9), (64, 1, 2), (0, 1, 3)],
    "chunk with a tree": [(20, 6, 7), (5, 2, 1)],
    "everything": [(600, 1, 4), (3, 90, 0), (0, 5, 5), (700, 1, 0), (150, 1, 12), (149, 2, 0), (0, 200, 0)],
}
SINKS = torch.tensor([-1.0, 0.5, 2.0, 0.0, 1.0, 3.0])
SCORINGS = {
    "plain": Scoring(0.25),
    "window": Scoring(0.25, window=4),
    "wide window": Scoring(0.25, window=40),
    "softcap": Scoring(0.25, softcap=0.7),
    "sinks": Scoring(0.25, sinks=SINKS),
    "all": Scoring(0.4, 9, 1.5, SINKS),
}


@pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS)
@pytest.mark.parametrize("sizes", RAGGED.values(), ids=RAGGED)
def test_against_the_definition(sizes: list[tuple[int, int, int]], scoring: Scoring) -> None:
    case = make_case(sizes)
    query, keys, values = tensors(len(case.slots))
    out = tree_attention(query, keys, values, case.batch, scoring)
    expected = by_definition(query, keys, values, case, scoring)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "k_dim", "v_dim"), [(4, 4, 8, 8), (8, 1, 16, 16), (9, 3, 64, 64), (4, 2, 16, 24)]
)
def test_head_shapes(heads: int, kv_heads: int, k_dim: int, v_dim: int) -> None:
    case = make_case(RAGGED["ragged trees"])
    query, keys, values = tensors(len(case.slots), heads, kv_heads, k_dim, v_dim)
    out = tree_attention(query, keys, values, case.batch, Scoring(0.2))
    expected = by_definition(query, keys, values, case, Scoring(0.2))
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS)
def test_half_precision(dtype: torch.dtype, scoring: Scoring) -> None:
    case = make_case(RAGGED["everything"])
    query, keys, values = (tensor.to(dtype) for tensor in tensors(len(case.slots)))
    out = tree_attention(query, keys, values, case.batch, scoring)
    assert out.dtype == dtype
    expected = by_definition(query, keys, values, case, scoring)
    torch.testing.assert_close(out.double(), expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("seed", range(30))
def test_random_batches(seed: int) -> None:
    source = random.Random(seed)
    sizes = [
        (source.choice([0, 1, 17, 64, 300]), source.choice([1, 1, 2, 30]), source.choice([0, 3, 8]))
        for _ in range(source.randint(1, 7))
    ]
    case = make_case(sizes, seed)
    query, keys, values = tensors(len(case.slots))
    scoring = source.choice(list(SCORINGS.values()))
    assert all(group.visible.any(-1).all() for group in case.batch.groups)  # padding rows too, or softmax gives NaN
    out = tree_attention(query, keys, values, case.batch, scoring)
    torch.testing.assert_close(out.double(), by_definition(query, keys, values, case, scoring), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS)
def test_c_attention_does_everything_that_torch_does(scoring: Scoring, dtype: torch.dtype) -> None:
    case = make_case(RAGGED["everything"])
    query, keys, values = tensors(len(case.slots))
    keys, values = keys.to(dtype), values.to(dtype)
    out = c_attention(query, keys, values, case.batch, scoring)
    torch.testing.assert_close(out.double(), by_definition(query, keys, values, case, scoring), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "k_dim", "v_dim", "dtype"),
    [
        (4, 2, 8, 8, torch.float32),
        (4, 2, 16, 24, torch.float32),
        (2, 1, 272, 272, torch.float32),
        (65, 1, 16, 16, torch.float32),
        (4, 2, 16, 16, torch.bfloat16),
    ],
)
def test_c_attention_leaves_to_torch_what_the_kernel_does_not_know(
    heads: int, kv_heads: int, k_dim: int, v_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "call", None)
    case = make_case(RAGGED["ragged trees"])
    query, keys, values = tensors(len(case.slots), heads, kv_heads, k_dim, v_dim)
    keys, values = keys.to(dtype), values.to(dtype)
    out = c_attention(query, keys, values, case.batch, Scoring(0.2))
    expected = by_definition(query, keys, values, case, Scoring(0.2))
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_rows_do_not_depend_on_the_other_segments() -> None:
    """Bit for bit where the group is as wide as before: same order of sums."""
    case = make_case([(50, 1, 4), (60, 1, 4), (40, 1, 4), (33, 1, 4)])
    query, keys, values = tensors(len(case.slots), 9, 3, 64, 64)
    together = tree_attention(query, keys, values, case.batch, Scoring(0.125))
    assert len(case.batch.groups) == 1
    for start, segment in zip(range(0, 20, 5), case.segments, strict=True):
        rows = slice(start, start + 5)
        alone = build_batch([segment], torch.tensor(case.positions[rows]), torch.tensor(case.slots[rows]), "cpu")
        assert torch.equal(tree_attention(query[rows], keys, values, alone, Scoring(0.125)), together[rows])


def test_padding_is_bounded() -> None:
    source = random.Random(0)
    sizes = [(source.randrange(1000), 1, 4) for _ in range(64)] + [(500, 256, 0)]
    segments = [
        Segment(chain + nodes, torch.ones(n, dtype=torch.int64), chain, (-1,) * nodes) for n, chain, nodes in sizes
    ]
    num_rows = sum(segment.num_rows for segment in segments)
    batch = build_batch(
        segments, torch.zeros(num_rows, dtype=torch.int64), torch.ones(num_rows, dtype=torch.int64), "cpu"
    )
    real = sum(segment.num_rows * (len(segment.context) + segment.num_rows) for segment in segments)
    assert sum(group.visible.numel() for group in batch.groups) < 1.3 * real
    assert len(batch.groups) < 24


def test_a_group_of_like_segments_needs_no_shuffling() -> None:
    batch = make_case(RAGGED["equal trees"]).batch
    assert [group.is_whole for group in batch.groups] == [True]
    assert batch.groups[0].visible.shape == (2, 6, KEY_BLOCK)


def test_hook_writes_then_attends() -> None:
    case = make_case([(0, 3, 2)])
    hook = PagedTreeAttention()
    assert AttentionInterface._global_mapping[hook.name] == hook.attend
    pool = KVPool([(2, 8, 8), (2, 8, 8)], NUM_SLOTS, dtype=torch.float32, device="cpu")
    layer = nn.Module()
    layer.layer_idx = 1
    query, key, value = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    with hook.step(case.batch, pool):
        out, weights = hook.attend(layer, query, key, value, None)
    assert weights is None
    assert torch.equal(pool.keys[1][case.slots], key[0].transpose(0, 1))
    expected = by_definition(query[0].transpose(0, 1), pool.keys[1], pool.values[1], case, Scoring(8**-0.5))
    torch.testing.assert_close(out[0].double(), expected, atol=1e-5, rtol=1e-5)


def test_hook_holds_nothing_after_a_step_that_failed() -> None:
    hook = PagedTreeAttention()
    pool = KVPool([(2, 8, 8)], 3, dtype=torch.float32, device="cpu")
    with pytest.raises(KeyError), hook.step(make_case([(0, 1, 0)]).batch, pool):
        raise KeyError
    with pytest.raises(AssertionError):
        hook.attend(nn.Module(), torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), None)


def test_each_hook_has_its_own_name() -> None:
    assert PagedTreeAttention().name != PagedTreeAttention().name
