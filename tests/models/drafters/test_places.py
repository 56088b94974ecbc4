"""Where to copy from: the finders against plain searches, and an output that leaves its prediction and comes back."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.drafters.places import LOOKED_AT, MAX_MATCH, Alignment, Finder, Place, Repeats, match_length

TEXTS = st.lists(st.integers(0, 3), max_size=60)


def grown(finder: Finder, text: Sequence[int], cuts: Sequence[int]) -> Place | None:
    """What the finder says of `text`, having seen it grow."""
    for cut in sorted(cuts):
        finder.find(text[:cut])
    return finder.find(text)


def common(text: Sequence[int], start: int, end: int) -> int:
    """How many tokens before `start` are those before `end`, by slices."""
    return max(n for n in range(min(start, MAX_MATCH) + 1) if text[start - n : start] == text[end - n : end])


@given(TEXTS, st.integers(1, 3), st.integers(1, 6), st.lists(st.integers(0, 60), max_size=5))
def test_a_repeat_is_the_longest_match_of_the_latest_places(
    text: list[int], min_match: int, max_match: int, cuts: list[int]
) -> None:
    matches = {start: common(text, start, len(text)) for start in range(len(text)) if start >= min_match}
    latest = [start for start in sorted(matches, reverse=True) if matches[start] >= min_match][:LOOKED_AT]
    enough = [start for start in latest if matches[start] >= max_match][:1]
    expected = enough or sorted(latest, key=lambda start: -matches[start])[:1]
    place = grown(Repeats(min_match, max_match), text, [cut for cut in cuts if cut <= len(text)])
    assert ([place.start] if place else []) == expected
    if place:
        assert place.match == matches[place.start]
        assert place.match >= min_match


def test_a_copy_that_reaches_the_end_of_the_text_begins_again() -> None:
    place = Repeats(2, 4).find([9, 1, 2, 3, 1, 2, 3])
    assert place is not None
    assert (place.start, place.match) == (4, 3)
    assert place.tokens(7) == [1, 2, 3, 1, 2, 3, 1]


def test_a_prediction_ends_where_it_ends() -> None:
    place = Alignment((5, 6, 7), 1).find([0, 5])
    assert place is not None
    assert place.tokens(9) == [6, 7]
    assert Alignment((5, 6, 7), 1).find([0, 5, 6, 7]) is None
    assert Alignment((), 1).find([0, 5]) is None


DISTINCT = tuple(range(100, 140))


@given(
    st.integers(0, 20),
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.integers(0, 34),
    st.integers(2, 5),
    st.lists(st.integers(0, 60), max_size=5),
)
def test_an_output_that_comes_back_is_found_again(
    agreed: int, strange: list[int], back: int, again: int, cuts: list[int]
) -> None:
    """From the first token on if it is ahead, from the second on if it is behind."""
    text = [1, 2, 100, *DISTINCT[:agreed], *strange, *DISTINCT[back : back + again]]  # the prompt is three tokens
    place = grown(Alignment(DISTINCT, 3), text, [cut for cut in cuts if 3 <= cut <= len(text)])
    assert place is not None
    assert place.start == back + again
    assert place.match == again or len(strange) == 1


@pytest.mark.parametrize(
    ("output", "place"),
    [
        ((), (0, MAX_MATCH)),
        ((100, 101), (2, MAX_MATCH)),
        ((100, 101, 7), (3, 0)),  # one token replaced by another?
        ((100, 101, 7, 103), (4, 1)),
        ((100, 101, 7, 7), None),
        ((7,), (1, 0)),
        ((100, 101, 7, 7, 120), (21, 1)),
        ((*range(100, 110), 7, 7, 103), None),  # one token says too little to go back
        ((*range(100, 110), 7, 7, 103, 104), (5, 2)),
        ((*range(100, 110), 103), (11, 0)),
    ],
)
def test_alignment(output: tuple[int, ...], place: tuple[int, int] | None) -> None:
    found = Alignment(DISTINCT, 2).find([100, 101, *output])
    assert (found and (found.start, found.match)) == place


def test_of_equal_matches_the_first_ahead_is_taken_and_then_the_last_behind() -> None:
    prediction = (1, 2, 8, 1, 2, 9, 1, 2, 10, 1, 2, 11)
    ahead = Alignment(prediction, 0).find([1, 2, 8, 5, 5, 1, 2])
    behind = Alignment(prediction, 0).find([*prediction[:10], 5, 5, 8, 5, 5, 1, 2])
    assert (ahead and ahead.start, behind and behind.start) == (5, 11)
    end = Alignment(prediction, 0).find([*prediction, 5, 5, 1, 2])
    assert end
    assert end.start == 11


def test_a_longer_match_behind_beats_a_shorter_one_ahead() -> None:
    prediction = (1, 2, 3, 4, 20, 21, 22, 4, 30)
    found = Alignment(prediction, 0).find([*prediction[:6], 7, 7, 2, 3, 4])
    assert found == Place(prediction, 4, 3)


@given(TEXTS, TEXTS, st.integers(0, 70), st.integers(0, 70), st.integers(0, 9))
def test_match_length(text: list[int], other: list[int], end: int, other_end: int, limit: int) -> None:
    end, other_end = min(end, len(text)), min(other_end, len(other))
    n = match_length(text, end, other, other_end, limit)
    assert text[end - n : end] == other[other_end - n : other_end]
    assert n <= limit
    if n < min(end, other_end, limit):
        assert text[end - n - 1] != other[other_end - n - 1]
