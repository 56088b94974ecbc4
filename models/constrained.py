"""Trees of a request with a grammar: no forbidden node, and a chain wherever the grammar leaves no choice.

Invariants:
- every node may follow its path, so no row is spent on what cannot be accepted;
- forced tokens below the root are taken first, and even if nobody drafts; below an unlikely guess they are guesses too;
- guesses are taken by value.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from models.grammar import GrammarState
from models.tree import Guess

LIKELY = 0.5  # the probability of a path from which on forced tokens below it do not count as guesses
Accuracies = Sequence[Sequence[float]]  # [depth][rank]


@dataclass(order=True, slots=True)
class _Offer:
    """A node that may be taken, likeliest first; of equals the one that was offered first."""

    cost: float  # minus the probability of its path
    order: int
    token: int = field(compare=False)
    parent: int = field(compare=False)
    path: tuple[int, ...] = field(compare=False)  # tokens down to the parent
    is_forced: bool = field(compare=False)


class _Grower:
    def __init__(
        self, state: GrammarState, candidates: Sequence[Sequence[int]], accuracies: Accuracies, max_depth: int
    ) -> None:
        self._state = state
        self._candidates = candidates
        self._accuracies = accuracies
        self._max_depth = max_depth
        self._heap: list[_Offer] = []
        self._num_offers = 0

    def grow(self, num_guesses: int, num_forced: int) -> list[Guess]:
        grown: list[Guess] = []
        self._open((), -1, 1.0)
        while self._heap and num_guesses + num_forced > 0:
            offer = heapq.heappop(self._heap)
            is_sure = offer.is_forced and -offer.cost >= LIKELY and num_forced > 0
            if not is_sure and num_guesses == 0:
                continue
            if is_sure:
                num_forced -= 1
            else:
                num_guesses -= 1
            self._open((*offer.path, offer.token), len(grown), -offer.cost)
            grown.append(Guess(offer.token, offer.parent, -offer.cost, "grammar" if offer.is_forced else "heads"))
        return grown

    def _open(self, path: tuple[int, ...], node: int, value: float) -> None:
        """Offer what may follow `path`, which ends at `node` and is right with probability `value`."""
        if len(path) >= self._max_depth or self._state.is_complete(path):
            return
        forced = self._state.forced(path)
        if forced is not None:
            self._offer(value, forced, node, path, is_forced=True)
            return
        for token, share in self._guesses(path):
            self._offer(value * share, token, node, path, is_forced=False)

    def _guesses(self, path: tuple[int, ...]) -> Iterator[tuple[int, float]]:
        """Allowed candidates, and how likely each is now that others are out of the question."""
        if len(path) >= len(self._candidates):
            return
        ranked = self._candidates[len(path)]
        chances = dict(zip(ranked, self._accuracies[len(path)], strict=False))
        allowed = self._state.allowed(path, list(chances))
        total, left = sum(chances.values()), sum(chances[token] for token in allowed)
        for token in allowed:
            yield token, chances[token] * total / left if left else 0.0

    def _offer(self, value: float, token: int, parent: int, path: tuple[int, ...], *, is_forced: bool) -> None:
        heapq.heappush(self._heap, _Offer(-value, self._num_offers, token, parent, path, is_forced))
        self._num_offers += 1


def grow(
    state: GrammarState,
    candidates: Sequence[Sequence[int]],
    accuracies: Accuracies,
    *,
    num_guesses: int,
    num_forced: int,
    max_depth: int,
) -> list[Guess]:
    """The best tree of at most `num_guesses` drafted nodes and `num_forced` forced ones.

    `candidates[d][r]` is the token ranked `r` for depth `d + 1`, `accuracies[d][r]` how often it is right. Both may end
    early, or be empty: forced tokens need nobody to guess them.
    """
    return _Grower(state, candidates, accuracies, max_depth).grow(num_guesses, num_forced)
