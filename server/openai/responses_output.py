"""The output items of a response as they grow, and the events that tell of them.

Invariants:
- items stand in the order in which the model said them, and one ends before the next begins; there is at least one;
- a message has one part, its text. An item's deltas joined are its text or its arguments, and so with the
  log-probabilities of a text, which hold the tokens that came with it; those of calls are not shown;
- a call is completed if its arguments are, whatever has ended the response.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from server.openai.generation import Piece, Scored
from server.openai.tools import new_call_id
from server.text.calls import CallDelta

Json = dict[str, Any]
Scores = Callable[[tuple[Scored, ...]], list[Json]]
STATUS = {"stop": "completed", "tool_calls": "completed", "length": "incomplete"}


class Message:
    """A text."""

    def __init__(self, index: int) -> None:
        self.id = f"msg_{uuid.uuid4().hex}"
        self._place = {"item_id": self.id, "output_index": index, "content_index": 0}
        self._texts: list[str] = []
        self._scores: list[Json] = []

    def opening(self) -> list[Json]:
        """The events of its beginning."""
        return [{"type": "response.content_part.added", **self._place, "part": self._part()}]

    def add(self, text: str, scores: list[Json]) -> Json:
        """The event of more text."""
        self._texts.append(text)
        self._scores += scores
        return {"type": "response.output_text.delta", **self._place, "delta": text, "logprobs": scores}

    def closing(self) -> list[Json]:
        """The events of its end."""
        part = self._part()
        said = {"text": part["text"], "logprobs": part["logprobs"]}
        return [
            {"type": "response.output_text.done", **self._place, **said},
            {"type": "response.content_part.done", **self._place, "part": part},
        ]

    def shown(self, status: str) -> Json:
        """The item as the client gets it."""
        parts = [] if status == "in_progress" else [self._part()]
        return {"id": self.id, "type": "message", "role": "assistant", "status": status, "content": parts}

    def _part(self) -> Json:
        said = {"text": "".join(self._texts), "annotations": [], "logprobs": list(self._scores)}
        return {"type": "output_text", **said}


class Call:
    """A call of a function."""

    def __init__(self, index: int, name: str) -> None:
        self.id = f"fc_{uuid.uuid4().hex}"
        self._place = {"item_id": self.id, "output_index": index}
        self._call_id = new_call_id()
        self._name = name
        self._pieces: list[str] = []

    def opening(self) -> list[Json]:
        """Nothing besides the item itself."""
        return []

    def add(self, arguments: str) -> Json:
        """The event of more arguments."""
        self._pieces.append(arguments)
        return {"type": "response.function_call_arguments.delta", **self._place, "delta": arguments}

    def closing(self) -> list[Json]:
        """The event of its end."""
        said = {"name": self._name, "arguments": self._arguments}
        return [{"type": "response.function_call_arguments.done", **self._place, **said}]

    def shown(self, status: str) -> Json:
        """The item as the client gets it."""
        if status != "in_progress":
            status = "completed" if _is_json(self._arguments) else "incomplete"
        said = {"call_id": self._call_id, "name": self._name, "arguments": self._arguments}
        return {"id": self.id, "type": "function_call", "status": status, **said}

    @property
    def _arguments(self) -> str:
        return "".join(self._pieces)


class Output:
    """All items of one response. `scores` shows log-probabilities."""

    def __init__(self, scores: Scores) -> None:
        self.items: list[Json] = []  # those that have ended
        self.status = "in_progress"
        self._scores = scores
        self._current: Message | Call | None = None
        self._num_chars = 0  # of all messages
        self._has_calls = False

    def take(self, piece: Piece) -> list[Json]:
        """The events of what the model says next."""
        events: list[Json] = []
        tokens = piece.tokens
        for part in _in_order(piece, self._num_chars):
            if isinstance(part, CallDelta):
                events += self._call(part)
            else:
                events += self._say(part, tokens)
                tokens = ()
        if tokens and not self._has_calls:
            events += self._say("", tokens)
        self._num_chars += len(piece.text)
        return events if piece.finish is None else events + self._finish(STATUS[piece.finish])

    def _say(self, text: str, tokens: tuple[Scored, ...]) -> list[Json]:
        begun, message = self._message()
        return [*begun, message.add(text, self._scores(tokens))]

    def _message(self) -> tuple[list[Json], Message]:
        """The message that is being said, and the events of its beginning if there was none."""
        if isinstance(self._current, Message):
            return [], self._current
        message = Message(self._index)
        return self._begin(message), message

    def _call(self, delta: CallDelta) -> list[Json]:
        events: list[Json] = []
        if delta.name is not None:
            events = self._begin(Call(self._index, delta.name))
            self._has_calls = True
        assert isinstance(self._current, Call), "a call's name comes first"
        return [*events, self._current.add(delta.arguments)]

    @property
    def _index(self) -> int:
        """Of the next item."""
        return len(self.items) + (self._current is not None)

    def _begin(self, item: Message | Call) -> list[Json]:
        events = self._end("completed")
        self._current = item
        added = {"output_index": len(self.items), "item": item.shown("in_progress")}
        return [*events, {"type": "response.output_item.added", **added}, *item.opening()]

    def _end(self, status: str) -> list[Json]:
        if self._current is None:
            return []
        events, item = self._current.closing(), self._current.shown(status)
        done = {"type": "response.output_item.done", "output_index": len(self.items), "item": item}
        self.items.append(item)
        self._current = None
        return [*events, done]

    def _finish(self, status: str) -> list[Json]:
        """A response that says nothing is an empty message."""
        self.status = status
        begun = [] if self._current is not None else self._message()[0]
        return [*begun, *self._end(status)]


def _in_order(piece: Piece, start: int) -> Iterator[str | CallDelta]:
    """The texts and calls of a piece whose text begins at `start`. No text is empty."""
    told = 0
    for call in piece.calls:
        if call.position > start + told:
            yield piece.text[told : call.position - start]
            told = call.position - start
        yield call
    if piece.text[told:]:
        yield piece.text[told:]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
