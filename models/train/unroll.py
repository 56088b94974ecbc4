"""A sequential drafter run over whole texts, several depths at a time, as it will run when it serves.

At depth 1 every row sees the model's own state before it. At depth j the state before is the drafter's own of depth
j - 1, and of the rows that it attends to the last j - 1 are of the depths 2 to j: those that a tree has guessed so far.
(The "training-time test" of EAGLE-3, arXiv 2503.01840, section 3.)
"""

from __future__ import annotations

import torch
from torch import Tensor
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
    heads: SequentialHeads, x: Tensor, rotation: tuple[Tensor, Tensor], keys: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """x: [batch, rows, hidden] -> the same. `keys`: K and V of the depths so far, [batch, kv_heads, rows, dim] each."""
    attn, shape = heads.layer.self_attn, heads.shape
    batch, rows, _ = x.shape

    def split(projected: Tensor) -> Tensor:
        return projected.view(batch, rows, -1, shape.head_dim).transpose(1, 2)

    query, key = apply_rotary_pos_emb(split(attn.q_proj(x)), split(attn.k_proj(x)), *rotation)
    keys.append((key, split(attn.v_proj(x))))
    shared = shape.num_heads // shape.num_kv_heads
    query = query.view(batch, shape.num_kv_heads, shared, rows, shape.head_dim) * shape.head_dim**-0.5
    depth = len(keys) - 1
    first_key, first_value = keys[0]
    past = torch.ones(rows, rows, dtype=torch.bool, device=x.device).tril(-depth)
    scores = (query @ first_key[:, :, None].mT).float().masked_fill(~past, -torch.inf)
    later = [(_later(k, depth - i), _later(v, depth - i)) for i, (k, v) in enumerate(keys) if i > 0]
    own = [(query * k[:, :, None]).sum(-1, keepdim=True).float() for k, _ in later]
    weights = torch.cat([scores, *own], -1).softmax(-1).to(query.dtype)
    out = weights[..., :rows] @ first_value[:, :, None]
    for i, (_, value) in enumerate(later):
        out = out + weights[..., rows + i, None] * value[:, :, None]
    merged: Tensor = attn.o_proj(out.view(batch, shape.num_heads, rows, -1).transpose(1, 2).reshape(batch, rows, -1))
    return merged


def _later(x: Tensor, count: int) -> Tensor:
    """Rows (the dimension before the last) moved on by `count`; zeros come first."""
    return x if count == 0 else torch.nn.functional.pad(x[..., : x.shape[-2] - count, :], (0, 0, count, 0))
