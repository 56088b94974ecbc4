"""How well heads guess: the rank of the right token under each head, and what follows for trees.

A text that the model wrote greedily tells exactly what the engine would do on it: at position t the root is token
t + 1, head d guesses token t + 1 + d, the longest path of right guesses is accepted, and the next step starts behind.

Invariants: nothing here assumes that depths are independent, except where `models.tree` does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.drafters.medusa import Heads
from models.drafters.resblock import Accuracies
from models.tree import Choice, best_static_choices, expected_tau

NUM_RANKS = 20
NODES = (1, 2, 4, 8, 16, 32, 63)
MISSING = NUM_RANKS  # the rank of a token that is not among the first


@dataclass(frozen=True)
class Tau:
    """Tokens per step with the best static tree of `nodes` nodes."""

    nodes: int
    measured: float  # by walking the text step by step
    error: float  # standard error of `measured`
    independent: float  # what the accuracies promise if depths were independent


@dataclass(frozen=True)
class Text:
    """Ranks of one answer. `ranks[i, d]` belongs to the i-th position from which the engine may draft."""

    ranks: NDArray[np.int64]  # [positions, heads], MISSING where not among the first or beyond the end
    known: NDArray[np.bool_]  # [positions, heads] there is a token at that depth


@torch.inference_mode()
def rank_text(heads: Heads, hidden: Tensor, tokens: NDArray[np.int64], counts: NDArray[np.bool_]) -> list[Text]:
    """Ranks of the right tokens in every answer (run of counted tokens) of one example.

    hidden: [positions, hidden], tokens and counts: [positions]. The first draft of an answer is made from the last
    position before it.
    """
    texts = []
    for begin, end in runs(counts):
        first = max(begin - 1, 0)
        ranks = min(NUM_RANKS, len(heads.token_ids))
        wanted, known = _shifted(tokens[:end], first, heads.num_heads)
        guesses = [heads(part).topk(ranks, dim=-1).indices for part in torch.split(hidden[first : end - 1], 512)]
        guessed = heads.token_ids[torch.cat(guesses)].cpu().numpy()  # [positions, heads, ranks]
        hits = (guessed == wanted[:, :, None]) & known[:, :, None]
        texts.append(Text(np.where(hits.any(-1), hits.argmax(-1), MISSING), known))
    return texts


def _shifted(tokens: NDArray[np.int64], first: int, num_heads: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Token t + 1 + d for every t from `first` on and d = 1..heads, and whether it exists: [positions, heads]."""
    there = np.arange(first, len(tokens) - 1)[:, None] + 1 + np.arange(1, num_heads + 1)
    known = there < len(tokens)
    return tokens[np.minimum(there, len(tokens) - 1)], known


def runs(counts: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """[begin, end) of each run of counted tokens that is long enough to draft for."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], counts, [False])).astype(np.int8)))
    return [(int(begin), int(end)) for begin, end in edges.reshape(-1, 2) if end - max(begin - 1, 0) >= 2]


def measure_accuracies(texts: Sequence[Text]) -> Accuracies:
    """[heads][rank] share of positions whose right token has exactly this rank; sorted, as trees expect them."""
    ranks = np.concatenate([text.ranks for text in texts])
    known = np.concatenate([text.known for text in texts])
    rows = []
    for head in range(ranks.shape[1]):
        counts = np.bincount(ranks[known[:, head], head], minlength=NUM_RANKS + 1)[:NUM_RANKS]
        shares = np.sort(counts / max(1, int(known[:, head].sum())))[::-1]
        rows.append(tuple(round(float(share), 5) for share in shares))
    return tuple(rows)


def walk(text: Text, choices: Sequence[Choice]) -> tuple[int, int]:
    """(tokens, steps) of a decode of this text with a tree of these choices at every step."""
    tree = frozenset(choices)
    position = tokens = steps = 0
    while position < len(text.ranks) and text.known[position, 0]:
        accepted = _accepted(text.ranks[position], tree)
        emitted = min(accepted + 1, len(text.ranks) - 1 - position)
        position, tokens, steps = position + accepted + 1, tokens + emitted, steps + 1
    return tokens, steps


def _accepted(ranks: NDArray[np.int64], tree: frozenset[Choice]) -> int:
    """Depth of the longest path of right guesses that is in the tree."""
    path = tuple(int(rank) for rank in ranks)
    depth = 0
    while depth < len(path) and path[: depth + 1] in tree:
        depth += 1
    return depth


def measured_tau(texts: Sequence[Text], choices: Sequence[Choice]) -> tuple[float, float]:
    """Tokens per step over all texts, and its standard error (ratio estimator over texts)."""
    counts = np.array([walk(text, choices) for text in texts], dtype=np.float64)  # [texts, 2]
    tokens, steps = counts.sum(0)
    tau = float(tokens / max(steps, 1.0))
    residuals = counts[:, 0] - tau * counts[:, 1]
    spread = math.sqrt(len(counts) / max(len(counts) - 1, 1) * float((residuals**2).sum()))
    return tau, spread / max(float(steps), 1.0)


def tau_by_nodes(texts: Sequence[Text], tree_accuracies: Accuracies, nodes: Sequence[int] = NODES) -> list[Tau]:
    """Walk the texts with the trees that the engine would build from `tree_accuracies`."""
    accuracies = measure_accuracies(texts)
    rows = []
    for count in nodes:
        choices = best_static_choices(tree_accuracies, count)
        measured, error = measured_tau(texts, choices)
        rows.append(Tau(len(choices), measured, error, expected_tau(accuracies, choices)))
    return rows
