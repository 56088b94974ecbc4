"""Ranks, accuracies and walks against brute force."""

import itertools

import numpy as np
import pytest
import torch

from models.drafters.resblock import ResBlockHeads
from models.train.acceptance import MISSING, Text, measure_accuracies, measured_tau, rank_text, tau_by_nodes, walk
from models.tree import best_static_choices, expected_tau

HIDDEN, VOCAB, HEADS, LENGTH = 12, 50, 3, 60


@pytest.fixture
def heads() -> ResBlockHeads:
    torch.manual_seed(0)
    ids = torch.arange(0, VOCAB, 2)  # odd tokens cannot be guessed
    heads = ResBlockHeads(torch.randn(len(ids), HIDDEN), num_heads=HEADS, token_ids=ids)
    with torch.no_grad():
        heads.weight.normal_()
    return heads


def guesses(heads: ResBlockHeads, hidden: torch.Tensor, t: int) -> list[list[int]]:
    return heads.token_ids[heads(hidden[t : t + 1])[0].topk(20).indices].tolist()


def brute_force_tau(
    heads: ResBlockHeads, hidden: torch.Tensor, tokens: list[int], begin: int, end: int, choices: list[tuple[int, ...]]
) -> tuple[int, int]:
    """Decode tokens[begin:end] as an engine would, with token strings instead of ranks."""
    emitted, steps = [tokens[begin]], 0
    while begin + len(emitted) < end:
        state_at = begin + len(emitted) - 2
        drafts = guesses(heads, hidden, state_at)
        paths = [[drafts[depth][rank] for depth, rank in enumerate(choice)] for choice in choices]
        rest = tokens[begin + len(emitted) : end]
        longest = max((path for path in paths if rest[: len(path)] == path), key=len, default=[])
        emitted += rest[: len(longest) + 1]
        steps += 1
    assert emitted == tokens[begin:end]
    return len(emitted) - 1, steps


def test_walk_equals_a_decode_by_tokens(heads: ResBlockHeads) -> None:
    torch.manual_seed(1)
    hidden = torch.randn(LENGTH, HIDDEN)
    tokens = torch.randint(VOCAB, (LENGTH,)).tolist()
    for t in range(LENGTH - 6):  # most tokens become guessable, at various ranks
        if t % 5:
            drafts = guesses(heads, hidden, t - 1) if t else [[tokens[0]] * 20]
            tokens[t + 1] = drafts[0][t % 3]
    counts = np.array([False] * 7 + [True] * 20 + [False] * 3 + [True] * 30)
    texts = rank_text(heads, hidden, np.array(tokens), counts)
    for nodes in (0, 1, 3, 9, 40):
        choices = best_static_choices(measure_accuracies(texts), nodes)
        brute = [brute_force_tau(heads, hidden, tokens, b, e, list(choices)) for b, e in ((7, 27), (30, 60))]
        assert [walk(text, choices) for text in texts] == brute
    assert measured_tau(texts, choices)[0] == sum(t for t, _ in brute) / sum(s for _, s in brute)
    assert measured_tau(texts, choices)[0] > 1.2


def test_without_a_tree_every_step_emits_one_token(heads: ResBlockHeads) -> None:
    texts = rank_text(heads, torch.randn(LENGTH, HIDDEN), np.arange(LENGTH) % VOCAB, np.ones(LENGTH, dtype=bool))
    assert measured_tau(texts, ()) == (1.0, 0.0)
    assert walk(texts[0], ()) == (LENGTH - 2, LENGTH - 2)


def test_right_guesses_at_every_depth_are_all_accepted() -> None:
    known = np.tril(np.ones((10, HEADS), dtype=bool)[::-1], k=0)[::-1]
    text = Text(np.where(known, 0, MISSING), known)
    assert walk(text, [(0,), (0, 0), (0, 0, 0)]) == (9, 3)
    assert walk(text, [(0,)]) == (9, 5)


def test_accuracies_are_shares_of_exact_ranks() -> None:
    ranks = np.array([[0, 1], [0, MISSING], [2, 1], [MISSING, MISSING]])
    known = np.array([[True, True], [True, True], [True, True], [True, False]])
    first, second = measure_accuracies([Text(ranks, known)])
    assert first[:3] == (0.5, 0.25, 0.0)
    assert second[:2] == (0.66667, 0.0)


def test_independent_depths_walk_as_the_formula_says() -> None:
    draw = np.random.default_rng(0)
    accuracies = ((0.5, 0.2), (0.4, 0.2))
    count = 60_000
    ranks = np.stack([draw.choice([0, 1, MISSING], size=count, p=[*a, 1 - sum(a)]) for a in accuracies], axis=1)
    text = Text(ranks, np.ones((count, 2), dtype=bool))
    for nodes in (1, 2, 4):
        choices = best_static_choices(accuracies, nodes)
        tau, _ = measured_tau([text], choices)
        assert tau == pytest.approx(expected_tau(accuracies, choices), abs=0.02)


def test_the_standard_error_is_the_spread_of_repeated_measurements() -> None:
    draw = np.random.default_rng(1)

    def texts() -> list[Text]:
        rates = draw.random(40)
        return [Text(np.where(draw.random((30, 1)) < rate, 0, MISSING), np.ones((30, 1), bool)) for rate in rates]

    results = [measured_tau(texts(), [(0,)]) for _ in range(300)]
    assert np.mean([error for _, error in results]) == pytest.approx(np.std([tau for tau, _ in results]), rel=0.15)


def test_more_nodes_never_walk_slower(heads: ResBlockHeads) -> None:
    torch.manual_seed(2)
    texts = rank_text(heads, torch.randn(LENGTH, HIDDEN), np.arange(LENGTH) * 2 % VOCAB, np.ones(LENGTH, dtype=bool))
    rows = tau_by_nodes(texts, measure_accuracies(texts))
    assert [row.nodes for row in rows] == [1, 2, 4, 8, 16, 32, 63]
    assert all(a.independent <= b.independent for a, b in itertools.pairwise(rows))
    assert rows[-1].measured > rows[0].measured >= 1.0


def test_a_draft_vocabulary_smaller_than_the_ranks() -> None:
    torch.manual_seed(3)
    small = ResBlockHeads(torch.randn(5, HIDDEN), num_heads=2, token_ids=torch.tensor([2, 3, 5, 7, 11]))
    (text,) = rank_text(small, torch.randn(10, HIDDEN), np.array([2, 3, 4] * 3 + [2]), np.ones(10, dtype=bool))
    assert set(np.unique(text.ranks)) <= {0, 1, 2, 3, 4, MISSING}
    assert text.ranks[1, 0] < MISSING  # token 3 is in the draft vocabulary, all of which is ranked
    assert text.ranks[0, 0] == MISSING  # token 4 is not
