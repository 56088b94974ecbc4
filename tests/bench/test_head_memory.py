"""The paper's order keeps one head's logits, whatever the number of heads; a graph of all heads keeps them all."""

from __future__ import annotations

import pytest
import torch

from models.train.multi_token import backward_by_head
from tests.bench.head_memory import backward_at_once, main, peak_bytes, step_peak

VOCAB, ROWS = 8192, 128
LOGITS = 4 * VOCAB * ROWS


def test_what_is_allocated_and_freed_is_seen() -> None:
    def work() -> None:
        kept = torch.zeros(1 << 18)
        for _ in range(3):
            torch.zeros(1 << 20)
        kept += 1

    assert peak_bytes(work) == 4 * (1 << 18) + 4 * (1 << 20)


def test_eight_heads_take_the_memory_of_one() -> None:
    one, eight = (step_peak(backward_by_head, heads, VOCAB, ROWS) for heads in (1, 8))
    assert one > 2 * LOGITS  # or it would not be logits that are compared
    assert eight < 1.05 * one


def test_in_one_graph_every_head_adds_its_logits() -> None:
    one, eight = (step_peak(backward_at_once, heads, VOCAB, ROWS) for heads in (1, 8))
    assert eight > one + 7 * LOGITS


def test_the_command_prints_both_orders(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--vocab", "8192", "--rows", "128", "--heads", "1", "8"])
    printed = capsys.readouterr().out
    assert "logits take 4 MiB" in printed
    assert "one head at a time" in printed
    assert [line.split("│")[1].strip() for line in printed.splitlines() if "│" in line] == ["1", "8"]
