"""Files become documents, documents two streams of tokens, streams windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from models.train.byte_tokenizer import END, byte_tokenizer
from models.train.corpus import DOCUMENT_BYTES, Windows, encode_corpus, read_documents, spread_windows
from models.train.data import DataError
from server.text.prompt import Tokenizer

ODD = "def f(x):\n\treturn 'é€😀\x7f' \r\n"


def test_folders_give_their_texts_once(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.py").write_text("a = 1\n")
    (tmp_path / "b.py").write_text("a = 1\n")
    (tmp_path / "c.py").write_text(ODD, newline="")
    (tmp_path / "d.txt").write_text("text")
    (tmp_path / "e.py").write_bytes(b"\xff")
    (tmp_path / "f.py").write_bytes(b"a\0b")
    assert read_documents([tmp_path], "*.py") == [b"a = 1\n", ODD.encode()]
    assert len(read_documents([tmp_path])) == 3
    with pytest.raises(DataError, match=r"e\.py is not UTF-8"):
        read_documents([tmp_path / "e.py"])
    with pytest.raises(DataError, match="Cannot read"):
        read_documents([tmp_path / "none.py"])
    with pytest.raises(DataError, match="--pattern"):
        read_documents([tmp_path], "*.rs")


def test_long_files_are_cut_between_lines(tmp_path: Path) -> None:
    lines = [f"line {i}\n" for i in range(20_000)]
    (tmp_path / "long.txt").write_text("".join(lines))
    documents = read_documents([tmp_path])
    assert b"".join(documents).decode() == "".join(lines)
    assert all(document.endswith(b"\n") for document in documents)
    assert max(map(len, documents)) < DOCUMENT_BYTES + 20


def test_each_document_is_on_one_side_and_ended() -> None:
    documents = [f"document {i}".encode() for i in range(200)]
    corpus = encode_corpus(documents, None, validation_fraction=0.2)
    sides = [bytes(side[side != END].astype(np.uint8)) for side in (corpus.training, corpus.held_out)]
    assert (corpus.training == END).sum() + (corpus.held_out == END).sum() == 200
    assert 15 < (corpus.held_out == END).sum() < 70
    assert sorted(b"".join(sides)) == sorted(b"".join(documents))
    assert encode_corpus(documents, None, validation_fraction=0.2).digest() == corpus.digest()
    assert encode_corpus(documents, None, validation_fraction=0.3).digest() != corpus.digest()
    for fraction, missing in ((0.0, "held out"), (1.0, "left to learn from")):
        with pytest.raises(DataError, match=missing):
            encode_corpus(documents, None, validation_fraction=fraction)


def test_any_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [f"w{i} w{i + 1}".encode() for i in range(40)]
    corpus = encode_corpus(documents, tiny_tokenizer, validation_fraction=0.5)
    tokens = np.concatenate([corpus.training, corpus.held_out])
    assert len(tokens) == 40 * 3
    assert (tokens[2::3] == tiny_tokenizer.eos_token_id).all()


def test_windows_are_a_function_of_seed_and_step() -> None:
    tokens = np.arange(100, dtype=np.int32)
    windows = Windows(tokens, 8, 10, seed=1)
    batch = windows(3)
    assert batch.shape == (8, 10)
    assert ((batch[:, 1:] - batch[:, :-1]) == 1).all()
    assert (batch == Windows(tokens, 8, 10, seed=1)(3)).all()
    assert (batch != windows(4)).any()
    assert (batch != Windows(tokens, 8, 10, seed=2)(3)).any()
    assert {int(row[0]) for step in range(200) for row in windows(step)} == set(range(91))


def test_spread_windows_do_not_overlap() -> None:
    tokens = np.arange(100, dtype=np.int32)
    assert spread_windows(tokens, 10, 99).tolist() == np.arange(100).reshape(10, 10).tolist()
    assert spread_windows(tokens, 10, 3)[:, 0].tolist() == [0, 45, 90]
    with pytest.raises(DataError, match="shorter than one window of 101"):
        spread_windows(tokens, 101, 3)


def test_the_server_reads_the_byte_tokenizer(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.vocab_size == 257
    assert tokenizer.encode(ODD) == list(ODD.encode())
    assert tokenizer.decode([*ODD.encode(), END]) == ODD
    assert [tokenizer.token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert byte_tokenizer().eos_token_id == END
