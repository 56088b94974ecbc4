"""Medusa-2 (Cai et al., arXiv 2401.10774, section 2.2): heads and trunk trained together, the heads having been first.

    loss = KL(frozen trunk || trunk) + heads_weight * sum_k head_decay^k * CE(frozen trunk, k places on || head k)

The trunk learns by adapters (`lora`); the frozen trunk is the same model with them switched off. Its distribution
teaches the heads, too, cut to the draft vocabulary as in `distill`. There is no other label: the text only says where.

Invariants:
- the logits of one head are alive at a time, and the trunk's backward pass is one;
- positions are those whose next token counts, as everywhere;
- a run is a function of (model, heads at the start, examples, recipe), whether stopped and resumed or not.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.drafters.resblock import ResBlockHeads
from models.train.data import Example
from models.train.distill import soft_cross_entropy
from models.train.lora import add_lora, merge, switched_off
from models.train.saved import read_state, write_state
from models.train.trunk import TEACHER_RANKS, forward_with_hidden


@dataclass(frozen=True)
class JointRecipe:
    """The paper's for its models that were trained in two stages, but for the size of a step."""

    epochs: int = 1
    lr: float = 5e-4  # of the trunk's adapters
    heads_rate: float = 4.0  # the heads' learning rate by the adapters'
    heads_weight: float = 0.2
    head_decay: float = 0.8
    rank: int = 32
    alpha: float = 16.0
    dropout: float = 0.05
    warmup: int = 40  # steps
    rows: int = 4096  # tokens of a step, padding counted
    seed: int = 0


@dataclass(frozen=True)
class _Batch:
    """Padded sequences [batch, width], and which of their positions have a next token that counts."""

    tokens: Tensor
    teachable: Tensor

    def ahead(self, places: int) -> tuple[Tensor, Tensor]:
        """Two masks [batch, width]: positions that have a teachable one so many places on, and those."""
        here, there = torch.zeros_like(self.teachable), torch.zeros_like(self.teachable)
        there[:, places:] = self.teachable[:, places:]
        here[:, : here.shape[1] - places] = there[:, places:]
        return here, there


