"""Dynamic trees of parallel heads, for many requests at once.

Parallel heads guess the same tokens below every node of a depth, so a request's possible trees are one lattice: a path
is a sequence of ranks, its value the product of the probabilities along it. The best paths are looked for among a fixed
set of paths that is closed under taking parents and large enough to hold them all but always.

Invariant: of equal values the shallower path is first, so a tree's best paths are a tree.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import log
from typing import Any, Final

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]
Integers = np.ndarray[Any, np.dtype[np.int64]]

SMALLEST, LARGEST = 64, 320  # paths
PATHS_PER_NODE: Final = 8
DEPTH_COST: Final = log(1.6)  # how much less likely the fixed set takes the next depth, and the next rank, to be
RANK_POWER: Final = 1.4


@dataclass(frozen=True, slots=True)
class Lattice:
    """Paths, parents first. `levels[d]` is the range of those that end at depth d + 1."""

    parents: Integers  # [paths]; -1 is the root
    depths: Integers  # [paths] from 0
    ranks: Integers  # [paths]
    levels: tuple[slice, ...]

    def values(self, probabilities: Floats) -> Floats:
        """[requests, depths, ranks], given the parent is right -> [requests, paths]."""
        found = probabilities[:, self.depths, self.ranks]
        for level in self.levels[1:]:
            found[:, level] *= found[:, self.parents[level]]
        return found


@lru_cache(maxsize=64)
def lattice(num_depths: int, num_ranks: int, num_nodes: int) -> Lattice:
    """In which the best trees of `num_nodes` nodes are found."""
    size = min(max(PATHS_PER_NODE * num_nodes, SMALLEST), LARGEST)
    heap: list[tuple[float, tuple[int, ...]]] = [(0.0, (0,))]
    paths: list[tuple[int, ...]] = []
    while heap and len(paths) < size:
        cost, path = heapq.heappop(heap)
        paths.append(path)
        if len(path) < num_depths:
            heapq.heappush(heap, (cost + DEPTH_COST, (*path, 0)))
        if path[-1] + 1 < num_ranks:
            more = RANK_POWER * (log(path[-1] + 2) - log(path[-1] + 1))
            heapq.heappush(heap, (cost + more, (*path[:-1], path[-1] + 1)))
    paths.sort(key=lambda path: (len(path), path))
    places = {path: place for place, path in enumerate(paths)} | {(): -1}
    depths = np.array([len(path) - 1 for path in paths])
    bounds = np.searchsorted(depths, np.arange(depths[-1] + 2)).tolist()
    return Lattice(
        parents=np.array([places[path[:-1]] for path in paths]),
        depths=depths,
        ranks=np.array([path[-1] for path in paths]),
        levels=tuple(slice(low, high) for low, high in pairwise(bounds)),
    )


def best_trees(shape: Lattice, values: Floats, tokens: Integers, num_nodes: int) -> tuple[Integers, Integers, Floats]:
    """The `num_nodes` best paths of each request as a tree, best first: tokens, parents, values [requests, nodes].

    values: [requests, paths], tokens: [requests, depths, ranks].
    """
    order = np.argsort(-values, axis=1, kind="stable")[:, :num_nodes]
    places = np.full((len(values), values.shape[1] + 1), -1)  # of each path among the chosen; the last is the root's
    np.put_along_axis(places, order, np.arange(order.shape[1])[None], axis=1)
    parents = np.take_along_axis(places, shape.parents[order], axis=1)
    rows = np.arange(len(values))[:, None]
    return tokens[rows, shape.depths[order], shape.ranks[order]], parents, np.take_along_axis(values, order, axis=1)
