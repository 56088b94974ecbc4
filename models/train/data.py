"""Training text: files in, token sequences out, each with a mask of the tokens that count and its side of the split.

Accepted: JSONL rows with `messages` (chat), `q`/`a` (one chat turn), `prompt`/`completion` (raw text) or `text`, and
plain text files, cut into documents at blank lines. Two optional fields describe how an answer was made: `temp`
(0 is greedy) and `n` (generated tokens; an answer with no fewer tokens was cut off, so no end token follows it). A
third, `category`, says what kind of prompt it answers, for reports.

Invariants:
- files are read before, and without, the model: what is wrong with them is said at once;
- whether a row is held out depends on its prompt's text alone, so equal prompts are on one side and every run agrees;
- chat rows count only what the assistant wrote, its end-of-turn token included; text rows count everything.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any

from jinja2 import TemplateError

from models.errors import UsageError

VALIDATION_FRACTION = 0.06


class DataError(UsageError):
    """Training data cannot be used; the message says which and what to do."""


@dataclass(frozen=True)
class Row:
    """One example before tokenisation: a chat, or raw text of which `prompt` does not count."""

    messages: tuple[dict[str, str], ...] = ()
    prompt: str = ""
    text: str = ""
    greedy: bool = False
    generated: int | None = None  # tokens that the model wrote, if known
    where: str = ""  # file and line, for messages
    category: str = ""  # of the prompt, if the data names it

    @property
    def key(self) -> str:
        """What decides the split: the part before the first answer, else all of the text."""
        if self.messages:
            opening = itertools.takewhile(lambda message: message["role"] != "assistant", self.messages)
            return "\0".join(message["content"] for message in opening)
        return self.prompt or self.text


@dataclass(frozen=True)
class Example:
    """One tokenised row. `counts[i]` says whether `tokens[i]` is a token that the heads should learn to guess."""

    tokens: tuple[int, ...]
    counts: tuple[bool, ...]
    held_out: bool
    greedy: bool
    category: str = ""


def encode_rows(
    rows: Iterable[Row], tokenizer: Any, *, validation_fraction: float, max_length: int = 1024
) -> list[Example]:
    """Split and tokenise every row; the end-of-turn tokens are the tokenizer's own end token.

    Raises DataError for chats that the tokenizer's template cannot render, and if no token counts.
    """
    examples = []
    for row in rows:
        tokens, counts = _encode_chat(row, tokenizer) if row.messages else _encode_text(row, tokenizer)
        held_out = is_held_out(row.key, validation_fraction)
        for start in range(0, len(tokens), max_length):
            cut = slice(start, start + max_length)
            examples.append(Example(tuple(tokens[cut]), tuple(counts[cut]), held_out, row.greedy, row.category))
    if not any(any(example.counts) for example in examples):
        raise DataError("No text to learn from; give --data with at least one answer.")
    return examples


def is_held_out(key: str, fraction: float) -> bool:
    """A deterministic draw: the same text is always on the same side."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < fraction * 2**64


def read_rows(files: Iterable[Path]) -> list[Row]:
    """All rows; `.jsonl` and `.json` are read line by line as JSON, anything else as plain text.

    Raises DataError for unreadable files and rows of no known form.
    """
    return list(itertools.chain.from_iterable(map(_read, files)))


def _read(path: Path) -> Iterator[Row]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read {path}: {error}; give UTF-8 text or JSONL files.") from error
    if path.suffix not in (".jsonl", ".json"):
        yield from (Row(text=part, where=str(path)) for part in _documents(content))
        return
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            yield _parse(line, f"{path}:{number}")


def _documents(content: str, size: int = 4000) -> Iterator[str]:
    """Paragraphs joined until a document has about `size` characters."""
    document = ""
    for paragraph in content.split("\n\n"):
        document += paragraph + "\n\n"
        if len(document) >= size:
            yield document
            document = ""
    if document.strip():
        yield document


