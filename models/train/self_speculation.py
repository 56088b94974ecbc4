"""Greedy decoding with a multi-token model's own heads, without a server: what training measures them by.

Invariant: the text is that of plain greedy decoding, whatever the tree.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models import verify
from models.backbone import Backbone
from models.batch import Segment, build_batch
from models.drafters.mtp import MTPHeads
from models.drafters.resblock import Accuracies
from models.kv_pool import KVPool
from models.tree import Tree, draft_from_heads


@dataclass(frozen=True)
class Decoded:
    """The continuation of each prompt, and what the passes after the one over the prompts have cost and brought."""

    tokens: list[list[int]]
    num_emitted: int  # of all prompts; the last pass of each may bring more than was asked for
    num_passes: int  # one for each prompt that takes part
    seconds: float

    @property
    def tokens_per_pass(self) -> float:
        return self.num_emitted / self.num_passes

    @property
    def tokens_per_second(self) -> float:
        return self.num_emitted / self.seconds


@dataclass
class _Sequence:
    tokens: list[int]
    num_prompt: int
    free: list[int]
    slots: list[int] = field(default_factory=list)  # of all tokens but the last
    hidden: Tensor | None = None


def chain(num_heads: int) -> Accuracies:
    """Accuracies of which every tree is a chain of first guesses: the paper's blockwise decoding."""
    return ((1.0,),) * num_heads


class SelfSpeculation:
    """Decodes batches. `heads` None, or a tree of no nodes, is plain decoding."""

    def __init__(self, backbone: Backbone, heads: MTPHeads | None) -> None:
        self._backbone, self._heads = backbone, heads
        self._device = backbone.lm_head_weight.device

    @torch.inference_mode()
    def decode(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, accuracies: Accuracies = (), num_nodes: int = 0
    ) -> Decoded:
        """Continue every prompt by `num_tokens` tokens, end tokens included, with trees of `num_nodes` nodes."""
        room = max(map(len, prompts)) + num_tokens + num_nodes + 1
        pool = KVPool(self._backbone.kv_shapes, room * len(prompts), dtype=self._backbone.kv_dtype, device=self._device)
        sequences = [
            _Sequence(list(prompt), len(prompt), list(range(1 + i * room, 1 + (i + 1) * room)))
            for i, prompt in enumerate(prompts)
        ]
        self._step(sequences, [Tree()] * len(sequences), pool)
        num_passes, started = 0, time.perf_counter()
        while active := [s for s in sequences if len(s.tokens) - s.num_prompt < num_tokens]:
            self._step(active, self._trees(active, accuracies, num_nodes), pool)
            num_passes += len(active)
        seconds = time.perf_counter() - started
        emitted = sum(len(s.tokens) - s.num_prompt - 1 for s in sequences)
        said = [s.tokens[s.num_prompt :][:num_tokens] for s in sequences]
        return Decoded(said, emitted, num_passes, seconds)

    def _trees(self, sequences: Sequence[_Sequence], accuracies: Accuracies, num_nodes: int) -> list[Tree]:
        if self._heads is None or not num_nodes:
            return [Tree()] * len(sequences)
        hidden = torch.stack([s.hidden for s in sequences if s.hidden is not None])
        ranked = self._heads(hidden).topk(max(map(len, accuracies)), dim=-1).indices.tolist()
        drafts = [draft_from_heads(accuracies, candidates, num_nodes) for candidates in ranked]
        return [Tree(tuple(g.token for g in draft), tuple(g.parent for g in draft)) for draft in drafts]

    def _step(self, sequences: Sequence[_Sequence], trees: Sequence[Tree], pool: KVPool) -> None:
        """One forward pass: the tokens not yet computed and the tree of each sequence."""
        tokens, positions, slots, segments, scored = [], [], [], [], []  # type: ignore[var-annotated]
        for sequence, tree in zip(sequences, trees, strict=True):
            start = len(sequence.slots)
            pending = sequence.tokens[start:]
            context = torch.tensor(sequence.slots, dtype=torch.int64)
            segments.append(Segment(len(pending) + len(tree), context, len(pending), tree.parents))
            scored += range(len(tokens) + len(pending) - 1, len(tokens) + len(pending) + len(tree))
            tokens += [*pending, *tree.tokens]
            last = len(sequence.tokens) - 1
            positions += [*range(start, last + 1), *(last + depth for depth in tree.depths)]
            slots += sequence.free[: len(pending) + len(tree)]
        batch = build_batch(segments, torch.tensor(positions), torch.tensor(slots), self._device)
        rows = torch.tensor(scored, device=self._device)
        logits, hidden = self._backbone.forward(torch.tensor(tokens, device=self._device), batch, pool, rows)
        best = logits.argmax(-1).tolist()
        place = 0
        for sequence, tree in zip(sequences, trees, strict=True):
            end = place + 1 + len(tree)
            _commit(sequence, tree, best[place:end], hidden[place:end])
            place = end


def _commit(sequence: _Sequence, tree: Tree, best: Sequence[int], hidden: Tensor) -> None:
    """Keep the surviving path: best and hidden are those of root and nodes."""
    path = verify.sample_and_match(tree, best)
    num_pending = len(sequence.tokens) - len(sequence.slots)
    used = [*range(num_pending), *(num_pending + node for node in path)]
    sequence.slots += [sequence.free[i] for i in used]
    kept = set(used)
    sequence.free = [slot for i, slot in enumerate(sequence.free) if i not in kept]
    row = path[-1] + 1 if path else 0
    sequence.tokens += [*(tree.tokens[node] for node in path), best[row]]
    sequence.hidden = hidden[row]
