"""The best trees of parallel heads, against all paths there are."""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.drafters.lattice import best_trees, lattice

DEPTHS, RANKS = 3, 3


@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_they_are_the_best_of_all_paths(seed: int, num_nodes: int) -> None:
    source = np.random.default_rng(seed)
    chances = np.sort(source.dirichlet(np.ones(RANKS + 1), size=(2, DEPTHS))[:, :, :RANKS])[:, :, ::-1]
    tokens = source.integers(0, 100, size=(2, DEPTHS, RANKS))
    shape = lattice(DEPTHS, RANKS, num_nodes)
    found, parents, values = best_trees(shape, shape.values(chances), tokens, num_nodes)
    for row in range(2):
        paths = [path for depth in range(1, DEPTHS + 1) for path in product(range(RANKS), repeat=depth)]
        best = sorted((prod(chances[row, d, r] for d, r in enumerate(path)) for path in paths), reverse=True)
        assert values[row].tolist() == pytest.approx(best[:num_nodes])
        for node, (token, parent) in enumerate(zip(found[row].tolist(), parents[row].tolist(), strict=True)):
            depth, above = 0, parent
            while above >= 0:
                depth, above = depth + 1, int(parents[row, above])
            assert parent < node  # so every beginning is a tree
            assert token in tokens[row, depth]


def test_large_lattices_hold_what_is_likely() -> None:
    shape = lattice(5, 10, 63)
    assert len(shape.parents) >= 5 * 63
    chances = np.broadcast_to(0.6 * 0.5 ** np.arange(10), (1, 5, 10))
    values = np.sort(shape.values(chances)[0])[::-1]
    paths = [path for depth in range(1, 6) for path in product(range(5), repeat=depth)]
    best = sorted((prod(0.6 * 0.5**r for r in path) for path in paths), reverse=True)
    assert values[:63].sum() > 0.99 * sum(best[:63])
