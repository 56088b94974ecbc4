"""The pool: what is written is read, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from models.kv_pool import KVPool

SHAPES = [(2, 4, 6), (1, 3, 3)]


def test_write_touches_its_slots_in_its_layer_only() -> None:
    pool = KVPool(SHAPES, 9, dtype=torch.float32, device="cpu")
    for rows in (*pool.keys, *pool.values):
        rows.fill_(-1)
    key, value = torch.randn(3, 2, 4), torch.randn(3, 2, 6)
    pool.write(0, torch.tensor([7, 1, 4]), key, value)
    assert torch.equal(pool.keys[0][[7, 1, 4]], key)
    assert torch.equal(pool.values[0][[7, 1, 4]], value)
    others = [0, 2, 3, 5, 6, 8, 9]
    assert (pool.keys[0][others] == -1).all()
    assert (pool.values[0][others] == -1).all()
    assert (pool.keys[1] == -1).all()
    assert (pool.values[1] == -1).all()


def test_shapes_and_the_padding_slot() -> None:
    pool = KVPool(SHAPES, 9, dtype=torch.bfloat16, device="cpu")
    assert [tuple(rows.shape) for rows in pool.keys] == [(10, 2, 4), (10, 1, 3)]
    assert [tuple(rows.shape) for rows in pool.values] == [(10, 2, 6), (10, 1, 3)]
    assert all((rows[0] == 0).all() for rows in (*pool.keys, *pool.values))


def test_write_rounds_to_the_type_of_the_pool() -> None:
    pool = KVPool(SHAPES, 2, dtype=torch.bfloat16, device="cpu")
    key, value = torch.randn(1, 2, 4), torch.randn(1, 2, 6)
    pool.write(0, torch.tensor([2]), key, value)
    assert torch.equal(pool.keys[0][2:], key.bfloat16())
    assert torch.equal(pool.values[0][2:], value.bfloat16())


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_per_token(dtype: torch.dtype, size: int) -> None:
    pool = KVPool(SHAPES, 9, dtype=dtype, device="cpu")
    assert KVPool.bytes_per_token(SHAPES, dtype) == (2 * 10 + 6) * size
    assert sum(rows.nbytes for rows in (*pool.keys, *pool.values)) == 10 * KVPool.bytes_per_token(SHAPES, dtype)
