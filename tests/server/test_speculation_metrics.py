"""Series of speculation: what each step drafted, accepted and saved."""

from __future__ import annotations

import pytest

from server.engine.messages import StepStats
from server.metrics import Metrics

STEP = StepStats(
    num_rows=9,
    num_drafts=2,
    num_draft_tokens=7,
    num_accepted_tokens=3,
    accepted_per_depth=(2, 1),
    drafted_per_depth=(4, 2, 1),
    tree_sizes=(5, 2),
    drafted_by_source=(3, 2, 1, 1),
    accepted_by_source=(0, 2, 0, 1),
)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"medusa_{name}", {"model_name": "m", **labels})


@pytest.fixture
def metrics() -> Metrics:
    """After two such steps."""
    metrics = Metrics("m")
    metrics.on_step(STEP)
    metrics.on_step(STEP)
    return metrics


def test_sums(metrics: Metrics) -> None:
    assert value(metrics, "spec_decode_num_drafts_total") == 4
    assert value(metrics, "spec_decode_num_draft_tokens_total") == 14
    assert value(metrics, "spec_decode_num_accepted_tokens_total") == 6


@pytest.mark.parametrize(("name", "counts"), [("accepted", [4, 2, None]), ("draft", [8, 4, 2])])
def test_by_depth(metrics: Metrics, name: str, counts: list[int | None]) -> None:
    series = f"spec_decode_num_{name}_tokens_per_pos_total"
    assert [value(metrics, series, position=str(depth)) for depth in range(3)] == counts


@pytest.mark.parametrize(("name", "counts"), [("accepted", [0, 4, 0, 2]), ("draft", [6, 4, 2, 2])])
def test_by_source(metrics: Metrics, name: str, counts: list[int]) -> None:
    series = f"spec_decode_num_{name}_tokens_by_source_total"
    sources = ("heads", "ngram", "prediction", "grammar")
    assert [value(metrics, series, source=source) for source in sources] == counts


def test_sizes_of_trees(metrics: Metrics) -> None:
    assert value(metrics, "tree_nodes_count") == 4
    assert value(metrics, "tree_nodes_sum") == 14
    assert [value(metrics, "tree_nodes_bucket", le=bound) for bound in ("1.0", "2.0", "4.0", "6.0", "+Inf")] == [
        *(0, 2, 2, 4, 4)
    ]


def test_what_is_saved_and_what_is_lost_only_rise() -> None:
    metrics = Metrics("m")
    for seconds in (0.5, -0.25, 0.0, 1.0, -0.125):
        metrics.on_step(StepStats(num_rows=1, saved_seconds=seconds))
    assert value(metrics, "seconds_saved_total") == 1.5
    assert value(metrics, "seconds_lost_total") == 0.375


def test_series_do_not_grow_with_steps_and_requests(metrics: Metrics) -> None:
    before = metrics.render().count(b"\n")
    for _ in range(50):
        metrics.on_step(STEP)
    assert metrics.render().count(b"\n") == before
