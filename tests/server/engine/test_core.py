"""The engine over a model without tensors: nothing is lost, whatever happens in whatever order."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

import pytest
from fakes import EOS, VOCAB, FakeRunner, reference

from server.engine.controller import Bound
from server.engine.core import Engine
from server.engine.messages import Delta, EngineConfig, SamplingParams, SpeculationParams, Submit
from server.engine.request import Draft, Outcome, Request, Work


def make_engine(num_slots: int = 200, *, max_model_len: int = 60, seed: int = 0, **config: object) -> Engine:
    return Engine(
        EngineConfig("fake", **{"num_nodes": 5, "static_trees": True, "control_share": 0.0, **config}),  # type: ignore[arg-type]
        FakeRunner(num_slots, max_model_len=max_model_len, seed=seed),
    )


def submit(name: str, prompt: list[int], max_tokens: int = 10, **sampling: object) -> Submit:
    params = SamplingParams(max_tokens, temperature=0, **sampling)  # type: ignore[arg-type]
    return Submit(name, tuple(prompt), params)


def drain(engine: Engine, limit: int = 10_000) -> list[Delta]:
    deltas: list[Delta] = []
    for _ in range(limit):
        if not engine.has_work:
            return deltas
        deltas.extend(engine.step().deltas)
        engine.scheduler.check()
    raise AssertionError("the engine does not come to an end")


def text(deltas: list[Delta], name: str) -> list[int]:
    return [token for delta in deltas if delta.request_id == name for token in delta.token_ids]


@pytest.mark.parametrize("num_nodes", [0, 1, 7, 63])
def test_output_is_the_models_own_whatever_the_tree(num_nodes: int) -> None:
    engine = make_engine(num_nodes=num_nodes)
    assert engine.submit(submit("a", [1, 2, 3], 30, ignore_eos=True)) is None
    deltas = drain(engine)
    assert text(deltas, "a") == reference([1, 2, 3], 30, ignore_eos=True)
    assert deltas[-1].finish == "length"


def test_speculation_saves_steps_and_counts_what_it_did() -> None:
    engine = make_engine(num_nodes=10)
    engine.submit(submit("a", [1, 2, 3], 40, ignore_eos=True))
    deltas = drain(engine)
    stats = deltas[-1].stats
    assert stats is not None
    spec = stats.speculation
    assert len(deltas) < 40
    assert spec.num_spec_steps + spec.num_accepted_draft_tokens >= 39  # the first token came from the prompt's step
    assert sum(spec.acceptance_histogram) == spec.num_spec_steps
    assert sum(n * steps for n, steps in enumerate(spec.acceptance_histogram)) == spec.num_accepted_draft_tokens


def test_eos_ends_a_request_and_nothing_after_it_is_emitted() -> None:
    prompt = next([p] for p in range(1, VOCAB) if EOS in reference([p], 40))
    engine = make_engine(num_nodes=20)
    engine.submit(submit("a", prompt, 40))
    deltas = drain(engine)
    assert text(deltas, "a") == reference(prompt, 40)
    assert deltas[-1].finish == "stop"
    assert deltas[-1].stop_token_id == EOS


def test_stop_token_ids_and_model_length_end_a_request() -> None:
    expected = reference([4], 30, ignore_eos=True)
    engine = make_engine(max_model_len=20)
    engine.submit(submit("stop", [4], 15, ignore_eos=True, stop_token_ids=(expected[3],)))
    engine.submit(submit("long", [4], 19, ignore_eos=True))
    deltas = drain(engine)
    assert text(deltas, "stop") == expected[: expected.index(expected[3]) + 1]
    assert text(deltas, "long") == expected[:19]


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (submit("x", []), "empty"),
        (submit("x", [1] * 60), "exceeds"),
        (submit("x", [1], 60), "exceeds"),
        (submit("x", [VOCAB]), "vocabulary"),
    ],
)
def test_impossible_requests_are_refused_with_a_sentence(bad: Submit, word: str) -> None:
    refusal = make_engine().submit(bad)
    assert refusal is not None
    assert refusal.finish == "error"
    assert word in (refusal.error or "")


def test_a_used_id_is_refused_and_the_first_request_goes_on() -> None:
    engine = make_engine()
    engine.submit(submit("a", [1], 5, ignore_eos=True))
    refusal = engine.submit(submit("a", [2]))
    assert refusal is not None
    assert refusal.finish == "error"
    assert text(drain(engine), "a") == reference([1], 5, ignore_eos=True)


def test_per_request_nodes_and_mode_are_obeyed() -> None:
    engine = make_engine(num_nodes=8)
    sampling = SamplingParams(20, temperature=0, ignore_eos=True)
    engine.submit(Submit("off", (1,), sampling, SpeculationParams(mode="off")))
    engine.submit(Submit("two", (2,), sampling, SpeculationParams(max_nodes=2)))
    ends = {delta.request_id: delta for delta in drain(engine) if delta.finish}
    assert ends["off"].stats is not None
    assert ends["two"].stats is not None
    assert ends["off"].stats.speculation.num_spec_steps == 0
    two = ends["two"].stats.speculation
    assert 0 < two.num_draft_tokens <= 2 * two.num_spec_steps


def test_row_and_sequence_limits_hold() -> None:
    engine = make_engine(400, max_num_seqs=3, max_num_batched_rows=8, num_nodes=20)
    for i in range(7):
        engine.submit(submit(str(i), [i + 1] * 20, 10, ignore_eos=True))
    running = []
    while engine.has_work:
        running.append(engine.step().stats.num_running)
    assert max(running) <= 3
    assert isinstance(engine.runner, FakeRunner)
    assert max(engine.runner.num_rows) <= 8


def test_long_prompts_are_chunked_while_others_decode() -> None:
    engine = make_engine(300, max_num_batched_rows=8, num_nodes=0)
    engine.submit(submit("short", [1], 20, ignore_eos=True))
    engine.step()
    engine.submit(submit("long", [2] * 40, 5, ignore_eos=True))
    outputs = [engine.step() for _ in range(5)]
    assert all(any(delta.request_id == "short" for delta in output.deltas) for output in outputs)
    begun = [[delta for delta in output.deltas if delta.request_id == "long"] for output in outputs]
    assert begun == [[Delta("long")], [], [], [], []]
    assert text(drain(engine), "long") == reference([2] * 40, 5, ignore_eos=True)


def test_prefix_cache_is_hit_and_changes_nothing() -> None:
    engine = make_engine()
    prompt = [1, 2, 3, 4, 5, 6]
    engine.submit(submit("a", prompt, 8, ignore_eos=True))
    first = drain(engine)
    engine.submit(submit("b", prompt, 8, ignore_eos=True))
    second = drain(engine)
    assert text(first, "a") == text(second, "b")
    stats = second[-1].stats
    assert stats is not None
    assert stats.num_cached_tokens == 5


def test_twins_compute_their_prompt_once() -> None:
    engine = make_engine(max_num_batched_rows=16, num_nodes=0)
    for name in "abc":
        engine.submit(submit(name, [7] * 30, 4, ignore_eos=True))
    rows = 0
    cached = {}
    while engine.has_work:
        output = engine.step()
        rows += output.stats.num_rows
        cached |= {d.request_id: d.stats.num_cached_tokens for d in output.deltas if d.stats}
    assert cached == {"a": 0, "b": 29, "c": 29}
    assert rows == 30 + 1 + 1 + 3 * 3


def test_priority_goes_first() -> None:
    engine = make_engine(max_num_seqs=1)
    engine.submit(submit("first", [1], 3, ignore_eos=True))
    engine.submit(submit("late", [2], 3, ignore_eos=True))
    engine.submit(Submit("urgent", (3,), SamplingParams(3, temperature=0, ignore_eos=True), priority=-1))
    ends = [delta.request_id for delta in drain(engine) if delta.finish]
    assert ends == ["urgent", "first", "late"]


def test_preemption_recomputes_and_changes_nothing() -> None:
    engine = make_engine(64, max_model_len=60, num_nodes=4)
    for i in range(4):
        engine.submit(submit(str(i), [i + 1] * 5, 40, ignore_eos=True))
    deltas = drain(engine)
    for i in range(4):
        assert text(deltas, str(i)) == reference([i + 1] * 5, 40, ignore_eos=True)
    assert sum(delta.stats.num_preemptions for delta in deltas if delta.stats) > 0


def test_the_least_urgent_is_preempted_and_nobody_is_overtaken() -> None:
    engine = make_engine(64, max_model_len=60, num_nodes=0)
    for i, priority in enumerate([5, -1, 0, 5]):
        engine.submit(
            Submit(str(i), (i + 1,) * 5, SamplingParams(40, temperature=0, ignore_eos=True), priority=priority)
        )
    ends = [delta for delta in drain(engine) if delta.finish]
    assert [delta.request_id for delta in ends] == ["1", "2", "0", "3"]
    preemptions = {delta.request_id: delta.stats.num_preemptions for delta in ends if delta.stats}
    assert preemptions["1"] == 0
    assert preemptions["3"] > 0


def test_a_small_request_does_not_overtake_a_large_one_that_waits_for_slots() -> None:
    engine = make_engine(60, num_nodes=0, prefix_cache=False)
    engine.submit(submit("first", [1] * 20, 10, ignore_eos=True))
    engine.step()
    engine.submit(submit("large", [2] * 45, 2, ignore_eos=True))
    engine.submit(submit("small", [3], 2, ignore_eos=True))
    heard = list(dict.fromkeys(delta.request_id for delta in drain(engine)))
    assert heard == ["first", "large", "small"]


def test_trees_go_on_while_a_long_prompt_is_computed() -> None:
    engine = make_engine(400, max_model_len=300, max_num_batched_rows=16, num_nodes=6)
    engine.submit(submit("a", [1, 2], 60, ignore_eos=True))
    engine.step()
    engine.submit(submit("long", [3] * 200, 2, ignore_eos=True))
    stats = [engine.step().stats for _ in range(5)]
    assert all(step.num_draft_tokens > 0 for step in stats)
    assert all(step.num_prompt_rows == step.num_rows - step.num_draft_tokens - 1 > 0 for step in stats)


@pytest.mark.parametrize("num_nodes", [0, 10])
def test_a_step_that_only_decodes_has_no_prompt_rows(num_nodes: int) -> None:
    engine = make_engine(num_nodes=num_nodes)
    engine.submit(submit("a", [1, 2, 3], 20, ignore_eos=True))
    assert engine.step().stats.num_prompt_rows == 2
    while engine.has_work:
        assert engine.step().stats.num_prompt_rows == 0


def test_guesses_beyond_the_end_are_not_counted() -> None:
    """A path may run past the token that ends the request; what lies there was of no use to anybody."""
    for seed in range(20):
        engine = make_engine(num_nodes=30, seed=seed)
        engine.submit(submit("a", [seed % 5 + 1], 7, ignore_eos=True))
        deltas = drain(engine)
        stats = deltas[-1].stats
        assert stats is not None
        won = [len(delta.token_ids) - 1 for delta in deltas[1:]]
        assert sum(won) <= stats.speculation.num_accepted_draft_tokens <= sum(won) + 1


def test_half_collected_prompt_logprobs_are_dropped_at_a_preemption() -> None:
    engine = make_engine(40, max_model_len=36, max_num_batched_rows=4, num_nodes=0, prefix_cache=False)
    urgent = SamplingParams(30, temperature=0, ignore_eos=True)
    engine.submit(Submit("a", (1,) * 4, urgent, priority=-1))
    engine.step()
    engine.submit(submit("b", [7] * 30, 0, prompt_logprobs=0))  # three rows a step, until the pool is full
    deltas = drain(engine)
    (end,) = [delta for delta in deltas if delta.request_id == "b" and delta.finish]
    assert end.prompt_logprobs is not None
    assert len(end.prompt_logprobs) == 30
    assert end.stats is not None
    assert end.stats.num_preemptions == 1


def test_prompt_logprobs_come_once_and_complete_even_when_chunked() -> None:
    engine = make_engine(max_num_batched_rows=4)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    engine.submit(submit("warm", prompt, 2))
    drain(engine)
    engine.submit(submit("a", prompt, 0, prompt_logprobs=0))
    deltas = drain(engine)
    assert [(delta.finish, delta.token_ids) for delta in deltas] == [(None, ()), ("length", ())]
    assert deltas[0].prompt_logprobs is None
    collected = deltas[1].prompt_logprobs
    assert collected is not None
    assert [entry and entry.token_id for entry in collected] == [None, *prompt[1:]]


def test_a_tree_may_hang_below_the_prompts_own_last_row() -> None:
    engine = make_engine(num_nodes=30)
    assert isinstance(engine.runner, FakeRunner)
    engine.runner.copies = True
    for name in ("a", "b"):  # the second finds the first one's prompt in the cache, and nothing but the prompt
        engine.submit(submit(name, [1, 2, 3], 12, ignore_eos=True))
        first = engine.step()
        assert first.stats.num_draft_tokens > 0
        deltas = [*first.deltas, *drain(engine)]
        assert text(deltas, name) == reference([1, 2, 3], 12, ignore_eos=True)


def test_a_prompt_under_way_keeps_no_rows_for_its_tree() -> None:
    engine = make_engine(300, max_model_len=200, max_num_batched_rows=16)
    assert isinstance(engine.runner, FakeRunner)
    engine.runner.copies = True
    engine.submit(submit("a", [1] * 100, 2))
    assert [engine.step().stats.num_rows for _ in range(6)] == [16] * 6


def test_abort_frees_everything_at_once() -> None:
    engine = make_engine(prefix_cache=False)
    engine.submit(submit("a", [1, 2, 3], 30, ignore_eos=True))
    engine.step()
    ended = engine.abort("a")
    assert ended is not None
    assert ended.finish == "abort"
    assert engine.abort("a") is None
    assert engine.scheduler.slots.num_free == 200
    assert not engine.has_work


class Play:
    """Requests submitted, aborted, preempted and finished at random, and all that was heard of them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.engine = make_engine(
            self.random.choice([50, 64, 120]),
            max_model_len=48,
            seed=seed,
            num_nodes=self.random.choice([0, 3, 9]),
            max_num_seqs=self.random.choice([1, 4, 12]),
            max_num_batched_rows=self.random.choice([12, 16, 64]),
            prefix_cache=self.random.random() < 0.8,
        )
        assert isinstance(self.engine.runner, FakeRunner)
        self.engine.runner.copies = self.random.random() < 0.5
        self.submitted: dict[str, Submit] = {}
        self.got: dict[str, list[int]] = defaultdict(list)
        self.ends: dict[str, Delta] = {}

    def run(self, turns: int) -> None:
        for turn in range(turns):
            if self.random.random() < 0.4:
                self.submit(str(turn))
            if self.random.random() < 0.1 and self.submitted:
                self.abort(self.random.choice(list(self.submitted)))
            self.step()
        while self.engine.has_work:
            self.step()

    def submit(self, name: str) -> None:
        rng = self.random
        prompt = tuple(rng.randrange(1, 4) for _ in range(rng.randrange(1, 25)))
        sampling = SamplingParams(rng.randrange(1, 48 - len(prompt)), temperature=0, ignore_eos=rng.random() < 0.5)
        self.submitted[name] = Submit(name, prompt, sampling, priority=rng.choice([0, 0, 0, -1, 3]))
        assert self.engine.submit(self.submitted[name]) is None

    def abort(self, name: str) -> None:
        ended = self.engine.abort(name)
        if ended is not None:
            self.hear(ended)

    def step(self) -> None:
        for delta in self.engine.step().deltas if self.engine.has_work else ():
            self.hear(delta)
        self.engine.scheduler.check()

    def hear(self, delta: Delta) -> None:
        assert delta.request_id not in self.ends, "news after the end"
        self.got[delta.request_id].extend(delta.token_ids)
        if delta.finish:
            self.ends[delta.request_id] = delta

    def check(self) -> None:
        assert self.ends.keys() == self.submitted.keys()
        for name, request in self.submitted.items():
            sampling = request.sampling
            expected = reference(request.prompt, sampling.max_tokens, ignore_eos=sampling.ignore_eos)
            is_whole = self.ends[name].finish != "abort"
            assert self.got[name] == (expected if is_whole else expected[: len(self.got[name])])


