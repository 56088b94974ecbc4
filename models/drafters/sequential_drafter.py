"""Drafting with a sequential drafter: what it remembers of each request, and how its trees grow.

Its layer's K and V lie in a pool of its own at the slots of the model's pool, so that requests which share a prefix
share them too. What belongs to guesses, and to the root, lies behind those slots, and only until the next draft.

Invariants:
- a slot's K and V are used only if they were computed since the model wrote to the slot;
- a request's tree is a function of its tokens and of what of them is remembered; no text depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.batch import Batch, Segment, build_batch, integers
from models.drafters.calibration import Calibration, Offers
from models.drafters.drafter import Ask, Ranked
from models.drafters.growth import NOISY_SURENESS, NUM_RANKS, OUTSIDE, ROOT, WIDTH, Chain, Growth
from models.drafters.resblock import DEFAULT_ACCURACIES
from models.drafters.sequential import SequentialHeads
from models.kernels.gpu import runs_triton
from models.kv_pool import KVPool
from models.masks import NEG_INF
from models.sampling import gumbel_from_keys, is_truncated, noise_key, truncated
from models.tree import Guess

if TYPE_CHECKING:
    from models.graphs import Graphs, Recorder

TRUST: Final = 0.9  # in its own probabilities: it has seen all that came before, unlike parallel heads
CONTEXT: Final = 512  # positions that the drafter looks back
RECORDED_ROWS: Final = 256  # of one pass
PENDING: Final = 192  # positions that it catches up with at most: who was not asked for long is asked cheaply


class Guesser(Protocol):
    """Runs the layer."""

    def guess(self, tokens: Tensor, states: Tensor, batch: Batch, pool: KVPool, rows: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [n], the states before them [n, hidden] -> of `rows`: logits [.., at least draft_vocab], states."""

    def best(self, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """[n, at least draft_vocab] -> the `count` best and their shares of the softmax, [n, count]."""


@runtime_checkable
class Grower(Protocol):
    """Can do even more: grow whole trees, of requests without masks."""

    def draft(self, chains: Sequence[Chain], pool: KVPool, scratch: int) -> list[list[Guess]]:
        """The best guesses of each chain; slots of the pool from `scratch` on are free."""


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
        size = states.shape[0]
        self.parts.append(states)
        self.count += size
        self.end = start + size
        while self.count > PENDING and self.count - len(self.parts[0]) >= PENDING:
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
        self.num_heads, self.sees_all = heads.num_heads, True
        accuracies = (heads.accuracies or DEFAULT_ACCURACIES)[: heads.num_heads]
        self.calibration = Calibration(accuracies, heads.num_heads, trust=TRUST)
        self._offers = Offers(self.calibration)
        self._token_ids = heads.token_ids
        self._guesser = guesser
        self._pool = pool
        self._num_slots = num_slots
        self._max_asks = (len(pool.keys[0]) - 1 - num_slots) // scratch_slots(1, heads.num_heads)
        self._device = heads.device
        self._is_valid: NDArray[np.bool_] = np.zeros(num_slots + 1, dtype=np.bool_)
        self._memories: dict[str, Memory] = {}
        self._next_slot = num_slots + 1
        self._grower = guesser if isinstance(guesser, Grower) else None

    def record(self) -> None:
        """On a GPU: from now on the layer's passes are CUDA graphs."""
        if isinstance(self._guesser, TorchGuesser) and runs_triton(self._device):
            from models.graphs import CudaRecorder

            longest = CONTEXT + PENDING + self.num_heads + 1
            self._guesser.record(self._pool, most_rows=RECORDED_ROWS, longest=longest, record=CudaRecorder())

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
        self._offers.forget(request)

    def ranked(self, asks: Sequence[Ask]) -> list[Ranked]:
        """The first tokens alone, for trees that a grammar grows. Nothing is learned of what becomes of them."""
        self._next_slot = self._num_slots + 1
        found = []
        for ask, growth in zip(asks, self._grow(asks, max_rounds=1), strict=True):
            best, _ = self.calibration.calibrated(growth.best(), ask.kind)
            found.append(Ranked([[guess.token for guess in best]], [[guess.value for guess in best]]))
        return found

    def trees(self, asks: Sequence[Ask]) -> list[list[Guess]]:
        """The best guesses for each, with calibrated values, best first."""
        self._offers.learn([(ask.request, ask.text) for ask in asks])
        trees = []
        for ask, grown in zip(asks, self.grown(asks), strict=True):
            tree, offer = self.calibration.calibrated(grown, ask.kind)
            self._offers.put(ask.request, len(ask.text), offer)
            trees.append(tree)
        return trees

    def grown(self, asks: Sequence[Ask]) -> list[list[Guess]]:
        """The best guesses for each, with the layer's own values."""
        assert len(asks) <= self._max_asks, "more requests than there are slots for"
        self._next_slot = self._num_slots + 1
        plain, others = ([i for i, ask in enumerate(asks) if _is_plain(ask) is kind] for kind in (True, False))
        if self._grower is None or not plain:
            return [growth.best() for growth in self._grow(asks, self.num_heads)]
        chains = [self._catch_up(asks[i]) for i in plain]
        found = dict(zip(plain, self._grower.draft(chains, self._pool, self._next_slot), strict=True))
        grown = self._grow([asks[i] for i in others], self.num_heads)
        found |= {i: growth.best() for i, growth in zip(others, grown, strict=True)}
        return [found[i] for i in range(len(asks))]

    def _grow(self, asks: Sequence[Ask], max_rounds: int) -> list[Growth]:
        """Trees whose nodes are chosen here, which every way of decoding allows."""
        if not asks:
            return []
        branches = self._plant(asks)
        for _ in range(max_rounds - 1):
            chosen = [(branch, node) for branch in branches for node in branch.growth.next_round(WIDTH)]
            if not chosen:
                break
            self._open(chosen)
        return [branch.growth for branch in branches]

    def _catch_up(self, ask: Ask) -> Chain:
        """The rows that a request's text has more than its K and V, to be computed now."""
        memory, root = self._memories[ask.request], len(ask.text) - 1
        first = root - memory.count + 1  # the state before it is the oldest one kept
        slots = np.frombuffer(ask.slots, dtype=np.int64) if root else np.empty(0, dtype=np.int64)
        own, before = slots[first:root], slots[max(first - CONTEXT, 0) : first]
        context = before[self._is_valid[before]]
        self._is_valid[own] = True
        states = memory.parts[0] if len(memory.parts) == 1 else torch.cat(memory.parts)
        memory.parts, memory.count = [states[-1:]], 1  # the root's own slot is known only later
        return Chain(
            torch.from_numpy(context),
            integers(ask.text[first : root + 1], self._device),
            integers([*own.tolist(), self._take_slot()]),
            states,
            first,
            ask.num_nodes,
            min(ask.max_depth, self.num_heads),
            ask.least_value,
            ask.row.params,
        )

    def _plant(self, asks: Sequence[Ask]) -> list[Branch]:
        """Catch up with each text, and open its root."""
        chains = [self._catch_up(ask) for ask in asks]
        branches = [
            Branch(
                ask,
                Growth(chain.num_nodes, chain.max_depth, chain.least_value),
                torch.cat([chain.context, chain.slots]),
                {ROOT: ()},
            )
            for ask, chain in zip(asks, chains, strict=True)
        ]
        positions = [torch.arange(chain.position, chain.position + len(chain.tokens)) for chain in chains]
        self._run(
            [(branch, ROOT) for branch in branches],
            [Segment(len(chain.tokens), chain.context, len(chain.tokens), ()) for chain in chains],
            torch.cat([chain.tokens for chain in chains]),
            torch.cat(positions),
            torch.cat([chain.slots for chain in chains]),
            torch.cat([chain.states for chain in chains]),
            torch.tensor(list(accumulate(len(chain.tokens) for chain in chains))) - 1,
        )
        return branches

    def _open(self, chosen: Sequence[tuple[Branch, int]]) -> None:
        """Guess what follows these nodes."""
        segments, tokens, positions, slots, states = [], [], [], [], []
        for branch, node in chosen:
            guess = branch.growth.guesses[node]
            above = branch.slots[guess.parent]
            slot = self._take_slot()
            branch.slots[node] = (*above, slot)
            segments.append(Segment(1, torch.cat([branch.context, integers(above)]), 1, ()))
            tokens.append(guess.token)
            positions.append(len(branch.ask.text) - 1 + branch.growth.depth(node))
            slots.append(slot)
            states.append(branch.states[guess.parent])
        device = self._device
        rows = torch.tensor(tokens, device=device), torch.tensor(positions), torch.tensor(slots)
        self._run(chosen, segments, *rows, torch.stack(states), torch.arange(len(chosen)))

    def _run(
        self,
        opened: Sequence[tuple[Branch, int]],
        segments: Sequence[Segment],
        tokens: Tensor,
        positions: Tensor,
        slots: Tensor,
        states: Tensor,
        rows: Tensor,
    ) -> None:
        """One pass of the layer; row `rows[i]` opens `opened[i]`."""
        batch = build_batch(segments, positions, slots, self._device)
        logits, kept = self._guesser.guess(tokens, states.float(), batch, self._pool, rows.to(self._device))
        self._adjust(logits, opened)
        best, shares = self._guesser.best(logits, min(NUM_RANKS, len(self._token_ids)))
        found: list[list[int]] = self._token_ids[best].tolist()
        for (branch, node), own, share, state in zip(opened, found, shares.tolist(), kept, strict=True):
            branch.growth.open(node, own, share)
            branch.states[node] = state

    def _adjust(self, logits: Tensor, opened: Sequence[tuple[Branch, int]]) -> None:
        """Masks and, at temperature, the verifier's truncation and noise, in place: what is likeliest then is likeliest
        drawn.
        """
        vocab = len(self._token_ids)
        for own, (branch, node) in zip(logits[:, :vocab], opened, strict=True):
            row = branch.ask.row
            if row.mask is not None:
                own += row.mask.always[self._token_ids]
            if row.params.temperature > 0:
                position = row.position + branch.growth.depth(node)
                key = noise_key(row.params.seed, row.params.choice, position)
                noise = gumbel_from_keys([key], self._token_ids, in_c=self._grower is not None)[0]
                scaled = own / row.params.temperature
                if is_truncated(row.params):
                    kept = truncated(scaled[None], [row.params])[0]
                    scaled = torch.where(kept == NEG_INF, scaled - OUTSIDE, scaled)
                own.copy_((scaled + noise) * NOISY_SURENESS)

    def _take_slot(self) -> int:
        self._next_slot += 1
        return self._next_slot - 1


class TorchGuesser:
    """The layer in torch: correct everywhere, and the truth for the C kernel's. On a GPU its passes may be recorded."""

    def __init__(self, heads: SequentialHeads) -> None:
        self._heads = heads
        self._graphs: Graphs | None = None

    def record(self, pool: KVPool, *, most_rows: int, longest: int, record: Recorder) -> None:
        """From now on passes of at most `most_rows` rows over `pool` are recorded ones. `longest`: tokens of a text."""
        from models.graphs import Graphs

        shape, device = self._heads.shape, self._heads.device
        tokens = torch.zeros(most_rows, dtype=torch.int64, device=device)
        states = torch.zeros(most_rows, shape.hidden_size, device=device)
        shared = shape.num_heads // shape.num_kv_heads
        self._graphs = Graphs(self._pass, [tokens, states], pool, shared=shared, longest=longest, record=record)

    def guess(self, tokens: Tensor, states: Tensor, batch: Batch, pool: KVPool, rows: Tensor) -> tuple[Tensor, Tensor]:
        if self._graphs is not None:
            found = self._graphs.run([tokens, states], batch)
            if found is not None:
                return found[0][rows], found[1][rows]
        return self._pass([tokens, states], batch, pool, rows)

    def _pass(self, inputs: Sequence[Tensor], batch: Batch, pool: KVPool, rows: Tensor) -> tuple[Tensor, Tensor]:
        tokens, states = inputs
        kept = self._heads.step(tokens, states, batch, pool)[rows]
        return (kept.to(self._heads.lm_head.dtype) @ self._heads.lm_head.T).float(), kept

    def best(self, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        shares, best = scores.softmax(-1).topk(count)
        return best, shares


def _is_plain(ask: Ask) -> bool:
    """No mask has a say in which tokens are likeliest."""
    return ask.row.mask is None


def scratch_slots(max_num_seqs: int, num_heads: int) -> int:
    """Slots that guesses need: the root's and those of the nodes opened, for so many requests at a time."""
    return max_num_seqs * (1 + WIDTH * (num_heads - 1))
