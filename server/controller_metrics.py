"""Series of what the engine knows of costs and gains: its last `ControllerState`, shown when somebody asks.

Invariants:
- what is not known has no sample: nothing before the first state, and nothing of an engine process that is gone;
- labels are batch sizes and the knots of curves, which are few and fixed; nothing here grows with requests;
- the controller's decisions are means of the latest steps, since a single one is an accident; control steps, in which
  it decides nothing, are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from statistics import fmean
from typing import Final

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine.messages import ControllerState, CurvePoint, Decision

Samples = Iterable[tuple[str, float]]  # value of the label, value

DECISIONS: Final[tuple[tuple[str, str, Callable[[Decision], float | None]], ...]] = (
    ("requests_decoding", "requests that get a token", lambda decision: decision.num_decoding),
    ("requests_asking", "requests that the heads guess for", lambda decision: decision.num_asking),
    ("nodes_offered", "nodes offered to the controller, all requests together", lambda decision: decision.num_offered),
    ("nodes_taken", "nodes taken of those offered", lambda decision: decision.num_taken),
    ("least_value", "the least probability, of a node and all above it, that was taken", lambda d: d.least_value),
    ("tokens_expected", "tokens expected of a step, all requests together", lambda decision: decision.expected_tokens),
)


class ControllerMetrics(Collector):
    """Register it as a collector. `state` is the last that the engine told; None: nothing is known."""

    def __init__(self, model_name: str) -> None:
        self.state: ControllerState | None = None
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        state = self.state
        yield from self._speedups(state)
        yield from self._costs(state)
        error = None if state is None else state.calibration_error
        text = "Mean distance of the probability that nodes were given and of how often they were right."
        yield self._gauge("calibration_error", text, error)
        decisions = [] if state is None else [decision for decision in state.decisions if not decision.is_control]
        for name, what, read in DECISIONS:
            values = [value for decision in decisions if (value := read(decision)) is not None]
            mean = fmean(values) if values else None
            yield self._gauge(f"controller_{name}", f"Mean of the controller's latest decisions: {what}.", mean)

    def _speedups(self, state: ControllerState | None) -> Iterator[Metric]:
        speedups = () if state is None else state.speedups
        text = "Time that plain decoding would have taken, by estimate, over the time taken, by requests decoding"
        for name, which, values in (
            ("speedup_ratio", "", [speedup.ratio for speedup in speedups]),
            ("speedup_ratio_low", ": lower end of the 95 % interval", [speedup.low for speedup in speedups]),
            ("speedup_ratio_high", ": upper end of the 95 % interval", [speedup.high for speedup in speedups]),
        ):
            batches = [speedup.batch for speedup in speedups]
            yield self._gauges(name, f"{text}{which}.", "batch", zip(batches, values, strict=True))

    def _costs(self, state: ControllerState | None) -> Iterator[Metric]:
        curves: tuple[tuple[CurvePoint, ...], ...] = ((), (), (), ())
        if state is not None:
            curves = state.run_curve, state.draft_curve, state.rest_curve, state.tree_curve
        for (name, text, label), curve in zip(
            (
                ("step_cost_seconds", "Forward pass, sampling and verification, by rows.", "rows"),
                ("draft_cost_seconds", "Asking the heads, by requests that they guess for.", "requests"),
                ("rest_cost_seconds", "The engine's own and messages, by requests in the step.", "requests"),
                ("tree_cost_seconds", "Trees of copies alone besides their rows, by requests in the step.", "requests"),
            ),
            curves,
            strict=True,
        ):
            yield self._gauges(name, f"What a step is expected to take. {text}", label, _points(curve))
        extras = () if state is None else state.extra_seconds
        text = "What a step is expected to take besides, for each one of what rows differ in."
        yield self._gauges("extra_cost_seconds", text, "feature", extras)

    def _gauge(self, name: str, text: str, value: float | None) -> Metric:
        family = GaugeMetricFamily(f"medusa_{name}", text, labels=["model_name"])
        if value is not None:
            family.add_metric([self._model_name], value)
        return family

    def _gauges(self, name: str, text: str, label: str, samples: Samples) -> Metric:
        family = GaugeMetricFamily(f"medusa_{name}", text, labels=["model_name", label])
        for key, value in samples:
            family.add_metric([self._model_name, key], value)
        return family


def _points(curve: Iterable[CurvePoint]) -> Samples:
    return [(str(point.number), point.seconds) for point in curve]
