"""Arithmetic in F7[X]/(X^5), as tokens: an expression in prefix order, `=`, the five coefficients of its value.

A polynomial is five digits, lowest power first. Operations: unary minus, sum, product, composition p(q).

Invariant: an expression has exactly as many operations as asked for; operations and coefficients are uniform.
"""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray

PRIME, DEGREE = 7, 5
NEGATE, ADD, MULTIPLY, COMPOSE, EQUALS, END = range(PRIME, PRIME + 6)
VOCABULARY = END + 1
OPERATIONS = (NEGATE, ADD, MULTIPLY, COMPOSE)
LEAF = -1  # stands for an operand in a plan

Polynomials = NDArray[np.int64]  # [..., 5]


def multiply(p: Polynomials, q: Polynomials) -> Polynomials:
    """Powers from X^5 on vanish."""
    product = np.zeros(np.broadcast(p, q).shape, dtype=np.int64)
    for power in range(DEGREE):
        product[..., power:] += p[..., power : power + 1] * q[..., : DEGREE - power]
    return product % PRIME


def compose(p: Polynomials, q: Polynomials) -> Polynomials:
    """p(q), by Horner's rule."""
    value = np.zeros(np.broadcast(p, q).shape, dtype=np.int64)
    for power in reversed(range(DEGREE)):
        value = multiply(value, q)
        value[..., 0] = (value[..., 0] + p[..., power]) % PRIME
    return value


def apply(operation: int, p: Polynomials, q: Polynomials) -> Polynomials:
    """`q` is the second operand, which NEGATE does not look at."""
    match operation:
        case o if o == NEGATE:
            return -p % PRIME
        case o if o == ADD:
            return (p + q) % PRIME
        case o if o == MULTIPLY:
            return multiply(p, q)
    return compose(p, q)


def plan(num_operations: int, draw: random.Random) -> list[int]:
    """An expression without its numbers: operations and LEAFs in prefix order. Grown at a random operand each time."""
    found = [LEAF]
    for _ in range(num_operations):
        at = draw.choice([i for i, symbol in enumerate(found) if symbol == LEAF])
        operation = draw.choice(OPERATIONS)
        found[at : at + 1] = [operation, LEAF] if operation == NEGATE else [operation, LEAF, LEAF]
    return found


def evaluate(plans: list[list[int]], operands: Polynomials) -> Polynomials:
    """Values of all plans at once: [plans, 5]. operands: [plans, symbols, 5], looked at where a plan has a LEAF.

    A stack machine for each plan, all of which read their symbols from the right in step.
    """
    length = max(map(len, plans))
    symbols = np.array([[*symbols, *[EQUALS] * (length - len(symbols))] for symbols in plans])
    stack = np.zeros((len(plans), length + 1, DEGREE), dtype=np.int64)
    height = np.zeros(len(plans), dtype=np.int64)
    for at in reversed(range(length)):
        rows = np.flatnonzero(symbols[:, at] == LEAF)
        stack[rows, height[rows]] = operands[rows, at]
        height[rows] += 1
        for operation in OPERATIONS:
            rows = np.flatnonzero(symbols[:, at] == operation)
            first = stack[rows, height[rows] - 1]
            height[rows] -= operation != NEGATE
            stack[rows, height[rows] - 1] = apply(operation, first, stack[rows, height[rows] - 1])
    return stack[:, 0]


def write(numbers: list[int], seed: tuple[int, ...]) -> list[list[int]]:
    """One document for each number of operations: expression, EQUALS, value, END."""
    draw = random.Random(repr(seed))
    plans = [plan(number, draw) for number in numbers]
    operands = np.random.default_rng(seed).integers(PRIME, size=(len(plans), max(map(len, plans)), DEGREE))
    values = evaluate(plans, operands).tolist()
    spelled = operands.tolist()
    documents = []
    for symbols, polynomials, value in zip(plans, spelled, values, strict=True):
        document: list[int] = []
        for symbol, polynomial in zip(symbols, polynomials, strict=False):
            document += polynomial if symbol == LEAF else [symbol]
        documents.append([*document, EQUALS, *value, END])
    return documents
