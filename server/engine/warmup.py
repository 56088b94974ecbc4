"""Measures what steps cost before anybody waits for one.

Invariants:
- it takes about BUDGET seconds at most, beyond which curves are filled in by straight lines;
- afterwards nothing is left of it: no slot, no request, no state of the runner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from statistics import median
from time import perf_counter
from typing import Final

from server.engine.controller import MAX_NODES, Bound
from server.engine.core import Engine
from server.engine.cost import FEATURES, USUAL_KEYS, Load
from server.engine.messages import DraftSource, SamplingParams, Submit
from server.engine.request import Request, Work

ROWS: Final = (
    1,
    8,
    32,
    2,
    4,
    64,
    16,
    3,
    6,
    5,
    12,
    128,
    9,
    17,
    24,
    7,
    10,
    33,
    48,
    65,
    96,
    11,
    256,
)  # telling ones first
ASKING: Final = (1, 16, 4, 64)
BUDGET: Final = 3.0  # seconds
ROUNDS: Final = (15, 3)  # of few and of many rows: trees are chosen by what single rows cost
TREE_ROWS: Final = 12  # that a tree or a small batch has
REPEATS: Final = 5
LONG: Final = 0.1  # seconds, after which a measurement is not repeated but once
FEW_ROWS: Final = 4
MANY_KEYS: Final = 512
NOTHING: Final = (0.0,) * len(FEATURES)
GREEDY: Final = SamplingParams(2**20, temperature=0)
SAMPLED: Final = SamplingParams(2**20, temperature=0.8)


def warm_up(engine: Engine) -> None:
    """Measure the curves of `engine.cost`, whose engine has no requests yet."""
    _WarmUp(engine).run()
    engine.forget_seconds()


class _WarmUp:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._names = count()
        self._slots = engine.scheduler.slots.allocate(min(256, engine.scheduler.slots.num_free))

    def run(self) -> None:
        try:
            self._measure()
        finally:
            self._engine.scheduler.slots.release(self._slots)

    def _measure(self) -> None:
        cost, deadline = self._engine.cost, perf_counter() + BUDGET
        most = min(self._engine.max_rows, len(self._slots))
        self._seconds_of(self._tree(min(8, most)))  # what is compiled or cached at first use
        usual, many = self._num_keys(USUAL_KEYS), self._num_keys(MANY_KEYS)
        points = self._in_rounds([rows for rows in ROWS if rows <= min(TREE_ROWS, most)], usual, ROUNDS[0], deadline)
        points |= self._in_rounds([rows for rows in ROWS if TREE_ROWS < rows <= most], usual, ROUNDS[1], deadline)
        few = min(FEW_ROWS, most)
        seconds = points.get(few)
        if seconds is not None and many > usual:
            more = self._seconds_of(self._tree(few, num_keys=many)) - seconds
            cost.measure_extra("keys", more / (few * (many - usual)))
        cost.run.measure(list(points.items()))
        if most >= 2 * FEW_ROWS:
            self._measure_extras(min(32, most))
        if self._engine.runner.info.num_heads:
            most = min(most, self._engine.scheduler.max_num_seqs)
            cost.draft.measure([(n, self._draft_seconds(n)) for n in ASKING if n <= most])

    def _in_rounds(self, sizes: Sequence[int], num_keys: int, num_rounds: int, deadline: float) -> dict[int, float]:
        """Seconds of trees of these sizes, medians of several rounds: what else the machine does hits all alike."""
        found: dict[int, list[float]] = {}
        for _ in range(num_rounds):
            for num_rows in sizes:
                if found and perf_counter() > deadline:
                    break
                works = self._tree(num_rows, num_keys=num_keys)
                started = perf_counter()
                self._run(works)
                found.setdefault(num_rows, []).append(perf_counter() - started)
                self._forget([work.request for work in works])
        return {num_rows: median(seconds) for num_rows, seconds in found.items()}

    def _measure_extras(self, num_rows: int) -> None:
        """By differences to a tree of as many rows."""
        base = self._seconds_of(self._tree(num_rows))
        apart = [self._work(1, place) for place in range(num_rows)]
        self._engine.cost.measure_extra("requests", (self._seconds_of(apart) - base) / (num_rows - 1))
        sampled = self._seconds_of(self._tree(num_rows, sampling=SAMPLED))
        self._engine.cost.measure_extra("sampled rows", (sampled - base) / num_rows)

    def _num_keys(self, wanted: int) -> int:
        """As many, if the model takes them and a tree behind."""
        return max(min(wanted, self._engine.runner.info.max_model_len - self._engine.max_rows - 1), 0)

    def _draft_seconds(self, num_asking: int) -> float:
        requests = [work.request for work in self._run([self._work(1, place) for place in range(num_asking)])]
        load = Load(num_asking, 0, num_asking, NOTHING, NOTHING)
        price = self._engine.controller.price(load, num_asking)
        bounds, asks = [Bound(8, 0)] * num_asking, [price] * num_asking
        try:
            return _least(lambda: self._engine.runner.draft(requests, bounds, asks))
        finally:
            self._forget(requests)

    def _seconds_of(self, works: Sequence[Work]) -> float:
        try:
            return _least(lambda: self._engine.runner.run(works))
        finally:
            self._forget([work.request for work in works])

    def _run(self, works: Sequence[Work]) -> Sequence[Work]:
        self._engine.runner.run(works)
        return works

    def _forget(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._engine.runner.forget(request)

    def _tree(self, num_rows: int, *, num_keys: int = 0, sampling: SamplingParams = GREEDY) -> list[Work]:
        """So many rows as stars of at most 64."""
        works, place = [], 0
        while place < num_rows:
            size = min(num_rows - place, MAX_NODES + 1)
            works.append(self._work(size, place, num_keys=num_keys, sampling=sampling))
            place += size
        return works

    def _work(self, num_rows: int, place: int, *, num_keys: int = 0, sampling: SamplingParams = GREEDY) -> Work:
        """A root and its children, in the slots from `place` on; any keys serve as context."""
        token = 0
        request = Request(Submit(f"warm-up {next(self._names)}", (token,) * (num_keys + 1), sampling), 0, 0.0)
        request.slots.extend(self._slots[i % len(self._slots)] for i in range(num_keys))
        slots = self._slots[place : place + num_rows]
        work = Work(request, num_keys, slots[:1])
        nodes = num_rows - 1
        work.node_tokens, work.node_parents, work.node_slots = tuple(range(nodes)), (-1,) * nodes, slots[1:]
        source: DraftSource = "heads"
        work.node_sources = (source,) * nodes
        return work


def _least(call: Callable[[], object]) -> float:
    """Seconds that it takes undisturbed."""
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < REPEATS and sum(seconds) < LONG):
        started = perf_counter()
        call()
        seconds.append(perf_counter() - started)
    return min(seconds)
