"""The GPU benchmark: a dry run wherever there is no GPU, and its arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench import gpu


def test_a_dry_run_measures_every_row_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    gpu.main(["--shape", "tiny", "--rows", "3,8", "--context", "5", "--rounds", "2", "--json", str(path)])
    speeds = json.loads(path.read_text())["speeds"]["tiny"]
    assert [each["rows"] for each in speeds] == [1, 3, 8]
    assert speeds[0]["to_one_row"] == 1
    assert all(each["floor_seconds"] > 0 for each in speeds)
    assert "floor / step" in capsys.readouterr().out


def test_ratios_are_taken_within_a_round() -> None:
    found = gpu.speed(4, seconds=[2.0, 30.0, 4.0], of_one_row=[1.0, 10.0, 4.0], floors=[1.0, 3.0, 1.0])
    assert (found.seconds, found.to_one_row, found.floor_seconds, found.share_of_floor) == (4.0, 2.0, 1.0, 0.25)


@pytest.mark.parametrize(("name", "parameters"), [("SmolLM2-135M", 134_515_008), ("Llama-3.1-8B", 8_030_261_248)])
def test_shapes_are_those_of_the_models(name: str, parameters: int) -> None:
    shape = gpu.SHAPES[name]
    dim = shape.hidden // shape.heads
    attention = 2 * shape.hidden * dim * (shape.heads + shape.kv_heads)
    layer = attention + 3 * shape.hidden * shape.inner + 2 * shape.hidden
    tables = shape.vocab * shape.hidden * (1 if shape.is_tied else 2)
    assert shape.layers * layer + tables + shape.hidden == parameters
