"""The series of the last state, and none where nothing is known."""

from __future__ import annotations

from dataclasses import replace

from prometheus_client.parser import text_string_to_metric_families
from states import STATE

from server.engine.messages import StepStats
from server.metrics import Metrics


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"medusa_{name}", {"model_name": "m", **labels})


def samples(metrics: Metrics) -> dict[str, int]:
    """How many samples each series of the controller has."""
    starts = ("speedup", "step_cost", "draft_cost", "rest_cost", "tree_cost", "extra_cost", "calibration", "controller")
    families = text_string_to_metric_families(metrics.render().decode())
    ours = (family for family in families if family.name.startswith(tuple(f"medusa_{start}" for start in starts)))
    return {family.name.removeprefix("medusa_"): len(family.samples) for family in ours}


def told() -> Metrics:
    metrics = Metrics("m")
    metrics.on_step(StepStats(controller=STATE))
    return metrics


def test_speedups() -> None:
    metrics = told()
    for name, alone, together in (("", 1.75, 1.25), ("_low", 1.5, 1.125), ("_high", 2.0, 1.375)):
        assert value(metrics, f"speedup_ratio{name}", batch="1") == alone
        assert value(metrics, f"speedup_ratio{name}", batch="all") == together


def test_costs() -> None:
    metrics = told()
    assert value(metrics, "step_cost_seconds", rows="1") == 0.01
    assert value(metrics, "step_cost_seconds", rows="16") == 0.02
    assert value(metrics, "draft_cost_seconds", requests="2") == 0.003
    assert value(metrics, "rest_cost_seconds", requests="4") == 0.0005
    assert value(metrics, "tree_cost_seconds", requests="8") == 0.0007
    assert value(metrics, "extra_cost_seconds", feature="keys") == 1e-8
    assert value(metrics, "calibration_error") == 0.0625


def test_decisions_are_means_without_control_steps() -> None:
    metrics = told()
    assert value(metrics, "controller_requests_decoding") == 3
    assert value(metrics, "controller_requests_asking") == 1.5
    assert value(metrics, "controller_nodes_offered") == 25
    assert value(metrics, "controller_nodes_taken") == 4
    assert value(metrics, "controller_least_value") == 0.25
    assert value(metrics, "controller_tokens_expected") == 5


def test_the_last_state_stays_until_the_next() -> None:
    metrics = told()
    metrics.on_step(StepStats())
    assert value(metrics, "calibration_error") == 0.0625
    metrics.on_step(StepStats(controller=replace(STATE, speedups=STATE.speedups[1:], calibration_error=None)))
    assert value(metrics, "calibration_error") is None
    assert value(metrics, "speedup_ratio", batch="1") is None
    assert value(metrics, "speedup_ratio", batch="all") == 1.25


def test_what_is_not_known_has_no_sample() -> None:
    metrics = told()
    families = samples(metrics)
    assert len(families) == 15
    assert all(families.values())
    metrics.on_restart()
    assert samples(metrics) == dict.fromkeys(families, 0) == samples(Metrics("m"))
