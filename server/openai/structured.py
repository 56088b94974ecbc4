"""From `response_format` and `structured_outputs` to a grammar that has been checked.

Invariant: a grammar that leaves here compiles; one that does not is a 400 with the compiler's own sentence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from server.errors import InvalidRequestError
from server.openai.schema import GenerationRequest
from server.openai.schema.structured import ResponseFormat, StructuredOutputs
from server.text import grammar
from server.text.prompt import Tokenizer


def checked_grammar(request: GenerationRequest, tokenizer: Tokenizer) -> str | None:
    """The grammar of the whole text; None if there is none. Takes time; not for the event loop."""
    format, outputs = request.response_format, request.structured_outputs
    schema = response_schema(format)
    if outputs is not None:
        if schema is not None:
            raise InvalidRequestError("Send either response_format or structured_outputs.", param="structured_outputs")
        return check(_of_outputs(outputs), tokenizer, "structured_outputs", "Invalid structured_outputs")
    if schema is None:
        return None
    wrapper = None if format is None else format.json_schema
    what = f"Invalid schema for response_format '{wrapper.name}'" if wrapper is not None else "Invalid response_format"
    return check(grammar.of_schema(schema), tokenizer, "response_format", what)


def response_schema(format: ResponseFormat | None) -> grammar.Schema | None:
    """The schema that an answer must fit; None for any text."""
    if format is None or format.type == "text":
        return None
    wrapper = format.json_schema
    return grammar.ANY_OBJECT if wrapper is None or wrapper.schema_ is None else wrapper.schema_


def check(text: str, tokenizer: Tokenizer, param: str, what: str) -> str:
    """The grammar `text`, if it compiles. Raises InvalidRequestError."""
    error = tokenizer.grammar_checker.check(text)
    if error is not None:
        raise InvalidRequestError(f"{what}: {error}", param=param)
    return text


def _of_outputs(outputs: StructuredOutputs) -> str:
    if outputs.json_ is not None:
        return grammar.of_schema(_parsed(outputs.json_) if isinstance(outputs.json_, str) else outputs.json_)
    if outputs.regex is not None:
        return grammar.of_regex(outputs.regex)
    if outputs.choice is not None:
        return grammar.of_choices(outputs.choice)
    if outputs.grammar is not None:
        return _of_grammar(outputs.grammar)
    return grammar.of_schema(grammar.ANY_OBJECT)


def _parsed(text: str) -> grammar.Schema:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        message = f"Invalid structured_outputs: json is not valid JSON: {error}."
        raise InvalidRequestError(message, param="structured_outputs.json") from error
    if not isinstance(schema, Mapping | bool):
        message = "Invalid structured_outputs: json must be a JSON schema, an object."
        raise InvalidRequestError(message, param="structured_outputs.json")
    found: dict[str, Any] | bool = schema if isinstance(schema, bool) else dict(schema)
    return found


def _of_grammar(text: str) -> str:
    try:
        return grammar.of_grammar(text)
    except ValueError as error:
        raise InvalidRequestError(
            f"Invalid structured_outputs: {error}.", param="structured_outputs.grammar"
        ) from error
