"""What a step costs: seconds by its rows, measured at the start and kept true by every step.

A forward pass with its sampling costs `curve(rows) + extras . features`: the curve knows the plateaus and steps of this
machine's kernels, the features are what rows differ in (keys looked at, requests, sampled and constrained rows). Drafts
cost by the requests that ask for them, the rest of a step by the requests in it.

Invariants:
- no single step moves an estimate by more than a few percent: what is learned is the clipped logarithm of measured over
  expected, so a hiccup weighs as much as any step that took a little longer, and estimates settle near the median;
- more rows never cost less;
- pure numpy: no torch, no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Any, Final

import numpy as np

from server.engine.messages import CurvePoint

Floats = np.ndarray[Any, np.dtype[np.float64]]

ROWS: Final = (*range(1, 13), 16, 17, 20, 24, 32, 33, 40, 48, 64, 65, 96, 128, 192, 256, 384, 512)
REQUESTS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
FEATURES: Final = ("keys", "requests", "sampled rows", "constrained rows")  # of all rows together
FIRST_EXTRAS: Final = (1e-8, 2e-5, 5e-5, 5e-5)  # seconds each, until measured
MOST: Final = 0.3  # of the logarithm of measured over expected; what is beyond is an outlier
RATE: Final = 0.1  # of a knot, with each step at it
LEVEL_RATE: Final = 0.02  # of the whole curve: a machine that is slower today is slower everywhere


class Curve:
    """Seconds over a number, linear between knots and beyond the last. Unknown until the first measurement."""

    def __init__(self, knots: Sequence[int]) -> None:
        self.knots: Floats = np.array(knots, dtype=np.float64)
        self._seconds: Floats = np.zeros(len(knots))
        self._count: Floats = np.zeros(len(knots))  # measurements, by knot

    @property
    def is_known(self) -> bool:
        return bool(self._seconds.any())

    def at(self, x: Floats | float) -> Floats:
        """Seconds at each `x`; 0 while nothing was measured."""
        seconds = np.maximum.accumulate(self._seconds)
        slope = max(seconds[-1] - seconds[-2], 0.0) / (self.knots[-1] - self.knots[-2])
        found: Floats = np.interp(x, self.knots, seconds) + np.maximum(np.asarray(x) - self.knots[-1], 0.0) * slope
        return found

    def measure(self, points: Sequence[tuple[int, float]]) -> None:
        """Take measurements for true; knots between them lie on straight lines."""
        xs, ys = zip(*sorted(points), strict=True)
        self._seconds = np.interp(self.knots, xs, ys)
        if len(xs) > 1:  # beyond them the last measured slope, from the first point on: single slopes are noise
            slope = max(ys[-1] - ys[0], 0.0) / (xs[-1] - xs[0])
            self._seconds += np.maximum(self.knots - xs[-1], 0.0) * slope
        self._count[np.isin(self.knots, xs)] = 1 / RATE

    def learn(self, x: float, surprise: float) -> None:
        """Move towards what was measured at `x`; `surprise` is the clipped logarithm of measured over expected."""
        right = min(int(np.searchsorted(self.knots, x)), len(self.knots) - 1)
        left = max(right - 1, 0)
        width = self.knots[right] - self.knots[left]
        share = min(max((x - self.knots[left]) / width, 0.0), 1.0) if width else 1.0
        self._seconds *= np.exp(LEVEL_RATE * surprise)
        for knot, weight in ((left, 1 - share), (right, share)):
            rate = max(RATE, 1 / (1 + self._count[knot]))
            self._seconds[knot] *= np.exp(rate * weight * surprise)
            self._count[knot] += weight

    def take(self, x: float, seconds: float) -> None:
        """One measurement of the whole."""
        if seconds <= 0:
            return
        if not self.is_known:
            self._seconds[:] = seconds
        self.learn(x, _clipped(seconds, float(self.at(x))))

    def points(self) -> tuple[CurvePoint, ...]:
        """For people."""
        seconds = self.at(self.knots)
        return tuple(CurvePoint(int(x), float(y)) for x, y in zip(self.knots, seconds, strict=True) if y > 0)


@dataclass(frozen=True, slots=True)
class Load:
    """What one step computes besides tree nodes."""

    num_rows: int
    num_prompt_rows: int  # of them, those that nothing is sampled from
    num_decoding: int  # requests that get a token from this step
    features: Floats  # [features], sums over all rows
    decoding_features: Floats  # [features], without those of prompt rows

    @property
    def is_pure(self) -> bool:
        """Does the step decode and nothing else?"""
        return self.num_prompt_rows == 0

    def decoding(self) -> Load:
        """The same step without prompt rows."""
        return Load(self.num_decoding, 0, self.num_decoding, self.decoding_features, self.decoding_features)


class CostModel:
    """Seconds of a step, by part."""

    def __init__(self) -> None:
        self.run = Curve(ROWS)
        self.draft = Curve(REQUESTS)  # by requests that ask the heads
        self.rest = Curve(REQUESTS)  # by requests in the step
        self.extras: Floats = np.array(FIRST_EXTRAS)

    def run_seconds(self, num_rows: Floats | float, features: Floats) -> Floats:
        """Forward pass, sampling and verification. features: [..., features]."""
        found: Floats = self.run.at(num_rows) + (features @ self.extras if self.run.is_known else 0.0)
        return found

    def step_seconds(self, load: Load) -> float:
        """The whole step, if nobody drafts."""
        return float(self.run_seconds(load.num_rows, load.features)) + float(self.rest.at(load.num_decoding))

    def draft_seconds(self, num_asking: int) -> float:
        return float(self.draft.at(num_asking)) if num_asking else 0.0

    def learn_run(self, num_rows: int, features: Floats, seconds: float) -> None:
        """A step without prompt rows took so long; each part of the estimate moves by its share in it."""
        if seconds <= 0:
            return
        if not self.run.is_known:
            self.run.take(num_rows, seconds)
            return
        parts = features * self.extras
        expected = float(self.run.at(num_rows)) + float(parts.sum())
        surprise = _clipped(seconds, expected)
        self.run.learn(num_rows, surprise)
        self.extras *= np.exp(RATE * surprise * parts / expected)

    def extra_seconds(self) -> tuple[tuple[str, float], ...]:
        """For people."""
        return tuple(zip(FEATURES, self.extras.tolist(), strict=True))

    def measure_extra(self, name: str, seconds: float) -> None:
        """What one unit of a feature costs, measured by itself. Noise below zero says: next to nothing."""
        place = FEATURES.index(name)
        self.extras[place] = max(seconds, FIRST_EXTRAS[place] / 100)


def _clipped(seconds: float, expected: float) -> float:
    return min(max(log(seconds / expected), -MOST), MOST)
