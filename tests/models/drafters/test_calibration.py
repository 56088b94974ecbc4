"""What drafters say of themselves, corrected by what became of it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.drafters.calibration import HIGH, LOW, Calibration, LatticeOffer, Offers, TreeOffer, by_value
from models.tree import Guess

SEED = ((0.5, 0.2, 0.1), (0.3, 0.1, 0.05))
TREE = [Guess(1, -1, 0.6, "heads"), Guess(2, -1, 0.3, "heads"), Guess(3, 0, 0.5, "heads"), Guess(4, 2, 0.4, "heads")]


def cell_of(table: Calibration, given_: float, depth: int = 0, rank: int = 0) -> int:
    places = table.cells(np.array(0), np.array([depth]), np.array([rank]), np.array([given_]))
    return int(places[0])


def path(guesses: Sequence[Guess], node: int) -> tuple[int, ...]:
    return () if node < 0 else (*path(guesses, guesses[node].parent), guesses[node].token)


def test_at_first_it_lies_between_the_measured_accuracy_and_the_drafters_word() -> None:
    for trust, told in ((0.0, 0.5), (1.0, 0.85), (0.5, 0.675)):
        table = Calibration(SEED, 2, trust=trust)
        assert table.probability(cell_of(table, 0.85)) == pytest.approx(told)


def test_each_cell_comes_to_its_own_rate() -> None:
    table, source = Calibration(SEED, 2), random.Random(1)
    rates = {cell_of(table, 0.35): 0.9, cell_of(table, 0.85): 0.2, cell_of(table, 0.35, depth=1, rank=2): 0.6}
    for _ in range(3000):
        for cell, rate in rates.items():
            table.learn([cell], [source.random() < rate])
    for cell, rate in rates.items():
        assert table.probability(cell) == pytest.approx(rate, abs=0.06)
    untouched = Calibration(SEED, 2)
    assert table.probability(cell_of(table, 0.15)) == untouched.probability(cell_of(table, 0.15))


def test_what_changes_is_followed() -> None:
    table = Calibration(SEED, 2)
    cell = cell_of(table, 0.5)
    table.learn([cell] * 5000, [True] * 5000)
    table.learn([cell] * 1500, [False] * 1500)
    assert table.probability(cell) < 0.1


def test_single_numbers_and_arrays_are_the_same_table() -> None:
    table = Calibration(SEED, 2)
    cells = np.arange(200)
    table.learn(list(range(200)), [cell % 3 == 0 for cell in range(200)])
    assert table.probabilities(cells).tolist() == [table.probability(cell) for cell in range(200)]


def test_probabilities_are_neither_0_nor_1() -> None:
    table = Calibration(SEED, 2)
    table.learn([7] * 20_000 + [8] * 20_000, [True] * 20_000 + [False] * 20_000)
    assert table.probability(7) == HIGH
    assert table.probability(8) == LOW


def test_the_error_tells_honest_drafters_from_liars() -> None:
    source = random.Random(0)
    honest, liar = Calibration(SEED, 2, trust=1.0), Calibration(SEED, 2, trust=1.0)
    assert honest.error is None
    for _ in range(4000):
        told = source.choice([0.05, 0.25, 0.55, 0.85])
        honest.learn([cell_of(honest, told)], [source.random() < told])
    for told in (0.05, 0.25, 0.55, 0.85):
        for cell in [cell_of(liar, told)] * 5:
            liar.learn([cell], [told < 0.5])
    assert honest.error is not None
    assert liar.error is not None
    assert honest.error < 0.05 < 0.2 < liar.error


def test_a_calibrated_tree_is_the_same_tree_best_first() -> None:
    table = Calibration(SEED, 2)
    tree, _ = table.calibrated(TREE, "greedy")
    assert {path(tree, node) for node in range(4)} == {path(TREE, node) for node in range(4)}
    values = [guess.value for guess in tree]
    assert values == sorted(values, reverse=True)
    assert all(guess.parent < place for place, guess in enumerate(tree))
    assert all(guess.value < tree[guess.parent].value for guess in tree if guess.parent >= 0)


def test_values_are_products_along_paths() -> None:
    table = Calibration(SEED, 2)
    tree, offer = table.calibrated(TREE, "sampled")
    by_path = {path(tree, node): guess.value for node, guess in enumerate(tree)}
    own = [table.probability(cell) for cell in offer.cells]
    assert by_path[1, 3] == pytest.approx(own[0] * own[2])
    assert by_path[1, 3, 4] == pytest.approx(own[0] * own[2] * own[3])


def test_what_nobody_verified_is_learned_too() -> None:
    table = Calibration(SEED, 2)
    offers = Offers(table)
    _, offer = table.calibrated(TREE, "greedy")
    before = [table.probability(cell) for cell in offer.cells]
    offers.put("a", 10, offer)
    offers.learn([("a", [0] * 10 + [2])])  # the second guess was right; whoever verified what
    after = [table.probability(cell) for cell in offer.cells]
    assert after[0] < before[0]
    assert after[1] > before[1]
    assert after[2:] == before[2:]  # its parent was wrong
    offers.learn([("a", [0] * 10 + [1, 3])])  # each offer counts once
    assert [table.probability(cell) for cell in offer.cells] == after


def test_a_forgotten_offer_teaches_nothing() -> None:
    table = Calibration(SEED, 2)
    offers = Offers(table)
    offers.put("a", 0, table.calibrated(TREE, "greedy")[1])
    offers.forget("a")
    offers.learn([("a", [1])])
    assert table.error is None


trees = st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 30)), min_size=1, max_size=12)
texts = st.lists(st.integers(0, 3), max_size=5)


@given(trees, texts)
def test_an_offer_is_compared_as_by_hand(made: list[tuple[int, int]], came: list[int]) -> None:
    guesses: list[Guess] = []
    for token, parent in made:
        parent = min(parent, len(guesses) - 1)
        if all((guess.token, guess.parent) != (token, parent) for guess in guesses):
            guesses.append(Guess(token, parent, 0.5, "heads"))
    cells, rights = TreeOffer(tuple(guesses), list(range(len(guesses)))).compare(came)
    expected = {
        node: path(guesses, node)[-1] == came[len(path(guesses, node)) - 1]
        for node in range(len(guesses))
        if len(path(guesses, node)) <= len(came)
        and list(path(guesses, node)[:-1]) == came[: len(path(guesses, node)) - 1]
    }
    assert dict(zip(cells, rights, strict=True)) == expected


def test_a_lattice_is_compared_as_far_as_it_was_right() -> None:
    offer = LatticeOffer([[5, 6], [7, 8], [9, 1]], [[0, 1], [2, 3], [4, 5]])
    assert offer.compare([6, 2, 9]) == ([0, 1, 2, 3], [False, True, False, False])
    assert offer.compare([5]) == ([0, 1], [True, False])
    assert offer.compare([]) == ([], [])


def test_of_equal_values_parents_stay_before_children() -> None:
    chain = [Guess(1, -1, 0.5, "heads"), Guess(2, 0, 0.5, "heads"), Guess(3, -1, 0.6, "heads")]
    assert [(guess.token, guess.parent) for guess in by_value(chain)] == [(3, -1), (1, -1), (2, 1)]