def _parse(line: str, where: str) -> Row:
    try:
        fields = json.loads(line)
        category = _typed(fields.get("category"), str, NoneType) or ""
        return replace(_row(fields), where=where, category=category)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"{where} is not a usable row ({error!r}); expected a JSON object with messages, q and a, "
            "prompt and completion, or text."
        ) from error


def _row(fields: dict[str, Any]) -> Row:
    greedy = _typed(fields.get("temp"), int, float, NoneType) == 0
    generated = _typed(fields.get("n"), int, NoneType)
    if "messages" in fields:
        turns = [(m["role"], m["content"]) for m in fields["messages"]]
    elif "q" in fields:
        turns = [("user", fields["q"]), ("assistant", fields["a"])]
    elif "prompt" in fields:
        return Row(prompt=_text(fields["prompt"]), text=_text(fields["completion"]), greedy=greedy)
    else:
        return Row(text=_text(fields["text"]))
    messages = tuple({"role": _text(role), "content": _text(content)} for role, content in turns)
    return Row(messages=messages, greedy=greedy, generated=generated)


def _text(value: Any) -> str:
    text: str = _typed(value, str)
    text.encode()  # ValueError for half a surrogate pair
    return text


def _typed(value: Any, *kinds: type) -> Any:
    if type(value) not in kinds:
        raise TypeError(f"{value!r} is not {' or '.join(kind.__name__ for kind in kinds)}")
    return value


def _encode_text(row: Row, tokenizer: Any) -> tuple[list[int], list[bool]]:
    prompt = tokenizer(row.prompt)["input_ids"] if row.prompt else []
    text = tokenizer(row.text, add_special_tokens=not prompt)["input_ids"]
    return prompt + text, [False] * len(prompt) + [True] * len(text)


def _encode_chat(row: Row, tokenizer: Any) -> tuple[list[int], list[bool]]:
    if not tokenizer.chat_template:
        raise DataError("This model has no chat template; give rows with prompt and completion, or with text.")
    chat = _render(tokenizer, row, row.messages)
    encoded = tokenizer(chat, add_special_tokens=False, return_offsets_mapping=True)
    tokens = encoded["input_ids"]
    counts = [False] * len(tokens)
    for begin, end in _answer_spans(row, chat, tokenizer):
        inside = [i for i, (start, stop) in enumerate(encoded["offset_mapping"]) if begin <= start < stop <= end]
        for i in _until_end(inside, tokens, tokenizer.eos_token_id, row.generated):
            counts[i] = True
    return tokens, counts


def _until_end(inside: list[int], tokens: Sequence[int], end_token: int, generated: int | None) -> Iterable[int]:
    """The answer's token indices up to its end token, which belongs to it unless the answer was cut off."""
    ends = [i for i, index in enumerate(inside) if tokens[index] == end_token]
    length = ends[0] + 1 if ends else len(inside)
    return inside[: length if generated is None else min(length, generated)]


def _answer_spans(row: Row, chat: str, tokenizer: Any) -> Iterator[tuple[int, int]]:
    """Character ranges of the assistant's turns in the rendered `chat`."""
    for i, message in enumerate(row.messages):
        if message["role"] == "assistant":
            before = _render(tokenizer, row, row.messages[:i], add_generation_prompt=True)
            after = _render(tokenizer, row, row.messages[: i + 1])
            if not chat.startswith(before) or not chat.startswith(after):
                raise DataError(
                    f"{row.where}: the model's chat template changes a turn once others follow, so the answers cannot "
                    "be told from the rest; give chats with one answer each, or rows with prompt and completion."
                )
            yield len(before), len(after)


def _render(tokenizer: Any, row: Row, messages: Sequence[dict[str, str]], **options: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
    except TemplateError as error:
        raise DataError(f"{row.where}: the model's chat template refuses this chat ({error}); leave it out.") from error
