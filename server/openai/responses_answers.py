"""What /v1/responses answers, for the OpenAPI page and for tests; see `answers`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, RootModel

from server.openai.answers import Answer, RequestMetrics, ScoredToken
from server.openai.responses_schema import TextConfig
from server.openai.responses_tools import Choice, FunctionTool

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(Answer):
    type: Literal["output_text"]
    text: str
    annotations: list[Any] = Field(max_length=0)
    logprobs: list[ScoredToken] = Field(description="Empty unless included.")


class OutputMessage(Answer):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: ItemStatus
    content: list[OutputText]


class OutputCall(Answer):
    """A function that is to be called."""

    id: str
    type: Literal["function_call"]
    call_id: str = Field(description="Goes with the function's output.")
    name: str
    arguments: str = Field(description="JSON, unless the status is `incomplete`.")
    status: ItemStatus


OutputItem = Annotated[OutputMessage | OutputCall, Field(discriminator="type")]


class InputTokensDetails(Answer):
    cached_tokens: int = Field(description="Input tokens that the prefix cache held.")
    cache_write_tokens: int = Field(description="0: the prefix cache is automatic.")


class OutputTokensDetails(Answer):
    reasoning_tokens: int = Field(description="0: the model does not reason apart.")


class ResponseUsage(Answer):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(Answer):
    code: Literal["server_error"]
    message: str


class IncompleteDetails(Answer):
    reason: Literal["max_output_tokens"]


class ResponseObject(Answer):
    """A response. What the request asked for is echoed."""

    id: str
    object: Literal["response"]
    created_at: int = Field(description="Unix seconds.")
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[OutputItem] = Field(description="Texts and calls as the model said them, at least one in the end.")
    usage: ResponseUsage | None
    metrics: RequestMetrics | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    prompt_cache_key: str | None
    safety_identifier: str | None
    temperature: float
    text: TextConfig
    tool_choice: Choice
    tools: list[FunctionTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    user: str | None
    reasoning: dict[str, Any] | None
    background: Literal[False]
    store: Literal[False]
    previous_response_id: None
    service_tier: Literal["default"]


class Event(Answer):
    sequence_number: int = Field(description="Counts the events of a stream from 0.")


class ResponseEvent(Event):
    """The response as it is now. The last three types end the stream."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: ResponseObject


class OutputItemEvent(Event):
    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItem


class PartEvent(Event):
    item_id: str
    output_index: int
    content_index: int


class ContentPartEvent(PartEvent):
    type: Literal["response.content_part.added", "response.content_part.done"]
    part: OutputText


class TextDeltaEvent(PartEvent):
    """The deltas joined are the text."""

    type: Literal["response.output_text.delta"]
    delta: str
    logprobs: list[ScoredToken]


class TextDoneEvent(PartEvent):
    type: Literal["response.output_text.done"]
    text: str
    logprobs: list[ScoredToken]


class ArgumentsDeltaEvent(Event):
    """The deltas joined are the arguments."""

    type: Literal["response.function_call_arguments.delta"]
    item_id: str
    output_index: int
    delta: str


class ArgumentsDoneEvent(Event):
    type: Literal["response.function_call_arguments.done"]
    item_id: str
    output_index: int
    name: str
    arguments: str


class ErrorEvent(Event):
    """Comes before `response.failed`."""

    type: Literal["error"]
    code: str | None
    message: str
    param: str | None


TextEvent = ContentPartEvent | TextDeltaEvent | TextDoneEvent
AnyEvent = ResponseEvent | OutputItemEvent | TextEvent | ArgumentsDeltaEvent | ArgumentsDoneEvent | ErrorEvent


class ResponseStreamEvent(RootModel[Annotated[AnyEvent, Field(discriminator="type")]]):
    """An event of a streamed response; the name of the event is its `type`."""
