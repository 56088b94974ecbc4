"""Tools of a request to /v1/responses: functions, in a flatter shape than a chat's.

Invariant: other tools than functions are refused by their type; they would have to run here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, model_validator

from server.openai.schema import Body
from server.openai.schema.tools import Name

WORDS = ("none", "auto", "required")


class FunctionTool(Body):
    """A function that the model may ask the client to call."""

    type: Literal["function"] = Field(description="Other tools are refused.")
    name: Name = Field(description="Letters, digits, `_`, `.` and `-`; at most 64.")
    description: str | None = Field(default=None, description="What it does; the model reads it.")
    parameters: dict[str, Any] | None = Field(
        default=None, description="JSON schema of the arguments, an object. Without one there are no arguments."
    )
    strict: bool = Field(
        default=True,
        description="With `tool_choice` auto: the arguments follow the schema for certain. Otherwise they always do. "
        "Default: true, unlike a chat's.",
    )

    @model_validator(mode="before")
    @classmethod
    def _is_function(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind != "function":
            raise ValueError(f"tools of type {kind} are not supported; only those of type function are")
        return data

    def as_chat(self) -> dict[str, Any]:
        """The tool in a chat's shape."""
        return {"type": "function", "function": self.model_dump(exclude={"type"})}


class FunctionChoice(Body):
    """`tool_choice` that names a function."""

    type: Literal["function"] = Field(description="Only functions can be named.")
    name: str = Field(description="One of the tools.")


def _choice(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type") == "function":
        return FunctionChoice.model_validate(value)
    if value not in WORDS:
        raise ValueError('only none, auto, required and {"type": "function", "name": ...} can be chosen')
    return value


Choice = Literal["none", "auto", "required"] | FunctionChoice
ToolChoice = Annotated[Choice, PlainValidator(_choice, json_schema_input_type=Choice)]


def choice_as_chat(choice: Choice) -> Any:
    """`tool_choice` in a chat's shape."""
    return choice if isinstance(choice, str) else {"type": "function", "function": {"name": choice.name}}
