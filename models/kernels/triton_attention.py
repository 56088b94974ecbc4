"""Attention of a step's rows over pool slots, and writing the pool, in Triton: for GPUs.

One program computes a tile (rows of one segment, with all query heads that share a kv head) over one span of its keys,
as FlashAttention does (Dao et al. 2022); spans of a long context are computed side by side and put together afterwards
(Flash-Decoding, Dao et al. 2023). The truth is `models.attention.tree_attention`.

Invariants:
- spans begin at fixed places, so what a row's sums are does not depend on how long other contexts are;
- a row sees its context, the chain up to itself, its ancestors and itself; a node's ancestors are the bits of a number,
  so a tree has at most 64 nodes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from models.attention import Scoring
    from models.batch import Batch

MAX_NODES: Final = 64
SPAN: Final = 1024  # keys of one program
MIN_TILE: Final = 16  # a tensor core takes no fewer
MAX_TILE: Final = 64  # queries of one program, if no more heads share a kv head
KEYS_AT_A_TIME: Final = 32


@triton.jit
def _attend(
    query,  # [rows, heads, K_DIM]
    keys,  # [slots, kv_heads, K_DIM]
    values,  # [slots, kv_heads, V_DIM]
    out,  # [spans, rows, heads, V_DIM]; of a row's spans each is a mean of its own
    sums,  # [spans, rows, heads]: logarithm of the sum of their weights
    tiles,  # [tiles, 6] int64: place in `table`, context length, chain rows, all rows, first packed row, first row
    table,  # slots of contexts and chains
    slots,  # [rows]
    positions,  # [rows]
    ancestors,  # [rows] int64: bit n of a node is its segment's node n, if that is the node's ancestor or itself
    sinks,  # [heads]
    scaling,
    softcap,
    window,
    num_rows,
    query_row,  # strides
    query_head,
    SHARED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_WIDTH: tl.constexpr,  # dims up to a power of 2
    V_WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
    SPAN_KEYS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, kv_head, span = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    fields = tiles + tile * 6
    place, num_context, num_chain = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2)
    num_segment, packed, first = tl.load(fields + 3), tl.load(fields + 4), tl.load(fields + 5)
    num_listed, num_nodes = num_context + num_chain, num_segment - num_chain
    beyond = tl.minimum(first + TILE // SHARED, num_segment)  # the row behind the tile's last one
    end = tl.where(beyond <= num_chain, num_context + beyond, num_listed + num_nodes)  # no row sees a key from there on
    start = span * SPAN_KEYS
    if start >= end:
        return

    lanes = tl.arange(0, TILE)
    row, head = first + lanes // SHARED, kv_head * SHARED + lanes % SHARED
    is_row = (row < beyond) & (lanes < TILE // SHARED * SHARED)
    at = packed + row  # packed rows
    k_dims, v_dims = tl.arange(0, K_WIDTH), tl.arange(0, V_WIDTH)
    q = tl.load(
        query + at[:, None] * query_row + head[:, None] * query_head + k_dims[None, :],
        mask=is_row[:, None] & (k_dims < K_DIM)[None, :],
        other=0.0,
    )  # [TILE, K_WIDTH]
    sees = tl.load(ancestors + at, mask=is_row, other=0)
    position = tl.load(positions + at, mask=is_row, other=0)

    top = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    if HAS_SINKS:  # noqa: SIM102  (one is known to the compiler, the other is not)
        if span == 0:  # one more key of the first span, which gives nothing
            top = tl.load(sinks + head, mask=is_row, other=0.0).to(tl.float32)
            total += 1.0
    mean = tl.zeros([TILE, V_WIDTH], tl.float32)
    for key in range(start, tl.minimum(start + SPAN_KEYS, end), KEYS):
        n = key + tl.arange(0, KEYS)
        is_listed, node = n < num_listed, n - num_listed
        is_node = (node >= 0) & (node < num_nodes)
        of_node = packed + num_chain + node
        slot = tl.load(table + place + n, mask=is_listed, other=0) + tl.load(slots + of_node, mask=is_node, other=0)
        visible = is_listed[None, :] & (n[None, :] - num_context <= row[:, None])
        bits = (sees[:, None] >> tl.maximum(node, 0)[None, :]) & 1
        visible = visible | (is_node[None, :] & (bits == 1))
        if HAS_WINDOW:
            key_position = tl.where(is_node, tl.load(positions + of_node, mask=is_node, other=0), n)
            visible = visible & (position[:, None] - key_position[None, :] < window)
        is_key = (is_listed | is_node)[:, None]
        pair = slot * KV_HEADS + kv_head
        k = tl.load(keys + pair[:, None] * K_DIM + k_dims[None, :], mask=is_key & (k_dims < K_DIM)[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION) * scaling  # [TILE, KEYS]
        if HAS_SOFTCAP:
            small = tl.exp(-2 * tl.abs(scores) / softcap)
            size = softcap * (1 - small) / (1 + small)  # tanh
            scores = tl.where(scores < 0, -size, size)
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weights, faded = tl.exp(scores - level[:, None]), tl.exp(top - level)
        v = tl.load(
            values + pair[:, None] * V_DIM + v_dims[None, :], mask=is_key & (v_dims < V_DIM)[None, :], other=0.0
        )
        mean = mean * faded[:, None] + tl.dot(weights.to(q.dtype), v.to(q.dtype), input_precision=PRECISION)
        total = total * faded + tl.sum(weights, 1)
        top = higher
    total = tl.where(total == 0.0, 1.0, total)  # of a row that sees nothing here
    mean = mean / total[:, None]
    result = (span * num_rows + at) * (KV_HEADS * SHARED) + head
    tl.store(
        out + result[:, None] * V_DIM + v_dims[None, :],
        mean.to(out.dtype.element_ty),
        mask=is_row[:, None] & (v_dims < V_DIM)[None, :],
    )
    tl.store(sums + result, top + tl.log(total), mask=is_row)


@triton.jit
def _join(
    parts,  # [spans, results, V_DIM]
    sums,  # [spans, results]: logarithm of a part's weight; -inf where there is none
    out,  # [results, V_DIM]
    num_spans,
    num_results,
    V_DIM: tl.constexpr,
    V_WIDTH: tl.constexpr,
):
    result, dims = tl.program_id(0), tl.arange(0, V_WIDTH)
    top = tl.load(sums + result)
    for span in range(1, num_spans):
        top = tl.maximum(top, tl.load(sums + span * num_results + result))
    mean, total = tl.zeros([V_WIDTH], tl.float32), 0.0
    for span in range(num_spans):
        at = span * num_results + result
        weight = tl.exp(tl.load(sums + at) - top)
        part = tl.load(parts + at * V_DIM + dims, mask=dims < V_DIM, other=0.0)
        mean += weight * tl.where(weight > 0.0, part, 0.0)  # what is no part was never written
        total += weight
    tl.store(out + result * V_DIM + dims, (mean / total).to(out.dtype.element_ty), mask=dims < V_DIM)


@triton.jit
def _write(
    key,  # [rows, kv_heads, K_DIM]
    value,  # [rows, kv_heads, V_DIM]
    keys,  # [slots, kv_heads, K_DIM]
    values,
    slots,  # [rows]
    key_row,  # strides
    key_head,
    value_row,
    value_head,
    KV_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row)
    pair = slot * KV_HEADS + head
    k_dims, v_dims = tl.arange(0, K_WIDTH), tl.arange(0, V_WIDTH)
    k = tl.load(key + row * key_row + head * key_head + k_dims, mask=k_dims < K_DIM)
    v = tl.load(value + row * value_row + head * value_head + v_dims, mask=v_dims < V_DIM)
    tl.store(keys + pair * K_DIM + k_dims, k.to(keys.dtype.element_ty), mask=(k_dims < K_DIM) & (slot > 0))
    tl.store(values + pair * V_DIM + v_dims, v.to(values.dtype.element_ty), mask=(v_dims < V_DIM) & (slot > 0))


class Tables(NamedTuple):
    """What `_attend` reads of a step, on the host, and what decides the size of its grid."""

    tiles: NDArray[np.int64]  # [tiles, 6]
    ancestors: NDArray[np.int64]  # [rows]
    table: NDArray[np.int64]  # [keys of contexts and chains]
    num_spans: int
    width: int  # queries of a tile


class Tiles(NamedTuple):
    """The same on the device."""

    tiles: Tensor
    ancestors: Tensor
    table: Tensor
    num_spans: int
    width: int


def attention(query: Tensor, keys: Tensor, values: Tensor, batch: Batch, scoring: Scoring) -> Tensor:
    """A `models.attention.Kernel`."""
    num_rows, num_heads, k_dim = query.shape
    kv_heads, v_dim = values.shape[1:]
    shared = num_heads // kv_heads
    laid = batch.remember(("tiles", shared), lambda: lay_out(batch, shared))
    is_split = laid.num_spans > 1
    out = query.new_empty(num_rows, num_heads, v_dim)
    parts = query.new_empty(laid.num_spans, *out.shape, dtype=torch.float32) if is_split else out
    size = laid.num_spans, num_rows, num_heads
    sums = torch.full(size, -torch.inf, device=query.device) if is_split else query.new_empty(size, dtype=torch.float32)
    query = query if query.stride(2) == 1 else query.contiguous()
    _attend[len(laid.tiles), kv_heads, laid.num_spans](
        query,
        keys,
        values,
        parts,
        sums,
        laid.tiles,
        laid.table,
        batch.slots,
        batch.positions,
        laid.ancestors,
        sums if scoring.sinks is None else scoring.sinks,
        scoring.scaling,
        scoring.softcap or 1.0,
        scoring.window or 0,
        num_rows,
        query.stride(0),
        query.stride(1),
        SHARED=shared,
        KV_HEADS=kv_heads,
        K_DIM=k_dim,
        V_DIM=v_dim,
        K_WIDTH=_width(k_dim),
        V_WIDTH=_width(v_dim),
        TILE=laid.width,
        KEYS=KEYS_AT_A_TIME,
        SPAN_KEYS=SPAN,
        HAS_SOFTCAP=scoring.softcap is not None,
        HAS_WINDOW=scoring.window is not None,
        HAS_SINKS=scoring.sinks is not None,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
    )
    if is_split:
        results = num_rows * num_heads
        _join[(results,)](parts, sums, out, laid.num_spans, results, V_DIM=v_dim, V_WIDTH=_width(v_dim))
    return out


def write(keys: Tensor, values: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """Store `key` [rows, kv_heads, k_dim] and `value` at `slots` [rows] of one layer's pool, but nothing at slot 0."""
    rows, kv_heads, k_dim = key.shape
    v_dim = value.shape[2]
    key, value = (each if each.stride(2) == 1 else each.contiguous() for each in (key, value))
    strides = key.stride(0), key.stride(1), value.stride(0), value.stride(1)
    widths = {"K_DIM": k_dim, "V_DIM": v_dim, "K_WIDTH": _width(k_dim), "V_WIDTH": _width(v_dim)}
    _write[rows, kv_heads](key, value, keys, values, slots, *strides, KV_HEADS=kv_heads, **widths)


