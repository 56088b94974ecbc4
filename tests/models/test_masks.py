"""Forbidden tokens: always, and after what was said."""

from __future__ import annotations

import pytest
import torch

from models.masks import Mask

WORDS = [(1,), (2, 3), (2, 2, 4), (5, 2, 6), (5, 2, 7)]


def forbidden(mask: Mask) -> list[int]:
    return mask.always.isneginf().nonzero().flatten().tolist()


def test_words_of_one_token_are_always_forbidden() -> None:
    mask = Mask(8, None, WORDS, torch.device("cpu"))
    assert forbidden(mask) == [1]
    assert mask.reach == 2


def test_all_but_the_allowed_are_forbidden_bad_words_included() -> None:
    assert forbidden(Mask(4, [1, 2], [(1,)], torch.device("cpu"))) == [0, 1, 3]


@pytest.mark.parametrize(
    ("said", "completing"),
    [((), []), ((2,), [3]), ((2, 2), [3, 4]), ((9, 5, 2), [3, 6, 7]), ((2, 5), []), ((5,), [])],
)
def test_the_last_token_of_a_bad_word_is_forbidden_after_the_others(said: tuple[int, ...], completing: list) -> None:
    assert Mask(8, None, WORDS, torch.device("cpu")).completing(said) == completing
