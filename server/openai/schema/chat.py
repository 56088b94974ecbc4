"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from server.openai.schema.body import Body
from server.openai.schema.common import MAX_LOGPROBS, GenerationRequest
from server.openai.schema.tools import MAX_TOOLS, Tool, ToolCall, ToolChoice


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


def _no_functions(value: list[Any]) -> list[Any]:
    if value:
        raise ValueError("functions is the old name of tools; send tools and tool_choice")
    return value


class Message(Body):
    """One turn of a chat. `developer` is OpenAI's newer name for `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_text, json_schema_input_type=str | list[dict[str, str]])] | None = None
    name: str | None = None  # handed to the chat template
    tool_calls: list[ToolCall] = Field(
        default_factory=list, description="Of an assistant: the calls that it asked for."
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
    tools: list[Tool] = Field(
        default_factory=list, max_length=MAX_TOOLS, description=f"Functions the model may call; at most {MAX_TOOLS}."
    )
    functions: Annotated[list[Any], AfterValidator(_no_functions)] = Field(
        default_factory=list, description="The old name of `tools`; refused."
    )
    tool_choice: ToolChoice | None = Field(
        default=None,
        description="`none`: a message; `auto` (default with tools): either; `required` or a named function: calls.",
    )
    parallel_tool_calls: bool = Field(default=True, description="May one answer hold several calls?")
