"""The loss against autograd, the choice of teachers against a loop, and training: resumable, best epoch kept."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.drafters.resblock import ResBlockHeads
from models.train import distill
from models.train.distill import (
    Recipe,
    ResBlockDistiller,
    computes_in_bfloat16,
    draft_vocabulary,
    soft_cross_entropy,
    teachable,
)
from models.train.saved import ResumeError
from models.train.trunk import TrunkCache

HIDDEN, VOCAB, RANKS, HEADS = 16, 40, 8, 3
LENGTHS = (30, 2, 17, 40)


@pytest.fixture
def cache() -> TrunkCache:
    """A teacher whose distributions follow from the state, so that there is something to learn."""
    draw = np.random.default_rng(0)
    total = sum(LENGTHS)
    hidden = draw.standard_normal((total, HIDDEN)).astype(np.float16)
    logits = torch.from_numpy(hidden.astype(np.float32) @ draw.standard_normal((HIDDEN, VOCAB)).astype(np.float32))
    best = logits.softmax(-1).topk(RANKS)
    return TrunkCache(
        tokens=draw.integers(VOCAB, size=total),
        counts=draw.random(total) < 0.8,
        starts=np.cumsum([0, *LENGTHS]),
        hidden=hidden,
        teacher_ids=best.indices.numpy().astype(np.int32),
        teacher_probs=best.values.numpy().astype(np.float16),
    )


@pytest.fixture
def distiller(cache: TrunkCache) -> Callable[..., ResBlockDistiller]:
    def build(**recipe: float) -> ResBlockDistiller:
        lm_head = torch.randn(VOCAB - 1, HIDDEN, generator=torch.Generator().manual_seed(3))
        heads = ResBlockHeads(lm_head, num_heads=HEADS, token_ids=torch.arange(1, VOCAB))
        settings = {"epochs": 3, "batch_size": 16, "lr": 5e-3} | recipe
        return ResBlockDistiller(heads, cache, np.array([True, True, False, True]), Recipe(**settings))

    return build


def test_loss_and_gradient_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    lm_head, states = torch.randn(VOCAB, HIDDEN), torch.randn(5, HIDDEN, requires_grad=True)
    ids = torch.stack([torch.randperm(VOCAB)[:RANKS] for _ in range(5)])
    probs = torch.rand(5, RANKS) / RANKS
    wanted = -(probs * torch.log_softmax(states @ lm_head.T, -1).gather(1, ids)).sum()
    wanted.backward()
    loss, gradient = soft_cross_entropy(states.detach(), lm_head, ids, probs)
    torch.testing.assert_close(loss, wanted.detach())
    torch.testing.assert_close(gradient, states.grad)


def test_tokens_outside_the_draft_vocabulary_share_an_index_without_weight() -> None:
    lm_head, states = torch.randn(VOCAB, HIDDEN), torch.randn(1, HIDDEN)
    kept = soft_cross_entropy(states, lm_head, torch.tensor([[5]]), torch.tensor([[0.5]]))
    padded = soft_cross_entropy(states, lm_head, torch.tensor([[5, 0, 0]]), torch.tensor([[0.5, 0.0, 0.0]]))
    torch.testing.assert_close(kept, padded)


def test_teachable_positions_come_right_before_counted_tokens(cache: TrunkCache) -> None:
    expected = [
        start + i + 1 < end and bool(cache.counts[start + i + 1])
        for start, end in zip(cache.starts[:-1], cache.starts[1:], strict=True)
        for i in range(end - start)
    ]
    assert teachable(cache).tolist() == expected


def test_draft_vocabulary_is_the_most_expected_and_the_end(cache: TrunkCache) -> None:
    positions = np.ones(len(cache.tokens), dtype=bool)
    expected = np.zeros(VOCAB)
    np.add.at(expected, cache.teacher_ids, cache.teacher_probs.astype(np.float64))
    end = int(expected.argmin())
    chosen = draft_vocabulary(cache, positions, VOCAB, 10, [end]).tolist()
    assert set(chosen) == {end, *np.argsort(-expected)[:9].tolist()}
    assert chosen == sorted(chosen)
    assert draft_vocabulary(cache, positions, VOCAB, 0, [end]).tolist() == list(range(VOCAB))


def test_loss_of_a_first_batch_equals_a_loop_over_positions(
    cache: TrunkCache, distiller: Callable[..., ResBlockDistiller]
) -> None:
    whole = distiller(batch_size=1000, epochs=1)
    heads = whole.heads
    total = 0.0
    for head in range(HEADS):
        losses = []
        for start, end in (r for i, r in enumerate(zip(cache.starts[:-1], cache.starts[1:], strict=True)) if i != 2):
            for t in range(start, end):
                there = t + head + 1
                if there + 1 < end and cache.counts[there + 1]:
                    q = heads(torch.from_numpy(cache.hidden[t]).float()[None])[0, head].detach().log_softmax(-1)
                    teacher = zip(cache.teacher_ids[there], cache.teacher_probs[there], strict=True)
                    losses.append(-sum(float(p) * float(q[v - 1]) for v, p in teacher if v > 0))
        total += 0.8 ** (head + 1) * float(np.mean(losses))
    whole.run(lambda: 0.0)
    assert whole.history.losses[0] == pytest.approx(total, rel=1e-4)


def test_loss_falls(distiller: Callable[..., ResBlockDistiller]) -> None:
    trained = distiller(epochs=40)
    trained.run(lambda: 0.0)
    assert trained.history.losses[-1] < 0.8 * trained.history.losses[0]
    assert trained.finished


def test_the_best_epoch_is_kept(distiller: Callable[..., ResBlockDistiller]) -> None:
    trained = distiller(epochs=4)
    seen = []

    def score() -> float:
        seen.append(trained.heads.weight.detach().clone())
        return [1.0, 3.0, 2.0, 2.5][len(seen) - 1]

    trained.run(score)
    assert torch.equal(trained.heads.weight, seen[1])
    assert not torch.equal(seen[1], seen[3])


def test_training_ends_when_patience_is_lost(distiller: Callable[..., ResBlockDistiller]) -> None:
    trained = distiller(epochs=9, patience=2)
    scores = iter([1.0, 3.0, 2.0, 4.0, 4.0, 3.5, 9.0])
    trained.run(lambda: next(scores))
    assert trained.history.scores == [1.0, 3.0, 2.0, 4.0, 4.0, 3.5]
    assert trained.history.best == 3
    assert trained.has_lost_patience
    assert trained.finished


def test_evaluations_are_spread_over_the_epoch(distiller: Callable[..., ResBlockDistiller]) -> None:
    trained, once = distiller(epochs=2, evaluations=2), distiller(epochs=2)
    assert trained.batches_per_epoch == 4
    trained.run(lambda: 0.0)
    once.run(lambda: 0.0)
    np.testing.assert_allclose(trained.history.epochs, [0.5, 1, 1.5, 2])
    assert once.history.epochs == [1, 2]
    assert np.mean(trained.history.losses[:2]) == pytest.approx(once.history.losses[0])
    many = distiller(epochs=1, evaluations=100)
    many.run(lambda: 0.0)
    assert len(many.history.scores) == many.batches_per_epoch


def test_a_gpu_computes_in_bfloat16() -> None:
    assert computes_in_bfloat16(torch.device("cuda:1"), torch.float32)
    assert computes_in_bfloat16(torch.device("cpu"), torch.bfloat16)
    assert not computes_in_bfloat16(torch.device("cpu"), torch.float32)


def test_weights_stay_in_float32_when_products_are_in_bfloat16(
    distiller: Callable[..., ResBlockDistiller], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, rough = distiller(epochs=2), distiller(epochs=2)
    exact.run(lambda: 0.0)
    monkeypatch.setattr(distill, "computes_in_bfloat16", lambda *_: True)
    rough.run(lambda: 0.0)
    assert rough.heads.weight.dtype == torch.float32
    assert rough.history.losses != exact.history.losses
    assert rough.history.losses == pytest.approx(exact.history.losses, rel=0.01)


@pytest.mark.parametrize("stop_after", [1, 3, 4, 7])
@pytest.mark.parametrize("recipe", [{}, {"evaluations": 4, "patience": 7}])
def test_a_resumed_run_equals_an_uninterrupted_one(
    distiller: Callable[..., ResBlockDistiller], tmp_path: Path, stop_after: int, recipe: dict[str, float]
) -> None:
    whole = distiller(**recipe)
    whole.run(lambda: float(whole.heads.weight.detach().sum()))

    first, second = distiller(**recipe), distiller(**recipe)
    calls = iter(range(1000))

    def stop() -> None:
        if next(calls) == stop_after:
            first.save(tmp_path / "state.pt")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(lambda: float(first.heads.weight.detach().sum()), stop)
    second.load(tmp_path / "state.pt")
    second.run(lambda: float(second.heads.weight.detach().sum()))
    assert torch.equal(second.heads.weight, whole.heads.weight)
    assert torch.equal(second.heads.bias, whole.heads.bias)
    assert second.history == whole.history


def test_a_finished_run_resumes_to_the_same_heads(distiller: Callable[..., ResBlockDistiller], tmp_path: Path) -> None:
    first, second = distiller(), distiller()
    first.run(lambda: 1.0, lambda: first.save(tmp_path / "state.pt"))
    second.load(tmp_path / "state.pt")
    second.run(lambda: pytest.fail("nothing is left to train"))
    assert torch.equal(first.heads.weight, second.heads.weight)


def test_other_settings_do_not_resume(distiller: Callable[..., ResBlockDistiller], tmp_path: Path) -> None:
    distiller().save(tmp_path / "state.pt")
    distiller().load(tmp_path / "state.pt")
    with pytest.raises(ResumeError, match="other settings or data; start anew without --resume"):
        distiller(lr=1e-3).load(tmp_path / "state.pt")


def _other_text(cache: TrunkCache) -> TrunkCache:
    return replace(cache, tokens=(cache.tokens + 1) % VOCAB)


def _other_model(cache: TrunkCache) -> TrunkCache:
    return replace(cache, teacher_ids=cache.teacher_ids[:, ::-1])


def _all_positions(cache: TrunkCache) -> TrunkCache:
    return replace(cache, counts=np.ones_like(cache.counts))


@pytest.mark.parametrize("change", [_other_text, _other_model, _all_positions])
def test_other_data_does_not_resume(
    cache: TrunkCache,
    distiller: Callable[..., ResBlockDistiller],
    tmp_path: Path,
    change: Callable[[TrunkCache], TrunkCache],
) -> None:
    first = distiller()
    first.save(tmp_path / "state.pt")
    second = ResBlockDistiller(first.heads, change(cache), np.array([True, True, False, True]), first.recipe)
    with pytest.raises(ResumeError, match="other settings or data"):
        second.load(tmp_path / "state.pt")


def test_another_split_does_not_resume(
    cache: TrunkCache, distiller: Callable[..., ResBlockDistiller], tmp_path: Path
) -> None:
    first = distiller()
    first.save(tmp_path / "state.pt")
    second = ResBlockDistiller(first.heads, cache, np.array([True, True, True, False]), first.recipe)
    with pytest.raises(ResumeError, match="other settings or data"):
        second.load(tmp_path / "state.pt")


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "foreign"])
def test_a_broken_state_is_refused(distiller: Callable[..., ResBlockDistiller], tmp_path: Path, damage: str) -> None:
    path = tmp_path / "state.pt"
    distiller().save(path)
    whole = path.read_bytes()
    torch.save([1, 2], tmp_path / "foreign.pt")
    foreign = (tmp_path / "foreign.pt").read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"xx", "foreign": foreign}[damage])
    with pytest.raises(ResumeError, match=r"no saved state that can be read; start anew without --resume"):
        distiller().load(path)