class JointTrainer:
    """Trains adapters of `model` and `heads` in place. `finish` merges the adapters into the model."""

    def __init__(self, model: Any, heads: ResBlockHeads, examples: Sequence[Example], recipe: JointRecipe) -> None:
        """Raises TrunkError for a model that cannot be adapted."""
        self.model, self.heads, self.recipe = model, heads, recipe
        self.step = 0
        self.losses: list[tuple[int, list[float]]] = []  # (steps done, held-out losses), whenever they were measured
        self._adapters = add_lora(model, recipe.rank, recipe.alpha, recipe.dropout, recipe.seed)
        self._examples = examples
        self._plan = [batch for epoch in range(recipe.epochs) for batch in _batches(examples, recipe, epoch)]
        self._about = _digest(heads, examples, recipe, list(self._adapters))
        groups = [
            {"params": [p for a in self._adapters.values() for p in (a.a, a.b)], "peak": recipe.lr},
            {"params": list(heads.parameters()), "peak": recipe.lr * recipe.heads_rate},
        ]
        self._optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

    @property
    def num_steps(self) -> int:
        return len(self._plan)

    @property
    def is_done(self) -> bool:
        return self.step >= self.num_steps

    def advance(self) -> Tensor:
        """One step; the losses of its batch, unweighted: the trunk's, then each head's, [1 + heads]."""
        torch.manual_seed(self.recipe.seed * 1_000_003 + self.step)  # dropout: the same when resumed
        self._set_mode(training=True)
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * self._rate()
        self._optimizer.zero_grad()
        batch = self._batch([self._examples[i] for i in self._plan[self.step]])
        losses = self._backward(batch)
        torch.nn.utils.clip_grad_norm_([p for group in self._optimizer.param_groups for p in group["params"]], 1.0)
        self._optimizer.step()
        self.step += 1
        return losses

    @torch.no_grad()
    def measure(self, examples: Sequence[Example]) -> list[float]:
        """Losses of other examples, as `advance` returns them; an example counts by its positions."""
        self._set_mode(training=False)
        lengths = torch.tensor([float(sum(example.counts[1:])) for example in examples])
        losses = torch.stack([self._losses(self._batch([example])).cpu() for example in examples])
        means: list[float] = (lengths / lengths.sum() @ losses).tolist()
        return means

    def finish(self) -> None:
        """Merge the adapters into the model, which is then an ordinary one."""
        merge(self.model, self._adapters)

    def _set_mode(self, *, training: bool) -> None:
        for adapter in self._adapters.values():
            adapter.train(training)  # of dropout; the model itself stays in evaluation mode

    def _rate(self) -> float:
        """Share of the peak: linear warm-up, then a cosine to zero."""
        warm = min(self.recipe.warmup, self.num_steps // 2)
        if self.step < warm:
            return (self.step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (self.step - warm) / max(1, self.num_steps - warm)))

    def _batch(self, examples: Sequence[Example]) -> _Batch:
        width, device = max(len(example.tokens) for example in examples), self.model.device
        tokens = [[*example.tokens, *[0] * (width - len(example.tokens))] for example in examples]
        counts = [[*example.counts[1:], *[False] * (width - len(example.tokens) + 1)] for example in examples]
        return _Batch(torch.tensor(tokens, device=device), torch.tensor(counts, device=device))

    def _teacher(self, batch: _Batch) -> Tensor:
        """The frozen trunk's log-probabilities: [batch, width, vocab]."""
        with switched_off(list(self._adapters.values())), torch.no_grad():
            return forward_with_hidden(self.model, batch.tokens)[1].float().log_softmax(-1)

    def _backward(self, batch: _Batch) -> Tensor:
        teacher = self._teacher(batch)
        hidden, logits = forward_with_hidden(self.model, batch.tokens, self.heads.inner_layers)
        seen = hidden.detach().float().requires_grad_()
        head_losses = [self._head_backward(head, seen, batch, teacher) for head in range(self.heads.num_heads)]
        loss = _divergence(teacher, logits, batch)
        by_heads = torch.zeros_like(seen) if seen.grad is None else seen.grad
        torch.autograd.backward([loss, hidden], [torch.ones_like(loss), by_heads.to(hidden.dtype)])
        return torch.stack([loss.detach(), *head_losses])

    def _losses(self, batch: _Batch) -> Tensor:
        teacher = self._teacher(batch)
        hidden, logits = forward_with_hidden(self.model, batch.tokens, self.heads.inner_layers)
        heads = [self._head_loss(head, hidden.float(), batch, teacher)[0] for head in range(self.heads.num_heads)]
        return torch.stack([_divergence(teacher, logits, batch), *heads])

    def _head_backward(self, head: int, seen: Tensor, batch: _Batch, teacher: Tensor) -> Tensor:
        loss, states, by_state = self._head_loss(head, seen, batch, teacher)
        weight = self.recipe.heads_weight * self.recipe.head_decay ** (head + 1)
        torch.autograd.backward(states, by_state * weight)
        return loss

    def _head_loss(self, head: int, hidden: Tensor, batch: _Batch, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean loss of one head, its states [rows, hidden], and the gradient of the loss by them."""
        here, there = batch.ahead(head + 1)
        states = self.heads.state_of(head, hidden[here])
        best = teacher[there].topk(min(TEACHER_RANKS, teacher.shape[-1]), dim=-1)
        ids, known = self._in_draft_vocabulary(best.indices)
        probs = best.values.exp() * known
        loss, by_state = soft_cross_entropy(states.detach(), self.heads.lm_head, ids, probs)
        count = max(len(states), 1)
        return loss.detach() / count, states, by_state / count

    def _in_draft_vocabulary(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Indices in the draft vocabulary, and whether a token has one."""
        places = torch.searchsorted(self.heads.token_ids, ids).clamp(max=len(self.heads.token_ids) - 1)
        return places, self.heads.token_ids[places] == ids

    def save(self, path: Path) -> None:
        """All that `load` needs; replaced in one move."""
        state = {
            "adapters": {name: (adapter.a.data, adapter.b.data) for name, adapter in self._adapters.items()},
            "heads": self.heads.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "step": self.step,
            "losses": self.losses,
        }
        write_state(path, self._about, state)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Go on where `save` was called. Raises ResumeError if the file is broken or of another run."""
        state = read_state(path, self._about, self.model.device)
        for name, (a, b) in state["adapters"].items():
            self._adapters[name].a.copy_(a)
            self._adapters[name].b.copy_(b)
        self.heads.load_state_dict(state["heads"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.losses = [(step, losses) for step, losses in state["losses"]]


def _divergence(teacher: Tensor, logits: Tensor, batch: _Batch) -> Tensor:
    """Mean KL(teacher || trunk) in nats over the teachable positions."""
    wanted = teacher[batch.teachable]  # [rows, vocab]
    said = logits[batch.teachable].float().log_softmax(-1)
    return (wanted.exp() * (wanted - said)).sum() / max(len(wanted), 1)


def _batches(examples: Sequence[Example], recipe: JointRecipe, epoch: int) -> list[list[int]]:
    """Example numbers in random groups of at most `rows` tokens, padding counted."""
    batches: list[list[int]] = []
    width = 0
    for i in np.random.default_rng((recipe.seed, epoch)).permutation(len(examples)).tolist():
        width = max(width, len(examples[i].tokens))
        if not batches or (len(batches[-1]) + 1) * width > recipe.rows:
            batches.append([])
            width = len(examples[i].tokens)
        batches[-1].append(i)
    return batches


def _digest(heads: ResBlockHeads, examples: Sequence[Example], recipe: JointRecipe, layers: list[str]) -> str:
    """Of what decides the result, the model's weights aside: the heads were made from them."""
    digest = hashlib.blake2b(repr((recipe, layers)).encode(), digest_size=16)
    for tensor in chain(heads.state_dict().values(), [heads.token_ids]):
        digest.update(tensor.float().cpu().numpy().tobytes())
    for example in examples:
        digest.update(np.array([example.tokens, example.counts], dtype=np.int64).tobytes() + b"|")
    return digest.hexdigest()
