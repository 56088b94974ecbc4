"""Which path of a verified tree survives. Pure logic; the sampled tokens come from `sampling`.

`sample_and_match` is lossless: the emitted tokens are what decoding one by one with the same noise would have drawn,
whatever the tree (reference: SpecInfer's exactness proof for deterministic drafts; DESIGN.md section 7).
`typical` is Medusa's lossy acceptance (arXiv 2401.10774, section 2.3.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from models.tree import Tree


def sample_and_match(tree: Tree, sampled: Sequence[int]) -> tuple[int, ...]:
    """Nodes of the accepted path, depth 1 first.

    `sampled[0]` was drawn after the root, `sampled[1 + i]` after node `i`. The token that follows the path, the bonus,
    is `sampled[1 + path[-1]]`, or `sampled[0]` for an empty path.
    """
    path: list[int] = []
    node = -1
    while (child := tree.children.get(node, {}).get(sampled[node + 1])) is not None:
        path.append(child)
        node = child
    return tuple(path)


def typical_threshold(entropy: float, epsilon: float, delta: float) -> float:
    """min(epsilon, delta * exp(-H)); `entropy` in nats."""
    return min(epsilon, delta * math.exp(-entropy))


def typical(
    tree: Tree, node_logprobs: Sequence[float], entropies: Sequence[float], epsilon: float, delta: float
) -> tuple[int, ...]:
    """The longest path of typical nodes; of equally long ones the likeliest.

    `node_logprobs[i]` is log p(node i | its path); `entropies[0]` is the root's, `entropies[1 + i]` node i's, in nats.
    """
    best: tuple[int, float, int] = (0, 0.0, -1)
    totals: dict[int, float] = {-1: 0.0}  # accepted node -> log-probability of its path
    for node, parent in enumerate(tree.parents):
        threshold = typical_threshold(entropies[parent + 1], epsilon, delta)
        if parent in totals and math.exp(node_logprobs[node]) > threshold:
            totals[node] = totals[parent] + node_logprobs[node]
            best = max(best, (tree.depths[node], totals[node], node))
    return tree.path(best[2])
