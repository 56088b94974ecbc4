"""A tree that grows best first, for a drafter that must be run for each node whose children it guesses.

Round by round the likeliest nodes are opened: the drafter guesses what follows them. A node is opened only if it is
among the best so far, so sure texts grow deep and unsure ones wide (EAGLE-2, arXiv 2406.16858, without a fixed shape).

Invariants: `Growth` is pure Python; a node's value is at most its parent's.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from models.sampling import Params
from models.tree import Guess

ROOT: Final = -1
NUM_RANKS: Final = 8  # guesses below one node
WIDTH: Final = 4  # nodes opened in one round
LEAST_GAIN: Final = 0.06  # what a round is expected to add to the tokens of a step; less does not pay for it
LEAST_VALUE: Final = 0.05  # of a node that is worth opening
HEARD: Final = 0.25  # of the value that pays: guesses below are dropped before anybody compares them with the text
NOISY_SURENESS: Final = 0.75  # of scores with noise: so much of their differences says which token will be drawn
OUTSIDE: Final = 3.0  # what scores lose of tokens that truncation would drop, if the verifier's were the same
NEXT_RIGHT: Final = 0.5  # how often the best guess below a right node is right, roughly


@dataclass(frozen=True, slots=True)
class Chain:
    """Where one request's tree begins: what the drafter has not seen of its text, the root last."""

    context: Tensor  # [n] slots that come before
    tokens: Tensor  # [chain]
    slots: Tensor  # [chain]
    states: Tensor  # [chain, hidden] before each token
    position: int  # of the first of them
    num_nodes: int
    max_depth: int
    least_value: float  # of a node that pays
    params: Params


class Growth:
    """One request's tree in the making."""

    def __init__(self, num_nodes: int, max_depth: int, least_value: float = 0.0) -> None:
        """Nodes that are worth less than `least_value` do not pay, so nothing is opened for their sake."""
        self.guesses: list[Guess] = []
        self._num_nodes = num_nodes
        self._max_depth = max_depth
        self._least_value = least_value
        self._depths: list[int] = []
        self._opened: set[int] = set()

    def next_round(self, width: int) -> list[int]:
        """At most `width` nodes to open now, the root at first; none if the tree is good enough."""
        if not self._opened:
            return [ROOT] if self._num_nodes and self._max_depth else []
        best = heapq.nlargest(self._num_nodes, range(len(self.guesses)), key=lambda i: self.guesses[i].value)
        worst = max(self.guesses[best[-1]].value if len(best) == self._num_nodes else 0.0, self._least_value)
        least = max(worst, LEAST_VALUE)
        worthy = [
            i
            for i in best
            if i not in self._opened and self._depths[i] < self._max_depth and self.guesses[i].value > least
        ][:width]
        gain = sum(max(self.guesses[i].value * NEXT_RIGHT - worst, 0.0) for i in worthy)
        return worthy if gain >= LEAST_GAIN else []

    def open(self, node: int, tokens: Sequence[int], shares: Sequence[float]) -> None:
        """What may follow `node`, with the probabilities if it is right; of 0, it may not."""
        value, depth = (1.0, 1) if node == ROOT else (self.guesses[node].value, self._depths[node] + 1)
        self._opened.add(node)
        found = [Guess(t, node, value * share, "heads") for t, share in zip(tokens, shares, strict=True) if share > 0]
        self.guesses += found
        self._depths += [depth] * len(found)

    def best(self) -> list[Guess]:
        """The tree: its best nodes."""
        best = heapq.nlargest(self._num_nodes, range(len(self.guesses)), key=lambda i: self.guesses[i].value)
        kept = [i for i in sorted(best) if self.guesses[i].value >= HEARD * self._least_value]
        places = {ROOT: ROOT} | {node: place for place, node in enumerate(kept)}
        return [self.guesses[i]._replace(parent=places[self.guesses[i].parent]) for i in kept]

    def depth(self, node: int) -> int:
        return 0 if node == ROOT else self._depths[node]
