"""Log-probabilities in OpenAI's two shapes: parallel lists (completions) and a list of objects (chat)."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Any

from server.engine.messages import TokenLogprobs
from server.openai.generation import Scored
from server.text.prompt import Tokenizer

LOWEST = -9999.0  # OpenAI's word for minus infinity, which JSON has not


class CompletionLogprobs:
    """The lists of one choice, piece by piece. Offsets count characters of the choice's text, its echo included.

    A token that begins within a character has the offset of that character's end so far; unseen tokens have no width.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0
        self._is_first = True

    def render(self, tokens: Iterable[Scored]) -> dict[str, list[Any]]:
        """The lists for the next tokens."""
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, scored in tokens:
            lists["tokens"].append(self._tokenizer.token_text(token_id))
            lists["token_logprobs"].append(None if scored is None else _finite(scored.logprob))
            lists["top_logprobs"].append(None if scored is None else self._top(scored))
            lists["text_offset"].append(self._offset)
            self._advance(token_id)
        return lists

    def _top(self, scored: TokenLogprobs) -> dict[str, float]:
        """Alternatives by text, the sampled token always among them; of tokens that look alike, the likeliest."""
        top: dict[str, float] = {}
        for token_id, logprob in (*scored.top, (scored.token_id, scored.logprob)):
            top.setdefault(self._tokenizer.token_text(token_id), _finite(logprob))
        return top

    def _advance(self, token_id: int) -> None:
        pieces = self._tokenizer.pieces([token_id], skip_special_tokens=self._skip_special_tokens, first=self._is_first)
        for piece in pieces:
            self._is_first = False
            self._offset += len(self._utf8.decode(piece))


def chat_logprobs(tokenizer: Tokenizer, tokens: Iterable[Scored]) -> dict[str, Any]:
    """`logprobs` of a chat choice or chunk. The alternatives are as many as were asked for."""
    content = [
        {
            **_scored(tokenizer, token_id, scored.logprob),
            "top_logprobs": [_scored(tokenizer, other, logprob) for other, logprob in scored.top],
        }
        for token_id, scored in tokens
        if scored is not None
    ]
    return {"content": content, "refusal": None}


def _scored(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": _finite(logprob),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
