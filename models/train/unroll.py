"""A sequential drafter run over whole texts, several depths at a time, as it will run when it serves.

At depth 1 every row sees the model's own state before it. At depth j the state before is the drafter's own of depth
j - 1, and of the rows that it attends to the last j - 1 are of the depths 2 to j: those that a tree has guessed so far.
(The "training-time test" of EAGLE-3, arXiv 2503.01840, section 3.)
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from models.drafters.sequential import SequentialHeads


def unroll(heads: SequentialHeads, tokens: Tensor, states: Tensor, depths: int) -> list[Tensor]:
    """States that enter the LM head at each depth: `depths` times [batch, rows, hidden].

    tokens: [batch, rows]; states: [batch, rows, hidden], the model's own *before* each token. Row p of depth j guesses
    the token behind tokens[:, p], knowing those up to it, and the model's states up to that before
    tokens[:, p - j + 1]; it means nothing for p < j - 1.
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None] + 1
    rotation = heads.rotary(states, positions)
    keys: list[tuple[Tensor, Tensor]] = []
    found: list[Tensor] = []
    for depth in range(depths):
        x = heads.inputs(tokens, states)
        x = x + _attend(heads, heads.layer.input_layernorm(x), rotation, keys)
        x = x + heads.layer.mlp(heads.layer.post_attention_layernorm(x))
        found.append(heads.norm(x).float())
        states = _later(found[depth], 1)
    return found


def _attend(
    heads: SequentialHeads, x: Tensor, rotation: tuple[Tensor, Tensor], past: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """x: [batch, rows, hidden] -> the same. `past`: K and V of the depths so far, [batch, heads, rows, dim] each."""
    attn, shape = heads.layer.self_attn, heads.shape
    batch, rows, _ = x.shape

    def split(projected: Tensor) -> Tensor:
        return projected.view(batch, rows, -1, shape.head_dim).transpose(1, 2)

    query, key = apply_rotary_pos_emb(split(attn.q_proj(x)), split(attn.k_proj(x)), *rotation)
    shared = shape.num_heads // shape.num_kv_heads
    value = split(attn.v_proj(x))
    past.append((key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)))
    keys, values = (torch.cat(parts, 2) for parts in zip(*past, strict=True))
    out = functional.scaled_dot_product_attention(
        query.to(value.dtype), keys.to(value.dtype), values, attn_mask=_visible(rows, len(past), x.device)
    )
    merged: Tensor = attn.o_proj(out.transpose(1, 2).reshape(batch, rows, -1))
    return merged


@lru_cache(maxsize=256)
def _visible(rows: int, depths: int, device: torch.device) -> Tensor:
    """Which rows of depths 1, 2, ... a row of the last depth sees: [rows, depths * rows] bool.

    Of depth 1 those up to the root, which lies `depths` - 1 rows back; of each later one the row on the path below it.
    """
    first = torch.ones(rows, rows, dtype=torch.bool, device=device).tril(1 - depths)
    later = [torch.ones(rows, device=device).diag(i + 1 - depths)[:rows, :rows].bool() for i in range(1, depths)]
    visible = torch.cat([first, *(part[:, :rows] for part in later)], 1)
    visible[: depths - 1, -rows:] = torch.eye(rows, dtype=torch.bool, device=device)[: depths - 1]  # these mean nothing
    return visible


def _later(x: Tensor, count: int) -> Tensor:
    """Rows (the dimension before the last) moved on by `count`; zeros come first."""
    return x if count == 0 else functional.pad(x[..., : x.shape[-2] - count, :], (0, 0, count, 0))
