"""Medusa-2: gradients against autograd in one graph, the trunk that is kept, runs that stop and go on, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from models.backbone import Backbone
from models.checkpoint import load_heads
from models.drafters.resblock import ResBlockHeads
from models.source import resolve_heads
from models.train import heads as command
from models.train.data import Example
from models.train.joint import JointRecipe, JointTrainer
from models.train.lora import LoRALinear
from models.train.saved import ResumeError
from models.train.trunk import forward_with_hidden
from tests.small_models import small_llama

RECIPE = JointRecipe(epochs=4, rows=64, warmup=2, rank=4, lr=5e-3, seed=3)


def examples(count: int = 12) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        length = 8 + number % 5
        tokens = torch.randint(2, 64, (length,), generator=generator).tolist()
        rows.append(Example(tuple(tokens), tuple(i >= 3 for i in range(length)), number % 4 == 0, True))
    return rows


def trainer(
    recipe: JointRecipe = RECIPE, rows: list[Example] | None = None, inner_layers: tuple[int, ...] = ()
) -> JointTrainer:
    model = small_llama().requires_grad_(False)
    torch.manual_seed(5)
    kept = torch.arange(0, 64, 2)  # the draft vocabulary: every other token
    heads = ResBlockHeads(model.lm_head.weight[kept], num_heads=3, token_ids=kept, inner_layers=inner_layers)
    for parameter in heads.parameters():
        parameter.data.normal_(0, 0.05)
    return JointTrainer(model, heads, examples() if rows is None else rows, recipe)


def scramble(joint: JointTrainer) -> None:
    torch.manual_seed(9)
    for adapter in joint._adapters.values():
        adapter.b.data.normal_(0, 0.1)


def plain_losses(joint: JointTrainer, original: LlamaForCausalLM, example: Example) -> Tensor:
    """[1 + heads] of one example, in one graph, position by position."""
    tokens = torch.tensor([example.tokens])
    hidden, logits = forward_with_hidden(joint.model, tokens, joint.heads.inner_layers)
    with torch.no_grad():
        teacher = original(tokens).logits[0].softmax(-1)
    teachable = [t for t in range(len(example.tokens) - 1) if example.counts[t + 1]]
    divergences = [(teacher[t] * (teacher[t].log() - logits[0, t].log_softmax(-1))).sum() for t in teachable]
    losses = [torch.stack(divergences).mean()]
    guessed = joint.heads(hidden[0]).log_softmax(-1)  # [positions, heads, draft vocabulary]
    for head in range(joint.heads.num_heads):
        parts = [
            -(teacher[t][joint.heads.token_ids] * guessed[t - head - 1, head]).sum()
            for t in teachable
            if t - head - 1 >= 0
        ]
        losses.append(torch.stack(parts).mean())
    return torch.stack(losses)


@pytest.mark.parametrize("inner_layers", [(), (0,)])
def test_losses_and_gradients_are_those_of_the_papers_sum(inner_layers: tuple[int, ...]) -> None:
    rows = examples()[:1]
    ours, other = (trainer(replace(RECIPE, dropout=0.0), rows, inner_layers) for _ in range(2))
    for joint in (ours, other):
        scramble(joint)
    losses = ours._backward(ours._batch(rows))
    expected = plain_losses(other, small_llama(), rows[0])
    torch.testing.assert_close(losses, expected.detach())
    weights = torch.tensor([1.0, 0.2 * 0.8, 0.2 * 0.64, 0.2 * 0.512])
    (weights * expected).sum().backward()
    for pair in zip(ours._optimizer.param_groups, other._optimizer.param_groups, strict=True):
        for got, wanted in zip(*(group["params"] for group in pair), strict=True):
            torch.testing.assert_close(got.grad, wanted.grad)


def test_padding_changes_no_loss() -> None:
    joint = trainer()
    scramble(joint)
    short, long = examples()[0], examples()[4]
    joint._set_mode(training=False)
    together = joint._losses(joint._batch([short, long]))
    parts = [joint._losses(joint._batch([example])) for example in (short, long)]
    counted = torch.tensor([sum(example.counts[1:]) for example in (short, long)], dtype=torch.float32)
    torch.testing.assert_close(together[0], (counted[0] * parts[0][0] + counted[1] * parts[1][0]) / counted.sum())


def test_heads_get_better_and_the_divergence_keeps_the_trunk() -> None:
    """Without the first term, heads pull the trunk away from itself."""
    ours = trainer(replace(RECIPE, epochs=20))
    before = ours.measure(examples())
    assert before[0] == pytest.approx(0.0, abs=1e-5)
    moved = {}
    for name, weight in (("kept", 0.2), ("pulled", 100.0)):
        joint = trainer(replace(RECIPE, epochs=20, heads_weight=weight))
        while not joint.is_done:
            joint.advance()
        moved[name] = joint.measure(examples())
    assert sum(moved["kept"][1:]) < 0.95 * sum(before[1:])
    assert moved["kept"][0] < 0.2 * moved["pulled"][0]
    assert moved["kept"][0] < 0.1


def test_learning_rates_are_the_papers_ratio_and_end_at_zero() -> None:
    joint = trainer(replace(RECIPE, lr=1e-3))
    seen = []
    while not joint.is_done:
        joint.advance()
        seen.append([group["lr"] for group in joint._optimizer.param_groups])
    assert all(heads == pytest.approx(4 * trunk) for trunk, heads in seen)
    trunk = [rate for rate, _ in seen]
    assert trunk[0] == pytest.approx(0.5e-3)
    assert max(trunk) == trunk[1] == pytest.approx(1e-3)
    assert trunk[-1] < 0.2e-3


def test_stopped_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole, part = trainer(), trainer()
    while not whole.is_done:
        whole.advance()
    for _ in range(3):
        part.advance()
    part.losses.append((3, [0.1]))
    part.save(tmp_path / "joint.pt")
    resumed = trainer()
    resumed.load(tmp_path / "joint.pt")
    assert (resumed.step, resumed.losses) == (3, [(3, [0.1])])
    while not resumed.is_done:
        resumed.advance()
    for ours, theirs in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(whole.heads.parameters(), resumed.heads.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    trainer().save(tmp_path / "joint.pt")
    for other in (trainer(replace(RECIPE, lr=1.0)), trainer(rows=examples(11))):
        with pytest.raises(ResumeError, match="other settings"):
            other.load(tmp_path / "joint.pt")
    (tmp_path / "joint.pt").write_bytes(b"nothing")
    with pytest.raises(ResumeError, match="no saved state"):
        trainer().load(tmp_path / "joint.pt")


def test_every_example_is_seen_once_an_epoch_in_groups_that_fit() -> None:
    joint = trainer()
    rows = examples()
    assert sorted(i for batch in joint._plan for i in batch) == sorted(list(range(len(rows))) * RECIPE.epochs)
    assert all(len(batch) * max(len(rows[i].tokens) for i in batch) <= RECIPE.rows for batch in joint._plan)


@pytest.fixture
def arguments(tiny_model: Path, chats: Path, tmp_path: Path) -> list[str]:
    return [
        str(tiny_model),
        *("--data", str(chats), "--output", str(tmp_path / "out"), "--device", "cpu", "--num-heads", "3"),
        *("--draft-vocab", "40", "--epochs", "2", "--batch-size", "64", "--lr", "0.01", "--design", "resblock"),
        *("--validation-fraction", "0.3", "--joint", "--joint-epochs", "2", "--joint-rows", "256"),
    ]


def test_the_command_writes_a_model_and_heads_that_load_and_draft(
    arguments: list[str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, Any] = {}
    finish = JointTrainer.finish

    def keep(self: JointTrainer) -> None:
        self._set_mode(training=False)
        kept["unmerged"] = forward_with_hidden(self.model, torch.arange(2, 20)[None])
        finish(self)

    monkeypatch.setattr(JointTrainer, "finish", keep)
    out = tmp_path / "out"
    assert command.main(arguments) == 0
    assert resolve_heads(None, str(out)) == out / "heads"
    model = AutoModelForCausalLM.from_pretrained(out)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    hidden, logits = forward_with_hidden(model, torch.arange(2, 20)[None])
    torch.testing.assert_close(logits, kept["unmerged"][1], atol=1e-4, rtol=1e-4)
    original = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert not torch.equal(logits, original(torch.arange(2, 20)[None]).logits)

    backbone = Backbone.load(out, dtype=torch.float32, device=torch.device("cpu"))
    heads = load_heads(out / "heads", backbone.lm_head_weight)
    assert heads(hidden[0]).shape == (18, 3, 40)
    config = json.loads((out / "heads" / "config.json").read_text())
    losses = [losses for _, losses in config["training"]["joint"]["held_out_losses"]]
    assert sum(losses[-1][1:]) < sum(losses[0][1:])
    assert f"{losses[-1][0]:.4f} nats" in (out / "README.md").read_text()
    assert (out / "heads" / "report.md").is_file()
    assert "--joint --joint-epochs 2 --joint-rows 256" in (out / "heads" / "README.md").read_text()


def test_the_command_stops_and_goes_on(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command.main(arguments) == 0
    whole = (tmp_path / "out" / "model.safetensors").read_bytes()
    advance = JointTrainer.advance

    def stopped(self: JointTrainer) -> Tensor:
        if self.step == 2:
            raise KeyboardInterrupt
        losses = advance(self)
        self.save(tmp_path / "again.work" / "joint.pt")
        return losses

    again = [*arguments, "--output", str(tmp_path / "again")]
    with monkeypatch.context() as patched:
        patched.setattr(JointTrainer, "advance", stopped)
        assert command.main(again) == 130
    assert command.main([*again, "--resume"]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--design", "sequential"], "--joint is for --design resblock"),
        (["--quantization", "int8"], "--joint is for --design resblock"),
    ],
)
def test_what_medusa_2_is_not_is_refused(
    arguments: list[str], change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([*arguments, *change]) == 2
    assert message in capsys.readouterr().err


def test_joint_settings_without_joint_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([word for word in arguments if word != "--joint"]) == 2
    assert "are for --joint" in capsys.readouterr().err


def test_one_epoch_of_one_model_is_one_model() -> None:
    """The order of a run depends on the seed alone."""
    first, second, other = trainer(), trainer(), trainer(replace(RECIPE, seed=4))
    assert first._plan == second._plan != other._plan
