"""All guesses for the requests of a step: copied tokens, and the heads' where those leave room, as one tree each.

Invariant: the heads run once for all requests that ask them, and only for those.

Under a grammar the tree is grown by `constrained`, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.constrained import grow
from models.drafters.medusa import DraftRow, Heads, propose
from models.drafters.resblock import DEFAULT_ACCURACIES, Accuracies
from models.drafters.sequential_drafter import Ask, SequentialDrafter
from models.grammar import GrammarState
from models.tree import Guess, draft_from_heads, merge


@dataclass(frozen=True, slots=True)
class Wish:
    """One request's tree: at most `num_nodes`, no deeper than `max_depth`."""

    num_nodes: int
    max_depth: int
    copied: Sequence[Guess]
    row: DraftRow
    hidden: Tensor | None  # [hidden] of the last accepted row; without it the heads cannot guess
    grammar: GrammarState | None = None
    num_forced: int = 0  # nodes besides, for tokens that the grammar forces
    ask: Ask | None = None  # the same as `hidden`, for a sequential drafter

    @property
    def has_heads(self) -> bool:
        return self.hidden is not None or self.ask is not None


def combine(heads: Heads | SequentialDrafter | None, wishes: Sequence[Wish]) -> list[list[Guess]]:
    """The best guesses for each wish, best by value."""
    if heads is None:
        return [_tree(wish, (), []) for wish in wishes]
    if isinstance(heads, SequentialDrafter):
        return _combine_sequential(heads, wishes)
    accuracies = (heads.accuracies or DEFAULT_ACCURACIES)[: heads.num_heads]
    asking = [i for i, wish in enumerate(wishes) if _leaves_room(wish, accuracies[0][0])]
    ranked = dict(zip(asking, _candidates(heads, accuracies, [wishes[i] for i in asking]), strict=True))
    return [_tree(wish, accuracies, ranked.get(i, [])) for i, wish in enumerate(wishes)]


def _combine_sequential(drafter: SequentialDrafter, wishes: Sequence[Wish]) -> list[list[Guess]]:
    asking = [i for i, wish in enumerate(wishes) if _leaves_room(wish, drafter.accuracies[0][0])]
    free, bound = ([i for i in asking if (wishes[i].grammar is None) is is_free] for is_free in (True, False))
    trees = dict(zip(free, drafter.trees(_asks(wishes, free)), strict=True))
    ranked = dict(zip(bound, drafter.ranked(_asks(wishes, bound)), strict=True))
    found = []
    for i, wish in enumerate(wishes):
        if wish.grammar is None:
            found.append(merge([wish.copied, trees.get(i, [])], wish.num_nodes))
        else:
            tokens, shares = ranked.get(i, ([], []))
            found.append(_tree(wish, (tuple(shares),) if shares else (), [tokens] if tokens else []))
    return found


def _asks(wishes: Sequence[Wish], chosen: Sequence[int]) -> list[Ask]:
    return [ask for i in chosen if (ask := wishes[i].ask) is not None]


def _tree(wish: Wish, accuracies: Accuracies, ranked: Sequence[Sequence[int]]) -> list[Guess]:
    """`ranked`: the heads' candidates by depth and rank; none if they were not asked."""
    if wish.grammar is not None:
        return grow(
            wish.grammar,
            ranked,
            accuracies,
            num_guesses=wish.num_nodes,
            num_forced=wish.num_forced,
            max_depth=wish.max_depth,
        )
    from_heads = _from_heads(accuracies, ranked, wish) if ranked else []
    return merge([wish.copied, from_heads], wish.num_nodes)


def _leaves_room(wish: Wish, value: float) -> bool:
    """Would a guess of the heads, of this value and unlike the copied ones, be among the nodes?"""
    if wish.num_nodes == 0:
        return False
    if not wish.has_heads or len(wish.copied) < wish.num_nodes:
        return wish.has_heads
    best = Guess(-1, -1, value, "heads")
    return any(guess.source == "heads" for guess in merge([wish.copied, [best]], wish.num_nodes))


def _candidates(heads: Heads, accuracies: Accuracies, wishes: Sequence[Wish]) -> list[list[list[int]]]:
    """[wishes][depth][rank] token ids, best first."""
    hidden = [wish.hidden for wish in wishes if wish.hidden is not None]
    if not hidden:
        return []
    num_ranks = min(max(map(len, accuracies)), len(heads.token_ids))
    return propose(heads, torch.stack(hidden), [wish.row for wish in wishes], num_ranks)


def _from_heads(accuracies: Accuracies, ranked: Sequence[Sequence[int]], wish: Wish) -> list[Guess]:
    reachable = tuple(depth[: len(ranked[0])] for depth in accuracies[: wish.max_depth])
    return draft_from_heads(reachable, ranked, wish.num_nodes)
