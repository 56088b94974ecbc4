"""The comparison against transformers' own loss on a tiny model, its statistics on made-up sums, and the command."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from models.backbone import Backbone
from models.train import perplexity
from models.train.data import Example, encode_rows, read_rows
from models.train.perplexity import Score, compare, cut_windows, summarize
from tests.small_models import small_llama


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random llama whose sizes are whole groups of weights, so that it is quantised as the real ones are."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    folder = tmp_path_factory.mktemp("small")
    small_llama(max_position_embeddings=2048, initializer_range=0.2, **sizes).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path) -> Backbone:
    return Backbone.load(folder, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture
def examples(small_model: Path, chats: Path) -> list[Example]:
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    return encode_rows(read_rows([chats]), tokenizer, validation_fraction=0.3, max_length=perplexity.WINDOW)


def mean_loss(folder: Path, examples: list[Example]) -> float:
    """The model's own loss over the held-out answers."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    total = count = 0.0
    for example in filter(lambda example: example.held_out, examples):
        tokens = torch.tensor([example.tokens])
        labels = tokens.where(torch.tensor([example.counts]), -100)
        num_scored = sum(example.counts[1:])
        with torch.no_grad():
            total += float(model(tokens, labels=labels).loss) * num_scored
        count += num_scored
    return total / count


def test_float32_is_the_models_own_perplexity(small_model: Path, examples: list[Example]) -> None:
    windows = cut_windows(examples, 10_000)
    exact = load(small_model)
    same = compare(exact, exact, windows)
    assert same.float32 == same.quantized == pytest.approx(math.exp(mean_loss(small_model, examples)), rel=1e-5)
    assert (same.difference, same.error, same.divergence, same.agreement) == (0, 0, 0, 1)
    assert same.windows == sum(example.held_out for example in examples)
    assert same.tokens == sum(sum(example.counts) for example in examples if example.held_out)


def test_int8_is_near_and_a_worse_model_is_told(small_model: Path, examples: list[Example]) -> None:
    windows = cut_windows(examples, 10_000)
    exact, quantized, other = load(small_model), load(small_model), load(small_model)
    quantized.quantize()
    near = compare(exact, quantized, windows)
    assert 0 < near.divergence < 0.01
    assert abs(near.difference) < 2
    assert near.agreement > 0.9
    other.lm_head_weight.add_(torch.randn(other.lm_head_weight.shape), alpha=0.5)
    far = compare(exact, other, windows)
    assert far.divergence > 10 * near.divergence
    assert far.agreement < near.agreement


def test_statistics_by_hand() -> None:
    found = summarize([Score(10, 20.0, 20.2, 0.1, 9), Score(30, 60.0, 60.2, 0.5, 27)], "int8")
    assert (found.windows, found.tokens, found.agreement) == (2, 40, 0.9)
    assert found.float32 == pytest.approx(math.exp(2))
    assert found.quantized == pytest.approx(math.exp(2.01))
    assert found.difference == pytest.approx(100 * (math.exp(0.01) - 1))
    assert found.divergence == pytest.approx(0.015)
    assert found.error == pytest.approx(100 * math.exp(0.01) * math.sqrt(2 * (0.1**2 + 0.1**2)) / 40)


def test_the_error_says_how_far_the_difference_of_a_sample_is_off() -> None:
    """Repeated with new windows, the differences spread as their errors promise."""
    draw = np.random.default_rng(0)

    def once() -> Any:
        tokens = draw.integers(20, 500, 40)
        losses = draw.gamma(50.0, size=40) * tokens / 25
        gaps = tokens * 0.002 + draw.normal(size=40) * 0.01 * tokens
        rows = zip(tokens, losses, losses + gaps, strict=True)
        return summarize([Score(int(n), loss, worse, 0.0, 0) for n, loss, worse in rows], "int8")

    found = [once() for _ in range(400)]
    assert np.mean([item.difference for item in found]) == pytest.approx(0.2, abs=0.02)
    assert np.std([item.difference for item in found]) == pytest.approx(
        np.mean([item.error for item in found]), rel=0.15
    )


def test_windows_hold_what_is_held_out_up_to_the_limit() -> None:
    def example(held_out: bool, *counts: int) -> Example:
        return Example(tuple(range(len(counts))), tuple(map(bool, counts)), held_out, False)

    examples = [example(True, 1, 0, 1, 1), example(False, 1, 1), example(True, 1, 0), example(True, 0, 1, 1, 1)]
    windows = cut_windows(examples, 4)
    assert [window.scored.tolist() for window in windows] == [[1, 2], [0, 1]]
    assert [len(window.tokens) for window in windows] == [4, 4]
    assert [len(window.scored) for window in cut_windows(examples, 100)] == [2, 3]


def test_the_command_prints_and_writes(
    small_model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i * i % 59}" for i in range(1200)))
    output = tmp_path / "numbers.json"
    arguments = [str(small_model), "--data", str(chats), str(text), "--json", str(output)]
    assert perplexity.main(arguments) == 0
    numbers = json.loads(output.read_text())
    printed = capsys.readouterr().out
    assert f"{numbers['tokens']} in {numbers['windows']} windows" in printed
    assert numbers["quantization"] == "int8"
    assert f"{numbers['quantized']:.4f}" in printed
    assert numbers["windows"] == 80 + 3
    assert numbers["tokens"] > 1190

    assert perplexity.main([*arguments, "--max-tokens", "50"]) == 0
    assert json.loads(output.read_text())["tokens"] == 50

    assert perplexity.main([*arguments, "--quantization", "int4"]) == 0
    worse = json.loads(output.read_text())
    assert worse["quantization"] == "int4"
    assert worse["divergence"] > 5 * numbers["divergence"]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command says, in one line, as it leaves with 2."""
    assert perplexity.main(list(map(str, arguments))) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def test_what_cannot_be_done_is_said_in_a_sentence(
    small_model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "Cannot read absent.txt" in refused(capsys, "no model at all", "--data", "absent.txt")
    assert "no model at all is no file" in refused(capsys, "no model at all", "--data", chats)
    assert "fewer than two windows" in refused(capsys, small_model, "--data", chats, "--max-tokens", 1)
    assert "fewer than two windows" in refused(capsys, small_model, "--data", chats, "--validation-fraction", 0)
    assert "give another path" in refused(capsys, small_model, "--data", chats, "--json", tmp_path)
    broken = shutil.copytree(small_model, tmp_path / "model")
    (broken / "model.safetensors").write_bytes(b"not tensors")
    assert "cannot be read" in refused(capsys, broken, "--data", chats)


def test_no_compiler_is_said_in_a_sentence(
    small_model: Path, chats: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from models.kernels import cpu

    cpu.kernels.cache_clear()
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "There is no C compiler (no-such-compiler)" in refused(capsys, small_model, "--data", chats)


def test_max_tokens_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        perplexity.main(["model", "--data", "text.txt", "--max-tokens", "0"])
    assert exit_.value.code == 2
    assert "must be at least 1" in capsys.readouterr().err
