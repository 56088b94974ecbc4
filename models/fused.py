"""A model of the common shape as one call of the C kernels a step, built from the modules that transformers loaded.

Common: embedding; layers of RMSNorm, rotary attention (biases, norms of Q and K, a window, layers without rotation are
fine), RMSNorm and SwiGLU; RMSNorm; output embedding. Llama, Mistral, Qwen2, Qwen3 and SmolLM3 are of it.

Invariants:
- a model that is not known exactly, by class and sizes, is not fused;
- a row's logits and its K and V are bitwise the same whatever rows share its step.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Mapping, Sequence
from ctypes import c_int64, c_void_p
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.attention import Scoring
from models.batch import Batch
from models.drafters import growth
from models.drafters.growth import Chain
from models.drafters.sequential import SequentialHeads
from models.kernels import cpu, reference
from models.kv_pool import KVPool
from models.sampling import choice_key, draw_struct
from models.tree import Guess

COMMON = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM"}
FIXED_ROTATIONS = {"default", "linear", "llama3", "yarn"}  # of a position, whatever the others are


def is_common(model: PreTrainedModel, scorings: Mapping[int, Scoring]) -> bool:
    """Whether `model` is of the common shape. `scorings`: how each layer has called the attention."""
    if type(model).__name__ not in COMMON:
        return False
    trunk: Any = model.model
    return trunk.rotary_emb.rope_type in FIXED_ROTATIONS and all(
        _is_common(layer, scorings[layer.self_attn.layer_idx]) for layer in trunk.layers
    )


def can_fuse(model: PreTrainedModel, scorings: Mapping[int, Scoring]) -> bool:
    """Whether `FusedModel` can run `model`."""
    return is_common(model, scorings) and all(map(_fits, model.model.layers))


def _is_common(layer: Any, scoring: Scoring) -> bool:
    attn, mlp = layer.self_attn, layer.mlp
    linears = (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return (
        scoring.softcap is None
        and scoring.sinks is None
        and all(type(linear) is nn.Linear for linear in linears)
        and type(mlp.act_fn).__name__ in ("SiLUActivation", "SiLU")
    )


def _fits(layer: Any) -> bool:
    """Whether the C kernels know its sizes."""
    attn = layer.self_attn
    widths = (attn.q_proj.in_features, attn.o_proj.in_features, layer.mlp.down_proj.in_features, attn.head_dim)
    return (
        all(width % reference.GROUP == 0 for width in widths)
        and attn.head_dim <= cpu.MAX_DIM
        and attn.q_proj.out_features <= cpu.MAX_SHARED * attn.k_proj.out_features
    )


def can_fuse_drafter(heads: SequentialHeads) -> bool:
    """Whether `FusedSequential` can run `heads`."""
    layer = heads.layer
    return _is_common(layer, Scoring(1.0)) and _fits(layer) and heads.shape.hidden_size % reference.GROUP == 0


class FusedLayers:
    """Layers of the common shape, packed, and the buffers that a step of them works in."""

    def __init__(self, layers: Sequence[Any], scorings: Sequence[Scoring], bits: int = 8) -> None:
        """`layers`: transformers' modules, float32 on a CPU; `bits` of their weights: 8 or 4."""
        first = layers[0]
        self._dim: int = first.self_attn.head_dim
        self._heads: int = first.self_attn.q_proj.out_features // self._dim
        self._kv_heads: int = first.self_attn.k_proj.out_features // self._dim
        self._inner: int = first.mlp.down_proj.in_features
        self._hidden_size: int = first.self_attn.q_proj.in_features
        self._kept: list[object] = []  # what the structs point into
        self._pool: KVPool | None = None  # the one whose addresses they hold
        self._num_rows = 0  # that the buffers have room for
        self._scorings, self._bits = scorings, bits
        packed = [self._pack(layer) for layer in layers]
        self._layers = (cpu.LayerStruct * len(packed))(*packed)

    def _trunk(
        self, embedding: cpu.LinearStruct, norm: Tensor, head: cpu.LinearStruct, rotary: nn.Module, positions: int
    ) -> cpu.TrunkStruct:
        cosines, sines = rotations(rotary, positions)
        return cpu.TrunkStruct(
            self._layers,
            len(self._layers),
            embedding,
            self._keep(norm),
            head,
            self._keep(cosines),
            self._keep(sines),
            cosines.shape[1],
        )

    def _buffers(self, rows: int, pool: KVPool) -> cpu.BuffersStruct:
        """For a step of so many rows on this pool."""
        if pool is not self._pool:
            self._point_to(pool)
        if rows > self._num_rows:
            self._make_room(rows)
        return self._struct_of_buffers

    def _make_room(self, rows: int) -> None:
        queries = self._heads * self._dim
        widths = (self._hidden_size, queries + 2 * self._kv_heads * self._dim, queries, queries, self._inner)
        self._room = (
            [torch.empty(rows, width) for width in widths],
            [cpu.Rows(rows, width) for width in (max(2 * widths[0], queries), self._inner)],
        )
        wide, narrow = self._room
        self._struct_of_buffers = cpu.BuffersStruct(*map(cpu.address, wide), *[each.struct for each in narrow])
        self._num_rows = rows

    def _point_to(self, pool: KVPool) -> None:
        self._pool = pool
        for struct, scoring, keys, values in zip(self._layers, self._scorings, pool.keys, pool.values, strict=True):
            struct.attention = cpu.attention_struct(keys, values, self._heads, scoring.scaling, scoring.window)

    def _pack(self, layer: Any) -> cpu.LayerStruct:
        attn, mlp = layer.self_attn, layer.mlp
        return cpu.LayerStruct(
            qkv=self._linear(stacked(attn.q_proj, attn.k_proj, attn.v_proj)),
            out=self._linear((attn.o_proj.weight, attn.o_proj.bias)),
            gate_up=self._linear(_interleaved(mlp.gate_proj, mlp.up_proj)),
            down=self._linear((mlp.down_proj.weight, mlp.down_proj.bias)),
            input_norm=self._keep(layer.input_layernorm.weight),
            post_norm=self._keep(layer.post_attention_layernorm.weight),
            q_norm=self._keep(attn.q_norm.weight if hasattr(attn, "q_norm") else None),
            k_norm=self._keep(attn.k_norm.weight if hasattr(attn, "k_norm") else None),
            epsilon=layer.input_layernorm.variance_epsilon,
            is_rotary=bool(getattr(attn, "use_rope", True)),
        )

    def _linear(self, parts: tuple[Tensor, Tensor | None]) -> cpu.LinearStruct:
        packed = cpu.PackedLinear(*parts, self._bits)
        self._kept.append(packed)
        return packed.struct

    def _keep(self, tensor: Tensor | None) -> c_void_p:
        kept = None if tensor is None else tensor.detach().clone()
        self._kept.append(kept)
        return cpu.address(kept)


