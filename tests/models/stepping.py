"""Tiny random models of every architecture, random steps of chains and trees over them, and their oracles."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from models.backbone import Backbone
from models.batch import Segment, build_batch
from models.kv_pool import KVPool

TokenPath = tuple[int, ...]  # token ids from the start of a sequence
CPU = torch.device("cpu")
BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"sliding_window": 6}
GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 97,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GEMMA = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", BASE),
    "llama-mha-bias": ("llama", BASE | {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", BASE | WINDOW),
    "mixtral": ("mixtral", BASE | WINDOW | EXPERTS),
    "qwen2": ("qwen2", BASE),
    "qwen2-window": ("qwen2", BASE | WINDOW | {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("qwen3", BASE),
    "qwen3_moe": ("qwen3_moe", BASE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "gemma2": ("gemma2", BASE | GEMMA | {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 30.0}),
    "gemma3_text": ("gemma3_text", BASE | GEMMA),
    "phi": ("phi", BASE | {"partial_rotary_factor": 0.5, "num_key_value_heads": 4}),
    "phi3": ("phi3", BASE | WINDOW),
    "gpt_neox": ("gpt_neox", BASE | {"rotary_pct": 0.5}),
    "gpt2": ("gpt2", GPT2),
    "gpt_bigcode": ("gpt_bigcode", GPT2 | {"multi_query": True}),
    "opt": ("opt", BASE | {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "stablelm": ("stablelm", BASE | {"partial_rotary_factor": 0.5}),
    "smollm3": ("smollm3", BASE | {"no_rope_layers": [1, 0]}),
    "olmo2": ("olmo2", BASE),
    "granite": ("granite", BASE | {"attention_multiplier": 0.2, "logits_scaling": 3.0, "residual_multiplier": 0.5}),
    "cohere": ("cohere", BASE | {"logit_scale": 0.3}),
    "cohere2": ("cohere2", BASE | GEMMA | {"logit_scale": 0.3}),
    "starcoder2": ("starcoder2", BASE | WINDOW),
    "gpt_oss": ("gpt_oss", BASE | EXPERTS | {"sliding_window": 6, "layer_types": GEMMA["layer_types"]}),
    "deepseek_v3": (
        "deepseek_v3",
        BASE
        | {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
        }
        | {"v_head_dim": 12, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16, "first_k_dense_replace": 1},
    ),
}


def tiny(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model whose attention matters: weights ten times as large as at the start of training."""
    model_type, options = MODELS.get(name, (name, BASE))
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **options | {"initializer_range": 0.2, "use_cache": False} | changes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@dataclass
class Plain:
    """The oracle: transformers by itself."""

    model: PreTrainedModel
    known: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @torch.inference_mode()
    def __call__(self, path: tuple[int, ...]) -> Tensor:
        """The logits after the last token of `path`: [vocab]."""
        if path not in self.known:
            logits = self.model(input_ids=torch.tensor([path]), use_cache=False).logits[0].float()
            self.known |= {path[: n + 1]: row for n, row in enumerate(logits)}
        return self.known[path]


def plain(model: PreTrainedModel) -> Plain:
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    return Plain(model)


@dataclass
class OneByOne:
    """The oracle of row independence: a sequence alone, one row a step, in slots of its own."""

    backbone: Backbone
    known: dict[TokenPath, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, path: TokenPath) -> tuple[Tensor, Tensor]:
        """Logits [vocab] and hidden state [hidden] of the last token of `path`."""
        if path not in self.known:
            device = self.backbone.lm_head_weight.device
            pool = KVPool(self.backbone.kv_shapes, len(path), dtype=self.backbone.kv_dtype, device=device)
            slots = torch.arange(1, len(path) + 1)
            for n, token in enumerate(path):
                segment = Segment(1, slots[:n], 1, ())
                batch = build_batch([segment], torch.tensor([n]), slots[n : n + 1], device)
                row = torch.tensor([token], device=device), batch, pool, torch.tensor([0], device=device)
                logits, hidden = self.backbone.forward(*row)
                self.known[path[: n + 1]] = logits[0].cpu(), hidden[0].cpu()
        return self.known[path]


