"""Tool calls are found however the text is cut, and what is no call is content to the letter."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.calls import CallParser, HermesParser, Llama3Parser

F = '{"name": "f", "arguments": {"a": "x}\\"", "b": [1, {"c": null}]}}'
F_ARGUMENTS = '{"a": "x}\\"", "b": [1, {"c": null}]}'


def hermes(call: str) -> str:
    return f"<tool_call>\n{call}\n</tool_call>"


def read(parser: CallParser, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """The content, and the calls with their joined arguments; a call's name comes first and once."""
    content, calls = "", []
    for parsed in [*map(parser.push, pieces), parser.finish()]:
        content += parsed.content
        for delta in parsed.calls:
            assert (delta.name is not None) == (delta.index == len(calls))
            if delta.name is not None:
                calls.append((delta.name, ""))
            assert delta.arguments
            calls[delta.index] = (calls[delta.index][0], calls[delta.index][1] + delta.arguments)
    return content, calls


HERMES = {
    "text": ("No call here, 1 < 2.\n", "No call here, 1 < 2.\n", []),
    "nothing": ("", "", []),
    "call": (hermes(F), "", [("f", F_ARGUMENTS)]),
    "after text": (f"Let me see.\n\n{hermes(F)}", "Let me see.", [("f", F_ARGUMENTS)]),
    "two": (f"{hermes(F)}\n{hermes(F)}\n", "", [("f", F_ARGUMENTS)] * 2),
    "text after": (f"{hermes(F)}\n That was it. ", "That was it. ", [("f", F_ARGUMENTS)]),
    "no closing tag": (f"<tool_call>{F}\nand so", "and so", [("f", F_ARGUMENTS)]),
    "name last": ('<tool_call>{"arguments": {"x": 1}, "name": "g"}', "", [("g", '{"x": 1}')]),
    "other keys": ('<tool_call>{"id": 3, "name":"g","ok":true,"arguments":{}}', "", [("g", "{}")]),
    "no object": ("<tool_call> what? </tool_call>", "<tool_call> what? </tool_call>", []),
    "no name": ('A\n<tool_call>{"arguments": {}} B', 'A\n<tool_call>{"arguments": {}} B', []),
    "no arguments": ('<tool_call>{"name": "f"}', '<tool_call>{"name": "f"}', []),
    "cut in the name": ('Hm <tool_call>{"name": "f', 'Hm <tool_call>{"name": "f', []),
    "cut in the arguments": ('<tool_call>{"name": "f", "arguments": {"a": "b', "", [("f", '{"a": "b')]),
    "cut in the tag": ("2 <tool_c", "2 <tool_c", []),
    "cut in the closing tag": (f"<tool_call>{F}</tool", "", [("f", F_ARGUMENTS)]),
    "unicode": ('<tool_call>{"name": "\\u0066", "arguments": {"é": "日本"}}', "", [("f", '{"é": "日本"}')]),
}
LLAMA = {
    "text": ("Hello {you}", "Hello {you}", []),
    "call": ('{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    "tagged": ('<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    "two": (f'{F}; {{"name": "g", "parameters": {{}}}}', "", [("f", F_ARGUMENTS), ("g", "{}")]),
    "other JSON": ('{"answer": 42}', '{"answer": 42}', []),
    "a person": ('{"name": "Ada", "age": 36} ', '{"name": "Ada", "age": 36} ', []),
    "text after": (f"{F} done", " done", [("f", F_ARGUMENTS)]),
    "blanks": (" \n", " \n", []),
}
CASES = [(HermesParser, *case) for case in HERMES.values()] + [(Llama3Parser, *case) for case in LLAMA.values()]


@pytest.mark.parametrize(("parser", "text", "content", "calls"), CASES, ids=[*HERMES, *LLAMA])
def test_content_and_calls(parser: type[CallParser], text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read(parser(), [text]) == (content, calls)
    assert read(parser(), list(text)) == (content, calls)
    for place in range(len(text)):
        assert read(parser(), [text[:place], text[place:]]) == (content, calls)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(st.text(), values), min_size=1, max_size=3), st.booleans(), st.randoms())
def test_any_arguments_come_through(arguments: list[dict], is_ascii: bool, random: object) -> None:
    texts = [json.dumps(a, ensure_ascii=is_ascii) for a in arguments]
    expected = [(f"f{n}", text) for n, text in enumerate(texts)]
    calls = [f'{{"name": "f{n}", "arguments": {text}}}' for n, text in enumerate(texts)]
    for parser, whole in ((HermesParser(), "\n".join(map(hermes, calls))), (Llama3Parser(), "; ".join(calls))):
        cuts = sorted(random.choices(range(len(whole) + 1), k=6))  # type: ignore[attr-defined]
        pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
        assert read(parser, pieces) == ("", expected)
        assert parser.num_calls == len(calls)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_calls_know_where_they_are(size: int) -> None:
    parser, text = HermesParser(), f"one {hermes(F)}\n{hermes(F)} two{hermes(F)}<tool_call>no{hermes(F)}"
    told = [call for n in range(0, len(text), size) for call in parser.push(text[n : n + size]).calls]
    assert {(call.index, call.position) for call in told} == {(0, 3), (1, 3), (2, 6), (3, 19)}


def test_arguments_are_told_as_they_come() -> None:
    parser = HermesParser()
    assert parser.push('<tool_call>{"name": "f", "arguments": {"a"').calls[0].arguments == '{"a"'
    assert parser.push(': "long text').calls[0].arguments == ': "long text'
    assert parser.num_calls == 0
    assert parser.push('"}}').calls[0].arguments == '"}'
    assert parser.num_calls == 1
