"""What a step costs: seconds by its rows, measured at the start and kept true by every step.

A forward pass with its sampling costs `curve(rows) + extras . features`: the curve knows the plateaus and steps of this
machine's kernels, the features are what rows differ in (keys looked at, requests, sampled and constrained rows). Drafts
cost by the requests that ask for them, the rest of a step by the requests in it, and more if there are trees.

Invariants:
- no single step moves an estimate by more than a few percent: what is learned is the clipped logarithm of measured over
  expected, so a hiccup weighs as much as any step that took a little longer, and estimates settle near the median;
- more rows never cost less;
- no torch, no clock; plain numbers, since steps may be as short as ten calls of numpy.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from operator import mul
from typing import Final

import numpy as np

from server.engine.messages import CurvePoint

Features = Sequence[float]  # in the order of FEATURES

ROWS: Final = (*range(1, 13), 16, 17, 20, 24, 32, 33, 40, 48, 64, 65, 96, 128, 192, 256, 384, 512)
REQUESTS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
USUAL_KEYS: Final = 256  # that a row looks at; `keys` are those beyond, and may be below 0
FEATURES: Final = ("keys", "requests", "sampled rows", "constrained rows")  # of all rows together
LEAST_SHARE: Final = 0.1
FIRST_EXTRAS: Final = (1e-9, 2e-5, 5e-5, 5e-5)  # seconds each, until measured
MOST: Final = 0.3  # of the logarithm of measured over expected; what is beyond is an outlier
RATE: Final = 0.01  # of a knot, with each step at it: nodes are chosen by differences of a few percent
FADING: Final = 0.998  # of what was measured at a knot, with each step: where steps are rare they say more
LEVEL_RATE: Final = 0.05  # of everything: a machine that is slower now is slower everywhere, and only ratios decide
EXTRA_RATE: Final = 0.02
MEASURED: Final = 50.0  # steps that a measurement at the start counts for
GUESSED: Final = 0.01  # what a knot weighs that none was made at
FEW: Final = 8  # places on a curve that are looked up faster one by one than by numpy
LEARNED_AT_ONCE: Final = 8  # steps: what runs again at once finds itself in the caches


class Curve:
    """Seconds over a number, linear between knots and beyond the last. Unknown until the first measurement."""

    def __init__(self, knots: Sequence[int]) -> None:
        self._knots = [float(knot) for knot in knots]
        self._seconds = [0.0] * len(knots)  # as measured; `_line` is what is believed
        self._counts = [0.0] * len(knots)  # measurements, by knot
        self._line: list[float] | None = None
        self.is_known = False

    def seconds(self, x: float) -> float:
        """Seconds at `x`; 0 while nothing was measured."""
        line, knots = self._believed(), self._knots
        right = bisect_left(knots, x, 1, len(knots) - 1)
        low, least = knots[right - 1], line[right - 1]
        return least + (x - low) / (knots[right] - low) * (line[right] - least) if x > low else least

    def line(self, start: int, count: int) -> list[float]:
        """Seconds at `start`, `start + 1`, ..., `start + count`."""
        if count <= FEW or start + count > self._knots[-1]:
            return [self.seconds(start + i) for i in range(count + 1)]
        line: list[float] = np.interp(np.arange(start, start + count + 1), self._knots, self._believed()).tolist()
        return line

    def measure(self, points: Sequence[tuple[int, float]]) -> None:
        """Take measurements for true; knots between them lie on straight lines, and beyond them on the last slope."""
        known = sorted(points)
        (first, low), (last, high) = known[0], known[-1]
        slope = max(high - low, 0.0) / (last - first) if last > first else 0.0  # over all: single slopes are noise
        within = np.interp(self._knots, [x for x, _ in known], [y for _, y in known]).tolist()
        self._seconds = [y + max(knot - last, 0.0) * slope for knot, y in zip(self._knots, within, strict=True)]
        measured = {float(x) for x, _ in known}
        self._counts = [MEASURED if knot in measured else 0.0 for knot in self._knots]
        self._line, self.is_known = None, any(self._seconds)

    def learn(self, x: float, surprise: float) -> None:
        """Move towards what was measured at `x`; `surprise` is the clipped logarithm of measured over expected."""
        right = min(bisect_left(self._knots, x), len(self._knots) - 1)
        left = max(right - 1, 0)
        width = self._knots[right] - self._knots[left]
        share = min(max((x - self._knots[left]) / width, 0.0), 1.0) if width else 1.0
        self._counts = [count * FADING for count in self._counts]
        for knot, weight in ((left, 1 - share), (right, share)):
            rate = max(RATE, 1 / (1 + self._counts[knot]))
            self._seconds[knot] *= exp(rate * weight * surprise)
            self._counts[knot] += weight
        self._line = None

    def scale(self, factor: float) -> None:
        """All of it takes `factor` times as long."""
        self._seconds = [seconds * factor for seconds in self._seconds]
        if self._line is not None:
            self._line = [seconds * factor for seconds in self._line]

    def take(self, x: float, seconds: float) -> None:
        """One measurement of the whole."""
        if seconds <= 0:
            return
        if not self.is_known:
            self.measure([(int(x), seconds)])
        self.learn(x, _clipped(seconds, self.seconds(x)))

    def points(self) -> tuple[CurvePoint, ...]:
        """For people."""
        points = zip(self._knots, self._believed(), strict=True)
        return tuple(CurvePoint(int(x), y) for x, y in points if y > 0)

    def _believed(self) -> list[float]:
        if self._line is None:
            self._line = isotonic(self._seconds, [count + GUESSED for count in self._counts])
        return self._line


def isotonic(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest numbers, by weighted squares, that do not fall (pool adjacent violators, Ayer et al. 1955)."""
    if values == sorted(values):
        return list(values)
    pools: list[tuple[float, float, int]] = []  # mean, weight and number of neighbours that share it
    for value, weight in zip(values, weights, strict=True):
        mean, number = value, 1
        while pools and pools[-1][0] > mean:
            other, more, count = pools.pop()
            mean = (mean * weight + other * more) / (weight + more)
            weight, number = weight + more, number + count
        pools.append((mean, weight, number))
    return [mean for mean, _, number in pools for _ in range(number)]


