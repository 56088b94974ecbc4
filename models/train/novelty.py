"""Which generated texts are worth learning from: no near-duplicates, no loops. Pure Python.

Invariant: what is kept depends on the texts and their order alone.
"""

from __future__ import annotations

from collections.abc import Sequence

SHINGLE = 4  # words
MAX_KNOWN = 0.5  # share of shingles seen before, above which a text is a near-duplicate
MAX_PERIOD = 48  # tokens
MIN_LOOP = 48  # tokens that repeat what is one period back, before it is called a loop


class Novelty:
    """Remembers the word shingles (Broder 1997) of all texts that it has called new."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def is_new(self, text: str) -> bool:
        """Whether at most half of the text's shingles were seen before; if so, they are from now on."""
        words = text.lower().split()
        starts = range(max(len(words) - SHINGLE + 1, 1))
        shingles = {hash(tuple(words[start : start + SHINGLE])) for start in starts}
        if not words or len(shingles & self._seen) > MAX_KNOWN * len(shingles):
            return False
        self._seen |= shingles
        return True


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Whether the end of `tokens` says the same again: at least MIN_LOOP tokens, and two periods."""
    for period in range(1, min(MAX_PERIOD, len(tokens) // 2) + 1):
        needed = max(MIN_LOOP, 2 * period)
        if len(tokens) >= needed + period and all(tokens[-i] == tokens[-i - period] for i in range(1, needed + 1)):
            return True
    return False
