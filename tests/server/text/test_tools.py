"""Formats, their grammars and their readers fit together; templates without tools are told in texts."""

from __future__ import annotations

import itertools

import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from server.text.grammar import GrammarChecker, _Bytes, json_rule
from server.text.tools import (
    FORMATS,
    HERMES,
    LLAMA3,
    FunctionShape,
    ToolFormat,
    ToolGrammar,
    detect,
    generic_messages,
    knows_tools,
)

CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"city": {"enum": ["Paris", "Rome"]}},
}
FUNCTIONS = [FunctionShape("weather", CITY, is_strict=True), FunctionShape("now", None, is_strict=False)]
BYTES = LLTokenizer(TokenizerWrapper(_Bytes([])))


def accepts(grammar: str, text: str) -> bool:
    """Is `text` a whole text of the grammar?"""
    assert GrammarChecker([]).check(grammar) is None
    matcher = LLMatcher(BYTES, grammar, log_level=0)
    return matcher.try_consume_tokens(list(text.encode())) == len(text.encode()) and matcher.is_accepting()


def call(format: ToolFormat, name: str, arguments: str) -> str:
    body = f'{{"name": "{name}", "{format.arguments}": {arguments}}}'
    return f"<tool_call>\n{body}\n</tool_call>" if format is HERMES else body


def calls_of(format: ToolFormat, text: str) -> tuple[str, int]:
    parser = format.parser()
    content = parser.push(text).content + parser.finish().content
    return content, parser.num_calls


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_forced_calls(format: ToolFormat) -> None:
    grammar = ToolGrammar(format, ())
    weather, now = call(format, "weather", '{"city": "Paris"}'), call(format, "now", "{}")
    both = weather + format.between + now
    one, many = (grammar.forced(FUNCTIONS, is_parallel=parallel) for parallel in (False, True))
    assert [accepts(one, text) for text in (weather, now, both, "", "Hello")] == [True, True, False, False, False]
    assert [accepts(many, text) for text in (weather, now, both, "Hello")] == [True, True, True, False]
    assert not accepts(many, call(format, "weather", '{"city": "Oslo"}'))
    assert not accepts(many, call(format, "now", '{"x": 1}'))
    assert not accepts(many, call(format, "nobody", "{}"))
    assert calls_of(format, both) == ("", 2)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_free_text_with_calls_that_fit(format: ToolFormat) -> None:
    grammar = ToolGrammar(format, ()).free(FUNCTIONS, is_parallel=False)
    assert accepts(grammar, "Hello, 1 < 2.")
    assert accepts(grammar, call(format, "weather", '{"city": "Rome"}'))
    assert accepts(grammar, call(format, "now", '{"x": 1}'))  # not strict: any object
    assert not accepts(grammar, call(format, "weather", '{"city": "Oslo"}'))
    after_text = "Let me see. " + call(format, "weather", '{"city": "Rome"}')
    assert accepts(grammar, after_text)
    assert calls_of(format, after_text)[1] == (format is HERMES)
    twice = format.between.join([call(format, "now", "{}")] * 2)
    assert not accepts(grammar, twice)
    assert accepts(ToolGrammar(format, ()).free(FUNCTIONS, is_parallel=True), twice)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_an_answer_with_a_format_of_its_own(format: ToolFormat) -> None:
    grammar = ToolGrammar(format, ()).free(FUNCTIONS, is_parallel=False, answer=json_rule({"type": "integer"}))
    assert accepts(grammar, "42")
    assert accepts(grammar, call(format, "weather", '{"city": "Rome"}'))
    assert not accepts(grammar, "Hello")


def test_tags_that_are_tokens_are_named_as_tokens() -> None:
    added = ["<tool_call>", "</tool_call>", "<|python_tag|>"]
    checker = GrammarChecker(added)
    for format, is_parallel in itertools.product(FORMATS.values(), (False, True)):
        writer = ToolGrammar(format, added)
        texts = [writer.forced(FUNCTIONS, is_parallel=is_parallel), writer.free(FUNCTIONS, is_parallel=is_parallel)]
        assert [checker.check(text) for text in texts] == [None, None]
        assert [GrammarChecker([]).check(text) is None for text in texts] == [format is LLAMA3, False]


@pytest.mark.parametrize(
    ("template", "format"),
    [
        ("{{ messages }}", HERMES),
        ("{% if tools %}<tool_call>{% endif %}", HERMES),
        ("{% if tools %}<|python_tag|>{% endif %}", LLAMA3),
        ('{% if tools %}ipython "parameters"{% endif %}', LLAMA3),
        ("{% if tools %}[TOOL_CALLS]{% endif %}", None),
    ],
)
def test_formats_are_known_by_their_templates(template: str, format: ToolFormat | None) -> None:
    assert detect(template) is format
    assert knows_tools(template) == ("tools" in template)


def test_tools_are_told_to_templates_that_know_none() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "2", "content": "warm"},
    ]
    told = generic_messages(messages, [{"type": "function", "function": {"name": "f"}}])
    assert [turn["role"] for turn in told] == ["system", "user", "assistant", "user"]
    assert told[0]["content"].startswith("Be brief.\n\n# Tools")
    assert '{"type": "function", "function": {"name": "f"}}' in told[0]["content"]
    assert '{"name": <function-name>, "arguments": <args-json-object>}' in told[0]["content"]
    assert told[2]["content"] == '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>'
    assert told[3]["content"] == ("<tool_response>\nsunny\n</tool_response>\n<tool_response>\nwarm\n</tool_response>")
    assert all(set(turn) == {"role", "content"} for turn in told[:3])
    assert generic_messages(messages[1:2], []) == messages[1:2]
    assert generic_messages(messages[1:2], [{}])[0]["role"] == "system"
