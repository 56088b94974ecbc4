"""Static trees against brute force."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.tree import Guess, Source, Tree, best_static_choices, draft_from_heads, expected_tau, merge

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
    draft = draft_from_heads(((0.5, 0.2), (0.8, 0.2)), [[7, 8], [5, 6]], 5)
    assert [guess.value for guess in draft] == pytest.approx([0.5, 0.4, 0.2, 0.16, 0.1])
    tree = Tree(tuple(guess.token for guess in draft), tuple(guess.parent for guess in draft))
    assert tree == Tree((7, 5, 8, 5, 6), (-1, 0, -1, 2, 0))
    assert tree.depths == (1, 2, 1, 2, 2)
    assert tree.children == {-1: {7: 0, 8: 2}, 0: {5: 1, 6: 4}, 2: {5: 3}}
    assert tree.path(3) == (2, 3)
    assert tree.path(-1) == ()


@st.composite
def drafts(draw: st.DrawFn, source: Source) -> list[Guess]:
    """A tree over few tokens whose values fall on the way down."""
    found: dict[tuple[int, int], Guess] = {}
    for _ in range(draw(st.integers(0, 12))):
        parent, token = draw(st.integers(-1, len(found) - 1)), draw(st.integers(0, 2))
        above = list(found.values())[parent].value if parent >= 0 else 1.0
        value = above * draw(st.sampled_from([0.05, 0.3, 0.7, 1.0]))
        found.setdefault((parent, token), Guess(token, parent, value, source))
    return list(found.values())


def paths(draft: list[Guess]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for guess in draft:
        found.append((*(found[guess.parent] if guess.parent >= 0 else ()), guess.token))
    return found


def chances(draft: list[Guess]) -> dict[tuple[int, ...], float]:
    """Of each path, if all of it but its end is right."""
    above = [draft[guess.parent].value if guess.parent >= 0 else 1.0 for guess in draft]
    return {path: guess.value / value for path, guess, value in zip(paths(draft), draft, above, strict=True)}


@given(drafts("prediction"), drafts("heads"), st.integers(0, 15), st.sampled_from([0.0, 0.2]))
def test_a_merge_is_the_best_of_both(first: list[Guess], second: list[Guess], num_nodes: int, least: float) -> None:
    mine, theirs = chances(first), chances(second)
    worth: dict[tuple[int, ...], float] = {(): 1.0}
    for path in sorted({*mine, *theirs}, key=len):
        taken = sum(chance for other, chance in mine.items() if other[:-1] == path[:-1])
        right = theirs.get(path, 0.0) * max(1 - taken, 0.0)
        if path in mine:
            right = 1 - (1 - mine[path]) * (1 - theirs.get(path, 0.0))
        worth[path] = right * worth[path[:-1]]
    del worth[()]
    merged = merge([first, second], num_nodes, least)
    found = dict(zip(paths(merged), merged, strict=True))
    assert all(guess.parent < i for i, guess in enumerate(merged))
    assert {path: guess.value for path, guess in found.items()} == pytest.approx({path: worth[path] for path in found})
    values = sorted(worth.values(), reverse=True)
    assert len(found) == min(sum(value >= least for value in values), num_nodes)
    assert sorted(guess.value for guess in merged) == pytest.approx(values[: len(merged)][::-1])
    assert all((path in mine) == (guess.source == "prediction") for path, guess in found.items())


def test_guesses_that_agree_are_likelier_than_either() -> None:
    copied = [Guess(5, -1, 0.5, "ngram"), Guess(6, 0, 0.25, "ngram")]
    heads = [Guess(5, -1, 0.6, "heads"), Guess(7, -1, 0.2, "heads"), Guess(8, 0, 0.3, "heads")]
    agreed, below, other, elsewhere = merge([copied, heads], 4)
    assert (agreed.token, below.token, other.token, elsewhere.token) == (5, 6, 7, 8)
    assert [guess.value for guess in (agreed, below)] == pytest.approx([0.8, 0.4])
    assert [guess.value for guess in (other, elsewhere)] == pytest.approx([0.1, 0.2])


def test_a_likelier_guess_takes_the_place_of_the_heads() -> None:
    heads = [Guess(5, -1, 0.4, "heads"), Guess(6, 0, 0.2, "heads"), Guess(7, -1, 0.1, "heads")]
    sure = [Guess(8, -1, 0.9, "ngram"), Guess(9, 0, 0.8, "ngram")]
    weak = [Guess(5, -1, 0.3, "ngram"), Guess(9, 0, 0.1, "ngram")]
    assert [guess.token for guess in merge([sure, heads], 3)] == [8, 9, 5]
    assert [(guess.token, guess.source) for guess in merge([weak, heads], 3)] == [
        (5, "ngram"),
        (9, "ngram"),
        (6, "heads"),
    ]
    assert merge([sure, heads], 2) == sure
