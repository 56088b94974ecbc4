"""`best_of`: more choices are made than returned. All of them count in the usage.

Invariant: a prompt's best choices are those of the highest mean log-probability of their tokens, best first; of equals
the earlier.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from server.openai.generation import Generation, Piece


class BestOf(Generation):
    """Of each `best_of` choices in a row, which are of one prompt, keeps `n`."""

    def __init__(self, *args: Any, best_of: int, n: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._best_of = best_of
        self._n = n

    async def complete(self) -> list[Piece]:
        """The best of all choices, numbered anew."""
        pieces = await super().complete()
        kept: list[Piece] = []
        for first in range(0, len(pieces), self._best_of):
            group = pieces[first : first + self._best_of]
            kept += sorted(group, key=lambda piece: -self.choices[piece.index].mean_logprob)[: self._n]
        return [replace(piece, index=index) for index, piece in enumerate(kept)]