class FusedModel(FusedLayers):
    """Has packed what it needs of the modules, which can be thrown away."""

    def __init__(
        self, model: PreTrainedModel, scorings: Mapping[int, Scoring], num_positions: int, bits: int = 8
    ) -> None:
        """`model`, float32 on a CPU, must be one that `can_fuse`. `bits`: the layers'; embeddings have 8."""
        trunk: Any = model.model
        super().__init__(trunk.layers, [scorings[layer.self_attn.layer_idx] for layer in trunk.layers], bits)
        head: nn.Linear = model.get_output_embeddings()
        self._vocab_size = head.out_features
        table: Tensor = trunk.embed_tokens.weight
        packed = cpu.PackedLinear(head.weight, head.bias)
        self.embedding = packed if table is head.weight else cpu.PackedLinear(table)
        self._kept += packed, self.embedding
        tables = self.embedding.struct, trunk.norm.weight, packed.struct
        self._struct = self._trunk(*tables, trunk.rotary_emb, num_positions)
        self._shown: Tensor = torch.empty(0, dtype=torch.int64)  # layers whose outputs are kept, too

    def show(self, layers: Sequence[int]) -> None:
        """As `Backbone.show`; the layers are there."""
        self._shown = torch.tensor(layers, dtype=torch.int64)
        self._struct.shown, self._struct.num_shown = cpu.address(self._shown), len(layers)

    def forward(
        self, tokens: Tensor, batch: Batch, pool: KVPool, rows: Tensor, scored: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `Backbone.forward`."""
        buffers, step = self._buffers(tokens.shape[0], pool), cpu.step_struct(batch)
        asked = cpu.Asked(rows, scored, (self._struct.num_shown + 1) * self._hidden_size, self._struct.head.outputs)
        cpu.call(
            "medusa_forward",
            ctypes.byref(self._struct),
            ctypes.byref(step),
            ctypes.byref(buffers),
            cpu.address(tokens),
            ctypes.byref(asked.struct),
        )
        return asked.logits[:, : self._vocab_size], asked.kept


class FusedSequential(FusedLayers):
    """A sequential drafter as one call a depth, for serving on a CPU. Guesses need no more than four bits."""

    def __init__(self, heads: SequentialHeads, embedding: cpu.PackedLinear, num_positions: int) -> None:
        """`heads`: float32 on a CPU; `embedding`: theirs, of 8 bits. The pool that it works on has one layer."""
        super().__init__([heads.layer], [Scoring(heads.shape.head_dim**-0.5)], bits=4)
        self._kept.append(embedding)
        self._token_ids = heads.token_ids
        ranks = min(growth.NUM_RANKS, len(heads.token_ids))
        self._rules = cpu.RulesStruct(
            *(ranks, growth.WIDTH, heads.num_heads),
            *(growth.LEAST_VALUE, growth.NEXT_RIGHT, growth.LEAST_GAIN, growth.HEARD),
            *(growth.NOISY_SURENESS, growth.OUTSIDE),
        )
        head = self._linear((heads.lm_head, None))
        trunk = self._trunk(embedding.struct, heads.norm.weight, head, heads.rotary, num_positions)
        self._struct = cpu.DrafterStruct(
            trunk,
            self._linear((heads.input.weight, None)),
            self._keep(heads.token_norm.weight),
            self._keep(heads.state_norm.weight),
        )

    def guess(self, tokens: Tensor, states: Tensor, batch: Batch, pool: KVPool, rows: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [rows] and the states before them [rows, hidden]. Of the `rows` named, logits and states.

        Logits are [n, draft_vocab and what it takes to fill a block], of which the last have no meaning.
        """
        buffers, step = self._buffers(len(tokens), pool), cpu.step_struct(batch)
        asked = cpu.Asked(rows, None, self._hidden_size, self._struct.trunk.head.outputs)
        cpu.call(
            "medusa_guess",
            ctypes.byref(self._struct),
            ctypes.byref(step),
            ctypes.byref(buffers),
            cpu.address(tokens),
            cpu.address(states),
            ctypes.byref(asked.struct),
        )
        return asked.logits, asked.kept

    def draft(self, chains: Sequence[Chain], pool: KVPool, scratch: int) -> list[list[Guess]]:
        """Whole trees in one call, grown as `models.drafters.growth` grows them. Slots from `scratch` on are free."""
        asks = (cpu.AskStruct * len(chains))(*map(_ask_struct, chains))
        total = sum(chain.num_nodes for chain in chains)
        # plain arrays: a tensor takes several times as long
        tokens, parents, counts = (array("q", bytes(8 * size)) for size in (total, total, len(chains)))
        values = array("f", bytes(4 * total))
        states = torch.cat([chain.states for chain in chains]) if len(chains) > 1 else chains[0].states.contiguous()
        buffers = self._buffers(max(states.shape[0], len(chains) * growth.WIDTH), pool)
        cpu.call(
            "medusa_draft",
            ctypes.byref(self._struct),
            ctypes.byref(self._rules),
            ctypes.byref(buffers),
            asks,
            c_int64(len(chains)),
            cpu.address(states),
            c_int64(scratch),
            cpu.address(self._token_ids),
            c_int64(len(self._token_ids)),
            *[c_void_p(found.buffer_info()[0]) for found in (tokens, parents, values, counts)],
        )
        nodes = list(zip(tokens, parents, values, strict=True))
        starts = accumulate([chain.num_nodes for chain in chains], initial=0)
        return [
            [Guess(*node, "heads") for node in nodes[start : start + count]]
            for start, count in zip(starts, counts, strict=False)
        ]

    def best(self, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """[n, at least draft_vocab] -> the `count` best and their shares of the softmax, [n, count]."""
        return cpu.best(scores, len(self._token_ids), count)


def _ask_struct(chain: Chain) -> cpu.AskStruct:
    tensors = chain.context, chain.tokens, chain.slots
    sizes = chain.context.shape[0], chain.tokens.shape[0]
    limits = chain.position, chain.num_nodes, chain.max_depth, chain.least_value
    key = choice_key(chain.params.seed, chain.params.choice) if chain.params.temperature > 0 else 0
    return cpu.AskStruct(*map(cpu.address, tensors), *sizes, *limits, draw_struct(chain.params, key))


def rotations(rotary: nn.Module, num_positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all positions as the model computes them: [num_positions, rotary_dim] each."""
    cosines, sines = rotary(torch.empty(0), torch.arange(num_positions)[None])
    return cosines[0], sines[0]


def stacked(*linears: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """One weight and one bias that do what `linears` do, outputs one after another."""
    weight = torch.cat([linear.weight for linear in linears])
    if all(linear.bias is None for linear in linears):
        return weight, None
    biases: list[Tensor] = [
        linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears
    ]
    return weight, torch.cat(biases)


def _interleaved(gate: nn.Linear, up: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Blocks of the gate's and of the up projection's outputs in turn."""
    weight, bias = stacked(gate, up)

    def turn(both: Tensor) -> Tensor:
        return both.view(2, -1, cpu.BLOCK, *both.shape[1:]).transpose(0, 1).reshape(both.shape)

    return turn(weight), None if bias is None else turn(bias)
