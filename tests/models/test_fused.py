"""Fused models of the common shape: against the same arithmetic layer by layer, against float32, and row by row."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from common_models import COMMON, FUSED, WIDE, common
from stepping import CPU, Engine, OneByOne, Request, plain, relative_errors, run, tiny
from torch import Tensor
from transformers import PreTrainedModel

from models.backbone import Backbone
from models.batch import Segment, build_batch
from models.kernels.reference import quantize_weight
from models.kv_pool import KVPool
from models.quantize import Quantization
from tests.small_models import four_bit_weights

BOTH: tuple[Quantization, ...] = ("int8", "int4")


def quantized(model: PreTrainedModel, quantization: Quantization = "int8") -> Backbone:
    backbone = Backbone(copy.deepcopy(model))
    backbone.quantize(quantization)
    return backbone


def layer_by_layer(model: PreTrainedModel, quantization: Quantization, monkeypatch: pytest.MonkeyPatch) -> Backbone:
    """Not fused, with an embedding of eight bits all the same."""
    monkeypatch.setattr("models.backbone.can_fuse", lambda *_: False)
    backbone = quantized(model, quantization)
    values, scales = quantize_weight(backbone.embedding_weight)
    backbone.embedding_weight.copy_((values * scales.float()[..., None]).flatten(1))
    return backbone


def is_fused(backbone: Backbone) -> bool:
    return backbone._fused is not None


@pytest.mark.parametrize("name", FUSED)
def test_it_is_what_its_layers_compute_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to a value between two of int8 that is rounded the other way."""
    model = common(name)
    fused = quantized(model)
    layers = layer_by_layer(model, "int8", monkeypatch)
    assert (is_fused(fused), is_fused(layers)) == (True, False)
    expected = dict(run(layers))
    errors = relative_errors(expected.__getitem__, run(fused))
    assert errors.quantile(0.3) < 1e-6  # the others are that value's row, and what attends to it
    assert errors.max() < 0.06


@pytest.mark.parametrize("name", FUSED)
def test_it_is_near_the_model_in_float32(name: str) -> None:
    model = common(name)
    errors = relative_errors(plain(model), run(quantized(model)))
    assert 1e-4 < errors.median() < 0.07
    assert errors.max() < 0.25


@pytest.mark.parametrize("name", ["qwen2", "9 heads"])
def test_four_bits_lose_less_than_eight_where_they_hold_the_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = four_bit_weights(common(name))
    expected = plain(model)
    found = {bits: list(run(quantized(model, bits))) for bits in BOTH}
    errors = {bits: relative_errors(expected, rows).median() for bits, rows in found.items()}
    assert errors["int4"] < 0.9 * errors["int8"]
    layers = dict(run(layer_by_layer(model, "int4", monkeypatch)))
    assert relative_errors(layers.__getitem__, found["int4"]).median() < 1e-3  # a value between two rounds either way


@pytest.mark.parametrize("quantization", BOTH)
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", FUSED)
def test_a_row_is_bitwise_what_it_is_alone(name: str, quantization: Quantization) -> None:
    """Chunks of prompts, trees and other requests beside it change no bit of its logits or its hidden state."""
    backbone = quantized(common(name), quantization)
    alone = OneByOne(backbone)
    for path, logits in run(backbone):
        assert torch.equal(logits, alone(path)[0])


def test_many_requests_and_long_chunks_change_no_bit() -> None:
    backbone = quantized(common("llama"))
    alone = OneByOne(backbone)
    engine = Engine(backbone, num_slots=1000)
    requests = [Request([engine.random.randrange(97) for _ in range(40)]) for _ in range(14)]
    tree = (-1, -1, 0, 0, 1, 2, 3)
    rows = engine.step([(request, chunk, ()) for chunk, request in zip(range(1, 40, 3), requests, strict=False)])
    rows += engine.step([(request, 40 - len(request.slots), ()) for request in requests])
    rows += engine.step([(request, 1, tree[: 2 * n]) for n, request in enumerate(requests[:5])])
    assert len(rows) > 550
    for path, logits in rows:
        assert torch.equal(logits, alone(path)[0])
        assert torch.equal(engine.hidden[path], alone(path)[1])


