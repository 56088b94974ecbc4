"""The paper's order of forward and backward, the schedule, and runs that stop and go on."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from models.mtp import MTPForCausalLM
from models.train.multi_token import Pretrainer, Recipe, backward_by_head, held_out_losses, plain_tokens
from models.train.saved import ResumeError
from tests.small_models import small_mtp


def batches(step: int) -> Tensor:
    return torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(step))


def plain_losses(model: MTPForCausalLM, tokens: Tensor) -> Tensor:
    """[heads], all in one graph."""
    heads = model.config.num_future_tokens
    context = tokens.shape[1] - heads
    out = model(tokens[:, :context], use_cache=False)
    logits = torch.cat([out.logits[:, :, None], model.lm_head(out.head_states)], dim=2)
    return torch.stack(
        [
            cross_entropy(logits[:, :, i].flatten(0, 1), tokens[:, 1 + i : 1 + i + context].flatten())
            for i in range(heads)
        ]
    )


def test_gradients_are_those_of_the_sum_of_all_losses() -> None:
    model = small_mtp(num_hidden_layers=6)
    other = copy.deepcopy(model)
    losses = backward_by_head(model, batches(0))
    expected = plain_losses(other, batches(0))
    expected.sum().backward()
    torch.testing.assert_close(losses, expected.detach())
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert theirs.grad is not None, name
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_complements_are_read_but_not_learnt() -> None:
    model = small_mtp()
    tokens, learnt = batches(0), batches(9) < 40
    learnt[:, -4:] = True
    given = torch.where(learnt, tokens, ~tokens)
    assert torch.equal(plain_tokens(given), tokens)
    state, told = model.model.trunk(tokens[:, :8])
    expected = []
    for head in range(4):
        logits = model.lm_head(model.model.head(head, state, told))
        counts = learnt[:, 1 + head : 9 + head]
        expected.append(cross_entropy(logits[counts], tokens[:, 1 + head : 9 + head][counts]).detach())
    torch.testing.assert_close(backward_by_head(model, given), torch.stack(expected))
    torch.testing.assert_close(torch.tensor(held_out_losses(model, given, 8)), torch.stack(expected))


def test_a_model_of_heads_alone_still_trains_its_embedding() -> None:
    model = small_mtp(num_hidden_layers=4)
    backward_by_head(model, batches(0))
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


def test_held_out_losses_are_means_over_all_windows() -> None:
    model = small_mtp()
    windows = torch.cat([batches(1), batches(2)])
    with torch.no_grad():
        expected = plain_losses(model, windows)
    torch.testing.assert_close(torch.tensor(held_out_losses(model, windows, 4)), expected)


def test_the_rate_warms_up_and_falls_to_three_percent() -> None:
    recipe = Recipe(steps=1000, lr=2.0, warmup=0.1)
    rates = [recipe.rate(step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.02)
    assert max(rates) == rates[99] == 2.0
    assert rates[:100] == sorted(rates[:100])
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] == pytest.approx(0.06, rel=0.01)


def test_stopped_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    recipe = Recipe(steps=7)
    whole = Pretrainer(small_mtp(), batches, recipe, "these")
    while not whole.is_done:
        losses = whole.advance()
    part = Pretrainer(small_mtp(), batches, recipe, "these")
    for _ in range(3):
        part.advance()
    part.losses.append((3, [1.0, 2.0, 3.0, 4.0]))
    part.save(tmp_path / "state.pt")
    resumed = Pretrainer(small_mtp(seed=1), batches, recipe, "these")
    resumed.load(tmp_path / "state.pt")
    assert (resumed.step, resumed.losses) == (3, part.losses)
    while not resumed.is_done:
        again = resumed.advance()
    assert torch.equal(losses, again)
    for ours, theirs in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state.pt"
    Pretrainer(small_mtp(), batches, Recipe(steps=7), "these").save(state)
    for other in (
        Pretrainer(small_mtp(), batches, Recipe(steps=8), "these"),
        Pretrainer(small_mtp(), batches, Recipe(steps=7), "those"),
        Pretrainer(small_mtp(num_future_tokens=3), batches, Recipe(steps=7), "these"),
    ):
        with pytest.raises(ResumeError, match="other settings"):
            other.load(state)
    state.write_bytes(b"nothing")
    with pytest.raises(ResumeError, match="no saved state"):
        Pretrainer(small_mtp(), batches, Recipe(steps=7), "these").load(state)


def test_vectors_are_not_decayed() -> None:
    trainer = Pretrainer(small_mtp(), batches, Recipe(steps=7), "these")
    decays = {group["weight_decay"]: {p.dim() for p in group["params"]} for group in trainer._optimizer.param_groups}
    assert decays == {0.1: {2}, 0.0: {1}}
