"""The trees of one step: who may draft, what is guessed, what of it is verified.

Invariants:
- rows and slots that the chains left are never exceeded;
- a request that the runner fails on is marked and gets no tree; the others are not hurt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from server.engine.controller import Bound, Controller, Drafting
from server.engine.cost import FEATURES, USUAL_KEYS, Features, Load
from server.engine.guard import guarded
from server.engine.model import ModelRunner
from server.engine.request import Draft, Request, Work
from server.engine.scheduler import Scheduler


@dataclass(slots=True)
class Trees:
    """What was decided in one step, and what it took."""

    load: Load
    num_nodes: int = 0
    expected_tokens: float = 0.0  # of the step, all requests together
    node_features: Features = (0.0,) * len(FEATURES)
    num_asking: int = 0
    is_steady: bool = True  # see `Drafting`
    draft_seconds: float = 0.0
    is_control: bool = False
    is_settled: bool = False  # a step that says what plain decoding takes


def grow(
    works: Sequence[Work],
    runner: ModelRunner,
    controller: Controller,
    scheduler: Scheduler,
    clock: Callable[[], float],
) -> Trees:
    """Draft for decoding requests and hang what pays below their roots."""
    load = _load(works)
    if not load.num_decoding:
        return Trees(load)
    heads, copies = controller.considers_heads(load.num_decoding), controller.considers_copies(load.num_decoding)
    able = _able(works, runner, heads=heads, copies=copies)
    bounds = controller.bounds([work.request for work in able])
    chosen = [(work, bound) for work, bound in zip(able, bounds, strict=True) if any(bound)]
    is_plain = controller.is_plain(load.num_decoding)
    plain = Trees(load, expected_tokens=float(load.num_decoding), is_settled=is_plain)
    if not chosen and heads and copies:
        return plain
    if controller.is_control_step(load.num_decoding):
        controller.note_control(load)
        return Trees(load, is_control=True, is_settled=controller.is_settled)
    if not chosen:
        return plain
    able, bounds = [work for work, _ in chosen], [bound for _, bound in chosen]
    drafting = _drafting([work.request for work in able], bounds, runner, heads=heads)
    drafting.asks = controller.ask(load, drafting) if heads else [None] * len(able)
    guessing = [
        i
        for i, request in enumerate(drafting.requests)
        if drafting.asks[i] is not None or runner.can_draft(request, heads=False, copies=copies)
    ]
    able, drafting = [able[i] for i in guessing], drafting.only(guessing)
    started = clock()
    drafts = _drafts(able, drafting, runner)
    seconds = clock() - started
    counts = controller.choose(load, drafting, drafts, scheduler.rows_left)
    for work, draft, count in zip(able, drafts, counts, strict=True):
        if count:
            scheduler.place(work, draft.first(count))
    return Trees(
        load,
        sum(counts),
        load.num_decoding + sum([sum(draft.values[:count]) for draft, count in zip(drafts, counts, strict=True)]),
        _summed([(count, row) for count, row in zip(counts, drafting.features, strict=True) if count]),
        drafting.num_asking,
        drafting.is_steady,
        seconds,
        is_settled=is_plain and not any(counts),
    )


def _able(works: Sequence[Work], runner: ModelRunner, *, heads: bool, copies: bool) -> list[Work]:
    """Whose chain ends in a root that there are guesses for."""
    ending = [work for work in works if work.reaches_end]

    def can_draft(requests: Sequence[Request]) -> list[bool]:
        return [runner.can_draft(request, heads=heads, copies=copies) for request in requests]

    found = guarded(can_draft, [work.request for work in ending], runner.check)
    for work, can in zip(ending, found, strict=True):
        work.has_failed = can is None
    return [work for work, can in zip(ending, found, strict=True) if can]


def _drafting(requests: list[Request], bounds: list[Bound], runner: ModelRunner, *, heads: bool) -> Drafting:
    rooms = [
        runner.room_for_heads(request) if heads and bound.guesses else 0.0
        for request, bound in zip(requests, bounds, strict=True)
    ]
    return Drafting(requests, bounds, rooms, [_row(request, request.num_computed) for request in requests])


def _drafts(works: Sequence[Work], drafting: Drafting, runner: ModelRunner) -> list[Draft]:
    """What is guessed for each; nothing for whom the runner has failed on."""

    def draft(some: Sequence[int]) -> list[Draft]:
        requests = [drafting.requests[i] for i in some]
        return runner.draft(requests, [drafting.bounds[i] for i in some], [drafting.asks[i] for i in some])

    found = guarded(draft, range(len(works)), runner.check)
    for work, made in zip(works, found, strict=True):
        work.has_failed = made is None
    return [Draft() if made is None else made for made in found]


def _row(request: Request, num_keys: int) -> Features:
    """Features of one more row of a request, which looks at so many keys."""
    sampling = request.submit.sampling
    return num_keys - USUAL_KEYS, 0, sampling.temperature > 0, sampling.grammar is not None


def _summed(rows: Sequence[tuple[int, Features]]) -> Features:
    """Features of some rows of each kind together."""
    return [sum([count * features[k] for count, features in rows]) for k in range(len(FEATURES))]


def _load(works: Sequence[Work]) -> Load:
    """The rows of a step without its trees."""
    decoding = [(1, _row(work.request, work.start + work.num_chain)) for work in works if work.reaches_end]
    prompts = [work.num_chain - work.reaches_end for work in works]
    keys = sum([count * (work.start + count // 2 - USUAL_KEYS) for work, count in zip(works, prompts, strict=True)])
    of_roots = (1, (0, len(decoding), 0, 0))
    of_prompts = (1, (keys, len(works) - len(decoding), 0, 0))
    return Load(
        num_rows=sum(prompts) + len(decoding),
        num_prompt_rows=sum(prompts),
        num_decoding=len(decoding),
        features=_summed([*decoding, of_roots, of_prompts]),
        decoding_features=_summed([*decoding, of_roots]),
    )
