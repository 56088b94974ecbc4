"""The trees of one step: limits hold, and one request's trouble is its own."""

from __future__ import annotations

from collections.abc import Sequence

from fakes import FakeRunner

from server.engine.controller import Bound, Controller, StaticController
from server.engine.cost import USUAL_KEYS, CostModel
from server.engine.messages import SamplingParams, Submit
from server.engine.request import Draft, Request, Work
from server.engine.scheduler import Scheduler
from server.engine.trees import Trees, grow


class Watched(FakeRunner):
    """Copies for everybody; says whom it drafted for, and fails on one."""

    def __init__(self, poison: str = "") -> None:
        super().__init__(100, max_model_len=60)
        self.copies, self.poison = True, poison
        self.drafted: list[str] = []

    def draft(self, requests: Sequence[Request], bounds: Sequence[Bound], asks: Sequence[float | None]) -> list[Draft]:
        if any(request.id == self.poison for request in requests):
            raise ValueError("poison")
        self.drafted += [request.id for request in requests]
        return super().draft(requests, bounds, asks)


def step(
    runner: FakeRunner, controller: Controller, *, count: int = 3, max_rows: int = 64, num_slots: int = 100
) -> tuple[list[Work], Trees]:
    scheduler = Scheduler(num_slots, max_num_seqs=8, max_num_batched_rows=max_rows)
    for i in range(count):
        scheduler.add(Request(Submit(str(i), (i + 1,), SamplingParams(20, temperature=0)), i, 0.0))
    works, _ = scheduler.schedule(0)
    trees = grow(works, runner, controller, scheduler, lambda: 0.0)
    assert scheduler.rows_left >= 0
    assert sum(work.num_chain + len(work.node_tokens) for work in works) <= min(max_rows, num_slots)
    assert trees.num_nodes == sum(len(work.node_tokens) for work in works)
    return works, trees


def static(num_nodes: int = 6, control_share: float = 0.0) -> StaticController:
    return StaticController(CostModel(), num_nodes, control_share=control_share)


def test_rows_and_slots_are_shared_and_never_exceeded() -> None:
    assert step(Watched(), static())[1].num_nodes > 10
    assert step(Watched(), static(), max_rows=8)[1].num_nodes <= 5
    assert step(Watched(), static(), num_slots=7)[1].num_nodes <= 4
    assert step(Watched(), static(), max_rows=3)[1].num_nodes == 0


def test_whom_the_runner_fails_on_is_marked_and_others_get_trees() -> None:
    works, _ = step(Watched("1"), static())
    assert [work.has_failed for work in works] == [False, True, False]
    assert [bool(work.node_tokens) for work in works] == [True, False, True]


def test_a_control_step_drafts_nothing() -> None:
    runner = Watched()
    _, trees = step(runner, static(control_share=1.0))
    assert (trees.is_control, trees.num_nodes, runner.drafted) == (True, 0, [])


def test_control_steps_come_while_all_rest_too() -> None:
    runner, controller = Watched(), Controller(CostModel(), 6, control_share=1.0)
    runner.copies = False
    controller.considers_heads = lambda num_decoding: False  # type: ignore[method-assign]
    assert step(runner, controller)[1].is_control


def test_nobody_is_drafted_for_in_vain() -> None:
    runner = Watched()
    runner.copies, runner.ready = False, {"1"}
    step(runner, static())
    assert runner.drafted == ["1"]
    assert step(runner, static(0))[1].num_nodes == 0
    assert runner.drafted == ["1"]


def test_what_the_step_computes_is_told() -> None:
    _, trees = step(Watched(), static())
    assert (trees.load.num_rows, trees.load.num_decoding, trees.load.is_pure) == (3, 3, True)
    assert list(trees.load.features) == [3 * (1 - USUAL_KEYS), 3, 0, 0]
    assert trees.node_features[0] == trees.num_nodes * -USUAL_KEYS  # nothing was computed before
