"""Tokens that a request forbids or allows, from its words and ids: what `models.masks` is made of.

Invariant: at least one token may be said first, or the request is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from server.engine.messages import ModelInfo
from server.errors import InvalidRequestError
from server.openai.schema import GenerationRequest
from server.text.prompt import Tokenizer

Words = tuple[tuple[int, ...], ...]


def bad_words(words: Sequence[str], tokenizer: Tokenizer) -> Words:
    """Each word's tokens as they are at the start of a text, and after a space. As in vLLM, spaces before it go."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word.lstrip(), " " + word.lstrip()):
            found[tuple(tokenizer.encode(text, add_special_tokens=False))] = None
    found.pop((), None)
    return tuple(found)


def check_possible(request: GenerationRequest, words: Words, info: ModelInfo) -> None:
    """Raises InvalidRequestError if `allowed_token_ids` leaves nothing to begin with."""
    if request.allowed_token_ids is None:
        return
    possible = set(request.allowed_token_ids) - {word[0] for word in words if len(word) == 1}
    if request.min_tokens:
        possible -= {*request.stop_token_ids, *info.eos_token_ids}
    if not possible:
        raise InvalidRequestError(
            "No token is left to begin with: bad_words and min_tokens exclude all of allowed_token_ids.",
            param="allowed_token_ids",
        )
