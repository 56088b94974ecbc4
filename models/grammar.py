"""Grammars over tokens, through llguidance: what may follow each path of a request's tree.

Invariants:
- what is allowed after a path depends on the grammar and on the tokens up to there, and on nothing else: not on what
  was asked before, nor on whether a path was walked in a tree or one token at a time;
- a grammar that gets too complex at run time fails the path it happens on, and no other;
- ids beyond the tokenizer's vocabulary are never allowed; end-of-sequence only where the grammar accepts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer

Tokens = tuple[int, ...]  # a path: tokens below the request's last known token, along one path of its tree

MAX_SPLITS = 16  # ways to begin one forced text; more are hardly prefixes of one another
NUM_COMPILED = 64


class GrammarError(ValueError):
    """A grammar that cannot be used with this model; a sentence."""


class Grammars:
    """The compiled grammars of one model. Its tokenizer is read by `prepare`, or when the first grammar comes."""

    def __init__(self, tokenizer: Path | str, eos_token_ids: Sequence[int]) -> None:
        """`tokenizer` is the file `tokenizer.json`, or its content."""
        self._source = tokenizer
        self._eos_token_ids = list(eos_token_ids)
        self._compiled = lru_cache(maxsize=NUM_COMPILED)(self._compile)

    def prepare(self) -> None:
        """Read the tokenizer, which takes a large one seconds, before anybody waits for it."""
        with suppress(GrammarError):  # told to whoever sends a grammar
            _ = self.vocabulary

    def start(self, grammar: str) -> GrammarState:
        """The state before any output. `grammar` is Lark or JSON, as llguidance takes it. Raises `GrammarError`."""
        return GrammarState(self._compiled(grammar), self.vocabulary)

    @cached_property
    def vocabulary(self) -> LLTokenizer:
        try:
            text = self._source if isinstance(self._source, str) else self._source.read_text(encoding="utf-8")
            return LLTokenizer(_with_plain_decoder(text), eos_token=self._eos_token_ids or None)
        except (OSError, ValueError) as error:
            raise GrammarError(f"This model's tokenizer cannot be used with grammars: {error}.") from error

    def _compile(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self.vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise GrammarError(f"The grammar cannot be used: {_sentence(matcher)}")
        return matcher


class GrammarState:
    """One request's place in its grammar, and the masks of the paths that lie ahead of it."""

    def __init__(self, compiled: LLMatcher, vocabulary: LLTokenizer) -> None:
        self._compiled = compiled
        self._vocabulary = vocabulary
        self._matcher = compiled.deep_copy()
        self._output: list[int] = []  # consumed for good
        self._ahead: Tokens = ()  # consumed beyond the output, to be rolled back
        self._masks: dict[Tokens, bytes | None] = {}
        self._failed: dict[Tokens, str] = {}

    def advance(self, output: Sequence[int]) -> None:
        """Take in the request's whole output; what was known of it before is its beginning."""
        new = tuple(output[len(self._output) :])
        if not new:
            return
        if self._go_to(new):
            self._output += new
            self._ahead, self._masks, self._failed = (), {}, {}
        else:
            self._masks, self._failed = {(): None}, {(): self._failed.get(new, "The output has left it.")}

    def mask(self, path: Tokens) -> bytes | None:
        """A bit for each token: may it follow `path`? None for a path that is itself forbidden, or has failed."""
        if path not in self._masks:
            self._masks[path] = self._compute(path)
        return self._masks[path]

    def error(self, path: Tokens) -> str | None:
        """Why the grammar cannot say what follows `path`, a sentence; None if it can."""
        return None if self.mask(path) is not None else self._failed.get(path)

    def allowed(self, path: Tokens, tokens: Sequence[int]) -> list[int]:
        """Those of `tokens` that may follow `path`, in their order."""
        mask = self.mask(path) or b""
        return [token for token in tokens if token >> 3 < len(mask) and mask[token >> 3] >> (token & 7) & 1]

    def is_complete(self, path: Tokens) -> bool:
        """Is `path` the end: can nothing follow but the end of the sequence?"""
        return self._go_to(path) and self._matcher.is_stopped() and not self._matcher.is_error()

    def until_complete(self, path: Tokens) -> Tokens:
        """`path` up to the token that completes the grammar, if there is one in it."""
        return next((path[:n] for n in range(1, len(path)) if self.is_complete(path[:n])), path)

    def failure(self, path: Tokens) -> str | None:
        """The first `error` on the way to the last token of `path`, where decoding one by one would have met it."""
        errors = (self.error(path[:n]) for n in range(len(path)))
        return next((error for error in errors if error is not None), None)

    def forced(self, path: Tokens) -> int | None:
        """The token that must follow `path`; None if there is a choice.

        Where only the splitting of a forced text into tokens is open, that is the longest token: models nearly always
        take it.
        """
        bits = int.from_bytes(self.mask(path) or b"", "little")
        if not 0 < bits.bit_count() <= MAX_SPLITS or self.is_complete(path):
            return None
        tokens = list(_bits(bits))
        return tokens[0] if len(tokens) == 1 else self._longest(tokens)

    def _longest(self, tokens: Sequence[int]) -> int | None:
        """Of tokens that each begin with the one before, the longest that says no more than what is forced here."""
        token_of = {bytes(self._vocabulary.decode_bytes([token])): token for token in tokens}
        texts = sorted(token_of)
        if not all(texts[-1].startswith(text) for text in texts):
            return None
        forced = self._matcher.compute_ff_bytes()
        return next((token_of[text] for text in reversed(texts) if forced.startswith(text)), None)

    def _compute(self, path: Tokens) -> bytes | None:
        if not self._go_to(path):
            return None
        mask: bytes = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            self._failed[path] = _sentence(self._matcher)
            self._restart()
            return None
        return mask

    def _go_to(self, path: Tokens) -> bool:
        """Move the matcher to the end of `path`. False if `path` is forbidden, holds what is no token, or fails."""
        shared = _num_equal(self._ahead, path)
        if shared < len(self._ahead):
            self._matcher.rollback(len(self._ahead) - shared)
        rest = path[shared:]
        taken = self._matcher.try_consume_tokens([token for token in rest if token >= 0]) if rest else 0
        self._ahead = path[: shared + taken]
        if not self._matcher.is_error():
            return taken == len(rest)
        self._failed[path] = _sentence(self._matcher)
        self._restart()
        return False

    def _restart(self) -> None:
        """A matcher does not recover from errors: take a new one to where the output is."""
        self._matcher = self._compiled.deep_copy()
        self._matcher.consume_tokens(self._output)
        self._ahead = ()


def unpack(mask: bytes, vocab_size: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """[vocab] bool: which tokens a mask allows."""
    bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), count=vocab_size, bitorder="little")
    return bits.view(np.bool_)


def _bits(bits: int) -> Iterator[int]:
    while bits:
        yield (bits & -bits).bit_length() - 1
        bits &= bits - 1


def _num_equal(first: Tokens, second: Tokens) -> int:
    differing = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differing, min(len(first), len(second)))


def _sentence(matcher: LLMatcher) -> str:
    """The first lines of llguidance's words, without its state."""
    return " ".join(matcher.get_error().partition("<")[0].split())


def _with_plain_decoder(tokenizer: str) -> str:
    """`tokenizer.json`, with a byte-level decoder that is part of a sequence alone: else llguidance does not see it."""
    content = json.loads(tokenizer)
    decoder = content.get("decoder")
    if decoder is None or decoder["type"] == "ByteLevel" or "ByteLevel" not in _decoder_types(decoder):
        return tokenizer
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return json.dumps({**content, "decoder": plain}, ensure_ascii=False)


def _decoder_types(decoder: dict[str, Any]) -> Iterator[str]:
    yield decoder["type"]
    for part in decoder.get("decoders", ()):
        yield from _decoder_types(part)
