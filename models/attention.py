"""Attention over pool slots, and the hook by which an unmodified transformers model calls it.

`tree_attention` is the torch kernel. Another one replaces it by having its signature (`Kernel`): the C kernel, and on a
GPU Triton's.

Invariants:
- the hook holds the batch and the pool only while a step runs, so a model may drop keyword arguments on the way;
- each hook has a name of its own in transformers' registry: several models live side by side.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from models.batch import Batch, Group
from models.kernels import cpu
from models.kernels.gpu import runs_triton
from models.kv_pool import KVPool


class Scoring(NamedTuple):
    """How a layer makes weights of the products of queries and keys."""

    scaling: float
    window: int | None = None  # a key is visible iff query position - key position < window
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    sinks: Tensor | None = (
        None  # [heads]; one more logit per head that takes its share of the softmax and gives nothing
    )


class Kernel(Protocol):
    """What a layer runs: all rows of a step at once, their own K and V already in the pool."""

    def __call__(
        self,
        query: Tensor,  # [rows, heads, k_dim]
        keys: Tensor,  # [slots, kv_heads, k_dim]
        values: Tensor,  # [slots, kv_heads, v_dim]
        batch: Batch,
        scoring: Scoring,
    ) -> Tensor: ...  # [rows, heads, v_dim]


def tree_attention(query: Tensor, keys: Tensor, values: Tensor, batch: Batch, scoring: Scoring) -> Tensor:
    """The torch kernel: correct everywhere, and the truth for the others."""
    out = query.new_empty(len(query), query.shape[1], values.shape[2])
    for group in batch.groups:
        if group.is_whole:
            return _attend_group(query, keys, values, group, scoring)
        padded = _attend_group(query.index_select(0, group.rows), keys, values, group, scoring)
        out.index_copy_(0, group.packed, padded.index_select(0, group.places))
    return out


def c_attention(query: Tensor, keys: Tensor, values: Tensor, batch: Batch, scoring: Scoring) -> Tensor:
    """The C kernel, for float32 queries on a CPU; what it does not know goes to torch."""
    if scoring.softcap is not None or scoring.sinks is not None or not cpu.can_attend(keys, values, query.shape[1]):
        return tree_attention(query, keys, values, batch, scoring)
    return cpu.attention(query, keys, values, batch, scoring.scaling, scoring.window)


def kernel_for(device: torch.device) -> Kernel:
    """What suits a device that computes as the model's own code does."""
    if not runs_triton(device):
        return tree_attention
    from models.kernels.triton_attention import attention

    return attention


def _attend_group(query: Tensor, keys: Tensor, values: Tensor, group: Group, scoring: Scoring) -> Tensor:
    """[B * T, heads, k_dim] -> [B * T, heads, v_dim]. The query heads of one kv head become rows of one product."""
    size, height, width = group.visible.shape
    kv_heads, k_dim = keys.shape[1:]
    shared = query.shape[1] // kv_heads
    q = query.view(size, height, kv_heads, shared, k_dim).permute(0, 2, 3, 1, 4)
    q = q.reshape(size, kv_heads, shared * height, k_dim)
    k = keys.index_select(0, group.keys).to(q.dtype).view(size, width, kv_heads, k_dim).transpose(1, 2)
    v = values.index_select(0, group.keys).to(q.dtype).view(size, width, kv_heads, -1).transpose(1, 2)
    bias = group.bias(scoring.window, q.dtype, shared)
    if scoring.softcap is None and scoring.sinks is None:
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scoring.scaling)
    else:
        out = _weights(q @ k.mT * scoring.scaling, bias, scoring) @ v
    out = out.view(size, kv_heads, shared, height, -1).permute(0, 3, 1, 2, 4)
    return out.reshape(size * height, query.shape[1], -1)


def _weights(scores: Tensor, bias: Tensor, scoring: Scoring) -> Tensor:
    """[B, kv_heads, shared * T, K], scaled -> the same shape (source: the eager attention of Gemma 2 and gpt-oss)."""
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    scores = scores + bias
    if scoring.sinks is None:
        return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)
    size, kv_heads, num_rows, width = scores.shape
    sinks = scoring.sinks.to(scores.dtype).view(kv_heads, -1, 1)
    sinks = sinks.expand(-1, -1, num_rows // sinks.shape[1]).reshape(1, kv_heads, num_rows, 1)
    scores = torch.cat([scores, sinks.expand(size, -1, -1, -1)], -1)
    return scores.softmax(-1, dtype=torch.float32)[..., :width].to(scores.dtype)


class PagedTreeAttention:
    """The attention function of one model. transformers knows it by `name`, which is its own."""

    _serials = itertools.count()

    def __init__(self, kernel: Kernel = tree_attention) -> None:
        self.name = f"medusa_tree_{next(self._serials)}"
        self.kernel = kernel
        self.scorings: dict[int, Scoring] = {}  # of each layer, as it last called
        self._step: tuple[Batch, KVPool] | None = None
        AttentionInterface.register(self.name, self.attend)

    @contextmanager
    def step(self, batch: Batch, pool: KVPool) -> Iterator[None]:
        """Run the model inside: its layers then write to and read from `pool` as `batch` says."""
        self._step = batch, pool
        try:
            yield
        finally:
            self._step = None

    def attend(
        self,
        module: nn.Module,
        query: Tensor,  # [1, heads, rows, k_dim]
        key: Tensor,  # [1, kv_heads, rows, k_dim]
        value: Tensor,  # [1, kv_heads, rows, v_dim]
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: object,  # the probe at load has refused a model that says anything else that matters
    ) -> tuple[Tensor, None]:
        """What each attention layer calls, positions already in K. Returns [1, rows, heads, v_dim] and no weights."""
        assert self._step is not None
        assert attention_mask is None
        batch, pool = self._step
        layer: int = module.layer_idx  # type: ignore[assignment]
        pool.write(layer, batch.slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
        scoring = Scoring(
            query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window or None, softcap, s_aux
        )
        self.scorings[layer] = scoring
        return self.kernel(query[0].transpose(0, 1), pool.keys[layer], pool.values[layer], batch, scoring)[None], None
