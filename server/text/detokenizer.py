"""Tokens to text while they come: nothing is sent that would have to be taken back.

Invariants:
- the pushes joined, plus `finish()`, are `Tokenizer.decode` of all tokens, cut at the first stop string, however the
  tokens are split over pushes;
- the first stop string is the one that is complete first; of several that end together, the longest;
- a push costs its tokens and the length of the stop strings, never the length of the text so far.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from server.text.prompt import Tokenizer


class Detokenizer:
    """The text of one completion. `stopped` is the stop string that ended it, `num_tokens` how many tokens it took.

    Held back are the bytes of an incomplete character and the longest end of the text that may begin a stop string.
    The text of the first `min_tokens` tokens is no part of any stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        assert all(stop), "an empty stop string would end every text before it begins"
        self.stopped: str | None = None
        self.num_tokens = 0
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._skip_special_tokens = skip_special_tokens
        self._min_tokens = min_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_first = True
        self._held = ""

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that is safe to send now. Tokens after the one that completes a stop string are not consumed."""
        if self._stop:
            return "".join([self._push_one(id) for id in token_ids])
        self.num_tokens += len(token_ids)
        return self._utf8.decode(self._bytes(token_ids))

    def finish(self) -> str:
        """The rest of the text: nothing more can complete it."""
        text = self._release(self._utf8.decode(b"", final=True))
        rest, self._held = self._held, ""
        return text + rest

    def _push_one(self, id: int) -> str:
        if self.stopped is not None:
            return ""
        self.num_tokens += 1
        return self._release(self._utf8.decode(self._bytes((id,))))

    def _bytes(self, token_ids: Sequence[int]) -> bytes:
        skip, first = self._skip_special_tokens, self._is_first
        pieces = [*self._tokenizer.pieces(token_ids, skip_special_tokens=skip, first=first)]
        self._is_first = first and not pieces
        return b"".join(pieces)

    def _release(self, text: str) -> str:
        """Add `text` to what is held back; return what no stop string can reach any more."""
        if self.stopped is not None:
            return ""
        if self.num_tokens <= self._min_tokens:
            return text
        text = self._held + text
        matches = [(end, -len(stop), stop) for stop in self._stop if (end := _end(text, stop)) is not None]
        if matches:
            end, _, self.stopped = min(matches)
            self._held = ""
            return text[: end if self._include_stop else end - len(self.stopped)]
        safe = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[safe:]
        return text[:safe]


def _end(text: str, stop: str) -> int | None:
    start = text.find(stop)
    return None if start < 0 else start + len(stop)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
