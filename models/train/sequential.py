"""Distillation into a sequential drafter: whole texts, unrolled over the depths that it will be served at.

Depth j at row p learns the model's own distribution of the token behind `tokens[p]`, as `distill` has it, with the loss
of depth j counted `head_decay ** (j - 1)`. Tokens are the text's, states the drafter's own from depth 2 on.

Invariants: as in `models.train.distill`; texts of like length share a batch, which bounds padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.drafters.sequential import SequentialHeads
from models.train.acceptance import MISSING, NUM_RANKS, Text, runs
from models.train.distill import Distiller, Recipe, soft_cross_entropy
from models.train.trunk import TrunkCache
from models.train.unroll import unroll

POOL = 64  # batches whose texts are sorted by length together


@dataclass(frozen=True)
class Texts:
    """Examples of one batch, padded on the right. Row p stands at position p + 1: it sees the state of position p."""

    tokens: Tensor  # [batch, rows]
    states: Tensor  # [batch, rows, hidden]
    positions: NDArray[np.int64]  # [batch, rows] in the cache, -1 for padding


class SequentialDistiller(Distiller[SequentialHeads]):
    """Trains a sequential drafter in place; `recipe.batch_size` counts rows, padding included."""

    def __init__(self, heads: SequentialHeads, cache: TrunkCache, training: NDArray[np.bool_], recipe: Recipe) -> None:
        super().__init__(heads, cache, training, recipe)
        self._examples = np.unique(self._example[self._positions])
        self._learns = np.zeros(len(self._example), dtype=np.bool_)
        self._learns[self._positions] = True
        self._plan: tuple[int, list[NDArray[np.int64]]] = (-1, [])

    @property
    def batches_per_epoch(self) -> int:
        return len(self._batches_of(self.position.epoch))

    def _batches_of(self, epoch: int) -> list[NDArray[np.int64]]:
        """Example numbers of each batch."""
        if self._plan[0] != epoch:
            rng = np.random.default_rng((self.recipe.seed, epoch))
            order = rng.permutation(self._examples)
            batches = [batch for pool in self._pools(order) for batch in self._cut(pool)]
            self._plan = epoch, [batches[i] for i in rng.permutation(len(batches))]
        return self._plan[1]

    def _pools(self, order: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        lengths = self._lengths(order)
        pool = np.cumsum(lengths) // (POOL * self.recipe.batch_size)
        for number in np.unique(pool):
            yield order[pool == number]

    def _lengths(self, examples: NDArray[np.int64]) -> NDArray[np.int64]:
        starts = self._cache.starts
        return starts[examples + 1] - starts[examples]

    def _cut(self, pool: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Examples of like length, at most `batch_size` padded rows together."""
        pool = pool[np.argsort(self._lengths(pool), kind="stable")]
        lengths, begin = self._lengths(pool), 0
        for end in range(1, len(pool) + 1):
            if end == len(pool) or (end + 1 - begin) * lengths[end] > self.recipe.batch_size:
                yield pool[begin:end]
                begin = end

    def _batches(self) -> Iterator[NDArray[np.int64]]:
        yield from self._batches_of(self.position.epoch)[self.position.batch :]

    def _step(self, batch: NDArray[np.int64]) -> float:
        self._set_learning_rate()
        texts = gather(self._cache, batch, self.heads.device)
        with self._autocast():
            states = unroll(self.heads, texts.tokens, texts.states, self.heads.num_heads)
        total, gradients = 0.0, []
        for depth, state in enumerate(states):
            loss, gradient = self._loss(state.detach(), texts.positions, depth)
            total += loss
            gradients.append(gradient)
        self._optimizer.zero_grad()
        torch.autograd.backward(states, gradients)
        torch.nn.utils.clip_grad_norm_(self.heads.parameters(), 1.0)
        self._optimizer.step()
        return total

    def _loss(self, states: Tensor, positions: NDArray[np.int64], depth: int) -> tuple[float, Tensor]:
        """The weighted loss of one depth, and its gradient by all states [batch, rows, hidden]."""
        useful = (positions >= 0) & self._teachable[positions]
        useful[:, :depth] = False
        chosen = torch.from_numpy(np.flatnonzero(useful)).to(states.device)
        ids, probs = self._teacher_at(positions[useful])
        weight = self.recipe.head_decay**depth / max(len(chosen), 1)
        flat = states.flatten(0, 1)
        loss, by_state = soft_cross_entropy(flat[chosen], self.heads.lm_head, ids, probs)
        gradient = torch.zeros_like(flat)
        gradient[chosen] = by_state * weight
        return float(loss) * weight, gradient.view_as(states)


def gather(cache: TrunkCache, examples: NDArray[np.int64], device: torch.device) -> Texts:
    """Pad these examples to one rectangle."""
    starts, lengths = cache.starts[examples], cache.starts[examples + 1] - cache.starts[examples]
    offsets = np.arange(1, max(int(lengths.max()), 2))
    is_row = offsets[None] < lengths[:, None]
    positions = np.where(is_row, starts[:, None] + offsets, -1)
    tokens = torch.from_numpy(np.where(is_row, cache.tokens[positions], 0)).to(device)
    states = torch.from_numpy(cache.hidden[np.where(is_row, positions - 1, starts[:, None])]).to(device)
    return Texts(tokens, states.float(), positions)


@torch.inference_mode()
def rank_sequential(
    heads: SequentialHeads, hidden: Tensor, tokens: NDArray[np.int64], counts: NDArray[np.bool_]
) -> list[Text]:
    """As `acceptance.rank_text`, but ranks are given that the tokens before were guessed right."""
    following = torch.from_numpy(tokens[1:])[None].to(heads.device)
    states = unroll(heads, following, hidden[None, :-1].to(heads.input.weight), heads.num_heads)
    best = [_best(heads, state[0]) for state in states]
    return [_text(best, tokens, begin, end) for begin, end in runs(counts)]


def _best(heads: SequentialHeads, states: Tensor) -> NDArray[np.int64]:
    """[rows, hidden] -> the likeliest tokens, [rows, ranks]."""
    logits = states.to(heads.lm_head.dtype) @ heads.lm_head.T
    found: NDArray[np.int64] = heads.token_ids[logits.topk(min(NUM_RANKS, logits.shape[1])).indices].cpu().numpy()
    return found


def _text(best: list[NDArray[np.int64]], tokens: NDArray[np.int64], begin: int, end: int) -> Text:
    """Ranks in the answer tokens[begin:end]. A draft from position t has the root t + 1 and guesses t + 2 first."""
    first = max(begin - 1, 0)
    ranks = np.full((end - 1 - first, len(best)), MISSING)
    known = np.zeros(ranks.shape, dtype=np.bool_)
    for depth, guesses in enumerate(best):
        wanted = tokens[first + 2 + depth : end]
        hits = guesses[first + depth : first + depth + len(wanted)] == wanted[:, None]  # row p stands at p + 1
        ranks[: len(wanted), depth] = np.where(hits.any(1), hits.argmax(1), MISSING)
        known[: len(wanted), depth] = True
    return Text(ranks, known)
