"""Distillation of the frozen trunk into ResBlock heads, from a `TrunkCache`.

Head k sees the state at position t and learns the model's own distribution at t + k, that is, of token t + k + 1. The
teacher is cut to the draft vocabulary and *not* renormalised: a position counts by the probability mass that the draft
vocabulary covers there. The optimum is then q(v) proportional to E[p(v) | state], the ranking that is accepted most
often; renormalising would give positions whose mass lies elsewhere a say that they cannot use.

Invariants:
- the logits of one head are alive at a time (Gloeckle et al., arXiv 2404.19737, section 2);
- batches are a function of (seed, epoch), so a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.drafters.resblock import ResBlockHeads
from models.drafters.sequential import SequentialHeads
from models.train.saved import read_state, write_state
from models.train.trunk import TrunkCache

H = TypeVar("H", ResBlockHeads, SequentialHeads)


@dataclass(frozen=True)
class Recipe:
    """What decides the result, besides the text."""

    epochs: int = 6
    batch_size: int = 512
    lr: float = 2e-3
    head_decay: float = 0.8  # head k's loss counts head_decay ** k
    seed: int = 0
    evaluations: int = 1  # on held-out text in each epoch, at equal distances; the last at its end
    patience: int = 0  # evaluations without a better score before training ends; 0: it runs to the end


@dataclass
class Position:
    """How far training is: `batch` batches of `epoch` are done."""

    epoch: int = 0
    batch: int = 0


@dataclass
class History:
    """One entry per evaluation."""

    losses: list[float] = field(default_factory=list)  # mean weighted loss since the one before
    scores: list[float] = field(default_factory=list)  # held-out score, greater is better
    epochs: list[float] = field(default_factory=list)  # how far training was

    @property
    def best(self) -> int:
        """The first evaluation that none is better than; 0 if there was none yet."""
        return self.scores.index(max(self.scores)) if self.scores else 0


def draft_vocabulary(
    cache: TrunkCache, positions: NDArray[np.bool_], vocab_size: int, size: int, ends: Sequence[int]
) -> Tensor:
    """The `size` tokens (0: all) that the model expects most at these positions, end tokens included; ids ascending.

    Expected counts, sums of the model's probabilities, rank rare tokens better than counts of the text do.
    """
    if not 0 < size < vocab_size:
        return torch.arange(vocab_size)
    probs = cache.teacher_probs[positions].astype(np.float64)
    expected = np.bincount(cache.teacher_ids[positions].ravel(), weights=probs.ravel(), minlength=vocab_size)
    expected[list(ends)] = np.inf
    return torch.from_numpy(np.sort(np.argsort(-expected, kind="stable")[:size]))


def teachable(cache: TrunkCache) -> NDArray[np.bool_]:
    """Positions whose next token, in the same example, is one to guess: [positions]."""
    result = np.zeros_like(cache.counts)
    result[:-1] = cache.counts[1:]
    result[cache.starts[1:] - 1] = False
    return result


def soft_cross_entropy(states: Tensor, lm_head: Tensor, ids: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over the batch of -sum_i probs_i log softmax(lm_head state)[ids_i], and its gradient by `states`.

    states: [batch, hidden], lm_head: [draft_vocab, hidden], ids and probs: [batch, ranks]. Probabilities may add up to
    less than 1. The gradient is written down, not traced: the only large tensor is one [batch, draft_vocab].
    """
    q = torch.softmax(states.to(lm_head.dtype) @ lm_head.T, dim=-1)  # [batch, draft_vocab]
    loss = -(probs * q.gather(1, ids).float().clamp_min(1e-30).log()).sum()
    q.mul_(probs.sum(1, keepdim=True).to(q.dtype)).scatter_add_(1, ids, -probs.to(q.dtype))
    return loss, (q @ lm_head).to(states.dtype)


def computes_in_bfloat16(device: torch.device, lm_head_dtype: torch.dtype) -> bool:
    """On a GPU always, where it is several times faster; on a CPU if the operator chose it for the LM head."""
    return device.type == "cuda" or lm_head_dtype == torch.bfloat16


