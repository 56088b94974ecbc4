"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from server.openai.schema.common import MAX_LOGPROBS, Body, GenerationRequest


def _text(value: Any) -> Any:
    """A message's content parts as one text; parts are joined by line breaks, as in vLLM."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "text":
            raise ValueError('only parts of the form {"type": "text", "text": "..."} can be read by this model')
        if not isinstance(part["text"], str):
            raise ValueError("the text of a content part must be a string")
    return "\n".join(part["text"] for part in value)


def _no_tools(value: list[Any]) -> list[Any]:
    if value:
        raise ValueError("tool calling is not supported; leave it out")
    return value


class Message(Body):
    """One turn of a chat. `developer` is OpenAI's newer name for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text, json_schema_input_type=str | list[dict[str, str]])]
    name: str | None = None  # handed to the chat template

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, data: Any) -> Any:
        """Clients send an answer back as they got it, with all the things it did not have."""
        if not isinstance(data, dict):
            return data
        empty = ("refusal", "annotations", "audio", "function_call", "tool_calls")
        return {key: value for key, value in data.items() if value or key not in empty}


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)  # the older name
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[Any], AfterValidator(_no_tools)] = Field(default_factory=list)
    functions: Annotated[list[Any], AfterValidator(_no_tools)] = Field(default_factory=list)
    tool_choice: Literal["none", "auto"] | None = None  # without tools both mean the same
