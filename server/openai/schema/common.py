"""What all endpoints' bodies have in common: the fields of everything that generates."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from server.engine.messages import SpeculationMode
from server.openai.schema.body import Body, UnsupportedError
from server.openai.schema.structured import ResponseFormat, StructuredOutputs

TOLERATED: Final = (
    "user",
    "metadata",
    "store",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
)
MAX_STOPS: Final = 16
MAX_CHOICES: Final = 128
MAX_LOGPROBS: Final = 20
MAX_METADATA: Final = 16
MAX_LOGIT_BIAS: Final = 1024  # entries; each costs time at every node of the tree
MAX_BAD_WORDS: Final = 1024  # each costs a look at every node of the tree
MAX_TREE_NODES: Final = 63  # a tree has at most 64 rows, its root included


def refused(reason: str) -> BeforeValidator:
    """Of a known field whose every value but null is refused."""

    def refuse(value: Any) -> Any:
        raise UnsupportedError(f"not supported: {reason}")

    return BeforeValidator(refuse)


def refused_unless(only: object, reason: str) -> AfterValidator:
    """Of a field that has one possible value."""

    def check(value: Any) -> Any:
        if value != only:
            raise UnsupportedError(f"only {json.dumps(only)} is supported: {reason}")
        return value

    return AfterValidator(check)


def at_most(count: int) -> BeforeValidator:
    """Of a dictionary. Before its entries are looked at, each of which may have its own error."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > count:
            raise ValueError(f"it has {len(value)} entries; at most {count} are allowed")
        return value

    return BeforeValidator(check)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class StreamOptions(Body):
    """What a stream says besides the text."""

    include_usage: bool = Field(
        default=False, description="One more chunk at the end, without choices, that holds the usage. Default: false."
    )
    continuous_usage_stats: bool = Field(
        default=False, description="The usage so far in every chunk; needs include_usage (vLLM's). Default: false."
    )
    include_obfuscation: Annotated[bool, refused_unless(False, "no chunk is ever padded with random characters")] = (
        Field(default=False, description="Only false, the default: chunks are never padded with random characters.")
    )


class SpeculationOptions(Body):
    """Ours: how this request is speculated. Only `typical` can change the text."""

    mode: SpeculationMode = Field(
        default="lossless",
        description="lossless: the text is that of plain decoding, faster. typical: Medusa's typical acceptance, which "
        "may change it. off: plain decoding. Default: lossless.",
    )
    max_nodes: int | None = Field(
        default=None,
        ge=0,
        le=MAX_TREE_NODES,
        description="Most guessed tokens that are verified in one step, 0 to 63. Default: the server's --num-nodes.",
    )
    epsilon: float = Field(
        default=0.09, gt=0, le=1, description="Of typical acceptance: probability that is always enough. Default: 0.09."
    )
    delta: float = Field(
        default=0.3, gt=0, le=1, description="Of typical acceptance: factor of exp(-entropy). Default: 0.3."
    )


class RequestBody(Body):
    """Base of whole bodies."""

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


