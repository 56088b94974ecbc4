"""What crosses the process boundary in every step arrives as it was sent."""

from __future__ import annotations

import pickle

from server.engine.messages import Delta, RequestStats, SpeculationStats, StepOutput, StepStats, TokenLogprobs


def test_a_step_survives_the_pipe() -> None:
    logprobs = (TokenLogprobs(5, -0.5, ((5, -0.5), (6, -1.5))),)
    stats = RequestStats(3, 1, 2, 0, 0.1, 0.2, 0.3, SpeculationStats(2, 8, 1, (1, 1)))
    deltas = (
        Delta("plain", (1, 2)),
        Delta("scored", (5,), logprobs, prompt_logprobs=(None, *logprobs)),
        Delta("over", (2,), finish="stop", stop_token_id=2, stats=stats),
        Delta("refused", finish="error", error="The prompt is empty: send at least one token."),
    )
    output = StepOutput(deltas, StepStats(num_running=3, step_seconds=0.5, accepted_per_depth=(2, 1)))
    assert pickle.loads(pickle.dumps(output)) == output
