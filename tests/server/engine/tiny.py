"""A tiny random Llama with random draft heads, and an engine over it."""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

from models.backbone import Backbone
from models.drafters.resblock import ResBlockHeads
from models.drafters.sequential import SequentialHeads, Shape
from server.engine.core import Engine
from server.engine.messages import Delta, EngineConfig, SamplingParams, SpeculationParams, Submit
from server.engine.runner import Runner
from tests.small_models import small_llama


def tiny_llama(vocab_size: int, *, scale: float = 1.0, seed: int = 0) -> LlamaForCausalLM:
    """Two layers; `scale` sharpens the output distribution."""
    model = small_llama(seed=seed, vocab_size=vocab_size, intermediate_size=48, eos_token_id=0)
    model.lm_head.weight.data *= scale
    return model


def random_heads(backbone: Backbone, num_heads: int = 3) -> ResBlockHeads:
    """Untrained heads guess what the model says next: wrong mostly, right often enough for deep paths."""
    accuracies = tuple(tuple(0.5 * 0.6**rank for rank in range(6)) for _ in range(num_heads))
    heads = ResBlockHeads(backbone.lm_head_weight, num_heads=num_heads, accuracies=accuracies)
    torch.nn.init.normal_(heads.weight, std=0.1)
    return heads


def random_sequential(backbone: Backbone, num_heads: int = 3) -> SequentialHeads:
    """An untrained sequential drafter."""
    head = backbone.lm_head_weight
    shape = Shape(hidden_size=head.shape[1], num_heads=2, num_kv_heads=1, head_dim=32, inner_size=64)
    heads = SequentialHeads(shape, backbone.embedding_weight, head, num_heads=num_heads)
    torch.nn.init.normal_(heads.input.weight, std=0.2)
    return heads.eval().requires_grad_(False)


PREDICTABLE: dict[str, object] = {"kv_cache_tokens": 4096, "static_trees": True, "control_share": 0.0}
"""Trees that do not depend on how long anything takes."""
HEADS = {"heads": random_heads, "sequential": random_sequential}


def tiny_engine(model: LlamaForCausalLM, *, drafter: str = "heads", **config: object) -> Engine:
    backbone = Backbone(model)
    options = EngineConfig("tiny", **{**PREDICTABLE, "num_nodes": 8, **config})  # type: ignore[arg-type]
    return Engine(options, Runner(backbone, HEADS[drafter](backbone), options))


def submit(name: str, prompt: list[int], sampling: SamplingParams, mode: str = "lossless", **spec: object) -> Submit:
    return Submit(name, tuple(prompt), sampling, SpeculationParams(mode, **spec))  # type: ignore[arg-type]


def run(engine: Engine, submits: list[Submit]) -> dict[str, list[Delta]]:
    """All deltas of all requests, by id."""
    deltas: dict[str, list[Delta]] = {s.request_id: [] for s in submits}
    for s in submits:
        refusal = engine.submit(s)
        assert refusal is None, refusal
    while engine.has_work:
        for delta in engine.step().deltas:
            deltas[delta.request_id].append(delta)
    engine.scheduler.check()
    return deltas


def tokens(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]
