"""Who gets how many nodes: the rule against brute force, and what it does when nothing pays."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.controller import (
    CONTROL_RUN,
    FIRST_CONTROLS,
    MAX_FORCED,
    MAX_NODES,
    MOST_PROBED,
    PROBE_COST,
    PROBE_EVERY,
    PROBE_RUN,
    Bound,
    Controller,
    Drafting,
    StaticController,
    bucket,
    bucket_name,
)
from server.engine.cost import CostModel, Load
from server.engine.duel import BLOCK, SETTLING
from server.engine.messages import SamplingParams, SpeculationMode, SpeculationParams, Submit
from server.engine.request import Draft, Request

NOTHING = (0.0, 0.0, 0.0, 0.0)
GOOD = (0.9, 0.8, 0.7, 0.6)


def request(
    max_nodes: int | None = None, mode: SpeculationMode = "lossless", grammar: str | None = None, name: str = "r"
) -> Request:
    sampling = SamplingParams(9, grammar=grammar)
    return Request(Submit(name, (1,), sampling, SpeculationParams(mode, max_nodes)), 0, 0.0)


def cost(points: dict[int, float], *, draft: float = 0.0, rest: float = 0.0) -> CostModel:
    model = CostModel()
    model.run.measure(list(points.items()))
    if draft:
        model.draft.measure([(1, draft)])
    if rest:
        model.rest.measure([(1, rest)])
    return model


def pure(num_decoding: int) -> Load:
    return Load(num_decoding, 0, num_decoding, NOTHING, NOTHING)


def drafting(count: int, *, asks: float | None = 0.0) -> Drafting:
    requests = [request(name=f"r{i}") for i in range(count)]
    return Drafting(requests, [Bound(MAX_NODES, 0)] * count, [1.0] * count, [NOTHING] * count, [asks] * count)


def draft(*values: float) -> Draft:
    return Draft((1,) * len(values), (-1,) * len(values), ("heads",) * len(values), values)


FLAT, STEEP = {1: 1.0, 512: 1.0}, {1: 1.0, 512: 512.0}
values = st.lists(st.floats(0.01, 0.99), max_size=6).map(lambda found: tuple(sorted(found, reverse=True)))


@given(st.lists(values, min_size=1, max_size=4), st.lists(st.floats(1, 2), min_size=3, max_size=3))
def test_the_number_of_nodes_is_the_best_there_is(offers: list[tuple[float, ...]], steps: list[float]) -> None:
    points = {1: 1.0, 4: steps[0], 8: steps[0] * steps[1], 24: steps[0] * steps[1] * steps[2]}
    model = cost(points, draft=0.3, rest=0.1)
    load, asked = pure(len(offers)), drafting(len(offers))
    counts = Controller(model, 32).choose(load, asked, [draft(*found) for found in offers], 99)

    def rate(number: int) -> float:
        best = sorted(itertools.chain.from_iterable(offers), reverse=True)[:number]
        seconds = model.run.seconds(load.num_rows + number) + 0.1 + model.draft.seconds(len(offers))
        return (len(offers) + sum(best)) / seconds

    best = max(range(sum(map(len, offers)) + 1), key=rate)
    assert rate(sum(counts)) == pytest.approx(rate(best))
    taken = sorted(
        (value for found, count in zip(offers, counts, strict=True) for value in found[:count]), reverse=True
    )
    assert taken == sorted(itertools.chain.from_iterable(offers), reverse=True)[: sum(counts)]


def test_at_saturation_there_are_none_and_where_rows_are_free_all() -> None:
    for points, number in ((STEEP, 0), (FLAT, 8)):
        counts = Controller(cost(points), 32).choose(pure(2), drafting(2), [draft(*GOOD), draft(*GOOD)], 99)
        assert sum(counts) == number


def test_plateaus_are_used_up() -> None:
    stairs = cost({1: 1.0, 4: 1.0, 5: 3.0, 12: 3.0})
    assert Controller(stairs, 32).choose(pure(1), drafting(1), [draft(0.5, 0.1, 0.01, 0.01)], 99) == [3]


def test_trees_of_copies_must_pay_for_themselves_beside_their_rows() -> None:
    for more, count in ((0.4, 2), (1.2, 0)):
        model = cost({1: 1.0, 512: 52.0}, rest=0.1)
        model.tree.measure([(1, more)])
        assert Controller(model, 32).choose(pure(1), drafting(1, asks=None), [draft(0.5, 0.45)], 99) == [count]


def test_rows_are_not_exceeded() -> None:
    controller = Controller(cost(FLAT), 32)
    assert controller.choose(pure(2), drafting(2), [draft(*GOOD), draft(0.95, 0.1)], 3) == [2, 1]
    assert controller.choose(pure(2), drafting(2), [draft(*GOOD), draft(0.95, 0.1)], -4) == [0, 0]


def test_prompts_in_the_step_make_no_node_cheaper() -> None:
    model, offers = cost({1: 1.0, 512: 100.0}), [draft(0.25, 0.15, 0.12)]
    alone = Controller(model, 32).choose(pure(1), drafting(1), offers, 99)
    beside = Controller(model, 32).choose(Load(300, 299, 1, NOTHING, NOTHING), drafting(1), offers, 99)
    assert beside == alone == [1]


def test_bounds_are_the_requests_own_or_the_servers() -> None:
    requests = [
        request(),
        request(5),
        request(1000),
        request(mode="off"),
        request(grammar="g"),
        request(10, grammar="g"),
    ]
    bounds = Controller(CostModel(), 8).bounds(requests)
    assert bounds == [Bound(8, 0), Bound(5, 0), Bound(63, 0), Bound(0, 0), Bound(8, MAX_FORCED), Bound(10, 0)]
    assert Controller(CostModel(), 0).bounds([request(), request(3)]) == [Bound(0, 0), Bound(3, 0)]


def test_heads_are_asked_where_they_pay_at_a_price() -> None:
    controller = Controller(cost({1: 1.0, 101: 11.0}, draft=0.2), 32)
    (price,) = controller.ask(pure(1), drafting(1, asks=None))
    assert price == pytest.approx(0.1)
    nobody = drafting(2, asks=None)
    nobody.rooms = [0.0, 0.0]
    assert controller.ask(pure(2), nobody) == [None, None]


def test_where_they_do_not_pay_they_rest_and_few_are_probed() -> None:
    controller = Controller(cost(STEEP, draft=1.0), 32)  # probes take 1 s, the least of steps 8
    load, asked, considered = pure(8), [], 0
    for _ in range(4000):
        if controller.considers_heads(8):
            considered += 1
            asked.append(sum(ask is not None for ask in controller.ask(load, drafting(8, asks=None))))
    runs = [list(run) for is_probe, run in itertools.groupby(asked, bool) if is_probe]
    assert all(run == [2] * PROBE_RUN for run in runs)
    assert len(runs) * PROBE_RUN == pytest.approx(4000 * 8 * PROBE_COST, rel=0.1)
    assert considered < 4000 / 8 + PROBE_RUN * len(runs)


def test_in_a_crowd_few_are_probed() -> None:
    controller = Controller(cost(STEEP, draft=1.0), 32)
    found = {sum(ask is not None for ask in controller.ask(pure(64), drafting(64, asks=None))) for _ in range(1000)}
    assert found == {0, MOST_PROBED}


def test_probes_ask_the_same_and_only_the_first_has_much_to_catch_up_with() -> None:
    controller = Controller(cost(STEEP, draft=4.0), 32)
    probes, steady = [], []
    while len(probes) < 2 * PROBE_RUN:
        each = drafting(8, asks=None)
        if controller.considers_heads(8):
            asks = controller.ask(pure(8), each)
            if any(ask is not None for ask in asks):
                probes.append(tuple(i for i, ask in enumerate(asks) if ask is not None))
                steady.append(each.is_steady)
    assert len(set(probes[:PROBE_RUN])) == len(set(probes[PROBE_RUN:])) == 1
    assert steady == [False, *[True] * (PROBE_RUN - 1)] * 2


def test_who_joins_those_who_are_asked_has_to_catch_up() -> None:
    controller = Controller(cost(FLAT), 32)
    steady = []
    for count in (2, 2, 3, 3, 1):
        each = drafting(count, asks=None)
        assert None not in controller.ask(pure(count), each)
        steady.append(each.is_steady)
    assert steady == [False, True, False, True, True]


def test_who_has_no_room_left_is_not_asked_though_it_was_worth_it_a_step_ago() -> None:
    controller = Controller(cost(FLAT), 32)
    assert None not in controller.ask(pure(2), drafting(2, asks=None))
    each = drafting(2, asks=None)
    each.rooms = [1.0, 0.0]
    assert [ask is None for ask in controller.ask(pure(2), each)] == [False, True]


def test_when_they_pay_again_it_is_noticed() -> None:
    controller = Controller(cost({1: 1.0, 512: 52.0}, draft=0.2), 32)
    load, nothing, good = pure(1), draft(0.02), draft(*GOOD)

    def share_asked(found: Draft, steps: int) -> float:
        num_asked = 0
        for _ in range(steps):
            each = drafting(1, asks=None)
            if controller.considers_heads(1):
                each.asks = controller.ask(load, each)
                num_asked += each.num_asking
                controller.choose(load, each, [found if each.num_asking else Draft()], 99)
        return num_asked / steps

    share_asked(nothing, 200)
    assert share_asked(nothing, 500) < 0.05
    share_asked(good, 3000)
    assert share_asked(good, 100) == 1.0


def test_what_was_usual_is_expected_again_without_a_probe() -> None:
    controller = Controller(cost({1: 1.0, 512: 52.0}, draft=0.2), 32)
    load, good, nothing = pure(1), draft(*GOOD), draft(0.02)
    for found in (good, nothing):
        for _ in range(300 if found is good else 40):
            each = drafting(1, asks=None)
            each.asks = controller.ask(load, each)
            controller.choose(load, each, [found if each.num_asking else Draft()], 99)
    assert not drafting_asks(controller)
    steps = next(step for step in range(PROBE_EVERY[1]) if drafting_asks(controller))
    assert 0 < steps < PROBE_EVERY[0]


def drafting_asks(controller: Controller) -> bool:
    """Whether the one request is asked in this step."""
    return controller.considers_heads(1) and controller.ask(pure(1), drafting(1, asks=None)) != [None]


@pytest.mark.parametrize(("room", "rests"), [(0.5, False), (1.0, True)])
def test_a_copy_in_the_way_of_the_heads_starts_no_rest(room: float, rests: bool) -> None:
    controller = Controller(cost(STEEP, draft=1.0), 32)
    each = drafting(1, asks=None)
    each.rooms = [room]
    assert controller.ask(pure(1), each) == [None]
    assert controller.considers_heads(1) is not rests


def test_in_a_crowd_that_copies_nothing_worth_its_row_nobody_looks() -> None:
    controller = Controller(cost(STEEP), 32)
    for size, looks in ((1, True), (20, False)):
        controller.choose(pure(size), drafting(size, asks=None), [draft(0.5)] * size, 99)
        assert controller.considers_copies(size) is looks
    assert controller.considers_copies(40)  # another size, another answer
    assert not controller.considers_copies(20)  # which is remembered for each


@pytest.mark.parametrize(("num_copying", "looks"), [(1, False), (2, True)])
def test_few_copies_in_a_large_crowd_are_not_worth_looking_for(num_copying: int, looks: bool) -> None:
    controller = Controller(cost(FLAT), 32)
    drafts = [draft(0.9)] * num_copying + [Draft()] * (64 - num_copying)
    assert sum(controller.choose(pure(64), drafting(64, asks=None), drafts, 99)) == num_copying
    assert controller.considers_copies(64) is looks


def test_heads_rest_where_the_clock_is_against_them() -> None:
    controller = Controller(cost(FLAT), 32)

    def step(num_decoding: int) -> bool:
        has_heads = controller.considers_heads(num_decoding)
        seconds = 2.0 if has_heads and num_decoding == 4 else 1.0
        controller.took(pure(num_decoding), 1.5 * num_decoding if has_heads else num_decoding, seconds, has_asked=True)
        return has_heads

    for size, least, most in ((4, 0.0, 0.05), (64, 0.95, 1.0)):
        steps = [step(size) for _ in range(40 * BLOCK)]
        assert least <= sum(steps[20 * BLOCK :]) / (20 * BLOCK) <= most


@pytest.mark.parametrize(("seconds", "least", "most"), [(1.2, 0.9, 1.0), (1.8, 0.0, 0.2)])
def test_what_was_promised_and_not_kept_must_be_promised_on_top(seconds: float, least: float, most: float) -> None:
    controller = Controller(cost({1: 1.0, 512: 52.0}, draft=0.2), 32)  # promises a gain of 0.29

    def step() -> bool:
        has_asked = controller.considers_heads(1) and controller.ask(pure(1), drafting(1, asks=None)) != [None]
        controller.took(pure(1), 1.6 if has_asked else 1.0, seconds if has_asked else 1.0, has_asked=has_asked)
        return has_asked

    steps = [step() for _ in range(100 * BLOCK)]
    assert least <= sum(steps[50 * BLOCK :]) / (50 * BLOCK) <= most


def test_steps_in_which_heads_rest_for_a_duel_are_plain_but_the_first() -> None:
    controller = Controller(cost(FLAT), 32)
    found = []
    for _ in range(2 * BLOCK):
        found.append(controller.is_plain(1))
        controller.took(pure(1), 1.0, 1.0, has_asked=controller.considers_heads(1))
    assert found == [False] * (BLOCK + SETTLING) + [True] * (BLOCK - SETTLING)
    assert not controller.is_plain(64)


def test_who_may_have_no_nodes_needs_no_duel() -> None:
    controller = Controller(cost(FLAT), 0)
    for _ in range(10 * BLOCK):
        assert controller.considers_heads(1)
        controller.took(pure(1), 1.0, 1.0, has_asked=True)


def test_of_a_run_of_control_steps_the_first_do_not_count() -> None:
    controller = Controller(CostModel(), 8, control_share=1.0)
    counts = [controller.is_settled for _ in range(CONTROL_RUN) if controller.is_control_step(1)]
    assert counts == [False] * SETTLING + [True] * (CONTROL_RUN - SETTLING)


def test_control_steps_come_in_runs_and_as_often_as_wanted() -> None:
    controller = Controller(CostModel(), 8, control_share=0.05)
    steps = [controller.is_control_step(1) for _ in range(40_000)]
    assert sum(steps) / len(steps) == pytest.approx(0.05, rel=0.25)
    lengths = [len(list(run)) for is_control, run in itertools.groupby(steps) if is_control]
    assert all(length % CONTROL_RUN == 0 for length in lengths[:-1])
    assert not any(Controller(CostModel(), 8).is_control_step(1) for _ in range(1000))


def test_the_first_control_steps_of_each_batch_size_come_sooner() -> None:
    share = 0.05 * FIRST_CONTROLS[1]
    waited: dict[int, list[int]] = {1: [], 64: []}
    for seed in range(200):
        controller = Controller(CostModel(), 8, control_share=0.05, seed=seed)
        for size, waits in waited.items():
            waits.append(next(n for n in itertools.count() if controller.is_control_step(size)))
            while controller.is_control_step(size):
                pass
    for waits in waited.values():
        assert sum(waits) / len(waits) == pytest.approx(CONTROL_RUN * (1 - share) / share, rel=0.3)


def test_what_was_decided_is_told() -> None:
    controller = Controller(cost(FLAT), 32)
    controller.choose(pure(2), drafting(2), [draft(0.5), draft(0.25, 0.2)], 2)
    controller.note_control(pure(3))
    first, second = controller.decisions
    assert (first.num_offered, first.num_taken, first.least_value, first.expected_tokens) == (3, 2, 0.25, 2.75)
    assert (second.is_control, second.num_decoding, second.least_value) == (True, 3, None)


def test_static_trees_take_all_and_are_cut_evenly() -> None:
    controller = StaticController(CostModel(), 8)
    offers = [draft(*GOOD), draft(0.1), draft(*GOOD)]
    assert controller.choose(pure(3), drafting(3), offers, 99) == [4, 1, 4]
    assert controller.choose(pure(3), drafting(3), offers, 5) == [2, 1, 2]
    assert controller.ask(pure(3), drafting(3, asks=None)) == [0.0] * 3


def test_static_trees_have_no_duels() -> None:
    controller = StaticController(CostModel(), 8)
    for _ in range(4 * BLOCK):
        controller.took(pure(1), 1.0, 1.0, has_asked=True)
        assert not controller.is_plain(1)
    assert controller.duels() == ()


def test_rows_kept_from_prompts_are_what_was_lately_taken() -> None:
    controller = Controller(cost(FLAT), 4)
    for _ in range(200):
        controller.choose(pure(2), drafting(2), [draft(0.9, 0.8), draft(0.9, 0.8)], 99)
    assert controller.reserve(10, 100) == pytest.approx(20, abs=1)
    assert controller.reserve(10, 7) == 7


def test_buckets_have_names() -> None:
    assert [bucket_name(bucket(n)) for n in (1, 2, 3, 4, 5, 8, 9, 64, 5000)] == [
        "1", "2", "3-4", "3-4", "5-8", "5-8", "9-16", "33-64", "1025+",
    ]  # fmt: skip
