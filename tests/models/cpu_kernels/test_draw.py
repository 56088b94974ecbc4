"""Tokens drawn in C, on every target, against models.sampling."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.kernels import cpu
from models.sampling import Row, gumbel_from_keys, noise_key, sample
from server.engine.messages import SamplingParams

pytestmark = pytest.mark.usefixtures("target")

VOCAB = 20_001  # several parts, and a rest that fills no vector
WAYS = {
    "greedy": SamplingParams(9, temperature=0),
    "plain": SamplingParams(9),
    "cold": SamplingParams(9, temperature=0.2),
    "hot": SamplingParams(9, temperature=1.9),
    "top_p": SamplingParams(9, top_p=0.9),
    "top_p tiny": SamplingParams(9, top_p=1e-9),
    "top_p nearly 1": SamplingParams(9, top_p=0.9999),
    "top_k": SamplingParams(9, top_k=40),
    "top_k 1": SamplingParams(9, top_k=1),
    "top_k large": SamplingParams(9, top_k=700, top_p=0.5),
    "top_k beyond all": SamplingParams(9, top_k=10**6),
    "min_p": SamplingParams(9, min_p=0.01),
    "min_p 1": SamplingParams(9, min_p=1.0),
    "all": SamplingParams(9, temperature=1.3, top_p=0.8, top_k=300, min_p=0.001),
}


def logits(count: int, spread: float, vocab: int = VOCAB) -> Tensor:
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(int(spread * 10))) * spread


def rows(params: SamplingParams, count: int) -> list[Row]:
    return [Row(params, 100 + i, 0) for i in range(count)]


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 20.0])
@pytest.mark.parametrize("way", WAYS)
def test_it_draws_what_torch_draws(way: str, spread: float) -> None:
    raw, mine = logits(12, spread), rows(WAYS[way], 12)
    if way != "greedy" and not spread:
        raw += torch.linspace(0, 1, VOCAB)  # torch's topk puts equals in any order
    assert sample(raw, mine, in_c=True).tolist() == sample(raw, mine).tolist()


@pytest.mark.parametrize("vocab", [1, 3, 16, 17, 8191, 8192, 8193])
def test_any_size_of_vocabulary(vocab: int) -> None:
    wide = logits(5, 2.0, vocab + 7)
    wide[:, vocab:] = 100.0  # behind the end: not to be looked at
    raw = wide[:, :vocab]
    for params in WAYS.values():
        mine = rows(params, 5)
        assert sample(raw, mine, in_c=True).tolist() == sample(raw.contiguous(), mine).tolist()


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    raw = logits(len(WAYS), 3.0)
    mine = [Row(params, 50 + i, 0) for i, params in enumerate(WAYS.values())]
    alone = [int(sample(raw[i : i + 1], [mine[i]], in_c=True)) for i in range(len(mine))]
    assert sample(raw, mine, in_c=True).tolist() == alone


def test_of_equals_the_first_is_taken() -> None:
    raw = torch.zeros(1, VOCAB)
    raw[0, [9_000, 123, 19_999]] = 1.0
    assert cpu.draw(raw, [cpu.DrawStruct(0.0, 1.0, 0.0, 0, 0)]).tolist() == [123]


@pytest.mark.parametrize("way", WAYS)
def test_what_is_impossible_is_never_drawn(way: str) -> None:
    raw = torch.full((40, VOCAB), -math.inf)
    raw[:, 11_000:11_003] = 0.0
    drawn = set(sample(raw, rows(WAYS[way], 40), in_c=True).tolist())
    assert drawn <= {11_000, 11_001, 11_002}
    raw[:] = -math.inf
    assert set(sample(raw, rows(WAYS[way], 40), in_c=True).tolist()) == {0}  # as torch's argmax has it


@pytest.mark.parametrize("way", WAYS)
def test_numbers_that_are_none_break_nothing(way: str) -> None:
    raw = logits(4, 1.0)
    raw[0], raw[1, 5], raw[2, 19_990:], raw[3, 7] = math.nan, math.nan, math.nan, math.inf
    drawn = sample(raw, rows(WAYS[way], 4), in_c=True)
    assert ((drawn >= 0) & (drawn < VOCAB)).all()


@pytest.mark.parametrize(
    "params", [SamplingParams(9, min_p=0.01), SamplingParams(9, min_p=1.0), SamplingParams(9, top_p=0.5)]
)
def test_the_best_token_is_found_beside_one_that_is_no_number(params: SamplingParams) -> None:
    lanes = [(best, none) for best in range(16) for none in range(16) if best != none]
    raw = torch.zeros(len(lanes), 64)
    for row, (best, none) in zip(raw, lanes, strict=True):
        row[best], row[none] = 100.0, math.nan
    drawn = sample(raw, rows(params, len(lanes)), in_c=True).tolist()
    assert all(0 <= token < 64 for token in drawn)
    if params.min_p:
        assert sum(token == best for token, (best, _) in zip(drawn, lanes, strict=True)) > len(lanes) / 2


def test_noise_is_of_every_64_bit_key() -> None:
    raw = logits(4, 0.1)
    for seed in (0, 2**63, 2**64 - 1):
        keys = [noise_key(seed, choice, 3) for choice in range(4)]
        mine = [Row(SamplingParams(9, seed=seed, choice=choice), 3, 0) for choice in range(4)]
        drawn = cpu.draw(raw, [cpu.DrawStruct(1.0, 1.0, 0.0, 0, key) for key in keys])
        assert drawn.tolist() == sample(raw, mine).tolist()
        assert len(set(drawn.tolist())) == 4


def test_noise_is_that_of_torch() -> None:
    keys, tokens = [noise_key(1, 0, i) for i in range(20)], torch.arange(VOCAB).flip(0)[:5_003]
    mine, theirs = gumbel_from_keys(keys, tokens, in_c=True), gumbel_from_keys(keys, tokens)
    is_high = theirs > -1  # below, u is near 1 and its last bit counts for more
    torch.testing.assert_close(mine[is_high], theirs[is_high], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(mine, theirs, atol=0.1, rtol=0)
