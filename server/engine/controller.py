"""How many tree nodes each request verifies in this step.

For now a fixed number per request, and more where more tokens can be copied; cut evenly where rows or slots are short.
Where many requests run there are none by default, save for copies that are all but sure. The interface is the one that
a controller with measured step times will use (DESIGN.md section 6).
"""

from __future__ import annotations

from collections.abc import Sequence

from server.engine.request import Request

MAX_NODES = 63  # with the root 64 rows
SURE = 0.7  # a copy as likely as this pays in a crowd too
MAX_FORCED = 15  # tokens that a grammar forces, per step: more of them pay as well, but rarely come together


class Controller:
    """Hands out nodes."""

    def __init__(self, num_nodes: int, disable_by_batch_size: int | None = None, *, has_heads: bool = True) -> None:
        """From `disable_by_batch_size` drafting requests on, only those get nodes that ask for them or can copy surely.

        With `num_nodes` 0 only those that ask. Without heads nobody gets more than could be copied.
        """
        self.num_nodes = num_nodes
        self.disable_by_batch_size = disable_by_batch_size
        self.has_heads = has_heads

    def allot(self, requests: Sequence[Request], row_budget: int, copied: Sequence[Sequence[float]]) -> list[int]:
        """Nodes for each request, in order; together at most `row_budget`. Who wants little is served first.

        `copied` holds, for each request, the probability of each token that it could copy.
        """
        is_crowded = self.disable_by_batch_size is not None and len(requests) >= self.disable_by_batch_size
        wanted = [self._wanted(request, values, is_crowded) for request, values in zip(requests, copied, strict=True)]
        allotted, left = [0] * len(requests), max(row_budget, 0)
        by_wish = sorted(range(len(requests)), key=lambda i: wanted[i])
        for served, i in enumerate(by_wish):
            allotted[i] = min(wanted[i], left // (len(requests) - served))
            left -= allotted[i]
        return allotted

    def allot_forced(self, requests: Sequence[Request], num_nodes: Sequence[int], row_budget: int) -> list[int]:
        """Nodes besides `num_nodes` for tokens that a grammar forces. They are right, so a crowd changes nothing."""
        wanted = [_wanted_forced(request, nodes) for request, nodes in zip(requests, num_nodes, strict=True)]
        share = max(row_budget, 0) // max(sum(count > 0 for count in wanted), 1)
        return [min(count, share) for count in wanted]

    def _wanted(self, request: Request, copied: Sequence[float], is_crowded: bool) -> int:
        speculation = request.submit.speculation
        if speculation.mode == "off":
            return 0
        wanted = self._default(copied, is_crowded) if speculation.max_nodes is None else speculation.max_nodes
        return min(wanted, MAX_NODES if self.has_heads else len(copied))

    def _default(self, copied: Sequence[float], is_crowded: bool) -> int:
        if not self.num_nodes:
            return 0
        if is_crowded:
            return sum(value >= SURE for value in copied)
        return max(self.num_nodes, len(copied))


def _wanted_forced(request: Request, num_nodes: int) -> int:
    if request.submit.sampling.grammar is None or request.submit.speculation.mode == "off":
        return 0
    limit = request.submit.speculation.max_nodes
    return min(MAX_FORCED, (MAX_NODES if limit is None else limit) - num_nodes)
