"""Which nodes a growing tree opens."""

from __future__ import annotations

from models.drafters.growth import ROOT, Growth


def test_the_root_is_opened_first_and_once() -> None:
    growth = Growth(4, 3)
    assert growth.next_round(4) == [ROOT]
    growth.open(ROOT, [7, 8], [0.9, 0.05])
    assert growth.next_round(4) == [0]
    assert [(guess.token, guess.parent, guess.value) for guess in growth.guesses] == [(7, -1, 0.9), (8, -1, 0.05)]


def test_values_are_products_along_the_path() -> None:
    growth = Growth(4, 3)
    growth.open(ROOT, [7], [0.5])
    growth.open(0, [8, 9], [0.5, 0.25])
    assert [guess.value for guess in growth.guesses] == [0.5, 0.25, 0.125]
    assert [guess.parent for guess in growth.guesses] == [-1, 0, 0]
    assert growth.depth(1) == 2


def test_a_sure_text_grows_deep_and_no_deeper_than_allowed() -> None:
    growth = Growth(8, 3)
    rounds = 0
    while opened := growth.next_round(1):
        growth.open(opened[0], [5], [0.99])
        rounds += 1
    assert rounds == 3


def test_what_cannot_be_among_the_best_is_not_opened() -> None:
    growth = Growth(2, 5)
    growth.open(ROOT, [1, 2, 3], [0.8, 0.1, 0.09])
    assert growth.next_round(4) == [0]
    growth.open(0, [4], [0.9])
    assert growth.next_round(4) == []  # a second node of 0.72 is there, and one row more cannot be afforded


def test_a_round_that_brings_little_is_not_made() -> None:
    growth = Growth(8, 5)
    growth.open(ROOT, [1, 2], [0.05, 0.04])
    assert growth.next_round(4) == []


def test_nobody_grows_without_nodes_or_depth() -> None:
    assert Growth(0, 5).next_round(4) == []
    assert Growth(4, 0).next_round(4) == []
