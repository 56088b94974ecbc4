"""What lies between the matrix products of a layer of the common shape, in Triton: for GPUs.

Each of the three kernels replaces a chain of small torch operations, whose launches are most of a small model's step.
The truth is transformers' own code (`LlamaRMSNorm`, `apply_rotary_pos_emb`, `LlamaMLP`). Values are rounded to the
model's dtype where that code rounds them, but for the rotation, which is rounded once.

Invariant: a row's results do not depend on the other rows.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.triton_attention import power

INNER_AT_A_TIME: Final = 1024


@triton.jit
def _add_norm(
    x,  # [rows, SIZE]
    delta,  # the same
    weight,  # [SIZE]
    summed,  # [rows, SIZE]: x + delta
    normed,  # [rows, SIZE]
    epsilon,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,  # SIZE up to a power of 2
    HAS_DELTA: tl.constexpr,
):
    lanes = tl.arange(0, WIDTH)
    inside, at = lanes < SIZE, tl.program_id(0).to(tl.int64) * SIZE + lanes
    value = tl.load(x + at, mask=inside, other=0.0)
    if HAS_DELTA:
        value = (value.to(tl.float32) + tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)).to(value.dtype)
        tl.store(summed + at, value, mask=inside)
    wide = value.to(tl.float32)
    scaled = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + epsilon)).to(value.dtype)
    factor = tl.load(weight + lanes, mask=inside, other=0.0)
    tl.store(normed + at, scaled * factor, mask=inside)


@triton.jit
def _place(
    qkv,  # [rows, (HEADS + KV_HEADS) * DIM + KV_HEADS * DIM]
    query,  # [rows, HEADS, DIM]
    keys,  # [slots, KV_HEADS, DIM]
    values,  # the same
    norms,  # [2, DIM], of Q and of K
    cosines,  # [positions, TURNED] float32
    sines,
    positions,  # [rows]
    slots,  # [rows]
    epsilon,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TURNED: tl.constexpr,  # dims that are rotated: the first ones; 0 for none
    WIDTH: tl.constexpr,  # DIM up to a power of 2
    HAS_NORM: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    dims = tl.arange(0, WIDTH)
    inside = dims < DIM
    start = (row.to(tl.int64) * (HEADS + 2 * KV_HEADS) + head) * DIM
    x = tl.load(qkv + start + dims, mask=inside, other=0.0)
    slot = tl.load(slots + row)
    if head >= HEADS + KV_HEADS:
        pair = slot * KV_HEADS + head - HEADS - KV_HEADS
        tl.store(values + pair * DIM + dims, x.to(values.dtype.element_ty), mask=inside & (slot > 0))
    else:
        other = tl.where(dims < TURNED // 2, dims + TURNED // 2, dims - TURNED // 2)  # what a dim is rotated with
        is_turned = dims < TURNED
        y = tl.load(qkv + start + other, mask=is_turned, other=0.0)
        if HAS_NORM:
            wide, norm = x.to(tl.float32), norms + (head >= HEADS).to(tl.int32) * DIM
            root = tl.rsqrt(tl.sum(wide * wide, 0) / DIM + epsilon)
            x = (wide * root).to(x.dtype) * tl.load(norm + dims, mask=inside, other=0.0)
            y = (y.to(tl.float32) * root).to(y.dtype) * tl.load(norm + other, mask=is_turned, other=0.0)
        if TURNED > 0:
            place = tl.load(positions + row) * TURNED + dims
            cosine = tl.load(cosines + place, mask=is_turned, other=1.0)
            sine = tl.load(sines + place, mask=is_turned, other=0.0)
            sine = tl.where(dims < TURNED // 2, -sine, sine)
            x = (x.to(tl.float32) * cosine + y.to(tl.float32) * sine).to(x.dtype)
        if head < HEADS:
            tl.store(query + (row.to(tl.int64) * HEADS + head) * DIM + dims, x, mask=inside)
        else:
            pair = slot * KV_HEADS + head - HEADS
            tl.store(keys + pair * DIM + dims, x.to(keys.dtype.element_ty), mask=inside & (slot > 0))


@triton.jit
def _gated(
    gate_up,  # [rows, 2 * INNER]: the gate's outputs, then the others
    out,  # [rows, INNER]
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row, lanes = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside, at = lanes < INNER, row * 2 * INNER + lanes
    gate = tl.load(gate_up + at, mask=inside, other=0.0)
    up = tl.load(gate_up + at + INNER, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    tl.store(out + row * INNER + lanes, (wide / (1 + tl.exp(-wide))).to(gate.dtype) * up, mask=inside)


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x + delta, and that divided by its root mean square, times `weight`: [rows, hidden] all but `weight`."""
    rows, size = x.shape
    normed = torch.empty_like(x)
    summed = x if delta is None else torch.empty_like(x)
    others = x if delta is None else delta
    widths = {"SIZE": size, "WIDTH": power(size), "HAS_DELTA": delta is not None}
    _add_norm[(rows,)](x, others, weight, summed, normed, epsilon, **widths)
    return summed, normed


def place(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    slots: Tensor,
    rotations: tuple[Tensor, Tensor] | None,
    norms: Tensor | None,
    epsilon: float,
) -> Tensor:
    """Write K and V of all rows to one layer's pool and return Q, [rows, heads, dim]; Q and K normed, then rotated.

    qkv: [rows, (heads + 2 * kv_heads) * dim]; keys, values: [slots, kv_heads, dim]; rotations: cosines and sines,
    [positions, dims] float32; norms: [2, dim], of Q and of K. Nothing is written to slot 0.
    """
    rows, (_, kv_heads, dim) = len(qkv), keys.shape
    heads = qkv.shape[1] // dim - 2 * kv_heads
    query = qkv.new_empty(rows, heads, dim)
    cosines, sines = (qkv, qkv) if rotations is None else rotations
    _place[rows, heads + 2 * kv_heads](
        qkv,
        query,
        keys,
        values,
        qkv if norms is None else norms,
        cosines,
        sines,
        positions,
        slots,
        epsilon,
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        TURNED=0 if rotations is None else cosines.shape[1],
        WIDTH=power(dim),
        HAS_NORM=norms is not None,
    )
    return query


def gated(gate_up: Tensor) -> Tensor:
    """SiLU of the first half times the second: [rows, 2 * inner] -> [rows, inner]."""
    rows, inner = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, inner)
    width = min(power(inner), INNER_AT_A_TIME)
    _gated[rows, -(-inner // width)](gate_up, out, INNER=inner, WIDTH=width)
    return out
