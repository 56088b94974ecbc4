"""Cost curves: what they believe, and how they come to believe it."""

from __future__ import annotations

import random
from itertools import pairwise
from math import exp

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.cost import FEW, LEARNED_AT_ONCE, ROWS, CostModel, Curve, Load, Measured, isotonic, total

NOTHING = (0.0, 0.0, 0.0, 0.0)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 9)), min_size=1, max_size=9))
def test_isotonic_is_the_nearest_that_does_not_fall(points: list[tuple[int, int]]) -> None:
    found = isotonic([value for value, _ in points], [weight for _, weight in points])
    assert all(a <= b + 1e-9 for a, b in pairwise(found))
    # the minimax formula: the greatest of all beginnings' least mean
    n = len(points)

    def mean(some: list[tuple[int, int]]) -> float:
        return sum(value * weight for value, weight in some) / sum(weight for _, weight in some)

    assert found == pytest.approx(
        [max(min(mean(points[j : k + 1]) for k in range(i, n)) for j in range(i + 1)) for i in range(n)]
    )


def test_a_guess_between_gives_way_to_what_was_measured() -> None:
    curve = Curve((1, 2, 4, 64))
    curve.take(64, 0.004)  # and all the others are taken to be as dear
    for _ in range(300):
        curve.take(1, 0.0008)
        curve.take(4, 0.001)
    assert curve.seconds(4) == pytest.approx(0.001, rel=0.05)


def test_unknown_curves_cost_nothing() -> None:
    curve = Curve((1, 2, 4))
    assert (curve.is_known, curve.seconds(3), curve.points()) == (False, 0.0, ())


def test_between_measurements_and_beyond_them_lines_are_drawn() -> None:
    curve = Curve((1, 2, 4, 8, 16, 32))
    curve.measure([(8, 5.0), (1, 1.5)])
    assert [curve.seconds(x) for x in (1, 4, 8, 16)] == pytest.approx([1.5, 3.0, 5.0, 9.0])
    assert curve.seconds(64) == pytest.approx(33.0)
    assert curve.line(3, 5) == pytest.approx([2.5, 3.0, 3.5, 4.0, 4.5, 5.0])
    for start, count in ((30, 4), (2, FEW), (2, FEW + 1), (1, 31), (20, 20)):
        assert curve.line(start, count) == pytest.approx([curve.seconds(start + i) for i in range(count + 1)])


def test_more_rows_never_cost_less() -> None:
    curve = Curve(ROWS)
    curve.measure([(1, 3.0), (2, 2.0), (4, 5.0)])
    seconds = [curve.seconds(x) for x in np.linspace(1, 600, 300)]
    assert seconds == sorted(seconds)
    assert curve.seconds(1) == curve.seconds(2) == 2.5


def test_it_comes_to_the_usual_time_whatever_outliers_there_are() -> None:
    model, source = CostModel(), random.Random(0)
    model.run.measure([(1, 0.010), (8, 0.010)])
    for _ in range(3000):
        rows = source.choice([1, 8])
        seconds = (0.005 if rows == 1 else 0.009) * exp(source.gauss(0, 0.05))
        model.learn_run(rows, NOTHING, seconds * (20 if source.random() < 0.1 else 1))
    assert model.run.seconds(1) == pytest.approx(0.005, rel=0.1)
    assert model.run.seconds(8) == pytest.approx(0.009, rel=0.1)


def test_one_outlier_moves_what_is_well_known_by_little() -> None:
    model = CostModel()
    model.run.measure([(1, 0.005), (8, 0.006)])
    for _ in range(500):
        model.learn_run(4, NOTHING, model.run.seconds(4))
    before = model.run.seconds(4)
    model.learn_run(4, NOTHING, 1.0)
    assert before < model.run.seconds(4) < 1.03 * before


def test_a_slower_machine_changes_no_ratio() -> None:
    model = CostModel()
    model.run.measure([(1, 0.005), (8, 0.008)])
    model.draft.measure([(1, 0.001)])
    model.rest.measure([(1, 0.0004)])
    model.measure_extra("requests", 0.0002)
    for _ in range(100):
        model.learn_run(1, NOTHING, 0.0075)
    assert model.run.seconds(1) == pytest.approx(0.0075, rel=0.05)
    assert model.run.seconds(8) / model.run.seconds(1) == pytest.approx(1.6, rel=0.1)
    assert model.draft.seconds(1) == pytest.approx(0.0015, rel=0.1)
    assert model.rest.seconds(1) == pytest.approx(0.0006, rel=0.1)
    assert dict(model.extra_seconds())["requests"] == pytest.approx(0.0003, rel=0.1)


