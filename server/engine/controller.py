"""How many tree nodes each request verifies in this step: as many as pay, by one rule for all requests together.

The rule: nodes are taken in order of value (the probability that a node and all its ancestors are right) up to the
number that makes the step's tokens per second greatest,

    (decoding requests + sum of values taken) / seconds(rows + nodes taken),

which is SmartSpec's goodput (arXiv 2406.14066) over dynamic trees. Seconds come from `cost`. Where the next row is free
the best number lies beyond it, so steps and plateaus of the curve need no special care; at saturation it is 0.

Whether the heads are asked at all is decided by the same rule from what they lately brought to such a batch and to this
request, with the time of asking added. While they do not pay, some requests are asked every now and then, some steps
in a row: who was not asked for long has much to catch up with, and only the steps behind tell what asking costs. And
where the clock says that asking loses (`duel`), heads rest, whatever was expected.

Invariants:
- the text does not depend on anything here;
- a request's `max_nodes`, or else the server's number, is never exceeded but by tokens that a grammar forces, and with
  them `max_nodes` is not;
- of each draft a beginning is taken, so every node comes with its parent.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, exp, log
from random import Random
from typing import Final, NamedTuple

from server.engine.cost import CostModel, Features, Load, total
from server.engine.duel import SETTLING, Duel
from server.engine.messages import Decision, Duelled
from server.engine.request import Draft, Request

MAX_NODES: Final = 63  # with the root 64 rows
MAX_FORCED: Final = 15  # tokens that a grammar forces, per step: more of them pay as well, but rarely come together
MAX_OFFERED: Final = 512  # nodes that are looked at in one step; in a crowd no tree gets large
LEAST_OFFERED: Final = 8  # by each request nevertheless
NUM_DECISIONS: Final = 32  # kept for people
PROBE_COST: Final = 0.002  # of the time: what asking the heads once more may cost while they do not pay
PROBE_EVERY: Final = (32, 400)  # steps between such runs, at least and at most
PROBE_RUN: Final = 4  # steps in which the same requests are asked
MOST_PROBED: Final = 4  # requests, and at most a quarter of them: each has much to catch up with
REST_STEPS: Final = 8
KEPT_STEPS: Final = 3  # more, in which the same requests are worth asking
USUAL_ROOM: Final = 0.8  # of a request for the heads; now and then copies leave less
COPIES_REST: Final = 24  # steps at most; half as many as requests: in a crowd some can always copy something
FORGETTING: Final = 0.05  # of a running estimate, with each step
SLOW_FORGETTING: Final = 0.002  # of what is usual
FADING: Final = 0.02  # of what was not usual, with each step in which nobody looks
LEAST_GAIN: Final = 0.02  # in tokens per second, for which heads are asked and copies looked for: less is not sure
MAX_QUALITY: Final = 4.0
MAX_PROFILED: Final = 8  # nodes of each request that are remembered when it is judged who should ask
PARTS: Final = 4
FIRST_VALUES: Final = [  # before the heads were asked
    value for value in (0.6, 0.25, 0.15, 0.1, 0.08, 0.06, 0.04, 0.02) for _ in range(PARTS)
]
PRICED_NODES: Final = 4  # of each request's tree: how far the price of a row looks
NUM_BUCKETS: Final = 12
CONTROL_RUN: Final = 16  # control steps in a row, the first SETTLING of which do not count
FIRST_CONTROLS: Final = (40, 3)  # the first so many of each batch size come so many times as often


class Bound(NamedTuple):
    """Nodes that one request may get at most."""

    guesses: int
    forced: int  # besides, for tokens that a grammar forces


class _Gain:
    """What the heads offer in batches of one size: the values of all nodes, best first, see `_profile`.

    While nobody asks, what was seen last says less and less, and what was usual is expected again.
    """

    def __init__(self) -> None:
        self.values: Sequence[float] = FIRST_VALUES
        self._usual: Sequence[float] = FIRST_VALUES
        self._num_seen = 0

    def learn(self, values: Sequence[float]) -> None:
        self._num_seen += 1
        first = 1 / (1 + self._num_seen)
        self.values = _moved(self.values, values, max(FORGETTING, first))
        self._usual = _moved(self._usual, values, max(SLOW_FORGETTING, first))

    def fade(self) -> None:
        """A step in which nobody asked."""
        self.values = _moved(self.values, self._usual, FADING)


def _moved(old: Sequence[float], new: Sequence[float], rate: float) -> list[float]:
    return [a + rate * (b - a) for a, b in zip(old, new, strict=True)]


class Rests:
    """Steps to come in which something is not considered, by batch size."""

    def __init__(self) -> None:
        self._num_steps = [0] * NUM_BUCKETS

    def start(self, num_decoding: int, num_steps: int) -> None:
        self._num_steps[bucket(num_decoding)] = num_steps

    def takes(self, num_decoding: int) -> bool:
        """Is this step one of them?"""
        size = bucket(num_decoding)
        if not self._num_steps[size]:
            return False
        self._num_steps[size] -= 1
        return True


@dataclass(slots=True)
class Drafting:
    """Those who may get nodes in this step, in order."""

    requests: list[Request]
    bounds: list[Bound]
    rooms: list[float]  # the probability that a guess of the heads would matter; 0 for whom they cannot guess
    features: list[Features]  # of one more row of each
    asks: list[float | None] = field(default_factory=list)  # what a guess of the heads must be worth; None: not asked
    is_steady: bool = True  # were all who are asked asked in the step before, too?

    def only(self, some: Sequence[int]) -> Drafting:
        """These of them."""
        return Drafting(
            [self.requests[i] for i in some],
            [self.bounds[i] for i in some],
            [self.rooms[i] for i in some],
            [self.features[i] for i in some],
            [self.asks[i] for i in some],
            self.is_steady,
        )

    @property
    def num_asking(self) -> int:
        return sum([least is not None for least in self.asks])


def bucket(num_decoding: int) -> int:
    """Batches of about the same size: 1, 2, 3 to 4, 5 to 8, ..."""
    return min(max(num_decoding - 1, 0).bit_length(), NUM_BUCKETS - 1)


def bucket_name(index: int) -> str:
    low, high = (1 << index - 1) + 1 if index else 1, 1 << index
    if index == NUM_BUCKETS - 1:
        return f"{low}+"
    return str(high) if low == high else f"{low}-{high}"


class Controller:
    """Hands out nodes."""

    def __init__(self, cost: CostModel, num_nodes: int, *, control_share: float = 0.0, seed: int = 0) -> None:
        """With `num_nodes` 0 only those requests get nodes that ask for them, and tokens that are forced."""
        self.cost = cost
        self.decisions: deque[Decision] = deque(maxlen=NUM_DECISIONS)
        self._num_nodes = num_nodes
        self._control_share = control_share
        self._random = Random(seed)
        self._control_left = 0  # of a run of control steps
        self._duels = [Duel() for _ in range(NUM_BUCKETS)]
        self._duelling: Duel | None = None  # whose steps were the last
        self._num_controls = [0] * NUM_BUCKETS
        self._gains = [_Gain() for _ in range(NUM_BUCKETS)]
        self._unasked_steps = 0  # since anybody was asked
        self._asked: set[str] = set()  # requests, in the step before
        self._worthy: list[int] = []  # of being asked, by place, when last looked at
        self._kept_for: tuple[int, list[float], list[str]] = (0, [], [])  # rows, rooms and requests then
        self._kept_left = 0  # steps in which that holds
        self._promised = 0.0  # gain of asking, as a logarithm, when last looked at
        self._probed: set[str] = set()  # requests, in this run of probes
        self._probes_left = 0
        self._rests, self._rests_from_copies = Rests(), Rests()
        self._nodes_per_request = float(min(num_nodes, 4))  # lately taken by those who could draft

    def bounds(self, requests: Sequence[Request]) -> list[Bound]:
        """What each request may get at most, in order."""
        offered = max(MAX_OFFERED // max(len(requests), 1), LEAST_OFFERED)
        return [self._bound(request, offered) for request in requests]

    def _bound(self, request: Request, offered: int) -> Bound:
        speculation = request.submit.speculation
        if speculation.mode == "off":
            return Bound(0, 0)
        limit = self._num_nodes if speculation.max_nodes is None else speculation.max_nodes
        guesses = min(limit, MAX_NODES, offered)
        if request.submit.sampling.grammar is None:
            return Bound(guesses, 0)
        most = MAX_NODES if speculation.max_nodes is None else min(speculation.max_nodes, MAX_NODES)
        return Bound(guesses, max(min(MAX_FORCED, most - guesses), 0))

    def reserve(self, num_decoding: int, most: int) -> int:
        """Rows that prompts leave to the trees of those who decode: what these lately took, at most `most`."""
        return min(ceil(self._nodes_per_request * num_decoding), most)

    def is_control_step(self, num_decoding: int) -> bool:
        """Is this step to decode plainly, so that it is known what that costs?

        Such steps come in runs: behind steps with trees, whose data are in the caches, the first ones are slower, and
        only those behind say what plain decoding takes (`is_settled`). While there
        were few at this batch size, their spread is most of what is uncertain of the speedup: they come oftener.
        """
        size, (few, factor) = bucket(num_decoding), FIRST_CONTROLS
        share = min(self._control_share * (factor if self._num_controls[size] < few else 1), 1.0)
        if self._control_left:
            self._control_left -= 1
        elif self._random.random() * (share + CONTROL_RUN * (1 - share)) < share:
            self._control_left = CONTROL_RUN - 1
        else:
            return False
        self._num_controls[size] += 1
        return True

    @property
    def is_settled(self) -> bool:
        """In a run of control steps: have there been enough of them?"""
        return self._control_left < CONTROL_RUN - SETTLING

    def is_plain(self, num_decoding: int) -> bool:
        """Is a step as good as a control step, if it has no nodes?"""
        return self._duels[bucket(num_decoding)].is_plain

    def joined(self, num_new: int, num_requests: int) -> None:
        """So many of the requests in this step are new."""
        self._duels[bucket(num_requests)].joined(num_new, num_requests)

    def took(self, load: Load, expected_tokens: float, seconds: float, *, has_asked: bool) -> None:
        """A step without control took so long."""
        if not load.is_pure or not load.num_decoding or not self._num_nodes:
            return
        duel = self._duels[bucket(load.num_decoding)]
        if duel is not self._duelling:
            duel.interrupt()
            self._duelling = duel
        duel.add(expected_tokens, seconds, self._promised if has_asked else None)

    def duels(self) -> tuple[Duelled, ...]:
        """What the clock has said, by batch size."""
        heard = [(bucket_name(i), duel) for i, duel in enumerate(self._duels) if duel.num_compared]
        return tuple([Duelled(name, exp(duel.gain), duel.num_compared, duel.has_won) for name, duel in heard])

    def considers_heads(self, num_decoding: int) -> bool:
        """Is it to be looked at who might ask? Not where the clock is against it, or it has just paid for nobody."""
        if self._duels[bucket(num_decoding)].has_heads and not self._rests.takes(num_decoding):
            return True
        self._leave_unasked(num_decoding)
        self._asked.clear()
        return False

    def _leave_unasked(self, num_decoding: int) -> None:
        self._unasked_steps += 1
        self._gains[bucket(num_decoding)].fade()

    def considers_copies(self, num_decoding: int) -> bool:
        """Is it to be looked at what may be copied? Not for some steps after nodes brought next to nothing."""
        return not self._rests_from_copies.takes(num_decoding)

    def ask(self, load: Load, drafting: Drafting) -> list[float | None]:
        """Whom the heads are to guess for, and what a guess must be worth to pay."""
        requests = drafting.requests
        able = [i for i, room in enumerate(drafting.rooms) if room > 0]
        asking = (load.num_rows, drafting.rooms, [request.id for request in requests])
        if self._worthy and self._kept_left and asking == self._kept_for:
            self._kept_left -= 1
        else:
            self._worthy = self._worth_asking(load, drafting)
            self._kept_for, self._kept_left = asking, KEPT_STEPS
        chosen = self._worthy or self._probe(load, drafting, able)
        if chosen:
            self._unasked_steps = 0
        elif able:
            self._leave_unasked(load.num_decoding)
            if sum([drafting.rooms[i] for i in able]) >= USUAL_ROOM * len(able):  # else it may pay in the next step
                self._rests.start(load.num_decoding, REST_STEPS)
        asked = {requests[i].id for i in chosen}
        drafting.is_steady = asked <= self._asked
        self._asked = asked
        price, whom = self.price(load, len(chosen)), set(chosen)
        return [price if i in whom else None for i in range(len(requests))]

    def _probe(self, load: Load, drafting: Drafting, able: Sequence[int]) -> list[int]:
        """Some of the able, if they are to be asked although it did not pay lately."""
        requests = drafting.requests
        if self._probes_left:
            self._probes_left -= 1
        elif able and self._is_probing(load):
            self._probes_left = PROBE_RUN - 1
            self._probed = {requests[i].id for i in self._random.sample(able, _num_probed(len(able)))}
        else:
            return []
        return [i for i in able if requests[i].id in self._probed]

    def price(self, load: Load, num_asking: int) -> float:
        """Tokens that plain decoding makes in the time of one row of a tree: what a node must be worth at the least."""
        plain = self.cost.step_seconds(load)
        if not self.cost.run.is_known or not num_asking or not plain:
            return 0.0
        rows = float(PRICED_NODES * num_asking)
        more = self.cost.run.seconds(load.num_rows + rows) - self.cost.run.seconds(load.num_rows)
        return self._worth(load) * more / rows / plain

    def _is_probing(self, load: Load) -> bool:
        """Has it been long enough?"""
        step, draft = self.cost.step_seconds(load), self.cost.draft_seconds(_num_probed(load.num_decoding))
        steps = PROBE_RUN * draft / (PROBE_COST * step) if step > 0 else 0.0
        return self._unasked_steps >= min(max(steps, PROBE_EVERY[0]), PROBE_EVERY[1])

    def _worth_asking(self, load: Load, drafting: Drafting) -> list[int]:
        """The best number of requests, those first whom the heads bring most.

        If the first 1, 2, 4, ... are asked, they are taken to be offered what such requests lately were, and of that
        as much is taken as pays.
        """
        weights = [r.draft_quality * room for r, room in zip(drafting.requests, drafting.rooms, strict=True)]
        order = sorted([i for i, weight in enumerate(weights) if weight > 0], key=lambda i: -weights[i])
        if not self.cost.run.is_known:
            return order
        run, rest = self.cost.run, self.cost.rest.seconds(load.num_decoding)
        values = self._gains[bucket(load.num_decoding)].values
        plain, own = self._worth(load), self.cost.extra(load.features)
        best, best_rate = 0, 0.0
        for count in _powers(len(order)):
            asking = order[:count]
            weight = sum([weights[i] for i in asking])
            extra = sum([self.cost.extra(drafting.features[i]) for i in asking])
            tokens, fixed = plain, rest + self.cost.draft.seconds(count)
            stride = PARTS // min(count, PARTS)
            for place in range(0, len(values), stride):
                nodes = (place + stride) / PARTS  # of each request
                tokens += values[place] * weight * stride / PARTS
                seconds = fixed + total(run.seconds(load.num_rows + nodes * count), own + nodes * extra)
                if tokens / seconds > best_rate:
                    best, best_rate = count, tokens / seconds
        if not best:
            return []
        self._promised = log(best_rate * (rest + total(run.seconds(load.num_rows), own)) / plain)
        excess = self._duels[bucket(load.num_decoding)].excess
        return order[:best] if self._promised > log(1 + LEAST_GAIN) + max(excess, 0.0) else []

    def choose(self, load: Load, drafting: Drafting, drafts: Sequence[Draft], row_budget: int) -> list[int]:
        """How many nodes of each draft are verified: together at most `row_budget`."""
        offers = [(-value, i) for i, draft in enumerate(drafts) for value in draft.values]
        num_offered = len(offers)
        offers.sort()
        taken = offers[: self._best_number(load, drafting, offers[: max(row_budget, 0)])]
        counts = [0] * len(drafts)
        for _, i in taken:
            counts[i] += 1
        values = [-cost for cost, _ in taken]
        if sum(values) < LEAST_GAIN * load.num_decoding:
            self._rests_from_copies.start(load.num_decoding, min(load.num_decoding // 2, COPIES_REST))
        self._learn(load, drafting, drafts, counts)
        self._note(load, drafting.num_asking, num_offered, values)
        return counts

    def note_control(self, load: Load) -> None:
        """Remember that this step was plain on purpose."""
        self.decisions.append(
            Decision(load.num_decoding, load.num_rows, 0, 0, 0, None, float(load.num_decoding), is_control=True)
        )

    def _best_number(self, load: Load, drafting: Drafting, offers: Sequence[tuple[float, int]]) -> int:
        """Of nodes, best first: (minus the value, whose)."""
        if not self.cost.run.is_known or not offers:
            return len(offers)
        seconds = self.cost.run.line(load.num_rows, len(offers))
        extras = [self.cost.extra(features) for features in drafting.features]
        tokens, extra = self._worth(load), self.cost.extra(load.features)
        rest = self.cost.rest.seconds(load.num_decoding) + self.cost.draft_seconds(drafting.num_asking)
        best, best_rate = 0, tokens / (rest + total(seconds[0], extra))
        if not drafting.num_asking:  # else it is part of asking
            rest += self.cost.tree.seconds(load.num_decoding)
        for count, (cost, i) in enumerate(offers, 1):
            tokens -= cost
            extra += extras[i]
            rate = tokens / (rest + total(seconds[count], extra))
            if rate > best_rate:
                best, best_rate = count, rate
        return best

    def _worth(self, load: Load) -> float:
        """Tokens that the step is worth without trees.

        Rows of prompts count as many tokens as plain decoding would make in their time, so that a node has to pay as
        it would without them and does not live on the time that they take anyway.
        """
        if load.is_pure:
            return float(load.num_decoding)
        return load.num_decoding * self.cost.step_seconds(load) / self.cost.step_seconds(load.decoding())

    def _learn(self, load: Load, drafting: Drafting, drafts: Sequence[Draft], counts: Sequence[int]) -> None:
        """What the heads brought to those who asked, where there was room for it."""
        self._nodes_per_request += FORGETTING * (sum(counts) / max(len(counts), 1) - self._nodes_per_request)
        asking = [i for i, asks in enumerate(drafting.asks) if asks is not None]
        if not asking:
            return
        room = sum([drafting.rooms[i] for i in asking])
        offers = {i: _offered(drafts[i]) for i in asking}
        profile = _profile(list(offers.values()))
        self._gains[bucket(load.num_decoding)].learn([value * len(asking) / room for value in profile])
        mean = sum(map(sum, offers.values())) / room
        if mean > 0:
            for i, values in offers.items():
                request, quality = drafting.requests[i], sum(values) / drafting.rooms[i] / mean
                request.draft_quality += FORGETTING * (min(quality, MAX_QUALITY) - request.draft_quality)

    def _note(self, load: Load, num_asking: int, num_offered: int, values: Sequence[float]) -> None:
        least = values[-1] if values else None
        expected = load.num_decoding + sum(values)
        self.decisions.append(
            Decision(
                load.num_decoding,
                load.num_rows,
                num_asking,
                num_offered,
                len(values),
                least,
                expected,
                is_control=False,
            )
        )


class StaticController(Controller):
    """Everybody gets all they may, cut evenly where rows or slots are short: for comparison."""

    def took(self, load: Load, expected_tokens: float, seconds: float, *, has_asked: bool) -> None:
        """Nothing follows from it."""

    def considers_heads(self, num_decoding: int) -> bool:
        return True

    def considers_copies(self, num_decoding: int) -> bool:
        return True

    def ask(self, load: Load, drafting: Drafting) -> list[float | None]:
        return [0.0 if room > 0 else None for room in drafting.rooms]

    def choose(self, load: Load, drafting: Drafting, drafts: Sequence[Draft], row_budget: int) -> list[int]:
        """Who wants little is served first."""
        wanted = [len(draft.values) for draft in drafts]
        counts, left = [0] * len(drafts), max(row_budget, 0)
        for served, i in enumerate(sorted(range(len(drafts)), key=lambda i: wanted[i])):
            counts[i] = min(wanted[i], left // (len(drafts) - served))
            left -= counts[i]
        taken = [value for draft, count in zip(drafts, counts, strict=True) for value in draft.values[:count]]
        self._nodes_per_request += FORGETTING * (len(taken) / max(len(counts), 1) - self._nodes_per_request)
        self._note(load, drafting.num_asking, sum(wanted), sorted(taken, reverse=True))
        return counts


def _num_probed(num_able: int) -> int:
    return min(ceil(num_able / 4), MOST_PROBED)


def _offered(draft: Draft) -> list[float]:
    """Values of the heads' best nodes, as many as are counted."""
    values = [value for value, source in zip(draft.values, draft.sources, strict=True) if source == "heads"]
    return (values + [0.0] * MAX_PROFILED)[:MAX_PROFILED]


def _profile(offers: Sequence[list[float]]) -> list[float]:
    """Values of all offered nodes, best first; each stands for a PARTS-th of a node of each request.

    So it says what choosing among requests is worth, without saying who will be the better one next time.
    """
    values = sorted(itertools.chain.from_iterable(offers), reverse=True)
    return [values[(2 * place + 1) * len(offers) // (2 * PARTS)] for place in range(PARTS * MAX_PROFILED)]


def _powers(most: int) -> list[int]:
    """1, 2, 4, ..., and `most` itself."""
    return [*(1 << i for i in range(most.bit_length()) if 1 << i < most), most] if most else []