class GenerationRequest(RequestBody):
    """What completions and chat completions have in common. Ranges are OpenAI's, and vLLM's where OpenAI has none."""

    model: str | None = Field(default=None, description="The served model's name. Default: the served model.")
    n: int = Field(default=1, ge=1, le=MAX_CHOICES, description="Choices for each prompt, 1 to 128. Default: 1.")
    temperature: float = Field(
        default=1.0, ge=0, le=2, description="0 takes the likeliest token, 2 is wild. Default: 1."
    )
    top_p: float = Field(
        default=1.0, ge=0, le=1, description="Only the likeliest tokens of this total probability. Default: 1, all."
    )
    top_k: int = Field(
        default=0,
        ge=-1,
        le=2**31 - 1,
        description="Only so many of the likeliest tokens; 0 and -1 are all. Default: 0.",
    )
    min_p: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Only tokens at least this probable, relative to the likeliest. Default: 0, all.",
    )
    presence_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="Taken off tokens that the output has, -2 to 2. Default: 0."
    )
    frequency_penalty: float = Field(
        default=0.0,
        ge=-2,
        le=2,
        description="Taken off tokens for each time that the output has them, -2 to 2. Default: 0.",
    )
    repetition_penalty: float = Field(
        default=1.0,
        ge=0.01,
        le=100,
        description="Divides the positive logits, and multiplies the negative ones, of tokens that prompt or output "
        "have, 0.01 to 100. Default: 1.",
    )
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], at_most(MAX_LOGIT_BIAS)] = Field(
        default_factory=dict,
        description="Added to the logits of tokens, by token id, -100 to 100; at most 1024 tokens. Default: none.",
    )
    allowed_token_ids: list[int] | None = Field(
        default=None,
        min_length=1,
        fail_fast=True,
        description="No other tokens are said (vLLM's). Default: all are allowed.",
    )
    bad_words: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        max_length=MAX_BAD_WORDS,
        description="Words that are not said: the last of a word's tokens is forbidden after the others, with and "
        "without a space before the word (vLLM's); at most 1024. Default: none.",
    )
    min_tokens: int = Field(
        default=0, ge=0, description="The output does not end before so many tokens, 0 to max_tokens. Default: 0."
    )
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        BeforeValidator(_listed, json_schema_input_type=str | list[str]),
        Field(max_length=MAX_STOPS),
    ] = Field(default_factory=list, description="One string, or up to 16, before which the text ends. Default: none.")
    stop_token_ids: list[int] = Field(
        default_factory=list, max_length=128, description="Token ids that end the text, at most 128. Default: none."
    )
    include_stop_str_in_output: bool = Field(
        default=False, description="What stopped the text, string or token, is part of it. Default: false."
    )
    skip_special_tokens: bool = Field(
        default=True, description="Special tokens do not show in the text. Default: true."
    )
    spaces_between_special_tokens: Annotated[
        bool, refused_unless(True, "the tokenizer's own decoder puts spaces where they belong")
    ] = Field(default=True, description="Only true, the default: spaces are where the tokenizer's decoder puts them.")
    ignore_eos: bool = Field(
        default=False, description="The model's end-of-sequence token does not end the text. Default: false."
    )
    seed: int | None = Field(
        default=None,
        ge=-(2**63),
        lt=2**64,
        description="The same seed, 64 bits, gives the same text. Default: drawn at random.",
    )
    prompt_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Log-probabilities of the prompt's tokens and of so many likeliest, 0 to 20; not in streams "
        "(vLLM's). Default: none.",
    )
    truncate_prompt_tokens: int | None = Field(
        default=None,
        ge=-1,
        description="Only the last so many tokens of the prompt are used; -1 is as many as leave room for the "
        "completion (vLLM's). Default: all.",
    )
    return_token_ids: bool = Field(
        default=False, description="prompt_token_ids and token_ids in the answer (vLLM's). Default: false."
    )
    stream: bool = Field(default=False, description="Answer as server-sent events while it grows. Default: false.")
    stream_options: StreamOptions | None = Field(
        default=None, description="Only with stream. Default: no usage in the stream."
    )
    priority: int = Field(
        default=0, ge=-(2**31), lt=2**31, description="Lower runs earlier, -2^31 to 2^31 - 1. Default: 0."
    )
    speculation: SpeculationOptions = Field(
        default=SpeculationOptions(), description="How tokens are guessed (ours). Default: losslessly."
    )
    response_format: ResponseFormat | None = Field(
        default=None,
        description="What the text must look like: text, json_object or json_schema. Default: text.",
    )
    structured_outputs: StructuredOutputs | None = Field(
        default=None,
        description="What the text must look like (vLLM's): one of json, json_object, regex, choice and grammar. "
        "Default: any text.",
    )

    user: str | None = Field(default=None, description="Tolerated: names the caller's user. No effect.")
    metadata: Annotated[dict[str, str] | None, at_most(MAX_METADATA)] = Field(
        default=None, description="Tolerated: the caller's notes, at most 16. No effect."
    )
    store: bool | None = Field(default=None, description="Tolerated: nothing is ever stored. No effect.")
    safety_identifier: str | None = Field(default=None, description="Tolerated: names the caller's user. No effect.")
    prompt_cache_key: str | None = Field(
        default=None, description="Tolerated: all requests share one prefix cache. No effect."
    )
