"""Made-up children's stories in which names come again, as word tokens.

A name is two tokens, a first part and a second part. Stories to learn from take their names from a fixed set, in which
every first part goes with several second parts; stories to test on take pairs that are not in it.

Invariants:
- the persons of one story have different first parts, so a first part that was seen names its second part;
- a story is a function of its generator's state.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

PARTS = 64  # first parts, and second parts
SENTENCES = (
    "once upon a time there was {kind} called {a} .",
    "one day {a} met {b} in the {place} .",
    "{a} and {b} played with {thing} all day .",
    '" {hello} , {a} ! " said {b} .',
    "{a} gave {b} {thing} .",
    "{b} was {mood} and went to the {place} .",
    "{a} wanted {thing} but {b} said no .",
    "then {a} saw {kind} and told {b} .",
    "{b} helped {a} to find {thing} .",
    "{a} was {mood} because {b} was {mood} .",
)
WORDS = {
    "kind": ("a girl", "a boy", "a cat", "a little bear", "a bird", "an old dog"),
    "place": ("park", "forest", "house", "garden", "kitchen", "school"),
    "thing": ("a ball", "a red car", "some bread", "a big box", "the doll", "a kite"),
    "mood": ("happy", "sad", "tired", "very angry", "glad"),
    "hello": ("hello", "come here", "look", "thank you", "good morning"),
}
Name = tuple[int, int]


def _vocabulary() -> dict[str, int]:
    texts = (*SENTENCES, *itertools.chain.from_iterable(WORDS.values()))
    words = sorted({word for text in texts for word in text.split() if not word.startswith("{")})
    return {word: token for token, word in enumerate(words)}


WORD_IDS = _vocabulary()
FIRST = len(WORD_IDS)  # the token of the first first part
SECOND = FIRST + PARTS
END = SECOND + PARTS
VOCABULARY = END + 1


def split_names(count: int) -> tuple[list[Name], list[Name]]:
    """The names of training stories, and those of test stories: all other pairs. Always the same for one `count`."""
    names = list(itertools.product(range(FIRST, SECOND), range(SECOND, END)))
    random.Random(0).shuffle(names)
    return sorted(names[:count]), sorted(names[count:])


@dataclass(frozen=True)
class Story:
    """Its tokens, and where the second part of a name stands that was said before."""

    tokens: list[int]
    repeated: list[int]


def tell(names: list[Name], draw: random.Random, num_sentences: int = 10) -> Story:
    """A story of two persons."""
    persons = _persons(names, draw)
    tokens: list[int] = []
    repeated: list[int] = []
    said: set[Name] = set()
    for number in range(num_sentences):
        sentence = SENTENCES[0] if number == 0 else draw.choice(SENTENCES[1:])
        a, b = draw.sample(persons, 2)
        for part in _parts(sentence, {"{a}": a, "{b}": b}, draw):
            tokens += part
            if isinstance(part, tuple):
                repeated += [len(tokens) - 1] if part in said else []
                said.add(part)
    return Story([*tokens, END], repeated)


def _persons(names: list[Name], draw: random.Random) -> list[Name]:
    persons = [draw.choice(names)]
    while len(persons) < 2:
        name = draw.choice(names)
        if name[0] != persons[0][0]:
            persons.append(name)
    return persons


def _parts(sentence: str, persons: dict[str, Name], draw: random.Random) -> Iterator[Name | list[int]]:
    """Names as tuples, words as lists."""
    for word in sentence.split():
        if word in persons:
            yield persons[word]
        elif word.startswith("{"):
            yield [WORD_IDS[w] for w in draw.choice(WORDS[word[1:-1]]).split()]
        else:
            yield [WORD_IDS[word]]