@pytest.mark.parametrize("group", range(6))
def test_nothing_is_lost_at_random(group: int) -> None:
    """Over all groups some thousands of requests."""
    plays = [Play(seed) for seed in range(5 * group, 5 * group + 5)]
    for play in plays:
        play.run(400)
        play.check()
    stats = [end.stats for play in plays for end in play.ends.values() if end.stats]
    assert len(stats) > 500
    assert sum(s.num_preemptions for s in stats) > 10
    assert sum(s.num_cached_tokens for s in stats) > 100
    assert sum(s.speculation.num_accepted_draft_tokens for s in stats) > 100


class Clock:
    """Stands still unless somebody works."""

    def __init__(self) -> None:
        self.now = 100.0


class WorkingRunner(FakeRunner):
    """Drafting takes 1 second, verifying 4, of which 3 in kernels."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(200, max_model_len=60)
        self.clock = clock
        self.in_kernels = 50.0  # while loading

    def draft(self, requests: Sequence[Request], bounds: Sequence[Bound], asks: Sequence[float | None]) -> list[Draft]:
        self.clock.now += 1
        return super().draft(requests, bounds, asks)

    def run(self, works: Sequence[Work]) -> list[Outcome]:
        self.clock.now += 4
        self.in_kernels += 3
        return super().run(works)

    def kernel_seconds(self) -> float:
        seconds, self.in_kernels = self.in_kernels, 0.0
        return seconds


def test_a_steps_seconds_are_told_by_part() -> None:
    clock = Clock()
    config = EngineConfig("fake", num_nodes=5, static_trees=True, control_share=0.0)
    engine = Engine(config, WorkingRunner(clock), lambda: clock.now)
    for name in ("a", "b"):
        clock.now += 1000  # idle
        engine.submit(submit(name, [1, 2, 3], 4, ignore_eos=True))
        first = engine.step().stats
        clock.now += 7  # sending
        second = engine.step().stats
        assert [first.model_seconds, second.model_seconds] == [4, 5]  # nobody drafts in the first step
        assert [first.step_seconds, second.step_seconds] == [4, 5]
        assert [first.kernel_seconds, second.kernel_seconds] == [3, 3]
        assert [first.message_seconds, second.message_seconds] == [0, 7]
        drain(engine)