@dataclass(frozen=True, slots=True)
class Load:
    """What one step computes besides tree nodes."""

    num_rows: int
    num_prompt_rows: int  # of them, those that nothing is sampled from
    num_decoding: int  # requests that get a token from this step
    features: Features  # sums over all rows
    decoding_features: Features  # without those of prompt rows

    @property
    def is_pure(self) -> bool:
        """Does the step decode and nothing else?"""
        return self.num_prompt_rows == 0

    def decoding(self) -> Load:
        """The same step without prompt rows."""
        return Load(self.num_decoding, 0, self.num_decoding, self.decoding_features, self.decoding_features)


@dataclass(frozen=True, slots=True)
class Measured:
    """What one step without prompt rows took."""

    num_rows: int  # nodes included
    features: Features  # of them
    num_decoding: int
    num_nodes: int
    num_asking: int
    is_steady: bool  # all who were asked were asked in the step before, too: nobody had to catch up
    run_seconds: float
    draft_seconds: float
    other_seconds: float  # besides `run_seconds`; those of drafting are among them


class CostModel:
    """Seconds of a step, by part."""

    def __init__(self) -> None:
        self.run = Curve(ROWS)
        self.draft = Curve(REQUESTS)  # by requests that ask the heads
        self.rest = Curve(REQUESTS)  # by requests in the step
        self.tree = Curve(REQUESTS)  # by requests in the step: of trees without asking, besides their rows
        self._extras = list(FIRST_EXTRAS)
        self._unlearned: list[Measured] = []

    def extra(self, features: Features) -> float:
        """Seconds for these features; 0 while nothing was measured."""
        return sum(map(mul, features, self._extras)) if self.run.is_known else 0.0

    def run_seconds(self, num_rows: float, features: Features) -> float:
        """Forward pass, sampling and verification."""
        return total(self.run.seconds(num_rows), self.extra(features))

    def step_seconds(self, load: Load) -> float:
        """The whole step, if nobody drafts."""
        return self.run_seconds(load.num_rows, load.features) + self.rest.seconds(load.num_decoding)

    def draft_seconds(self, num_asking: int) -> float:
        return self.draft.seconds(num_asking) if num_asking else 0.0

    def learn(self, step: Measured) -> None:
        """With the next ones: LEARNED_AT_ONCE together, but the first by itself."""
        self._unlearned.append(step)
        if len(self._unlearned) >= LEARNED_AT_ONCE or not self.run.is_known:
            for each in self._unlearned:
                self._learn(each)
            self._unlearned.clear()

    def _learn(self, step: Measured) -> None:
        self.learn_run(step.num_rows, step.features, step.run_seconds)
        beyond_rest = step.other_seconds - self.rest.seconds(step.num_decoding)
        if step.num_asking:
            if step.is_steady:
                self.draft.take(step.num_asking, beyond_rest)
        elif step.num_nodes:
            self.tree.take(step.num_decoding, beyond_rest)
        else:
            self.rest.take(step.num_decoding, step.other_seconds - step.draft_seconds)

    def learn_run(self, num_rows: int, features: Features, seconds: float) -> None:
        """A step without prompt rows took so long; each part of the estimate moves by its share in it."""
        if seconds <= 0:
            return
        if not self.run.is_known:
            self.run.take(num_rows, seconds)
            return
        parts = list(map(mul, features, self._extras))
        expected = total(self.run.seconds(num_rows), sum(parts))
        surprise = _clipped(seconds, expected)
        level = exp(LEVEL_RATE * surprise)
        self.run.learn(num_rows, surprise)
        for curve in (self.run, self.draft, self.rest, self.tree):
            curve.scale(level)
        self._extras = [
            extra * level * exp(EXTRA_RATE * surprise * part / expected)
            for extra, part in zip(self._extras, parts, strict=True)
        ]

    def extra_seconds(self) -> tuple[tuple[str, float], ...]:
        """For people."""
        return tuple(zip(FEATURES, self._extras, strict=True))

    def measure_extra(self, name: str, seconds: float) -> None:
        """What one unit of a feature costs, measured by itself. Noise below zero says: next to nothing."""
        place = FEATURES.index(name)
        self._extras[place] = max(seconds, FIRST_EXTRAS[place] / 100)


def total(seconds: float, extra: float) -> float:
    """Both together; `extra` is below 0 for rows that look at few keys, and no estimate may follow it below 0."""
    return max(seconds + extra, LEAST_SHARE * seconds)


def _clipped(seconds: float, expected: float) -> float:
    return min(max(log(seconds / expected), -MOST), MOST)
