"""Cost curves from files, and made-up ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench.client import BenchError
from tests.bench.costs import FLOOR_SECONDS, cost_model, floor_costs, read_costs

CURVE = [{"number": 1, "seconds": 0.01}, {"number": 64, "seconds": 0.02}, {"number": 1024, "seconds": 0.12}]


@pytest.mark.parametrize(("rows", "expected"), [(1, 1), (32, 1), (48, 1.5), (64, 2), (640, 20)])
def test_a_floor_is_flat_then_in_proportion(rows: int, expected: float) -> None:
    model = cost_model(floor_costs(32))
    assert model.run.seconds(rows) == pytest.approx(FLOOR_SECONDS * expected)


def test_a_floor_of_one_row_is_in_proportion_from_the_start() -> None:
    run = cost_model(floor_costs(1)).run
    assert [run.seconds(rows) for rows in (1, 2, 7, 100)] == pytest.approx(
        [FLOOR_SECONDS * rows for rows in (1, 2, 7, 100)]
    )


def test_nothing_but_rows_costs_where_nothing_else_is_named() -> None:
    model = cost_model(floor_costs(8))
    assert model.run_seconds(8, [1000.0, 100.0, 100.0, 100.0]) == pytest.approx(FLOOR_SECONDS, rel=0.02)
    assert (model.draft_seconds(4), model.rest.seconds(4)) == (0, 0)


EXTRA = [["keys", 2.0], ["requests", 3.0], ["sampled rows", 5.0], ["constrained rows", 7.0]]


@pytest.mark.parametrize("extra", [EXTRA, dict(EXTRA)])  # as the engine has it, and as /debug/controller answers
def test_a_file_has_all_that_the_engine_says(tmp_path: Path, extra: object) -> None:
    path = tmp_path / "curve.json"
    path.write_text(json.dumps({"run_curve": CURVE, "draft_curve": CURVE, "rest_curve": CURVE, "extra_seconds": extra}))
    model = cost_model(read_costs(path))
    assert [model.run.seconds(rows) for rows in (1, 544, 2048)] == pytest.approx([0.01, 0.07, 0.226667], rel=1e-4)
    assert model.draft_seconds(64) == model.rest.seconds(64) == pytest.approx(0.02)
    assert model.run_seconds(64, [1.0, 10, 0, 0]) == pytest.approx(32.02)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_file_without_an_object_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "curve.json"
    path.write_text(content)
    with pytest.raises(BenchError, match=r"costs\.py says what a file of curves looks like"):
        read_costs(path)


@pytest.mark.parametrize("costs", [{}, {"run_curve": CURVE[:1]}, {"run_curve": [1, 2]}, {"run_curve": None}])
def test_curves_of_another_shape_are_refused(costs: dict[str, object]) -> None:
    with pytest.raises(BenchError, match="the cost curves cannot be read"):
        cost_model(costs)
