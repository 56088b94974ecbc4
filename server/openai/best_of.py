"""`best_of`: more choices are made than returned. All of them count in the usage.

Invariant: a prompt's best choices are those of the highest mean log-probability of their tokens, best first; of equals
the earlier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from server.engine.messages import Submit
from server.openai.generation import Generation, Piece, TextOptions
from server.openai.service import Service


class BestOf(Generation):
    """Of each `best_of` choices in a row, which are of one prompt, keeps `n`."""

    def __init__(
        self,
        service: Service,
        submits: Sequence[Submit],
        options: TextOptions,
        arrival: float,
        echoes: Sequence[str],
        *,
        best_of: int,
        n: int,
    ) -> None:
        super().__init__(service, submits, options, arrival, echoes)
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
