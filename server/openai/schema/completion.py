"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator

from server.openai.schema.common import MAX_LOGPROBS, GenerationRequest


def _prompts(value: Any) -> list[str | list[int]]:
    """Any of OpenAI's four forms of a prompt as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("send a string, a list of strings, a list of token ids, or a list of lists of token ids")
    if all(type(item) is int for item in value):
        return [value]
    return [_prompt(item) for item in value]


def _prompt(value: Any) -> str | list[int]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise ValueError("every entry must be a string or a list of token ids")
    return value


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[
        list[str | list[int]],
        PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    max_tokens: int = Field(default=16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = None
    suffix: str | None = None
