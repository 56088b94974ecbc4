"""A sequential drafter: one transformer layer that guesses token after token, each from the one before.

    u_p = W [norm(embedding of x_p); norm(s_{p-1})],   s_p = norm(layer(u)_p),   logits_p = LM head (s_p)

`s_{p-1}` is what enters the model's output embedding at the position before, as the model has computed it for tokens
that are accepted, as the drafter itself has for guesses. The weights are the same at every depth. It is the multi-token
module of DeepSeek-V3 (arXiv 2412.19437, section 2.2) with weights shared over depths as in FastMTP (arXiv 2509.18362),
which is the form of EAGLE, too (arXiv 2401.15077).

Invariants:
- a row's K and V depend on the tokens up to its own: in a slot's memory they are as valid as the model's;
- embedding and LM head are the model's own, frozen; the LM head is cut to the draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from models.attention import Scoring, kernel_for
from models.batch import Batch
from models.drafters.resblock import Accuracies
from models.kv_pool import KVPool
from models.kv_pool import Shape as KVShape


@dataclass(frozen=True)
class Shape:
    """Sizes of a sequential drafter."""

    hidden_size: int
    num_heads: int  # of its attention
    num_kv_heads: int
    head_dim: int
    inner_size: int
    rope_theta: float = 10_000.0
    epsilon: float = 1e-5

    @property
    def kv(self) -> KVShape:
        """Of its layer's K and V."""
        return self.num_kv_heads, self.head_dim, self.head_dim

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=1,
            bos_token_id=None,
            eos_token_id=None,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.inner_size,
            rms_norm_eps=self.epsilon,
            num_hidden_layers=1,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
        )


class SequentialHeads(nn.Module):
    """`embedding`: [vocab, hidden]; `lm_head`: [draft_vocab, hidden]; `num_heads`: tokens guessed one after another.

    `token_ids` and `accuracies` as in `resblock.ResBlockHeads`, accuracies given that the tokens before are right.
    """

    token_ids: Tensor  # [draft_vocab] int64
    lm_head: Tensor
    embedding: Tensor

    def __init__(
        self,
        shape: Shape,
        embedding: Tensor,
        lm_head: Tensor,
        *,
        num_heads: int,
        token_ids: Tensor | None = None,
        accuracies: Accuracies | None = None,
    ) -> None:
        super().__init__()
        config = shape.config()
        self.shape = shape
        self.num_heads = num_heads
        self.accuracies = accuracies
        self.token_norm = LlamaRMSNorm(shape.hidden_size, shape.epsilon)
        self.state_norm = LlamaRMSNorm(shape.hidden_size, shape.epsilon)
        self.input = nn.Linear(2 * shape.hidden_size, shape.hidden_size, bias=False)
        self.layer = LlamaDecoderLayer(config, 0)
        self.norm = LlamaRMSNorm(shape.hidden_size, shape.epsilon)
        self.rotary = LlamaRotaryEmbedding(config)
        ids = torch.arange(len(lm_head)) if token_ids is None else token_ids
        self.register_buffer("token_ids", ids.to(lm_head.device), persistent=False)
        self.register_buffer("lm_head", lm_head.detach(), persistent=False)
        self.register_buffer("embedding", embedding.detach(), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Begin as the model's own head on the state before: the layer adds nothing, the token is not looked at."""
        nn.init.normal_(self.input.weight, std=0.02)
        self.input.weight[:, self.shape.hidden_size :] += torch.eye(self.shape.hidden_size)
        for name, weight in self.layer.named_parameters():
            if weight.dim() == 2:
                nn.init.zeros_(weight) if name.endswith(("o_proj.weight", "down_proj.weight")) else nn.init.normal_(
                    weight, std=self.shape.hidden_size**-0.5
                )

    @property
    def device(self) -> torch.device:
        return self.input.weight.device

    def inputs(self, tokens: Tensor, states: Tensor) -> Tensor:
        """tokens [...] and the states before them [..., hidden] -> what enters the layer, [..., hidden]."""
        embedded = self.token_norm(self.embedding[tokens].to(states.dtype))
        found: Tensor = self.input(torch.cat([embedded, self.state_norm(states)], -1))
        return found

    def step(self, tokens: Tensor, states: Tensor, batch: Batch, pool: KVPool) -> Tensor:
        """One pass over a step's rows, whose K and V go to the only layer of `pool`.

        tokens: [rows]; states: [rows, hidden] before them. Returns [rows, hidden], what enters the LM head.
        """
        layer, dim = self.layer, self.shape.head_dim
        x = self.inputs(tokens, states.to(self.input.weight.dtype))
        normed, attn = layer.input_layernorm(x), layer.self_attn
        rotation = self.rotary(x, batch.positions[None])
        query, key = apply_rotary_pos_emb(
            *(project(normed).view(1, len(x), -1, dim).transpose(1, 2) for project in (attn.q_proj, attn.k_proj)),
            *rotation,
        )
        pool.write(0, batch.slots, key[0].transpose(0, 1), attn.v_proj(normed).view(len(x), -1, dim))
        scoring = Scoring(dim**-0.5)
        attend = kernel_for(x.device)
        attended = attend(query[0].transpose(0, 1), pool.keys[0], pool.values[0], batch, scoring)
        x = x + attn.o_proj(attended.reshape(len(x), -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        found: Tensor = self.norm(x)
        return found
