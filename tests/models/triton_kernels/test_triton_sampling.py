"""Triton's draw against the argmax of logits and noise that lie in memory."""

from __future__ import annotations

import pytest
import torch

from models.kernels import triton_sampling
from models.sampling import gumbel_from_keys, noise_key


@pytest.mark.parametrize("vocab", [5, 1024, 2500])
def test_it_draws_what_torch_draws(vocab: int, device: torch.device) -> None:
    keys = [noise_key(seed, 0, position) for seed in range(5) for position in (0, 3, 1000)]
    scaled = 3 * torch.randn(len(keys), vocab, generator=torch.Generator().manual_seed(vocab))
    scaled[2, : vocab // 2] = -torch.inf
    expected = (scaled + gumbel_from_keys(keys, torch.arange(vocab))).argmax(-1)
    found = triton_sampling.draw(scaled.to(device), torch.tensor(keys, device=device)).cpu()
    assert torch.equal(found, expected)
    assert len(set(found.tolist())) > 2  # it is no constant


def test_of_equals_the_first_is_drawn(device: torch.device) -> None:
    scaled = torch.full((1, 3000), -torch.inf, device=device)
    scaled[0, [7, 2999]] = torch.inf
    assert triton_sampling.draw(scaled, torch.tensor([1], device=device)).item() == 7


def test_rows_may_lie_apart(device: torch.device) -> None:
    wide = torch.randn(4, 200, device=device)
    keys = torch.arange(4, device=device)
    assert torch.equal(triton_sampling.draw(wide[:, :150], keys), triton_sampling.draw(wide[:, :150].clone(), keys))
