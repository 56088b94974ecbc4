"""The conversation that a client sends to /v1/responses, item by item, and the chat messages that it amounts to.

Invariants:
- an answer's items can be sent back as they came: their `id`, `status`, `phase`, `annotations` and `logprobs` are
  tolerated;
- calls belong to the assistant's message before them: one turn of the model is one message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from server.openai.schema import Body
from server.openai.schema.common import refused
from server.openai.schema.tools import Arguments

Json = dict[str, Any]
AS_IT_CAME = "Tolerated: as it came with the answer."


def _input_parts(value: Any) -> Any:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


class Part(Body):
    """A part of a message's content."""

    type: Literal["input_text", "output_text"] = Field(description="`output_text` is what an assistant said.")
    text: str = Field(description="The text.")
    annotations: list[Any] = Field(default_factory=list, description=AS_IT_CAME)
    logprobs: list[Any] = Field(default_factory=list, description=AS_IT_CAME)

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("type") not in ("input_text", "output_text"):
            raise ValueError("only parts of type input_text and output_text can be read by this model")
        return data

    def as_chat(self) -> Json:
        return {"type": "text", "text": self.text}


class MessageItem(Body):
    """One turn of the conversation, of any role, short or as it came with an answer."""

    type: Literal["message"] = Field(default="message", description="A message.")
    role: Literal["user", "assistant", "system", "developer"] = Field(description="Who speaks.")
    content: Annotated[
        list[Part],
        BeforeValidator(_input_parts, json_schema_input_type=str | list[Part]),
        Field(min_length=1, description="A text, or a list of parts."),
    ]
    id: str | None = Field(default=None, description=AS_IT_CAME)
    status: str | None = Field(default=None, description=AS_IT_CAME)
    phase: Literal["commentary", "final_answer"] | None = Field(default=None, description="Tolerated.")


class ToolItem(Body):
    """What a call and its result have in common."""

    call_id: str = Field(min_length=1, description="Tells which result belongs to which call.")
    id: str | None = Field(default=None, description=AS_IT_CAME)
    status: Literal["in_progress", "completed", "incomplete"] | None = Field(default=None, description=AS_IT_CAME)
    caller: Annotated[None, refused("calls come from the model")] = Field(default=None, description="Only null.")
    namespace: Annotated[None, refused("functions have no namespaces")] = Field(default=None, description="Only null.")


class CallItem(ToolItem):
    """A call that the model has asked for."""

    type: Literal["function_call"] = Field(description="A call.")
    name: str = Field(description="The function.")
    arguments: Arguments = Field(description="A JSON object, as text.")

    def as_chat(self) -> Json:
        return {"id": self.call_id, "function": {"name": self.name, "arguments": self.arguments}}


class ResultItem(ToolItem):
    """What a called function has returned."""

    type: Literal["function_call_output"] = Field(description="A call's result.")
    output: Annotated[list[Part], BeforeValidator(_input_parts, json_schema_input_type=str | list[Part])] = Field(
        description="A text, or a list of parts."
    )
    name: str | None = Field(default=None, description="The function's name, handed to the chat template.")


Item = MessageItem | CallItem | ResultItem


def _item(value: Any) -> Item:
    """One model is asked, so that errors are those of the kind that was meant."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "item_reference":
        raise ValueError("items are not stored; send the item itself")
    if kind == "function_call":
        return CallItem.model_validate(value)
    if kind == "function_call_output":
        return ResultItem.model_validate(value)
    if kind not in (None, "message"):
        raise ValueError("only items of type message, function_call and function_call_output can be read by this model")
    return MessageItem.model_validate(value)


InputItem = Annotated[Item, PlainValidator(_item, json_schema_input_type=Item)]


def as_messages(items: Sequence[Item]) -> list[Json]:
    """The items as messages of a chat."""
    messages: list[Json] = []
    for item in items:
        if isinstance(item, MessageItem):
            messages.append({"role": item.role, "content": [part.as_chat() for part in item.content]})
        elif isinstance(item, ResultItem):
            content = [part.as_chat() for part in item.output]
            messages.append({"role": "tool", "tool_call_id": item.call_id, "name": item.name, "content": content})
        elif messages and messages[-1]["role"] == "assistant":
            messages[-1].setdefault("tool_calls", []).append(item.as_chat())
        else:
            messages.append({"role": "assistant", "tool_calls": [item.as_chat()]})
    return messages
