"""Drafting with a sequential drafter: what it remembers of each request, and how its trees grow.

Its layer's K and V lie in a pool of its own at the slots of the model's pool, so that requests which share a prefix
share them too. What belongs to guesses, and to the root, lies behind those slots, and only until the next draft.

Invariants:
- a slot's K and V are used only if they were computed since the model wrote to the slot;
- a request's tree is a function of its tokens and of what of them is remembered; no text depends on it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.batch import Batch, Segment, build_batch
from models.drafters.growth import ROOT, Growth
from models.drafters.medusa import DraftRow
from models.drafters.resblock import DEFAULT_ACCURACIES
from models.drafters.sequential import SequentialHeads
from models.kv_pool import KVPool
from models.sampling import gumbel_from_keys, noise_key
from models.tree import Guess

CONTEXT: Final = 512  # positions that the drafter looks back
NUM_RANKS: Final = 8  # guesses below one node
WIDTH: Final = 4  # nodes opened in one round


class Guesser(Protocol):
    """Runs the layer."""

    def guess(self, tokens: Tensor, states: Tensor, batch: Batch, pool: KVPool, rows: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [n], the states before them [n, hidden] -> of `rows`: logits [.., at least draft_vocab], states."""

    def best(self, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """[n, at least draft_vocab] -> the `count` best and their shares of the softmax, [n, count]."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to be guessed for."""

    request: str
    text: Sequence[int]  # prompt + output; the last token is the root
    slots: array[int]  # of the tokens before the root
    row: DraftRow
    num_nodes: int
    max_depth: int


@dataclass(slots=True)
class Memory:
    """States of a request's latest positions, one after another, that no K and V were made of."""

    end: int = 0  # behind the last position
    parts: list[Tensor] = field(default_factory=list)  # [n, hidden]
    count: int = 0

    def add(self, start: int, states: Tensor) -> None:
        if start != self.end:
            self.parts.clear()
            self.count = 0
        self.parts.append(states)
        self.count += len(states)
        self.end = start + len(states)
        while self.count - len(self.parts[0]) >= CONTEXT:
            self.count -= len(self.parts.pop(0))


@dataclass(slots=True)
class Branch:
    """What one request's tree is grown from."""

    ask: Ask
    growth: Growth
    context: Tensor  # slots that all nodes look at, the root's the last
    slots: dict[int, tuple[int, ...]] = field(default_factory=dict)  # node -> slots of its path
    states: dict[int, Tensor] = field(default_factory=dict)  # node -> [hidden], once opened


class SequentialDrafter:
    """All requests' drafts, each round in one call."""

    def __init__(self, heads: SequentialHeads, guesser: Guesser, pool: KVPool, num_slots: int) -> None:
        """`pool` has one layer, and slots beyond `num_slots` for guesses."""
        self.num_heads, self.accuracies = heads.num_heads, heads.accuracies or DEFAULT_ACCURACIES
        self._token_ids = heads.token_ids
        self._guesser = guesser
        self._pool = pool
        self._num_slots = num_slots
        self._device = heads.device
        self._is_valid: NDArray[np.bool_] = np.zeros(num_slots + 1, dtype=np.bool_)
        self._memories: dict[str, Memory] = {}
        self._next_slot = 0

    def overwrite(self, slots: Sequence[int]) -> None:
        """The model has written to these slots: what lay there is another token's."""
        self._is_valid[slots] = False

    def remember(self, request: str, start: int, states: Tensor) -> None:
        """The model's states at a request's positions from `start` on: [n, hidden]."""
        self._memories.setdefault(request, Memory()).add(start, states)

    def knows(self, request: str, root: int) -> bool:
        """Whether the state before a request's token `root` is remembered, so that what follows it can be guessed."""
        return request in self._memories and self._memories[request].end == root

    def forget(self, request: str) -> None:
        self._memories.pop(request, None)

    def ranked(self, asks: Sequence[Ask]) -> list[tuple[list[int], list[float]]]:
        """The first tokens alone, and their probabilities: for trees that a grammar grows."""
        found = []
        for growth in self._grow(asks, max_rounds=1):
            best = sorted(growth.guesses, key=lambda guess: -guess.value)
            found.append(([guess.token for guess in best], [guess.value for guess in best]))
        return found

    def trees(self, asks: Sequence[Ask]) -> list[list[Guess]]:
        """Guesses of each request, more than were asked for: a draft that `models.tree.merge` takes the best of."""
        return [growth.guesses for growth in self._grow(asks, self.num_heads)]

    def _grow(self, asks: Sequence[Ask], max_rounds: int) -> list[Growth]:
        if not asks:
            return []
        self._next_slot = self._num_slots + 1
        branches = self._plant(asks)
        for _ in range(max_rounds - 1):
            chosen = [(branch, node) for branch in branches for node in branch.growth.next_round(WIDTH)]
            if not chosen or self._next_slot + len(chosen) > len(self._pool.keys[0]):
                break
            self._open(chosen)
        return [branch.growth for branch in branches]

    def _plant(self, asks: Sequence[Ask]) -> list[Branch]:
        """Catch up with each text, and open its root."""
        branches, segments, states = [], [], []
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        last_rows: list[int] = []
        for ask in asks:
            memory, root = self._memories[ask.request], len(ask.text) - 1
            first = root - memory.count + 1  # of the positions to compute: its state before is the oldest one kept
            own = np.array(ask.slots[first:root], dtype=np.int64)
            before = np.array(ask.slots[max(first - CONTEXT, 0) : first], dtype=np.int64)
            context = torch.from_numpy(before[self._is_valid[before]]).to(self._device)
            mine = [*own.tolist(), self._take_slot()]
            self._is_valid[own] = True
            segments.append(Segment(len(mine), context, len(mine), ()))
            tokens += ask.text[first : root + 1]
            positions += range(first, root + 1)
            slots += mine
            states += memory.parts
            last_rows.append(len(tokens) - 1)
            memory.parts, memory.count = [memory.parts[-1][-1:]], 1  # the root's own slot is known only later
            seen = torch.cat([context, torch.tensor(mine, device=self._device)])
            branches.append(Branch(ask, Growth(ask.num_nodes, min(ask.max_depth, self.num_heads)), seen, {ROOT: ()}))
        opened = [(branch, ROOT) for branch in branches]
        self._run(opened, segments, tokens, positions, slots, torch.cat(states), torch.tensor(last_rows))
        return branches

    def _open(self, chosen: Sequence[tuple[Branch, int]]) -> None:
        """Guess what follows these nodes."""
        segments, tokens, positions, slots, states = [], [], [], [], []
        for branch, node in chosen:
            guess = branch.growth.guesses[node]
            above = branch.slots[guess.parent]
            slot = self._take_slot()
            branch.slots[node] = (*above, slot)
            path = torch.tensor(above, dtype=torch.int64, device=self._device)
            segments.append(Segment(1, torch.cat([branch.context, path]), 1, ()))
            tokens.append(guess.token)
            positions.append(len(branch.ask.text) - 1 + branch.growth.depth(node))
            slots.append(slot)
            states.append(branch.states[guess.parent])
        self._run(chosen, segments, tokens, positions, slots, torch.stack(states), torch.arange(len(chosen)))

    def _run(
        self,
        opened: Sequence[tuple[Branch, int]],
        segments: Sequence[Segment],
        tokens: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int],
        states: Tensor,
        rows: Tensor,
    ) -> None:
        """One pass of the layer; row `rows[i]` opens `opened[i]`."""
        device = self._device
        batch = build_batch(segments, torch.tensor(positions), torch.tensor(slots), device)
        logits, kept = self._guesser.guess(
            torch.tensor(tokens, device=device), states.float(), batch, self._pool, rows.to(device)
        )
        self._adjust(logits, opened)
        best, shares = self._guesser.best(logits, min(NUM_RANKS, len(self._token_ids)))
        found: list[list[int]] = self._token_ids[best].tolist()
        for (branch, node), own, share, state in zip(opened, found, shares.tolist(), kept, strict=True):
            branch.growth.open(node, own, share)
            branch.states[node] = state

    def _adjust(self, logits: Tensor, opened: Sequence[tuple[Branch, int]]) -> None:
        """Masks and, at temperature, the verifier's own noise, in place: what is likeliest then is likeliest drawn."""
        vocab = len(self._token_ids)
        for own, (branch, node) in zip(logits[:, :vocab], opened, strict=True):
            row = branch.ask.row
            if row.mask is not None:
                own += row.mask.always[self._token_ids]
            if row.params.temperature > 0:
                position = row.position + branch.growth.depth(node)
                key = noise_key(row.params.seed, row.params.choice, position)
                noise = gumbel_from_keys([key], self._token_ids)[0]
                own.copy_(own.log_softmax(-1) / row.params.temperature + noise)

    def _take_slot(self) -> int:
        self._next_slot += 1
        return self._next_slot - 1


class TorchGuesser:
    """The layer in torch: correct everywhere, and the truth for the C kernel's."""

    def __init__(self, heads: SequentialHeads) -> None:
        self._heads = heads

    def guess(self, tokens: Tensor, states: Tensor, batch: Batch, pool: KVPool, rows: Tensor) -> tuple[Tensor, Tensor]:
        kept = self._heads.step(tokens, states, batch, pool)[rows]
        return (kept.to(self._heads.lm_head.dtype) @ self._heads.lm_head.T).float(), kept

    def best(self, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        shares, best = scores.softmax(-1).topk(count)
        return best, shares


def scratch_slots(max_num_seqs: int) -> int:
    """Slots that guesses need: the root and the nodes opened, for each request at a time."""
    return 1 + max_num_seqs * (1 + WIDTH * 8)
