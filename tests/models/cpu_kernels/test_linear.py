"""Packed linear layers of every target against exact products, against the reference, and one row against many."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from models.kernels import reference
from models.kernels.cpu import PackedLinear

pytestmark = pytest.mark.usefixtures("target")

SHAPES = [(16, 32), (1, 1), (5, 40), (48, 64), (97, 100), (33, 576), (200, 31), (130, 1000)]  # outputs, inputs


def weight_of(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(outputs * inputs)
    return torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator)


def whole(generator: torch.Generator, count: int, inputs: int) -> Tensor:
    """Random numbers that int8 with a scale per group holds exactly: whole ones up to 127, times a power of 2."""
    values = torch.randint(-127, 128, (count, inputs), generator=generator).float()
    values[:, ::32] = 127
    scales = 2.0 ** torch.randint(-9, 9, (count, -(-inputs // 32)), generator=generator)
    return values * scales.repeat_interleave(32, 1)[:, :inputs]


def whole_int4(generator: torch.Generator, count: int, inputs: int) -> Tensor:
    """Random numbers that four bits with a scale and a least value per group hold exactly."""
    groups = -(-inputs // 32)
    values = torch.randint(16, (count, groups, 32), generator=generator)
    values[..., 0], values[..., 1] = 0, 15
    least = torch.randint(-20, 20, (count, groups, 1), generator=generator)
    scales = 2.0 ** torch.randint(-9, 9, (count, groups, 1), generator=generator)
    return ((values + least) * scales).flatten(1)[:, :inputs]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_numbers_that_the_bits_hold_are_multiplied_exactly(outputs: int, inputs: int, bias: bool, bits: int) -> None:
    generator = torch.Generator().manual_seed(7)
    weight = (whole if bits == 8 else whole_int4)(generator, outputs, inputs)
    x = whole(generator, 13, inputs)
    added = torch.randn(outputs, generator=generator) if bias else None
    expected = x.double() @ weight.double().T + (0 if added is None else added.double())
    size = x.double().abs() @ weight.double().abs().T
    error = (PackedLinear(weight, added, bits)(x).double() - expected).abs() / size
    assert error.max() < 3e-6


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_the_largest_products_do_not_overflow(rows: int, sign: int) -> None:
    weight = torch.full((16, 64), 15.0)
    weight[:, ::32] = 0  # so that 15 is 15 steps
    x = torch.full((rows, 64), sign * 127.0)
    assert torch.equal(PackedLinear(weight, None, 4)(x), x @ weight.T)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_random_numbers_are_as_the_reference_has_them(outputs: int, inputs: int, bits: int) -> None:
    weight, bias = weight_of(outputs, inputs)
    x = torch.randn(21, inputs, generator=torch.Generator().manual_seed(1))
    x[3] = 0
    found = PackedLinear(weight, bias, bits)(x)
    linear, quantize = (
        (reference.linear, reference.quantize_weight)
        if bits == 8
        else (reference.linear_int4, reference.quantize_weight_int4)
    )
    expected = linear(x, *quantize(weight), bias)
    torch.testing.assert_close(found[3], bias)
    step = x.abs().amax() / 127 * weight.abs().amax()  # one value that lies between two may be rounded the other way
    assert (found - expected).abs().max() <= step
    assert ((found - expected).abs() > 1e-4 * expected.abs().max()).float().mean() < 0.02


@pytest.mark.parametrize(("outputs", "inputs"), [(96, 576), (64, 1536)])
def test_the_error_of_int8_is_small(outputs: int, inputs: int) -> None:
    weight, bias = weight_of(outputs, inputs)
    x = torch.randn(50, inputs)
    expected = x @ weight.T + bias
    assert (PackedLinear(weight, bias)(x) - expected).norm() < 0.012 * expected.norm()


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e6, 1e30])
def test_an_outlier_spoils_its_own_group_only(size: float) -> None:
    weight, _ = weight_of(32, 96)
    x = torch.randn(4, 96)
    expected = x[:, 32:] @ weight[:, 32:].T
    weight[:, :32] = 0
    x[:, 5] = size
    found = PackedLinear(weight)(x)
    assert (found - expected).norm() < 0.015 * expected.norm()


def test_scale_does_not_matter() -> None:
    """Powers of 2 change exponents only."""
    weight, _ = weight_of(48, 64)
    x = torch.randn(9, 64)
    plain = PackedLinear(weight)(x)
    for power in (-60, -20, 20, 60):
        assert torch.equal(PackedLinear(weight * 2.0**-power)(x * 2.0**power), plain)


def test_zero_weights_and_no_rows() -> None:
    weight, bias = weight_of(40, 64)
    weight[3] = 0
    linear = PackedLinear(weight, bias)
    assert torch.equal(linear(torch.randn(6, 64))[:, 3], bias[3].expand(6))
    assert linear(torch.empty(0, 64)).shape == (0, 40)


def test_rows_of_any_layout() -> None:
    weight, bias = weight_of(40, 64)
    x = torch.randn(64, 12)
    linear = PackedLinear(weight, bias)
    assert torch.equal(linear(x.T), linear(x.T.contiguous()))
    assert torch.equal(linear(x.T[::3]), linear(x.T)[::3])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("outputs", "inputs"), [(97, 100), (64, 576), (1000, 64)])
def test_a_row_is_bitwise_the_same_whatever_is_beside_it(outputs: int, inputs: int) -> None:
    linear = PackedLinear(*weight_of(outputs, inputs))
    x = torch.randn(200, inputs, generator=torch.Generator().manual_seed(2))
    alone = torch.cat([linear(row[None]) for row in x])
    assert torch.equal(linear(x), alone)
    source = random.Random(3)
    for count in [*range(1, 20), *source.sample(range(20, 201), 20)]:
        rows = source.sample(range(200), count)
        assert torch.equal(linear(x[rows]), alone[rows]), count


def test_threads_change_nothing() -> None:
    linear = PackedLinear(*weight_of(300, 64))
    x, before = torch.randn(37, 64), torch.get_num_threads()
    found = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found.append(linear(x))
    torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)
