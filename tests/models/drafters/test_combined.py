"""Who is asked, and what becomes of the answers."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from torch import Tensor

from models.drafters.calibration import Calibration
from models.drafters.combined import Wish, combine
from models.drafters.drafter import Ask, Ranked
from models.drafters.medusa import DraftRow
from models.tree import Guess
from server.engine.messages import SamplingParams

ROW = DraftRow(SamplingParams(9, temperature=0), 3)
SURE = [Guess(5, -1, 0.9, "ngram"), Guess(6, 0, 0.8, "ngram"), Guess(7, 1, 0.7, "ngram")]
WEAK = [guess._replace(value=guess.value / 4) for guess in SURE]


class FakeDrafter:
    """Guesses 1 or 2, and 3 below 1."""

    num_heads, sees_all = 2, False

    def __init__(self) -> None:
        self.calibration = Calibration(((0.5,),), 2)
        self.asked: list[list[str]] = []

    def overwrite(self, slots: Sequence[int]) -> None: ...

    def remember(self, request: str, start: int, states: Tensor) -> None: ...

    def knows(self, request: str, root: int) -> bool:
        return True

    def forget(self, request: str) -> None: ...

    def trees(self, asks: Sequence[Ask]) -> list[list[Guess]]:
        self.asked.append([ask.request for ask in asks])
        tree = [Guess(1, -1, 0.5, "heads"), Guess(2, -1, 0.3, "heads"), Guess(3, 0, 0.2, "heads")]
        return [tree[: ask.num_nodes] for ask in asks]

    def ranked(self, asks: Sequence[Ask]) -> list[Ranked]:
        return [Ranked([[1]], [[0.5]]) for _ in asks]


def wish(name: str, num_nodes: int, copied: list[Guess], *, asks: bool = True) -> Wish:
    ask = Ask(name, [1, 2, 3], array("q", [1, 2]), ROW, "greedy", num_nodes, 9)
    return Wish(num_nodes, 9, copied, ask if asks else None)


def sources(guesses: list[Guess]) -> list[str]:
    return [guess.source for guess in guesses]


def test_the_heads_fill_what_copies_leave() -> None:
    weak, sure, none = combine(FakeDrafter(), [wish("a", 3, WEAK), wish("b", 4, SURE), wish("c", 2, [])])
    assert sources(weak) == ["heads", "heads", "ngram"]
    assert sources(sure) == ["ngram", "ngram", "ngram", "heads"]
    assert [(guess.token, guess.parent, guess.value) for guess in none] == [(1, -1, 0.5), (2, -1, 0.3)]


def test_the_best_come_first_and_parents_before_their_children() -> None:
    for tree in combine(FakeDrafter(), [wish("a", 6, WEAK), wish("b", 6, SURE)]):
        values = [guess.value for guess in tree]
        assert values == sorted(values, reverse=True)
        assert all(guess.parent < place for place, guess in enumerate(tree))


def test_only_those_who_ask_are_guessed_for() -> None:
    drafter = FakeDrafter()
    found = combine(drafter, [wish("a", 3, SURE), wish("b", 9, WEAK, asks=False), wish("c", 0, [])])
    assert drafter.asked == [["a"]]
    assert found[1] == WEAK
    assert found[2] == []


def test_without_heads_there_are_copies() -> None:
    assert combine(None, [wish("a", 2, SURE), wish("b", 2, [])]) == [SURE[:2], []]
