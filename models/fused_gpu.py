"""A model of the common shape (`models.fused`) on a GPU: matrix products by torch, all between them by Triton.

A layer is nine launches: norm, QKV, placing (rotating Q and K, writing the pool), attention, output, norm, gate and up,
their product, down.

Invariants:
- the modules keep working: their weights become views into the stacked ones, so there is one copy of each;
- nothing waits for the device, and no shape depends on what it has computed: a step can be recorded (`models.graphs`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from models.attention import Scoring
from models.batch import Batch
from models.fused import rotations, stacked
from models.kernels import triton_layers
from models.kernels.triton_attention import attention
from models.kv_pool import KVPool

Weights = tuple[Tensor, Tensor | None]  # of a linear layer: [outputs, inputs] and [outputs]


@dataclass(frozen=True, slots=True)
class Layer:
    """What a step needs of one."""

    input_norm: Tensor  # [hidden]
    post_norm: Tensor
    epsilon: float
    qkv: Weights
    norms: Tensor | None  # [2, head_dim], of Q and of K
    is_rotary: bool
    scoring: Scoring
    out: Weights
    gate_up: Weights
    down: Weights


class FusedOnGpu:
    """Runs a model's own weights."""

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, scorings: Mapping[int, Scoring], num_positions: int) -> None:
        """`model` must be one of the common shape (`fused.is_common`)."""
        trunk: Any = model.model
        self._config = model.config
        self._table: Tensor = trunk.embed_tokens.weight
        self._layers = [_layer(each, scorings[each.self_attn.layer_idx]) for each in trunk.layers]
        self._norm: Tensor = trunk.norm.weight
        self._epsilon: float = trunk.norm.variance_epsilon
        self._head: nn.Linear = model.get_output_embeddings()
        self._rotations = _on(self._table.device, rotations(trunk.rotary_emb, num_positions))
        self._shown: tuple[int, ...] = ()

    @property
    def shared(self) -> int:
        """Query heads of each kv head."""
        config: Any = self._config
        return int(config.num_attention_heads) // int(config.num_key_value_heads)

    def show(self, layers: Sequence[int]) -> None:
        """As `Backbone.show`; the layers are there."""
        self._shown = tuple(layers)

    @torch.inference_mode()
    def forward(
        self, tokens: Tensor, batch: Batch, pool: KVPool, rows: Tensor, scored: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `Backbone.forward`."""
        x, delta = self._table[tokens], None  # [rows, hidden] both
        outputs: dict[int, Tensor] = {}
        for number, layer in enumerate(self._layers):
            x, normed = triton_layers.add_norm(x, delta, layer.input_norm, layer.epsilon)
            if number - 1 in self._shown:
                outputs[number - 1] = x
            keys, values = pool.keys[number], pool.values[number]
            query = triton_layers.place(
                linear(normed, *layer.qkv),
                keys,
                values,
                batch.positions,
                batch.slots,
                self._rotations if layer.is_rotary else None,
                layer.norms,
                layer.epsilon,
            )
            attended = attention(query, keys, values, batch, layer.scoring).flatten(1)
            x, normed = triton_layers.add_norm(x, linear(attended, *layer.out), layer.post_norm, layer.epsilon)
            delta = linear(triton_layers.gated(linear(normed, *layer.gate_up)), *layer.down)
        x, normed = triton_layers.add_norm(x, delta, self._norm, self._epsilon)
        outputs[len(self._layers) - 1] = x
        kept = normed[rows]
        logits: Tensor = self._head(kept if scored is None else kept[scored])
        return logits.float(), torch.cat([*(outputs[number][rows] for number in self._shown), kept], -1)


def _layer(layer: Any, scoring: Scoring) -> Layer:
    attn, mlp = layer.self_attn, layer.mlp
    has_norms = hasattr(attn, "q_norm")
    return Layer(
        layer.input_layernorm.weight,
        layer.post_attention_layernorm.weight,
        layer.input_layernorm.variance_epsilon,
        _joined(attn.q_proj, attn.k_proj, attn.v_proj),
        torch.stack([attn.q_norm.weight, attn.k_norm.weight]) if has_norms else None,
        bool(getattr(attn, "use_rope", True)),
        scoring,
        (attn.o_proj.weight, attn.o_proj.bias),
        _joined(mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj.weight, mlp.down_proj.bias),
    )


def _joined(*linears: nn.Linear) -> Weights:
    """One layer that does what all do, whose weights they look at from now on."""
    weight, bias = stacked(*linears)
    start = 0
    for each in linears:
        each.weight.data = weight[start : start + each.out_features]
        start += each.out_features
    return weight, bias


def _on(device: torch.device, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """As the kernel reads them."""
    cosines, sines = (table.to(device, torch.float32).contiguous() for table in tables)
    return cosines, sines
