"""Every Prometheus series. vLLM's names and buckets with `medusa_` for `vllm:`, and a few of our own.

Invariants:
- one registry per app instance; nothing is registered globally;
- every choice that is begun is counted exactly once in `medusa_request_success_total`, however it ends;
- no label's values grow with requests.
Series of engine steps come from `on_step`, series of requests from `RequestTimer`, series of HTTP from `http`; those of
speculation are declared in `speculation_metrics`, those of the controller in `controller_metrics`.
"""

from __future__ import annotations

from time import perf_counter
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from server.admission import Refusal
from server.controller_metrics import ControllerMetrics
from server.engine.messages import FinishReason, RequestStats, StepStats
from server.histogram import RepeatedHistogram
from server.speculation_metrics import SpeculationMetrics

ENGINE_PARTS: Final = ("kernels", "model", "engine", "messages")
PHASES: Final = ("draft", "forward", "verify", "engine", "messages")
FINISH_REASONS: Final[tuple[FinishReason, ...]] = ("stop", "length", "abort", "error")
REFUSALS: Final[tuple[Refusal, ...]] = ("requests", "tokens", "key")
TTFT: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
GAP: Final = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
LATENCY: Final = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
TOKENS: Final = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
ROWS: Final = (1.0, *(float(2**power) for power in range(3, 15)))
STEP: Final = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
STEP_ROWS: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0)
CHOICES: Final = (1.0, 2.0, 5.0, 10.0, 20.0)
TAU: Final = (1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0)


class Metrics:
    """One application's series. `on_step` and `on_restart` are for the engine client, `render` is for `/metrics`."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._declare_engine()
        self._speculation = SpeculationMetrics(self.registry, model_name)
        self._controller = ControllerMetrics(model_name)
        self.registry.register(self._controller)
        self._declare_requests()
        self._declare_http()

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"medusa_{name}", text, ["model_name"], registry=self.registry).labels(self._model_name)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"medusa_{name}", text, ["model_name"], registry=self.registry).labels(self._model_name)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        declared = Histogram(f"medusa_{name}", text, ["model_name"], registry=self.registry, buckets=buckets)
        return declared.labels(self._model_name)

    def _declare_engine(self) -> None:
        self.running = self._gauge("num_requests_running", "Requests in the running batch.")
        self.waiting = self._gauge("num_requests_waiting", "Requests waiting to be scheduled.")
        self.kv_cache_usage = self._gauge("kv_cache_usage_perc", "Used share of the KV slots; 1 is all of them.")
        self.preemptions = self._counter("num_preemptions", "Requests preempted for want of KV slots.")
        self.prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self.prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self.iteration_tokens = self._histogram(
            "iteration_tokens_total", "Prompt tokens computed and tokens decoded per engine step.", ROWS
        )
        self.step_seconds = self._histogram("step_seconds", "Seconds per engine step.", STEP)
        self.step_rows = self._histogram("step_rows", "Rows (token positions) per forward pass.", STEP_ROWS)
        seconds = Counter(
            "medusa_engine_seconds",
            "Seconds of the engine at work: in kernels, elsewhere in the model's code (all of it if nobody counts "
            "kernels), in the engine's own (scheduling, updating), in messages to and from the API process.",
            ["model_name", "part"],
            registry=self.registry,
        )
        self.engine_seconds = [seconds.labels(self._model_name, part) for part in ENGINE_PARTS]
        phases = Counter(
            "medusa_step_phase_seconds",
            "The same seconds by phase of the step: drafting, forward passes, what else the model does (sampling and "
            "verifying), the engine's own (scheduling, updating), messages to and from the API process.",
            ["model_name", "phase"],
            registry=self.registry,
        )
        self.phase_seconds = [phases.labels(self._model_name, phase) for phase in PHASES]
        self.engine_restarts = self._counter("engine_restarts", "Times the engine process died and was started again.")

    def _declare_requests(self) -> None:
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of choices whose first token came.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated and counted to a client.")
        self.finished = Counter(
            "medusa_request_success",
            "Choices ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        for reason in FINISH_REASONS:
            self.finished.labels(self._model_name, reason)
        self.ttft = self._histogram("time_to_first_token_seconds", "Request received until first token.", TTFT)
        self.token_gap = RepeatedHistogram(
            "medusa_inter_token_latency_seconds",
            "Seconds between tokens; tokens of one step share the gap evenly.",
            {"model_name": self._model_name},
            GAP,
        )
        self.registry.register(self.token_gap)
        self.e2e = self._histogram("e2e_request_latency_seconds", "Request received until its end.", LATENCY)
        self.queue_time = self._histogram("request_queue_time_seconds", "Waiting for the first step.", LATENCY)
        self.prefill_time = self._histogram("request_prefill_time_seconds", "First step until first token.", LATENCY)
        self.decode_time = self._histogram("request_decode_time_seconds", "First token until the end.", LATENCY)
        self.inference_time = self._histogram("request_inference_time_seconds", "First step until the end.", LATENCY)
        self.request_prompt = self._histogram("request_prompt_tokens", "Prompt tokens per choice.", TOKENS)
        self.request_generation = self._histogram("request_generation_tokens", "Tokens generated per choice.", TOKENS)
        self.tokens_per_step = self._histogram(
            "request_tokens_per_step", "Tokens per decoding step of a choice (tau); 1 is plain decoding.", TAU
        )
        self.params_n = self._histogram("request_params_n", "The parameter n.", CHOICES)
        self.params_max_tokens = self._histogram("request_params_max_tokens", "The token limit of a choice.", TOKENS)

        self.refused = Counter(
            "medusa_requests_refused",
            "Requests answered with 429: the queue has its requests or its prompt tokens, or the key its share.",
            ["model_name", "reason"],
            registry=self.registry,
        )
        for cause in REFUSALS:
            self.refused.labels(self._model_name, cause)

    def _declare_http(self) -> None:
        self._http_requests = Counter(
            "http_requests", "HTTP requests answered.", ["handler", "method", "status"], registry=self.registry
        )
        self._http_seconds = Histogram(
            "http_request_duration_seconds",
            "HTTP request received until its last byte.",
            ["handler", "method"],
            registry=self.registry,
            buckets=TTFT,
        )

    def on_step(self, stats: StepStats) -> None:
        """Take in one engine step."""
        self.running.set(stats.num_running)
        self.waiting.set(stats.num_waiting)
        self.kv_cache_usage.set(stats.kv_cache_usage)
        for counter, amount in (
            (self.preemptions, stats.num_preemptions),
            (self.prefix_queries, stats.prefix_cache_queries),
            (self.prefix_hits, stats.prefix_cache_hits),
            *zip(self.engine_seconds, _seconds_by_part(stats), strict=True),
            *zip(self.phase_seconds, _seconds_by_phase(stats), strict=True),
        ):
            if amount > 0:  # two clocks may disagree by a tick
                counter.inc(amount)
        self._speculation.on_step(stats)
        if stats.controller is not None:
            self._controller.state = stats.controller
        if stats.num_rows:
            roots = stats.num_rows - stats.num_prompt_rows - stats.num_draft_tokens
            self.iteration_tokens.observe(stats.num_prompt_rows + roots + stats.num_accepted_tokens)
            self.step_seconds.observe(stats.step_seconds)
            self.step_rows.observe(stats.num_rows)

    def on_restart(self) -> None:
        """Count one restart of the engine process; whatever ran there is gone."""
        self.engine_restarts.inc()
        for gauge in (self.running, self.waiting, self.kv_cache_usage):
            gauge.set(0)
        self._controller.state = None

    def on_end(self, reason: FinishReason) -> None:
        """Count the end of one choice."""
        self.finished.labels(self._model_name, reason).inc()

    def on_refusal(self, reason: Refusal) -> None:
        """Count one request that was turned away."""
        self.refused.labels(self._model_name, reason).inc()

    def http(self, handler: str, method: str, status: int, seconds: float) -> None:
        """Count one answered HTTP request; `handler` is the route's template, never the path a client chose."""
        self._http_requests.labels(handler, method, f"{status // 100}xx").inc()
        self._http_seconds.labels(handler, method).observe(seconds)

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)


