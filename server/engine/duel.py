"""Whether the heads pay in batches of one size, by the clock.

What the controller expects of them rests on a model of step times, and a live machine bends those: steps behind other
steps find other caches, and Python takes longer with every tree. So blocks of steps in which heads may be asked take
turns with blocks in which they rest, and the tokens per second of two neighbours are compared: what slows the machine
for seconds slows both. Tokens are those expected, which are as many as come but spread less.

Besides, it is kept how far the gains that the controller promised were from those found: where it promises too much, it
has to promise more.

Invariants:
- the better side so far has nearly all blocks; the other is tried again the more seldom the clearer it was;
- heads that have lost are tried again once the requests are others, whose text may suit them;
- a block in which the heads were free to guess but hardly did says nothing, and does not end their turn.
"""

from __future__ import annotations

from math import log
from typing import Final, NamedTuple

BLOCK: Final = 16  # steps
SETTLING: Final = 4  # of them come before steps are as fast as they are among their like: caches, and catching up
ASKED_SHARE: Final = 0.25  # of the other steps, for a block to count as one with heads
SURE_AFTER: Final = 4  # comparisons, between which sides take turns
RATE: Final = 0.2  # of the gain, with each comparison
MOST: Final = 0.3  # of a comparison: what is beyond was something else
TRIED_AGAIN: Final = (8, 128)  # blocks of the better side in between, at least and at most
PATIENCE: Final = 500  # times the gain: so many
FADING: Final = 0.98  # of the excess, with each block in which nobody is asked


class Block(NamedTuple):
    """Some steps in a row."""

    has_heads: bool
    rate: float  # logarithm of tokens per second
    promised: float  # gain of asking, as a logarithm, mean over all steps
    asked: float  # share of the steps


class Duel:
    """Heads against none."""

    def __init__(self) -> None:
        self.gain = 0.0  # logarithm of tokens per second with heads over without
        self.excess = 0.0  # of the gain that asking promised over that found
        self.num_compared = 0
        self.has_heads = True  # this block: may they be asked?
        self._last: Block | None = None  # the one before
        self._num_blocks = 0  # of the better side in a row
        self._renewed = 0.0  # see `joined`, since heads were last tried
        self.interrupt()

    @property
    def has_won(self) -> bool:
        """Are heads the better side so far?"""
        return self.gain >= 0

    @property
    def is_plain(self) -> bool:
        """Do heads rest, and have they rested for long enough that caches do not remember them?"""
        return not self.has_heads and self._num_steps >= SETTLING

    def interrupt(self) -> None:
        """Steps of another kind come between: what was measured last is no neighbour."""
        self._last = None
        self._begin()

    def joined(self, num_new: int, num_requests: int) -> None:
        """So many are new. Of one request, what was found says nothing; the mean over a crowd stays much the same."""
        self._renewed += num_new / num_requests**2
        if self._renewed >= 1 and not self.has_heads and not self.has_won and self.num_compared >= SURE_AFTER:
            self.has_heads = True
            self._begin()

    def add(self, tokens: float, seconds: float, promised: float | None) -> None:
        """One step of this block. `promised`: the gain of asking the heads, a logarithm; None: they were not."""
        self._num_steps += 1
        if self._num_steps > SETTLING:
            self._tokens += tokens
            self._seconds += seconds
            self._num_asked += promised is not None
            self._promised += promised or 0.0
        if self._num_steps == BLOCK:
            self._end()
            self._begin()

    def _begin(self) -> None:
        self._renewed = 0.0 if self.has_heads else self._renewed
        self._num_steps = self._num_asked = 0
        self._tokens = self._seconds = self._promised = 0.0

    def _end(self) -> None:
        if (self.has_heads and self._num_asked < ASKED_SHARE * (BLOCK - SETTLING)) or self._seconds <= 0:
            self._last = None
            self.excess *= FADING
            return
        counted = BLOCK - SETTLING
        rate = log(self._tokens / self._seconds)
        here = Block(self.has_heads, rate, self._promised / counted, self._num_asked / counted)
        if self._last is not None and self._last.has_heads is not self.has_heads:
            self._compare(*sorted([self._last, here]))
        self._last = here
        is_better = self.has_heads is self.has_won
        self._num_blocks = self._num_blocks + 1 if is_better else 0
        if not is_better or self._num_blocks >= self._turn():
            self.has_heads = not self.has_heads

    def _compare(self, without: Block, with_heads: Block) -> None:
        self.num_compared += 1
        rate = max(RATE, 1 / self.num_compared)
        gain = _clipped(with_heads.rate - without.rate, MOST)
        self.gain += rate * (gain - self.gain)
        excess = _clipped((with_heads.promised - gain) / with_heads.asked, 2 * MOST)
        self.excess += rate * (excess - self.excess)

    def _turn(self) -> int:
        """Blocks of the better side before the other is tried."""
        if self.num_compared < SURE_AFTER:
            return 1
        return int(min(max(PATIENCE * abs(self.gain), TRIED_AGAIN[0]), TRIED_AGAIN[1]))


def _clipped(gain: float, most: float) -> float:
    return min(max(gain, -most), most)
