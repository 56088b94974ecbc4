"""Series of speculation: what was drafted and accepted in each step, and the time that it saved.

Invariants:
- accepted tokens never count the bonus token;
- labels are depths and sources, which are few; nothing here grows with requests.
A step may save less than nothing, and a counter must not fall: `rate()` would take that for a restart and count all of
it again. So there are two counters that only rise, and what was saved is their difference; each alone holds the noise
of single steps too.
"""

from __future__ import annotations

from functools import cache
from typing import Final

from prometheus_client import CollectorRegistry, Counter

from server.engine.messages import DRAFT_SOURCES, StepStats
from server.histogram import RepeatedHistogram

TREE_NODES: Final = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 63.0)


class SpeculationMetrics:
    """Its series of one application."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._registry = registry
        self._model_name = model_name
        self._drafts = self._counter("spec_decode_num_drafts", "Trees verified: one per request and step.")
        self._drafted = self._counter("spec_decode_num_draft_tokens", "Tree nodes verified.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Nodes accepted; no bonus tokens.")
        drafted_at, accepted_at = (
            self._counters(
                f"spec_decode_num_{name}_tokens_per_pos",
                f"Nodes {done}, by depth in the tree; position 0 is the first head.",
                "position",
            )
            for name, done in (("draft", "verified"), ("accepted", "accepted"))
        )
        self._drafted_at = cache(lambda depth: drafted_at.labels(model_name, depth))
        self._accepted_at = cache(lambda depth: accepted_at.labels(model_name, depth))
        self._drafted_by_source = self._by_source("draft_tokens", "Tree nodes verified")
        self._accepted_by_source = self._by_source("accepted_tokens", "Nodes accepted")
        self._tree_nodes = RepeatedHistogram(
            "medusa_tree_nodes",
            "Nodes of each tree verified, without its root.",
            {"model_name": model_name},
            TREE_NODES,
        )
        registry.register(self._tree_nodes)
        self._saved = self._counter(
            "seconds_saved",
            "Seconds by which steps were shorter than plain decoding for the same tokens, by estimate. Steps that were "
            "longer are in medusa_seconds_lost_total: only the difference of both is what speculation has saved.",
        )
        self._lost = self._counter(
            "seconds_lost", "Seconds by which steps were longer than plain decoding for the same tokens, by estimate."
        )

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"medusa_{name}", text, ["model_name"], registry=self._registry).labels(self._model_name)

    def _counters(self, name: str, text: str, label: str) -> Counter:
        return Counter(f"medusa_{name}", text, ["model_name", label], registry=self._registry)

    def _by_source(self, name: str, text: str) -> list[Counter]:
        declared = self._counters(
            f"spec_decode_num_{name}_by_source",
            f"{text}, by who guessed them: heads, repeats of the request's own text (ngram), its prediction, or its "
            "grammar, which forces them.",
            "source",
        )
        return [declared.labels(self._model_name, source) for source in DRAFT_SOURCES]

    def on_step(self, stats: StepStats) -> None:
        """Take in one engine step."""
        if stats.saved_seconds > 0:
            self._saved.inc(stats.saved_seconds)
        elif stats.saved_seconds < 0:
            self._lost.inc(-stats.saved_seconds)
        if not stats.num_drafts:
            return
        self._drafts.inc(stats.num_drafts)
        self._drafted.inc(stats.num_draft_tokens)
        self._accepted.inc(stats.num_accepted_tokens)
        for depth, count in enumerate(stats.drafted_per_depth):
            self._drafted_at(depth).inc(count)
        for depth, count in enumerate(stats.accepted_per_depth):
            self._accepted_at(depth).inc(count)
        for counters, counts in (
            (self._drafted_by_source, stats.drafted_by_source),
            (self._accepted_by_source, stats.accepted_by_source),
        ):
            for counter, count in zip(counters, counts, strict=False):
                counter.inc(count)
        for size in stats.tree_sizes:
            self._tree_nodes.observe(size, 1)