def test_where_steps_are_rare_they_say_more() -> None:
    moved = []
    for often in (1, 100):
        curve = Curve((1, 8))
        curve.measure([(1, 1.0), (8, 2.0)])
        for _ in range(20):
            for _ in range(often - 1):
                curve.learn(8, 0.0)
            curve.learn(1, 0.0)
        curve.learn(1, 0.3)
        moved.append(curve.seconds(1))
    assert 1 < moved[0] < moved[1]


def test_keys_are_told_apart_from_rows() -> None:
    model, source = CostModel(), random.Random(2)
    model.run.measure([(1, 0.005), (8, 0.008)])
    model.measure_extra("keys", 2e-7)
    for _ in range(6000):
        rows, keys = source.choice([1, 4, 8]), source.choice([0, 1000, 3000])
        model.learn_run(rows, (rows * keys, 0, 0, 0), 0.005 + 0.0004 * (rows - 1) + 8e-7 * rows * keys)
    assert dict(model.extra_seconds())["keys"] == pytest.approx(8e-7, rel=0.15)
    assert model.run_seconds(4, (4 * 2000, 0, 0, 0)) == pytest.approx(0.0062 + 0.0064, rel=0.1)


def test_no_estimate_falls_to_0() -> None:
    assert total(1.0, -5.0) == pytest.approx(0.1)
    model = CostModel()
    model.run.measure([(1, 1e-5), (512, 2e-5)])
    model.measure_extra("keys", 1.0)
    few_keys = (-256.0 * 64, 0, 0, 0)
    model.learn_run(64, few_keys, 1e-5)
    assert model.run_seconds(64, few_keys) > 0


def test_a_step_without_trees_is_its_run_and_the_rest() -> None:
    model = CostModel()
    load = Load(5, 3, 2, (100.0, 2, 0, 0), (40.0, 2, 0, 0))
    assert not load.is_pure
    assert load.decoding() == Load(2, 0, 2, (40.0, 2, 0, 0), (40.0, 2, 0, 0))
    model.run.measure([(1, 0.1), (512, 51.2)])
    model.rest.measure([(1, 0.5)])
    model.measure_extra("keys", 0.01)
    model.measure_extra("requests", 0.1)
    assert model.step_seconds(load) == pytest.approx(0.5 + 1.0 + 0.2 + 0.5)
    assert model.draft_seconds(0) == 0


def test_what_a_step_took_is_learned_by_its_kind() -> None:
    model = CostModel()
    model.run.measure([(1, 0.005), (8, 0.005)])

    def measured(others: float, *, nodes: int = 0, asking: int = 0, is_steady: bool = True) -> Measured:
        return Measured(2, NOTHING, 2, nodes, asking, is_steady, 0.005, 0.0, others)

    kinds = [
        measured(0.001),
        measured(0.0015, nodes=3),
        measured(0.003, nodes=3, asking=2),
        measured(0.9, nodes=3, asking=2, is_steady=False),
    ]
    for step in kinds * (300 * LEARNED_AT_ONCE):
        model.learn(step)
    assert model.rest.seconds(2) == pytest.approx(0.001, rel=0.01)
    assert model.tree.seconds(2) == pytest.approx(0.0005, rel=0.02)
    assert model.draft.seconds(2) == pytest.approx(0.002, rel=0.02)


def test_steps_are_learned_together_but_the_first() -> None:
    model = CostModel()
    model.learn(Measured(1, NOTHING, 1, 0, 0, True, 0.005, 0.0, 0.001))
    assert model.run.seconds(1) == 0.005
    for count in range(LEARNED_AT_ONCE):
        assert model.run.seconds(1) == 0.005, count
        model.learn(Measured(1, NOTHING, 1, 0, 0, True, 0.006, 0.0, 0.001))
    assert model.run.seconds(1) > 0.005
