"""Who is asked, and what becomes of the answers."""

from __future__ import annotations

import pytest
import torch

from models.drafters import combined
from models.drafters.combined import Wish, combine
from models.drafters.medusa import DraftRow
from models.drafters.resblock import ResBlockHeads
from models.tree import Guess
from server.engine.messages import SamplingParams

ROW = DraftRow(SamplingParams(9, temperature=0), 3)
STATE = torch.tensor([7.0, 8, 6, 5, 4, 3, 2, 1, 0])
SURE = [Guess(5, -1, 0.9, "ngram"), Guess(6, 0, 0.8, "ngram"), Guess(7, 1, 0.7, "ngram")]
WEAK = [guess._replace(value=guess.value / 4) for guess in SURE]


@pytest.fixture
def heads() -> ResBlockHeads:
    """Untrained, with the state itself as logits: first token 1, then token 0."""
    return ResBlockHeads(torch.eye(9), num_heads=2, accuracies=((0.5, 0.2), (0.3, 0.1)))


def wish(num_nodes: int, copied: list[Guess], *, has_hidden: bool = True, max_depth: int = 9) -> Wish:
    return Wish(num_nodes, max_depth, copied, ROW, STATE if has_hidden else None)


def sources(guesses: list[Guess]) -> list[str]:
    return [guess.source for guess in guesses]


def test_the_heads_fill_what_copies_leave(heads: ResBlockHeads) -> None:
    weak, sure, none = combine(heads, [wish(3, WEAK), wish(4, SURE), wish(2, [])])
    assert sources(weak) == ["ngram", "ngram", "heads"]
    assert sources(sure) == ["ngram", "ngram", "ngram", "heads"]
    assert [(guess.token, guess.parent, guess.value) for guess in none] == [(1, -1, 0.5), (0, -1, 0.2)]


def test_only_those_who_need_the_heads_ask_them(heads: ResBlockHeads, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def propose(heads: ResBlockHeads, hidden: torch.Tensor, rows: list[DraftRow], ranks: int) -> list[list[list[int]]]:
        asked.append(len(rows))
        return unwatched(heads, hidden, rows, ranks)

    unwatched = combined.propose
    monkeypatch.setattr(combined, "propose", propose)
    found = combine(heads, [wish(3, SURE), wish(3, WEAK), wish(9, WEAK, has_hidden=False)])
    assert asked == [1]
    assert found[0] == SURE
    assert found[2] == WEAK
    assert combine(heads, [wish(3, SURE)]) == [SURE]
    assert asked == [1]


def test_without_heads_there_are_copies(heads: ResBlockHeads) -> None:
    assert combine(None, [wish(2, SURE), wish(2, [])]) == [SURE[:2], []]


def test_nothing_is_guessed_too_deep(heads: ResBlockHeads) -> None:
    (guesses,) = combine(heads, [wish(9, [], max_depth=1)])
    assert {guess.parent for guess in guesses} == {-1}
