"""Replays traces: so many requests step through recorded texts, and a policy says which nodes they verify.

A step takes what the cost model says of its rows, keys, requests and drafts, and nothing else; every request always
has more to say. What is right is known from the traces, so nothing here is random but where the requests begin, which
is the same for every policy, and which of the controller's steps are plain on purpose.

What it leaves out: prompts, copies of the text (`--ngram`), sampling, that the drafter is told what does not pay, and
that the engine's cost model has to learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

import numpy as np

from models.tree import MAX_NODES, Choice, best_static_choices
from server.engine.controller import Bound, Controller, Drafting
from server.engine.cost import FEATURES, USUAL_KEYS, CostModel, Features, Load
from server.engine.messages import DraftSource, SamplingParams, Submit
from server.engine.request import Draft, Request
from tests.bench.traces import Step, Trace

HEADS: DraftSource = "heads"
NUM_RANKS = 10  # of the fixed shapes


class Walker:
    """One request after another, each on its way through a text."""

    def __init__(self, texts: Sequence[Trace], text: int, place: int) -> None:
        self._texts, self._text, self._place = texts, text, place
        self.request = _request()

    @property
    def step(self) -> Step:
        return self._texts[self._text][self._place]

    def advance(self, num_tokens: int) -> None:
        self._place += num_tokens
        if self._place >= len(self._texts[self._text]):
            self._text, self._place = (self._text + 1) % len(self._texts), 0
            self.request = _request()


def _request() -> Request:
    return Request(Submit("", (0,), SamplingParams(2**20, temperature=0)), 0, 0.0)


@dataclass(frozen=True, slots=True)
class Taken:
    """What a policy does in one step: nodes verified and accepted, by request, and for how many the heads guess."""

    counts: list[int]
    accepted: list[int]
    num_asking: int


class Policy(Protocol):
    """Decides about nodes, and may learn."""

    name: str

    def take(self, load: Load, walkers: Sequence[Walker]) -> Taken:
        """The nodes of one step."""


class Plain:
    """Nobody guesses."""

    name = "none"

    def take(self, load: Load, walkers: Sequence[Walker]) -> Taken:
        nothing = [0] * len(walkers)
        return Taken(nothing, nothing, 0)


class Static:
    """Trees of one size and shape for everybody: the best by how often depths and ranks were right in these texts.

    Where rows are short they are cut evenly. A node of the shape that a draft does not have was worth less to its
    drafter than all of the draft's, and counts as wrong.
    """

    def __init__(self, texts: Sequence[Trace], num_nodes: int, max_rows: int) -> None:
        self.name = f"static {num_nodes}"
        self._max_rows = max_rows
        self._places = {choice: place for place, choice in enumerate(best_choices(texts, num_nodes))}

    def take(self, load: Load, walkers: Sequence[Walker]) -> Taken:
        each, more = divmod(max(self._max_rows - load.num_rows, 0), len(walkers))
        most = len(self._places)
        counts = [min(each + (i < more), most) for i in range(len(walkers))]
        accepted = [self._num_accepted(walker.step, count) for walker, count in zip(walkers, counts, strict=True)]
        return Taken(counts, accepted, len(walkers))

    def _num_accepted(self, step: Step, count: int) -> int:
        ranks = step.right_ranks
        depth = 0
        while depth < len(ranks) and self._places.get(ranks[: depth + 1], count) < count:
            depth += 1
        return depth


class Dynamic:
    """The engine's own controller, asking and choosing as it does there; no clock runs, so it has no duels."""

    name = "dynamic"

    def __init__(self, cost: CostModel, num_nodes: int, max_rows: int, control_share: float) -> None:
        self._controller = Controller(cost, min(num_nodes, MAX_NODES), control_share=control_share)
        self._max_rows = max_rows

    def take(self, load: Load, walkers: Sequence[Walker]) -> Taken:
        controller = self._controller
        if not controller.considers_heads(load.num_decoding):
            return Plain().take(load, walkers)
        if controller.is_control_step(load.num_decoding):
            controller.note_control(load)
            return Plain().take(load, walkers)
        steps, requests = [walker.step for walker in walkers], [walker.request for walker in walkers]
        bounds = controller.bounds(requests)
        drafting = Drafting(requests, bounds, [1.0] * len(steps), list(map(_row, steps)))
        drafting.asks = controller.ask(load, drafting)
        drafts = list(map(_draft, steps, bounds, drafting.asks))
        counts = controller.choose(load, drafting, drafts, self._max_rows - load.num_rows)
        accepted = [sum(node < count for node in step.right) for step, count in zip(steps, counts, strict=True)]
        return Taken(counts, accepted, drafting.num_asking)


def _draft(step: Step, bound: Bound, least_value: float | None) -> Draft:
    """What the heads would have offered."""
    if least_value is None:
        return Draft()
    values = tuple(value for value in step.values[: bound.guesses] if value >= least_value)
    count = len(values)
    return Draft(tuple(range(count)), step.parents[:count], (HEADS,) * count, values)


