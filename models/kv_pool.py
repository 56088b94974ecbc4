"""The memory of the attention layers: keys and values, one token a slot.

Invariants:
- slot 0 is never given out: padding reads it, so it stays zero;
- a slot means the same token in every layer;
- who owns which slot is not known here (the scheduler's allocator knows).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.kernels.gpu import runs_triton

Shape = tuple[int, int, int]  # one layer: (kv_heads, k_dim, v_dim)


class KVPool:
    """K and V of every layer: `keys[layer]` is `[num_slots + 1, kv_heads, k_dim]`, `values[layer]` likewise with v_dim.

    The memory is reserved, not touched: the system gives out a page when its first slot is written.
    """

    def __init__(
        self, shapes: Sequence[Shape], num_slots: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.keys = [torch.empty(num_slots + 1, heads, k_dim, dtype=dtype, device=device) for heads, k_dim, _ in shapes]
        self.values = [
            torch.empty(num_slots + 1, heads, v_dim, dtype=dtype, device=device) for heads, _, v_dim in shapes
        ]
        for rows in (*self.keys, *self.values):
            rows[0].zero_()

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store `key` [rows, kv_heads, k_dim] and `value` [rows, kv_heads, v_dim] at `slots` [rows], none of them 0."""
        keys, values = self.keys[layer], self.values[layer]
        if runs_triton(keys.device):
            from models.kernels.triton_attention import write

            write(keys, values, slots, key, value)
            return
        keys.index_copy_(0, slots, key.to(keys.dtype))
        values.index_copy_(0, slots, value.to(values.dtype))

    @staticmethod
    def bytes_per_token(shapes: Sequence[Shape], dtype: torch.dtype) -> int:
        """Bytes that one slot takes in all layers together."""
        return sum(heads * (k_dim + v_dim) for heads, k_dim, v_dim in shapes) * dtype.itemsize
