"""Drafting with parallel heads: trees from each request's own probabilities, calibrated by what became of earlier ones.

Invariant: the heads run once for all requests of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from models.drafters.calibration import KINDS, NUM_RANKS, Calibration, Floats, Integers, Kind, LatticeOffer, Offers
from models.drafters.lattice import best_trees, lattice
from models.drafters.medusa import Candidates, DraftRow, Heads, propose
from models.drafters.resblock import DEFAULT_ACCURACIES
from models.tree import Guess, draft_from_heads

LEAST_VALUE: Final = 0.003  # a node worth less never pays


@dataclass(frozen=True, slots=True)
class Ask:
    """One request that the heads are to guess for."""

    request: str
    text: Sequence[int]  # prompt + output
    hidden: Tensor  # [hidden] of the last accepted row
    row: DraftRow
    kind: Kind
    num_nodes: int
    max_depth: int


@dataclass(frozen=True, slots=True)
class Ranked:
    """Candidates of one request by depth and rank, and how likely each is if those before it are right."""

    tokens: list[list[int]]
    probabilities: list[list[float]]


class ParallelDrafter:
    """Medusa's heads, and Meta's: all depths are guessed from one hidden state."""

    def __init__(self, heads: Heads, *, is_static: bool = False) -> None:
        """With `is_static` all trees have the one shape that is best by the accuracies measured after training."""
        self.heads = heads
        self._accuracies = (heads.accuracies or DEFAULT_ACCURACIES)[: heads.num_heads]
        self._is_static = is_static
        self.calibration = Calibration(self._accuracies, heads.num_heads)
        self._offers = Offers(self.calibration)

    def trees(self, asks: Sequence[Ask]) -> list[list[Guess]]:
        """The best guesses for each, best first."""
        if not asks:
            return []
        candidates, probabilities = self._guess(asks)
        if self._is_static:
            return [self._static(tokens, ask) for tokens, ask in zip(candidates.tokens.tolist(), asks, strict=True)]
        num_nodes = max(ask.num_nodes for ask in asks)
        shape = lattice(*candidates.tokens.shape[1:], num_nodes)
        values = shape.values(probabilities)
        deepest = np.array([ask.max_depth for ask in asks])
        values[shape.depths >= deepest[:, None]] = 0.0
        tokens, parents, values = best_trees(shape, values, candidates.tokens, num_nodes)
        counts = np.minimum((values >= LEAST_VALUE).sum(1), [ask.num_nodes for ask in asks]).tolist()
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

    def _guess(self, asks: Sequence[Ask], *, is_watched: bool = True) -> tuple[Candidates, Floats]:
        """Candidates, and the calibrated probability of each: [asks, depths, ranks]."""
        self._offers.learn([(ask.request, ask.text) for ask in asks])
        candidates = propose(
            self.heads, torch.stack([ask.hidden for ask in asks]), [ask.row for ask in asks], NUM_RANKS
        )
        given = np.nan_to_num(candidates.given)  # what may not be said at all has no share of it
        cells = self._cells(given, [ask.kind for ask in asks])
        if is_watched:
            for ask, *offer in zip(asks, candidates.tokens.tolist(), cells.tolist(), strict=True):
                self._offers.put(ask.request, len(ask.text), LatticeOffer(*offer))
        return candidates, np.where(given > 0, self.calibration.probabilities(cells), 0.0)

    def _cells(self, given: Floats, kinds: Sequence[Kind]) -> Integers:
        _, num_depths, num_ranks = given.shape
        of_kind = np.array([KINDS.index(kind) for kind in kinds])[:, None, None]
        return self.calibration.cells(of_kind, np.arange(num_depths)[:, None], np.arange(num_ranks), given)

    def _static(self, tokens: list[list[int]], ask: Ask) -> list[Guess]:
        reachable = tuple(depth[: len(tokens[0])] for depth in self._accuracies[: ask.max_depth])
        return draft_from_heads(reachable, tokens, ask.num_nodes)
