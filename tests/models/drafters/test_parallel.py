"""Trees of parallel heads: within their bounds, by calibrated values, learning from what came."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest
import torch

from models.drafters.drafter import Ask
from models.drafters.medusa import DraftRow
from models.drafters.parallel import ParallelDrafter
from models.drafters.resblock import ResBlockHeads
from models.masks import Mask
from models.tree import Guess
from server.engine.messages import SamplingParams

VOCAB, HIDDEN = 20, 8
GREEDY = SamplingParams(9, temperature=0)


@pytest.fixture
def drafter() -> ParallelDrafter:
    torch.manual_seed(0)
    heads = ResBlockHeads(torch.randn(VOCAB, HIDDEN) * 2, num_heads=3, accuracies=((0.5, 0.2), (0.3, 0.1), (0.2, 0.1)))
    torch.nn.init.normal_(heads.weight)
    return ParallelDrafter(heads.requires_grad_(False))


def ask(name: str = "a", num_nodes: int = 12, **changes: object) -> Ask:
    row = DraftRow(GREEDY, 6)
    return replace(Ask(name, [1, 2, 3, 4, 5, 6], array("q", range(5)), row, "greedy", num_nodes, 9), **changes)  # type: ignore[arg-type]


def depth(guesses: list[Guess], node: int) -> int:
    return 0 if node < 0 else 1 + depth(guesses, guesses[node].parent)


def test_trees_are_within_their_bounds_and_best_first(drafter: ParallelDrafter) -> None:
    for name in "abc":
        drafter.remember(name, 0, torch.randn(5, HIDDEN))
    wide, flat, dear = drafter.trees([ask("a"), ask("b", 30, max_depth=1), ask("c", 30, least_value=0.15)])
    assert len(wide) == 12
    assert max(depth(wide, node) for node in range(len(wide))) > 1
    assert {guess.parent for guess in flat} == {-1}
    assert 0 < len(dear) < 30
    assert all(guess.value >= 0.15 for guess in dear)
    for tree in (wide, flat, dear):
        values = [guess.value for guess in tree]
        assert values == sorted(values, reverse=True)
        assert all(guess.parent < place for place, guess in enumerate(tree))


def test_masks_hold(drafter: ParallelDrafter) -> None:
    drafter.remember("a", 0, torch.randn(5, HIDDEN))
    mask = Mask(VOCAB, (3, 7, 9), (), torch.device("cpu"))
    (tree,) = drafter.trees([ask(row=DraftRow(GREEDY, 6, mask))])
    assert tree
    assert {guess.token for guess in tree} <= {3, 7, 9}
    drafter.trees([ask(text=[1, 2, 3, 4, 5, 6, 3], row=DraftRow(GREEDY, 7, mask))])
    told = [count for count, _, _ in drafter.calibration._told]
    assert sum(told) == pytest.approx(3, abs=0.1)  # what may not be said was no guess


def test_static_trees_have_one_shape() -> None:
    torch.manual_seed(1)
    heads = ResBlockHeads(torch.randn(VOCAB, HIDDEN), num_heads=2, accuracies=((0.6, 0.3), (0.5, 0.2)))
    static = ParallelDrafter(heads.requires_grad_(False), is_static=True)
    for name in "ab":
        static.remember(name, 0, torch.randn(5, HIDDEN))
    first, second = static.trees([ask("a", 4), ask("b", 4)])
    assert [(guess.parent, guess.value) for guess in first] == [(guess.parent, guess.value) for guess in second]
    assert [guess.value for guess in first] == pytest.approx([0.6, 0.3, 0.3, 0.15])


def test_only_the_latest_position_is_known(drafter: ParallelDrafter) -> None:
    assert not drafter.knows("a", 5)
    drafter.remember("a", 0, torch.randn(5, HIDDEN))
    assert drafter.knows("a", 5)
    assert not drafter.knows("a", 6)
    drafter.remember("a", 5, torch.randn(2, HIDDEN))
    assert drafter.knows("a", 7)
    drafter.forget("a")
    assert not drafter.knows("a", 7)


def test_it_learns_from_what_came(drafter: ParallelDrafter) -> None:
    state, text = torch.randn(1, HIDDEN), [1, 2, 3, 4, 5, 6]
    drafter.remember("a", 4, state)
    before = drafter.trees([ask(text=text)])[0]
    last = before[-1].token if before[-1].parent < 0 else next(g.token for g in reversed(before) if g.parent < 0)
    for _ in range(30):  # always what it thought least likely
        text = [*text, last]
        drafter.remember("a", len(text) - 2, state)
        after = drafter.trees([ask(text=text)])[0]
    assert after[0].token == last != before[0].token


def test_ranked_teaches_nothing(drafter: ParallelDrafter) -> None:
    drafter.remember("a", 4, torch.randn(1, HIDDEN))
    (ranked,) = drafter.ranked([ask()])
    assert len(ranked.tokens) == len(ranked.probabilities) == 3
    drafter.ranked([ask(text=[1, 2, 3, 4, 5, 6, ranked.tokens[0][0]])])
    assert drafter.calibration.error is None
    assert drafter.trees([]) == drafter.ranked([]) == []
