"""The reference's own promises: what a group of int8 values may be off by, and its edges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.kernels.reference import (
    GROUP,
    is_int4,
    linear,
    linear_int4,
    quantize_rows,
    quantize_weight,
    quantize_weight_int4,
    restored_int4,
)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 100), st.integers(0, 9999), st.floats(1e-20, 1e20))
def test_no_value_is_off_by_more_than_half_a_step(count: int, inputs: int, seed: int, size: float) -> None:
    x = size * torch.randn(count, inputs, generator=torch.Generator().manual_seed(seed))
    for values, scales in (quantize_rows(x), quantize_weight(x)):
        scales = scales.float()
        restored = (values * scales[..., None]).flatten(1)[:, :inputs]
        # a weight's scale is rounded to 8 bits, so its largest value may be cut by 1 part in 256
        most = scales.repeat_interleave(32, 1)[:, :inputs] * 0.501 + x.abs() / 256
        assert ((restored - x).abs() <= most).all()
        assert values.abs().max() <= 127
        assert (values.flatten(1)[:, inputs:] == 0).all()


def test_zeros_stay_zeros() -> None:
    for values, scales in (quantize_rows(torch.zeros(2, 40)), quantize_weight(torch.zeros(2, 40))):
        assert not values.any()
        assert not scales.any()


@pytest.mark.parametrize("bias", [None, torch.tensor([1.0, -2.0, 0.5])])
def test_linear_is_the_product_of_the_restored_values(bias: torch.Tensor | None) -> None:
    x, weight = torch.randn(4, 70), torch.randn(3, 70)
    values, scales = quantize_weight(weight)
    restored = (values * scales.float()[..., None]).flatten(1)[:, :70]
    rows, row_scales = quantize_rows(x)
    expected = (rows * row_scales[..., None]).flatten(1)[:, :70] @ restored.T
    torch.testing.assert_close(linear(x, values, scales, bias), expected if bias is None else expected + bias)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 100), st.integers(0, 9999), st.floats(1e-2, 1e3))
def test_no_weight_of_four_bits_is_off_by_more_than_half_a_step(
    count: int, inputs: int, seed: int, size: float
) -> None:
    weight = size * torch.randn(count, inputs, generator=torch.Generator().manual_seed(seed))
    values, scales = quantize_weight_int4(weight)
    restored = restored_int4(values, scales).flatten(1)[:, :inputs]
    step = scales[0].float().repeat_interleave(GROUP, 1)[:, :inputs]
    assert ((restored - weight).abs() <= 0.5 * step + 3e-3 * weight.abs().amax()).all()
    assert values.max() <= 15


def test_what_four_bits_hold_is_known() -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(16, (6, 5, GROUP), generator=generator)
    values[..., 0], values[..., 1] = 0, 15
    scales = torch.rand(2, 6, 5, generator=generator).half()
    weight = restored_int4(values, scales).flatten(1)
    assert is_int4(weight)
    assert is_int4(weight[:, :70])
    assert is_int4(torch.zeros(3, 40))
    found = restored_int4(*quantize_weight_int4(weight)).flatten(1)
    torch.testing.assert_close(found, weight, rtol=0, atol=1e-3)
    weight[2, 9] += 0.1
    assert not is_int4(weight)
    assert not is_int4(1e6 * torch.randn(3, 64))  # beyond binary16


def test_linear_of_four_bits_is_the_product_of_the_restored_values() -> None:
    x, weight, bias = torch.randn(4, 70), torch.randn(3, 70), torch.tensor([1.0, -2.0, 0.5])
    values, scales = quantize_weight_int4(weight)
    rows, row_scales = quantize_rows(x)
    wide = (rows * row_scales[..., None]).flatten(1)[:, :70]
    expected = wide @ restored_int4(values, scales).flatten(1)[:, :70].T + bias
    torch.testing.assert_close(linear_int4(x, values, scales, bias), expected)
