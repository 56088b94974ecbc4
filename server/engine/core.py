"""The engine without its process: submit, abort, and `step`, which schedules, drafts, runs and updates.

Invariants:
- every submitted request gets exactly one terminal delta, from `step`, `abort` or `shutdown`;
- between steps, `scheduler.check()` holds;
- a request that the runner fails on ends with an error, and no other does; only if `runner.check` says that nobody can
  be served any more does the engine end;
- while there is work, every second of the process is in exactly one step's `step_seconds` or `message_seconds`;
- what the controller does changes times and counts, never a token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import monotonic
from typing import Any, Final

from server.engine.controller import Controller, StaticController
from server.engine.cost import CostModel, Measured
from server.engine.guard import FAILED, guarded
from server.engine.messages import (
    DRAFT_SOURCES,
    ControllerState,
    Delta,
    EngineConfig,
    FinishReason,
    StepOutput,
    StepStats,
    Submit,
    TokenLogprobs,
)
from server.engine.model import ModelRunner
from server.engine.request import Outcome, Request, Work
from server.engine.scheduler import Scheduler
from server.engine.speedup import Plain, SpeedupMeter
from server.engine.trees import Trees, grow

TREE_SHARE: Final = 4  # a step's rows are divided by this: so many may be kept from prompts for trees
TELL_SECONDS: Final = 1.0  # between two accounts of the controller

logger = logging.getLogger(__name__)


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
        self.cost = CostModel()
        kind = StaticController if config.static_trees else Controller
        self.controller = kind(self.cost, config.num_nodes, control_share=config.control_share)
        self._meter = SpeedupMeter(self.cost)
        self.max_rows = config.max_num_batched_rows
        self._max_tree_rows = config.max_num_batched_rows // TREE_SHARE
        self._clock = clock
        self._run_seconds = 0.0  # of this step
        self._ran_at: float | None = None  # end of the last forward pass, if there was work since
        self._told_at = -TELL_SECONDS
        self.forget_seconds()
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

    def forget_seconds(self) -> None:
        """What the runner has done so far belongs to no step."""
        self.runner.kernel_seconds()
        self.runner.forward_seconds()

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
        if begun:
            self.controller.joined(len(begun), len(works))
        trees = grow(works, self.runner, self.controller, self.scheduler, self._clock)
        outcomes = self._run(works)
        taken, plain = self._learn(trees, started)
        deltas = [self._update(work, outcome, taken, plain) for work, outcome in zip(works, outcomes, strict=True)]
        num_accepted = sum([len(work.accepted) for work in works])
        saved = self._meter.add(trees.load, taken, plain, num_accepted, is_settled=trees.is_settled)
        if not trees.is_control:
            self.controller.took(trees.load, trees.expected_tokens, taken, has_asked=trees.num_asking > 0)
        now = self._clock()
        self._left_at = now if self.has_work else None
        self._ran_at = self._ran_at if self.has_work else None
        stats = self._stats(
            works,
            step_seconds=now - started,
            model_seconds=trees.draft_seconds + self._run_seconds,
            draft_seconds=trees.draft_seconds,
            forward_seconds=self.runner.forward_seconds(),
            kernel_seconds=self.runner.kernel_seconds(),
            message_seconds=message_seconds,
            saved_seconds=saved,
        )
        if now - self._told_at >= TELL_SECONDS:
            self._told_at = now
            stats = replace(stats, controller=self.controller_state())
        news = [delta for delta in deltas if delta is not None]
        if begun:
            said = {delta.request_id for delta in news}
            news += [Delta(request.id) for request in begun if request.id not in said]
        return StepOutput(tuple(news), stats)

    def controller_state(self) -> ControllerState:
        """All that is known of costs and gains."""
        cells, error = self.runner.calibration()
        return ControllerState(
            run_curve=self.cost.run.points(),
            draft_curve=self.cost.draft.points(),
            rest_curve=self.cost.rest.points(),
            tree_curve=self.cost.tree.points(),
            extra_seconds=self.cost.extra_seconds(),
            calibration=cells,
            calibration_error=error,
            speedups=self._meter.speedups(),
            decisions=tuple(self.controller.decisions),
            duels=self.controller.duels(),
        )

    def _learn(self, trees: Trees, started: float) -> tuple[float, Plain]:
        """Tell the cost model what this step took. Returns that, and what plain decoding would have taken."""
        now = self._clock()
        taken = now - (started if self._ran_at is None else self._ran_at)  # from one forward pass to the next
        self._ran_at = now
        load, cost = trees.load, self.cost
        num_rows, features, nodes = load.num_rows, load.features, 0.0
        if trees.num_nodes:
            num_rows += trees.num_nodes
            features = [a + b for a, b in zip(features, trees.node_features, strict=True)]
            nodes = cost.run_seconds(num_rows, features) - cost.run_seconds(load.num_rows, load.features)
        plain = self._meter.plain(load, taken, nodes + trees.draft_seconds, is_control=trees.is_control)
        if load.is_pure and load.num_decoding:
            whose = load.num_decoding, trees.num_nodes, trees.num_asking, trees.is_steady
            seconds = self._run_seconds, trees.draft_seconds, taken - self._run_seconds
            cost.learn(Measured(num_rows, features, *whose, *seconds))
        return taken, plain

    def _run(self, works: Sequence[Work]) -> list[Outcome | None]:
        """What the runner finds; None for whom it has failed on."""
        sound = [work for work in works if not work.has_failed]
        started = self._clock()
        found = iter(guarded(self.runner.run, sound, self.runner.check))
        self._run_seconds = self._clock() - started
        return [None if work.has_failed else next(found) for work in works]

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
        """Rows that prompts must not take from the trees of those who decode."""
        if not self.scheduler.has_prompts:
            return 0
        num_decoding = sum([request.num_remaining == 1 for request in self.scheduler.running])
        return self.controller.reserve(num_decoding, self._max_tree_rows)

    def _update(self, work: Work, outcome: Outcome | None, taken: float, plain: Plain) -> Delta | None:
        """Commit what one request has won in this step, and end it if that was all.

        The step took `taken` seconds, plain decoding would have taken `plain`.
        """
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
        if request.num_output > len(tokens):  # else it is the prompt's step
            request.speculation.add_step(taken, plain.seconds(len(work.accepted)))
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

    def _stats(self, works: Sequence[Work], **seconds: Any) -> StepStats:
        """Counts of this step, and the times in `seconds`, by their fields' names."""
        scheduler = self.scheduler
        drafts = [work for work in works if work.node_tokens]
        return StepStats(
            **seconds,
            **_of_drafts(drafts),
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            kv_cache_usage=1 - scheduler.num_available / max(scheduler.slots.num_slots, 1),
            num_rows=sum([work.num_chain + len(work.node_tokens) for work in works]),
            num_prompt_rows=sum([work.num_chain - work.reaches_end for work in works]),
            num_preemptions=scheduler.num_preemptions,
            prefix_cache_queries=scheduler.prefix_queries,
            prefix_cache_hits=scheduler.prefix_hits,
        )


def _of_drafts(drafts: Sequence[Work]) -> dict[str, Any]:
    """Fields of `StepStats` that count nodes."""
    if not drafts:
        return {}
    accepted = [len(work.accepted) for work in drafts]
    drafted_from = [source for work in drafts for source in work.node_sources]
    accepted_from = [work.node_sources[node] for work in drafts for node in work.accepted]
    return {
        "num_drafts": len(drafts),
        "num_draft_tokens": sum([len(work.node_tokens) for work in drafts]),
        "num_accepted_tokens": sum(accepted),
        "drafted_per_depth": _counted([depth for work in drafts for depth in work.node_depths]),
        "tree_sizes": tuple([len(work.node_tokens) for work in drafts]),
        "accepted_per_depth": tuple([sum([n > d for n in accepted]) for d in range(max(accepted, default=0))]),
        "drafted_by_source": tuple(map(drafted_from.count, DRAFT_SOURCES)),
        "accepted_by_source": tuple(map(accepted_from.count, DRAFT_SOURCES)),
    }


def _counted(depths: Sequence[int]) -> tuple[int, ...]:
    """[d]: how often depth d + 1 occurs."""
    return tuple([depths.count(depth) for depth in range(1, max(depths, default=0) + 1)])
