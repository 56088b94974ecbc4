"""Tools in a model's own format: how they are told to it, what grammar its calls follow, how they are read.

Invariants:
- a format's grammar admits exactly one spelling of a call, the one that its models are trained on, and its parser
  reads it back;
- a template that knows no tools gets Hermes' own prompt, so that calls can be forced from any chat model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from server.text.calls import HERMES_BEGIN, HERMES_END, LLAMA_TAG, CallParser, HermesParser, Llama3Parser
from server.text.grammar import ANY_OBJECT, json_rule, literal

FormatName = Literal["hermes", "llama3_json"]
MAX_CALLS = 16  # in one answer that must consist of calls: a small model might never stop
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
TEXT = r"/(.|\n)*/"

# The Hermes Function Calling format, https://github.com/NousResearch/Hermes-Function-Calling, in Qwen 2.5's words
HERMES_PROMPT = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@dataclass(frozen=True)
class ToolFormat:
    """One family's way of calling. `begin` and `end` stand around a call's object, `between` between calls."""

    name: FormatName
    parser: Callable[[], CallParser]
    arguments: str  # the key of a call's arguments
    begin: str
    end: str
    between: str


HERMES = ToolFormat("hermes", HermesParser, "arguments", HERMES_BEGIN, HERMES_END, "\n")
LLAMA3 = ToolFormat("llama3_json", Llama3Parser, "parameters", "", "", "; ")
FORMATS: Mapping[str, ToolFormat] = {format.name: format for format in (HERMES, LLAMA3)}


def knows_tools(template: str) -> bool:
    """Does a chat template read its `tools`?"""
    return re.search(r"\btools\b", template) is not None


def detect(template: str) -> ToolFormat | None:
    """The format of a template's family; None if it knows tools, but neither format."""
    if not knows_tools(template) or HERMES_BEGIN in template:
        return HERMES
    is_llama = LLAMA_TAG in template or ("ipython" in template and '"parameters"' in template)
    return LLAMA3 if is_llama else None


@dataclass(frozen=True)
class FunctionShape:
    """A function as far as a grammar is concerned."""

    name: str
    parameters: Mapping[str, Any] | None
    is_strict: bool


class ToolGrammar:
    """Lark for calls in one format. `added_tokens` are texts that are one token and cannot be spelled otherwise."""

    def __init__(self, format: ToolFormat, added_tokens: Collection[str]) -> None:
        self._format = format
        self._added = added_tokens

    def forced(self, functions: Sequence[FunctionShape], *, is_parallel: bool) -> str:
        """Calls and nothing else: one, or up to MAX_CALLS."""
        return "\n".join([f"start: {self._calls('call', is_parallel)}", *self._rules(functions)])

    def free(self, functions: Sequence[FunctionShape], *, is_parallel: bool, answer: str = TEXT) -> str:
        """A text, or calls; Hermes' may follow a text. Only strict functions' arguments must fit their schemas.

        `answer` is the right side of the rule for the text. Where it is not any text, nothing may precede a call.
        """
        functions = [f if f.is_strict else FunctionShape(f.name, ANY_OBJECT, is_strict=False) for f in functions]
        if answer != TEXT:
            start = [f"start: {self._calls('call', is_parallel)} | answer", f"answer: {answer}"]
        elif self._format is HERMES:
            start = [f"start: {self._calls('first', is_parallel)} | TEXT", *self._after_text(), f"TEXT: {TEXT}"]
        else:
            tag = f"{LLAMA_TAG}? " if LLAMA_TAG in self._added else ""
            start = [f"start: {tag}{self._calls('call', is_parallel)} | TEXT", r"TEXT: /([^{ \t\r\n](.|\n)*)?/"]
        return "\n".join([*start, *self._rules(functions)])

    def _after_text(self) -> list[str]:
        """A call at the end of a text: a tag that is spelled out ends the text as soon as it is complete."""
        if HERMES_BEGIN in self._added:
            return [f"first: TEXT {HERMES_BEGIN} body"]
        return ["first: trigger body", f"trigger[lazy]: TEXT {literal(HERMES_BEGIN)}"]

    def _calls(self, first: str, is_parallel: bool) -> str:
        return first + (f" ({literal(self._format.between)} call){{0,{MAX_CALLS - 1}}}" if is_parallel else "")

    def _rules(self, functions: Sequence[FunctionShape]) -> list[str]:
        """One rule for each function: its schema stays a document of its own, to which its `$ref`s refer."""
        blank = literal("\n") if self._format.begin else ""
        names = " | ".join(f"function_{n}" for n in range(len(functions)))
        return [
            f"call: {self._tag(self._format.begin)} body",
            f"body: {blank} {literal('{')} ({names}) {literal('}')} {blank} {self._tag(self._format.end)}",
            *(f"function_{n}: {self._function(function)}" for n, function in enumerate(functions)),
        ]

    def _function(self, function: FunctionShape) -> str:
        head = f'"name": {json.dumps(function.name)}, "{self._format.arguments}": '
        schema = NO_ARGUMENTS if function.parameters is None else {**ANY_OBJECT, **function.parameters}
        return f"{literal(head)} {json_rule(schema)}"

    def _tag(self, text: str) -> str:
        return text if text in self._added else literal(text) if text else ""


def generic_messages(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A conversation with tools for a template that knows none: all is said in texts, as Hermes says it."""
    turns: list[dict[str, Any]] = []
    for message in messages:
        turn = _generic(message)
        if message["role"] == "tool" and turns and turns[-1].get("is_result"):
            turns[-1]["content"] += "\n" + turn["content"]
        else:
            turns.append({**turn, "is_result": message["role"] == "tool"})
    turns = [{key: value for key, value in turn.items() if key != "is_result"} for turn in turns]
    return _with_tools(turns, tools) if tools else turns


def _generic(message: Mapping[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = [_call_text(call["function"]) for call in message.get("tool_calls", ())]
    said = [message["content"], *calls] if message["content"] or not calls else calls
    return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": "\n".join(said)}


def _call_text(function: Mapping[str, Any]) -> str:
    call = {"name": function["name"], "arguments": function["arguments"]}
    return f"{HERMES_BEGIN}\n{json.dumps(call, ensure_ascii=False)}\n{HERMES_END}"


def _with_tools(turns: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    prompt = HERMES_PROMPT.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if turns and turns[0]["role"] == "system":
        return [{**turns[0], "content": f"{turns[0]['content']}\n\n{prompt}"}, *turns[1:]]
    return [{"role": "system", "content": prompt}, *turns]
