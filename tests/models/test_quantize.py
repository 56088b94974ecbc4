"""Linear layers replaced by int8 ones, in any module."""

from __future__ import annotations

import pytest
import torch
from stepping import tiny
from torch import nn

from models.quantize import NarrowLinear, quantize_linears


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


def test_its_sizes_are_the_layers() -> None:
    layer = NarrowLinear(nn.Linear(40, 37))
    assert (layer.in_features, layer.out_features) == (40, 37)
    assert not list(layer.parameters())
