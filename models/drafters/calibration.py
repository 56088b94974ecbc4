"""How likely a guess is right: what drafters say of themselves, corrected by what became of it.

A table over (kind of decoding, depth, rank, bucket of the drafter's own probability) counts how often guesses were
right whose parents were right. It is seeded with the accuracies measured after training, mixed with the bucket's
probability, and fades, so that it follows the text that is written now.

What came is compared with all that was offered, whether anybody verified it or not: so a guess that was thought too
unlikely to verify is noticed when it is right, and what is learned does not depend on what was verified.

Invariants:
- pure numpy: no torch, no clock;
- a probability lies strictly between 0 and 1, so that a node is worth less than its parent.
"""

from __future__ import annotations

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
BUCKETS: Final = np.array([0.003, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97])
CENTRES: Final = (np.concatenate([[0.0], BUCKETS]) + np.concatenate([BUCKETS, [1.0]])) / 2
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

    def __init__(self, accuracies: Sequence[Sequence[float]], num_depths: int) -> None:
        """`accuracies[d][r]`: how often the guess ranked r at depth d + 1 is right; the last ones go on, falling."""
        seed = np.array([_extended(accuracies[min(d, len(accuracies) - 1)]) for d in range(num_depths)])
        self._shape = (len(KINDS), num_depths, NUM_RANKS, len(CENTRES))
        prior = np.clip((seed[None, :, :, None] + CENTRES) / 2, LOW, HIGH)
        self._seen: Floats = np.full(int(np.prod(self._shape)), SEED_WEIGHT)
        self._right: Floats = np.broadcast_to(prior, self._shape).reshape(-1) * SEED_WEIGHT
        self._num_seen: Floats = np.zeros(len(self._seen))
        self._told: Floats = np.zeros((3, 10))  # by tenth of the probability told: guesses, probabilities, right ones

    def cells(self, kinds: Integers, depths: Integers, ranks: Integers, given: Floats) -> Integers:
        """Places in the table, for arrays that broadcast together. Depths and ranks from 0."""
        _, num_depths, num_ranks, num_buckets = self._shape
        depths, ranks = np.minimum(depths, num_depths - 1), np.minimum(ranks, num_ranks - 1)
        buckets = np.searchsorted(BUCKETS, given)
        found: Integers = ((kinds * num_depths + depths) * num_ranks + ranks) * num_buckets + buckets
        return found

    def probabilities(self, cells: Integers) -> Floats:
        """That a guess is right, if its parent is."""
        found: Floats = np.clip(self._right[cells] / self._seen[cells], LOW, HIGH)
        return found

    def learn(self, cells: Integers, is_right: Integers) -> None:
        """What became of guesses whose parents were right: 1 or 0 each."""
        if not len(cells):
            return
        self._judge(self.probabilities(cells), is_right)
        touched, places = np.unique(cells, return_inverse=True)
        seen, right = np.bincount(places), np.bincount(places, weights=is_right)
        fading = FADING**seen
        self._seen[touched] = self._seen[touched] * fading + seen
        self._right[touched] = self._right[touched] * fading + right
        self._num_seen[touched] = self._num_seen[touched] * fading + seen

    def _judge(self, told: Floats, is_right: Integers) -> None:
        tenths = np.minimum((told * 10).astype(np.int64), 9)
        self._told *= ERROR_FADING ** len(told)
        for row, weights in zip(self._told, (None, told, is_right), strict=True):
            row += np.bincount(tenths, weights=weights, minlength=10)

    @property
    def error(self) -> float | None:
        """Mean distance between the probabilities told and how often they came true; None before any guess."""
        count, told, right = self._told
        return float(np.abs(told - right).sum() / count.sum()) if count.sum() else None

    def summary(self, least_seen: float = 20.0) -> tuple[Cell, ...]:
        """The cells that have seen enough to speak of."""
        places = np.flatnonzero(self._num_seen >= least_seen)
        indices = zip(*(index.tolist() for index in np.unravel_index(places, self._shape)), strict=True)
        right, seen = self.probabilities(places).tolist(), self._num_seen[places].tolist()
        return tuple(
            Cell(KINDS[kind], depth + 1, rank + 1, float(CENTRES[bucket]), share, count)
            for (kind, depth, rank, bucket), share, count in zip(indices, right, seen, strict=True)
        )

    def calibrated(self, guesses: Sequence[Guess], kind: Kind) -> tuple[list[Guess], TreeOffer]:
        """A tree with the drafter's own values, as one with ours, best first; and the offer to compare with the text.

        A guess's rank is its place among its siblings by value, its own probability the quotient by its parent's value.
        """
        ranks: dict[int, int] = {}  # parent -> siblings so far
        depths: list[int] = []
        places, given = [0] * len(guesses), []
        for i in sorted(range(len(guesses)), key=lambda i: -guesses[i].value):
            places[i] = ranks[guesses[i].parent] = ranks.get(guesses[i].parent, -1) + 1
        for guess in guesses:
            above = guesses[guess.parent].value if guess.parent >= 0 else 1.0
            depths.append(depths[guess.parent] + 1 if guess.parent >= 0 else 0)
            given.append(guess.value / above if above > 0 else 0.0)
        cells = self.cells(np.array(KINDS.index(kind)), _ints(depths), _ints(places), np.array(given, dtype=float))
        values: list[float] = []
        for guess, own in zip(guesses, self.probabilities(cells).tolist(), strict=True):
            values.append(own * (values[guess.parent] if guess.parent >= 0 else 1.0))
        offer = TreeOffer(tuple(guesses), cells.tolist())
        return by_value([guess._replace(value=value) for guess, value in zip(guesses, values, strict=True)]), offer


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
        self._calibration.learn(_ints(cells), np.array(rights, dtype=np.int64))

    def forget(self, request: str) -> None:
        self._open.pop(request, None)


def by_value(guesses: Sequence[Guess]) -> list[Guess]:
    """The same tree, best guesses first; of equals the one that came first, so parents come before their children."""
    order = sorted(range(len(guesses)), key=lambda i: -guesses[i].value)
    nodes = {-1: -1} | {node: place for place, node in enumerate(order)}
    return [guesses[i]._replace(parent=nodes[guesses[i].parent]) for i in order]


def _extended(accuracies: Sequence[float]) -> list[float]:
    """For all ranks."""
    found = list(accuracies[:NUM_RANKS])
    while len(found) < NUM_RANKS:
        found.append(found[-1] * 0.8 if found else 0.0)
    return found


def _ints(values: Sequence[int]) -> Integers:
    return np.array(values, dtype=np.int64)
