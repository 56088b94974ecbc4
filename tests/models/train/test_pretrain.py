"""The whole command on a tiny text: a folder that loads, stopped and continued, served with heads on and off."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.train import pretrain
from models.train.multi_token import Pretrainer
from server.engine.core import Engine
from server.engine.messages import EngineConfig, SamplingParams, SpeculationParams, Submit
from server.engine.runner import Runner


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents that count: easy to guess ahead."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        (folder / f"{i}.txt").write_text("".join(f"for i in range({i + j}):\n    print(i)\n" for j in range(20)))
    return folder


def command(text: Path, output: Path, *more: str) -> list[str]:
    sizes = ["--hidden-size", "32", "--layers", "4", "--num-heads", "3", "--attention-heads", "2", "--context", "48"]
    sizes += ["--batch-size", "8", "--steps", "12", "--validation-fraction", "0.2", "--device", "cpu"]
    return ["--data", str(text), "--output", str(output), *sizes, *more]


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "model"
    assert pretrain.main(command(text, output, "--steps", "300", "--lr", "0.01")) == 0
    return output


def test_a_folder_that_loads_and_guesses(trained: Path) -> None:
    facts = json.loads((trained / "pretraining.json").read_text())
    losses = [losses for _, losses in facts["held_out_losses"]]
    assert [len(row) for row in losses] == [3] * 10
    assert max(losses[-1]) < min(losses[0]) / 2
    assert facts["training_tokens_seen"] == 300 * 8 * 48
    model = AutoModelForCausalLM.from_pretrained(trained)
    assert model.config.num_future_tokens == 3
    assert [row[0] > 0.5 for row in model.config.head_accuracies] == [True, True]
    assert AutoTokenizer.from_pretrained(trained)("é")["input_ids"] == list("é".encode())
    card = (trained / "README.md").read_text()
    assert "--num-heads 3 --layers 4" in card
    assert "| nodes | measured | independent |" in card


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_served_with_its_own_heads_the_text_is_the_same(trained: Path, quantization: str) -> None:
    said = {}
    for own_heads in (True, False):
        options = EngineConfig(
            str(trained), own_heads=own_heads, quantization=quantization, ngram=False, kv_cache_tokens=2048,
            device="cpu",
        )  # fmt: skip
        runner = Runner.load(options)
        assert runner.info.num_heads == (2 if own_heads else 0)
        said[own_heads] = _run(Engine(options, runner), mode="lossless")
        if own_heads:
            said["off"] = _run(Engine(options, runner), mode="off")
    texts = {key: [tokens for tokens, _ in answers] for key, answers in said.items()}
    assert texts[True] == texts[False] == texts["off"]
    num_tokens, num_steps = (sum(column) for column in zip(*((len(t), n) for t, n in said[True]), strict=True))
    assert num_tokens / num_steps > 1.5
    assert all(len(tokens) == steps for tokens, steps in said["off"])


def _run(engine: Engine, mode: str) -> list[tuple[list[int], int]]:
    """Tokens and deltas of each of three requests, two of them sampled."""
    prompts = [b"for i in ra", b"    print(", b"range("]
    samplings = [
        SamplingParams(24, temperature=0, ignore_eos=True),
        SamplingParams(24, temperature=0.7, seed=3, ignore_eos=True),
        SamplingParams(24, temperature=1.0, top_p=0.9, seed=5, ignore_eos=True),
    ]
    answers: dict[str, list[tuple[int, ...]]] = {str(i): [] for i in range(3)}
    for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        speculation = SpeculationParams(mode)  # type: ignore[arg-type]
        assert engine.submit(Submit(str(i), tuple(prompt), sampling, speculation)) is None
    while engine.has_work:
        for delta in engine.step().deltas:
            answers[delta.request_id].append(delta.token_ids)
    return [([t for ids in deltas for t in ids], sum(map(bool, deltas))) for deltas in answers.values()]


def test_stopped_and_resumed_equals_uninterrupted(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pretrain.main(command(text, tmp_path / "whole")) == 0
    steps, advance = iter(range(100)), Pretrainer.advance

    def interrupted(self: Pretrainer) -> Tensor:
        if next(steps) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return advance(self)

    monkeypatch.setattr(Pretrainer, "advance", interrupted)
    assert pretrain.main(command(text, tmp_path / "again")) == 130
    assert not (tmp_path / "again" / "config.json").exists()
    assert pretrain.main(command(text, tmp_path / "again", "--resume")) == 0
    assert next(steps) == 12
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    facts = [json.loads((tmp_path / name / "pretraining.json").read_text()) for name in ("whole", "again")]
    assert facts[0] == facts[1]


def test_any_tokenizer_and_one_head(tiny_model: Path, tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(" ".join(f"w{(i + j) % 59}" for j in range(60)))
    output = tmp_path / "out"
    flags = ("--tokenizer", str(tiny_model), "--pattern", "*.txt", "--num-heads", "1", "--tie-embeddings")
    assert pretrain.main(command(tmp_path, output, *flags)) == 0
    model = AutoModelForCausalLM.from_pretrained(output)
    assert (model.config.vocab_size, model.config.head_accuracies) == (64, None)
    assert AutoTokenizer.from_pretrained(output)("w3 w4")["input_ids"] == [8, 9]
    assert "What its heads guess" not in (output / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--hidden-size", "30"], "--hidden-size must be a multiple"),
        (["--kv-heads", "3"], "--hidden-size must be a multiple"),
        (["--num-heads", "5"], "--num-heads must not exceed --layers"),
        (["--context", "100000"], "shorter than one window"),
        (["--tokenizer", "/nowhere"], "--tokenizer /nowhere cannot be loaded"),
        (["--data", "/nowhere"], "Cannot read /nowhere"),
        (["--device", "nonsense"], "--device nonsense cannot be used here"),
        (["--output", __file__], "give another path"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    text: Path, tmp_path: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain.main(command(text, tmp_path / "out", *flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
