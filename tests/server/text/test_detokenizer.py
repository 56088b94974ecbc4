"""Text streamed is text returned."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import byte_fallback, byte_level

from server.text.detokenizer import Detokenizer
from server.text.prompt import Tokenizer

BYTES = byte_level()
FALLBACK = byte_fallback()
STOPS = st.lists(st.text("ab €é\n", min_size=1, max_size=4), max_size=3)


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The oracle: the shortest beginning of `text` that ends with a stop string, without its longest one."""
    for end in range(len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def check_streaming(tokenizer: Tokenizer, ids: list[int], stops: list[str], cuts: list[int]) -> None:
    detokenizer = Detokenizer(tokenizer, stop=stops)
    edges = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    pushes = [detokenizer.push(ids[start:end]) for start, end in itertools.pairwise(edges)]
    streamed = "".join(pushes) + detokenizer.finish()
    assert (streamed, detokenizer.stopped) == cut(tokenizer.decode(ids), stops)
    if detokenizer.stopped is None:
        assert detokenizer.num_tokens == len(ids)
    else:
        assert detokenizer.stopped in tokenizer.decode(ids[: detokenizer.num_tokens])


@given(st.lists(st.integers(0, 265)), STOPS, st.lists(st.integers(0, 99)))
def test_any_byte_level_tokens_stream_as_they_decode(ids: list[int], stops: list[str], cuts: list[int]) -> None:
    check_streaming(BYTES, ids, stops, cuts)


@given(st.lists(st.integers(0, 266)), STOPS, st.lists(st.integers(0, 99)))
def test_any_fallback_tokens_stream_as_they_decode(ids: list[int], stops: list[str], cuts: list[int]) -> None:
    check_streaming(FALLBACK, ids, stops, cuts)


@given(st.text("ab €é\n日"), STOPS, st.lists(st.integers(0, 99)))
def test_text_with_stop_strings_streams_as_it_decodes(text: str, stops: list[str], cuts: list[int]) -> None:
    for tokenizer in (BYTES, FALLBACK):
        check_streaming(tokenizer, tokenizer.encode(text), stops, cuts)


@pytest.fixture(scope="module")
def smollm() -> Tokenizer:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medusa-serve"
    folder = next((file.parent for file in cache.glob("*/tokenizer.json")), None)
    if folder is None:
        pytest.skip("the default model is not converted on this machine")
    return Tokenizer.from_folder(folder)


@pytest.mark.model
@given(ids=st.lists(st.integers(0, 49200)), text=st.text(), stops=STOPS, cuts=st.lists(st.integers(0, 99)))
def test_the_default_models_tokens_stream_as_they_decode(
    smollm: Tokenizer, ids: list[int], text: str, stops: list[str], cuts: list[int]
) -> None:
    ids = ids + smollm.encode(text)
    assert smollm.decode(ids) == smollm._backend.decode(ids)
    check_streaming(smollm, ids, stops, cuts)


def test_a_character_is_sent_when_it_is_whole() -> None:
    euro = BYTES.encode("€")
    detokenizer = Detokenizer(BYTES)
    assert [detokenizer.push([id]) for id in euro] == ["", "", "€"]
    assert detokenizer.push(euro[:2]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_the_beginning_of_a_stop_string_is_held_back() -> None:
    detokenizer = Detokenizer(BYTES, stop=["\nQ:", "abc"])
    assert detokenizer.push(BYTES.encode("x\nQ")) == "x"
    assert detokenizer.push(BYTES.encode("ab")) == "\nQ"
    assert detokenizer.push(BYTES.encode("cdef")) == ""
    assert (detokenizer.stopped, detokenizer.num_tokens) == ("abc", 6)
    assert detokenizer.finish() == ""


def test_what_was_held_back_comes_at_the_end() -> None:
    detokenizer = Detokenizer(BYTES, stop=["abc"])
    assert detokenizer.push(BYTES.encode("xab")) == "x"
    assert detokenizer.finish() == "ab"
    assert detokenizer.stopped is None


def test_the_stop_string_can_be_included() -> None:
    detokenizer = Detokenizer(BYTES, stop=["b"], include_stop=True)
    assert detokenizer.push(BYTES.encode("abc")) + detokenizer.finish() == "ab"


def test_special_tokens_are_skipped_on_request_only() -> None:
    ids = BYTES.encode("a<|end|>b")
    assert Detokenizer(BYTES).push(ids) == "ab"
    assert Detokenizer(BYTES, skip_special_tokens=False).push(ids) == "a<|end|>b"


def test_no_stop_string_begins_before_min_tokens() -> None:
    ids = BYTES.encode("a.b.c.d")
    detokenizer = Detokenizer(BYTES, stop=["."], min_tokens=3)
    assert detokenizer.push(ids) == "a.b"
    assert detokenizer.num_tokens == 4
    across = Detokenizer(BYTES, stop=["b."], min_tokens=3)  # its first character belongs to the first three tokens
    assert across.push(ids) + across.finish() == "a.b.c.d"
