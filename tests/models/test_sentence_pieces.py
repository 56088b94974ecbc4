"""A small SentencePiece file, written here, as a fast tokenizer."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from models.sentence_pieces import BYTE, CONTROL, NORMAL, UNKNOWN, TokenizerError, llama_tokenizer, read_pieces

PIECES = [
    ("<unk>", UNKNOWN),
    ("<s>", CONTROL),
    ("</s>", CONTROL),
    ("<0xC3>", BYTE),
    ("<0xA4>", BYTE),
    *((text, NORMAL) for text in ("ab", "▁ab", "▁", "a", "b", "c")),
]


def field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2, len(content)]) + content


def write_pieces(path: Path, pieces: list[tuple[str, int]] = PIECES) -> Path:
    """`ModelProto`: the pieces, and a trainer's settings behind them."""
    message = b"".join(
        field(1, field(1, text.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", -id) + bytes([3 << 3, kind]))
        for id, (text, kind) in enumerate(pieces)
    )
    path.write_bytes(message + field(2, bytes([1 << 3, 0x80, 0x01, 2 << 3 | 1]) + bytes(8)))
    return path


def test_every_piece_is_read(tmp_path: Path) -> None:
    assert read_pieces(write_pieces(tmp_path / "tokenizer.model")) == PIECES


def test_text_is_cut_as_sentencepiece_cuts_it(tmp_path: Path) -> None:
    tokenizer = llama_tokenizer(write_pieces(tmp_path / "tokenizer.model"))
    assert len(tokenizer) == len(PIECES)
    assert tokenizer("abc ab")["input_ids"] == [1, 6, 10, 6]
    assert tokenizer("ä")["input_ids"] == [1, 7, 3, 4]  # in bytes
    assert tokenizer.decode([6, 10, 6, 3, 4], skip_special_tokens=True) == "abc abä"
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "has no pieces"),
        (b"\x0a\x05ab", "cannot be read"),
        (b"\x08\x01", "cannot be read"),
        (b"\x0b", "cannot be read"),
        (b"\xff" * 12, "cannot be read"),
        (b"\x0a\x04\x0a\x02\xff\xfe", "cannot be read"),
        (b"\x0a\x02\x08\x01", "cannot be read"),
    ],
)
def test_other_files_are_refused_in_a_sentence(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=sentence):
        llama_tokenizer(tmp_path / "tokenizer.model")


def test_other_pieces_than_llamas_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="Llama's pieces"):
        llama_tokenizer(write_pieces(tmp_path / "tokenizer.model", PIECES[3:]))
