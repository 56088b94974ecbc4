"""A SentencePiece file of Llama's kind (`tokenizer.model`) as a fast tokenizer, without the sentencepiece package.

The file is a protocol buffer, `ModelProto` of https://github.com/google/sentencepiece: field 1 is one piece each, with
its text (1), score (2) and type (3).

Invariant: a token's id is its piece's place in the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transformers import LlamaTokenizer
from transformers.tokenization_utils_base import generate_merges

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # ModelProto.SentencePiece.Type
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


class TokenizerError(ValueError):
    """This is no such file; the message says why."""


def llama_tokenizer(file: Path) -> LlamaTokenizer:
    """Raises TokenizerError."""
    pieces = read_pieces(file)
    kinds = [kind for _, kind in pieces[:3]]
    if kinds != [UNKNOWN, CONTROL, CONTROL]:
        raise TokenizerError(f"{file} does not begin with Llama's pieces (unknown, begin, end): fetch it again.")
    vocab = {text: id for id, (text, _) in enumerate(pieces)}
    merges = generate_merges(vocab, skip_tokens=[text for text, kind in pieces if kind != NORMAL])
    unknown, begin, end = (text for text, _ in pieces[:3])
    return LlamaTokenizer(
        vocab=vocab, merges=merges, unk_token=unknown, bos_token=begin, eos_token=end, add_bos_token=True
    )


def read_pieces(file: Path) -> list[tuple[str, int]]:
    """Text and type of every piece. Raises TokenizerError."""
    try:
        pieces = [_piece(content) for number, content in _fields(file.read_bytes()) if number == 1]
    except (IndexError, TypeError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{file} cannot be read as a SentencePiece model: fetch it again.") from error
    if not pieces:
        raise TokenizerError(f"{file} has no pieces, so it is no SentencePiece model: fetch it again.")
    return pieces


def _piece(message: int | bytes) -> tuple[str, int]:
    if isinstance(message, int):
        raise TypeError("a piece is a message")
    fields = dict(_fields(message))
    text, kind = fields.get(1, b""), fields.get(3, NORMAL)
    if isinstance(text, int) or isinstance(kind, bytes):
        raise TypeError("a piece has a text and a type")
    return text.decode("utf-8"), kind


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field. Raises IndexError and TypeError for what is no message."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == _VARINT:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        size, at = _varint(message, at) if key & 7 == _BYTES else ({_FIXED64: 8, _FIXED32: 4}.get(key & 7, -1), at)
        if size < 0 or at + size > len(message):
            raise IndexError("a field is longer than its message")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, seven bits a byte, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        value |= (message[at + shift // 7] & 0x7F) << shift
        if message[at + shift // 7] < 0x80:
            return value, at + shift // 7 + 1
    raise IndexError("a number is too long")
