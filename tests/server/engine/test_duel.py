"""Heads against none, by the clock."""

from __future__ import annotations

from random import Random

import pytest

from server.engine.duel import BLOCK, SETTLING, SURE_AFTER, TRIED_AGAIN, Duel


def play(duel: Duel, num_blocks: int, gain: float, *, noise: float = 0.0, seed: int = 0, drift: float = 0.0) -> float:
    """Steps whose tokens cost by 1 / gain less with heads, on a machine that slows down. Returns their share."""
    dice, with_heads = Random(seed), 0
    for step in range(num_blocks * BLOCK):
        with_heads += duel.has_heads
        seconds = (1 / gain if duel.has_heads else 1.0) * (1 + drift * step) * dice.uniform(1 - noise, 1 + noise)
        duel.add(1.0, seconds, 0.1 if duel.has_heads else None)
    return with_heads / (num_blocks * BLOCK)


@pytest.mark.parametrize("gain", [0.7, 0.9, 1.1, 1.4])
def test_the_better_side_has_nearly_all_steps(gain: float) -> None:
    for seed in range(5):
        duel = Duel()
        play(duel, 20, gain, noise=0.2, seed=seed, drift=0.001)
        share = play(duel, 100, gain, noise=0.2, seed=seed, drift=0.001)
        assert share > 0.85 if gain > 1 else share < 0.15


def test_it_is_known_soon() -> None:
    duel = Duel()
    play(duel, SURE_AFTER + 1, 0.8)
    assert duel.num_compared == SURE_AFTER
    assert duel.gain == pytest.approx(-0.223, abs=0.001)


def test_a_gain_that_comes_is_noticed() -> None:
    duel = Duel()
    play(duel, 30, 0.9)
    play(duel, 3 * (TRIED_AGAIN[1] + 1), 1.2)
    assert duel.gain > 0
    assert play(duel, 100, 1.2) > 0.9


@pytest.mark.parametrize(("gain", "num_requests", "num_new"), [(0.8, 1, 1), (0.8, 3, 9), (1.2, 1, 0)])
def test_others_try_heads_that_have_lost(gain: float, num_requests: int, num_new: int) -> None:
    duel = Duel()
    play(duel, 20, gain)
    assert duel.has_heads == (gain > 1)
    for _ in range(num_new):
        assert duel.has_heads == (gain > 1)
        duel.joined(1, num_requests)
    assert duel.has_heads
    play(duel, 1, gain)
    assert duel.has_heads == (gain > 1)  # they have been tried


def test_requests_do_not_end_a_turn_without_heads_that_have_won() -> None:
    duel = Duel()
    while duel.num_compared < SURE_AFTER or duel.has_heads:
        play(duel, 1, 1.2)
    duel.joined(1, 1)
    assert not duel.has_heads


def test_the_first_steps_of_a_block_do_not_count() -> None:
    duel = Duel()
    for block in range(2):
        for step in range(BLOCK):
            duel.add(1.0, 9.0 if step < SETTLING and not block else 1.0, 0.1)
    assert (duel.num_compared, duel.gain) == (1, 0.0)


def test_heads_that_did_not_guess_keep_their_turn() -> None:
    duel = Duel()
    for _ in range(3 * BLOCK):
        assert duel.has_heads
        duel.add(1.0, 1.0, None)
    assert duel.num_compared == 0


def test_blocks_apart_are_not_compared() -> None:
    duel = Duel()
    for _ in range(10):
        play(duel, 1, 0.5)
        duel.interrupt()
    assert duel.num_compared == 0


def test_promises_are_compared_with_what_was_found() -> None:
    duel = Duel()
    for step in range(10 * BLOCK):
        has_asked = duel.has_heads and step % 2 == 0
        duel.add(1.0, 0.9 if has_asked else 1.0, 0.2 if has_asked else None)
    assert duel.excess == pytest.approx(0.2 - 0.1026, abs=0.001)  # half of the steps bring 10 %
    for _ in range(20 * BLOCK):
        duel.add(1.0, 1.0, None)
    assert 0.05 < duel.excess < 0.07
