"""Every accepted form of text, what counts in it, and the split."""

import json
from pathlib import Path
from typing import Any

import pytest

from models.train.data import DataError, Example, encode_rows, is_held_out, read_rows


@pytest.fixture
def load(tmp_path: Path, tiny_tokenizer: Any) -> Any:
    def load(*rows: object, name: str = "rows.jsonl", **options: Any) -> list[Example]:
        text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
        (tmp_path / name).write_text(text)
        return encode_rows(read_rows([tmp_path / name]), tiny_tokenizer, **{"validation_fraction": 0.0} | options)

    return load


def counted(example: Example, tokenizer: Any) -> str:
    return str(tokenizer.decode([t for t, counts in zip(example.tokens, example.counts, strict=True) if counts]))


def test_question_and_answer_count_the_answer_and_its_end(load: Any, tiny_tokenizer: Any) -> None:
    (example,) = load({"q": "w1 w2", "a": "w3 w4", "temp": 0})
    assert tiny_tokenizer.decode(example.tokens) == "<user> w1 w2 </s> <assistant> w3 w4 </s>"
    assert counted(example, tiny_tokenizer) == "w3 w4 </s>"
    assert example.greedy


@pytest.mark.parametrize(("generated", "expected"), [(2, "w3 w4"), (3, "w3 w4 </s>"), (1, "w3")])
def test_an_answer_that_was_cut_off_has_no_end(load: Any, tiny_tokenizer: Any, generated: int, expected: str) -> None:
    (example,) = load({"q": "w1", "a": "w3 w4", "n": generated, "temp": 0.7})
    assert counted(example, tiny_tokenizer) == expected
    assert not example.greedy


def test_chats_count_every_assistant_turn(load: Any, tiny_tokenizer: Any) -> None:
    turns = [("system", "w0"), ("user", "w1"), ("assistant", "w2"), ("user", "w3"), ("assistant", "w4 w5")]
    (example,) = load({"messages": [{"role": role, "content": content} for role, content in turns]})
    assert counted(example, tiny_tokenizer) == "w2 </s> w4 w5 </s>"


def test_prompt_and_completion_count_the_completion(load: Any, tiny_tokenizer: Any) -> None:
    (example,) = load({"prompt": "w1 w2", "completion": "w3"})
    assert tiny_tokenizer.decode(example.tokens) == "w1 w2 w3"
    assert counted(example, tiny_tokenizer) == "w3"


def test_text_counts_whole(load: Any, tiny_tokenizer: Any) -> None:
    (example,) = load({"text": "w1 w2 w3"})
    assert counted(example, tiny_tokenizer) == "w1 w2 w3"


def test_plain_files_are_cut_into_documents(load: Any) -> None:
    paragraph = "w1 " * 1000
    examples = load("\n\n".join([paragraph] * 5), name="book.txt")
    assert sum(len(example.tokens) for example in examples) == 5000
    assert all(len(example.tokens) <= 1024 for example in examples)
    assert len(examples) > 3


def test_long_rows_are_split(load: Any) -> None:
    examples = load({"text": "w1 " * 25}, max_length=10)
    assert [len(example.tokens) for example in examples] == [10, 10, 5]


def test_the_split_is_a_function_of_the_prompt(load: Any) -> None:
    rows = [{"q": f"w{i} w{j}", "a": f"w{j}"} for i in range(20) for j in range(20)]
    again = [{"q": row["q"], "a": "w5 w6", "temp": 0} for row in reversed(rows)]
    first = [example.held_out for example in load(*rows, validation_fraction=0.25)]
    second = [example.held_out for example in load(*again, validation_fraction=0.25)]
    assert first == second[::-1]
    assert 60 < sum(first) < 140


def test_a_larger_fraction_only_adds() -> None:
    keys = [str(i) for i in range(500)]
    small = {key for key in keys if is_held_out(key, 0.1)}
    large = {key for key in keys if is_held_out(key, 0.4)}
    assert small < large
    assert not any(is_held_out(key, 0.0) for key in keys)
    assert all(is_held_out(key, 1.0) for key in keys)


@pytest.mark.parametrize(
    "row",
    [
        *("{", "[]", '"text"', '{"other": 1}', '{"text": null}', '{"messages": [{}]}', '{"q": 1, "a": 2}'),
        *('{"q": "w1", "a": "w2", "n": "12"}', '{"q": "w1", "a": "w2", "n": 1.5}', '{"q": "w1", "a": "w2", "n": true}'),
        *('{"q": "w1", "a": "w2", "temp": "0"}', '{"text": "\\ud800"}'),
    ],
)
def test_unusable_rows_are_named(load: Any, row: str) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:2 is not a usable row"):
        load({"text": "w1 w2"}, row)


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\u0085"])
def test_only_newlines_end_a_row(load: Any, end: str) -> None:
    examples = load(json.dumps({"text": f"w1{end}w2"}, ensure_ascii=False), {"text": "w3"})
    assert [len(example.tokens) for example in examples] == [2, 1]


def test_missing_and_empty_files(load: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Cannot read"):
        read_rows([tmp_path / "absent.jsonl"])
    with pytest.raises(DataError, match="No text to learn from"):
        load("")


def test_chats_need_a_template(load: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
    with pytest.raises(DataError, match="no chat template"):
        load({"q": "w1", "a": "w2"})


def test_a_chat_that_the_template_refuses_is_named(
    load: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    monkeypatch.setattr(tiny_tokenizer, "chat_template", refusing + tiny_tokenizer.chat_template)
    turns = [("system", "w0"), ("user", "w1"), ("assistant", "w2")]
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .* refuses this chat \(no system turn\)"):
        load({"q": "w1", "a": "w2"}, {"messages": [{"role": role, "content": content} for role, content in turns]})


def test_a_template_that_changes_earlier_turns_takes_single_answers_only(
    load: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    thinking = (
        "{% for m in messages %}{{ '<' + m.role + '> ' }}"
        "{% if m.role == 'assistant' and loop.last %}{{ 'w9 ' }}{% endif %}{{ m.content + ' </s> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
    )
    monkeypatch.setattr(tiny_tokenizer, "chat_template", thinking)
    turns = [{"role": role, "content": "w1"} for role in ("user", "assistant")]
    (example,) = load({"messages": turns})
    assert counted(example, tiny_tokenizer) == "w9 w1 </s>"
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .* changes a turn once others follow"):
        load({"messages": turns * 2})
