"""Acceptance rules on small trees worked out by hand."""

from __future__ import annotations

import math

import pytest

from models.tree import Tree
from models.verify import sample_and_match, typical, typical_threshold

#        root -> 5 (node 0) -> 7 (node 2) -> 9 (node 3)
#             -> 6 (node 1)
TREE = Tree((5, 6, 7, 9), (-1, -1, 0, 2))


@pytest.mark.parametrize(
    ("sampled", "path"),
    [
        ([5, 7, 0, 9, 1], (0, 2, 3)),
        ([5, 7, 0, 8, 1], (0, 2)),
        ([6, 7, 7, 9, 1], (1,)),
        ([4, 7, 0, 9, 1], ()),
    ],
)
def test_sample_and_match_walks_while_children_match(sampled: list[int], path: tuple[int, ...]) -> None:
    assert sample_and_match(TREE, sampled) == path


def test_an_empty_tree_is_plain_decoding() -> None:
    assert sample_and_match(Tree(), [3]) == ()
    assert typical(Tree(), [], [1.0], 0.09, 0.3) == ()


def test_typical_threshold_is_medusas() -> None:
    assert typical_threshold(0.0, 0.09, 0.3) == 0.09
    assert typical_threshold(3.0, 0.09, 0.3) == pytest.approx(0.3 * math.exp(-3))


def test_typical_takes_the_longest_path_then_the_likeliest() -> None:
    likely, unlikely = math.log(0.2), math.log(0.01)
    entropies = [0.5] * 5  # threshold 0.09
    assert typical(TREE, [likely, likely, likely, unlikely], entropies, 0.09, 0.3) == (0, 2)
    assert typical(TREE, [likely, math.log(0.3), unlikely, likely], entropies, 0.09, 0.3) == (1,)
    assert typical(TREE, [unlikely, unlikely, likely, likely], entropies, 0.09, 0.3) == ()


def test_typical_judges_a_node_by_the_entropy_of_its_parent() -> None:
    p = math.log(0.05)
    uncertain = [3.0, 0.0, 0.0, 0.0, 0.0]  # only the root's distribution is flat: threshold 0.3 * exp(-3) = 0.015
    assert typical(TREE, [p, math.log(0.001), p, p], uncertain, 0.09, 0.3) == (0,)
