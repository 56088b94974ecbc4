"""Text to tokens and back: the tokenizer of a model folder, and its chat template. Imports no torch.

Invariants:
- text is bytes: every token has fixed bytes (`token_bytes`), a text is their concatenation read as UTF-8 with U+FFFD
  for what is malformed, less the one leading space that some decoders strip. So text can be made token by token, and
  equals the tokenizers library's own `decode` wherever the bytes are well formed;
- a chat prompt is encoded without adding special tokens again: the template wrote them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import Environment, TemplateError, meta
from transformers.utils.chat_template_utils import render_jinja_template

from server.errors import InvalidRequestError, StartupError
from server.text.grammar import GrammarChecker
from server.text.tools import generic_messages, knows_tools

_OURS = {"messages", "tools", "conversations", "chat_template", "add_generation_prompt", "continue_final_message"}

_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)


class Tokenizer:
    """A model's tokenizer. `template` is its chat template, `special` the tokens that the template may name."""

    def __init__(
        self, backend: tokenizers.Tokenizer, *, template: str | None = None, special: dict[str, str] | None = None
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.template = template
        self._special = special or {}
        added = backend.get_added_tokens_decoder()
        self.added_tokens = frozenset(token.content for token in added.values())
        self._special_ids = frozenset(id for id, token in added.items() if token.special)
        self._decoder_types = frozenset(_decoder_types(json.loads(backend.to_str())["decoder"]))
        self._bytes: Callable[[int], bytes] = cache(self._token_bytes)

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and `chat_template.jinja`.

        Raises StartupError when `tokenizer.json` is missing or unreadable.
        """
        folder = Path(path)
        config = _read_json(folder / "tokenizer_config.json")
        special = _special_tokens(config | _read_json(folder / "special_tokens_map.json"))
        try:
            backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:
            raise StartupError(f"Cannot read the tokenizer {folder / 'tokenizer.json'}: {error}.") from error
        return cls(backend, template=_chat_template(folder, config), special=special)

    @cached_property
    def vocab_size(self) -> int:
        """Tokens with a text, added ones included. The model's own vocabulary may be padded beyond it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def grammar_checker(self) -> GrammarChecker:
        """Judges grammars over this tokenizer."""
        return GrammarChecker(sorted(self.added_tokens))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; with `add_special_tokens` what the model expects around it, such as `<s>`."""
        batch = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return batch[0].ids  # as a batch: only that lets other threads run

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Malformed UTF-8 becomes U+FFFD; ids outside the vocabulary are empty."""
        return b"".join(self.pieces(ids, skip_special_tokens=skip_special_tokens)).decode("utf-8", "replace")

    def pieces(self, ids: Iterable[int], *, skip_special_tokens: bool = True, first: bool = True) -> Iterable[bytes]:
        """Bytes of each visible token in turn. `first` says that no visible token came before."""
        for id in ids:
            if not (skip_special_tokens and id in self._special_ids):
                piece = self.token_bytes(id)
                yield self._without_first_space(id, piece) if first else piece
                first = False

    def token_bytes(self, id: int) -> bytes:
        """Bytes of one token within a text, at times a part of a character. Empty if there is no such id."""
        return self._bytes(id)

    def token_text(self, id: int) -> str:
        """`token_bytes` as text, its leading space included."""
        return self.token_bytes(id).decode("utf-8", "replace")

    @property
    def has_template(self) -> bool:
        """Whether the model is a chat model."""
        return self.template is not None

    def token_name(self, id: int) -> str:
        """The token as the vocabulary has it; empty if there is no such id."""
        return self._backend.id_to_token(id) or ""

    def chat_prompt(
        self, messages: list[dict[str, Any]], *, add_special_tokens: bool = False, **options: Any
    ) -> list[int]:
        """Token ids of a conversation; arguments and errors are those of `render`."""
        return self.encode(self.render(messages, **options), add_special_tokens=add_special_tokens)

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: dict[str, Any] | None = None,
        tools: list[dict[str, Any]] | None = None,
        template: str | None = None,
    ) -> str:
        """A conversation as text, special tokens included, by the model's chat template or the one given.

        What a template cannot say of tools is said in texts. Raises InvalidRequestError if there is no template, or if
        the template refuses these messages.
        """
        template = template or self.template
        if template is None:
            raise InvalidRequestError(
                "This model has no chat template: use /v1/completions, or put a chat_template.jinja into its folder."
            )
        if add_generation_prompt and continue_final_message:
            raise InvalidRequestError("Set either add_generation_prompt or continue_final_message, not both.")
        extra = template_kwargs or {}
        if taken := sorted(_OURS & extra.keys()):
            raise InvalidRequestError(f"chat_template_kwargs must not set {', '.join(taken)}.")
        if not knows_tools(template):
            messages, tools = generic_messages(messages, tools or []), None
        try:
            rendered, _ = render_jinja_template(
                [messages],
                chat_template=template,
                tools=tools or None,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **(self._special | extra),
            )
        except _TEMPLATE_ERRORS as error:
            message = f"The model's chat template refuses these messages: {error}"
            raise InvalidRequestError(message, param="messages") from error
        return str(rendered[0])

    def template_variables(self, template: str | None = None) -> frozenset[str]:
        """Names that the model's chat template, or the one given, expects to be told. Empty if it cannot be read."""
        return _variables(template or self.template or "")

    def _token_bytes(self, id: int) -> bytes:
        token = self._backend.id_to_token(id)
        if token is None:
            return b""
        if "ByteLevel" in self._decoder_types:
            return _byte_level(token)
        if "ByteFallback" in self._decoder_types and (byte := _fallback_byte(token)) is not None:
            return byte
        return self._raw_text(self._anchor, id).removeprefix(self._raw_text(self._anchor)).encode()

    def _raw_text(self, *ids: int) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def _anchor(self) -> int:
        """A plain token to decode others after, so that they show their leading space."""
        vocab = sorted(self._backend.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
        return next((id for token, id in vocab if token.isascii() and token.isalnum()), 0)

    def _without_first_space(self, id: int, piece: bytes) -> bytes:
        """Decoders of the sentencepiece family strip one space at the start of a text."""
        strips = piece.startswith(b" ") and self._raw_text(id) != piece.decode("utf-8", "replace")
        return piece[1:] if strips else piece


@lru_cache(maxsize=64)
def _variables(template: str) -> frozenset[str]:
    """Undeclared names of a template. `generation` blocks, which transformers adds to Jinja, are plain text here."""
    source = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    try:
        return frozenset(
            meta.find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source))
        )
    except (TemplateError, RecursionError):
        return frozenset()


def _decoder_types(decoder: dict[str, Any] | None) -> Iterable[str]:
    if decoder is not None:
        yield decoder["type"]
        for part in decoder.get("decoders", ()):
            yield from _decoder_types(part)


@cache
def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _byte_level(token: str) -> bytes:
    alphabet = _byte_of_char()
    if all(char in alphabet for char in token):
        return bytes(alphabet[char] for char in token)
    return token.encode()


def _fallback_byte(token: str) -> bytes | None:
    match = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    return bytes.fromhex(match[1]) if match else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise StartupError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise StartupError(f"{path} must hold a JSON object.")
    return content


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token` and the like; the files hold them as text or as an object with `content`."""
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    texts = {key: value["content"] if isinstance(value, dict) else value for key, value in named.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The file wins over the configuration; of several named templates the one called `default`."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template
