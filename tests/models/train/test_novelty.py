"""Near-duplicates and loops, on made-up text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.train.novelty import MAX_PERIOD, MIN_LOOP, Novelty, ends_in_loop

QUESTION = "what is the longest river of all the rivers in the north of the country"


def test_the_same_again_is_not_new() -> None:
    novelty = Novelty()
    assert novelty.is_new(QUESTION)
    assert not novelty.is_new(QUESTION)
    assert not novelty.is_new(QUESTION.upper().replace(" ", "  "))


def test_a_text_with_a_few_other_words_is_not_new() -> None:
    novelty = Novelty()
    assert novelty.is_new(QUESTION)
    assert not novelty.is_new("please tell " + QUESTION)
    assert novelty.is_new("what is the longest river that you would swim across if somebody dared you")


def test_short_texts_are_told_apart_whole() -> None:
    novelty = Novelty()
    assert [novelty.is_new(text) for text in ("who am i", "who are you", "Who am I", "")] == [True, True, False, False]


@pytest.mark.parametrize("period", [1, 2, 7, MAX_PERIOD])
def test_a_loop_is_seen_once_it_is_long_enough(period: int) -> None:
    needed = period + max(MIN_LOOP, 2 * period)
    tokens = [1000, 1001, 1002, *(i % period for i in range(needed))]
    assert ends_in_loop(tokens)
    assert not ends_in_loop(tokens[:-1])
    assert not ends_in_loop([*tokens, 5000])


@given(st.lists(st.integers(0, 10**6), unique=True, max_size=400))
def test_tokens_that_never_come_again_are_no_loop(tokens: list[int]) -> None:
    assert not ends_in_loop(tokens)
