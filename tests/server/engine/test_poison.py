"""A request that the runner fails on ends alone: not the others, not the engine, and none of its rows are kept."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from fakes import FakeRunner, reference

from server.engine.controller import Bound
from server.engine.core import Engine
from server.engine.messages import Delta, EngineConfig, SamplingParams, Submit
from server.engine.request import Draft, Outcome, Request, Work

POISON = [9, 9, 9]


class PoisonedRunner(FakeRunner):
    """Fails in one of its methods on the request named `poison`, once it has `after` output tokens."""

    def __init__(self, where: str, after: int = 0) -> None:
        super().__init__(300, max_model_len=60)
        self.where, self.after, self.is_lost = where, after, False

    def _taste(self, where: str, requests: Sequence[Request]) -> None:
        for request in requests:
            if where == self.where and request.id == "poison" and request.num_output >= self.after:
                raise ValueError("poison")

    def check(self) -> None:
        if self.is_lost:
            raise RuntimeError("the device is lost")

    def refusal(self, submit: Submit) -> str | None:
        if self.where == "refusal" and submit.request_id == "poison":
            raise ValueError("poison")
        return None

    def can_draft(self, request: Request, *, heads: bool, copies: bool) -> bool:
        self._taste("can_draft", [request])
        return super().can_draft(request, heads=heads, copies=copies)

    def draft(self, requests: Sequence[Request], bounds: Sequence[Bound], asks: Sequence[float | None]) -> list[Draft]:
        self._taste("draft", requests)
        return super().draft(requests, bounds, asks)

    def run(self, works: Sequence[Work]) -> list[Outcome]:
        self._taste("run", [work.request for work in works])
        return super().run(works)


def submit(name: str, prompt: Sequence[int], max_tokens: int = 20) -> Submit:
    return Submit(name, tuple(prompt), SamplingParams(max_tokens, temperature=0, ignore_eos=True))


def played(engine: Engine, names: Sequence[str]) -> dict[str, list[Delta]]:
    deltas: dict[str, list[Delta]] = {name: [] for name in names}
    refusals = [
        engine.submit(submit(name, POISON if name == "poison" else [len(deltas), i])) for i, name in enumerate(names)
    ]
    news = [delta for delta in refusals if delta is not None]
    for _ in range(1000):
        news += engine.step().deltas
        engine.scheduler.check()
        if not engine.has_work:
            break
    for delta in news:
        deltas[delta.request_id].append(delta)
    return deltas


@pytest.mark.parametrize("names", [("poison",), ("a", "poison", "b")])
@pytest.mark.parametrize(("where", "after"), [("refusal", 0), ("run", 0), ("run", 5), ("draft", 3), ("can_draft", 4)])
def test_only_the_poisonous_request_ends_with_an_error(where: str, after: int, names: tuple[str, ...]) -> None:
    engine = Engine(
        EngineConfig("fake", num_nodes=5, static_trees=True, control_share=0.0), PoisonedRunner(where, after)
    )
    deltas = played(engine, names)
    assert [delta.finish for delta in deltas["poison"] if delta.finish] == ["error"]
    assert "poison" not in (deltas["poison"][-1].error or "")
    for i, name in enumerate(names):
        if name != "poison":
            text = [token for delta in deltas[name] for token in delta.token_ids]
            assert text == reference([len(names), i], 20, ignore_eos=True)
    assert not engine.scheduler.running


def test_rows_of_a_failed_step_are_not_cached() -> None:
    """The fake's pool knows what a slot holds: a wrong prefix would be seen."""
    engine = Engine(EngineConfig("fake", num_nodes=5, static_trees=True, control_share=0.0), PoisonedRunner("run"))
    played(engine, ["poison"])
    assert engine.submit(submit("again", POISON)) is None
    while engine.has_work:
        engine.step()
        engine.scheduler.check()


def test_a_lost_device_is_not_taken_for_a_bad_request() -> None:
    runner = PoisonedRunner("run")
    runner.is_lost = True
    with pytest.raises(RuntimeError, match="lost"):
        played(Engine(EngineConfig("fake"), runner), ["poison"])
