"""The whole command on a tiny model: folder written, stopped and continued, evaluated, refused."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from models.checkpoint import WEIGHTS_NAME, load_heads
from models.errors import UsageError
from models.train import evaluate, heads
from models.train.acceptance import measure_accuracies, tau_by_nodes
from models.train.data import Example, encode_rows, read_rows
from models.train.distill import ResBlockDistiller
from models.train.sequential import SequentialDistiller
from models.train.step_times import StepTime, StepTimes, Trial
from models.train.trunk import load_trunk
from tests.small_models import small_llama

SEQUENTIAL = ["--design", "sequential", "--batch-size", "256"]


@pytest.fixture
def command(tiny_model: Path, own_text: Path, tmp_path: Path) -> list[str]:
    return [
        str(tiny_model),
        *("--data", str(own_text), "--output", str(tmp_path / "heads"), "--device", "cpu"),
        *("--num-heads", "3", "--draft-vocab", "40", "--epochs", "3", "--batch-size", "64", "--lr", "0.01"),
        *("--validation-fraction", "0.3", "--design", "resblock"),
    ]


@pytest.fixture(scope="session")
def deep_model(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of four layers, the least that have a low and a middle one before the last."""
    folder = tmp_path_factory.mktemp("deep")
    small_llama(num_hidden_layers=4, max_position_embeddings=2048).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def own_text(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text that the tiny model wrote greedily."""
    model, tokenizer = load_trunk(tiny_model, torch.float32, "cpu")
    rows = []
    for word in range(40):
        prompt = f"w{word}"
        start = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            written = model.generate(start, max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=None)
        rows.append({"prompt": prompt, "completion": tokenizer.decode(written[0, 1:]), "temp": 0})
    path = tmp_path_factory.mktemp("own") / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_training_writes_heads_that_load_and_guess(
    command: list[str], tiny_model: Path, own_text: Path, tmp_path: Path
) -> None:
    assert heads.main([*command, "--name", "org/tiny model"]) == 0
    written = {file.name for file in (tmp_path / "heads").iterdir()}
    assert written == {"README.md", "config.json", WEIGHTS_NAME, "report.md", "report.json", "report.svg"}
    assert {file.name for file in (tmp_path / "heads.work").iterdir()} == {"state.pt", "trunk"}
    config = json.loads((tmp_path / "heads" / "config.json").read_text())
    assert (config["medusa_num_heads"], config["hidden_size"], config["draft_vocab_size"]) == (3, 32, 40)
    assert config["training"]["losses"] == sorted(config["training"]["losses"], reverse=True)
    card = (tmp_path / "heads" / "README.md").read_text()
    assert "--output DIR --name 'org/tiny model' --design resblock --num-heads 3 --draft-vocab 40" in card

    model, tokenizer = load_trunk(tiny_model, torch.float32, "cpu")
    trained = load_heads(tmp_path / "heads", model.get_output_embeddings())
    examples = encode_rows(read_rows([own_text]), tokenizer, validation_fraction=0.3)
    ranked = [evaluate.rank_example(model, [trained], examples[i]) for i in evaluate.held_out(examples)]
    texts = [text for (found,), _ in ranked for text in found]
    assert all(agreed.all() for _, agreed in ranked)
    np.testing.assert_allclose(measure_accuracies(texts), trained.accuracies, atol=0.03)
    (reported,) = json.loads((tmp_path / "heads" / "report.json").read_text())["designs"]
    assert reported["name"] == "heads"
    assert [depth["1"] for depth in reported["top"]] == [shares[0] for shares in trained.accuracies or ()]
    assert tau_by_nodes(texts, trained.accuracies or ())[3].measured > 1.3


def test_training_ends_early_and_says_so(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([2.0, 3.0, 2.5, 2.0])
    monkeypatch.setattr(heads, "_score", lambda _texts: next(scores))
    assert heads.main([*command, "--epochs", "5", "--evaluations", "2", "--patience", "2"]) == 0
    assert "Ended early: the last 2 evaluations" in " ".join(capsys.readouterr().out.split())
    training = json.loads((tmp_path / "heads" / "config.json").read_text())["training"]
    assert training["held_out_tau_8_nodes"] == [2.0, 3.0, 2.5, 2.0]
    assert training["best_epoch"] == 1
    assert "--evaluations 2 --patience 2" in (tmp_path / "heads" / "README.md").read_text()


def test_stopped_and_resumed_equals_uninterrupted(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert heads.main(command) == 0
    whole = load_file(tmp_path / "heads" / WEIGHTS_NAME)

    steps = iter(range(1000))
    step = ResBlockDistiller._step

    def interrupted(self: ResBlockDistiller, batch: Any) -> float:
        if next(steps) == 13:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch)

    monkeypatch.setattr(ResBlockDistiller, "_step", interrupted)
    again = [*command, "--output", str(tmp_path / "again")]
    assert heads.main(again) == 130
    assert not (tmp_path / "again" / "config.json").exists()
    assert heads.main([*again, "--resume"]) == 0
    resumed = load_file(tmp_path / "again" / WEIGHTS_NAME)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert next(steps) < 13 + 30


def test_evaluate_reports_on_several_designs_and_times_them(
    command: list[str], own_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert heads.main(command) == 0
    other = [*command, *SEQUENTIAL, "--epochs", "1", "--output", str(tmp_path / "other")]
    assert heads.main(other) == 0
    trials: list[Trial] = []

    def measure(trial: Trial) -> list[StepTimes]:
        trials.append(trial)
        sizes = [(requests, nodes) for requests in trial.requests for nodes in trial.nodes]
        return [{size: StepTime(1.0 + size[1], float(i * size[1]), 0.0) for size in sizes} for i in range(2)]

    folders = [str(tmp_path / "heads"), str(tmp_path / "other")]
    arguments = [command[0], "--heads", *folders, "--data", str(own_text), "--device", "cpu"]
    arguments += ["--validation-fraction", "0.3", "--report", str(tmp_path / "report")]
    capsys.readouterr()
    assert evaluate.main(arguments, measure) == 0
    printed = capsys.readouterr().out
    assert "100.0%" in printed
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [design["name"] for design in found["designs"]] == ["heads", "other"]
    assert [choice["nodes"] for choice in found["fastest"]] == [0, 0]  # nodes cost as much as whole steps
    for folder, design in zip(folders, found["designs"], strict=True):
        accuracies = json.loads((Path(folder) / "config.json").read_text())["accuracies"]
        np.testing.assert_allclose([d["1"] for d in design["top"]], [row[0] for row in accuracies], atol=0.03)
        assert f"{design['taus'][3]['measured']:.3f}" in printed
    (trial,) = trials
    assert [str(path) for path in trial.heads] == folders
    assert all(len(prompt) == 1 for prompt in trial.prompts)

    assert evaluate.main([*arguments, "--heads", folders[0], folders[0]]) == 2
    assert "twice" in capsys.readouterr().err


def test_a_model_that_cannot_be_timed_is_reported_on_nevertheless(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(_trial: Trial) -> list[StepTimes]:
        raise UsageError("There is no engine.")

    assert heads.main([*command, "--epochs", "1"], measure) == 0
    assert "Step times were not measured: There is no engine." in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "heads" / "report.json").read_text())["fastest"] == []


def test_a_sequential_drafter_is_trained_resumed_and_evaluated(
    command: list[str],
    own_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [*command, *SEQUENTIAL]
    assert heads.main(command) == 0
    config = json.loads((tmp_path / "heads" / "config.json").read_text())
    assert (config["model_type"], config["num_heads"], config["draft_vocab_size"]) == ("medusa_sequential", 3, 40)
    assert config["training"]["losses"] == sorted(config["training"]["losses"], reverse=True)
    assert "sequential drafter" in (tmp_path / "heads" / "README.md").read_text()
    whole = load_file(tmp_path / "heads" / WEIGHTS_NAME)

    step, steps = SequentialDistiller._step, iter(range(1000))

    def interrupted(self: SequentialDistiller, batch: Any) -> float:
        if next(steps) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch)

    monkeypatch.setattr(SequentialDistiller, "_step", interrupted)
    again = [*command, "--output", str(tmp_path / "again")]
    assert heads.main(again) == 130
    assert heads.main([*again, "--resume"]) == 0
    resumed = load_file(tmp_path / "again" / WEIGHTS_NAME)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    capsys.readouterr()
    arguments = [command[0], "--heads", str(tmp_path / "heads"), "--data", str(own_text), "--device", "cpu"]
    assert evaluate.main([*arguments, "--validation-fraction", "0.3"]) == 0
    printed = capsys.readouterr().out
    assert f"{config['accuracies'][0][0]:.3f}" in printed
    assert "per second" not in printed  # nobody was there to measure


@pytest.mark.parametrize("design", [["--design", "resblock", "--num-layers", "2"], SEQUENTIAL])
def test_heads_go_on_from_given_ones(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], design: list[str]
) -> None:
    assert heads.main([*command, *design]) == 0
    first, again = tmp_path / "heads", tmp_path / "again"
    data = [*command[:3], "--device", "cpu", "--validation-fraction", "0.3", "--batch-size", "256", "--epochs", "1"]
    assert heads.main([*data, "--lr", "0.001", "--init", str(first), "--output", str(again)]) == 0
    before, after = (json.loads((folder / "config.json").read_text())["training"] for folder in (first, again))
    tau = before["held_out_tau_8_nodes"][-1]
    assert f"before: held-out tau at 8 nodes {tau:.2f}" in capsys.readouterr().out
    assert after["losses"][0] < before["losses"][0]  # of a first epoch
    assert after["held_out_tau_8_nodes"][0] > before["held_out_tau_8_nodes"][0]
    assert (before["positions_before"], after["positions_before"]) == (0, before["positions"])
    assert torch.equal(*(load_file(folder / WEIGHTS_NAME)["token_map"] for folder in (first, again)))
    card = (again / "README.md").read_text()
    assert "--init heads" in card
    assert f"after {before['positions']} that" in card


def test_heads_that_training_cannot_go_on_from_are_refused(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert heads.main([*command, "--epochs", "1"]) == 0
    data = [*command[:3], "--device", "cpu", "--output", str(tmp_path / "again")]
    assert heads.main([*data, "--init", str(tmp_path / "absent")]) == 2
    assert "nothing at" in capsys.readouterr().err
    file = tmp_path / "heads" / WEIGHTS_NAME
    save_file(load_file(file) | {"lm_head.weight": torch.zeros(40, 32)}, file)
    assert heads.main([*data, "--init", str(tmp_path / "heads")]) == 2
    assert "LM heads of their own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--init", "absent"], "leave --design, --num-heads,"),  # which are what they are by default
        (["--design", "sequential", "--num-layers", "2"], "has one layer"),
        (["--quantization", "int8", "--device", "meta"], "is for --device cpu"),
        (["--design", "sequential", "--features", "low,mid,last"], "sees the last state"),
        (["--features", "low,mid,last"], "A model of 2 layers has no low and middle ones; give --features last"),
    ],
)
def test_options_that_make_no_sense_together_are_refused(
    command: list[str], capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert heads.main([*command, *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_heads_that_see_inner_layers_are_trained_and_evaluated_beside_others(
    command: list[str], deep_model: Path, own_text: Path, tmp_path: Path, quantization: str
) -> None:
    deep = [str(deep_model), *command[1:], "--epochs", "2", "--quantization", quantization]
    assert heads.main([*deep, "--features", "low,mid,last", "--num-layers", "2"]) == 0
    folders = [str(tmp_path / "heads"), str(tmp_path / "last")]
    assert heads.main([*deep, "--output", folders[1]]) == 0
    config = json.loads((tmp_path / "heads" / "config.json").read_text())
    assert (config["inner_layers"], config["medusa_num_layers"]) == ([0, 1], 2)
    card = (tmp_path / "heads" / "README.md").read_text()
    assert "--num-layers 2 --features low,mid,last" in card
    assert "outputs of layers 0, 1, too" in card

    report = [str(deep_model), "--data", str(own_text), "--device", "cpu", "--report", str(tmp_path / "report")]
    assert evaluate.main([*report, "--heads", *folders, "--validation-fraction", "0.3"]) == 0
    found = json.loads((tmp_path / "report" / "report.json").read_text())["designs"]
    for folder, design in zip(folders, found, strict=True):
        (trained,) = json.loads((Path(folder) / "report.json").read_text())["designs"]
        for depth, expected in zip(design["top"], trained["top"], strict=True):
            assert depth["1"] == pytest.approx(expected["1"], abs=0.03)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_positions_learn_from_more(command: list[str], chats: Path, tmp_path: Path, dtype: str) -> None:
    chat = [*command, "--data", str(chats), "--epochs", "1", "--dtype", dtype]
    positions = []
    for extra in ([], ["--all-positions"]):
        assert heads.main([*chat, *extra]) == 0
        positions.append(json.loads((tmp_path / "heads" / "config.json").read_text())["training"]["positions"])
    assert positions[0] < positions[1]


def test_held_out_prefers_greedy_rows() -> None:
    rows = [Example((1, 2), (True, True), held_out, greedy) for held_out, greedy in ((1, 0), (1, 1), (0, 1), (1, 1))]
    assert evaluate.held_out(rows) == [1, 3]
    assert evaluate.held_out(rows[:1]) == [0]


def test_what_cannot_be_done_is_said_in_a_sentence(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert heads.main([*command, "--validation-fraction", "0"]) == 2
    assert "held out" in capsys.readouterr().err
    assert heads.main([*command, "--validation-fraction", "1"]) == 2
    assert "left to learn from" in capsys.readouterr().err
    assert heads.main([*command, "--epochs", "1"]) == 0
    assert heads.main([*command, "--epochs", "2", "--resume"]) == 2
    assert "without" in capsys.readouterr().err
    (tmp_path / "heads.work" / "state.pt").write_bytes(b"")
    assert heads.main([*command, "--epochs", "1", "--resume"]) == 2
    assert "no saved state" in capsys.readouterr().err
    assert evaluate.main([command[0], "--heads", str(tmp_path / "none"), "--data", command[2]]) == 2
    assert "nothing at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--device", "nonsense"], "--device nonsense cannot be used here"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used here"),
        (["--data", "absent.jsonl"], "Cannot read absent.jsonl"),
        (["--output", __file__], "give another path"),
    ],
)
def test_what_needs_no_model_is_said_before_it_is_looked_for(
    command: list[str], flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert heads.main(["no model at all", *command[1:], *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
    if "--output" not in flags:
        assert evaluate.main(["no model at all", "--heads", "none", "--data", __file__, *flags]) == 2
        assert capsys.readouterr().err == error


def test_a_model_that_does_not_load_is_said(
    command: list[str], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "model"
    shutil.copytree(tiny_model, broken)
    (broken / "model.safetensors").write_bytes(b"not tensors")
    assert heads.main([str(broken), *command[1:]]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    assert evaluate.main([str(broken), "--heads", "none", "--data", command[2]]) == 2
    assert "cannot be loaded" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--epochs", "--num-heads", "--batch-size"])
def test_counts_must_be_positive(command: list[str], flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        heads.main([*command, flag, "0"])
    assert exit_.value.code == 2
    assert "must be at least 1" in capsys.readouterr().err
