"""How many tree nodes each request verifies in this step.

For now a fixed number per request, cut evenly where rows or slots are short, and none by default where many requests
run; the interface is the one that a controller with measured step times will use (DESIGN.md section 6).
"""

from __future__ import annotations

from collections.abc import Sequence

from server.engine.request import Request

MAX_NODES = 63  # with the root 64 rows
MAX_FORCED = 15  # tokens that a grammar forces, per step: more of them pay as well, but rarely come together


class Controller:
    """Hands out nodes."""

    def __init__(self, num_nodes: int, disable_by_batch_size: int | None = None) -> None:
        """From `disable_by_batch_size` drafting requests on, only those that ask for nodes get any."""
        self.num_nodes = num_nodes
        self.disable_by_batch_size = disable_by_batch_size

    def allot(self, requests: Sequence[Request], row_budget: int) -> list[int]:
        """Nodes for each request, in order; together at most `row_budget`. Who wants little is served first."""
        is_crowded = self.disable_by_batch_size is not None and len(requests) >= self.disable_by_batch_size
        default = 0 if is_crowded else self.num_nodes
        wanted = [_wanted(request, default) for request in requests]
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


def _wanted_forced(request: Request, num_nodes: int) -> int:
    if request.submit.sampling.grammar is None or request.submit.speculation.mode == "off":
        return 0
    limit = request.submit.speculation.max_nodes
    return min(MAX_FORCED, (MAX_NODES if limit is None else limit) - num_nodes)


def _wanted(request: Request, default: int) -> int:
    speculation = request.submit.speculation
    if speculation.mode == "off":
        return 0
    return min(default if speculation.max_nodes is None else speculation.max_nodes, MAX_NODES)
