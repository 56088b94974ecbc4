"""Packed heads against the heads that they were made of, and one row against many."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.drafters.packed import PackedHeads
from models.drafters.resblock import ResBlockHeads

HIDDEN, VOCAB = 64, 90


def random_heads(num_heads: int, num_layers: int, lm_head: Tensor, **options: object) -> ResBlockHeads:
    torch.manual_seed(num_heads + 10 * num_layers)
    heads = ResBlockHeads(lm_head, num_heads=num_heads, num_layers=num_layers, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_(std=0.1)
    return heads


def make(kind: str, num_layers: int = 1) -> ResBlockHeads:
    generator = torch.Generator().manual_seed(3)
    if kind == "own":
        return random_heads(3, num_layers, torch.randn(3, VOCAB, HIDDEN, generator=generator))
    lm_head = torch.randn(VOCAB, HIDDEN, generator=generator)
    if kind == "truncated":
        ids = torch.arange(1, VOCAB, 3)
        return random_heads(4, num_layers, lm_head[ids], token_ids=ids, accuracies=((0.5, 0.1),) * 4)
    if kind == "inner":
        return random_heads(3, num_layers, lm_head, inner_layers=(0, 2))
    return random_heads(1 if kind == "single" else 4, num_layers, lm_head)


def hidden_of(heads: ResBlockHeads, rows: int) -> Tensor:
    return torch.randn(rows, (len(heads.inner_layers) + 1) * heads.hidden_size)


KINDS = ["shared", "own", "truncated", "single", "inner"]


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_they_answer_as_the_heads_do(kind: str, num_layers: int) -> None:
    heads = make(kind, num_layers)
    hidden = hidden_of(heads, 11)
    with torch.no_grad():
        expected, found = heads(hidden), PackedHeads(heads)(hidden)
    assert found.shape == expected.shape
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)  # [batch, heads]
    assert errors.median() > 1e-4
    assert errors.max() < 0.03


def test_they_know_what_the_heads_know() -> None:
    heads = make("truncated")
    packed = PackedHeads(heads)
    assert (packed.num_heads, packed.accuracies) == (4, heads.accuracies)
    assert torch.equal(packed.token_ids, heads.token_ids)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_bitwise_the_same_whatever_is_beside_it(kind: str, num_layers: int) -> None:
    heads = make(kind, num_layers)
    packed, hidden = PackedHeads(heads), hidden_of(heads, 40)
    alone = torch.cat([packed(row[None]) for row in hidden])
    for count in (1, 2, 3, 5, 8, 13, 40):
        rows = torch.randperm(40)[:count]
        assert torch.equal(packed(hidden[rows]), alone[rows])


@pytest.mark.parametrize("hidden_size", [24, 40, 100])
def test_rows_are_independent_at_odd_sizes(hidden_size: int) -> None:
    heads = random_heads(3, 2, torch.randn(50, hidden_size), inner_layers=(1,))
    packed, hidden = PackedHeads(heads), hidden_of(heads, 9)
    alone = torch.cat([packed(row[None]) for row in hidden])
    for count in range(1, 10):
        assert torch.equal(packed(hidden[:count]), alone[:count])
