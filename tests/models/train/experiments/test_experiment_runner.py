"""Whole experiments at the tiny scale: what is written, and that nothing is done twice."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.errors import UsageError
from models.train.experiments import command
from models.train.experiments.bytes import Bytes
from models.train.experiments.cell import Cell, Scale, Shape
from models.train.experiments.command import EXPERIMENTS
from models.train.experiments.experiment import next_tokens
from models.train.experiments.runner import cells, run_cells
from models.train.experiments.scales import SCALES
from models.train.multi_token import Pretrainer
from models.train.pretrain import new_model
from tests.small_models import small_mtp


def run(name: str, output: Path, *more: str) -> int:
    return command.main([name, "--scale", "tiny", "--output", str(output), "--device", "cpu", *more])


@pytest.mark.parametrize("name", ["induction", "polynomial"])
def test_a_table_a_plot_and_numbers(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(name, tmp_path, "--steps", "3") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"tiny-n2-seed1, step 3: {EXPERIMENTS[name].looked_at}: " in told
    text = (tmp_path / "README.md").read_text()
    assert f"medusa-serve train experiment {name} --scale tiny --output DIR --steps 3" in text
    assert "3 steps of 4 x 64 tokens" in text
    assert text.count("| tiny | ") >= 2
    assert " ± " in text
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["tiny-n1-seed0", "tiny-n2-seed0", "tiny-n1-seed1", "tiny-n2-seed1"]
    assert [step for step, _ in results["tiny-n2-seed1"]["curve"]] == [1, 2, 3]
    lines = list(ElementTree.parse(tmp_path / "plot.svg").iter("{http://www.w3.org/2000/svg}polyline"))
    assert len(lines) == 2
    assert not list((tmp_path / "cells").glob("*.pt"))


def test_models_of_bytes_are_kept_as_the_server_loads_them(tmp_path: Path) -> None:
    assert run("bytes", tmp_path, "--seeds", "1") == 0
    folder = tmp_path / "models" / "tiny-n4-seed0"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.num_future_tokens == 4
    assert len(model.config.head_accuracies) == 3
    assert AutoTokenizer.from_pretrained(folder)("def f")["input_ids"] == list(b"def f")
    results = json.loads((tmp_path / "results.json").read_text())
    one, four = results["tiny-n1-seed0"], results["tiny-n4-seed0"]
    assert one["bytes_per_pass"] == one["bytes_per_pass_of_given_text"] == 1
    assert 1 <= four["bytes_per_pass"] <= 4
    assert 1 <= four["bytes_per_pass_of_given_text"] <= 4
    assert one["parameters"] == four["parameters"]
    assert min(four["speedup_alone"], four["speedup_batch"]) > 0
    assert "| tiny | 4 | 1 | " in (tmp_path / "README.md").read_text()


def test_finished_cells_are_not_run_again_and_seeds_can_be_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("polynomial", tmp_path, "--seeds", "1") == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    steps, advance = [], Pretrainer.advance

    def counted(self: Pretrainer) -> Tensor:
        steps.append(self.step)
        return advance(self)

    monkeypatch.setattr(Pretrainer, "advance", counted)
    assert run("polynomial", tmp_path, "--seeds", "1") == 0
    assert steps == []
    assert run("polynomial", tmp_path, "--seeds", "2") == 0
    assert steps == [*range(8), *range(8)]
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert after.items() >= before.items()
    assert len(after) == 4


def test_a_stopped_cell_goes_on_to_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("induction", tmp_path / "whole", "--seeds", "1") == 0
    steps, advance = iter(range(100)), Pretrainer.advance

    def interrupted(self: Pretrainer) -> Tensor:
        if next(steps) == 11:  # in the second of two cells
            os.kill(os.getpid(), signal.SIGINT)
        return advance(self)

    monkeypatch.setattr(Pretrainer, "advance", interrupted)
    assert run("induction", tmp_path / "again", "--seeds", "1") == 130
    assert list(json.loads((tmp_path / "again" / "results.json").read_text())) == ["tiny-n1-seed0"]
    assert run("induction", tmp_path / "again", "--seeds", "1") == 0
    assert next(steps) == 16
    for name in ("results.json", "README.md", "plot.svg"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_another_run_in_the_same_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("polynomial", tmp_path, "--seeds", "1", "--steps", "2") == 0
    assert run("polynomial", tmp_path, "--seeds", "1", "--steps", "3") == 2
    assert run("induction", tmp_path, "--seeds", "1", "--steps", "2") == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line.partition(str(tmp_path))[2] for line in errors] == [
        " holds an experiment with other settings or data; give another --output."
    ] * 2


def test_some_models_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("induction", tmp_path, "--models", "tiny", "--seeds", "1", "--steps", "1") == 0
    assert "--output DIR --models tiny --seeds 1 --steps 1\n" in (tmp_path / "README.md").read_text()
    options = command._parser().parse_args(["induction", "--output", "x", "--scale", "small", "--models", "3M"])
    assert list(command._scale(options).shapes) == ["3M"]
    capsys.readouterr()
    assert run("induction", tmp_path, "--models", "tiny", "9M") == 2
    assert capsys.readouterr().err == "error: --models 9M: at --scale tiny, induction has tiny.\n"


def test_a_broken_state_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "cells" / "tiny-n1-seed0.pt"
    state.parent.mkdir()
    state.write_bytes(b"no state")
    assert run("polynomial", tmp_path) == 2
    assert capsys.readouterr().err == f"error: {state} is no saved state of this run that can be read; delete it.\n"
    state.unlink()
    assert run("polynomial", tmp_path, "--seeds", "1") == 0


def test_other_data_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale = replace(SCALES["tiny"]["bytes"], seeds=1, steps=1, heads=(1,))
    run_cells(Bytes(scale), tmp_path, "cpu", "", Console(quiet=True))
    monkeypatch.setattr(Bytes, "data", "another Python's library")
    with pytest.raises(UsageError, match="other settings or data"):
        run_cells(Bytes(scale), tmp_path, "cpu", "", Console(quiet=True))


def test_every_model_comes_once_before_any_comes_again() -> None:
    shapes = {"a": Shape(32, 2, 2), "b": Shape(64, 2, 2)}
    scale = Scale(shapes, (1, 2), 2, 8, 4, 64, 1e-2, {"names": 64, "stories": 1})
    order = list(cells(EXPERIMENTS["induction"](scale)))
    assert order[:4] == [Cell("a", 1, 0), Cell("a", 2, 0), Cell("b", 1, 0), Cell("b", 2, 0)]
    assert [cell.seed for cell in order] == [0] * 4 + [1] * 4


@pytest.mark.parametrize("scale", ["small", "cpu", "gpu"])
@pytest.mark.parametrize("name", ["induction", "polynomial", "bytes"])
def test_models_of_one_shape_have_equal_sizes_that_their_names_tell(name: str, scale: str) -> None:
    sizes = SCALES[scale][name]
    experiment = EXPERIMENTS[name](replace(sizes, batch_size=2))
    for label in sizes.shapes:
        with torch.device("meta"):
            models = [new_model(experiment.config(Cell(label, count, 0)), 0, "meta") for count in sizes.heads]
        (count,) = {model.num_parameters() for model in models}
        millions = (count - 2 * experiment.vocabulary * models[0].config.hidden_size) / 1e6
        assert 0.75 < millions / float(label.rstrip("M")) < 1.25


def test_next_tokens_are_those_of_the_whole_model() -> None:
    model = small_mtp()
    tokens = torch.randint(64, (5, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(next_tokens(model, tokens, 2), model(tokens).logits.argmax(-1))
