"""What the engine remembers of one request, and of its part in one step.

Invariants:
- `tokens` is prompt + output; the last token of a decoding request, the root, has no K and V yet;
- `slots[i]` holds the K and V of `tokens[i]`, for the first `num_computed` tokens;
- the first `num_shared` slots are the prefix cache's, locked through `prefix_node`; the others are the request's own.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from server.engine.messages import (
    DraftSource,
    FinishReason,
    RequestStats,
    SpeculationStats,
    Submit,
    TokenLogprobs,
)
from server.engine.prefix import Node


@dataclass(slots=True)
class SpeculationCounters:
    """Mutable sums behind `SpeculationStats`."""

    num_spec_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted: int = 0
    num_steps: int = 0
    step_seconds: float = 0.0
    plain_seconds: float = 0.0
    histogram: list[int] = field(default_factory=list)
    verified_places: set[int] = field(default_factory=set)  # of tokens in the prediction
    accepted_places: set[int] = field(default_factory=set)

    def add(self, num_nodes: int, num_accepted: int) -> None:
        self.num_spec_steps += 1
        self.num_draft_tokens += num_nodes
        self.num_accepted += num_accepted
        self.histogram.extend([0] * (num_accepted + 1 - len(self.histogram)))
        self.histogram[num_accepted] += 1

    def add_prediction(self, start: int, num_verified: int, num_accepted: int) -> None:
        """Count tokens of the prediction, which were verified from `start` on."""
        self.verified_places.update(range(start, start + num_verified))
        self.accepted_places.update(range(start, start + num_accepted))

    def add_step(self, seconds: float, plain_seconds: float) -> None:
        """Count a step that gave a token, and what plain decoding would have taken for what it gave."""
        self.num_steps += 1
        self.step_seconds += seconds
        self.plain_seconds += plain_seconds

    def stats(self) -> SpeculationStats:
        return SpeculationStats(
            self.num_spec_steps,
            self.num_draft_tokens,
            self.num_accepted,
            tuple(self.histogram),
            num_accepted_prediction_tokens=len(self.accepted_places),
            num_rejected_prediction_tokens=len(self.verified_places - self.accepted_places),
            num_steps=self.num_steps,
            step_seconds=self.step_seconds,
            plain_seconds=self.plain_seconds,
        )


@dataclass(slots=True, eq=False)
class Request:
    """One open request."""

    submit: Submit
    arrival: int  # running number, for first-come first-served
    submit_time: float
    tokens: list[int] = field(init=False)
    slots: array[int] = field(default_factory=lambda: array("q"))  # 64-bit: the runner reads it as it lies
    num_shared: int = 0
    prefix_node: Node | None = None
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # being collected; None when off or already sent
    speculation: SpeculationCounters = field(default_factory=SpeculationCounters)
    draft_quality: float = 1.0  # what the heads bring to this request, against others in its batches

    def __post_init__(self) -> None:
        self.tokens = list(self.submit.prompt)
        if self.submit.sampling.prompt_logprobs is not None:
            self.prompt_logprobs = [None]

    @property
    def id(self) -> str:
        return self.submit.request_id

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: lower priority number, then earlier arrival."""
        return self.submit.priority, self.arrival

    @property
    def num_prompt(self) -> int:
        return len(self.submit.prompt)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_computed(self) -> int:
        return len(self.slots)

    @property
    def num_remaining(self) -> int:
        """Tokens whose K and V are to be computed: 1 is a decode step."""
        return len(self.tokens) - len(self.slots)

    @property
    def own_slots(self) -> array[int]:
        return self.slots[self.num_shared :]

    def finish_reason(self, token: int, eos_token_ids: frozenset[int]) -> FinishReason | None:
        """Does the request end with `token`, which has just been appended?"""
        sampling = self.submit.sampling
        is_eos = token in eos_token_ids and not sampling.ignore_eos
        if self.num_output >= sampling.min_tokens and (is_eos or token in sampling.stop_token_ids):
            return "stop"
        return "length" if self.num_output >= sampling.max_tokens else None

    def stats(self, now: float) -> RequestStats:
        started = now if self.first_scheduled_time is None else self.first_scheduled_time
        first_token = now if self.first_token_time is None else self.first_token_time
        return RequestStats(
            num_prompt_tokens=self.num_prompt,
            num_cached_tokens=self.num_cached_tokens,
            num_output_tokens=self.num_output,
            num_preemptions=self.num_preemptions,
            queue_seconds=started - self.submit_time,
            prefill_seconds=first_token - started,
            decode_seconds=now - first_token,
            speculation=self.speculation.stats(),
        )


@dataclass(frozen=True, slots=True)
class Draft:
    """A tree of guesses below a root, best first, so that each beginning of it is a tree too."""

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    sources: tuple[DraftSource, ...] = ()  # who guessed each node
    values: tuple[float, ...] = ()  # the probability that it and all its ancestors are right; they never rise
    prediction_start: int = 0  # index, in the prediction, of the first of its nodes; they are one chain from the root

    def first(self, count: int) -> Draft:
        """The best `count` nodes."""
        return Draft(
            self.tokens[:count], self.parents[:count], self.sources[:count], self.values[:count], self.prediction_start
        )


@dataclass(slots=True)
class Work:
    """One request's rows in one step: a chain of its own tokens and, below the last of them, tree nodes."""

    request: Request
    start: int  # index of the chain's first token; equals num_computed
    chain_slots: list[int]
    node_tokens: tuple[int, ...] = ()
    node_parents: tuple[int, ...] = ()
    node_slots: list[int] = field(default_factory=list)
    node_sources: tuple[DraftSource, ...] = ()
    prediction_start: int = 0  # as in `Draft`
    accepted: tuple[int, ...] = ()  # nodes accepted and emitted, known after the step
    has_failed: bool = False  # the runner cannot draft for it
    reaches_end: bool = field(init=False)  # the chain ends with the last known token, so its last row is sampled from

    def __post_init__(self) -> None:
        self.reaches_end = self.start + len(self.chain_slots) == len(self.request.tokens)

    @property
    def num_chain(self) -> int:
        return len(self.chain_slots)

    @property
    def node_depths(self) -> list[int]:
        """Distance of each node from the root: at least 1."""
        depths: list[int] = []
        for parent in self.node_parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths

    def count_speculation(self) -> None:
        """Add this step's nodes to the request's sums."""
        if not self.node_tokens:
            return
        counters = self.request.speculation
        counters.add(len(self.node_tokens), len(self.accepted))
        num_accepted = sum(self.node_sources[node] == "prediction" for node in self.accepted)
        counters.add_prediction(self.prediction_start, self.node_sources.count("prediction"), num_accepted)

    @property
    def chain_tokens(self) -> list[int]:
        return self.request.tokens[self.start : self.start + len(self.chain_slots)]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the runner found for one `Work`. Nothing at all for a chunk that does not reach the end."""

    token_ids: tuple[int, ...] = ()  # accepted tokens, then the bonus
    path: tuple[int, ...] = ()  # accepted nodes; one fewer than token_ids, or as many if it is over
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of the tokens after each chain row, as far as known
    is_over: bool = False  # nothing may follow: there is no bonus token
    is_complete: bool = False  # the last of token_ids completes the request's grammar
    error: str | None = None  # why the request cannot go on, a sentence