@torch.inference_mode()
def test_hidden_is_what_enters_the_output_embedding() -> None:
    model = common("qwen3")
    backbone = quantized(model)
    engine = Engine(backbone)
    rows = engine.step([(Request([5, 6, 7]), 3, (-1, 0))])
    for path, logits in rows:
        near = engine.hidden[path] @ model.lm_head.weight.T
        assert (logits - near).norm() < 0.02 * near.norm()


@torch.inference_mode()
def forward(backbone: Backbone, rows: list[int], pool: KVPool | None = None) -> tuple[Tensor, Tensor]:
    slots = torch.tensor([3, 1, 2])
    batch = build_batch([Segment(3, slots[:0], 3, ())], torch.arange(3), slots, CPU)
    pool = pool or KVPool(backbone.kv_shapes, 3, dtype=backbone.kv_dtype, device=CPU)
    return backbone.forward(torch.tensor([7, 8, 9]), batch, pool, torch.tensor(rows, dtype=torch.int64))


def test_rows_are_kept_in_the_order_asked_for() -> None:
    backbone = quantized(common("llama"))
    logits, hidden = forward(backbone, [0, 1, 2])
    for rows in ([2, 0], [1], []):
        some_logits, some_hidden = forward(backbone, rows)
        assert torch.equal(some_logits, logits[rows])
        assert torch.equal(some_hidden, hidden[rows])


@torch.inference_mode()
def test_keys_and_values_go_to_their_slots() -> None:
    model = common("mistral")
    backbone = quantized(model)
    pool = KVPool(backbone.kv_shapes, 3, dtype=torch.float16, device=CPU)
    forward(backbone, [], pool)
    expected = model(torch.tensor([[7, 8, 9]]), use_cache=True).past_key_values
    for layer, (keys, values) in enumerate(zip(pool.keys, pool.values, strict=True)):
        for found, wanted in ((keys, expected.layers[layer].keys), (values, expected.layers[layer].values)):
            wanted = wanted[0].transpose(0, 1)
            assert (found[[3, 1, 2]].float() - wanted).norm() < 0.05 * wanted.norm()
            assert not found[0].any()


def test_another_pool_and_a_pool_of_float32() -> None:
    backbone = quantized(common("llama"))
    half = forward(backbone, [0, 1, 2])[0]
    full = forward(backbone, [0, 1, 2], KVPool(backbone.kv_shapes, 5, dtype=torch.float32, device=CPU))[0]
    assert 0 < (half - full).norm() < 0.06 * full.norm()
    assert torch.equal(forward(backbone, [0, 1, 2])[0], half)


def test_two_fused_models_side_by_side() -> None:
    one, other = quantized(common("llama")), quantized(common("qwen3"))
    alone = [forward(one, [2])[0], forward(other, [2])[0]]
    pools = [KVPool(b.kv_shapes, 3, dtype=torch.float16, device=CPU) for b in (one, other)]
    for _ in range(2):
        assert torch.equal(forward(one, [2], pools[0])[0], alone[0])
        assert torch.equal(forward(other, [2], pools[1])[0], alone[1])


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma 2": (
        "gemma2",
        COMMON | {"layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    ),
    "gpt-2": ("gpt2", {}),
    "phi 3": ("phi3", COMMON),
    "olmo 2": ("olmo2", COMMON),
    "granite": ("granite", COMMON | {"residual_multiplier": 0.5}),
    "hidden size": ("llama", COMMON | {"hidden_size": 48}),
    "intermediate size": ("llama", COMMON | {"intermediate_size": 80}),
    "head size": ("llama", COMMON | {"head_dim": 16}),
    "large heads": ("llama", COMMON | {"head_dim": 288}),
    "many heads of one": ("llama", WIDE | {"hidden_size": 2080, "num_attention_heads": 65, "num_key_value_heads": 1}),
    "gelu": ("llama", COMMON | {"hidden_act": "gelu"}),
    "dynamic rope": ("llama", COMMON | {"rope_parameters": DYNAMIC}),
}


@pytest.mark.parametrize("name", ODD)
def test_other_shapes_are_not_fused_and_run(name: str) -> None:
    model_type, options = ODD[name]
    model = tiny(model_type, **options) if options else tiny(model_type)
    backbone = quantized(model)
    assert not is_fused(backbone)
    assert backbone.quantization == "int8"
    errors = relative_errors(plain(model), run(backbone))
    assert 1e-4 < errors.median() < 0.06
