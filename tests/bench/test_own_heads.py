"""A small model trained in a moment, served with its own heads, and how its passes are counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.train import pretrain
from tests.bench.own_heads import Answer, main


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So regular that heads guess it soon."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"{number:03d} " + "abcd" * 80)
    return folder


def test_a_pass_brings_one_token_that_no_head_guessed() -> None:
    assert Answer("abcd", 12, 8).num_forwards == 4


def test_a_byte_model_of_eight_heads_answers_several_bytes_a_pass(
    text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--num-heads", "8", "--layers", "9", "--hidden-size", "32", "--context", "96", "--batch-size", "8"]
    run = ["--data", str(text), "--output", str(tmp_path / "model"), "--device", "cpu", "--validation-fraction", "0.2"]
    assert pretrain.main([*run, *sizes, "--steps", "150", "--lr", "0.01"]) == 0
    capfd.readouterr()
    asked = ["--prompts", "4", "--prompt-tokens", "32", "--max-tokens", "40", "--nodes", "1,7", "--temperature", "0"]
    main([str(tmp_path / "model"), "--data", str(text), "--validation-fraction", "0.2", *asked])
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capfd.readouterr().out.splitlines()]
    one, seven = (float(row[4]) for row in rows if row and row[2] == "160")
    assert 1.5 < one <= 2.0  # one guess a pass is one accepted token at most
    assert 4.0 < seven <= 8.0


def test_a_folder_that_is_no_model_is_said(text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="bench: medusa-serve exited with code 2"):
        main([str(tmp_path), "--data", str(text), "--validation-fraction", "0.2"])
    assert "has no config.json" in capfd.readouterr().err