def _seconds_by_part(stats: StepStats) -> tuple[float, float, float, float]:
    """In the order of ENGINE_PARTS; together the time that the engine was at work."""
    return (
        stats.kernel_seconds,
        stats.model_seconds - stats.kernel_seconds,
        stats.step_seconds - stats.model_seconds,
        stats.message_seconds,
    )


def _seconds_by_phase(stats: StepStats) -> tuple[float, float, float, float, float]:
    """In the order of PHASES; together the time that the engine was at work."""
    return (
        stats.draft_seconds,
        stats.forward_seconds,
        stats.model_seconds - stats.draft_seconds - stats.forward_seconds,
        stats.step_seconds - stats.model_seconds,
        stats.message_seconds,
    )


def _tokens_per_step(stats: RequestStats) -> float | None:
    """Tau. The first token came from the prompt's step, which is not among the steps counted; None without others."""
    num_steps = stats.speculation.num_steps
    return (stats.num_output_tokens - 1) / num_steps if num_steps else None


class RequestTimer:
    """Times and counts of one choice, from `arrival` (of `perf_counter`) to `end`, which is called exactly once."""

    def __init__(self, metrics: Metrics, arrival: float, num_prompt_tokens: int, max_tokens: int) -> None:
        self._metrics = metrics
        self._arrival = arrival
        self._latest: float | None = None
        self._num_prompt_tokens = num_prompt_tokens
        self._num_tokens = 0
        metrics.params_max_tokens.observe(max_tokens)

    def tokens(self, count: int) -> None:
        """`count` more tokens have come, in one step."""
        if not count:
            return
        now = perf_counter()
        if self._latest is None:
            self._metrics.ttft.observe(now - self._arrival)
            self._metrics.prompt_tokens.inc(self._num_prompt_tokens)
        else:
            self._metrics.token_gap.observe((now - self._latest) / count, count)
        self._latest = now
        self._num_tokens += count
        self._metrics.generation_tokens.inc(count)

    def end(self, reason: FinishReason, stats: RequestStats | None) -> None:
        """The choice is over; `stats` are the engine's, if it got to say them."""
        metrics = self._metrics
        metrics.on_end(reason)
        metrics.e2e.observe(perf_counter() - self._arrival)
        metrics.request_prompt.observe(self._num_prompt_tokens)
        metrics.request_generation.observe(self._num_tokens)
        if stats is not None:
            metrics.queue_time.observe(stats.queue_seconds)
            metrics.prefill_time.observe(stats.prefill_seconds)
            metrics.decode_time.observe(stats.decode_seconds)
            metrics.inference_time.observe(stats.prefill_seconds + stats.decode_seconds)
            if (tau := _tokens_per_step(stats)) is not None:
                metrics.tokens_per_step.observe(tau)
