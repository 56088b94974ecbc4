"""How likely a guess is right: what drafters say of themselves, corrected by what became of it.

A table over (kind of decoding, depth, rank, bucket of the drafter's own probability) counts how often guesses were
right whose parents were right. It is seeded with the accuracies measured after training, mixed with the bucket's
probability, and fades, so that it follows the text that is written now.

What came is compared with all that was offered, whether anybody verified it or not: so a guess that was thought too
unlikely to verify is noticed when it is right, and what is learned does not depend on what was verified.

Invariants:
- no torch, no clock;
- a probability lies strictly between 0 and 1, so that a node is worth less than its parent.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from models.tree import Guess

Kind = Literal["greedy", "sampled", "typical"]
Floats = np.ndarray[Any, np.dtype[np.float64]]
Integers = np.ndarray[Any, np.dtype[np.int64]]

KINDS: Final[tuple[Kind, ...]] = ("greedy", "sampled", "typical")
NUM_RANKS: Final = 10  # guesses of a lower rank count as of this one
BOUNDS: Final = [0.003, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97]
CENTRES: Final = (np.array([0.0, *BOUNDS]) + np.array([*BOUNDS, 1.0])) / 2
ROOT: Final = (0, 1.0, 1.0)  # what the best guesses of all have above them: depth, the drafter's value, ours
SEED_WEIGHT: Final = 8.0  # guesses that the seed counts for
FADING: Final = 0.998  # of what a cell has counted, with each guess
ERROR_FADING: Final = 0.9995
LOW, HIGH = 1e-4, 0.999


class Cell(NamedTuple):
    """Guesses of one kind, depth and rank (from 1) that the drafter gave about the probability `given`."""

    kind: Kind
    depth: int
    rank: int
    given: float
    right: float
    num_seen: float


class Calibration:
    """The table of one drafter. A cell is known by its place, an integer."""

    def __init__(self, accuracies: Sequence[Sequence[float]], num_depths: int, *, trust: float = 0.5) -> None:
        """`accuracies[d][r]`: how often the guess ranked r at depth d + 1 is right; the last ones go on, falling.

        `trust` is what the drafter's own probability weighs at first, against these.
        """
        seed = np.array([_extended(accuracies[min(d, len(accuracies) - 1)]) for d in range(num_depths)])
        self._shape = (len(KINDS), num_depths, NUM_RANKS, len(CENTRES))
        prior = np.clip(trust * CENTRES + (1 - trust) * seed[None, :, :, None], LOW, HIGH)
        right = np.broadcast_to(prior, self._shape).reshape(-1) * SEED_WEIGHT
        # arrays, since single numbers of numpy's are slow; numpy looks at the same memory
        self._right: array[float] = array("d", right.tolist())
        self._seen = array("d", [SEED_WEIGHT]) * len(right)
        self._num_seen = array("d", [0.0]) * len(right)
        self._all_right, self._all_seen = np.frombuffer(self._right), np.frombuffer(self._seen)
        self._told = [[0.0, 0.0, 0.0] for _ in range(10)]  # by tenth of what was told: guesses, told, right ones

    def cells(self, kinds: Integers, depths: Integers, ranks: Integers, given: Floats) -> Integers:
        """Places in the table, for arrays that broadcast together. Depths and ranks from 0."""
        _, num_depths, num_ranks, num_buckets = self._shape
        depths, ranks = np.minimum(depths, num_depths - 1), np.minimum(ranks, num_ranks - 1)
        buckets = np.searchsorted(BOUNDS, given)
        found: Integers = ((kinds * num_depths + depths) * num_ranks + ranks) * num_buckets + buckets
        return found

    def probabilities(self, cells: Integers) -> Floats:
        """That a guess is right, if its parent is."""
        found: Floats = np.clip(self._all_right[cells] / self._all_seen[cells], LOW, HIGH)
        return found

    def probability(self, cell: int) -> float:
        """The same for one."""
        return min(max(self._right[cell] / self._seen[cell], LOW), HIGH)

    def learn(self, cells: Sequence[int], is_right: Sequence[bool]) -> None:
        """What became of guesses whose parents were right."""
        for cell, right in zip(cells, is_right, strict=True):
            self._judge(self.probability(cell), right)
            self._seen[cell] = self._seen[cell] * FADING + 1
            self._right[cell] = self._right[cell] * FADING + right
            self._num_seen[cell] = self._num_seen[cell] * FADING + 1

    def _judge(self, told: float, is_right: bool) -> None:
        tenth = self._told[min(int(told * 10), 9)]
        for place, more in enumerate((1.0, told, is_right)):
            tenth[place] = tenth[place] * ERROR_FADING + more

    @property
    def error(self) -> float | None:
        """Mean distance between the probabilities told and how often they came true; None before any guess."""
        count = sum([seen for seen, _, _ in self._told])
        return sum([abs(told - right) for _, told, right in self._told]) / count if count else None

    def summary(self, least_seen: float = 20.0) -> tuple[Cell, ...]:
        """The cells that have seen enough to speak of."""
        places = [place for place, seen in enumerate(self._num_seen) if seen >= least_seen]
        found = np.unravel_index(np.array(places, dtype=np.int64), self._shape)
        indices = zip(*(index.tolist() for index in found), strict=True)
        return tuple(
            Cell(
                KINDS[kind],
                depth + 1,
                rank + 1,
                float(CENTRES[bucket]),
                self.probability(place),
                self._num_seen[place],
            )
            for place, (kind, depth, rank, bucket) in zip(places, indices, strict=True)
        )

    def calibrated(self, guesses: Sequence[Guess], kind: Kind) -> tuple[list[Guess], TreeOffer]:
        """A tree with the drafter's own values, as one with ours, best first; and the offer to compare with the text.

        Siblings come best first; a guess's own probability is the quotient of its value by its parent's.
        """
        _, num_depths, num_ranks, num_buckets = self._shape
        first = KINDS.index(kind) * num_depths
        ranks: dict[int, int] = {}  # parent -> siblings so far
        depths: list[int] = []
        cells: list[int] = []
        values: list[float] = []
        for guess in guesses:
            parent = guess.parent
            rank = ranks[parent] = ranks.get(parent, -1) + 1
            depth, above, value = (depths[parent] + 1, guesses[parent].value, values[parent]) if parent >= 0 else ROOT
            bucket = bisect_left(BOUNDS, guess.value / above) if above > 0 else 0
            place = (first + min(depth, num_depths - 1)) * num_ranks + min(rank, num_ranks - 1)
            cell = place * num_buckets + bucket
            depths.append(depth)
            cells.append(cell)
            values.append(value * self.probability(cell))
        return _ordered(guesses, values), TreeOffer(tuple(guesses), cells)


@dataclass(frozen=True, slots=True)
class TreeOffer:
    """What was guessed as a tree."""

    guesses: tuple[Guess, ...]
    cells: list[int]

    def compare(self, came: Sequence[int]) -> tuple[list[int], list[bool]]:
        """Cells of the guesses whose parents were right, and which of them were right, now that these tokens came."""
        children: dict[int, list[int]] = {}
        for i, guess in enumerate(self.guesses):
            children.setdefault(guess.parent, []).append(i)
        cells: list[int] = []
        rights: list[bool] = []
        node: int | None = -1
        for token in came:
            if node is None:
                break
            siblings = children.get(node, [])
            cells += [self.cells[i] for i in siblings]
            rights += [self.guesses[i].token == token for i in siblings]
            node = next((i for i in siblings if self.guesses[i].token == token), None)
        return cells, rights


@dataclass(frozen=True, slots=True)
class LatticeOffer:
    """The same guesses below every node of a depth: `tokens[d][r]`, `cells[d][r]`."""

    tokens: list[list[int]]
    cells: list[list[int]]

    def compare(self, came: Sequence[int]) -> tuple[list[int], list[bool]]:
        """As `TreeOffer.compare`."""
        cells: list[int] = []
        rights: list[bool] = []
        for tokens, places, token in zip(self.tokens, self.cells, came, strict=False):
            cells += places
            rights += [guess == token for guess in tokens]
            if token not in tokens:
                break
        return cells, rights


class Offers:
    """What was last guessed for each request, until it is known what came instead."""

    def __init__(self, calibration: Calibration) -> None:
        self._calibration = calibration
        self._open: dict[str, tuple[int, TreeOffer | LatticeOffer]] = {}  # request -> tokens before it, offer

    def put(self, request: str, num_tokens: int, offer: TreeOffer | LatticeOffer) -> None:
        self._open[request] = num_tokens, offer

    def learn(self, texts: Sequence[tuple[str, Sequence[int]]]) -> None:
        """Compare the offers to these requests with their texts."""
        cells: list[int] = []
        rights: list[bool] = []
        for request, text in texts:
            num_tokens, offer = self._open.pop(request, (0, None))
            if offer is not None:
                found, right = offer.compare(text[num_tokens:])
                cells += found
                rights += right
        self._calibration.learn(cells, rights)

    def forget(self, request: str) -> None:
        self._open.pop(request, None)


def by_value(guesses: Sequence[Guess]) -> list[Guess]:
    """The same tree, best guesses first; of equals the one that came first, so parents come before their children."""
    return _ordered(guesses, [guess.value for guess in guesses])


def _ordered(guesses: Sequence[Guess], values: Sequence[float]) -> list[Guess]:
    """The same tree with these values, best first; a parent's is at least its child's."""
    order = sorted(range(len(guesses)), key=lambda i: -values[i])
    places = [-1] * (len(guesses) + 1)  # the last one is the root's
    for place, i in enumerate(order):
        places[i] = place
    return [Guess(guesses[i].token, places[guesses[i].parent], values[i], guesses[i].source) for i in order]


def _extended(accuracies: Sequence[float]) -> list[float]:
    """For all ranks."""
    found = list(accuracies[:NUM_RANKS])
    while len(found) < NUM_RANKS:
        found.append(found[-1] * 0.8 if found else 0.0)
    return found
