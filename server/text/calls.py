"""Tool calls in a model's text, found while it comes.

Invariants:
- however the text is split over pushes, the parts joined are the same: content, and calls with their argument text;
- what may be the beginning of a call is held back until it is known; of a call nothing is told before its name is;
- what turns out to be no call is content, to the letter; the white space around calls is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from server.text.call_reader import BLANKS, CallReader

HERMES_BEGIN, HERMES_END = "<tool_call>", "</tool_call>"
LLAMA_TAG = "<|python_tag|>"


@dataclass(frozen=True, slots=True)
class CallDelta:
    """News of one call: its name, once and first, and a piece of its arguments' JSON text."""

    index: int
    name: str | None = None
    arguments: str = ""
    position: int = 0  # characters of content before the call, from the beginning of the text


@dataclass(slots=True)
class Parsed:
    """What one push has brought."""

    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class CallParser:
    """Takes a text as it comes, and tells calls from content. The formats differ in what is around the calls."""

    def __init__(self) -> None:
        self.num_calls = 0  # complete ones
        self._num_told = 0
        self._num_chars = 0  # of content, up to the last push
        self._held = ""
        self._before = ""  # what was dropped in front of the call that is being read
        self._reader: CallReader | None = None
        self._told: int | None = None  # characters of its arguments; None before its name

    def push(self, text: str) -> Parsed:
        """What is sure by now."""
        parsed = Parsed()
        self._held += text
        while self._advance(parsed):
            continue
        self._num_chars += len(parsed.content)
        return parsed

    def finish(self) -> Parsed:
        """The text has ended: what was held back is content, unless it belongs to a call."""
        held, self._held = self._held, ""
        if self._reader is not None:
            held = self._before + self._reader.raw if self._told is None else ""
        elif self._is_around_calls(held):
            held = ""
        self._reader = None
        return Parsed(held)

    def _advance(self, parsed: Parsed) -> bool:
        """Take something from what is held back. False if that needs more text."""
        return self._advance_text(parsed) if self._reader is None else self._advance_call(self._reader, parsed)

    def _advance_text(self, parsed: Parsed) -> bool:
        raise NotImplementedError

    def _is_around_calls(self, held: str) -> bool:
        """Does `held`, at the end of the text, belong to the calls?"""
        raise NotImplementedError

    def _on_end(self, *, is_call: bool) -> None:
        """An object has been read."""
        raise NotImplementedError

    def _advance_call(self, reader: CallReader, parsed: Parsed) -> bool:
        num_read = 0
        while reader.state == "open" and num_read < len(self._held):
            reader.read(self._held[num_read])
            num_read += 1
        self._held = self._held[num_read:]
        if reader.is_call:
            self._tell(reader, parsed)
        if reader.state == "open":
            return False
        if self._told is None:
            parsed.content += self._before + reader.raw
        self.num_calls += reader.state == "done"
        self._on_end(is_call=self._told is not None)
        self._reader = None
        return True

    def _tell(self, reader: CallReader, parsed: Parsed) -> None:
        name = None
        if self._told is None:
            name, self._told, self._num_told = reader.name, 0, self._num_told + 1
        piece = reader.arguments[self._told :]
        if piece:
            position = self._num_chars + len(parsed.content)
            parsed.calls.append(CallDelta(self._num_told - 1, name, piece, position))
            self._told += len(piece)

    def _open(self, before: str) -> None:
        self._reader, self._before, self._told = CallReader(), before, None


class HermesParser(CallParser):
    """`<tool_call>{"name": ..., "arguments": ...}</tool_call>`, anywhere in the text."""

    def __init__(self) -> None:
        super().__init__()
        self._awaits_end = False
        self._drops_blanks = False

    def _advance_text(self, parsed: Parsed) -> bool:
        if self._awaits_end and not self._take_end():
            return False
        if self._drops_blanks:
            self._held = self._held.lstrip(BLANKS)
            self._drops_blanks = not self._held
        text, begin, rest = self._held.partition(HERMES_BEGIN)
        safe = len(text if begin else text[: len(text) - _overlap(text, HERMES_BEGIN)].rstrip(BLANKS))
        if begin:
            safe = len(text.rstrip(BLANKS))
            self._open(text[safe:] + begin)
        parsed.content += text[:safe]
        self._held = rest if begin else text[safe:]
        return bool(begin)

    def _take_end(self) -> bool:
        """Drop the closing tag. False if it may still come; models that forget it are forgiven."""
        rest = self._held.lstrip(BLANKS)
        if HERMES_END.startswith(rest) and rest != HERMES_END:
            return False
        self._held, self._awaits_end, self._drops_blanks = rest.removeprefix(HERMES_END), False, True
        return True

    def _is_around_calls(self, held: str) -> bool:
        return self._awaits_end or (self._drops_blanks and not held.strip(BLANKS))

    def _on_end(self, *, is_call: bool) -> None:
        self._awaits_end = is_call


class Llama3Parser(CallParser):
    """`{"name": ..., "parameters": ...}`, several with semicolons between; the whole text, or none of it."""

    def __init__(self) -> None:
        super().__init__()
        self._is_text = False

    def _advance_text(self, parsed: Parsed) -> bool:
        rest = self._held.lstrip(BLANKS + ";" if self.num_calls else BLANKS)
        if not self._is_text and not self.num_calls and rest.startswith(LLAMA_TAG):
            rest = rest.removeprefix(LLAMA_TAG).lstrip(BLANKS)
        if self._is_text:
            parsed.content, self._held = parsed.content + self._held, ""
        elif rest.startswith("{"):
            self._open(self._held[: len(self._held) - len(rest)])
            self._held = rest
            return True
        elif rest and not LLAMA_TAG.startswith(rest):
            self._is_text = True
            return True
        return False

    def _is_around_calls(self, held: str) -> bool:
        return self.num_calls > 0 and not held.strip(BLANKS + ";")

    def _on_end(self, *, is_call: bool) -> None:
        self._is_text = not is_call


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `tag`."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)
