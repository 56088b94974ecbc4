"""Tools that a model may call, and the calls in a conversation, in OpenAI's shapes."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from server.openai.schema.body import Body

MAX_TOOLS = 128

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Function(Body):
    """A function that the model may ask the client to call."""

    name: Name = Field(description="Letters, digits, `_`, `.` and `-`; at most 64.")
    description: str | None = Field(default=None, description="What it does; the model reads it.")
    parameters: dict[str, Any] | None = Field(
        default=None, description="JSON schema of the arguments, an object. Without one there are no arguments."
    )
    strict: bool | None = Field(
        default=None,
        description="With `tool_choice` auto: the arguments follow the schema for certain. Otherwise they always do.",
    )


class Tool(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: str


class NamedTool(Body):
    """`tool_choice` that names a function."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def _json_object(arguments: str) -> str:
    try:
        is_object = isinstance(json.loads(arguments or "{}"), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise ValueError("the arguments of a call must be a JSON object, as text")
    return arguments or "{}"


Arguments = Annotated[str, AfterValidator(_json_object)]


class CalledFunction(Body):
    name: str
    arguments: Arguments


class ToolCall(Body):
    """A call that the model has asked for, in an assistant's message."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = Field(
        default=None, description="As in a stream's deltas, from which clients copy it; not used."
    )
