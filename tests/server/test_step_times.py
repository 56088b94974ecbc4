"""Step times of a tiny model, and the whole command with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models.backbone import Backbone
from models.checkpoint import save_heads
from models.drafters.resblock import ResBlockHeads
from models.errors import UsageError
from models.train.step_times import Trial
from server.__main__ import main
from server.step_times import measure_steps


@pytest.fixture
def some_heads(tiny_model: Path, tmp_path: Path) -> list[Path]:
    backbone = Backbone.load(tiny_model, dtype=torch.float32, device=torch.device("cpu"))
    folders = []
    for count in (1, 3):
        heads = ResBlockHeads(backbone.lm_head_weight, num_heads=count, accuracies=((0.5, 0.2, 0.1),) * count)
        folders.append(tmp_path / f"{count} heads")
        save_heads(folders[-1], heads, base_model="tiny", vocab_size=64, card="")
    return folders


def test_every_size_of_every_design_is_timed(tiny_model: Path, some_heads: list[Path]) -> None:
    trial = Trial(tiny_model, some_heads, "cpu", [[5, 6, 7], [8]], [1, 3], [0, 2, 8])
    one, three = measure_steps(trial)
    for times in (one, three):
        assert set(times) == {(requests, nodes) for requests in (1, 3) for nodes in (0, 2, 8)}
        for (_, nodes), time in times.items():
            assert time.run > 0
            assert time.rest > 0
            assert (time.draft > 0) == (nodes > 0)
        assert times[3, 8].run >= times[1, 8].run >= times[1, 0].run
    assert all(one[size].run == three[size].run for size in one)


def test_heads_that_do_not_fit_are_a_sentence(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is nothing at"):
        measure_steps(Trial(tiny_model, [tmp_path / "none"], "cpu", [[5]], [1], [0, 1]))


def test_the_command_names_what_is_fastest_here(tiny_model: Path, some_heads: list[Path], tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"q": f"w{i}", "a": "w1 w2 w3 w4 w5", "temp": 0, "category": "abc"[i % 3]} for i in range(30)]
    data.write_text("\n".join(map(json.dumps, rows)))
    words = ["evaluate", "heads", str(tiny_model), "--heads", *map(str, some_heads), "--data", str(data)]
    words += ["--device", "cpu", "--validation-fraction", "0.5", "--report", str(tmp_path / "report")]
    assert main(words) == 0
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    for design in found["designs"]:
        assert set(design["categories"]) == {"a", "b", "c"}
    speeds = [speed for design in found["designs"] for speed in design["speeds"]]
    for choice in found["fastest"]:
        rates = [speed["tokens_per_second"] for speed in speeds if speed["requests"] == choice["requests"]]
        assert choice["tokens_per_second"] == max(rates)
