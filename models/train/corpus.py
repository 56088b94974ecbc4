"""Files of text as two streams of tokens, one to learn from and one held out, and windows cut from them.

Invariants:
- which side a document is on depends on its bytes alone;
- a batch is a function of (seed, step), so a resumed run sees what an uninterrupted one sees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.train.byte_tokenizer import END
from models.train.data import DataError

DOCUMENT_BYTES = 1 << 16  # longer files are cut at the next line


@dataclass(frozen=True)
class Corpus:
    """Tokens of all documents, each followed by the end token."""

    training: NDArray[np.int32]
    held_out: NDArray[np.int32]
    num_documents: int

    def digest(self) -> str:
        """Stands for all tokens."""
        return hashlib.blake2b(self.training.tobytes() + self.held_out.tobytes(), digest_size=16).hexdigest()


def read_documents(paths: Sequence[Path], pattern: str = "*") -> list[bytes]:
    """Documents of files, and of those in folders that match `pattern` and are UTF-8; each document once.

    Raises DataError if a named file is not UTF-8 or nothing is left.
    """
    documents: dict[bytes, None] = {}
    for file, is_named in _files(paths, pattern):
        content = _text(file)
        if content is None and is_named:
            raise DataError(f"{file} is not UTF-8 text; leave it out or convert it.")
        documents.update(dict.fromkeys(_cut(content or b"")))
    if not documents:
        raise DataError("No text to learn from: give files, or folders with files that match --pattern.")
    return list(documents)


def _files(paths: Sequence[Path], pattern: str) -> Iterator[tuple[Path, bool]]:
    for path in paths:
        if path.is_dir():
            yield from ((file, False) for file in sorted(path.rglob(pattern)) if file.is_file())
        else:
            yield path, True


def _text(file: Path) -> bytes | None:
    try:
        content = file.read_bytes()
        content.decode()
    except OSError as error:
        raise DataError(f"Cannot read {file}: {error.strerror}; give another path.") from error
    except UnicodeDecodeError:
        return None
    return None if b"\0" in content else content


def _cut(content: bytes) -> Iterator[bytes]:
    while content:
        end = content.find(b"\n", DOCUMENT_BYTES) + 1 or len(content)
        yield content[:end]
        content = content[end:]


def encode_corpus(documents: Iterable[bytes], tokenizer: Any, *, validation_fraction: float) -> Corpus:
    """`tokenizer`: one of transformers with an end token, or None for bytes. Raises DataError if a side is empty."""
    sides: dict[bool, list[NDArray[np.int32]]] = {False: [], True: []}
    for document in documents:
        digest = hashlib.blake2b(document, digest_size=8).digest()
        sides[int.from_bytes(digest) < validation_fraction * 2**64].append(encode_document(document, tokenizer))
    if not sides[False] or not sides[True]:
        missing = "held out for validation" if sides[False] else "left to learn from"
        raise DataError(f"No document is {missing}; give more text or another --validation-fraction.")
    return Corpus(np.concatenate(sides[False]), np.concatenate(sides[True]), len(sides[False]) + len(sides[True]))


def encode_document(document: bytes, tokenizer: Any) -> NDArray[np.int32]:
    """Its tokens, the end token included; `tokenizer` as for `encode_corpus`."""
    if tokenizer is None:
        return np.append(np.frombuffer(document, dtype=np.uint8).astype(np.int32), np.int32(END))
    ids = tokenizer(document.decode(), add_special_tokens=False)["input_ids"]
    return np.array([*ids, tokenizer.eos_token_id], dtype=np.int32)


@dataclass(frozen=True)
class Windows:
    """Random windows of `tokens`: `batch_size` of `length` tokens each."""

    tokens: NDArray[np.int32]
    batch_size: int
    length: int
    seed: int

    def __call__(self, step: int) -> Tensor:
        """[batch_size, length] int64."""
        starts = np.random.default_rng((self.seed, step)).integers(
            len(self.tokens) - self.length + 1, size=self.batch_size
        )
        return torch.from_numpy(self.tokens[starts[:, None] + np.arange(self.length)].astype(np.int64))


def spread_windows(tokens: NDArray[np.int32], length: int, count: int) -> Tensor:
    """At most `count` windows at equal distances, which do not overlap: [windows, length] int64.

    Raises DataError if there is not one.
    """
    available = len(tokens) // length
    if not available:
        raise DataError(f"The text is shorter than one window of {length} tokens; give more, or a smaller --context.")
    starts = np.linspace(0, len(tokens) - length, min(count, available)).astype(np.int64)
    return torch.from_numpy(tokens[starts[:, None] + np.arange(length)].astype(np.int64))
