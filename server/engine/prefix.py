"""The prefix cache: a radix tree over token ids whose edges hold KV slots (SGLang, arXiv 2312.07104, section 3).

Invariants:
- a node's edge has as many slots as tokens, and at least one unless it is the root;
- the children of a node begin with distinct tokens;
- a node in use (`users > 0`) is never evicted, and its ancestors are in use too;
- slots on edges are owned by the cache, whoever computed them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count


@dataclass(slots=True, eq=False)
class Node:
    """An edge and the node at its end."""

    tokens: Sequence[int]
    slots: list[int]
    parent: Node | None
    children: dict[int, Node] = field(default_factory=dict)
    users: int = 0
    last_used: int = 0


class PrefixCache:
    """Owns the slots of finished and shared prefixes."""

    def __init__(self) -> None:
        self.root = Node((), [], None)
        self.num_evictable = 0  # slots on edges that nobody uses
        self._clock = count(1)

    def match(self, tokens: Sequence[int]) -> tuple[Node, list[int]]:
        """The longest cached prefix of `tokens`: its last node (split if need be) and its slots, in order."""
        node, slots, now = self.root, list[int](), next(self._clock)
        while len(slots) < len(tokens):
            child = node.children.get(tokens[len(slots)])
            if child is None:
                break
            shared = _common_length(child.tokens, tokens, len(slots))
            node = child if shared == len(child.tokens) else self._split(child, shared)
            node.last_used = now
            slots.extend(node.slots)
            if node is not child:
                break
        return node, slots

    def lock(self, node: Node) -> None:
        """The path to `node` must stay until `unlock`."""
        for step in _upwards(node):
            if step.users == 0:
                self.num_evictable -= len(step.slots)
            step.users += 1

    def unlock(self, node: Node) -> None:
        for step in _upwards(node):
            step.users -= 1
            if step.users == 0:
                self.num_evictable += len(step.slots)

    def insert(self, tokens: Sequence[int], slots: Sequence[int]) -> tuple[Node, list[int]]:
        """Make `tokens` a cached prefix. Returns its node and the slots that now hold it.

        Where the cache already had a part, its own slots stay and the caller keeps the given ones; the other given
        slots are the cache's from now on.
        """
        node, cached = self.match(tokens)
        if len(cached) == len(tokens):
            return node, cached
        new = Node(tuple(tokens[len(cached) :]), list(slots[len(cached) :]), node, last_used=next(self._clock))
        node.children[new.tokens[0]] = new
        self.num_evictable += len(new.slots)
        return new, cached + new.slots

    def evict(self, wanted: int) -> list[int]:
        """Drop the ends of least recently used leaves until `wanted` slots are given up, or nothing more can be."""
        leaves = [(node.last_used, id(node), node) for node in self._nodes() if _is_evictable(node)]
        heapq.heapify(leaves)
        freed: list[int] = []
        while leaves and len(freed) < wanted:
            _, _, node = heapq.heappop(leaves)
            parent = node.parent
            assert parent is not None
            keep = max(len(node.slots) - (wanted - len(freed)), 0)
            freed.extend(node.slots[keep:])
            if keep:
                node.tokens, node.slots = node.tokens[:keep], node.slots[:keep]
                break
            del parent.children[node.tokens[0]]
            if _is_evictable(parent):
                heapq.heappush(leaves, (parent.last_used, id(parent), parent))
        self.num_evictable -= len(freed)
        return freed

    def owned(self) -> list[int]:
        """Every slot of the cache."""
        return [slot for node in self._nodes() for slot in node.slots]

    def _split(self, child: Node, length: int) -> Node:
        """Cut `child`'s edge after `length` tokens; the upper half is new and has the same users."""
        assert child.parent is not None
        upper = Node(child.tokens[:length], child.slots[:length], child.parent, users=child.users)
        child.parent.children[upper.tokens[0]] = upper
        child.tokens, child.slots, child.parent = child.tokens[length:], child.slots[length:], upper
        upper.children[child.tokens[0]] = child
        return upper

    def _nodes(self) -> Iterator[Node]:
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node


def _is_evictable(node: Node) -> bool:
    return node.users == 0 and not node.children and node.parent is not None


def _upwards(node: Node) -> Iterator[Node]:
    step: Node | None = node
    while step is not None:
        yield step
        step = step.parent


def _common_length(edge: Sequence[int], tokens: Sequence[int], start: int) -> int:
    """How many tokens of `edge` are those of `tokens` from `start` on."""
    limit = min(len(edge), len(tokens) - start)
    if tuple(edge[:limit]) == tuple(tokens[start : start + limit]):
        return limit
    return next(i for i in range(limit) if edge[i] != tokens[start + i])
