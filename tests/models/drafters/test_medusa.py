"""Candidates: best first, in the model's own ids, perturbed by the verifier's noise when sampling."""

from __future__ import annotations

import pytest
import torch

from models.drafters.medusa import DraftRow, propose
from models.drafters.resblock import ResBlockHeads
from models.sampling import gumbel_from_keys, noise_key
from server.engine.messages import SamplingParams

GREEDY = SamplingParams(9, temperature=0)
SAMPLED = SamplingParams(9, temperature=0.7, seed=5, choice=2)


def make_heads() -> ResBlockHeads:
    torch.manual_seed(0)
    heads = ResBlockHeads(torch.randn(20, 8), num_heads=3, token_ids=torch.arange(100, 140, 2))
    torch.nn.init.normal_(heads.weight)
    return heads


def test_greedy_candidates_are_the_heads_best_in_order() -> None:
    heads, hidden = make_heads(), torch.randn(2, 8)
    with torch.no_grad():
        found = propose(heads, hidden, [DraftRow(GREEDY, 5)] * 2, 4)
        logits = heads(hidden)
    for row in range(2):
        for depth in range(3):
            order = logits[row, depth].argsort(descending=True)[:4]
            assert found.tokens[row, depth].tolist() == (100 + 2 * order).tolist()
            shares = logits[row, depth].softmax(-1)[order]
            assert found.given[row, depth].tolist() == pytest.approx(shares.tolist(), rel=1e-4)


def test_sampled_candidates_are_ranked_with_the_verifiers_noise_of_their_position() -> None:
    heads, hidden = make_heads(), torch.randn(2, 8)
    with torch.no_grad():
        found = propose(heads, hidden, [DraftRow(GREEDY, 5), DraftRow(SAMPLED, 9)], 4)
        plain = propose(heads, hidden, [DraftRow(GREEDY, 5)] * 2, 4)
        logits = heads(hidden)[1].log_softmax(-1) / 0.7
    assert found.tokens[0].tolist() == plain.tokens[0].tolist()
    for depth in range(3):
        noise = gumbel_from_keys([noise_key(5, 2, 9 + depth)], heads.token_ids)[0]
        order = (logits[depth] + noise).argsort(descending=True)[:4]
        assert found.tokens[1, depth].tolist() == (100 + 2 * order).tolist()


def test_no_more_ranks_than_draft_tokens() -> None:
    with torch.no_grad():
        found = propose(make_heads(), torch.randn(1, 8), [DraftRow(GREEDY, 0)], 50)
    assert found.tokens.shape == found.given.shape == (1, 3, 20)
