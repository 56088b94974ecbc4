"""What a server of ours says of its own speedup: by its counters over a span of time, and by its gauge.

The gauge remembers thousands of steps, among them those of requests that asked for plain decoding; the counters tell
one span from another. Both are the engine's estimate, to be compared with what a clock says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.bench.report import Ratio

TOKENS = "medusa_generation_tokens_total"
TAKEN = "medusa_engine_seconds_total"  # all that the engine did, in parts
KERNELS = "kernels"  # the part that is no overhead
SAVED, LOST = "medusa_seconds_saved_total", "medusa_seconds_lost_total"
RATIO = "medusa_speedup_ratio"


@dataclass(frozen=True, slots=True)
class Said:
    """At one moment. What the server has no series of is None, or not there."""

    tokens: float | None
    taken: float | None  # seconds
    kernels: float | None  # of these
    saved: float | None  # seconds, those lost taken off
    ratios: Mapping[str, Ratio]  # by batch size, such as 5-8, or all; with its 95 % interval


def listen(port: int) -> Said:
    """Ask the server on `port`."""
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
        said = parse(client.get("/metrics").raise_for_status().text)
        if said.ratios:
            return said
        answer = client.get("/debug/controller")
    ratios = _ratios(answer.json()) if answer.is_success else {}
    return replace(said, ratios=ratios)


def parse(text: str) -> Said:
    """From Prometheus' text."""
    sums: dict[str, float] = {}
    gauges: dict[tuple[str, str], float] = {}
    kernels = None
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
            if (sample.name, sample.labels.get("part")) == (TAKEN, KERNELS):
                kernels = sample.value
            if batch := sample.labels.get("batch"):
                gauges[sample.name, batch] = sample.value
    saved = sums[SAVED] - sums[LOST] if SAVED in sums and LOST in sums else None
    ratios = {
        batch: (gauges[f"{RATIO}_low", batch], ratio, gauges[f"{RATIO}_high", batch])
        for (name, batch), ratio in gauges.items()
        if name == RATIO
    }
    return Said(sums.get(TOKENS), sums.get(TAKEN), kernels, saved, ratios)


def _ratios(state: Any) -> dict[str, Ratio]:
    """From what `GET /debug/controller` answers."""
    return {item["batch"]: (item["low"], item["ratio"], item["high"]) for item in state["speedups"]}


def speedup(before: Said, after: Said) -> float | None:
    """What plain decoding would have taken between two moments, over what was taken; None if that is not said."""
    if before.taken is None or after.taken is None or before.saved is None or after.saved is None:
        return None
    taken = after.taken - before.taken
    return 1 + (after.saved - before.saved) / taken if taken > 0 else None


def overhead(before: Said, after: Said) -> float | None:
    """Share of the engine's time between two moments that went by outside of the kernels; None if that is not said."""
    if before.taken is None or after.taken is None or before.kernels is None or after.kernels is None:
        return None
    taken = after.taken - before.taken
    return 1 - (after.kernels - before.kernels) / taken if taken > 0 else None
