"""The GPU benchmark: a dry run wherever there is no GPU, and its arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench import beside, gpu
from tests.bench.goodput import Knowing, goodput
from tests.server.engine.tiny import tiny_engine, tiny_llama


def test_a_dry_run_measures_every_row_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    plot = tmp_path / "gpu.svg"
    small = ["--part", "steps", "--shape", "tiny", "--rows", "3,8", "--context", "5", "--rounds", "2"]
    gpu.main([*small, "--json", str(path), "--plot", str(plot)])
    speeds = json.loads(path.read_text())["speeds"]["tiny"]
    assert "tiny" in plot.read_text()
    assert [each["rows"] for each in speeds] == [1, 3, 8]
    assert speeds[0]["to_one_row"] == 1
    assert all(each["floor_seconds"] > 0 for each in speeds)
    assert "floor / step" in capsys.readouterr().out


def test_guesses_of_a_drafter_that_knows_are_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    small = ["--part", "goodput", "--shape", "tiny", "--batches", "1,3", "--context", "5", "--rounds", "1"]
    gpu.main([*small, "--json", str(path)])
    found = json.loads(path.read_text())["goodput"]
    assert [each["batch"] for each in found] == [1, 3]
    assert all(each["plain"] > 0 and each["ratio"] > 0 for each in found)
    assert "guesses / plain" in capsys.readouterr().out


def test_transformers_stands_beside(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    small = ["--part", "beside", "--model", str(tiny_model), "--streams", "1,3", "--tokens", "6", "--rounds", "1"]
    gpu.main([*small, "--json", str(path)])
    found = json.loads(path.read_text())["beside"]
    sides = [(1, beside.OURS), (1, beside.STATIC), (3, beside.OURS), (3, beside.CONTINUOUS)]
    assert [(each["streams"], each["side"]) for each in found] == sides
    assert [each["over_theirs"] for each in found][1::2] == [1, 1]
    assert "over transformers" in capsys.readouterr().out


@pytest.mark.parametrize(("accuracy", "least", "most"), [(1.0, 4.7, 5.0), (0.0, 1.0, 1.0), (0.7, 1.8, 3.4)])
def test_as_much_is_accepted_as_the_drafter_knows(accuracy: float, least: float, most: float) -> None:
    engine = tiny_engine(tiny_llama(97), num_nodes=8)
    drafter = Knowing(97, accuracy, 4)
    found = goodput(engine, engine.runner, drafter, 2, 5, 1)
    assert least <= found.tokens_per_step <= most


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
