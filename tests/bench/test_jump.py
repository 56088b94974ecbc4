"""A crowd that comes and goes, against a made-up server; and when a speed has settled."""

from __future__ import annotations

import pytest

from tests.bench import jump
from tests.bench.client import BenchError, Prompt, Side
from tests.bench.fake_server import fake_server
from tests.bench.jump import Window, phase

PROMPTS = [Prompt("a"), Prompt("b")]


def windows(*speeds: float) -> list[Window]:
    return [Window(0.5 * i, 0.5 * (i + 1), 0.5 * speed) for i, speed in enumerate(speeds)]


@pytest.mark.parametrize(
    ("speeds", "steady", "settled"),
    [
        ((100, 100, 100, 100), 100, 0.0),
        ((20, 50, 80, 95, 105, 100, 100, 100, 100, 100), 100, 1.0),
        ((20, 100, 20, 20, 100, 100, 100, 100, 100, 100), 100, 1.5),
        ((300, 200, 150, 112, 109, 100, 100, 100, 100, 100), 100, 1.5),
        ((400, 200, 100, 50), 75, None),
        ((100, 100), 100, None),
    ],
)
def test_when_the_speed_has_settled(speeds: tuple[float, ...], steady: float, settled: float | None) -> None:
    found = phase("medusa", 64, windows(*speeds))
    assert (found.steady_speed, found.settled_seconds) == (steady, settled)


def test_no_tokens_at_all_are_an_error() -> None:
    with pytest.raises(BenchError, match=r"medusa says nothing of tokens .* for 2 clients"):
        phase("medusa", 2, windows(10, 0, 0, 0))


async def test_clients_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jump, "PHASE_SECONDS", 0.4)
    monkeypatch.setattr(jump, "WINDOW_SECONDS", 0.1)
    monkeypatch.setattr(jump, "MANY", 8)
    with fake_server() as (port, bodies):
        phases = await jump.jump(Side("medusa", port, "served"), PROMPTS, 9)
    assert [(item.side, item.num_clients) for item in phases] == [("medusa", 2), ("medusa", 8), ("medusa", 2)]
    assert all(item.steady_speed > 0 for item in phases)
    assert {body["messages"][0]["content"] for body in bodies} == {"a", "b"}
    for item in phases:
        assert 4 <= len(item.windows) <= 5
        assert item.windows[0].begin == pytest.approx(0, abs=0.1)
        assert all(a.end == b.begin for a, b in zip(item.windows, item.windows[1:], strict=False))
    assert 7 * len(bodies) >= sum(window.tokens for item in phases for window in item.windows) > 0


async def test_a_failed_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jump, "WINDOW_SECONDS", 0.05)
    with fake_server(status=503) as (port, _), pytest.raises(BenchError, match="medusa answered 503"):
        await jump.jump(Side("medusa", port, "served"), PROMPTS, 9)
