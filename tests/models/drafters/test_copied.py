"""Copied guesses: how much they are worth, and that they are learnt from without being verified."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.drafters.copied import MIN_VALUE, PREDICTION_NODES, Acceptance, Copies, NgramOptions
from models.tree import Guess

PROMPT = [3, 1, 4]


def copies(prediction: tuple[int, ...] = (), ngram: NgramOptions | None = None) -> Copies:
    return Copies(len(PROMPT), prediction, ngram)


def tokens(draft: list[Guess]) -> list[int]:
    return [guess.token for guess in draft]


def is_tree(draft: list[Guess]) -> bool:
    """Parents come before their children and are worth as much; siblings differ."""
    pairs = [(guess.parent, guess.token) for guess in draft]
    ordered = all(guess.parent < i for i, guess in enumerate(draft))
    falling = all(guess.parent < 0 or guess.value <= draft[guess.parent].value for guess in draft)
    return ordered and falling and len(set(pairs)) == len(pairs)


def test_acceptance_starts_at_its_prior_and_goes_where_the_counts_go() -> None:
    acceptance = Acceptance((0.5, 0.2, 0.9))
    assert [acceptance.probability(match) for match in (0, 1, 2, 3, 100)] == pytest.approx([0.5, 0.2, 0.9, 0.9, 0.9])
    for _ in range(200):
        acceptance.learn(1, True)
        acceptance.learn(50, False)
    assert acceptance.probability(0) == 0.5
    assert acceptance.probability(1) > 0.99
    assert acceptance.probability(2) < 0.01
    for _ in range(20):
        acceptance.learn(1, False)
    assert acceptance.probability(1) < 0.5  # what was long ago counts little


def test_nothing_to_copy() -> None:
    assert copies().draft([*PROMPT, 1], 9) == []
    assert copies(ngram=NgramOptions()).draft([*PROMPT, 1], 9) == []


def test_a_prediction_is_a_chain_from_its_beginning() -> None:
    prediction = tuple(range(50, 90))
    drafting = copies(prediction)
    draft = drafting.draft(PROMPT, 99)
    assert tokens(draft) == list(prediction[:PREDICTION_NODES])
    assert [guess.parent for guess in draft] == list(range(-1, PREDICTION_NODES - 1))
    assert {guess.source for guess in draft} == {"prediction"}
    assert drafting.prediction_start == 0
    assert drafting.draft([*PROMPT, 50, 51, 52], 2)[0].token == 53
    assert drafting.prediction_start == 3
    assert len(drafting.draft([*PROMPT, 50, 51, 52, 53], 2)) == 2


def test_a_repeat_is_copied_up_to_its_limit() -> None:
    text = [*range(20, 40), 20, 21, 22]
    draft = copies(ngram=NgramOptions(2, 4, max_nodes=5)).draft(text, 99)
    assert tokens(draft) == [23, 24, 25, 26, 27][: len(draft)]
    assert {guess.source for guess in draft} == {"ngram"}
    assert copies(ngram=NgramOptions(4, 4)).draft(text, 99) == []


def test_a_useless_source_falls_silent_and_speaks_again_when_it_would_have_been_right() -> None:
    cycle = list(range(20, 40))
    drafting = copies(ngram=NgramOptions(max_nodes=8))
    text = [*PROMPT]
    for i in range(60):  # the same two tokens, and another one after them each time
        text += [7, 8]
        last = drafting.draft(text, 99)
        text.append(100 + i)
    assert last == []
    for token in itertools.islice(itertools.cycle(cycle), 80):
        text.append(token)
        last = drafting.draft(text, 99)
    assert len(last) == 8


def test_equal_paths_are_one_node_and_the_predictions() -> None:
    text = [*PROMPT, 50, 51, 52, 53, 54, 60, 50, 51]
    draft = copies((50, 51, 52, 70, 50, 51, 52, 53), NgramOptions()).draft(text, 99)
    assert is_tree(draft)
    assert draft[0].token == 52
    assert draft[0].source == "prediction"
    assert {guess.source for guess in draft if guess.token in (54, 60)} <= {"ngram"}


@given(
    st.lists(st.integers(0, 3), min_size=3, max_size=40),
    st.lists(st.integers(0, 3), max_size=40),
    st.lists(st.integers(1, 5), max_size=12),
)
def test_a_draft_is_a_tree_that_pays_and_is_the_same_when_asked_again(
    text: list[int], prediction: list[int], steps: list[int]
) -> None:
    drafting = Copies(3, tuple(prediction), NgramOptions())
    ends = [min(end, len(text)) for end in itertools.accumulate(steps, initial=3)]
    for end in ends:
        draft = drafting.draft(text[:end], 6)
        assert is_tree(draft)
        assert all(MIN_VALUE <= guess.value <= 1 for guess in draft)
        assert drafting.draft(text[:end], 6) is draft
        chain = [guess.token for guess in draft if guess.source == "prediction"]
        start = drafting.prediction_start
        assert chain == prediction[start : start + len(chain)]
