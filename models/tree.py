"""Trees of guessed tokens: what a tree is, and the best static shape for a number of nodes.

Invariants:
- a node's parent comes before it (`parents[i] < i`), `-1` is the root, which is not a node;
- siblings carry distinct tokens, so at most one child can match;
- the choices for `n` nodes are the first `n` of the choices for more: trees only grow;
- a guess is worth no more than its parent, so the best guesses of a draft are a tree.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Literal, NamedTuple

MAX_NODES = 63  # with the root 64 rows: an ancestor set fits into one 64-bit mask

Source = Literal["heads", "ngram", "prediction", "grammar"]  # who guessed
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


class Guess(NamedTuple):
    """One node as a drafter offers it. A draft is a list of them: a node's parent comes before it, -1 is the root."""

    token: int
    parent: int
    value: float  # the probability that it and all its ancestors are right
    source: Source


def merge(drafts: Sequence[Sequence[Guess]], num_nodes: int, min_value: float = 0.0) -> list[Guess]:
    """The best `num_nodes` guesses of all drafts that are worth `min_value`, as one draft.

    Equal paths are one node, of the draft named first; below a right parent it is wrong only if all drafts that guess
    it are. Where a draft guesses otherwise than those before it, its guesses count by what those leave over there.
    """
    merged: list[Guess] = []
    chances: list[float] = []  # that a node is right, if its parent is
    index: dict[tuple[int, int], int] = {}  # parent and token -> node
    for draft in drafts:
        claimed: dict[int, float] = {}  # by the drafts before, below a node
        for guess, chance in zip(merged, chances, strict=True):
            claimed[guess.parent] = claimed.get(guess.parent, 0.0) + chance
        nodes = {-1: -1}  # of the draft -> merged
        for i, guess in enumerate(draft):
            parent, above = nodes[guess.parent], draft[guess.parent].value if guess.parent >= 0 else 1.0
            chance = guess.value / above if above > 0 else 0.0
            node = nodes[i] = index.setdefault((parent, guess.token), len(merged))
            if node == len(merged):
                merged.append(guess._replace(parent=parent))
                chances.append(chance * max(1.0 - claimed.get(parent, 0.0), 0.0))
            else:
                chances[node] = 1.0 - (1.0 - chances[node]) * (1.0 - chance)
    for node, (guess, chance) in enumerate(zip(merged, chances, strict=True)):
        merged[node] = guess._replace(value=chance * (merged[guess.parent].value if guess.parent >= 0 else 1.0))
    return _best(merged, num_nodes, min_value)


def _best(draft: Sequence[Guess], num_nodes: int, min_value: float) -> list[Guess]:
    """The guesses of greatest value, in the order they had; of equal ones the first."""
    by_value = sorted(range(len(draft)), key=lambda i: -draft[i].value)[:num_nodes]
    kept = sorted(i for i in by_value if draft[i].value >= min_value)
    nodes = {-1: -1} | {node: place for place, node in enumerate(kept)}
    return [draft[i]._replace(parent=nodes[draft[i].parent]) for i in kept]


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


@lru_cache(maxsize=4096)
def _values(accuracies: tuple[tuple[float, ...], ...], choices: tuple[Choice, ...]) -> tuple[float, ...]:
    return tuple(prod(accuracies[depth][rank] for depth, rank in enumerate(choice)) for choice in choices)


def draft_from_heads(
    accuracies: tuple[tuple[float, ...], ...], candidates: Sequence[Sequence[int]], num_nodes: int
) -> list[Guess]:
    """The best static shape filled with tokens; `candidates[d][r]` is the token ranked `r` by head `d`."""
    choices = best_static_choices(accuracies, num_nodes)
    tokens = (candidates[len(choice) - 1][choice[-1]] for choice in choices)
    nodes = zip(tokens, _shape(choices), _values(accuracies, choices), strict=True)
    return [Guess(token, parent, value, "heads") for token, parent, value in nodes]
