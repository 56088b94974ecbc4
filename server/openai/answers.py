"""What the server answers, for the OpenAPI page and for tests. The routes build plain dictionaries, which is faster.

Invariant: every answer and every event of a stream has exactly these fields (`tests/server/test_openapi.py`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Finish = Annotated[
    Literal["stop", "length"],
    Field(description="`stop`: the model, a stop string or a stop token ended it. `length`: the limit did."),
]
StopReason = Annotated[
    str | int | None, Field(description="vLLM: the stop string or stop token id that ended it; null otherwise.")
]


ChatFinish = Annotated[
    Literal["stop", "length", "tool_calls"],
    Field(description="As in completions; `tool_calls`: tools are to be called."),
]


class Answer(BaseModel):
    """Base of everything that a client gets."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetails(Answer):
    message: str = Field(description="What is wrong, and what to do.")
    type: str = Field(description="`invalid_request_error`, `server_error`, ...")
    param: str | None = Field(description="The field at fault, if there is one.")
    code: str = Field(description="A word for programs, such as `context_length_exceeded`.")


class ErrorAnswer(Answer):
    """Whatever goes wrong."""

    error: ErrorDetails


class PromptTokensDetails(Answer):
    cached_tokens: int = Field(description="Prompt tokens that the prefix cache held.")


class CompletionTokensDetails(Answer):
    accepted_prediction_tokens: int = Field(description="Tokens of `prediction` that became text.")
    rejected_prediction_tokens: int = Field(description="Tokens of `prediction` that were verified in vain.")


class Usage(Answer):
    prompt_tokens: int = Field(description="Once for each prompt, however many choices it has.")
    completion_tokens: int = Field(description="Of all choices.")
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = Field(description="Null while not known.")
    completion_tokens_details: CompletionTokensDetails | None = Field(description="Null while not known.")


class SpeculativeDecoding(Answer):
    num_spec_steps: int = Field(description="Steps that verified at least one guess.")
    num_draft_tokens: int = Field(description="Guesses verified.")
    num_accepted_draft_tokens: int = Field(description="Guesses that were right; the bonus token is not counted.")
    mean_acceptance_length: float | None = Field(description="Tokens per such step: 1 + accepted / steps.")
    draft_acceptance_rate: float | None = Field(description="Accepted / verified.")
    acceptance_histogram: list[int] = Field(description="[n]: steps with n accepted guesses.")


class RequestMetrics(Answer):
    """Ours: how this very request was speculated, in vLLM's shape, and what that won."""

    speculative_decoding: SpeculativeDecoding | None = Field(description="Null if the engine did not say.")
    speedup: float | None = Field(
        description="Time that plain decoding would have taken from the first token on, by the engine's estimate, over "
        "the time taken. Null if the engine did not say, or if the first token was all."
    )


class PromptCandidate(Answer):
    logprob: float
    rank: int = Field(description="1 is the likeliest.")
    decoded_token: str


PromptLogprobs = Annotated[
    list[dict[str, PromptCandidate] | None] | None,
    Field(description="vLLM: with `prompt_logprobs`, by token id; null for the first token."),
]
TokenIds = Annotated[list[int] | None, Field(description="vLLM: with `return_token_ids`.")]


class CompletionLogprobLists(Answer):
    """Parallel lists, one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="Null for the first token of an echoed prompt.")
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="In characters of the choice's text.")


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobLists | None
    finish_reason: Finish
    stop_reason: StopReason
    token_ids: TokenIds = None
    prompt_token_ids: TokenIds = None
    prompt_logprobs: PromptLogprobs = None


class CompletionChunkChoice(CompletionChoice):
    finish_reason: Finish | None = Field(description="Null until the last chunk of a choice.")  # type: ignore[assignment]


class Header(Answer):
    id: str
    created: int = Field(description="Unix seconds.")
    model: str
    system_fingerprint: str | None


class Completion(Header):
    """A text completion."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage
    metrics: RequestMetrics


class CompletionChunk(Header):
    """A part of a streamed text completion."""

    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice] = Field(description="One, or none in the chunk of the usage.")
    usage: Usage | None = Field(default=None, description="With `stream_options`.")
    metrics: RequestMetrics | None = Field(default=None, description="In the last chunk.")


class TokenLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int] = Field(description="The token's bytes: a token may be a part of a character.")


class ScoredToken(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Answer):
    content: list[ScoredToken]
    refusal: None


class FunctionCall(Answer):
    name: str
    arguments: str = Field(description="JSON.")


class ToolCallAnswer(Answer):
    id: str
    type: Literal["function"]
    function: FunctionCall


class FunctionCallDelta(Answer):
    name: str | None = Field(default=None, description="In the first part of a call.")
    arguments: str = Field(description="The parts joined are JSON.")


class ToolCallDelta(Answer):
    index: int
    id: str | None = Field(default=None, description="In the first part of a call.")
    type: Literal["function"] | None = None
    function: FunctionCallDelta


class ChatMessage(Answer):
    role: Literal["assistant"]
    content: str | None = Field(description="Null if there are calls only.")
    refusal: None
    tool_calls: list[ToolCallAnswer] = Field(default_factory=list)


class ChatDelta(Answer):
    role: Literal["assistant"] | None = Field(default=None, description="In the first chunk.")
    content: str | None = None
    refusal: None = None
    tool_calls: list[ToolCallDelta] = Field(default_factory=list)


class ChatChoice(Answer):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinish
    stop_reason: StopReason
    token_ids: TokenIds = None


class ChatChunkChoice(Answer):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinish | None = Field(description="Null until the last chunk of a choice.")
    stop_reason: StopReason
    token_ids: TokenIds = None


class ChatCompletion(Header):
    """A chat completion."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    prompt_token_ids: TokenIds = None
    prompt_logprobs: PromptLogprobs = None
    usage: Usage
    metrics: RequestMetrics


class ChatCompletionChunk(Header):
    """A part of a streamed chat completion."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice] = Field(description="One, or none in the chunk of the usage.")
    prompt_token_ids: TokenIds = Field(default=None, description="In the first chunk.")
    usage: Usage | None = Field(default=None, description="With `stream_options`.")
    metrics: RequestMetrics | None = Field(default=None, description="In the last chunk.")


class ModelCard(Answer):
    id: str
    object: Literal["model"]
    created: int = Field(description="Unix seconds: when the server started.")
    owned_by: str
    max_model_len: int = Field(description="vLLM: tokens of prompt and completion together.")


class ModelList(Answer):
    object: Literal["list"]
    data: list[ModelCard]


class TokenizeAnswer(Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = Field(description="With `return_token_strs`.")


class DetokenizeAnswer(Answer):
    prompt: str


class HealthAnswer(Answer):
    status: Literal["ready"]


class VersionAnswer(Answer):
    version: str
