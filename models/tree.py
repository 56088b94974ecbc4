"""Trees of guessed tokens: what a tree is, and the best static shape for a number of nodes.

Invariants:
- a node's parent comes before it (`parents[i] < i`), `-1` is the root, which is not a node;
- siblings carry distinct tokens, so at most one child can match;
- the choices for `n` nodes are the first `n` of the choices for more: trees only grow.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

MAX_NODES = 63  # with the root 64 rows: an ancestor set fits into one 64-bit mask

Choice = tuple[int, ...]  # ranks from depth 1 on, as in Medusa's `medusa_choices`


@dataclass(frozen=True)
class Tree:
    """Guessed tokens below the root. An empty tree is plain decoding."""

    tokens: tuple[int, ...] = ()  # [nodes]
    parents: tuple[int, ...] = ()  # [nodes]

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Distance of each node from the root: at least 1."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def children(self) -> dict[int, dict[int, int]]:
        """parent -> token -> node; the root's key is -1."""
        children: dict[int, dict[int, int]] = {}
        for node, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=True)):
            children.setdefault(parent, {})[token] = node
        return children

    def path(self, node: int) -> tuple[int, ...]:
        """Nodes from depth 1 down to `node`, both included; empty for the root (-1)."""
        nodes: list[int] = []
        while node >= 0:
            nodes.append(node)
            node = self.parents[node]
        return tuple(reversed(nodes))


@lru_cache(maxsize=4096)
def best_static_choices(accuracies: tuple[tuple[float, ...], ...], num_nodes: int) -> tuple[Choice, ...]:
    """The `num_nodes` choices of greatest expected acceptance, best first (Medusa, arXiv 2401.10774, section 2.3.3).

    `accuracies[d][r]` is the probability that the token ranked `r` by head `d` is the right one; depths are taken as
    independent, so a node's value is the product along its path. Ranks must not grow in value along `r`.
    """
    chosen: list[Choice] = []
    heap: list[tuple[float, Choice]] = []

    def offer(prefix_value: float, choice: Choice) -> None:
        depth, rank = len(choice) - 1, choice[-1]
        if depth < len(accuracies) and rank < len(accuracies[depth]):
            heapq.heappush(heap, (-prefix_value * accuracies[depth][rank], choice))

    offer(1.0, (0,))
    while heap and len(chosen) < min(num_nodes, MAX_NODES):
        value, choice = heapq.heappop(heap)
        chosen.append(choice)
        offer(-value, (*choice, 0))
        rank_value = accuracies[len(choice) - 1][choice[-1]]
        offer(-value / rank_value if rank_value else 0.0, (*choice[:-1], choice[-1] + 1))
    return tuple(chosen)


def expected_tau(accuracies: Sequence[Sequence[float]], choices: Sequence[Choice]) -> float:
    """Expected tokens per step, 1 + accepted, if depths were independent."""
    total = 1.0
    for choice in choices:
        value = 1.0
        for depth, rank in enumerate(choice):
            value *= accuracies[depth][rank]
        total += value
    return total


@lru_cache(maxsize=4096)
def _shape(choices: tuple[Choice, ...]) -> tuple[int, ...]:
    index = {choice: node for node, choice in enumerate(choices)}
    return tuple(index[choice[:-1]] if len(choice) > 1 else -1 for choice in choices)


def tree_from_choices(choices: tuple[Choice, ...], candidates: Sequence[Sequence[int]]) -> Tree:
    """Fill a static shape with tokens; `candidates[d][r]` is the token ranked `r` by head `d`. Ancestors come first."""
    return Tree(tuple(candidates[len(choice) - 1][choice[-1]] for choice in choices), _shape(choices))
