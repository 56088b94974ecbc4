"""Measures what steps cost with some heads on this machine, for the reports of `train heads` and `evaluate heads`.

The forward pass by its rows is what the warm-up finds (`engine.warmup`), which the controller goes by, too. What the
drafter and the engine itself take is the median of real steps, since a drafter's time depends on its guesses.

Invariant: all heads are given the same forward pass, the least that was seen, so that noise is nobody's merit.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Final

from models.errors import UsageError
from models.train.step_times import StepTime, StepTimes, Trial
from server.engine.controller import StaticController
from server.engine.core import Engine
from server.engine.cost import USUAL_KEYS
from server.engine.messages import EngineConfig, SamplingParams, Submit
from server.engine.warmup import warm_up
from server.errors import StartupError

STEPS: Final = 12  # of each size
UNSETTLED: Final = 2  # steps before them
PROMPT_TOKENS: Final = 64  # of each prompt, at most
KV_CACHE_TOKENS: Final = 16384


def measure_steps(trial: Trial) -> list[StepTimes]:
    """Raises UsageError if the model cannot be served with some of the heads."""
    try:
        found = [_measure(trial, heads) for heads in trial.heads]
    except StartupError as error:
        raise UsageError(str(error)) from error
    least = {size: min(times[size].run for times in found) for size in found[0]}
    return [{size: StepTime(least[size], time.draft, time.rest) for size, time in times.items()} for times in found]


def _measure(trial: Trial, heads: Path) -> StepTimes:
    engine = _engine(trial, heads)
    warm_up(engine)
    sizes = [(requests, nodes) for requests in trial.requests for nodes in trial.nodes]
    runs = {size: _run_seconds(engine, *size) for size in sizes}  # before steps move the curve
    times = {}
    for requests, nodes in sizes:
        engine.controller = StaticController(engine.cost, nodes, control_share=0.0)
        draft, rest = _steps(engine, trial, requests)
        times[requests, nodes] = StepTime(runs[requests, nodes], draft, rest)
    return times


def _run_seconds(engine: Engine, requests: int, nodes: int) -> float:
    """Behind a context of USUAL_KEYS tokens. The curve is of trees of one request: the others cost a little more."""
    features = (0.0, float(requests - 1), 0.0, 0.0)
    return engine.cost.run_seconds(requests * (nodes + 1), features)


def _steps(engine: Engine, trial: Trial, requests: int) -> tuple[float, float]:
    """Medians of what drafting takes and of what is spent outside the model, over steps that only decode."""
    names = [f"trial {number}" for number in range(requests)]
    for number, name in enumerate(names):
        longest = min(PROMPT_TOKENS, engine.runner.info.max_model_len // 2)
        prompt = tuple(trial.prompts[number % len(trial.prompts)][:longest])
        room = min(engine.runner.info.max_model_len - len(prompt), USUAL_KEYS * 4)
        refusal = engine.submit(Submit(name, prompt, SamplingParams(room, temperature=0, ignore_eos=True)))
        assert refusal is None, refusal
    found: list[tuple[float, float]] = []
    while engine.has_work and len(found) < STEPS + UNSETTLED:
        stats = engine.step().stats
        if stats.num_running == requests and not stats.num_prompt_rows and stats.num_rows >= requests:
            found.append((stats.draft_seconds, stats.step_seconds - stats.model_seconds))
    for name in names:
        engine.abort(name)
    drafts, rests = zip(*(found[UNSETTLED:] or found), strict=True)
    return median(drafts), median(rests)


def _engine(trial: Trial, heads: Path) -> Engine:
    from server.engine.runner import Runner  # brings torch along

    config = EngineConfig(
        str(trial.model),
        heads=str(heads),
        device=trial.device,
        kv_cache_tokens=KV_CACHE_TOKENS,
        max_num_seqs=max(trial.requests),
        max_num_batched_rows=max(trial.requests) * (max(trial.nodes) + 1),
        static_trees=True,
        prefix_cache=False,
        ngram=False,
    )
    return Engine(config, Runner.load(config))
