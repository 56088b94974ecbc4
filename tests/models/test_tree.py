"""Static trees against brute force."""

from __future__ import annotations

import itertools

import pytest

from models.tree import Tree, best_static_choices, expected_tau, tree_from_choices

ACCURACIES = ((0.5, 0.2, 0.1), (0.4, 0.15), (0.3, 0.05))


def brute_force(num_nodes: int) -> float:
    """The greatest expectation over all ancestor-closed sets of choices."""
    every = [
        choice
        for depth in range(1, len(ACCURACIES) + 1)
        for choice in itertools.product(*(range(len(ranks)) for ranks in ACCURACIES[:depth]))
    ]
    best = 0.0
    for chosen in itertools.combinations(every, num_nodes):
        if all(len(choice) == 1 or choice[:-1] in chosen for choice in chosen):
            best = max(best, expected_tau(ACCURACIES, chosen))
    return best


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 4])
def test_choices_are_the_best_possible(num_nodes: int) -> None:
    choices = best_static_choices(ACCURACIES, num_nodes)
    assert len(choices) == num_nodes
    assert expected_tau(ACCURACIES, choices) == pytest.approx(brute_force(num_nodes))


def test_more_nodes_only_add_and_ancestors_come_first() -> None:
    everything = best_static_choices(ACCURACIES, 63)
    assert len(everything) == 3 + 3 * 2 + 3 * 2 * 2
    assert best_static_choices(ACCURACIES, 5) == everything[:5]
    for i, choice in enumerate(everything):
        assert len(choice) == 1 or choice[:-1] in everything[:i]


def test_zero_accuracy_is_no_trouble() -> None:
    assert len(best_static_choices(((0.0, 0.0), (0.0,)), 10)) == 4


def test_a_shape_is_filled_with_candidates() -> None:
    tree = tree_from_choices(((0,), (0, 0), (1,), (0, 1)), [[7, 8], [5, 6]])
    assert tree == Tree((7, 5, 8, 6), (-1, 0, -1, 0))
    assert tree.depths == (1, 2, 1, 2)
    assert tree.children == {-1: {7: 0, 8: 2}, 0: {5: 1, 6: 3}}
    assert tree.path(3) == (0, 3)
    assert tree.path(-1) == ()
