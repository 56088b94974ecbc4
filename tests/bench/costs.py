"""Cost curves for the simulator: an engine's own, those in a file, or made up. They become the engine's `CostModel`.

A file has the fields of the engine's `ControllerState`, of which these are used here:

    {"run_curve": [{"number": 1, "seconds": 0.01}, ...], "draft_curve": [...], "rest_curve": [...],
     "tree_curve": [...], "extra_seconds": [["keys", 1e-8], ...]}

The curves are seconds by rows, by requests that the heads guess for, and twice by requests. Only the first is needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from server.engine.cost import FEATURES, CostModel, Curve
from tests.bench.client import BenchError

SHAPE = "tests/bench/costs.py says what a file of curves looks like"
FLOOR_SECONDS = 0.01  # of a step that is all floor; what is compared does not depend on it


def read_costs(path: Path) -> dict[str, Any]:
    """Raises BenchError if it is no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BenchError(f"{path} is no JSON ({error}); {SHAPE}") from error
    if not isinstance(found, dict):
        raise BenchError(f"{path} holds no JSON object; {SHAPE}")
    return found


def floor_costs(num_rows: int) -> dict[str, Any]:
    """Steps that take the same time up to so many rows, and from there on a time proportional to them."""
    points = [(1, 1.0), (num_rows, 1.0), (2 * num_rows, 2.0)]
    return {"run_curve": [{"number": x, "seconds": FLOOR_SECONDS * y} for x, y in points[num_rows == 1 :]]}


def cost_model(costs: Mapping[str, Any]) -> CostModel:
    """Raises BenchError where curves are missing or of another shape."""
    try:
        model = CostModel()
        model.run = _curve(costs["run_curve"])
        for name in FEATURES:
            model.measure_extra(name, float(dict(costs.get("extra_seconds", ())).get(name, 0.0)))
        for name in ("draft", "rest", "tree"):
            if points := costs.get(f"{name}_curve"):
                setattr(model, name, _curve(points))
    except (KeyError, TypeError, ValueError) as error:
        raise BenchError(f"the cost curves cannot be read ({error!r}); {SHAPE}") from error
    return model


def _curve(points: Sequence[Mapping[str, Any]]) -> Curve:
    """Linear between its points, and beyond the last two of them."""
    measured = sorted((int(point["number"]), float(point["seconds"])) for point in points)
    if len(measured) < 2 or measured[0][1] <= 0:
        raise ValueError("a curve needs two points of more than no time")
    curve = Curve([number for number, _ in measured])
    curve.measure(measured)
    return curve
