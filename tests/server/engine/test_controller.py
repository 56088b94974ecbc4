"""Who gets how many nodes."""

from __future__ import annotations

import pytest

from server.engine.controller import Controller
from server.engine.messages import SamplingParams, SpeculationMode, SpeculationParams, Submit
from server.engine.request import Request


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
    assert Controller(5).allot([request(wish) for wish in wishes], budget) == allotted


def test_in_a_crowd_only_those_get_nodes_that_ask() -> None:
    controller = Controller(5, disable_by_batch_size=2)
    assert controller.allot([request()], 10) == [5]
    assert controller.allot([request(), request(3)], 10) == [0, 3]


def test_off_is_off() -> None:
    assert Controller(5).allot([request(mode="off"), request(mode="typical")], 10) == [0, 5]


def constrained(max_nodes: int | None = None, mode: str = "lossless") -> Request:
    sampling = SamplingParams(9, grammar='start: "a"')
    return Request(Submit("r", (1,), sampling, SpeculationParams(mode, max_nodes)), 0, 0.0)  # type: ignore[arg-type]


def test_forced_tokens_are_for_grammars_and_shared_evenly() -> None:
    requests = [constrained(), request(), constrained(), constrained(mode="off"), constrained(6), constrained(0)]
    controller = Controller(4, disable_by_batch_size=1)
    nodes = controller.allot(requests, 100)
    assert nodes == [0, 0, 0, 0, 6, 0]
    assert controller.allot_forced(requests, nodes, 100) == [15, 0, 15, 0, 0, 0]
    assert controller.allot_forced(requests, nodes, 21) == [10, 0, 10, 0, 0, 0]
    assert controller.allot_forced(requests, nodes, -1) == [0] * 6
