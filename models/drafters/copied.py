"""Guesses copied from what is already there: from the request's own tokens (n-grams), and from a predicted text.

How likely a copied token is right depends on how many tokens before it match. That is counted while the text grows, of
guesses that nobody verified too, so a source that has been useless is heard again as soon as it is right.

Invariants:
- pure Python: token ids only, no torch;
- a request's draft follows from its tokens; a preemption loses what was counted and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Final

from models.drafters.places import Alignment, Finder, Place, Repeats
from models.tree import MAX_NODES, Guess, Source, merge

MIN_VALUE: Final = 0.1  # a guess less likely than this does not pay for its row
PREDICTION_NODES: Final = 15
PRIOR_WEIGHT: Final = 4.0  # guesses that the first estimate counts for
FADING: Final = 0.95  # of what was counted before, with every guess

Priors = tuple[float, ...]
"""The probability that a copied token is right behind 0, 1, 2 to 3, 4 to 7, 8 to 15, and 16 matching tokens."""
NGRAM_PRIORS: Final[Priors] = (0.0, 0.2, 0.45, 0.65, 0.85, 0.95)
PREDICTION_PRIORS: Final[Priors] = (0.3, 0.4, 0.6, 0.75, 0.85, 0.95)


@dataclass(frozen=True, slots=True)
class NgramOptions:
    """Which n-grams are looked for, and how many tokens are copied at most."""

    min_match: int = 2
    max_match: int = 4
    max_nodes: int = 8


class Acceptance:
    """How often copied tokens were right, by the length of the match before them."""

    def __init__(self, priors: Priors) -> None:
        self._right = [prior * PRIOR_WEIGHT for prior in priors]
        self._seen = [PRIOR_WEIGHT] * len(priors)

    def probability(self, match: int) -> float:
        kind = min(match.bit_length(), len(self._seen) - 1)
        return self._right[kind] / self._seen[kind]

    def learn(self, match: int, is_right: bool) -> None:
        kind = min(match.bit_length(), len(self._seen) - 1)
        self._right[kind] = self._right[kind] * FADING + is_right
        self._seen[kind] = self._seen[kind] * FADING + 1


class CopyDrafter:
    """One chain of guesses from one source, for one request."""

    def __init__(self, source: Source, finder: Finder, priors: Priors, max_nodes: int) -> None:
        self.place: Place | None = None  # of the last draft
        self._source: Source = source
        self._finder = finder
        self._acceptance = Acceptance(priors)
        self._max_nodes = max_nodes
        self._copied: list[int] = []  # the last draft
        self._num_seen = 0  # tokens of the text before it

    def draft(self, text: Sequence[int], max_depth: int) -> list[Guess]:
        """A chain below the last token of `text`, which begins with the text of the call before: what may pay of it."""
        self._learn(text)
        place = self.place = self._finder.find(text)
        self._num_seen = len(text)
        self._copied = [] if place is None else place.tokens(min(self._max_nodes, max_depth))
        guesses: list[Guess] = []
        value = 1.0
        for token, match in zip(self._copied, self._matches(), strict=False):
            value *= self._acceptance.probability(match)
            if value < MIN_VALUE:
                break
            guesses.append(Guess(token, len(guesses) - 1, value, self._source))
        return guesses

    def _learn(self, text: Sequence[int]) -> None:
        """Compare the last draft with what came."""
        came = text[self._num_seen : self._num_seen + len(self._copied)]
        for copied, token, match in zip(self._copied, came, self._matches(), strict=False):
            self._acceptance.learn(match, copied == token)
            if copied != token:
                return

    def _matches(self) -> Iterator[int]:
        """The length of the match before each copied token, if those before it are right."""
        return count(0 if self.place is None else self.place.match)


class Copies:
    """All that can be copied for one request, as one tree. A prediction is believed before an n-gram."""

    def __init__(self, num_prompt: int, prediction: Sequence[int], ngram: NgramOptions | None) -> None:
        self._prediction: CopyDrafter | None = None
        self._drafters: list[CopyDrafter] = []
        if prediction:
            finder = Alignment(prediction, num_prompt)
            self._prediction = CopyDrafter("prediction", finder, PREDICTION_PRIORS, PREDICTION_NODES)
            self._drafters.append(self._prediction)
        if ngram is not None:
            repeats = Repeats(ngram.min_match, ngram.max_match)
            self._drafters.append(CopyDrafter("ngram", repeats, NGRAM_PRIORS, ngram.max_nodes))
        self._drafted: tuple[int, list[Guess]] = (0, [])  # for a text of this length

    def draft(self, text: Sequence[int], max_depth: int) -> list[Guess]:
        """Guesses that pay for their rows, as a tree below the last token of `text`."""
        if self._drafted[0] != len(text):
            drafts = [drafter.draft(text, max_depth) for drafter in self._drafters]
            self._drafted = len(text), drafts[0] if len(drafts) == 1 else merge(drafts, MAX_NODES, MIN_VALUE)
        return self._drafted[1]

    @property
    def prediction_start(self) -> int:
        """Index, in the prediction, of its first token in the last draft; 0 if none of it was drafted."""
        place = None if self._prediction is None else self._prediction.place
        return 0 if place is None else place.start
