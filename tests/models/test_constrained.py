"""Trees under a grammar: nothing forbidden, forced chains for free, guesses by value."""

from __future__ import annotations

import random

import pytest
from json_tokens import EOS, json_tokenizer

from models.constrained import grow
from models.grammar import Grammars, GrammarState
from models.tree import Guess, Tree

TOKENIZER = json_tokenizer()
GRAMMARS = Grammars(TOKENIZER.to_str(), [EOS])
ACCURACIES = ((0.5, 0.3, 0.1), (0.4, 0.2, 0.1), (0.3, 0.1, 0.05))


def ids(text: str) -> list[int]:
    found: list[int] = TOKENIZER.encode(text).ids
    return found


def texts(tree: Tree) -> list[str]:
    """The text of each node's path."""
    return [TOKENIZER.decode([tree.tokens[i] for i in tree.path(node)]) for node in range(len(tree))]


def grown(state: GrammarState, candidates: list[list[int]], guesses: int, forced: int, depth: int = 20) -> Tree:
    return tree_of(grow(state, candidates, ACCURACIES, num_guesses=guesses, num_forced=forced, max_depth=depth))


def tree_of(guesses: list[Guess]) -> Tree:
    return Tree(tuple(guess.token for guess in guesses), tuple(guess.parent for guess in guesses))


def test_forced_tokens_need_nobody_to_guess_them() -> None:
    state = GRAMMARS.start('start: "xyz" /[0-9]/ "uvw"')
    assert texts(grown(state, [], 4, 15)) == ["x", "xy", "xyz"]
    assert texts(grown(state, [], 0, 2)) == ["x", "xy"]
    assert texts(grown(state, [], 0, 15, depth=1)) == ["x"]
    assert texts(grown(state, [], 0, 0)) == []


def test_guesses_join_forced_tokens_in_order_of_value() -> None:
    state = GRAMMARS.start('start: ("a" | "b" | "c") "xy" ("d" | "e")')
    candidates = [[*ids("q"), *ids("b"), *ids("a")], [], [], ids("d")]
    guesses = grow(state, candidates, (*ACCURACIES, (0.5,)), num_guesses=2, num_forced=9, max_depth=20)
    assert [guess.source for guess in guesses] == ["heads", "grammar", "grammar", "heads"]
    assert texts(tree_of(guesses)) == [
        "b",
        "bx",
        "bxy",
        "bxyd",
    ]  # q is forbidden, which leaves b likely: its chain is free
    few = grown(state, [[*ids("b"), *ids("a"), *ids("c")]], 2, 9)
    assert texts(few) == ["b", "bx", "bxy", "a"]


def test_chains_below_unlikely_guesses_are_guesses() -> None:
    state = GRAMMARS.start('start: ("a" | "b" | "c") "xy"')
    guesses = grow(
        state, [[*ids("a"), *ids("b"), *ids("c")]], ((0.4, 0.35, 0.25),), num_guesses=4, num_forced=9, max_depth=9
    )
    assert texts(tree_of(guesses)) == ["a", "ax", "axy", "b"]


def test_nothing_follows_the_end() -> None:
    state = GRAMMARS.start('start: "red" | "redder"')
    tree = grown(state, [ids("red"), [EOS, *ids("d")], [1, 2]], 9, 9)
    assert all(text in "redder" for text in texts(tree))
    ends = [node for node, token in enumerate(tree.tokens) if token == EOS]
    assert ends
    assert not any(parent in ends for parent in tree.parents)


@pytest.mark.parametrize("seed", range(20))
def test_every_node_may_follow_its_path(seed: int) -> None:
    choose = random.Random(seed)
    state = GRAMMARS.start('start: /[a-d]{2,6}/ ("name" | "count") /[a-d0-9]*/')
    vocabulary = [token for letter in "abcdnc0123x" for token in ids(letter)] + ids("name") + ids("count") + [EOS]
    candidates = [choose.sample(list(dict.fromkeys(vocabulary)), 3) for _ in range(3)]
    tree = grown(state, candidates, 12, 6)
    assert len(tree) <= 18
    for node, parent in enumerate(tree.parents):
        path = tuple(tree.tokens[i] for i in tree.path(parent))
        assert state.allowed(path, [tree.tokens[node]])
    assert all(len(set(children)) == len(children) for children in tree.children.values())
