"""A sequential drafter in the engine: it is loaded, it guesses, and with int8 it changes no bit."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from tiny import PREDICTABLE, random_sequential, run, submit, tokens
from transformers import LlamaForCausalLM

from models.backbone import Backbone
from models.drafters.sequential_drafter import SequentialDrafter
from models.sequential_checkpoint import save_sequential
from server.engine.core import Engine
from server.engine.messages import Delta, EngineConfig, SamplingParams
from server.engine.runner import Runner
from server.errors import StartupError
from tests.small_models import small_llama

PROMPTS = [[5, 9, 33, 7], [8] * 30, [1, 2, 3, 4, 5, 6, 7], list(range(40, 57)), [60], [11, 13, 11, 13]]
PROMPTS += [[*PROMPTS[3], 3, 4], list(range(50, 0, -1))]
SAMPLINGS = {
    "greedy": SamplingParams(24, temperature=0, ignore_eos=True, logprobs=2),
    "prompts": SamplingParams(12, temperature=0, ignore_eos=True, prompt_logprobs=1),
    "sampled": SamplingParams(24, temperature=1.1, top_p=0.95, seed=7, ignore_eos=True, logprobs=1),
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
    return small_llama(eos_token_id=0, initializer_range=0.2, **sizes)


def engine(model: LlamaForCausalLM, **config: object) -> Engine:
    torch.manual_seed(1)
    backbone = Backbone(copy.deepcopy(model))
    backbone.quantize()
    options = EngineConfig("tiny", **{**PREDICTABLE, "num_nodes": 8, "ngram": False, **config})  # type: ignore[arg-type]
    return Engine(options, Runner(backbone, random_sequential(backbone), options))


def outputs(made: Engine, sampling: SamplingParams, mode: str = "lossless", at_once: int = 8) -> list[list[Delta]]:
    """Whole texts, with all that is said of them but when."""
    jobs = [submit(str(i), prompt, sampling, mode) for i, prompt in enumerate(PROMPTS)]
    deltas: dict[str, list[Delta]] = {}
    for first in range(0, len(jobs), at_once):
        deltas |= run(made, jobs[first : first + at_once])
    return [deltas[job.request_id] for job in jobs]


def said(texts: list[list[Delta]]) -> list[object]:
    """Tokens and log-probabilities, to the last bit."""
    return [
        (
            tokens(deltas),
            [entry for delta in deltas for entry in delta.logprobs],
            [delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs],
        )
        for deltas in texts
    ]


@pytest.mark.parametrize("name", SAMPLINGS)
def test_it_changes_no_bit(model: LlamaForCausalLM, name: str) -> None:
    sampling = SAMPLINGS[name]
    plain = said(outputs(engine(model, prefix_cache=False), sampling, "off", at_once=1))
    assert said(outputs(engine(model), sampling)) == plain
    assert said(outputs(engine(model, num_nodes=40), sampling, at_once=1)) == plain
    assert said(outputs(engine(model, max_num_batched_rows=12, max_num_seqs=3), sampling)) == plain
    assert said(outputs(engine(model, kv_cache_tokens=90, num_nodes=3), sampling)) == plain


def test_it_guesses_and_is_forgotten(model: LlamaForCausalLM) -> None:
    made = engine(model)
    texts = outputs(made, SAMPLINGS["greedy"])
    stats = [deltas[-1].stats for deltas in texts]
    assert all(each is not None and each.speculation.num_draft_tokens > 0 for each in stats)
    drafter = made.runner.drafter  # type: ignore[attr-defined]
    assert isinstance(drafter, SequentialDrafter)
    assert not drafter._memories


def saved(folder: Path, model: LlamaForCausalLM) -> tuple[Path, Path]:
    """A model's folder and that of its drafter."""
    model.save_pretrained(folder / "model")
    (folder / "model" / "tokenizer.json").write_text("{}")
    heads = random_sequential(Backbone(copy.deepcopy(model)))
    heads.accuracies = ((0.5, 0.2), (0.4, 0.2), (0.3, 0.2))
    save_sequential(folder / "heads", heads, base_model="m", vocab_size=64, card="# Heads", dtype=torch.float32)
    return folder / "model", folder / "heads"


@pytest.fixture
def unprepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tokenizer is needed here."""
    monkeypatch.setattr("models.grammar.Grammars.prepare", lambda _: None)


@pytest.mark.usefixtures("unprepared")
@pytest.mark.parametrize("quantization", ["int8", "none"])
def test_it_is_loaded_from_a_folder(model: LlamaForCausalLM, tmp_path: Path, quantization: str) -> None:
    folder, heads = saved(tmp_path, model)
    runner = Runner.load(EngineConfig(str(folder), heads=str(heads), device="cpu", quantization=quantization))
    assert isinstance(runner.drafter, SequentialDrafter)
    assert runner.info.num_heads == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": {"hidden_size": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32, "inner_size": 64}}, "hidden"),
        ({"num_heads": 2}, "another number of heads"),
        ({"shape": {"width": 3}}, "cannot be read"),
        (
            {"shape": {"hidden_size": 64, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32, "inner_size": 96}},
            "do not fit",
        ),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(
    model: LlamaForCausalLM, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    folder, heads = saved(tmp_path, model)
    config = json.loads((heads / "config.json").read_text())
    (heads / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(StartupError, match=message):
        Runner.load(EngineConfig(str(folder), heads=str(heads), device="cpu"))