class Distiller(ABC, Generic[H]):
    """Trains `heads` in place on the examples of `cache` that `training` (a mask over examples) selects."""

    def __init__(self, heads: H, cache: TrunkCache, training: NDArray[np.bool_], recipe: Recipe) -> None:
        self.heads: H = heads
        self.recipe = recipe
        self.position = Position()
        self.history = History()
        self.best: dict[str, Tensor] = {}
        self._cache = cache
        self._device = heads.token_ids.device
        self._example = np.repeat(np.arange(len(cache.starts) - 1), np.diff(cache.starts))  # [positions]
        self._teachable = teachable(cache)
        self._positions = np.flatnonzero(self._useful() & training[self._example])
        self._draft_index = self._invert(heads.token_ids.cpu().numpy(), int(cache.teacher_ids.max()) + 1)
        self._loss_sum, self._num_summed = 0.0, 0  # since the last evaluation
        self._beginning = [value.double().sum().item() for value in heads.state_dict().values()]
        self._optimizer = torch.optim.AdamW(heads.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.0)

    @property
    def num_positions(self) -> int:
        return len(self._positions)

    @property
    def finished(self) -> bool:
        return self.position.epoch >= self.recipe.epochs or self.has_lost_patience

    @property
    def has_lost_patience(self) -> bool:
        """Whether the last `patience` evaluations were no better than the best one before."""
        scores = self.history.scores
        return 0 < self.recipe.patience < len(scores) - self.history.best

    def run(self, score: Callable[[], float], on_batch: Callable[[], None] = lambda: None) -> None:
        """Train to the end and put the best evaluation's weights back. `score` rates the heads as they are.

        `on_batch` is called after each batch, when the state is whole and may be saved.
        """
        while not self.finished:
            for batch in self._batches():
                self._loss_sum += self._step(batch)
                self._num_summed += 1
                self.position.batch += 1
                if self._is_due():
                    self._evaluate(score())
                on_batch()
                if self.finished:
                    break
        self.heads.load_state_dict(self.best)

    def _is_due(self) -> bool:
        """Whether the batches that are done are a whole number of the epoch's parts between evaluations."""
        total, parts = self.batches_per_epoch, min(self.recipe.evaluations, self.batches_per_epoch)
        return self.position.batch * parts // total > (self.position.batch - 1) * parts // total

    def _evaluate(self, score: float) -> None:
        if score > max(self.history.scores, default=-math.inf):
            self.best = {name: value.clone() for name, value in self.heads.state_dict().items()}
        self.history.scores.append(score)
        self.history.losses.append(self._loss_sum / self._num_summed)
        self.history.epochs.append(self.position.epoch + self.position.batch / self.batches_per_epoch)
        self._loss_sum, self._num_summed = 0.0, 0
        if self.position.batch == self.batches_per_epoch:
            self.position = Position(self.position.epoch + 1, 0)

    def _autocast(self) -> torch.autocast:
        """For the heads' own products; weights and optimizer stay in float32."""
        is_enabled = computes_in_bfloat16(self._device, self.heads.lm_head.dtype)
        return torch.autocast(self._device.type, torch.bfloat16, enabled=is_enabled)

    @property
    @abstractmethod
    def batches_per_epoch(self) -> int:
        """Batches of the epoch at `position`."""

    @abstractmethod
    def _batches(self) -> Iterator[NDArray[np.int64]]:
        """Those of the epoch that are left, a function of (seed, epoch)."""

    @abstractmethod
    def _step(self, batch: NDArray[np.int64]) -> float:
        """Learn from one batch; the loss."""

    def _teacher_at(self, positions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """What the model says at these positions: draft indices and probabilities, [positions, ranks] each."""
        ids = self._draft_index[self._cache.teacher_ids[positions]]
        probs = np.where(ids >= 0, self._cache.teacher_probs[positions].astype(np.float32), 0.0)
        return torch.from_numpy(np.maximum(ids, 0)).to(self._device), torch.from_numpy(probs).to(self._device)

    def _useful(self) -> NDArray[np.bool_]:
        """Positions from which at least one head has something to guess."""
        useful = np.zeros_like(self._teachable)
        for ahead in range(1, self.heads.num_heads + 1):
            useful[:-ahead] |= self._teachable[ahead:] & (self._example[ahead:] == self._example[:-ahead])
        return useful

    def _set_learning_rate(self) -> None:
        """Cosine to zero after a warm-up of 2 % of all batches."""
        per_epoch = self.batches_per_epoch
        total = self.recipe.epochs * per_epoch
        done = self.position.epoch * per_epoch + self.position.batch
        warm = min(1.0, (done + 1) / max(1, total // 50))
        rate = self.recipe.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, done / total)))
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    @staticmethod
    def _invert(token_ids: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        """Token id -> index in the draft vocabulary, -1 where it has none."""
        index = np.full(max(size, int(token_ids.max()) + 1), -1, dtype=np.int64)
        index[token_ids] = np.arange(len(token_ids))
        return index

    def save(self, path: Path) -> None:
        """Everything that `load` needs to go on; replaced in one move, so an interruption leaves the old file whole."""
        state = {
            "heads": self.heads.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "position": asdict(self.position),
            "history": asdict(self.history),
            "best": self.best,
            "loss_sum": (self._loss_sum, self._num_summed),
        }
        write_state(path, self._run_digest(), state)

    def load(self, path: Path) -> None:
        """Go on where `save` was called. Raises ResumeError if the file is broken or of another run."""
        state = read_state(path, self._run_digest(), self._device)
        self.heads.load_state_dict(state["heads"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.position = Position(**state["position"])
        self.history = History(**state["history"])
        self.best = state["best"]
        self._loss_sum, self._num_summed = state["loss_sum"]

    def _run_digest(self) -> str:
        """Of what decides the result: settings, shapes, draft vocabulary, text, what counts, what the model says."""
        tensors = [(name, value.shape, value.dtype) for name, value in self.heads.state_dict().items()]
        digest = hashlib.blake2b(
            repr((self.recipe, self.heads.lm_head.dtype, tensors, self._beginning)).encode(), digest_size=16
        )
        decisive: tuple[NDArray[Any], ...] = (self.heads.token_ids.cpu().numpy(), self._positions, self._teachable)
        for array in (*decisive, self._cache.starts, self._cache.tokens, self._cache.teacher_ids[:, 0]):
            digest.update(f"{array.shape}".encode() + array.tobytes())
        return digest.hexdigest()


class ResBlockDistiller(Distiller[ResBlockHeads]):
    """Batches are positions, whatever text they are from."""

    @property
    def batches_per_epoch(self) -> int:
        return math.ceil(len(self._positions) / self.recipe.batch_size)

    def _batches(self) -> Iterator[NDArray[np.int64]]:
        order = np.random.default_rng((self.recipe.seed, self.position.epoch)).permutation(self._positions)
        size = self.recipe.batch_size
        for number in range(self.position.batch, self.batches_per_epoch):
            yield np.sort(order[number * size : (number + 1) * size])

    def _step(self, batch: NDArray[np.int64]) -> float:
        self._set_learning_rate()
        hidden = torch.from_numpy(self._cache.hidden[batch]).to(self._device, self.heads.weight.dtype)
        with self._autocast():
            states = self.heads.states(hidden).float()  # [heads, batch, hidden]
        gradient = torch.zeros_like(states)
        total = 0.0
        for head in range(self.heads.num_heads):
            rows, ids, probs = self._teacher(batch, head + 1)
            weight = self.recipe.head_decay ** (head + 1) / max(len(rows), 1)
            loss, by_state = soft_cross_entropy(states[head, rows].detach(), self.heads.lm_head, ids, probs)
            gradient[head, rows] = by_state * weight
            total += float(loss) * weight
        self._optimizer.zero_grad()
        torch.autograd.backward(states, gradient)
        torch.nn.utils.clip_grad_norm_(self.heads.parameters(), 1.0)
        self._optimizer.step()
        return total

    def _teacher(self, batch: NDArray[np.int64], ahead: int) -> tuple[Tensor, Tensor, Tensor]:
        """Batch rows that have a teacher `ahead` positions on, and its draft indices and probabilities there."""
        there = np.minimum(batch + ahead, len(self._example) - 1)
        known = self._teachable[there] & (self._example[there] == self._example[batch]) & (there == batch + ahead)
        return torch.from_numpy(np.flatnonzero(known)).to(self._device), *self._teacher_at(there[known])
