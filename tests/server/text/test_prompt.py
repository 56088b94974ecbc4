"""Tokens, bytes and chat prompts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import byte_fallback, byte_level

from server.errors import InvalidRequestError, StartupError
from server.text.prompt import Tokenizer

CHAT = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('Robots are unknown here') }}{% endif %}"
    "{{ bos_token }}{{ m.role }}:{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
BYTES = byte_level(CHAT, {"bos_token": "<|end|>"})
FALLBACK = byte_fallback()
HELLO = [{"role": "user", "content": "he"}]


@given(st.lists(st.integers(0, 300)), st.booleans())
def test_byte_level_decode_is_the_librarys(ids: list[int], skip: bool) -> None:
    assert BYTES.decode(ids, skip_special_tokens=skip) == BYTES._backend.decode(ids, skip_special_tokens=skip)


@given(st.text())
def test_byte_fallback_decode_is_the_librarys(text: str) -> None:
    ids = FALLBACK.encode(text)
    assert FALLBACK.decode(ids) == FALLBACK._backend.decode(ids) == text


def test_special_tokens_are_shown_or_skipped() -> None:
    ids = FALLBACK.encode("a b")
    assert FALLBACK.token_text(ids[0]) == "<s>"
    assert FALLBACK.decode(ids) == "a b"
    assert FALLBACK.decode(ids, skip_special_tokens=False) == FALLBACK._backend.decode(ids, skip_special_tokens=False)
    assert FALLBACK.encode("a b", add_special_tokens=False) == ids[1:]


def test_token_bytes_are_the_true_bytes() -> None:
    euro = [FALLBACK.token_bytes(id) for id in FALLBACK.encode("€", add_special_tokens=False)]
    assert euro == [b" ", b"\xe2", b"\x82", b"\xac"]
    assert [BYTES.token_bytes(id) for id in BYTES.encode(" the日本é")] == [b" t", b"he", "日本".encode(), b"\xc3\xa9"]
    assert BYTES.token_text(BYTES.encode("€")[0]) == "\ufffd"
    assert BYTES.token_bytes(10**6) == b""


def test_only_one_leading_space_is_stripped_from_a_text() -> None:
    ids = [FALLBACK._backend.token_to_id(token) for token in ("▁▁", "▁a")]
    assert FALLBACK.decode(ids) == FALLBACK._backend.decode(ids) == "  a"


def test_vocab_size_counts_added_tokens() -> None:
    assert BYTES.vocab_size == 256 + 3 + 2


def test_chat_prompt_renders_the_template_and_adds_no_special_tokens() -> None:
    assert BYTES.decode(BYTES.chat_prompt(HELLO), skip_special_tokens=False) == "<|end|>user:he<|end|>assistant:"
    open_end = BYTES.chat_prompt(HELLO, add_generation_prompt=False, continue_final_message=True)
    assert BYTES.decode(open_end, skip_special_tokens=False) == "<|end|>user:he"
    kwargs = {"bos_token": ">"}
    assert BYTES.decode(BYTES.chat_prompt(HELLO, template_kwargs=kwargs)).startswith(">user")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"messages": [{"role": "robot", "content": ""}]}, "Robots are unknown here"),
        ({"messages": HELLO, "continue_final_message": True}, "not both"),
        ({"messages": HELLO, "template_kwargs": {"chat_template": "x"}}, "must not set chat_template"),
    ],
)
def test_what_a_template_refuses_is_the_clients_error(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(InvalidRequestError, match=sentence):
        BYTES.chat_prompt(**arguments)  # type: ignore[arg-type]


def test_without_a_template_the_error_says_what_to_do() -> None:
    with pytest.raises(InvalidRequestError, match=r"/v1/completions"):
        FALLBACK.chat_prompt(HELLO)


@pytest.mark.parametrize("named", [True, False])
def test_from_folder_reads_templates_and_special_tokens(tmp_path: Path, named: bool) -> None:
    BYTES._backend.save(str(tmp_path / "tokenizer.json"))
    template = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHAT}] if named else CHAT
    config = {"chat_template": template, "bos_token": {"content": "<|end|>"}, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_folder(tmp_path).chat_prompt(HELLO) == BYTES.chat_prompt(HELLO)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert Tokenizer.from_folder(tmp_path).decode(Tokenizer.from_folder(tmp_path).chat_prompt(HELLO)) == "he"


def test_padding_and_truncation_of_the_file_are_switched_off(tmp_path: Path) -> None:
    backend = byte_level()._backend
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.from_folder(tmp_path).encode("abcd")) == 4


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(StartupError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.from_folder(tmp_path)


def test_the_api_process_imports_no_torch() -> None:
    code = "import sys, server.app, server.engine.client, server.text.prompt; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
