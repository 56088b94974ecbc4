"""Whether the heads pay in batches of one size, by the clock.

What the controller expects of them rests on a model of step times, and a live machine bends those: steps behind other
steps find other caches, and Python takes longer with every tree. So blocks of steps in which heads may be asked take
turns with blocks in which they rest, and the tokens per second of two neighbours are compared: what slows the machine
for seconds slows both. Tokens are those expected, which are as many as come but spread less.

Invariants:
- the better side so far has nearly all blocks; the other is tried again the more seldom the clearer it was;
- a block in which the heads were free to guess but hardly did says nothing, and does not end their turn.
"""

from __future__ import annotations

from math import log
from typing import Final

BLOCK: Final = 16  # steps
SETTLING: Final = 4  # of them come before steps are as fast as they are among their like: caches, and catching up
ASKED_SHARE: Final = 0.25  # of the other steps, for a block to count as one with heads
SURE_AFTER: Final = 4  # comparisons, between which sides take turns
RATE: Final = 0.2  # of the gain, with each comparison
MOST: Final = 0.3  # of a comparison: what is beyond was something else
TRIED_AGAIN: Final = (8, 32)  # blocks of the better side in between, at least and at most
PATIENCE: Final = 300  # times the gain: so many


class Duel:
    """Heads against none."""

    def __init__(self) -> None:
        self.gain = 0.0  # logarithm of tokens per second with heads over without
        self.num_compared = 0
        self.has_heads = True  # this block: may they be asked?
        self._last: tuple[bool, float] | None = None  # the block before: with heads?, logarithm of its rate
        self._num_blocks = 0  # of the better side in a row
        self.interrupt()

    @property
    def is_plain(self) -> bool:
        """Do heads rest, and have they rested for long enough that caches do not remember them?"""
        return not self.has_heads and self._num_steps >= SETTLING

    def interrupt(self) -> None:
        """Steps of another kind come between: what was measured last is no neighbour."""
        self._last = None
        self._begin()

    def add(self, tokens: float, seconds: float, *, has_asked: bool) -> None:
        """One step of this block."""
        self._num_steps += 1
        if self._num_steps > SETTLING:
            self._tokens += tokens
            self._seconds += seconds
            self._num_asked += has_asked
        if self._num_steps == BLOCK:
            self._end()
            self._begin()

    def _begin(self) -> None:
        self._num_steps = self._num_asked = 0
        self._tokens = self._seconds = 0.0

    def _end(self) -> None:
        if (self.has_heads and self._num_asked < ASKED_SHARE * (BLOCK - SETTLING)) or self._seconds <= 0:
            self._last = None
            return
        here = self.has_heads, log(self._tokens / self._seconds)
        if self._last is not None and self._last[0] is not self.has_heads:
            self._compare(*(rate for _, rate in sorted([here, self._last])))
        self._last = here
        is_better = self.has_heads is (self.gain >= 0)
        self._num_blocks = self._num_blocks + 1 if is_better else 0
        if not is_better or self._num_blocks >= self._turn():
            self.has_heads = not self.has_heads

    def _compare(self, without: float, with_heads: float) -> None:
        self.num_compared += 1
        gain = min(max(with_heads - without, -MOST), MOST)
        self.gain += max(RATE, 1 / self.num_compared) * (gain - self.gain)

    def _turn(self) -> int:
        """Blocks of the better side before the other is tried."""
        if self.num_compared < SURE_AFTER:
            return 1
        return int(min(max(PATIENCE * abs(self.gain), TRIED_AGAIN[0]), TRIED_AGAIN[1]))
