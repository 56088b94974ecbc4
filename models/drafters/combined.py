"""All guesses for the requests of a step: copied tokens and the heads', as one tree each, best first.

Invariant: the heads run at most twice, for all requests that ask them: once for trees, once for those with a grammar.

Under a grammar the tree is grown by `constrained`, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from models.constrained import grow
from models.drafters.calibration import Calibration, Kind, by_value
from models.drafters.medusa import DraftRow
from models.drafters.parallel import Ask, Ranked
from models.grammar import GrammarState
from models.tree import Guess, merge

NOTHING = Ranked([], [])


class Drafter(Protocol):
    """Who guesses from the model's hidden states."""

    calibration: Calibration

    def trees(self, asks: Sequence[Ask]) -> list[list[Guess]]:
        """The best guesses for each, with calibrated values, best first."""

    def ranked(self, asks: Sequence[Ask]) -> list[Ranked]:
        """Candidates for trees that a grammar grows."""

    def forget(self, request: str) -> None:
        """Drop all state of a request."""


@dataclass(frozen=True, slots=True)
class Wish:
    """One request's tree: at most `num_nodes`, no deeper than `max_depth`."""

    request: str
    text: Sequence[int]  # prompt + output
    kind: Kind
    num_nodes: int
    max_depth: int
    copied: Sequence[Guess]
    row: DraftRow
    hidden: Tensor | None  # [hidden] of the last accepted row; without it nobody guesses but the copies
    grammar: GrammarState | None = None
    num_forced: int = 0  # nodes besides, for tokens that the grammar forces


def combine(drafter: Drafter | None, wishes: Sequence[Wish]) -> list[list[Guess]]:
    """The best guesses for each wish, best first."""
    free = [i for i, wish in enumerate(wishes) if wish.grammar is None]
    bound = [i for i, wish in enumerate(wishes) if wish.grammar is not None]
    trees: dict[int, list[Guess]] = {}
    ranked: dict[int, Ranked] = {}
    if drafter is not None:
        asks = {i: ask for i, wish in enumerate(wishes) if (ask := _ask(wish)) is not None}
        asking = [i for i in free if i in asks]
        trees = dict(zip(asking, drafter.trees([asks[i] for i in asking]), strict=True))
        asking = [i for i in bound if i in asks]
        ranked = dict(zip(asking, drafter.ranked([asks[i] for i in asking]), strict=True))
    return [
        _constrained(wish, wish.grammar, ranked.get(i, NOTHING))
        if wish.grammar is not None
        else _merged(wish, trees.get(i, []))
        for i, wish in enumerate(wishes)
    ]


def _ask(wish: Wish) -> Ask | None:
    if wish.hidden is None or not wish.num_nodes:
        return None
    return Ask(wish.request, wish.text, wish.hidden, wish.row, wish.kind, wish.num_nodes, wish.max_depth)


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
