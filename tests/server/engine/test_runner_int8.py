"""int8 in the engine: when it is chosen, when it is refused, and that it is lossless to the last bit."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import PREDICTABLE, random_heads, run, submit, tiny_llama, tokens
from transformers import LlamaForCausalLM

from models.backbone import Backbone
from models.checkpoint import save_heads
from models.drafters.packed import PackedHeads
from models.drafters.parallel import ParallelDrafter
from models.drafters.resblock import ResBlockHeads
from models.kernels import cpu
from server.engine.core import Engine
from server.engine.messages import Delta, EngineConfig, SamplingParams, TokenLogprobs
from server.engine.runner import Runner
from server.engine.weights import quantize
from server.errors import StartupError
from tests.small_models import four_bit_weights, small_llama

PROMPTS = [[5, 9, 33, 7], [8] * 30, [1, 2, 3, 4, 5, 6, 7], list(range(40, 57)), [60], [11, 13, 11, 13]]
PROMPTS += [[*PROMPTS[3], 3, 4], list(range(50, 0, -1))]

SAMPLINGS = {
    "greedy": SamplingParams(24, temperature=0, ignore_eos=True, logprobs=3),
    "prompts": SamplingParams(12, temperature=0, ignore_eos=True, logprobs=0, prompt_logprobs=2),
    "sampled": SamplingParams(24, temperature=1.3, top_p=0.95, seed=7, ignore_eos=True, logprobs=3),
    "penalties": SamplingParams(24, temperature=0.7, repetition_penalty=1.3, seed=3, ignore_eos=True, logprobs=1),
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Of the common shape, in sizes that can be fused."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
    return small_llama(eos_token_id=0, initializer_range=0.2, **sizes)


def int8_engine(model: LlamaForCausalLM, **config: object) -> Engine:
    torch.manual_seed(1)
    backbone = Backbone(copy.deepcopy(model))
    backbone.quantize()
    options = EngineConfig("tiny", **{**PREDICTABLE, "num_nodes": 8, **config})  # type: ignore[arg-type]
    return Engine(options, Runner(backbone, PackedHeads(random_heads(backbone)), options))


Said = tuple[list[int], list[TokenLogprobs], tuple[TokenLogprobs | None, ...] | None]


def said(deltas: list[Delta]) -> Said:
    """Tokens and log-probabilities, to the last bit."""
    of_prompt = next((d.prompt_logprobs for d in deltas if d.prompt_logprobs), None)
    return tokens(deltas), [entry for delta in deltas for entry in delta.logprobs], of_prompt


def outputs(engine: Engine, sampling: SamplingParams, mode: str = "lossless", at_once: int = 8) -> list[Said]:
    jobs = [submit(str(i), prompt, sampling, mode) for i, prompt in enumerate(PROMPTS)]
    deltas: dict[str, list[Delta]] = {}
    for first in range(0, len(jobs), at_once):
        deltas |= run(engine, jobs[first : first + at_once])
    return [said(deltas[job.request_id]) for job in jobs]


@pytest.mark.parametrize("name", SAMPLINGS)
def test_heads_batch_cache_and_preemption_change_no_bit(model: LlamaForCausalLM, name: str) -> None:
    sampling = SAMPLINGS[name]
    plain = outputs(int8_engine(model, prefix_cache=False), sampling, "off", at_once=1)
    assert all(len(entries) == sampling.max_tokens for _, entries, _ in plain)
    assert outputs(int8_engine(model), sampling) == plain
    assert outputs(int8_engine(model, num_nodes=40), sampling, at_once=1) == plain
    assert outputs(int8_engine(model), sampling, "off") == plain
    assert outputs(int8_engine(model, num_nodes=1, prefix_cache=False), sampling) == plain
    assert outputs(int8_engine(model, max_num_batched_rows=12, max_num_seqs=3), sampling) == plain
    assert outputs(int8_engine(model, kv_cache_tokens=90, max_num_batched_rows=20), sampling) == plain
    assert len({tuple(ids) for ids, _, _ in plain}) == len(plain)


def test_a_cached_prefix_changes_no_bit(model: LlamaForCausalLM) -> None:
    engine, sampling = int8_engine(model), SAMPLINGS["greedy"]
    first = outputs(engine, sampling)
    again = run(engine, [submit(f"b{i}", prompt, sampling) for i, prompt in enumerate(PROMPTS)])
    assert [said(deltas) for deltas in again.values()] == first
    cached = [deltas[-1].stats.num_cached_tokens for deltas in again.values() if deltas[-1].stats]
    assert sum(cached) > len(PROMPTS)


def test_the_equalities_are_about_something(model: LlamaForCausalLM) -> None:
    """Nodes are accepted and rejected, and the small pool does preempt."""
    for options in ({}, {"kv_cache_tokens": 90, "max_num_batched_rows": 20}):
        engine = int8_engine(model, **options)
        found = run(engine, [submit(str(i), p, SAMPLINGS["greedy"]) for i, p in enumerate(PROMPTS)])
        ends = [deltas[-1].stats for deltas in found.values()]
        accepted = sum(end.speculation.num_accepted_draft_tokens for end in ends if end)
        assert 0 < accepted < sum(end.speculation.num_draft_tokens for end in ends if end)
        assert (sum(end.num_preemptions for end in ends if end) > 0) == bool(options)


def test_int8_says_nearly_what_float32_says(model: LlamaForCausalLM) -> None:
    """Log-probabilities of the same prompts, a few hundredths apart."""
    sampling = replace(SAMPLINGS["prompts"], prompt_logprobs=0)
    found = outputs(int8_engine(model), sampling)
    errors = []
    for prompt, (_, _, entries) in zip(PROMPTS, found, strict=True):
        assert entries is not None
        with torch.inference_mode():
            logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        for row, token, entry in zip(logprobs, prompt[1:], entries[1:], strict=False):
            assert entry is not None
            errors.append(abs(entry.logprob - float(row[token])))
    assert 1e-4 < sum(errors) / len(errors) < 0.15


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(64).save_pretrained(folder)
    return folder


def load(folder: Path, **options: object) -> Runner:
    return Runner.load(EngineConfig(str(folder), kv_cache_tokens=512, device="cpu", **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("quantization", "dtype", "chosen"),
    [(None, "auto", "int8"), ("int8", "float32", "int8"), ("none", "auto", "none"), (None, "bfloat16", "none")],
)
def test_int8_is_the_default_for_float32_on_a_cpu(
    folder: Path, quantization: str | None, dtype: str, chosen: str, caplog: pytest.LogCaptureFixture
) -> None:
    runner = load(folder, quantization=quantization, dtype=dtype)
    assert runner.info.quantization == runner.backbone.quantization == chosen
    cached = torch.float16 if chosen == "int8" else runner.backbone.lm_head_weight.dtype
    assert {keys.dtype for keys in (*runner.pool.keys, *runner.pool.values)} == {cached}
    assert caplog.text == ""


def test_int4_is_the_default_where_four_bits_hold_the_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    four_bit_weights(tiny_llama(64)).save_pretrained(tmp_path)
    for wanted, chosen in ((None, "int4"), ("int4", "int4"), ("int8", "int8")):
        assert load(tmp_path, quantization=wanted).info.quantization == chosen
    assert caplog.text == ""


def test_int4_elsewhere_warns_of_the_loss(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load(folder, quantization="int4").info.quantization == "int4"
    (record,) = caplog.records
    assert "answers get worse" in record.message
    assert "evaluate perplexity" in record.message


@pytest.mark.parametrize(("quantization", "kind"), [("int8", PackedHeads), ("none", ResBlockHeads)])
def test_heads_are_packed_with_the_model(folder: Path, tmp_path: Path, quantization: str, kind: type) -> None:
    heads = ResBlockHeads(tiny_llama(64).lm_head.weight, num_heads=2)
    save_heads(tmp_path, heads, base_model="tiny", vocab_size=64, card="")
    runner = load(folder, heads=str(tmp_path), quantization=quantization)
    assert isinstance(runner.drafter, ParallelDrafter)
    assert type(runner.drafter.heads) is kind
    assert runner.info.num_heads == 2


def test_int8_in_another_dtype_is_refused(folder: Path) -> None:
    with pytest.raises(StartupError, match=r"int8 is for --device cpu and --dtype float32; leave it out\.$"):
        load(folder, quantization="int8", dtype="bfloat16")


def test_it_is_refused_elsewhere_and_not_the_default() -> None:
    backbone: Any = SimpleNamespace(lm_head_weight=torch.empty(1, device="meta"))
    quantize(backbone, None)  # does nothing: there is no `quantize` on it
    with pytest.raises(StartupError, match="int4 is for --device cpu"):
        quantize(backbone, "int4")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    cpu.kernels.cache_clear()
    yield
    cpu.kernels.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_one_line_names_the_loss(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    runner = load(folder)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "\n" not in record.message
    assert "no C compiler" in record.message
    assert "install gcc" in record.message
    assert "times slower" in record.message
    assert runner.info.quantization == "none"
    engine = Engine(EngineConfig("tiny"), runner)
    assert len(tokens(run(engine, [submit("a", [1, 2], SamplingParams(5, ignore_eos=True))])["a"])) == 5


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_int8_is_refused_and_none_is_silent(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(StartupError, match=r"int8 is not possible: There is no C compiler .*path\.$") as caught:
        load(folder, quantization="int8")
    assert "\n" not in caught.value.message
    assert load(folder, quantization="none").info.quantization == "none"
    assert caplog.text == ""


def test_time_in_kernels_is_counted_once(model: LlamaForCausalLM) -> None:
    engine = int8_engine(model)
    runner = engine.runner
    assert isinstance(runner, Runner)
    runner.kernel_seconds()
    run(engine, [submit("a", PROMPTS[0], SAMPLINGS["greedy"])])
    assert runner.kernel_seconds() >= 0
    cpu.take_seconds()
    cpu.PackedLinear(torch.randn(256, 256))(torch.randn(64, 256))
    assert 0 < runner.kernel_seconds() < 5
    assert runner.kernel_seconds() == 0
