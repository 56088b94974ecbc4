"""All guesses for the requests of a step: copied tokens and the heads', as one tree each, best first.

Invariant: the drafter runs at most twice, for all requests that ask it: once for trees, once for those with a grammar.

Under a grammar the tree is grown by `constrained`, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from models.constrained import grow
from models.drafters.calibration import by_value
from models.drafters.drafter import Ask, Drafter, Ranked
from models.grammar import GrammarState
from models.tree import Guess, merge

NOTHING = Ranked([], [])


@dataclass(frozen=True, slots=True)
class Wish:
    """One request's tree: at most `num_nodes`, no deeper than `max_depth`."""

    num_nodes: int
    max_depth: int
    copied: Sequence[Guess]
    ask: Ask | None  # without it nobody guesses but the copies
    grammar: GrammarState | None = None
    num_forced: int = 0  # nodes besides, for tokens that the grammar forces


def combine(drafter: Drafter | None, wishes: Sequence[Wish]) -> list[list[Guess]]:
    """The best guesses for each wish, best first."""
    trees: dict[int, list[Guess]] = {}
    ranked: dict[int, Ranked] = {}
    if drafter is not None:
        asks = [(i, wish.ask, wish.grammar is None) for i, wish in enumerate(wishes) if wish.ask and wish.num_nodes]
        free, bound = ({i: ask for i, ask, is_free in asks if is_free is kind} for kind in (True, False))
        trees = dict(zip(free, drafter.trees(list(free.values())), strict=True))
        ranked = dict(zip(bound, drafter.ranked(list(bound.values())), strict=True))
    return [
        _merged(wish, trees.get(i, []))
        if wish.grammar is None
        else _constrained(wish, wish.grammar, ranked.get(i, NOTHING))
        for i, wish in enumerate(wishes)
    ]


def _merged(wish: Wish, guessed: list[Guess]) -> list[Guess]:
    if not wish.copied:
        return guessed
    return by_value(merge([wish.copied, guessed], wish.num_nodes))


def _constrained(wish: Wish, grammar: GrammarState, ranked: Ranked) -> list[Guess]:
    return grow(
        grammar,
        ranked.tokens,
        ranked.probabilities,
        num_guesses=wish.num_nodes,
        num_forced=wish.num_forced,
        max_depth=wish.max_depth,
    )
