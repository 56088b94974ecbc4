"""Who gets how many nodes."""

from __future__ import annotations

import pytest

from server.engine.controller import Controller
from server.engine.messages import SamplingParams, SpeculationMode, SpeculationParams, Submit
from server.engine.request import Request

LONG = (0.95, 0.9, 0.85, 0.7, 0.6, 0.5, 0.4, 0.3)


def request(max_nodes: int | None = None, mode: SpeculationMode = "lossless") -> Request:
    return Request(Submit("r", (1,), SamplingParams(9), SpeculationParams(mode, max_nodes)), 0, 0.0)


@pytest.mark.parametrize(
    ("wishes", "budget", "allotted"),
    [
        ([None, None], 100, [5, 5]),
        ([None, 2, 0], 100, [5, 2, 0]),
        ([1000], 100, [63]),
        ([None, None, None], 7, [2, 2, 3]),
        ([63, 4, 4], 40, [32, 4, 4]),
        ([4, 0, 0, 0], 4, [4, 0, 0, 0]),
        ([None], -3, [0]),
        ([], 10, []),
    ],
)
def test_wishes_are_met_as_far_as_rows_last(wishes: list[int | None], budget: int, allotted: list[int]) -> None:
    assert Controller(5).allot([request(wish) for wish in wishes], budget, [()] * len(wishes)) == allotted


def test_in_a_crowd_only_those_get_nodes_that_ask() -> None:
    controller = Controller(5, disable_by_batch_size=2)
    assert controller.allot([request()], 10, [()]) == [5]
    assert controller.allot([request(), request(3)], 10, [(), ()]) == [0, 3]


def test_off_is_off() -> None:
    assert Controller(5).allot([request(mode="off"), request(mode="typical")], 10, [LONG, ()]) == [0, 5]


def test_who_can_copy_much_gets_more() -> None:
    assert Controller(5).allot([request(), request(), request(3)], 99, [LONG, LONG[:2], LONG]) == [8, 5, 3]
    assert Controller(5).allot([request(), request()], 10, [LONG, ()]) == [5, 5]


def test_in_a_crowd_sure_copies_are_made() -> None:
    controller = Controller(5, disable_by_batch_size=2)
    assert controller.allot([request(), request()], 99, [LONG, (0.6, 0.5)]) == [4, 0]


def test_without_heads_there_is_what_can_be_copied() -> None:
    controller = Controller(5, has_heads=False)
    assert controller.allot([request(), request(), request(6)], 99, [LONG[:3], (), LONG[:2]]) == [3, 0, 2]


def test_no_nodes_is_plain_decoding() -> None:
    assert Controller(0).allot([request(), request(3)], 99, [LONG, LONG]) == [0, 3]


def constrained(max_nodes: int | None = None, mode: str = "lossless") -> Request:
    sampling = SamplingParams(9, grammar='start: "a"')
    return Request(Submit("r", (1,), sampling, SpeculationParams(mode, max_nodes)), 0, 0.0)  # type: ignore[arg-type]


def test_forced_tokens_are_for_grammars_and_shared_evenly() -> None:
    requests = [constrained(), request(), constrained(), constrained(mode="off"), constrained(6), constrained(0)]
    controller = Controller(4, disable_by_batch_size=1)
    nodes = controller.allot(requests, 100, [()] * len(requests))
    assert nodes == [0, 0, 0, 0, 6, 0]
    assert controller.allot_forced(requests, nodes, 100) == [15, 0, 15, 0, 0, 0]
    assert controller.allot_forced(requests, nodes, 21) == [10, 0, 10, 0, 0, 0]
    assert controller.allot_forced(requests, nodes, -1) == [0] * 6
