"""Means, spreads and verdicts."""

from __future__ import annotations

import pytest

from models.train.experiments.cell import Cell
from models.train.experiments.report import against, by_model, mean_curve, spread


def test_the_spread_is_the_samples_standard_deviation() -> None:
    assert spread([1.0, 3.0]) == "2.00 ± 1.41"
    assert spread([0.12345], 3) == "0.123 (one seed)"


@pytest.mark.parametrize(
    ("ours", "base", "said"),
    [
        ([3.0, 3.2], [1.0, 1.2], "- more: +2.00; as the paper says."),
        ([1.0, 1.2], [3.0, 3.2], "- more: -2.00; **contradicts the paper**."),
        ([1.0, 3.0], [1.0, 1.2], "- more: +0.90; not told apart: the seeds differ as much."),
        ([1.0, 1.0], [1.5, 0.0], "- more: +0.25; not told apart: the seeds differ as much."),
        ([1.0, 1.2], [1.3, 1.5], "- more: -0.30; not told apart: the seeds differ as much."),
        ([2.0], [1.0], "- more: +1.00; one seed cannot tell."),
        ([2.0, 2.1], [1.0], "- more: +1.05; as the paper says."),
    ],
)
def test_a_verdict_needs_more_than_the_seeds_differ(ours: list[float], base: list[float], said: str) -> None:
    assert against("more", ours, base) == said


def test_seeds_of_one_model_come_together() -> None:
    results = {
        Cell("a", 1, 0): {"curve": [[5, [1.0, 9.0]], [10, [2.0, 8.0]]]},
        Cell("a", 2, 0): {"curve": []},
        Cell("a", 1, 1): {"curve": [[5, [3.0, 9.0]], [10, [5.0, 8.0]]]},
    }
    kinds = by_model(results)
    assert {key: len(cells) for key, cells in kinds.items()} == {("a", 1): 2, ("a", 2): 1}
    assert mean_curve(kinds["a", 1], 0) == [(5, 2.0), (10, 3.5)]
