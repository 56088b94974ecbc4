"""Linear layers replaced by narrow ones, in any module; which width a model is given."""

from __future__ import annotations

import pytest
import torch
from stepping import tiny
from torch import nn

from models.quantize import NarrowLinear, default_quantization, quantize_linears
from tests.small_models import four_bit_weights


@pytest.mark.parametrize("shape", [(40,), (7, 40), (2, 3, 40), (1, 1, 1, 40), (0, 40)])
@pytest.mark.parametrize("outputs", [32, 37])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_layer_with_a_small_error(shape: tuple[int, ...], outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(40, outputs, bias=bias), torch.randn(shape)
    expected = linear(x).detach()
    found = NarrowLinear(linear)(x)
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("name", ["llama", "mixtral", "opt", "phi"])
def test_every_linear_layer_is_replaced_and_nothing_else(name: str) -> None:
    model = tiny(name)
    before = {name: type(module) for name, module in model.named_modules()}
    quantize_linears(model)
    after = {name: type(module) for name, module in model.named_modules()}
    changed = {name: kind for name, kind in before.items() if after[name] is not kind}
    assert set(changed.values()) == {nn.Linear}
    assert {after[name] for name in changed} == {NarrowLinear}
    assert nn.Linear not in after.values()
    assert isinstance(model.get_output_embeddings(), NarrowLinear)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_four_bits_are_the_default_where_they_lose_nothing(name: str) -> None:
    model = tiny(name)
    assert default_quantization(model) == "int8"
    four_bit_weights(model)
    assert default_quantization(model) == "int4"
    layer = next(module for module in model.model.layers[-1].modules() if type(module) is nn.Linear)
    layer.weight.data[3, 5] += 0.01 * layer.weight.data.abs().max()
    assert default_quantization(model) == "int8"


def test_a_model_without_linear_layers_is_no_four_bit_one() -> None:
    model = tiny("gpt2")
    assert default_quantization(model) == "int8"


def test_the_output_embedding_keeps_eight_bits() -> None:
    model = tiny("llama")
    quantize_linears(model, 4)
    bits = {name: module.bits for name, module in model.named_modules() if isinstance(module, NarrowLinear)}
    assert bits.pop("lm_head") == 8
    assert set(bits.values()) == {4}


def test_its_sizes_are_the_layers() -> None:
    layer = NarrowLinear(nn.Linear(40, 37))
    assert (layer.in_features, layer.out_features) == (40, 37)
    assert not list(layer.parameters())
