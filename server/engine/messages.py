"""Every message that crosses the process boundary. Frozen dataclasses, pickled; no torch, no behaviour.

Invariants:
- every `Submit` is answered by exactly one `Delta` whose `finish` is not None (its terminal delta);
- a request's first delta comes with the step that began it, without tokens if its prompt takes several steps;
- a request's deltas arrive in order, and their `token_ids` joined are the whole completion;
- the engine says `Ready` or `Failed` exactly once, before anything else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter
from typing import Any, ClassVar, Final, Literal

SpeculationMode = Literal["lossless", "typical", "off"]
FinishReason = Literal["stop", "length", "abort", "error"]
DraftSource = Literal["heads", "ngram", "prediction", "grammar"]
DRAFT_SOURCES: Final[tuple[DraftSource, ...]] = ("heads", "ngram", "prediction", "grammar")


class _Compact:
    """What crosses in every step: pickled as class and values, in half the time of a dataclass with slots.

    A class of this kind has two fields or more: `attrgetter` of one is no tuple.
    """

    __slots__ = ()
    __match_args__: ClassVar[tuple[str, ...]]  # the fields; a dataclass says so itself

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), _reader(self.__match_args__)(self)


@cache
def _reader(names: tuple[str, ...]) -> attrgetter[tuple[Any, ...]]:
    return attrgetter(*names)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled. Units and ranges are OpenAI's and vLLM's; the API process has validated them."""

    max_tokens: int  # 0 is allowed: compute the prompt only (`echo` with `logprobs`)
    min_tokens: int = 0  # end-of-sequence and stop tokens are impossible before this many tokens
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # besides the model's own end-of-sequence tokens
    ignore_eos: bool = False
    seed: int = 0  # 64-bit; drawn at random by the API process when the client gave none
    choice: int = 0  # index of this choice in an `n > 1` request; part of the noise key, so choices differ
    logprobs: int | None = None  # alternatives per sampled token; 0 is the sampled token alone; None is off
    prompt_logprobs: int | None = None  # the same for prompt tokens
    allowed_token_ids: tuple[int, ...] | None = None  # all others are impossible; None is off
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that the output never contains
    grammar: str | None = None  # what the output must follow, as llguidance takes it: Lark or JSON


@dataclass(frozen=True, slots=True)
class SpeculationParams:
    """How one request is speculated. `typical` is Medusa's lossy acceptance (arXiv 2401.10774, section 2.3.1)."""

    mode: SpeculationMode = "lossless"
    max_nodes: int | None = None  # tree nodes per step at most, root not counted; None is the server's number
    epsilon: float = 0.09
    delta: float = 0.3


@dataclass(frozen=True, slots=True)
class Submit:
    """One choice of one prompt. `request_id` is unique among open requests."""

    request_id: str
    prompt: tuple[int, ...]  # at least one token
    sampling: SamplingParams
    speculation: SpeculationParams = field(default_factory=SpeculationParams)
    priority: int = 0  # lower runs earlier, as in vLLM
    prediction: tuple[int, ...] = ()  # what the completion may well be; changes its speed, never its text


@dataclass(frozen=True, slots=True)
class Abort:
    """The client went away, or the API process saw a stop string. Unknown ids are ignored: they have just ended."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Leave the loop. Open requests end with `abort`."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of the model itself, before penalties, bias, temperature, truncation (vLLM: raw_logprobs)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), best first
    rank: int | None = None  # of a prompt token among all tokens, from 1; None for sampled tokens


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """Sums over one request. Accepted never counts the bonus token.

    A token of the prediction is accepted if a node that stood for it, by its place, was accepted in any step; it is
    rejected if such nodes were verified and none was accepted. So each counts once at most, and those that were never
    verified (the end of the prediction; what the output left out; a token that came as a bonus) do not count.
    """

    num_spec_steps: int = 0  # steps that verified at least one node
    num_draft_tokens: int = 0  # nodes verified
    num_accepted_draft_tokens: int = 0
    acceptance_histogram: tuple[int, ...] = ()  # [n]: steps with n accepted tokens
    num_accepted_prediction_tokens: int = 0
    num_rejected_prediction_tokens: int = 0
    num_steps: int = 0  # all that gave a token, with nodes or without
    step_seconds: float = 0.0  # of these steps
    plain_seconds: float = 0.0  # what plain decoding would have taken for the same tokens, by estimate


@dataclass(frozen=True, slots=True)
class RequestStats:
    """Said once, with the terminal delta. Times are seconds of the engine's clock."""

    num_prompt_tokens: int
    num_cached_tokens: int  # prompt tokens found in the prefix cache
    num_output_tokens: int
    num_preemptions: int
    queue_seconds: float  # submit until first scheduled
    prefill_seconds: float  # first scheduled until first token
    decode_seconds: float  # first token until the end
    speculation: SpeculationStats


