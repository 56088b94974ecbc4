"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from server.openai.schema.body import Body, UnsupportedError
from server.openai.schema.common import MAX_LOGPROBS, GenerationRequest, refused
from server.openai.schema.tools import MAX_TOOLS, Tool, ToolCall, ToolChoice


def _text(value: Any) -> Any:
    """A message's content parts as one text; parts are joined by line breaks, as in vLLM."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "text":
            raise UnsupportedError('only parts of the form {"type": "text", "text": "..."} can be read by this model')
        if not isinstance(part["text"], str):
            raise ValueError("the text of a content part must be a string")
    return "\n".join(part["text"] for part in value)


def _no_functions(value: list[Any]) -> list[Any]:
    if value:
        raise UnsupportedError("not supported: it is the old name of tools; send tools and tool_choice")
    return value


class Message(Body):
    """One turn of a chat. `developer` is OpenAI's newer name for `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(description="Who speaks.")
    content: Annotated[str, BeforeValidator(_text, json_schema_input_type=str | list[dict[str, str]])] | None = Field(
        default=None,
        description="What is said: a text, or parts of type text, which are joined by line breaks. Only an assistant's "
        "message with tool_calls needs none.",
    )
    name: str | None = Field(default=None, description="The speaker's name, handed to the chat template.")
    tool_calls: list[ToolCall] = Field(
        default_factory=list,
        fail_fast=True,
        description="Of an assistant: the calls that it asked for. Default: none.",
    )
    tool_call_id: str | None = Field(default=None, description="Of a tool: the call whose result this is.")

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, data: Any) -> Any:
        """Clients send an answer back as they got it, with all the things it did not have."""
        if not isinstance(data, dict):
            return data
        empty = ("refusal", "annotations", "audio", "function_call", "tool_calls")
        return {key: value for key, value in data.items() if value or key not in empty}

    @model_validator(mode="after")
    def _fits_its_role(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing; only an assistant's message with tool_calls needs none")
        if self.tool_calls and self.role != "assistant":
            raise ValueError('tool_calls belong to the role "assistant"')
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError('tool_call_id goes with the role "tool", and with no other')
        return self


class Prediction(Body):
    """OpenAI's Predicted Outputs: what the answer may well be. It changes the speed of the answer, never its text."""

    type: Literal["content"] = Field(description="Only content.")
    content: Annotated[str, BeforeValidator(_text, json_schema_input_type=str | list[dict[str, str]])] = Field(
        description="The predicted text: a string, or parts of type text."
    )


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(
        min_length=1, fail_fast=True, description="The conversation so far, at least one message."
    )
    max_completion_tokens: int | None = Field(
        default=None, ge=1, description="Most tokens of the answer, at least 1. Default: all that fit."
    )
    max_tokens: int | None = Field(default=None, ge=1, description="The older name of max_completion_tokens.")
    logprobs: bool = Field(default=False, description="Log-probabilities of the answer's tokens. Default: false.")
    top_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="With logprobs, those of so many likeliest tokens, 0 to 20. Default: 0.",
    )
    add_generation_prompt: bool = Field(
        default=True, description="The template opens the assistant's turn (vLLM's). Default: true."
    )
    continue_final_message: bool = Field(
        default=False,
        description="The answer continues the last message; add_generation_prompt must be false (vLLM's). Default: no.",
    )
    echo: bool = Field(
        default=False,
        description="The last message comes before the answer if the same role has it (vLLM's). Default: false.",
    )
    add_special_tokens: bool = Field(
        default=False,
        description="The tokenizer's special tokens are added to those of the template (vLLM's). Default: false.",
    )
    chat_template: str | None = Field(
        default=None,
        min_length=1,
        description="A Jinja template instead of the model's; needs the flag --trust-request-chat-template (vLLM's). "
        "Default: the model's.",
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Variables for the chat template (vLLM's). Default: none."
    )
    documents: list[dict[str, str]] | None = Field(
        default=None,
        fail_fast=True,
        description="Variable of the chat template, refused if it has none (vLLM's). Default: none.",
    )
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description="Variable of the chat template, refused if it has none. Default: the template's."
    )
    verbosity: Literal["low", "medium", "high"] | None = Field(
        default=None, description="Variable of the chat template, refused if it has none. Default: the template's."
    )
    prediction: Prediction | None = Field(
        default=None,
        description="Text that the answer will repeat in large parts, such as a file to be edited. Under a grammar "
        "(response_format, tools that are forced) nothing is copied from it. Default: none.",
    )
    tools: list[Tool] = Field(
        default_factory=list,
        max_length=MAX_TOOLS,
        description=f"Functions the model may call, at most {MAX_TOOLS}. Default: none.",
    )
    functions: Annotated[list[Any], AfterValidator(_no_functions)] = Field(
        default_factory=list, description="Refused: the older name of tools. Send tools."
    )
    tool_choice: ToolChoice | None = Field(
        default=None,
        description="none: a message; auto: either; required or a named function: calls. Default: auto with tools.",
    )
    parallel_tool_calls: bool = Field(default=True, description="One answer may hold several calls. Default: true.")
    function_call: Literal["none", "auto"] | None = Field(
        default=None, description="The older name of tool_choice; none or auto, which without functions mean the same."
    )

    modalities: list[Literal["text"]] | None = Field(
        default=None, fail_fast=True, description='Only ["text"], the default.'
    )
    service_tier: Literal["auto", "default"] | None = Field(
        default=None, description="auto or default: there is one tier; see priority."
    )
    prompt_cache_retention: Literal["in_memory", "24h"] | None = Field(
        default=None, description="Tolerated: a maximum; prefixes are cached in memory until it is needed. No effect."
    )
    prompt_cache_options: Annotated[None, refused("prefixes are always cached, for as long as there is room")] = Field(
        default=None, description="Refused: the prefix cache cannot be told what to keep, or how long."
    )
    audio: Annotated[None, refused("the model says text only")] = Field(
        default=None, description="Refused: the model says text only."
    )
    moderation: Annotated[None, refused("there is no moderation model")] = Field(
        default=None, description="Refused: there is no moderation model."
    )
    web_search_options: Annotated[None, refused("the server does not search the web")] = Field(
        default=None, description="Refused: the server does not search the web."
    )
