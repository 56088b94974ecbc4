"""Tokens that a request must not say: all but its `allowed_token_ids`, and whatever would complete a bad word.

Invariants:
- what is forbidden at a node follows from the request's parameters and the output up to that node, its path included;
- a bad word is a sequence of tokens; its last token is forbidden where the output ends with the others, as in vLLM.
  The prompt is no part of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

NEG_INF = float("-inf")


class Mask:
    """One request's forbidden tokens. `reach` is how many output tokens back it looks."""

    def __init__(
        self,
        vocab_size: int,
        allowed: Sequence[int] | None,
        bad_words: Sequence[tuple[int, ...]],
        device: torch.device,
    ) -> None:
        # added to logits, which is ten times faster than masked_fill_ on a CPU
        self.always = torch.zeros(vocab_size, device=device)  # [vocab] float32, -inf where forbidden
        if allowed is not None:
            self.always.fill_(NEG_INF)
            self.always[list(allowed)] = 0.0
        self.reach = max((len(word) - 1 for word in bad_words), default=0)
        self._words: dict[int, list[tuple[tuple[int, ...], int]]] = defaultdict(list)  # by the last token but one
        for *start, last in bad_words:
            if start:
                self._words[start[-1]].append((tuple(start), last))
            else:
                self.always[last] = NEG_INF

    def completing(self, said: tuple[int, ...]) -> list[int]:
        """Tokens that would complete a bad word after `said`, the last `reach` output tokens or more."""
        if not said or said[-1] not in self._words:
            return []
        return [last for start, last in self._words[said[-1]] if said[-len(start) :] == start]
