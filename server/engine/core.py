"""The engine without its process: submit, abort, and `step`, which schedules, drafts, runs and updates.

Invariants:
- every submitted request gets exactly one terminal delta, from `step`, `abort` or `shutdown`;
- between steps, `scheduler.check()` holds;
- a request that the runner fails on ends with an error, and no other does; only if `runner.check` says that nobody can
  be served any more does the engine end;
- while there is work, every second of the process is in exactly one step's `step_seconds` or `message_seconds`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import monotonic
from typing import ParamSpec, Protocol, TypeVar

from server.engine.controller import Controller
from server.engine.guard import FAILED, guarded
from server.engine.messages import (
    DRAFT_SOURCES,
    Delta,
    EngineConfig,
    FinishReason,
    ModelInfo,
    StepOutput,
    StepStats,
    Submit,
    TokenLogprobs,
)
from server.engine.request import Draft, Outcome, Request, Work
from server.engine.scheduler import Scheduler

Args = ParamSpec("Args")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class ModelRunner(Protocol):
    """What the engine needs of `runner.Runner`; tests bring models without tensors."""

    info: ModelInfo

    def refusal(self, submit: Submit) -> str | None:
        """Why the model cannot serve this request, a sentence; None if it can."""

    def can_draft(self, request: Request) -> bool:
        """Is there anything to draft from, and a token that could still be emitted?"""

    def copied_values(self, request: Request) -> Sequence[float]:
        """Of each token that could be copied: the probability that it and those before it are right."""

    def draft(self, requests: Sequence[Request], num_nodes: Sequence[int], num_forced: Sequence[int]) -> list[Draft]:
        """A tree for each request, no deeper than it can still use: at most so many guesses and forced tokens."""

    def run(self, works: Sequence[Work]) -> list[Outcome]:
        """One forward pass and its verification, in order."""

    def kernel_seconds(self) -> float:
        """Seconds spent in kernels since this was last asked; 0.0 if nobody counts them."""

    def check(self) -> None:
        """Raises if nobody can be served any more."""

    def forget(self, request: Request) -> None:
        """Drop all state of a request that ended or was preempted."""


class Engine:
    """One model, many requests."""

    def __init__(self, config: EngineConfig, runner: ModelRunner, clock: Callable[[], float] = monotonic) -> None:
        self.runner = runner
        self.scheduler = Scheduler(
            runner.info.kv_cache_tokens,
            max_num_seqs=min(config.max_num_seqs, config.max_num_batched_rows),
            max_num_batched_rows=config.max_num_batched_rows,
            use_prefix_cache=config.prefix_cache,
        )
        self._controller = Controller(
            config.num_nodes, config.speculative_disable_by_batch_size, has_heads=runner.info.num_heads > 0
        )
        self._max_rows = config.max_num_batched_rows
        self._clock = clock
        self._model_seconds = 0.0  # of this step
        runner.kernel_seconds()  # those of loading belong to no step
        self._left_at: float | None = None  # end of the last step, if it left work
        self._requests: dict[str, Request] = {}
        self._num_arrived = 0
        self._eos = frozenset(runner.info.eos_token_ids)

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def submit(self, submit: Submit) -> Delta | None:
        """Queue a request. Returns its terminal delta if it can never run."""
        try:
            error = self._refusal(submit)
        except Exception:
            logger.exception("A request could not be judged.")
            error = FAILED
        if error is not None:
            return Delta(submit.request_id, finish="error", error=error)
        request = Request(submit, self._num_arrived, self._clock())
        self._num_arrived += 1
        self._requests[request.id] = request
        self.scheduler.add(request)
        return None

    def abort(self, request_id: str) -> Delta | None:
        """End a request now. Nothing happens if it has ended before."""
        request = self._requests.get(request_id)
        return None if request is None else self._end(request, Delta(request_id), "abort")

    def shutdown(self) -> StepOutput:
        """Abort everything."""
        deltas = [self.abort(request_id) for request_id in list(self._requests)]
        return StepOutput(tuple(delta for delta in deltas if delta is not None), StepStats())

    def step(self) -> StepOutput:
        """One forward pass for whoever is due, and all that follows from it."""
        started = self._clock()
        message_seconds = 0.0 if self._left_at is None else started - self._left_at
        works, preempted = self.scheduler.schedule(self._rows_for_trees())
        for request in preempted:
            self._forget_progress(request)
        begun = [work.request for work in works if work.request.first_scheduled_time is None]
        for request in begun:
            request.first_scheduled_time = started
        self._model_seconds = 0.0
        self._grow_trees(works)
        outcomes = self._run(works)
        deltas = [self._update(work, outcome) for work, outcome in zip(works, outcomes, strict=True)]
        now = self._clock()
        self._left_at = now if self.has_work else None
        stats = self._stats(
            works,
            step_seconds=now - started,
            model_seconds=self._model_seconds,
            kernel_seconds=self.runner.kernel_seconds(),
            message_seconds=message_seconds,
        )
        news = [delta for delta in deltas if delta is not None]
        if begun:
            said = {delta.request_id for delta in news}
            news += [Delta(request.id) for request in begun if request.id not in said]
        return StepOutput(tuple(news), stats)

    def _run(self, works: Sequence[Work]) -> list[Outcome | None]:
        """What the runner finds; None for whom it has failed on."""
        sound = [work for work in works if not work.has_failed]
        found = iter(guarded(lambda some: self._timed(self.runner.run, some), sound, self.runner.check))
        return [None if work.has_failed else next(found) for work in works]

    def _can_draft(self, requests: Sequence[Request]) -> list[bool]:
        return [self.runner.can_draft(request) for request in requests]

    def _timed(self, call: Callable[Args, Result], *args: Args.args, **kwargs: Args.kwargs) -> Result:
        """Call the runner, and count the seconds."""
        started = self._clock()
        result = call(*args, **kwargs)
        self._model_seconds += self._clock() - started
        return result

    def _refusal(self, submit: Submit) -> str | None:
        """Why this request can never run; the API process has said so before, in OpenAI's words."""
        info, num_prompt = self.runner.info, len(submit.prompt)
        if submit.request_id in self._requests:
            return f"Request id {submit.request_id!r} is in use: ids must be unique among open requests."
        if num_prompt == 0:
            return "The prompt is empty: send at least one token."
        if num_prompt + max(submit.sampling.max_tokens, 1) > info.max_model_len + (submit.sampling.max_tokens == 0):
            return (
                f"The prompt has {num_prompt} tokens; with the completion it exceeds the {info.max_model_len} allowed."
            )
        if not all(0 <= token < info.vocab_size for token in (*submit.prompt, *submit.prediction)):
            return f"A token sent is outside the vocabulary of {info.vocab_size}: check the tokenizer in use."
        return self.runner.refusal(submit)

    def _rows_for_trees(self) -> int:
        """Rows that prompts must not take from the trees of those who decode: at most half of a step."""
        if not self.scheduler.has_prompts:
            return 0
        decoding = [request for request in self.scheduler.running if request.num_remaining == 1]
        can_draft = guarded(self._can_draft, decoding, self.runner.check)
        drafting = [request for request, can in zip(decoding, can_draft, strict=True) if can]
        return sum(self._allot(drafting, self._max_rows // 2))

    def _allot(self, requests: Sequence[Request], row_budget: int) -> list[int]:
        return self._controller.allot(requests, row_budget, [self.runner.copied_values(r) for r in requests])

    def _grow_trees(self, works: Sequence[Work]) -> None:
        """Draft for decoding requests and hang the trees below their roots."""
        ending = [work for work in works if work.reaches_end]
        can_draft = guarded(self._can_draft, [work.request for work in ending], self.runner.check)
        for work, can in zip(ending, can_draft, strict=True):
            work.has_failed = can is None
        drafting = [work for work, can in zip(ending, can_draft, strict=True) if can]
        requests = [work.request for work in drafting]
        rows_left = self.scheduler.rows_left
        num_nodes = self._allot(requests, rows_left)
        num_forced = self._controller.allot_forced(requests, num_nodes, rows_left - sum(num_nodes))
        chosen = [i for i in range(len(requests)) if num_nodes[i] + num_forced[i] > 0]

        def draft(some: Sequence[int]) -> list[Draft]:
            return self._timed(
                self.runner.draft,
                [requests[i] for i in some],
                [num_nodes[i] for i in some],
                [num_forced[i] for i in some],
            )

        for i, found in zip(chosen, guarded(draft, chosen, self.runner.check), strict=True):
            if found is None:
                drafting[i].has_failed = True
            else:
                self.scheduler.place(drafting[i], found)

    def _update(self, work: Work, outcome: Outcome | None) -> Delta | None:
        """Commit what one request has won in this step, and end it if that was all."""
        request = work.request
        if outcome is None:
            self.scheduler.withdraw(work)
            return self._end(request, Delta(request.id, error=FAILED), "error")
        self.scheduler.commit(work, outcome.path)
        prompt_logprobs = self._collect_prompt_logprobs(request, outcome)
        if not work.reaches_end:
            return None
        if request.first_token_time is None:
            request.first_token_time = self._clock()
        if outcome.error is not None:
            return self._end(request, Delta(request.id, error=outcome.error), "error")
        tokens, finish = self._append(request, outcome.token_ids)
        is_complete = outcome.is_complete and len(tokens) == len(outcome.token_ids)
        is_stopped = finish == "stop" or (is_complete and tokens[-1] in self._eos)
        stop_token_id = tokens[-1] if is_stopped else None
        if is_complete or (finish is None and outcome.is_over):
            finish = "stop"
        work.accepted = outcome.path[: len(tokens)]  # what lies beyond the end was of no use
        work.count_speculation()
        delta = Delta(request.id, tokens, outcome.logprobs[: len(tokens)], prompt_logprobs)
        if finish is None:
            return delta
        return self._end(request, replace(delta, stop_token_id=stop_token_id), finish)

    def _append(self, request: Request, token_ids: Sequence[int]) -> tuple[tuple[int, ...], FinishReason | None]:
        """Append tokens until one of them ends the request; later ones never were."""
        if request.submit.sampling.max_tokens == 0:
            return (), "length"
        for count, token in enumerate(token_ids, 1):
            request.tokens.append(token)
            finish = request.finish_reason(token, self._eos)
            if finish is not None:
                return tuple(token_ids[:count]), finish
        return tuple(token_ids), None

    def _collect_prompt_logprobs(self, request: Request, outcome: Outcome) -> tuple[TokenLogprobs | None, ...] | None:
        """The prompt's log-probabilities, once they are complete."""
        if request.prompt_logprobs is None:
            return None
        request.prompt_logprobs.extend(outcome.prompt_logprobs)
        if request.num_computed < request.num_prompt:
            return None
        collected, request.prompt_logprobs = tuple(request.prompt_logprobs), None
        return collected

    def _forget_progress(self, request: Request) -> None:
        """A preempted request starts over; what it has sent to the client stays sent."""
        self.runner.forget(request)
        if request.prompt_logprobs is not None:
            request.prompt_logprobs = [None]

    def _end(self, request: Request, delta: Delta, finish: FinishReason) -> Delta:
        del self._requests[request.id]
        self.scheduler.finish(request)
        self.runner.forget(request)
        return replace(delta, finish=finish, stats=request.stats(self._clock()))

    def _stats(self, works: Sequence[Work], **seconds: float) -> StepStats:
        scheduler = self.scheduler
        drafts = [work for work in works if work.node_tokens]
        accepted = [len(work.accepted) for work in drafts]
        drafted_from = Counter(source for work in drafts for source in work.node_sources)
        accepted_from = Counter(work.node_sources[node] for work in drafts for node in work.accepted)
        return StepStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            kv_cache_usage=1 - scheduler.num_available / max(scheduler.slots.num_slots, 1),
            num_rows=sum([work.num_chain + len(work.node_tokens) for work in works]),
            num_prompt_rows=sum([work.num_chain - work.reaches_end for work in works]),
            num_preemptions=scheduler.num_preemptions,
            num_drafts=len(drafts),
            num_draft_tokens=sum([len(work.node_tokens) for work in drafts]),
            num_accepted_tokens=sum(accepted),
            accepted_per_depth=tuple([sum([n > d for n in accepted]) for d in range(max(accepted, default=0))]),
            drafted_by_source=tuple([drafted_from[source] for source in DRAFT_SOURCES]),
            accepted_by_source=tuple([accepted_from[source] for source in DRAFT_SOURCES]),
            prefix_cache_queries=scheduler.prefix_queries,
            prefix_cache_hits=scheduler.prefix_hits,
            **seconds,
        )
