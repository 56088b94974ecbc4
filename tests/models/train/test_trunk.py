"""The cache against plain transformers forwards, built in one go or in two."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.train import trunk
from models.train.data import Example
from models.train.trunk import ServedTrunk, TrunkError, build_cache, check_device, end_tokens, load_trunk


@pytest.fixture
def model(tiny_model: Path) -> Any:
    return load_trunk(tiny_model, torch.float32, "cpu")[0]


@pytest.fixture
def examples() -> list[Example]:
    draw = np.random.default_rng(0)
    lengths = [5, 40, 1, 17, 33, 8, 21]
    return [Example(tuple(draw.integers(64, size=n).tolist()), (True,) * n, False, False) for n in lengths]


def test_the_served_trunk_says_nearly_the_same(tiny_model: Path, tmp_path: Path) -> None:
    tokens = tuple(range(3, 40))
    example = Example(tokens, (True,) * len(tokens), held_out=False, greedy=True)
    exact = build_cache(load_trunk(tiny_model, torch.float32, "cpu")[0], [example], tmp_path)
    served = build_cache(ServedTrunk(tiny_model, "int8", 64), [example], tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert 0 < np.abs(served.hidden.astype(np.float32) - exact.hidden).mean() < 0.05  # states are of size 1
    np.testing.assert_allclose(served.teacher_probs[:, 0], exact.teacher_probs[:, 0], atol=0.05)


def test_cache_holds_what_the_model_says(model: Any, examples: list[Example], tmp_path: Path) -> None:
    cache = build_cache(model, examples, tmp_path)
    for i, example in enumerate(examples):
        here = slice(cache.starts[i], cache.starts[i + 1])
        with torch.no_grad():
            said = model(torch.tensor([example.tokens]), output_hidden_states=True)
        probs = said.logits[0].softmax(-1)
        assert cache.tokens[here].tolist() == list(example.tokens)
        np.testing.assert_allclose(cache.hidden[here], said.hidden_states[-1][0], rtol=2e-3, atol=2e-3)
        stored = torch.from_numpy(cache.teacher_ids[here].astype(np.int64))
        np.testing.assert_allclose(cache.teacher_probs[here], probs.gather(1, stored), rtol=2e-3, atol=1e-6)
        assert np.array_equal(cache.teacher_ids[here][:, 0], probs.argmax(-1))


def test_inner_layers_are_kept_before_the_last_state(model: Any, examples: list[Example], tmp_path: Path) -> None:
    plain = build_cache(model, examples, tmp_path)
    cache = build_cache(model, examples, tmp_path, inner_layers=(1, 0))
    assert np.array_equal(cache.hidden[:, 64:], plain.hidden)
    for i, example in enumerate(examples):
        here = slice(cache.starts[i], cache.starts[i + 1])
        with torch.no_grad():
            inner = model.model(torch.tensor([example.tokens]), output_hidden_states=True).hidden_states
            first = inner[1][0]
        expected = first / first.square().mean(-1, keepdim=True).sqrt()
        np.testing.assert_allclose(cache.hidden[here, 32:64], expected, rtol=2e-3, atol=2e-3)


def test_an_interrupted_build_goes_on(
    model: Any, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trunk, "_ROWS_PER_FORWARD", 40)
    whole = build_cache(model, examples, tmp_path / "whole")

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(model, examples, tmp_path / "parts", progress=stop)
    forwards: list[int] = []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    parts = build_cache(model, examples, tmp_path / "parts")
    handle.remove()
    assert 0 < len(forwards) < 5
    assert np.array_equal(whole.hidden, parts.hidden)
    assert np.array_equal(whole.teacher_ids, parts.teacher_ids)


def test_other_text_has_another_cache(model: Any, examples: list[Example], tmp_path: Path) -> None:
    build_cache(model, examples, tmp_path)
    build_cache(model, examples[1:], tmp_path)
    build_cache(model, examples, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("configured", "of_tokenizer", "expected"), [(2, 1, [1, 2]), ([5, 2], 2, [2, 5]), (None, 3, [3]), (None, None, [])]
)
def test_end_tokens_of_model_and_tokenizer(configured: object, of_tokenizer: int | None, expected: list[int]) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=configured))
    assert end_tokens(model, SimpleNamespace(eos_token_id=of_tokenizer)) == expected


def test_weights_that_do_not_load_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrunkError, match=r"lack a model\.norm\.weight of the right shape"):
        load_trunk(folder, torch.float32, "cpu")
    save_file(weights | {"model.norm.weight": torch.ones(3)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrunkError, match=r"lack a model\.norm\.weight of the right shape"):
        load_trunk(folder, torch.float32, "cpu")
    (folder / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(TrunkError, match="cannot be loaded"):
        load_trunk(folder, torch.float32, "cpu")


@pytest.mark.parametrize("name", ["cuda:99", "nonsense", "meta", ""])
def test_devices_that_are_not_there(name: str) -> None:
    check_device("cpu")
    with pytest.raises(TrunkError, match=f"--device {name} cannot be used here"):
        check_device(name)
