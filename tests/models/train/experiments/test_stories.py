"""Names: which stories have which, and where they come again."""

from __future__ import annotations

import random

from models.train.experiments.stories import (
    END,
    FIRST,
    PARTS,
    SECOND,
    VOCABULARY,
    WORD_IDS,
    Name,
    Story,
    split_names,
    tell,
)


def names_of(story: Story) -> list[tuple[int, Name]]:
    """Where each name ends, and which it is."""
    tokens = story.tokens
    return [(i, (tokens[i - 1], tokens[i])) for i in range(1, len(tokens)) if SECOND <= tokens[i] < END]


def test_the_two_sets_of_names_share_none_but_all_parts() -> None:
    known, new = split_names(1024)
    assert len(known) == 1024
    assert len(known) + len(new) == len({*known, *new}) == PARTS**2
    assert {first for first, _ in known} == set(range(FIRST, SECOND))
    assert {second for _, second in known} == set(range(SECOND, END))
    assert split_names(1024) == (known, new)


def test_repeated_places_are_exactly_the_names_said_before() -> None:
    _, new = split_names(1024)
    draw = random.Random(7)
    for _ in range(50):
        story = tell(new, draw)
        said: set[Name] = set()
        repeated = []
        for at, name in names_of(story):
            assert name in new
            repeated += [at] if name in said else []
            said.add(name)
        assert story.repeated == repeated
        assert len(said) == len({first for first, _ in said}) == 2 or len(said) == 1
        assert story.tokens[-1] == END
        assert story.tokens.count(END) == 1


def test_stories_follow_from_their_generator_and_differ() -> None:
    names, _ = split_names(100)
    assert tell(names, random.Random(1)) == tell(names, random.Random(1)) != tell(names, random.Random(2))
    tokens = {token for seed in range(200) for token in tell(names, random.Random(seed)).tokens}
    assert set(WORD_IDS.values()) <= tokens
    assert max(tokens) == VOCABULARY - 1
