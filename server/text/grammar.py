"""Grammars as llguidance takes them, written from what clients ask for, and checked before the engine sees them.

Invariants:
- what passes `GrammarChecker.check` compiles in the engine, in a bounded time;
- JSON has one space after `:` and `,` and no other white space, unless the schema's `x-guidance` says otherwise: that
  is how models write it, and a text that can always be padded with blanks need never end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, grammar_from

MAX_GRAMMAR_CHARS = 512 * 1024
LIMITS = LLParserLimits(max_grammar_size=12_000, verbose_errors=False)  # 0.1 s to compile, as measured on one core
SEPARATORS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ANY_OBJECT: dict[str, Any] = {"type": "object"}

Schema = dict[str, Any] | bool


def of_schema(schema: Schema) -> str:
    """JSON that fits `schema`."""
    return f"start: {json_rule(schema)}"


def of_regex(regex: str) -> str:
    """A text that `regex` matches as a whole."""
    grammar: str = LLMatcher.grammar_from_regex(regex)
    return grammar


def of_choices(choices: Sequence[str]) -> str:
    """One of the texts. As a terminal: as a rule, thousands of them would be too many for the parser at a time."""
    return "start: CHOICE\nCHOICE: " + " | ".join(map(literal, choices))


def of_grammar(grammar: str) -> str:
    """Lark, or GBNF, which is told from it by its `::=`. Raises ValueError if that cannot be translated."""
    lark: str = grammar_from("grammar", grammar)
    return lark


def json_rule(schema: Schema) -> str:
    """The right side of a Lark rule for JSON that fits `schema`."""
    if isinstance(schema, bool):
        return f"%json {json.dumps(schema)}"
    own = schema.get("x-guidance")
    options = SEPARATORS | own if isinstance(own, dict) else SEPARATORS
    return f"%json {json.dumps({**schema, 'x-guidance': options}, ensure_ascii=False)}"


def literal(text: str) -> str:
    """`text` as a Lark string."""
    return json.dumps(text, ensure_ascii=False)


class _Bytes:
    """A tokenizer without merges: errors of a grammar hardly depend on the tokenizer, and this one takes no time."""

    bos_token_id = None
    eos_token_id = 256

    def __init__(self, added_tokens: Iterable[str]) -> None:
        added = [token.encode() for token in added_tokens]
        self.tokens = [*(bytes([byte]) for byte in range(256)), b"<|end|>", *added]
        self.special_token_ids = [*range(256, len(self.tokens))]

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


class GrammarChecker:
    """Says what is wrong with a grammar. `added_tokens` are those that a grammar may name, as `<|name|>`."""

    def __init__(self, added_tokens: Iterable[str]) -> None:
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Bytes(added_tokens)))

    def check(self, grammar: str) -> str | None:
        """The compiler's sentence, or None if the grammar can be used. Takes up to a second; not for the event loop."""
        if len(grammar) > MAX_GRAMMAR_CHARS:
            return f"it has {len(grammar)} characters; at most {MAX_GRAMMAR_CHARS} are allowed."
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()  # some only turn out to be too complex when they are used
        if not matcher.is_error():
            return None
        return _sentence(matcher.get_error())


def _sentence(error: str) -> str:
    """llguidance's words without its excerpt from the grammar, which is ours when it holds a JSON schema."""
    error = re.split(r"\n +\d+ \| |<non-verbose/>", error)[0]
    error = re.sub(r"^at \d+\(\d+\): failed to compile JSON schema: ", "", error)
    return f"{' '.join(error.split())}."
