"""Measuring before the first request: what is known afterwards, and that nothing else is left."""

from __future__ import annotations

import pytest
from tiny import run, submit, tiny_engine, tiny_llama, tokens

from server.engine.messages import SamplingParams
from server.engine.runner import Runner
from server.engine.warmup import warm_up

GREEDY = SamplingParams(20, temperature=0, ignore_eos=True)


@pytest.mark.parametrize("drafter", ["heads", "sequential"])
@pytest.mark.parametrize(
    "config", [{}, {"max_num_seqs": 2}, {"max_num_batched_rows": 6, "max_num_seqs": 3}, {"kv_cache_tokens": 20}]
)
def test_costs_are_known_and_nothing_is_left(drafter: str, config: dict[str, object]) -> None:
    model = tiny_llama(64, scale=2.0)
    engine = tiny_engine(model, drafter=drafter, **config)
    free = engine.scheduler.slots.num_free
    warm_up(engine)
    assert engine.cost.run.is_known
    assert engine.cost.draft.is_known
    assert engine.scheduler.slots.num_free == free
    assert not engine.has_work
    assert isinstance(engine.runner, Runner)
    assert not engine.runner.drafter.__dict__.get("_states")
    assert not engine.runner.drafter.__dict__.get("_memories")
    engine.scheduler.check()
    cold = tiny_engine(tiny_llama(64, scale=2.0), drafter=drafter, **config)
    job = submit("a", [5, 9, 3], SamplingParams(12, temperature=0, ignore_eos=True))
    assert tokens(run(engine, [job])["a"]) == tokens(run(cold, [job])["a"])
