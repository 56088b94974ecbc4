"""Tells when an engine hangs: it has work, and for a long time no step.

Invariant: silence is counted in turns of the event loop, not by the clock, so that a machine or an API process that was
stopped and runs again is not taken for an engine that hangs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

TICKS = 20  # within the time-out


class Watchdog:
    """`hear` is for every step; `bark` returns when there were none for `timeout_seconds` while `has_work`."""

    def __init__(self, timeout_seconds: float, has_work: Callable[[], bool]) -> None:
        self._tick_seconds = timeout_seconds / TICKS
        self._has_work = has_work
        self._num_silent = 0

    def hear(self) -> None:
        self._num_silent = 0

    async def bark(self) -> None:
        self._num_silent = 0
        while self._num_silent <= TICKS:
            await asyncio.sleep(self._tick_seconds)
            self._num_silent = self._num_silent + 1 if self._has_work() else 0
