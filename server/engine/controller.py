"""How many tree nodes each request verifies in this step.

For now a fixed number per request, cut evenly where rows or slots are short; the interface is the one that a
controller with measured step times will use (DESIGN.md section 6).
"""

from __future__ import annotations

from collections.abc import Sequence

from server.engine.request import Request

MAX_NODES = 63  # with the root 64 rows


class Controller:
    """Hands out nodes."""

    def __init__(self, num_nodes: int) -> None:
        self.num_nodes = num_nodes

    def allot(self, requests: Sequence[Request], row_budget: int) -> list[int]:
        """Nodes for each request, in order; together at most `row_budget`. Who wants little is served first."""
        wanted = [self._wanted(request) for request in requests]
        allotted, left = [0] * len(requests), max(row_budget, 0)
        by_wish = sorted(range(len(requests)), key=lambda i: wanted[i])
        for served, i in enumerate(by_wish):
            allotted[i] = min(wanted[i], left // (len(requests) - served))
            left -= allotted[i]
        return allotted

    def _wanted(self, request: Request) -> int:
        speculation = request.submit.speculation
        if speculation.mode == "off":
            return 0
        wanted = self.num_nodes if speculation.max_nodes is None else speculation.max_nodes
        return min(wanted, MAX_NODES)
