"""Our engine in this process, without HTTP: what it decodes in a given time, to compare with other libraries.

A measurement begins when every request has its first token, so prompts do not count.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from server.engine.core import Engine
from server.engine.messages import SamplingParams, SpeculationParams, Submit

Tokens = tuple[int, ...]
PLAIN, LOSSLESS = SpeculationParams(mode="off"), SpeculationParams()


@dataclass(frozen=True, slots=True)
class Decoded:
    """One batch, from the first token of the last request on."""

    seconds: float
    num_tokens: int
    num_steps: int
    answers: list[Tokens]

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.num_tokens / self.seconds


def decode(
    engine: Engine,
    prompts: Sequence[Tokens],
    num_tokens: int,
    speculation: SpeculationParams,
    names: Sequence[str] = (),
) -> Decoded:
    """Greedy answers of `num_tokens` each to all prompts at once; the requests are called `names`, or else anything."""
    names = names or [f"inside {i}" for i in range(len(prompts))]
    sampling = SamplingParams(num_tokens, temperature=0, ignore_eos=True)
    for name, prompt in zip(names, prompts, strict=True):
        refused = engine.submit(Submit(name, prompt, sampling, speculation))
        assert refused is None, refused.error
    answers: dict[str, list[int]] = {name: [] for name in names}
    started, counted, num_steps = 0.0, 0, 0
    while engine.has_work:
        for delta in engine.step().deltas:
            assert delta.error is None, delta.error
            answers[delta.request_id] += delta.token_ids
        num_steps += started > 0
        if not started and all(answers.values()):
            started, counted = time.perf_counter(), sum(map(len, answers.values()))
    seconds = time.perf_counter() - started
    return Decoded(seconds, sum(map(len, answers.values())) - counted, num_steps, [tuple(answers[n]) for n in names])
