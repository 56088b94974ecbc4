"""The command on a tiny random model: rows that training reads, resumed runs, questions of one's own, base models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from models.train.data import read_rows
from models.train.novelty import ends_in_loop
from server import distill

FLAGS = ["--max-tokens", "40", "--max-num-seqs", "8", "--temperatures", "0", "0.9"]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(model: Path, output: Path, tokens: int, *flags: str) -> list[dict[str, Any]]:
    assert distill.main([str(model), "--output", str(output), "--tokens", str(tokens), *FLAGS, *flags]) == 0
    return rows_of(output)


def test_a_chat_model_asks_and_answers(tiny_model: Path, tmp_path: Path) -> None:
    rows = write(tiny_model, tmp_path / "a.jsonl", 600)
    assert sum(row["n"] for row in rows) >= 600
    assert {row["temp"] for row in rows} == {0, 0.9}
    assert len({row["number"] for row in rows}) == len(rows)
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert row["messages"][1]["content"]
        assert 0 < row["n"] <= 40
        assert not ends_in_loop(row["messages"][1]["content"].split())
    assert all(
        row.greedy == (raw["temp"] == 0) for row, raw in zip(read_rows([tmp_path / "a.jsonl"]), rows, strict=True)
    )
    questions = [row["messages"][0]["content"] for row in rows]
    assert len(set(questions)) == len(questions)


def test_a_text_depends_on_its_number_and_the_seed_alone(tiny_model: Path, tmp_path: Path) -> None:
    alone = {row["number"]: row for row in write(tiny_model, tmp_path / "a.jsonl", 300, "--max-num-seqs", "1")}
    crowd = {row["number"]: row for row in write(tiny_model, tmp_path / "b.jsonl", 300)}
    common = alone.keys() & crowd.keys()
    assert common
    assert all(alone[number] == crowd[number] for number in common)
    other = {row["number"]: row for row in write(tiny_model, tmp_path / "c.jsonl", 300, "--seed", "1")}
    assert any(other[number] != crowd[number] for number in other.keys() & crowd.keys())


def test_resume_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.jsonl"
    first = write(tiny_model, output, 200)
    both = write(tiny_model, output, 500, "--resume")
    assert both[: len(first)] == first
    assert sum(row["n"] for row in both) >= 500
    assert min(row["number"] for row in both[len(first) :]) > max(row["number"] for row in first)


def test_without_resume_nothing_is_overwritten(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.jsonl"
    output.write_text("precious")
    assert distill.main([str(tiny_model), "--output", str(output), "--tokens", "5"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert output.read_text() == "precious"


def test_a_foreign_file_is_refused(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "a.jsonl"
    output.write_text('{"text": "not ours"}\n')
    assert distill.main([str(tiny_model), "--output", str(output), "--tokens", "5", "--resume"]) == 2
    assert "not ours" in capsys.readouterr().err


def test_own_questions_are_asked_at_every_temperature_and_then_it_ends(tiny_model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    chats = [{"q": "w1 w2", "a": "w3"}, {"messages": [{"role": "user", "content": "w4"}]}]
    prompts.write_text("\n".join(map(json.dumps, chats)))
    rows = write(tiny_model, tmp_path / "a.jsonl", 10**6, "--prompts", str(prompts))
    asked = {(row["messages"][0]["content"], row["temp"]) for row in rows}
    assert asked <= {(question, temp) for question in ("w1 w2", "w4") for temp in (0, 0.9)}
    assert {question for question, _ in asked} == {"w1 w2", "w4"}


def test_a_base_model_goes_on_with_texts_it_began(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "base")
    for file in (folder / "chat_template.jinja", folder / "tokenizer_config.json"):
        file.unlink(missing_ok=True)
    rows = write(folder, tmp_path / "a.jsonl", 200)
    assert all(row.keys() == {"prompt", "completion", "temp", "n", "number"} for row in rows)
    assert all(1 <= len(row["prompt"].split()) <= distill.OPENING_TOKENS for row in rows)
    assert [row.prompt for row in read_rows([tmp_path / "a.jsonl"])] == [row["prompt"] for row in rows]
