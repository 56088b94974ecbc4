"""Arithmetic against plain Python over the definition, and what documents say."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from models.train.experiments.ring import (
    ADD,
    COMPOSE,
    DEGREE,
    END,
    EQUALS,
    LEAF,
    MULTIPLY,
    NEGATE,
    OPERATIONS,
    PRIME,
    apply,
    compose,
    evaluate,
    multiply,
    plan,
    write,
)  # fmt: skip

Polynomial = list[int]


def product(p: Polynomial, q: Polynomial) -> Polynomial:
    """The definition."""
    return [sum(p[i] * q[k - i] for i in range(k + 1)) % PRIME for k in range(DEGREE)]


def composition(p: Polynomial, q: Polynomial) -> Polynomial:
    """The sum of p_i q^i."""
    power, total = [1, 0, 0, 0, 0], [0] * DEGREE
    for coefficient in p:
        total = [(t + coefficient * x) % PRIME for t, x in zip(total, power, strict=True)]
        power = product(power, q)
    return total


def value(symbols: list[int]) -> tuple[Polynomial, list[int]]:
    """Of the expression at the beginning of a document, and the rest of it."""
    if symbols[0] < PRIME:
        return symbols[:DEGREE], symbols[DEGREE:]
    first, rest = value(symbols[1:])
    if symbols[0] == NEGATE:
        return [-c % PRIME for c in first], rest
    second, rest = value(rest)
    if symbols[0] == ADD:
        return [(a + b) % PRIME for a, b in zip(first, second, strict=True)], rest
    return (product if symbols[0] == MULTIPLY else composition)(first, second), rest


def test_known_values() -> None:
    one_and_x, x_squared = np.array([1, 1, 0, 0, 0]), np.array([0, 0, 1, 0, 0])
    assert multiply(one_and_x, one_and_x).tolist() == [1, 2, 1, 0, 0]
    assert multiply(x_squared, np.array([0, 0, 0, 1, 0])).tolist() == [0] * 5  # X^5 is nothing
    assert compose(one_and_x, x_squared).tolist() == [1, 0, 1, 0, 0]
    assert compose(x_squared, one_and_x).tolist() == [1, 2, 1, 0, 0]
    assert apply(NEGATE, np.array([0, 1, 2, 3, 6]), x_squared).tolist() == [0, 6, 5, 4, 1]
    assert apply(ADD, np.array([6, 6, 0, 0, 0]), one_and_x).tolist() == [0, 0, 0, 0, 0]


def test_operations_are_those_of_the_definition() -> None:
    p, q = np.random.default_rng(0).integers(PRIME, size=(2, 50, DEGREE))
    assert multiply(p, q).tolist() == [product(a, b) for a, b in zip(p.tolist(), q.tolist(), strict=True)]
    assert compose(p, q).tolist() == [composition(a, b) for a, b in zip(p.tolist(), q.tolist(), strict=True)]


def test_documents_end_with_the_value_of_their_expression() -> None:
    numbers = [number for number in range(1, 7) for _ in range(40)]
    for number, document in zip(numbers, write(numbers, (3,)), strict=True):
        found, rest = value(document)
        assert rest == [EQUALS, *found, END]
        assert sum(symbol in OPERATIONS for symbol in document) == number


def test_expressions_of_different_lengths_are_evaluated_together() -> None:
    plans = [[LEAF], [NEGATE, ADD, LEAF, LEAF]]
    operands = np.zeros((2, 4, DEGREE), dtype=np.int64)
    operands[0, 0] = [1, 2, 3, 4, 5]
    operands[1, 2:] = [[1, 0, 0, 0, 6], [1, 0, 0, 0, 2]]
    assert evaluate(plans, operands).tolist() == [[1, 2, 3, 4, 5], [5, 0, 0, 0, 6]]


def test_operations_are_uniform_and_documents_follow_from_their_seed() -> None:
    draw = random.Random(0)
    counts = Counter(symbol for _ in range(2000) for symbol in plan(3, draw) if symbol != LEAF)
    assert set(counts) == set(OPERATIONS)
    assert all(1350 < count < 1650 for count in counts.values())
    assert write([2, 3], (5, 1)) == write([2, 3], (5, 1)) != write([2, 3], (5, 2))


@pytest.mark.parametrize("operation", [ADD, MULTIPLY, COMPOSE])
def test_the_first_operand_stands_first(operation: int) -> None:
    operands = np.zeros((1, 3, DEGREE), dtype=np.int64)
    operands[0, 1], operands[0, 2] = [1, 2, 0, 0, 3], [4, 0, 5, 0, 0]
    found = evaluate([[operation, LEAF, LEAF]], operands)[0].tolist()
    assert found == value([operation, 1, 2, 0, 0, 3, 4, 0, 5, 0, 0])[0]