def lay_out(batch: Batch, shared: int) -> Tiles:
    """Cut segments into tiles. `shared`: query heads of each kv head.

    Nothing is asked of the device, so nothing waits for it, and all tables go there in one copy.
    """
    most = max(segment.num_rows for segment in batch.segments) * shared
    found = tables(batch, shared, max(least_width(shared), min(power(most), MAX_TILE)))
    parts = found.tiles.reshape(-1), found.ancestors, found.table
    flat = torch.from_numpy(np.concatenate(parts)).to(batch.slots.device, non_blocking=True)
    tiles, ancestors, table = flat.split_with_sizes(list(map(len, parts)))
    return Tiles(tiles.view(-1, 6), ancestors, table, found.num_spans, found.width)


def tables(batch: Batch, shared: int, width: int) -> Tables:
    """Of tiles of `width` queries."""
    height, slots = width // shared, batch.on_host[1].numpy()
    tiles: list[tuple[int, ...]] = []
    ancestors: list[int] = []
    listed, place, packed, longest = [], 0, 0, 0
    for segment in batch.segments:
        num_context, num_chain = len(segment.context), segment.num_chain
        sizes = place, num_context, num_chain, segment.num_rows, packed
        tiles += [(*sizes, first) for first in range(0, segment.num_rows, height)]
        ancestors += [0] * num_chain
        ancestors += _bits(segment.parents)
        listed += [segment.context.numpy(), slots[packed : packed + num_chain]]
        place, packed = place + num_context + num_chain, packed + segment.num_rows
        longest = max(longest, num_context + segment.num_rows)
    arrays = np.array(tiles, dtype=np.int64), np.array(ancestors, dtype=np.int64), np.concatenate(listed)
    return Tables(*arrays, -(-longest // SPAN), width)


def least_width(shared: int) -> int:
    """Queries of the smallest tile."""
    return max(power(shared), MIN_TILE)


@lru_cache(maxsize=4096)
def _bits(parents: tuple[int, ...]) -> tuple[int, ...]:
    """Of each node a signed 64-bit number: bit n is set if node n is the node's ancestor or itself."""
    assert len(parents) <= MAX_NODES
    seen: list[int] = []
    for node, parent in enumerate(parents):
        seen.append((seen[parent] if parent >= 0 else 0) | 1 << node)
    return tuple(bits - (bits >> 63 << 64) for bits in seen)


def _width(dim: int) -> int:
    """Dims that a program works on."""
    return max(power(dim), MIN_TILE)


def power(size: int) -> int:
    """The power of 2 that is not less."""
    return 1 << (size - 1).bit_length()
