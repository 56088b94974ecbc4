"""What drafters that guess from the model's hidden states have in common, and what they are asked.

Invariant: a drafter's state of a request ends with `forget`; a request is asked for only if `knows` says so.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from models.drafters.calibration import Calibration, Kind
from models.drafters.medusa import DraftRow
from models.tree import Guess


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to be guessed for."""

    request: str
    text: Sequence[int]  # prompt + output; the last token is the root
    slots: array[int]  # of the tokens before the root
    row: DraftRow
    kind: Kind
    num_nodes: int
    max_depth: int
    least_value: float = 0.0  # a node that is right less often than this does not pay


@dataclass(frozen=True, slots=True)
class Ranked:
    """Candidates of one request by depth and rank, and how likely each is if those before it are right."""

    tokens: list[list[int]]
    probabilities: list[list[float]]


class Drafter(Protocol):
    """Guesses from the model's hidden states."""

    num_heads: int
    calibration: Calibration
    sees_all: bool  # needs the states of all rows of a text, not only of the last

    def overwrite(self, slots: Sequence[int]) -> None:
        """The model is about to write to these slots."""

    def remember(self, request: str, start: int, states: Tensor) -> None:
        """The model's states at a request's positions from `start` on: [n, hidden]; at least the last position's."""

    def knows(self, request: str, root: int) -> bool:
        """Whether the state before the token at position `root` is remembered, so that what follows can be guessed."""

    def trees(self, asks: Sequence[Ask]) -> list[list[Guess]]:
        """The best guesses for each, with calibrated values, best first."""

    def ranked(self, asks: Sequence[Ask]) -> list[Ranked]:
        """Candidates for trees that a grammar grows."""

    def forget(self, request: str) -> None:
        """Drop all state of a request."""