@dataclass(frozen=True, slots=True)
class Delta(_Compact):
    """News of one request: zero or more tokens, and at most once the end."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()  # as many as token_ids if asked for, else empty
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None  # once, when the prompt is computed; first is None
    finish: FinishReason | None = None
    stop_token_id: int | None = None  # the token that ended it, the last of token_ids; None if nothing could follow
    error: str | None = None  # a sentence, with finish == "error"
    stats: RequestStats | None = None  # with finish


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """What so many rows, or requests, cost."""

    number: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Decision:
    """What the controller did in one step."""

    num_decoding: int  # requests that got a token
    num_rows: int  # before trees
    num_asking: int  # requests that the heads guessed for
    num_offered: int  # nodes
    num_taken: int
    least_value: float | None  # of the nodes taken: the probability that its whole path is right
    expected_tokens: float  # of the step, all requests together
    is_control: bool  # nobody was asked, so that plain decoding is measured


@dataclass(frozen=True, slots=True)
class CalibrationCell:
    """What became of guesses of one kind, depth and rank that the heads gave about this probability."""

    kind: str  # greedy, sampled or typical
    depth: int  # from 1
    rank: int  # from 1
    given: float  # the heads' own probability, the bucket's mean
    right: float  # how often they were
    num_seen: float  # the latest of them weigh most


@dataclass(frozen=True, slots=True)
class Speedup:
    """Time that plain decoding would have taken, over the time that was taken, at a number of requests."""

    batch: str  # such as 5-8, or all
    ratio: float
    low: float  # 95 % interval
    high: float
    num_steps: float  # recent ones, which it rests on
    num_control_steps: float  # of them, plain on purpose


@dataclass(frozen=True, slots=True)
class Duelled:
    """Steps in which the heads may be asked against their neighbours in which they rest, at a number of requests."""

    batch: str  # such as 5-8
    ratio: float  # of tokens per second
    num_compared: int  # blocks of steps
    has_won: bool  # so the heads may mostly be asked


@dataclass(frozen=True, slots=True)
class ControllerState:
    """What the engine knows of costs and gains; told about once a second."""

    run_curve: tuple[CurvePoint, ...]  # forward pass, sampling and verification, by rows
    draft_curve: tuple[CurvePoint, ...]  # by requests that the heads guess for
    rest_curve: tuple[CurvePoint, ...]  # the engine's own and messages, by requests
    tree_curve: tuple[CurvePoint, ...]  # trees of copies alone, besides their rows, by requests
    extra_seconds: tuple[tuple[str, float], ...]  # by what some rows have and others do not
    calibration: tuple[CalibrationCell, ...]
    calibration_error: float | None  # mean distance of calibrated probability and outcome
    speedups: tuple[Speedup, ...]
    decisions: tuple[Decision, ...]  # the latest last
    duels: tuple[Duelled, ...]


@dataclass(frozen=True, slots=True)
class StepStats(_Compact):
    """The engine after one step. Counters are this step's own, gauges are the state."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0  # 0..1; slots that a running request holds
    num_rows: int = 0  # rows of this step's forward pass
    num_prompt_rows: int = 0
    step_seconds: float = 0.0
    model_seconds: float = 0.0  # of step_seconds, those inside the runner
    kernel_seconds: float = 0.0  # of model_seconds, those inside kernels; 0 if nobody counts them
    draft_seconds: float = 0.0  # of model_seconds, those of drafting
    forward_seconds: float = 0.0  # of model_seconds, those of forward passes; the others sample and verify
    message_seconds: float = 0.0  # since the step before: pickling, sending, hearing; 0 after idleness
    num_preemptions: int = 0
    num_drafts: int = 0  # requests that verified at least one node in this step
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_per_depth: tuple[int, ...] = ()  # [d]: drafts whose node at depth d + 1 was accepted
    drafted_per_depth: tuple[int, ...] = ()  # [d]: nodes verified at depth d + 1
    tree_sizes: tuple[int, ...] = ()  # nodes of each tree verified
    drafted_by_source: tuple[int, ...] = ()  # num_draft_tokens, in the order of DRAFT_SOURCES; () without drafts
    accepted_by_source: tuple[int, ...] = ()  # num_accepted_tokens, likewise
    prefix_cache_queries: int = 0  # prompt tokens looked up
    prefix_cache_hits: int = 0  # prompt tokens found
    saved_seconds: float = 0.0  # what plain decoding would have taken longer, by estimate; below 0: shorter
    controller: ControllerState | None = None  # about once a second


@dataclass(frozen=True, slots=True)
class StepOutput(_Compact):
    """One engine step: all news of all requests."""

    deltas: tuple[Delta, ...]
    stats: StepStats


@dataclass(frozen=True, slots=True)
class Steps:
    """Steps in their order, in one message."""

    outputs: tuple[StepOutput, ...]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the API process must know of the loaded model."""

    path: str  # folder with tokenizer.json, tokenizer_config.json, config.json
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    num_heads: int  # Medusa heads; 0 without
    kv_cache_tokens: int
    device: str
    dtype: str
    quantization: str  # int8, int4 or none


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine accepts requests."""

    info: ModelInfo


@dataclass(frozen=True, slots=True)
class Failed:
    """The engine could not start. `message` is one sentence that says what is wrong and what to do."""

    message: str


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """All that the engine process is told, resolved from the settings. None means: decide at load."""

    model: str  # local folder (already fetched and converted)
    heads: str | None = None  # file or folder
    device: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None  # int8, int4 or none
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_rows: int = 512
    kv_cache_tokens: int | None = None
    gpu_memory_utilization: float = 0.9  # share that weights, cache and other programs may fill
    prefix_cache: bool = True
    num_nodes: int = 32  # tree nodes per request and step at most, unless the request says its own
    static_trees: bool = False  # always so many, in one shape, whatever they cost and win
    control_share: float = 0.01  # of steps: those that decode plainly, so that the speedup is measured
    enforce_eager: bool = False  # no CUDA graphs
    num_threads: int | None = None
    ngram: bool = True  # guess repeats of the request's own text
    ngram_min: int = 2  # tokens that must match before a guess
    ngram_max: int = 4  # a match as long as this is not improved upon
    ngram_max_nodes: int = 8
    own_heads: bool = True  # a multi-token model drafts with its own if none are given


ToEngine = Submit | Abort | Shutdown
FromEngine = Ready | Failed | Steps
