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

    def __init__(self, tokenizer: Tokenizer, num_top: int, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
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
        for token_id, logprob in (*scored.top[: self._num_top], (scored.token_id, scored.logprob)):
            top.setdefault(self._tokenizer.token_text(token_id), _finite(logprob))
        return top

    def _advance(self, token_id: int) -> None:
        pieces = self._tokenizer.pieces([token_id], skip_special_tokens=self._skip_special_tokens, first=self._is_first)
        for piece in pieces:
            self._is_first = False
            self._offset += len(self._utf8.decode(piece))


def prompt_logprobs(
    tokenizer: Tokenizer, entries: Iterable[TokenLogprobs | None], num_top: int
) -> list[dict[str, Any] | None]:
    """vLLM's shape: for each prompt token the token itself and so many likeliest, by id. Nothing precedes the first."""
    return [None if entry is None else _candidates(tokenizer, entry, num_top) for entry in entries]


def _candidates(tokenizer: Tokenizer, entry: TokenLogprobs, num_top: int) -> dict[str, Any]:
    candidates = [(entry.token_id, entry.logprob, entry.rank)]
    candidates += [(id, logprob, rank) for rank, (id, logprob) in enumerate(entry.top[:num_top], 1)]
    found: dict[str, Any] = {}
    for id, logprob, rank in candidates:
        shown = {"logprob": _finite(logprob), "rank": rank, "decoded_token": tokenizer.token_text(id)}
        found.setdefault(str(id), shown)
    return found


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
