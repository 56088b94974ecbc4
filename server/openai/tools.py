"""Tools of a chat request: what the model is told of them, what it may say, and how its calls are shown.

Invariants:
- `required` and a named function leave the model no way but to call; `none` leaves it none to call;
- with `auto` the text is free, and only read, unless a function is strict or calls must not be parallel.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from server.errors import InvalidRequestError
from server.openai.schema import ChatRequest, Message
from server.openai.schema.tools import NamedTool, Tool
from server.openai.service import Service
from server.openai.structured import check, checked_grammar, response_schema
from server.text import grammar
from server.text.calls import CallDelta
from server.text.prompt import Tokenizer
from server.text.tools import TEXT, FunctionShape, ToolFormat, ToolGrammar

Json = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What follows from a request's tools and formats."""

    tools: list[Json]  # as told to the model
    format: ToolFormat | None  # how its calls are read; None if it has none to call
    grammar: str | None


def plan(request: ChatRequest, service: Service) -> Plan:
    """Raises InvalidRequestError. Takes time; not for the event loop."""
    if request.tool_choice not in (None, "none", "auto") and not request.tools:
        raise InvalidRequestError("tool_choice is only allowed when tools are specified.", param="tool_choice")
    if "parallel_tool_calls" in request.model_fields_set and not request.tools:
        message = "parallel_tool_calls is only allowed when tools are specified."
        raise InvalidRequestError(message, param="parallel_tool_calls")
    if not request.tools or request.tool_choice == "none":
        return Plan([], None, checked_grammar(request, service.tokenizer))
    if request.structured_outputs is not None:
        message = "structured_outputs cannot be combined with tools; use response_format."
        raise InvalidRequestError(message, param="structured_outputs")
    format = service.tool_format
    if format is None:
        raise InvalidRequestError(
            "The format in which this model calls tools is not known; start the server with --tool-call-parser.",
            param="tools",
        )
    tools = [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in request.tools]
    return Plan(tools, format, _grammar(request, service.tokenizer, format))


def _grammar(request: ChatRequest, tokenizer: Tokenizer, format: ToolFormat) -> str | None:
    """What an answer with tools must follow; None if it may be any text."""
    writer, choice = ToolGrammar(format, tokenizer.added_tokens), request.tool_choice
    schema, is_parallel = response_schema(request.response_format), request.parallel_tool_calls
    if choice == "required" or isinstance(choice, NamedTool):
        is_parallel = is_parallel and choice == "required"
        text = writer.forced(_shapes(_chosen(request), tokenizer), is_parallel=is_parallel)
    elif schema is None and is_parallel and not any(tool.function.strict for tool in request.tools):
        return None
    else:
        checked_grammar(request, tokenizer)
        answer = TEXT if schema is None else grammar.json_rule(schema)
        text = writer.free(_shapes(request.tools, tokenizer), is_parallel=is_parallel, answer=answer)
    return check(text, tokenizer, "tools", "These tools cannot be used together")


def _chosen(request: ChatRequest) -> Sequence[Tool]:
    """The tools that `tool_choice` leaves."""
    if not isinstance(request.tool_choice, NamedTool):
        return request.tools
    name = request.tool_choice.function.name
    chosen = [tool for tool in request.tools if tool.function.name == name]
    if not chosen:
        raise InvalidRequestError(f"Tool choice '{name}' is not among the tools.", param="tool_choice")
    return chosen


def _shapes(tools: Sequence[Tool], tokenizer: Tokenizer) -> list[FunctionShape]:
    """Each with its schema checked alone, so that the one at fault can be named."""
    for place, tool in enumerate(tools):
        if tool.function.parameters is not None:
            param = f"tools[{place}].function.parameters"
            what = f"Invalid schema for function '{tool.function.name}'"
            check(grammar.of_schema(tool.function.parameters), tokenizer, param, what)
    functions = [tool.function for tool in tools]
    return [FunctionShape(f.name, f.parameters, is_strict=bool(f.strict)) for f in functions]


def turn(message: Message) -> Json:
    """A message as chat templates read it: arguments are objects, and nothing is null."""
    role = "system" if message.role == "developer" else message.role
    told: Json = {"role": role, "content": message.content or ""}
    if message.tool_calls:
        told["tool_calls"] = [
            {"id": call.id, "type": call.type, "function": _called(call.function.name, call.function.arguments)}
            for call in message.tool_calls
        ]
    named = {"name": message.name, "tool_call_id": message.tool_call_id}
    return told | {key: value for key, value in named.items() if value is not None}


def _called(name: str, arguments: str) -> Json:
    return {"name": name, "arguments": json.loads(arguments)}


def call_deltas(calls: Sequence[CallDelta]) -> list[Json]:
    """Calls as a stream tells them: id and name first, then pieces of the arguments."""
    return [
        {"index": call.index, "function": {"arguments": call.arguments}}
        if call.name is None
        else {"index": call.index, **_call(call.name, call.arguments)}
        for call in calls
    ]


def whole_calls(calls: Sequence[CallDelta]) -> list[Json]:
    """The same calls at once."""
    names = {call.index: call.name for call in calls if call.name is not None}
    return [
        _call(name, "".join(call.arguments for call in calls if call.index == index)) for index, name in names.items()
    ]


def new_call_id() -> str:
    """What tells a call from all others."""
    return f"call_{uuid.uuid4().hex[:24]}"


def _call(name: str, arguments: str) -> Json:
    return {
        "id": new_call_id(),
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
