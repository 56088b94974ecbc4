"""What a client may send to /v1/responses. Every field of OpenAI's is honoured, refused with its reason, or tolerated.

Invariants:
- `SHARED` are fields of chat completions with the same name and meaning; they are handed on as they came;
- nothing is stored: whatever refers to another response, or asks to keep this one, is refused;
- tolerated are `user`, `safety_identifier` and `prompt_cache_key`, which name the caller and are echoed, and
  `max_tool_calls`, which limits tools that run at OpenAI's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from server.openai.responses_items import InputItem, Item
from server.openai.responses_tools import FunctionTool, ToolChoice
from server.openai.schema import MAX_LOGPROBS, MAX_STOPS, Body, RequestBody, SpeculationOptions
from server.openai.schema.tools import MAX_TOOLS

LOGPROBS: Final = "message.output_text.logprobs"
SHARED: Final = {"model", "temperature", "top_p", "top_k", "min_p", "min_tokens", "stop", "ignore_eos", "seed"} | {
    "presence_penalty", "frequency_penalty", "repetition_penalty", "priority", "chat_template_kwargs", "speculation"
}  # fmt: skip
NOTHING: Final[list[Any]] = [None, False, [], {}]


@dataclass(frozen=True)
class Refused:
    """Marks a field that may only say nothing."""

    reason: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": NOTHING, "description": f"Refused: {self.reason}."}

    def _check(self, value: Any) -> Any:
        if not any(type(value) is type(nothing) and value == nothing for nothing in NOTHING):
            raise ValueError(self.reason)
        return value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _input_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class TextConfig(Body):
    """What the text must look like."""

    format: dict[str, Any] = Field(
        default={"type": "text"},
        description='`{"type": "text"}`, the default, `{"type": "json_object"}` for any JSON object, or '
        '`{"type": "json_schema", "name": ..., "schema": {...}}` for JSON that fits the schema for certain.',
        examples=[{"type": "text"}],
    )
    verbosity: Literal["medium"] | None = Field(default=None, description="Only the default, `medium`.")


class ResponsesStreamOptions(Body):
    """How a stream is sent."""

    include_obfuscation: Annotated[Any, Refused("streams are not obfuscated; set include_obfuscation to false")] = False


class ResponsesReasoning(Body):
    """Only the absence of reasoning can be asked for."""

    effort: Literal["none"] | None = Field(default=None, description="Only `none`: the model does not reason apart.")


Include = Literal[
    "message.output_text.logprobs",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
]


class ResponsesRequest(RequestBody):
    """POST /v1/responses."""

    model: str | None = Field(default=None, description="The served model, if absent.")
    input: Annotated[
        list[InputItem],
        BeforeValidator(_input_items, json_schema_input_type=str | list[Item]),
        Field(min_length=1, description="A user's text, or the whole conversation."),
    ]
    instructions: str | None = Field(default=None, description="A system message that comes before the input.")
    max_output_tokens: int | None = Field(default=None, ge=1, description="At most so many tokens; else all that fit.")
    temperature: float = Field(default=1.0, ge=0, le=2, description="0 is greedy.")
    top_p: float = Field(default=1.0, ge=0, le=1, description="Sample among the likeliest tokens of this mass.")
    text: TextConfig = Field(default=TextConfig(), description="What the text must look like.")
    top_logprobs: int | None = Field(
        default=None, ge=0, le=MAX_LOGPROBS, description=f"Alternatives for each token; needs include `{LOGPROBS}`."
    )
    include: list[Include] = Field(
        default_factory=list, description=f"`{LOGPROBS}`; the others name what never occurs here, and add nothing."
    )
    truncation: Literal["auto", "disabled"] = Field(
        default="disabled", description="`auto` drops the oldest turns of a conversation that does not fit."
    )
    stream: bool = Field(default=False, description="Server-sent events instead of one object.")
    stream_options: ResponsesStreamOptions | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] = Field(
        default_factory=dict, max_length=16, description="Echoed: up to 16 pairs."
    )
    service_tier: Literal["auto", "default"] | None = Field(default=None, description="There is one, `default`.")
    reasoning: ResponsesReasoning | None = None
    tools: list[FunctionTool] = Field(
        default_factory=list,
        max_length=MAX_TOOLS,
        description=f"Functions the model may call, at most {MAX_TOOLS}. Default: none.",
    )
    tool_choice: ToolChoice = Field(
        default="auto",
        description="none: a message; auto: either; required or a named function: calls. Default: auto.",
    )
    parallel_tool_calls: bool = Field(default=True, description="One answer may hold several calls. Default: true.")
    max_tool_calls: int | None = Field(default=None, ge=0, description="Echoed: it limits OpenAI's own tools.")
    prompt_cache_retention: Literal["in_memory"] | None = Field(default=None, description="Only in memory.")
    background: Annotated[Any, Refused("responses are made while the client waits; leave background out")] = None
    context_management: Annotated[Any, Refused("the conversation is never compacted; leave context_management out")] = (
        None
    )
    conversation: Annotated[Any, Refused("conversations are not stored; send their items as input")] = None
    moderation: Annotated[Any, Refused("there is no moderation here; leave it out")] = None
    previous_response_id: Annotated[Any, Refused("responses are not stored; send the whole conversation as input")] = (
        None
    )
    prompt: Annotated[Any, Refused("prompt templates are not stored; send their text as instructions and input")] = None
    prompt_cache_options: Annotated[
        Any, Refused("the prefix cache is automatic and has no options; leave prompt_cache_options out")
    ] = None
    store: Annotated[Any, Refused("responses are not stored; set store to false")] = None
    user: str | None = Field(default=None, description="Tolerated and echoed.")
    safety_identifier: str | None = Field(default=None, description="Tolerated and echoed.")
    prompt_cache_key: str | None = Field(default=None, description="Tolerated and echoed.")

    top_k: int = Field(default=0, ge=-1, le=2**31 - 1, description="vLLM: sample among so many; 0 and -1 are off.")
    min_p: float = Field(default=0.0, ge=0, le=1, description="vLLM: least probability relative to the likeliest.")
    presence_penalty: float = Field(default=0.0, ge=-2, le=2, description="Off a token that has occurred.")
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2, description="Off a token for each occurrence.")
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100, description="vLLM: divides what has occurred.")
    min_tokens: int = Field(default=0, ge=0, description="vLLM: the text does not end before.")
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        BeforeValidator(_listed, json_schema_input_type=str | list[str]),
        Field(max_length=MAX_STOPS, description="Up to 16 texts that end the answer, and are not part of it."),
    ] = Field(default_factory=list)
    ignore_eos: bool = Field(default=False, description="vLLM: go on after the model's end of text.")
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64, description="Same seed, same text; else random.")
    priority: int = Field(default=0, ge=-(2**31), lt=2**31, description="vLLM: lower runs earlier.")
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="vLLM: handed to the template.")
    speculation: SpeculationOptions = Field(default=SpeculationOptions(), description="How it is speculated.")