class Oracle:
    """Knows what is right, for nothing, and verifies as much of it as pays by the controller's rule; nothing else."""

    name = "oracle"

    def __init__(self, cost: CostModel, max_rows: int) -> None:
        self._cost, self._max_rows = cost, max_rows

    def take(self, load: Load, walkers: Sequence[Walker]) -> Taken:
        owners = [i for i, walker in enumerate(walkers) for _ in walker.step.right]
        owners = owners[: max(self._max_rows - load.num_rows, 0)]
        taken = self._best_number(load, [_row(walkers[i].step) for i in owners])
        counts = [0] * len(walkers)
        for i in owners[:taken]:
            counts[i] += 1
        return Taken(counts, counts, 0)

    def _best_number(self, load: Load, rows: Sequence[Features]) -> int:
        """Of these, in order."""
        features, rest = load.features, self._cost.rest.seconds(load.num_decoding)
        best, best_rate = 0, load.num_decoding / self._cost.step_seconds(load)
        for taken, row in enumerate(rows, 1):
            features = [sum(pair) for pair in zip(features, row, strict=True)]
            rate = (load.num_decoding + taken) / (self._cost.run_seconds(load.num_rows + taken, features) + rest)
            if rate > best_rate:
                best, best_rate = taken, rate
        return best


def best_choices(texts: Sequence[Trace], num_nodes: int) -> tuple[Choice, ...]:
    """The fixed shape that is right most often, depths taken as independent of each other."""
    depths = max((len(step.right) for text in texts for step in text), default=0)
    right, tried = np.zeros((max(depths, 1), NUM_RANKS)), np.zeros(max(depths, 1))
    for step in (step for text in texts for step in text):
        ranks = step.right_ranks
        tried[: len(ranks) + 1] += 1
        for depth, rank in enumerate(ranks):
            right[depth, min(rank, NUM_RANKS - 1)] += 1
    shares = np.minimum.accumulate(right / np.maximum(tried, 1)[:, None], axis=1)
    return best_static_choices(tuple(map(tuple, shares.tolist())), num_nodes)


def _row(step: Step) -> Features:
    """Features of one more row of a request."""
    return [float(step.num_keys - USUAL_KEYS) if name == "keys" else 0.0 for name in FEATURES]


def _summed(rows: Sequence[Features], counts: Sequence[int]) -> list[float]:
    """Features of so many rows of each request."""
    return [sum([count * row[k] for count, row in zip(counts, rows, strict=True)]) for k in range(len(FEATURES))]


def _load(rows: Sequence[Features]) -> Load:
    """A step without trees, of requests with such rows."""
    features = _summed(rows, [1] * len(rows))
    features[FEATURES.index("requests")] = float(len(rows))
    return Load(len(rows), 0, len(rows), features, features)


def _seconds(cost: CostModel, load: Load, rows: Sequence[Features], counts: Sequence[int], num_asking: int) -> float:
    """Of a step in which each request verifies so many nodes."""
    features = [sum(pair) for pair in zip(load.features, _summed(rows, counts), strict=True)]
    run = cost.run_seconds(load.num_rows + sum(counts), features)
    return run + cost.rest.seconds(load.num_decoding) + cost.draft_seconds(num_asking)


@dataclass(frozen=True, slots=True)
class Speed:
    """One policy at one batch size."""

    policy: str
    batch: int
    tokens_per_second: float  # by the cost curves
    nodes_per_request: float  # and step
    tau: float  # tokens per request and step
    asking: float  # share of the requests that the heads guess for


def replay(policy: Policy, cost: CostModel, texts: Sequence[Trace], batch: int, num_tokens: int) -> Speed:
    """Decode about `num_tokens` tokens, but no less than one step."""
    walkers = _start(texts, batch)
    seconds, tokens, nodes, asking, num_steps = 0.0, 0, 0, 0, 0
    while tokens < num_tokens:
        rows = [_row(walker.step) for walker in walkers]
        load = _load(rows)
        taken = policy.take(load, walkers)
        seconds += _seconds(cost, load, rows, taken.counts, taken.num_asking)
        for walker, accepted in zip(walkers, taken.accepted, strict=True):
            walker.advance(1 + accepted)
        tokens += batch + sum(taken.accepted)
        nodes, asking, num_steps = nodes + sum(taken.counts), asking + taken.num_asking, num_steps + 1
    turns = batch * num_steps
    return Speed(policy.name, batch, tokens / seconds, nodes / turns, tokens / turns, asking / turns)


def _start(texts: Sequence[Trace], batch: int) -> list[Walker]:
    """At places that are the same for every policy."""
    dice = Random(batch)
    return [Walker(texts, i % len(texts), dice.randrange(len(texts[i % len(texts)]))) for i in range(batch)]
