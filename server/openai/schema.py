"""What a client may send. Pydantic models of the request bodies, and nothing else.

Invariants:
- an unknown field is an error; no field is accepted and ignored, save `TOLERATED`;
- types are strict (`"1"` is no number, `true` is no integer, NaN is nothing), null means the default;
- ranges that need no knowledge of the model are checked here, all others in `params`.

`TOLERATED` are OpenAI's bookkeeping fields: they name the caller and have no effect on the answer, there or here.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from server.engine.messages import SpeculationMode

TOLERATED: Final = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key")
MAX_STOPS: Final = 16
MAX_CHOICES: Final = 128
MAX_LOGPROBS: Final = 20
MAX_TREE_NODES: Final = 63  # a tree has at most 64 rows, its root included


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


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


def _plain_text(value: dict[str, Any]) -> dict[str, Any]:
    if value != {"type": "text"}:
        raise ValueError('only {"type": "text"} is supported')
    return value


def _no_tools(value: list[Any]) -> list[Any]:
    if value:
        raise ValueError("tool calling is not supported; leave it out")
    return value


class Body(BaseModel):
    """Base of everything a client sends."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}


class StreamOptions(Body):
    include_usage: bool = False  # one more chunk, without choices, that holds the usage
    continuous_usage_stats: bool = False  # vLLM: usage so far in every chunk


class SpeculationOptions(Body):
    """Ours: how this request is speculated. Only `typical` can change the text."""

    mode: SpeculationMode = "lossless"
    max_nodes: int | None = Field(default=None, ge=0, le=MAX_TREE_NODES)
    epsilon: float = Field(default=0.09, gt=0, le=1)
    delta: float = Field(default=0.3, gt=0, le=1)


class GenerationRequest(Body):
    """What completions and chat completions have in common. Ranges are OpenAI's, and vLLM's where OpenAI has none."""

    model: str | None = None  # the served model, if absent
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, ge=0, le=1)
    top_k: int = Field(default=0, ge=-1, le=2**31 - 1)  # 0 and -1 are off
    min_p: float = Field(default=0.0, ge=0, le=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    min_tokens: int = Field(default=0, ge=0)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        BeforeValidator(_listed, json_schema_input_type=str | list[str]),
        Field(max_length=MAX_STOPS),
    ] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list, max_length=128)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: int = Field(default=0, ge=-(2**31), lt=2**31)  # lower runs earlier
    speculation: SpeculationOptions = SpeculationOptions()
    response_format: Annotated[dict[str, Any], AfterValidator(_plain_text)] | None = None

    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_unicode(cls, data: Any) -> Any:
        """JSON can smuggle in half a surrogate pair, which is no text and cannot be encoded."""
        if not isinstance(data, dict):
            return data
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except RecursionError as error:
            raise ValueError("the body is nested too deeply") from error
        except UnicodeEncodeError as error:
            raise ValueError("the body holds half a surrogate pair (\\ud800 to \\udfff), which is no text") from error
        return data


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


class Prediction(Body):
    """OpenAI's Predicted Outputs: what the answer may well be. It changes the speed of the answer, never its text."""

    type: Literal["content"]
    content: Annotated[
        str,
        BeforeValidator(_text, json_schema_input_type=str | list[dict[str, str]]),
        Field(description="the predicted text, as a string or as a list of text parts"),
    ]


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
    prediction: Prediction | None = Field(
        default=None, description="text that the answer will repeat in large parts, such as a file to be edited"
    )
    tools: Annotated[list[Any], AfterValidator(_no_tools)] = Field(default_factory=list)
    functions: Annotated[list[Any], AfterValidator(_no_tools)] = Field(default_factory=list)
    tool_choice: Literal["none", "auto"] | None = None  # without tools both mean the same
