"""Drafting with parallel heads: trees from each request's own probabilities, calibrated by what became of earlier ones.

Invariant: the heads run once for all requests of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.drafters.calibration import KINDS, NUM_RANKS, Calibration, Floats, Integers, Kind, LatticeOffer, Offers
from models.drafters.drafter import Ask, Ranked
from models.drafters.lattice import best_trees, lattice
from models.drafters.medusa import Candidates, Heads, propose
from models.drafters.resblock import DEFAULT_ACCURACIES
from models.tree import Guess, draft_from_heads

LEAST_VALUE: Final = 0.003  # a node worth less pays nowhere


class ParallelDrafter:
    """Medusa's heads, and Meta's: all depths are guessed from one hidden state."""

    def __init__(self, heads: Heads, *, is_static: bool = False) -> None:
        """With `is_static` all trees have the one shape that is best by the accuracies measured after training."""
        self.heads = heads
        self._accuracies = (heads.accuracies or DEFAULT_ACCURACIES)[: heads.num_heads]
        self.num_heads, self.sees_all = heads.num_heads, False
        self._is_static = is_static
        self.calibration = Calibration(self._accuracies, heads.num_heads)
        self._offers = Offers(self.calibration)
        self._states: dict[str, tuple[int, Tensor]] = {}  # request -> position, [hidden]

    def overwrite(self, slots: Sequence[int]) -> None:
        """No slot matters here."""

    def remember(self, request: str, start: int, states: Tensor) -> None:
        """The model's states at a request's positions from `start` on: [n, hidden]; only the last is of use."""
        self._states[request] = start + len(states) - 1, states[-1].clone()  # or all of them would be kept

    def knows(self, request: str, root: int) -> bool:
        """Whether the state before the token at position `root` is remembered."""
        return request in self._states and self._states[request][0] == root - 1

    def trees(self, asks: Sequence[Ask]) -> list[list[Guess]]:
        """The best guesses for each, best first."""
        if not asks:
            return []
        candidates, probabilities = self._guess(asks)
        if self._is_static:
            return [self._static(tokens, ask) for tokens, ask in zip(candidates.tokens.tolist(), asks, strict=True)]
        num_nodes = max([ask.num_nodes for ask in asks])
        shape = lattice(*candidates.tokens.shape[1:], num_nodes)
        values = shape.values(probabilities)
        deepest = np.array([ask.max_depth for ask in asks])
        values[shape.depths >= deepest[:, None]] = 0.0
        tokens, parents, values = best_trees(shape, values, candidates.tokens, num_nodes)
        least = np.array([max(ask.least_value, LEAST_VALUE) for ask in asks])
        counts = np.minimum((values >= least[:, None]).sum(1), [ask.num_nodes for ask in asks]).tolist()
        rows = zip(tokens.tolist(), parents.tolist(), values.tolist(), counts, strict=True)
        return [
            [Guess(*node, "heads") for node in zip(token[:count], parent[:count], value[:count], strict=True)]
            for token, parent, value, count in rows
        ]

    def ranked(self, asks: Sequence[Ask]) -> list[Ranked]:
        """Candidates for whoever grows the trees himself. Nothing is learned of what becomes of them."""
        if not asks:
            return []
        candidates, probabilities = self._guess(asks, is_watched=False)
        return [Ranked(*found) for found in zip(candidates.tokens.tolist(), probabilities.tolist(), strict=True)]

    def forget(self, request: str) -> None:
        """Drop all state of a request."""
        self._offers.forget(request)
        self._states.pop(request, None)

    def _guess(self, asks: Sequence[Ask], *, is_watched: bool = True) -> tuple[Candidates, Floats]:
        """Candidates, and the calibrated probability of each: [asks, depths, ranks]."""
        self._offers.learn([(ask.request, ask.text) for ask in asks])
        candidates = propose(
            self.heads,
            torch.stack([self._states[ask.request][1] for ask in asks]),
            [ask.row for ask in asks],
            NUM_RANKS,
        )
        given = np.nan_to_num(candidates.given)  # what may not be said at all has no share of it
        cells = self._cells(given, [ask.kind for ask in asks])
        if is_watched:
            offers = zip(asks, candidates.tokens, cells, given > 0, strict=True)
            for ask, tokens, places, may_be in offers:
                self._offers.put(ask.request, len(ask.text), _offer(tokens, places, may_be))
        return candidates, np.where(given > 0, self.calibration.probabilities(cells), 0.0)

    def _cells(self, given: Floats, kinds: Sequence[Kind]) -> Integers:
        _, num_depths, num_ranks = given.shape
        of_kind = np.array([KINDS.index(kind) for kind in kinds])[:, None, None]
        return self.calibration.cells(of_kind, np.arange(num_depths)[:, None], np.arange(num_ranks), given)

    def _static(self, tokens: list[list[int]], ask: Ask) -> list[Guess]:
        reachable = tuple(depth[: len(tokens[0])] for depth in self._accuracies[: ask.max_depth])
        return draft_from_heads(reachable, tokens, ask.num_nodes)


def _offer(tokens: Integers, cells: Integers, may_be: NDArray[np.bool_]) -> LatticeOffer:
    """All but what a mask forbids, of which nothing is to be learned: [depths, ranks] each."""
    depths = range(len(tokens))
    return LatticeOffer([tokens[d, may_be[d]].tolist() for d in depths], [cells[d, may_be[d]].tolist() for d in depths])
