"""The end of a server: what is refused, what goes on, and in what order things stop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import pytest
import pytest_asyncio
from scripted import ScriptedEngine, app_of, client_of

from server.admission import Admission
from server.drain import Drain
from server.engine.messages import SamplingParams, Submit


class StoppingEngine(ScriptedEngine):
    """Its first `stop` takes as long as is allowed; a second one ends it."""

    def __init__(self, *, is_slow: bool) -> None:
        super().__init__()
        self.num_stops = 0
        self._is_slow = is_slow

    async def stop(self) -> None:
        self.num_stops += 1
        if self._is_slow and self.num_stops == 1:
            await asyncio.Event().wait()


class House:
    def __init__(self, seconds: float, *, is_slow: bool = False) -> None:
        self.admission = Admission()
        self.engine = StoppingEngine(is_slow=is_slow)
        self.left: list[bool] = []
        self.drain = Drain(self.admission, self.engine, seconds, self.left.append)

    def open_request(self) -> Callable[[], None]:
        (ticket,) = self.admission.admit([Submit("a", (1,), SamplingParams(1))])
        return ticket.close


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_open_requests_end_before_the_engine_does() -> None:
    house = House(60)
    close = house.open_request()
    house.drain.on_signal()
    await asyncio.sleep(0.05)
    assert (house.engine.num_stops, house.left) == (0, [])
    close()
    await until(lambda: bool(house.left))
    assert (house.engine.num_stops, house.left) == (1, [False])


async def test_what_is_open_too_long_ends_with_the_engine() -> None:
    house = House(0.05)
    house.open_request()
    house.drain.on_signal()
    await until(lambda: bool(house.left))
    assert (house.engine.num_stops, house.left) == (1, [False])


@pytest.mark.parametrize("is_slow", [False, True])
async def test_a_second_signal_ends_it_at_once(is_slow: bool) -> None:
    house = House(0.01 if is_slow else 60, is_slow=is_slow)
    house.open_request()
    house.drain.on_signal()
    if is_slow:
        await until(lambda: house.engine.num_stops == 1)
    house.drain.on_signal()
    await until(lambda: bool(house.left))
    assert house.left == [True]
    assert house.engine.num_stops == 2


@pytest_asyncio.fixture
async def closing(engine: ScriptedEngine) -> object:
    app = app_of(engine)
    app.state.service.admission.close()
    async with client_of(app) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
async def test_new_requests_are_sent_elsewhere(closing: httpx.AsyncClient, stream: bool) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}], "stream": stream}
    for path, body in (("/v1/completions", {"prompt": "Hi", "stream": stream}), ("/v1/chat/completions", chat)):
        response = await closing.post(path, json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "shutting_down")
        assert response.headers["retry-after"] == "5"


async def test_it_is_alive_and_not_ready(closing: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    assert (await closing.get("/health")).status_code == 200
    assert (await closing.get("/ready")).status_code == 503
    assert (await closing.get("/v1/models")).status_code == 200
    engine.status = "dead"
    assert (await closing.get("/health")).status_code == 503
