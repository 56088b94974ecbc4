"""Every series says what its name says."""

from __future__ import annotations

from time import process_time

import httpx
import pytest
from scripted import EOS, MODEL, ScriptedEngine, say

from server.engine.messages import RequestStats, SpeculationStats, StepStats
from server.metrics import PHASES, Metrics, RequestTimer


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"medusa_{name}", {"model_name": "m", **labels})


def test_steps() -> None:
    metrics = Metrics("m")
    step = StepStats(
        num_running=3,
        num_waiting=2,
        kv_cache_usage=0.5,
        num_rows=20,
        num_prompt_rows=10,
        step_seconds=0.004,
        model_seconds=0.003,
        kernel_seconds=0.001,
        draft_seconds=0.0005,
        forward_seconds=0.002,
        message_seconds=0.0005,
        num_preemptions=1,
        num_drafts=2,
        num_draft_tokens=7,
        num_accepted_tokens=3,
        prefix_cache_queries=10,
        prefix_cache_hits=4,
    )
    metrics.on_step(step)
    metrics.on_step(step)
    assert value(metrics, "num_requests_running") == 3
    assert value(metrics, "num_requests_waiting") == 2
    assert value(metrics, "kv_cache_usage_perc") == 0.5
    assert value(metrics, "num_preemptions_total") == 2
    assert value(metrics, "prefix_cache_queries_total") == 20
    assert value(metrics, "prefix_cache_hits_total") == 8
    assert value(metrics, "iteration_tokens_total_sum") == 2 * (10 + 3 + 3)
    assert value(metrics, "step_rows_sum") == 40
    assert value(metrics, "step_seconds_sum") == pytest.approx(0.008)
    parts = [value(metrics, "engine_seconds_total", part=part) for part in ("kernels", "model", "engine", "messages")]
    assert parts == pytest.approx([0.002, 0.004, 0.002, 0.001])
    phases = [value(metrics, "step_phase_seconds_total", phase=phase) for phase in PHASES]
    assert phases == pytest.approx([0.001, 0.004, 0.001, 0.002, 0.001])
    assert sum(phases) == pytest.approx(sum(parts)) == pytest.approx(2 * (0.004 + 0.0005))


def test_clocks_that_disagree_do_no_harm() -> None:
    metrics = Metrics("m")
    seconds = {"step_seconds": 0.002, "model_seconds": 0.002, "kernel_seconds": 0.0021, "forward_seconds": 0.0021}
    metrics.on_step(StepStats(num_rows=1, **seconds))
    assert value(metrics, "step_phase_seconds_total", phase="verify") == 0
    assert value(metrics, "engine_seconds_total", part="kernels") == pytest.approx(0.0021)
    assert value(metrics, "engine_seconds_total", part="model") == 0


def test_the_api_processs_own_cpu_is_told() -> None:
    metrics = Metrics("m")
    before = metrics.registry.get_sample_value("process_cpu_seconds_total")
    assert before is not None
    deadline = process_time() + 0.05
    while process_time() < deadline:
        pass
    after = metrics.registry.get_sample_value("process_cpu_seconds_total")
    assert after is not None
    assert after > before


def test_idle_steps_only_set_gauges() -> None:
    metrics = Metrics("m")
    metrics.on_step(StepStats(num_waiting=1))
    assert value(metrics, "num_requests_waiting") == 1
    assert value(metrics, "step_seconds_count") == 0


def test_a_restart_empties_the_engine() -> None:
    metrics = Metrics("m")
    metrics.on_step(StepStats(num_running=3, num_waiting=2, kv_cache_usage=0.5))
    metrics.on_restart()
    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    assert [value(metrics, name) for name in gauges] == [0, 0, 0]
    assert value(metrics, "engine_restarts_total") == 1


def test_tokens_of_a_step_share_its_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.5, 2.0, 2.3, 3.0])
    monkeypatch.setattr("server.metrics.perf_counter", lambda: next(times))
    metrics = Metrics("m")
    timer = RequestTimer(metrics, 1.0, num_prompt_tokens=7, max_tokens=9)
    for count in (1, 0, 2, 3):
        timer.tokens(count)
    timer.end("stop", None)
    assert value(metrics, "time_to_first_token_seconds_sum") == pytest.approx(0.5)
    assert value(metrics, "inter_token_latency_seconds_sum") == pytest.approx(0.8)
    assert value(metrics, "inter_token_latency_seconds_count") == 5
    assert value(metrics, "e2e_request_latency_seconds_sum") == pytest.approx(2.0)
    assert value(metrics, "prompt_tokens_total") == 7
    assert value(metrics, "generation_tokens_total") == 6
    assert value(metrics, "request_queue_time_seconds_count") == 0


@pytest.mark.parametrize(
    ("num_output", "num_steps", "taus"),
    [(10, 9, [1.0]), (10, 3, [3.0]), (1, 0, []), (0, 0, [])],
)
def test_tokens_per_step(num_output: int, num_steps: int, taus: list[float]) -> None:
    """The first token is the prompt's step's, which is none of them: plain decoding has exactly 1."""
    metrics = Metrics("m")
    speculation = SpeculationStats(num_steps=num_steps)
    timer = RequestTimer(metrics, 1.0, num_prompt_tokens=7, max_tokens=9)
    timer.end("stop", RequestStats(7, 0, num_output, 0, 0.0, 0.0, 0.0, speculation))
    assert value(metrics, "request_tokens_per_step_count") == len(taus)
    assert value(metrics, "request_tokens_per_step_sum") == sum(taus)


async def test_requests(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    """vLLM's own check: ten requests of ten tokens."""
    engine.script = lambda submit: say(submit, [*b"123456789", EOS], finish="stop")
    for _ in range(5):
        await client.post("/v1/completions", json={"prompt": "Hi", "n": 2})
    page = (await client.get("/metrics")).text

    def read(name: str, labels: str = "") -> float:
        start = f'medusa_{name}{{{labels}model_name="{MODEL}"}} '
        return float(next(line for line in page.splitlines() if line.startswith(start)).removeprefix(start))

    assert read("time_to_first_token_seconds_count") == 10
    assert read("inter_token_latency_seconds_count") == 90
    assert read("e2e_request_latency_seconds_count") == 10
    assert read("generation_tokens_total") == 100
    assert read("prompt_tokens_total") == 20
    assert read("request_success_total", 'finished_reason="stop",') == 10
    assert read("request_success_total", 'finished_reason="abort",') == 0
    assert read("request_queue_time_seconds_sum") == pytest.approx(1)
    assert read("request_inference_time_seconds_sum") == pytest.approx(5)
    assert read("request_prompt_tokens_sum") == 20
    assert read("request_generation_tokens_sum") == 100
    assert read("request_params_n_sum") == 10
    assert read("request_params_max_tokens_sum") == 160
