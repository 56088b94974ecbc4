"""Sides that are measured by turns, so that what slows the machine for a while hits all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

K = TypeVar("K")


def by_turns(runs: Mapping[K, Callable[[], float]], rounds: int) -> dict[K, list[float]]:
    """What each run returned, one number a round; every other round goes backwards."""
    found: dict[K, list[float]] = {name: [] for name in runs}
    for index in range(rounds):
        for name in list(runs)[:: -1 if index % 2 else 1]:
            found[name].append(runs[name]())
    return found
