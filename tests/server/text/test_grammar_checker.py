"""Grammars are written as llguidance takes them, and what is wrong with one is a sentence."""

from __future__ import annotations

import json
import time

import pytest

from server.text import grammar
from server.text.grammar import GrammarChecker, literal, of_choices, of_grammar, of_regex, of_schema

CHECKER = GrammarChecker(["<|python_tag|>"])
WIDE = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(3000)}}


@pytest.mark.parametrize(
    "text",
    [
        of_schema(grammar.ANY_OBJECT),
        of_schema(True),
        of_schema({"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}}),
        of_schema({"type": "array", "x-guidance": {"whitespace_flexible": True}}),
        of_regex("[0-9]{3}|x+"),
        of_choices(["a", 'b"\n\\/', "日本", "a b"]),
        of_grammar('start: "a" B\nB: /[0-9]/'),
        of_grammar('root ::= "a" | "b" x\nx ::= [0-9]+'),
        'start: <|python_tag|> "x"',
    ],
)
def test_good(text: str) -> None:
    assert CHECKER.check(text) is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (of_schema(False), "Unsatisfiable schema: schema is false."),
        (of_schema({"type": "foo"}), "Invalid type: foo."),
        (of_schema({"not": {}}), 'Unimplemented keys: ["not"].'),
        (of_schema({"type": "array", "x-guidance": {"tabs": 3}}), "unknown field `tabs`"),
        (of_schema({"type": "string", "pattern": "(?=a)"}), "look-around"),
        (of_regex("("), "unclosed group"),
        (of_grammar("start: nobody"), 'unknown name: "nobody"'),
        ("start: <|im_end|>", "unknown special token"),
        ("start: start", "NoExtensionBias"),
        ("", "Empty grammar."),
        (of_schema(WIDE), "grammar size"),
        (of_choices(["x" * 1000] * 600), "at most 524288 are allowed."),
    ],
)
def test_bad(text: str, sentence: str) -> None:
    error = CHECKER.check(text)
    assert error is not None
    assert sentence in error
    assert error.endswith(".")
    assert "\n" not in error


def test_json_within_a_grammar_is_named_by_its_own_error() -> None:
    assert CHECKER.check(f'start: "x" {grammar.json_rule({"type": "foo"})}') == "Invalid type: foo."


def test_a_schemas_own_white_space_wins() -> None:
    rule = grammar.json_rule({"type": "object", "x-guidance": {"key_separator": ":"}})
    assert json.loads(rule.removeprefix("%json "))["x-guidance"]["key_separator"] == ":"
    assert json.loads(rule.removeprefix("%json "))["x-guidance"]["item_separator"] == ", "


def test_literals_are_escaped() -> None:
    assert literal('a"\n') == '"a\\"\\n"'


@pytest.mark.parametrize(
    "text",
    [
        of_regex("((a{1,1000}){1,1000}){1,1000}"),
        of_regex("(.*a){30}.{100}"),
        of_regex("(" + "|".join(f"x{n}y" for n in range(5000)) + ")*"),
        of_schema({"enum": [f"v{n}" for n in range(20000)]}),
        of_schema({"type": "array", "items": {"type": "string"}, "minItems": 100000}),
        of_schema(WIDE),
        'start: s\ns: s s | "a" | ""',
    ],
    ids=["nested", "ambiguous", "alternatives", "enum", "long", "wide", "recursive"],
)
def test_malice_takes_a_bounded_time(text: str) -> None:
    started = time.process_time()
    CHECKER.check(text)
    assert time.process_time() - started < 5  # 0.6 s where it was written
