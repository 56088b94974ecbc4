"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, PlainValidator

from server.openai.schema.body import UnsupportedError
from server.openai.schema.common import MAX_CHOICES, MAX_LOGPROBS, GenerationRequest


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


def _no_suffix(value: str) -> str:
    if value:
        raise UnsupportedError("not supported: the model only continues a prompt")
    return value


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[
        list[str | list[int]],
        PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ] = Field(description="A text, token ids, or a list of either; at most 1024 choices in all.")
    max_tokens: int = Field(
        default=16,
        ge=0,
        description="Most tokens of the completion; 0 computes the prompt only, see echo. Default: 16, or what fits.",
    )
    echo: bool = Field(
        default=False, description="The prompt comes before the completion, also in logprobs. Default: false."
    )
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Log-probabilities of the tokens and of so many likeliest, 0 to 20. Default: none.",
    )
    best_of: int | None = Field(
        default=None,
        ge=1,
        le=MAX_CHOICES,
        description="So many choices are made, and the n of the highest mean log-probability returned; n to 128, not "
        "in streams. Default: n.",
    )
    suffix: Annotated[str, AfterValidator(_no_suffix)] | None = Field(
        default=None, description="Refused: the model continues a prompt and cannot fill a gap."
    )
    add_special_tokens: bool = Field(
        default=True, description="Texts get the tokenizer's special tokens, such as <s>, around them. Default: true."
    )
