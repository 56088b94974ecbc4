"""The free list and its check."""

from __future__ import annotations

import pytest

from server.engine.slots import SlotError, SlotPool


def test_slots_go_round() -> None:
    pool = SlotPool(4)
    taken = pool.allocate(3)
    assert 0 not in taken
    pool.check(taken)
    pool.release(taken[:2])
    assert pool.num_free == 3
    pool.check(taken[2:])


def test_lost_doubled_and_missing_slots_are_noticed() -> None:
    pool = SlotPool(3)
    taken = pool.allocate(2)
    with pytest.raises(SlotError, match="3 slots"):
        pool.check(taken[:1])
    with pytest.raises(SlotError, match="3 slots"):
        pool.check([*taken, taken[0]])
    with pytest.raises(SlotError, match="asked for"):
        pool.allocate(2)
