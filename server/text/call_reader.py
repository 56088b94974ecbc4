"""One object with `name` and `arguments`, read while it comes: a tool call, or something that turns out to be none.

Invariant: the arguments are given to the letter, white space included; nothing is looked at twice.
"""

from __future__ import annotations

import json
from typing import Literal

ARGUMENTS = ("arguments", "parameters")  # Hermes' word and Llama's
BLANKS = " \t\r\n"


class CallReader:
    """Reads one object with `name` and `arguments`, a character at a time, and gives the arguments as written."""

    def __init__(self) -> None:
        self.raw = ""
        self.name: str | None = None
        self.arguments = ""  # so far; empty if they have not begun
        self.state: Literal["open", "done", "broken"] = "open"
        self._expects: Literal["object", "key", "colon", "value", "comma"] = "object"
        self._key = ""
        self._text = ""  # of the key or value that is being read
        self._depth = 0  # within the value
        self._in_string = False
        self._is_escaped = False

    @property
    def is_call(self) -> bool:
        """Is it sure that this is a call?"""
        return self.name is not None and bool(self.arguments)

    def read(self, char: str) -> None:
        self.raw += char
        is_bare = bool(self._text) and not self._in_string and self._depth == 0
        if is_bare and char in ",}" + BLANKS:  # a number or a word ends where something else begins
            self._end()
        if self._text:
            self._read_on(char)
        elif char not in BLANKS:
            self._read_first(char)

    def _read_first(self, char: str) -> None:
        """The first character of a key or value, or the one between them."""
        if char not in _FIRST.get(self._expects, char):
            self.state = "broken"
        elif self._expects in ("key", "comma") and char == "}":
            self.state = "done" if self.is_call else "broken"
        elif self._expects in ("key", "value"):
            self._text, self._in_string, self._depth = char, char == '"', int(char in "{[")
            self._keep(char)
        else:
            self._expects = "value" if self._expects == "colon" else "key"

    def _read_on(self, char: str) -> None:
        """A further character of a key or value."""
        self._text += char
        self._keep(char)
        if self._in_string:
            self._in_string = self._is_escaped or char != '"'
            self._is_escaped = char == "\\" and not self._is_escaped
        else:
            self._in_string = char == '"'
            self._depth += (char in "{[") - (char in "}]")
        if not self._in_string and self._depth == 0 and char in '"}]':
            self._end()

    def _keep(self, char: str) -> None:
        if self._expects == "value" and self._key in ARGUMENTS:
            self.arguments += char

    def _end(self) -> None:
        """A key or value is complete."""
        text, self._text = self._text, ""
        if self._expects == "key":
            self._key, self._expects = _string(text) or "", "colon"
            return
        self._expects = "comma"
        if self._key == "name":
            self.name = _string(text)


_FIRST = {"object": "{", "key": '"}', "colon": ":", "comma": ",}"}  # a value may begin with anything


def _string(text: str) -> str | None:
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
