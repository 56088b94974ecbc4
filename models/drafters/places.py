"""Where a text goes on as another did: behind the latest like n-gram in itself, or in a predicted text.

A place is looked for by the last tokens of the text, and the one behind the longest match is taken.

Invariants:
- a finder follows one text that only ever grows, and takes in each token once;
- a search compares a bounded number of places, MAX_MATCH tokens each: its cost does not grow with the text;
- a place always has a token: there is something to copy.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import chain, cycle, islice
from typing import Final, NamedTuple, Protocol

LOOKED_AT: Final = 16  # places compared in one search, to each side
MAX_MATCH: Final = 16  # a longer match makes nobody surer


class Place(NamedTuple):
    """`text[start]` comes next if the text goes on as it did there, where the same `match` tokens were before it."""

    text: Sequence[int]
    start: int
    match: int
    is_own: bool = False  # a place in the text itself: what ends there begins again

    def tokens(self, count: int) -> list[int]:
        """Up to `count` tokens from there on."""
        ahead = self.text[self.start : self.start + count]
        return list(islice(cycle(ahead), count) if self.is_own else ahead)


class Finder(Protocol):
    """Follows one text."""

    def find(self, text: Sequence[int]) -> Place | None:
        """Where `text` may go on; it begins with the text of the call before."""


class Repeats:
    """Places in the text itself, behind n-grams of at least `min_match` tokens; of equal matches the latest.

    A match of `max_match` tokens is good enough to look no further.
    """

    def __init__(self, min_match: int, max_match: int) -> None:
        self._min_match, self._max_match = min_match, max_match
        self._starts: dict[tuple[int, ...], list[int]] = {}  # n-gram -> where the text went on behind it, ascending
        self._num_taken = min_match  # n-grams that end before this token are known

    def find(self, text: Sequence[int]) -> Place | None:
        for end in range(self._num_taken, len(text)):
            self._starts.setdefault(tuple(text[end - self._min_match : end]), []).append(end)
        self._num_taken = max(self._num_taken, len(text))
        best: Place | None = None
        for start in reversed(self._starts.get(tuple(text[-self._min_match :]), [])[-LOOKED_AT:]):
            match = match_length(text, start, text, len(text), MAX_MATCH)
            if best is None or match > best.match:
                best = Place(text, start, match, is_own=True)
            if match >= self._max_match:
                break
        return best


class Alignment:
    """Places in a prediction of the output, which begins behind `num_prompt` tokens.

    The output begins where the prediction does, and they go on together while their tokens are the same. After another
    token the output's last tokens are looked for in the prediction: the longest match is taken, of equal ones the first
    from where the two parted, then the last before it, which must be of two tokens. Without any, one token is taken to
    stand for another; when the next one deviates too, nothing is guessed until a match is found.
    """

    def __init__(self, prediction: Sequence[int], num_prompt: int) -> None:
        self._prediction = prediction
        self._num_prompt = self._num_taken = num_prompt
        self._start: int | None = 0
        self._match = MAX_MATCH  # at the beginning the client's word is taken for it
        self._parted = 0  # where the output was last known to stand
        self._starts: dict[int, list[int]] = {}  # token -> the places behind it, ascending
        for start, token in enumerate(prediction, 1):
            self._starts.setdefault(token, []).append(start)

    def find(self, text: Sequence[int]) -> Place | None:
        for end in range(self._num_taken + 1, len(text) + 1):
            self._take(text, end)
        self._num_taken = max(self._num_taken, len(text))
        if self._start is None or self._start >= len(self._prediction):
            return None
        return Place(self._prediction, self._start, self._match)

    def _take(self, text: Sequence[int], end: int) -> None:
        """Go on by the token before `end`."""
        start = self._start
        if start is not None and start < len(self._prediction) and self._prediction[start] == text[end - 1]:
            self._start = self._parted = start + 1
            self._match = min(self._match + 1, MAX_MATCH)
            return
        match, found = self._longest(text, end)
        if match:
            self._start = self._parted = found
        else:
            self._start = self._parted + 1 if start == self._parted else None
        self._match = match

    def _longest(self, text: Sequence[int], end: int) -> tuple[int, int]:
        """Length and place of the longest match; 0 if there is none."""
        best, found = 0, 0
        limit = min(end - self._num_prompt, MAX_MATCH)
        for start in self._candidates(text[end - 1]):
            match = match_length(self._prediction, start, text, end, limit)
            if match > best and (match > 1 or start >= self._parted):
                best, found = match, start
        return best, found

    def _candidates(self, token: int) -> Iterable[int]:
        """Places behind `token`: from where the two parted upwards, then downwards."""
        starts = self._starts.get(token, [])
        middle = bisect_left(starts, self._parted)
        return chain(starts[middle : middle + LOOKED_AT], reversed(starts[max(middle - LOOKED_AT, 0) : middle]))


def match_length(text: Sequence[int], end: int, other: Sequence[int], other_end: int, limit: int) -> int:
    """How many tokens before `text[end]` are the same as before `other[other_end]`, up to `limit`."""
    limit = min(end, other_end, limit)
    return next((n for n in range(limit) if text[end - 1 - n] != other[other_end - 1 - n]), limit)
