"""What speculation has saved: the time that plain decoding would have taken, over the time that was taken.

The estimator. A step with `B` decoding requests, of whose nodes `A` were accepted, did what plain decoding does in one
step with the same rows but without nodes, and `A / B` steps more with the `B` roots alone. So its plain time is

    plain = p(rows without nodes) + A / B * p(B rows)

and the speedup over many steps is `sum(plain) / sum(seconds taken)`, everything counted that a step takes: drafting,
scheduling, messages, steps without nodes. `p` is the cost model's time (it knows rows, requests and context lengths),
multiplied by a correction: the mean of measured over expected time of control steps, a small random share of steps that
decode plainly on purpose, in runs whose first steps do not count (`Controller.is_control_step`), and of steps without
nodes in which heads rest in order to be compared (`duel`). They make the estimate honest where the model is biased;
the model makes it precise although they are few. Where prompts are computed in the step too, `p(rows without nodes)` is
the time taken less what the model says of nodes and drafts, since prompt rows are the same either way. Control steps
count as 1.

What it assumes: that accepted tokens would have been decoded in batches of the same size; that a step's time does not
depend on the steps before; that a step of more than OUTLIER times the expected time was hit by something else.

The 95 % interval has the spread of the steps (ratio of sums, delta method) and that of the correction; it takes steps
as independent of each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from typing import Final

from server.engine.controller import NUM_BUCKETS, bucket, bucket_name
from server.engine.cost import CostModel, Load
from server.engine.messages import Speedup

WINDOW: Final = 5000.0  # steps of one batch size that are remembered, the latest most
KEPT: Final = 1 - 1 / WINDOW
CONTROL_WINDOW: Final = 200.0
PRIOR_STEPS: Final = 5.0  # control steps that the cost model's own estimate counts for
PRIOR_SPREAD: Final = 0.1  # of a control step's time around the expected
OUTLIER: Final = 2.0
LEAST_STEPS: Final = 20.0  # of a batch size, before anything is said of it
Z: Final = 1.96


@dataclass(slots=True)
class Correction:
    """Measured over expected time of control steps."""

    num: float = PRIOR_STEPS
    total: float = PRIOR_STEPS
    squares: float = PRIOR_STEPS * (1 + PRIOR_SPREAD**2)
    num_measured: float = 0.0

    def add(self, ratio: float) -> None:
        fade = 1 - 1 / CONTROL_WINDOW
        self.num, self.total = self.num * fade + 1, self.total * fade + ratio
        self.squares = self.squares * fade + ratio * ratio
        self.num_measured = self.num_measured * fade + 1

    @property
    def mean(self) -> float:
        return self.total / self.num

    @property
    def variance(self) -> float:
        """Of the mean."""
        return max(self.squares / self.num - self.mean**2, 1e-6) / self.num


@dataclass(slots=True)
class Sums:
    """Over the steps of one batch size. Modelled time is before correction."""

    num: float = 0.0
    taken: float = 0.0
    modelled: float = 0.0
    known: float = 0.0  # plain time that needs no correction
    taken_squares: float = 0.0
    plain_squares: float = 0.0
    products: float = 0.0
    correction: Correction = field(default_factory=Correction)

    def add(self, taken: float, modelled: float, known: float) -> None:
        plain = modelled * self.correction.mean + known
        self.num = self.num * KEPT + 1
        self.taken = self.taken * KEPT + taken
        self.modelled = self.modelled * KEPT + modelled
        self.known = self.known * KEPT + known
        self.taken_squares = self.taken_squares * KEPT + taken * taken
        self.plain_squares = self.plain_squares * KEPT + plain * plain
        self.products = self.products * KEPT + taken * plain

    @property
    def plain(self) -> float:
        return self.modelled * self.correction.mean + self.known

    @property
    def plain_variance(self) -> float:
        """Of the sum of plain times, that of the sum of taken times included."""
        ratio = self.plain / self.taken
        steps = self.plain_squares - 2 * ratio * self.products + ratio**2 * self.taken_squares
        return max(steps, 0.0) + self.modelled**2 * self.correction.variance


@dataclass(frozen=True, slots=True)
class Plain:
    """What plain decoding takes: for the step without its nodes, and for one token more of everybody."""

    step_modelled: float  # before correction
    step_known: float
    token_modelled: float
    correction: float
    expected: float  # by the model, for the step as it was: with its nodes and drafts

    def seconds(self, more_steps: float) -> float:
        """For the step, and so many more."""
        return (self.step_modelled + more_steps * self.token_modelled) * self.correction + self.step_known


class SpeedupMeter:
    """One engine's."""

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self._sums = [Sums() for _ in range(NUM_BUCKETS)]
        self._only_prompts = Sums()

    def plain(self, load: Load, taken: float, node_seconds: float, *, is_control: bool) -> Plain:
        """Of a step that took `taken` seconds, `node_seconds` of them for nodes and drafts."""
        correction = self.correction(load)
        token = self._cost.step_seconds(load.decoding()) if load.num_decoding else 0.0
        expected = self._cost.step_seconds(load) + node_seconds
        if is_control or not load.num_decoding or not self._cost.run.is_known:
            return Plain(0.0, taken, token, correction, expected)
        if load.is_pure:
            return Plain(token, 0.0, token, correction, expected)
        return Plain(0.0, max(taken - node_seconds, 0.0), token, correction, expected)

    def add(self, load: Load, taken: float, plain: Plain, num_accepted: int, *, is_settled: bool) -> float:
        """Count one step. Returns the seconds that it saved, which may be below 0."""
        if taken <= 0:
            return 0.0
        sums = self._sums_of(load)
        more = num_accepted / load.num_decoding if load.num_decoding else 0.0
        saved = plain.seconds(more) - taken
        if plain.expected == 0 or taken < OUTLIER * plain.expected:
            if is_settled and load.is_pure and plain.expected > 0:
                sums.correction.add(taken / plain.expected)
            sums.add(taken, plain.step_modelled + more * plain.token_modelled, plain.step_known)
        return saved

    def correction(self, load: Load) -> float:
        """Of the cost model's time for plain steps like this one."""
        return self._sums_of(load).correction.mean

    def speedups(self) -> tuple[Speedup, ...]:
        """By batch size, where there were steps, and of all together."""
        seen = [(bucket_name(i), sums) for i, sums in enumerate(self._sums) if sums.num >= LEAST_STEPS]
        found = [_speedup(name, [sums]) for name, sums in seen]
        everything = [sums for _, sums in seen] + [self._only_prompts] * bool(self._only_prompts.num)
        return (*found, _speedup("all", everything)) if seen else ()

    def _sums_of(self, load: Load) -> Sums:
        return self._sums[bucket(load.num_decoding)] if load.num_decoding else self._only_prompts


def _speedup(name: str, parts: list[Sums]) -> Speedup:
    taken = sum(sums.taken for sums in parts)
    ratio = sum(sums.plain for sums in parts) / taken
    error = Z * sqrt(sum(sums.plain_variance for sums in parts)) / taken
    num_control = sum(sums.correction.num_measured for sums in parts)
    return Speedup(name, ratio, max(ratio - error, 0.0), ratio + error, sum(sums.num for sums in parts), num_control)
