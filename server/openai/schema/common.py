"""What all endpoints' bodies have in common: the fields of everything that generates."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, Field, model_validator

from server.engine.messages import SpeculationMode
from server.openai.schema.body import Body
from server.openai.schema.structured import ResponseFormat, StructuredOutputs

TOLERATED: Final = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key")
MAX_STOPS: Final = 16
MAX_CHOICES: Final = 128
MAX_LOGPROBS: Final = 20
MAX_TREE_NODES: Final = 63  # a tree has at most 64 rows, its root included


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


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
    response_format: ResponseFormat | None = Field(
        default=None, description="What the text must look like: `text` (the default), `json_object`, `json_schema`."
    )
    structured_outputs: StructuredOutputs | None = Field(
        default=None, description="vLLM's: one of `json`, `json_object`, `regex`, `choice` and `grammar`."
    )

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
