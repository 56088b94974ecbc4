"""What /debug/controller says: all that the engine told, and before that nothing in the same shape."""

from __future__ import annotations

from dataclasses import fields

import httpx
import pytest
from pydantic import BaseModel
from scripted import ScriptedEngine, app_of, client_of
from states import STATE

from server import controller_answers as answers
from server.engine import messages
from server.options import DoorOptions

EMPTY = {
    "run_curve": [],
    "draft_curve": [],
    "rest_curve": [],
    "tree_curve": [],
    "extra_seconds": {},
    "calibration": [],
    "calibration_error": None,
    "speedups": [],
    "decisions": [],
    "duels": [],
}
FULL = {
    "run_curve": [{"number": 1, "seconds": 0.01}, {"number": 16, "seconds": 0.02}],
    "draft_curve": [{"number": 2, "seconds": 0.003}],
    "rest_curve": [{"number": 4, "seconds": 0.0005}],
    "tree_curve": [{"number": 8, "seconds": 0.0007}],
    "extra_seconds": {"keys": 1e-8, "sampled rows": 5e-5},
    "calibration": [{"kind": "greedy", "depth": 1, "rank": 2, "given": 0.25, "right": 0.375, "num_seen": 40.0}],
    "calibration_error": 0.0625,
    "duels": [{"batch": "3-4", "ratio": 0.875, "num_compared": 7, "has_won": False}],
    "speedups": [
        {"batch": "1", "ratio": 1.75, "low": 1.5, "high": 2.0, "num_steps": 300.0, "num_control_steps": 3.0},
        {"batch": "all", "ratio": 1.25, "low": 1.125, "high": 1.375, "num_steps": 900.0, "num_control_steps": 8.0},
    ],
}
LATEST = {
    "num_decoding": 9,
    "num_rows": 9,
    "num_asking": 0,
    "num_offered": 0,
    "num_taken": 0,
    "least_value": None,
    "expected_tokens": 9.0,
    "is_control": True,
}


async def test_before_the_first_state(client: httpx.AsyncClient) -> None:
    response = await client.get("/debug/controller")
    assert (response.status_code, response.json()) == (200, EMPTY)
    answers.ControllerAnswer.model_validate(response.json(), strict=True)


async def test_the_last_state(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.controller = STATE
    body = (await client.get("/debug/controller")).json()
    answers.ControllerAnswer.model_validate(body, strict=True)
    decisions = body.pop("decisions")
    assert body == FULL
    assert [decision["num_taken"] for decision in decisions] == [8, 0, 0]
    assert decisions[-1] == LATEST


async def test_it_is_told_while_the_engine_is_down(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.controller, engine.status = STATE, "dead"
    assert (await client.get("/debug/controller")).json()["calibration_error"] == 0.0625


async def test_it_needs_a_key_where_metrics_need_none() -> None:
    app = app_of(ScriptedEngine(), options=DoorOptions(api_keys=("sk-first",)))
    async with client_of(app) as client:
        assert (await client.get("/metrics")).status_code == 200
        assert (await client.get("/debug/controller")).status_code == 401
        headers = {"authorization": "Bearer sk-first"}
        assert (await client.get("/debug/controller", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("message", "answer"),
    [
        (messages.ControllerState, answers.ControllerAnswer),
        (messages.CurvePoint, answers.CurvePointAnswer),
        (messages.CalibrationCell, answers.CalibrationCellAnswer),
        (messages.Speedup, answers.SpeedupAnswer),
        (messages.Decision, answers.DecisionAnswer),
    ],
)
def test_every_field_is_told(message: type, answer: type[BaseModel]) -> None:
    assert [field.name for field in fields(message)] == list(answer.model_fields)