@dataclass
class Request:
    """A sequence, and the slots of its computed tokens."""

    tokens: list[int]
    slots: list[int] = field(default_factory=list)

    def rows(self, chain: int, parents: tuple[int, ...], source: random.Random) -> list[TokenPath]:
        """The path from the start of the sequence to each row of the next step."""
        start = len(self.slots)
        while len(self.tokens) < start + chain:
            self.tokens.append(source.randrange(97))
        paths = [tuple(self.tokens[: start + n + 1]) for n in range(chain)]
        for parent in parents:
            paths.append((*paths[chain - 1 if parent < 0 else chain + parent], source.randrange(97)))
        return paths

    def commit(self, path: TokenPath, slot_of: dict[TokenPath, int], used: list[int]) -> list[int]:
        """Keep `path`: its slots are now the sequence's. Returns the slots that are free again."""
        self.slots += [slot_of[path[: n + 1]] for n in range(len(self.slots), len(path))]
        self.tokens[: len(path)] = path
        return [slot for slot in used if slot not in self.slots]


class Engine:
    """Steps of chains and trees with slots in no order."""

    def __init__(self, backbone: Backbone, num_slots: int = 300, seed: int = 0) -> None:
        self.backbone = backbone
        self.random = random.Random(seed)
        self.free = self.random.sample(range(1, num_slots + 1), num_slots)
        self.hidden: dict[TokenPath, Tensor] = {}
        self.device = backbone.lm_head_weight.device
        self.pool = KVPool(backbone.kv_shapes, num_slots, dtype=backbone.kv_dtype, device=self.device)

    def step(self, work: list[tuple[Request, int, tuple[int, ...]]]) -> list[tuple[TokenPath, Tensor]]:
        """Run (request, chain length, parents of nodes), nodes being random guesses: path and logits of every row.

        Then the path to the last node of each tree is committed, and the slots of the others are given back.
        """
        own = [request.rows(chain, parents, self.random) for request, chain, parents in work]
        own_slots = [[self.free.pop() for _ in paths] for paths in own]
        segments = [
            Segment(len(paths), torch.tensor(request.slots, dtype=torch.int64), chain, parents)
            for (request, chain, parents), paths in zip(work, own, strict=True)
        ]
        paths = [path for some in own for path in some]
        positions = torch.tensor([len(path) - 1 for path in paths])
        slots = torch.tensor([slot for some in own_slots for slot in some])
        batch = build_batch(segments, positions, slots, self.device)
        tokens = torch.tensor([path[-1] for path in paths], device=self.device)
        rows = torch.arange(len(paths), device=self.device)
        logits, hidden = (each.cpu().clone() for each in self.backbone.forward(tokens, batch, self.pool, rows))
        assert logits.shape == (len(paths), self.backbone.vocab_size)
        assert logits.dtype == torch.float32
        states = max(getattr(self.backbone.config, "num_extra_heads", 0), 1) + len(self.backbone.inner_layers)
        assert hidden.shape == (len(paths), states * self.backbone.hidden_size)
        self.hidden |= zip(paths, hidden, strict=True)
        for (request, *_), its_paths, its_slots in zip(work, own, own_slots, strict=True):
            self.free += request.commit(its_paths[-1], dict(zip(its_paths, its_slots, strict=True)), its_slots)
        return list(zip(paths, logits, strict=True))


TREES = [(-1, -1, 0, 0, 2), (), (-1, 0, 1, 2, 3, -1, -1), (-1,), (-1, -1, -1, 1, 3, 3)]


def run(backbone: Backbone, seed: int = 0) -> Iterator[tuple[TokenPath, Tensor]]:
    """Three requests: prompts in chunks, chunk and tree in one step, then trees of all sizes on committed paths."""
    yield from run_engine(Engine(backbone, seed=seed))


def run_engine(engine: Engine) -> Iterator[tuple[TokenPath, Tensor]]:
    """`run` on an engine whose hidden states are wanted, too."""
    a, b, c = (Request([engine.random.randrange(97) for _ in range(n)]) for n in (19, 11, 7))
    yield from engine.step([(a, 9, ()), (b, 10, ())])
    yield from engine.step([(c, 7, ()), (b, 1, TREES[0]), (a, 10, ())])
    for trees in zip(TREES, TREES[1:] + TREES[:1], TREES[2:] + TREES[:2], strict=True):
        yield from engine.step([(request, 1, tree) for request, tree in zip((a, b, c), trees, strict=True)])


def relative_errors(expected: Callable[[TokenPath], Tensor], rows: Iterable[tuple[TokenPath, Tensor]]) -> Tensor:
    """|logits - expected| / |expected| of each row: [rows]."""
    return torch.stack([(logits - expected(path)).norm() / expected(path).norm() for path, logits in rows])
