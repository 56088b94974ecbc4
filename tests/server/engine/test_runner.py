"""The engine with tensors: lossless through trees, batches, preemption and caching; sampled laws are exact."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scipy import stats
from tiny import run, submit, tiny_engine, tiny_llama, tokens
from transformers import LlamaForCausalLM

from models import sampling
from models.drafters import medusa
from models.drafters.medusa import DraftRow
from models.drafters.parallel import ParallelDrafter
from models.drafters.resblock import ResBlockHeads
from models.sampling import Row
from models.tree import Tree
from server.engine.core import Engine
from server.engine.messages import EngineConfig, SamplingParams, SpeculationParams, Submit
from server.engine.request import Outcome, Work
from server.engine.runner import Runner
from server.errors import StartupError

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))
from exact import exact_distribution

PROMPTS = [[5, 9, 33, 7], [8] * 30, [1, 2, 3, 4, 5, 6, 7], list(range(40, 57)), [60], [11, 13, 11, 13]]

SAMPLINGS = {
    "greedy": SamplingParams(24, temperature=0, ignore_eos=True),
    "plain": SamplingParams(24, seed=7, ignore_eos=True),
    "truncated": SamplingParams(24, temperature=0.8, top_p=0.95, top_k=30, min_p=0.01, seed=1, ignore_eos=True),
    "penalties": SamplingParams(
        24,
        temperature=0.7,
        presence_penalty=0.5,
        frequency_penalty=0.4,
        repetition_penalty=1.3,
        logit_bias=((3, 1.5), (4, -100.0)),
        seed=3,
        ignore_eos=True,
    ),
    "greedy penalties": SamplingParams(24, temperature=0, repetition_penalty=1.5, frequency_penalty=0.8),
    "min_tokens": SamplingParams(24, temperature=1.5, min_tokens=12, stop_token_ids=(17, 18, 19), seed=5),
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama(64, scale=2.0)


def outputs(engine: Engine, sampling: SamplingParams, mode: str = "lossless", together: bool = True) -> list[list[int]]:
    jobs = [submit(str(i), prompt, sampling, mode) for i, prompt in enumerate(PROMPTS)]
    groups = [jobs] if together else [[job] for job in jobs]
    deltas = {name: found for group in groups for name, found in run(engine, group).items()}
    return [tokens(deltas[job.request_id]) for job in jobs]


@pytest.mark.parametrize("name", SAMPLINGS)
def test_text_does_not_depend_on_tree_batch_cache_or_preemption(model: LlamaForCausalLM, name: str) -> None:
    sampling = SAMPLINGS[name]
    plain = outputs(tiny_engine(model, prefix_cache=False), sampling, "off", together=False)
    assert outputs(tiny_engine(model), sampling) == plain
    assert outputs(tiny_engine(model, num_nodes=40), sampling, together=False) == plain
    assert outputs(tiny_engine(model, num_nodes=1, prefix_cache=False), sampling) == plain
    assert outputs(tiny_engine(model, max_num_batched_rows=12, max_num_seqs=3), sampling) == plain
    crowded = tiny_engine(model, kv_cache_tokens=70, max_num_batched_rows=20)
    assert outputs(crowded, sampling) == plain
    assert len({tuple(p) for p in plain}) == len(plain)


def test_a_small_pool_does_preempt(model: LlamaForCausalLM) -> None:
    engine = tiny_engine(model, kv_cache_tokens=70, max_num_batched_rows=20)
    jobs = [submit(str(i), prompt, SAMPLINGS["greedy"]) for i, prompt in enumerate(PROMPTS)]
    ends = [deltas[-1].stats for deltas in run(engine, jobs).values()]
    assert sum(end.num_preemptions for end in ends if end) > 0


def test_greedy_is_what_transformers_generates(model: LlamaForCausalLM) -> None:
    reference = tiny_llama(64, scale=2.0)  # the same weights, untouched by our attention
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        expected.append(out[0, len(prompt) :].tolist())
    assert outputs(tiny_engine(model), SAMPLINGS["greedy"]) == expected


def test_trees_are_accepted_and_rejected(model: LlamaForCausalLM) -> None:
    """The equalities above would say nothing if no node, or every node, were accepted."""
    deltas = run(tiny_engine(model, num_nodes=30), [submit("a", PROMPTS[0], SAMPLINGS["greedy"])])["a"]
    stats = deltas[-1].stats
    assert stats is not None
    assert 0 < stats.speculation.num_accepted_draft_tokens < stats.speculation.num_draft_tokens


def test_seeds_and_choices_differ(model: LlamaForCausalLM) -> None:
    base = SAMPLINGS["plain"]
    engine = tiny_engine(model)
    variants = [base, replace(base, seed=8), replace(base, choice=1)]
    found = run(engine, [submit(str(i), PROMPTS[0], sampling) for i, sampling in enumerate(variants)])
    assert len({tuple(tokens(deltas)) for deltas in found.values()}) == 3


VOCAB, LENGTH = 6, 4
OPEN = SamplingParams(LENGTH, ignore_eos=True)
LAWS = {
    "plain": OPEN,
    "temperature": replace(OPEN, temperature=0.7),
    "top_p": replace(OPEN, top_p=0.75),
    "top_k": replace(OPEN, top_k=3),
    "min_p": replace(OPEN, min_p=0.15),
    "presence": replace(OPEN, presence_penalty=1.0),
    "frequency": replace(OPEN, frequency_penalty=1.2),
    "repetition": replace(OPEN, repetition_penalty=1.8),
    "logit_bias": replace(OPEN, logit_bias=((2, 1.3), (4, -2.0))),
    "min_tokens": SamplingParams(LENGTH, min_tokens=2),
    "stop_token_ids": SamplingParams(LENGTH, stop_token_ids=(3,), ignore_eos=True),
    "allowed_token_ids": replace(OPEN, allowed_token_ids=(0, 2, 3, 5), temperature=1.3),
    "bad_words": replace(OPEN, bad_words=((1,), (2, 2), (3, 4), (5, 2, 3))),
    "all": SamplingParams(LENGTH, 2, 1.2, 0.95, 5, 0.02, 0.3, 0.2, 1.1, ((1, 0.5),), (3,)),
}
PROMPT = [3, 1, 4]
SAMPLES = 3000


def exact_sequences(model: LlamaForCausalLM, sampling: SamplingParams) -> dict[tuple[int, ...], float]:
    """Every possible output and its probability, by plain forwards of the unmodified model."""
    ends = (set() if sampling.ignore_eos else {0}) | set(sampling.stop_token_ids)
    done: dict[tuple[int, ...], float] = {}
    open_ends: dict[tuple[int, ...], float] = {(): 1.0}
    while open_ends:
        grown: dict[tuple[int, ...], float] = {}
        with torch.inference_mode():
            logits = model(torch.tensor([PROMPT + list(path) for path in open_ends])).logits[:, -1]
        for (path, weight), row in zip(open_ends.items(), logits.tolist(), strict=True):
            for token, p in enumerate(exact_distribution(row, sampling, PROMPT, path, (0,))):
                longer = (*path, token)
                stops = token in ends and len(longer) >= sampling.min_tokens
                if p > 0:
                    (done if stops or len(longer) == LENGTH else grown)[longer] = weight * p
        open_ends = grown
    return done


@pytest.mark.parametrize("name", LAWS)
def test_sampled_law_is_exact_at_every_position_through_trees(name: str) -> None:
    sampling = LAWS[name]
    law = exact_sequences(tiny_llama(VOCAB, scale=0.4), sampling)
    assert sum(law.values()) == pytest.approx(1)
    engine = tiny_engine(tiny_llama(VOCAB, scale=0.4), num_nodes=12)
    jobs = [submit(str(i), PROMPT, replace(sampling, seed=i)) for i in range(SAMPLES)]
    found = run(engine, jobs)
    accepted = sum(d[-1].stats.speculation.num_accepted_draft_tokens for d in found.values() if d[-1].stats)
    assert accepted > SAMPLES / 2
    drawn = [tuple(tokens(deltas)) for deltas in found.values()]
    assert set(drawn) <= set(law)
    for length in range(1, LENGTH + 1):
        check_law([path[:length] for path in drawn], prefix_law(law, length))


def prefix_law(law: dict[tuple[int, ...], float], length: int) -> dict[tuple[int, ...], float]:
    found: dict[tuple[int, ...], float] = {}
    for path, p in law.items():
        found[path[:length]] = found.get(path[:length], 0.0) + p
    return found


def check_law(drawn: list[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> None:
    """Chi-square over outcomes expected at least five times; the rest is one more cell."""
    cells = [path for path, p in law.items() if p * len(drawn) >= 5]
    counts = [drawn.count(path) for path in cells]
    expected = [law[path] * len(drawn) for path in cells]
    rest = len(drawn) - sum(counts), len(drawn) - sum(expected)
    if rest[1] >= 5:
        counts.append(rest[0])
        expected.append(rest[1])
    statistic = sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True))
    assert len(cells) > 1
    assert stats.chi2.sf(statistic, len(counts) - 1) > 1e-4


def test_logprobs_are_the_models_own(model: LlamaForCausalLM) -> None:
    sampling = replace(SAMPLINGS["penalties"], logprobs=3, max_tokens=12)
    deltas = run(tiny_engine(model), [submit("a", PROMPTS[0], sampling)])["a"]
    found = [entry for delta in deltas for entry in delta.logprobs]
    output = tokens(deltas)
    assert [entry.token_id for entry in found] == output
    with torch.inference_mode():
        logits = tiny_llama(64, scale=2.0)(torch.tensor([PROMPTS[0] + output])).logits[0]
    reference = logits.log_softmax(-1)[len(PROMPTS[0]) - 1 : -1]
    for entry, row in zip(found, reference, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        values, ids = row.topk(3)
        assert [token for token, _ in entry.top] == ids.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_prompt_logprobs_are_the_models_own(model: LlamaForCausalLM) -> None:
    sampling = SamplingParams(0, temperature=0, prompt_logprobs=2)
    engine = tiny_engine(model, max_num_batched_rows=7)
    prompt = PROMPTS[3]
    deltas = run(engine, [submit("a", prompt, sampling)])["a"]
    collected = deltas[-1].prompt_logprobs
    assert collected is not None
    assert collected[0] is None
    with torch.inference_mode():
        reference = tiny_llama(64, scale=2.0)(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert len(collected) == len(prompt)
    for token, row, entry in zip(prompt[1:], reference[:-1], collected[1:], strict=True):
        assert entry is not None
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert entry.rank == int((row > row[token]).sum()) + 1
        assert len(entry.top) == 2


def test_typical_acceptance_accepts_more_and_only_what_is_typical(model: LlamaForCausalLM) -> None:
    sampling = SamplingParams(40, temperature=1.0, seed=1, ignore_eos=True)
    engine = tiny_engine(model, num_nodes=30)
    exact = run(engine, [submit("a", PROMPTS[0], sampling)])["a"][-1].stats
    spec = SpeculationParams("typical", epsilon=0.02, delta=0.05)
    engine.submit(Submit("b", tuple(PROMPTS[0]), sampling, spec))
    deltas = []
    while engine.has_work:
        deltas.extend(engine.step().deltas)
    loose, output = deltas[-1].stats, tokens(deltas)
    assert exact is not None
    assert loose is not None
    assert loose.speculation.num_accepted_draft_tokens > exact.speculation.num_accepted_draft_tokens
    with torch.inference_mode():
        logits = tiny_llama(64, scale=2.0)(torch.tensor([PROMPTS[0] + output])).logits[0, len(PROMPTS[0]) - 1 : -1]
    p = logits.softmax(-1)
    entropies = -(p * p.log()).sum(-1)
    place, rejected = 0, 0
    for delta in deltas:  # all tokens of a step but its last are accepted guesses
        for token in delta.token_ids[:-1]:
            threshold = min(0.02, 0.05 * math.exp(-float(entropies[place])))
            assert float(p[place, token]) > threshold - 1e-6
            place += 1
        rejected += len(delta.token_ids) < 4
        place += 1
    assert rejected > 0


def test_typical_at_temperature_zero_is_greedy(model: LlamaForCausalLM) -> None:
    engine = tiny_engine(model)
    greedy = outputs(engine, SAMPLINGS["greedy"])
    assert outputs(engine, SAMPLINGS["greedy"], "typical") == greedy


def test_no_node_lies_beyond_the_request_or_the_context(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine(model, num_nodes=30, max_model_len=12)
    highest: list[int] = []

    def watched(works: list[Work]) -> list[Outcome]:
        for work in works:
            depth = max(Tree(work.node_tokens, work.node_parents).depths, default=0)
            highest.append(work.start + work.num_chain - 1 + depth)
        return unwatched(works)

    unwatched = engine.runner.run
    monkeypatch.setattr(engine.runner, "run", watched)
    deltas = run(engine, [submit("a", [1, 2, 3, 4], SamplingParams(8, temperature=0, ignore_eos=True))])["a"]
    assert len(tokens(deltas)) == 8
    assert deltas[-1].finish == "length"
    assert max(highest) == 10  # the twelfth token, at position 11, is only ever drawn


def test_drafts_start_from_the_last_accepted_row_with_the_verifiers_noise(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine(model, num_nodes=20)
    runner = engine.runner
    assert isinstance(runner, Runner)
    assert isinstance(runner.drafter, ParallelDrafter)
    drafted: list[DraftRow] = []
    first_rows: list[Row] = []

    def propose(heads: ResBlockHeads, hidden: torch.Tensor, rows: list[DraftRow], ranks: int) -> medusa.Candidates:
        drafted.extend(rows)
        return medusa.propose(heads, hidden, rows, ranks)

    def sample(logits: torch.Tensor, rows: list[Row], *, in_c: bool) -> torch.Tensor:
        first_rows.append(rows[0])
        return sampling.sample(logits, rows, in_c=in_c)

    monkeypatch.setattr("models.drafters.parallel.propose", propose)
    monkeypatch.setattr("server.engine.runner.sampling", SimpleNamespace(**{**vars(sampling), "sample": sample}))
    engine.submit(submit("a", PROMPTS[0], SAMPLINGS["plain"]))
    reference = tiny_llama(64, scale=2.0)
    while True:
        engine.step()
        if not engine.has_work:
            break
        (request,) = engine.scheduler.running
        with torch.inference_mode():
            states = reference.model(torch.tensor([request.tokens[:-1]])).last_hidden_state[0]
        assert torch.allclose(runner.drafter._states["a"][1], states[-1], atol=1e-4)
    assert [row.position for row in drafted] == [row.position for row in first_rows[1 : len(drafted) + 1]]
    assert {row.params.seed for row in drafted} == {7}


@pytest.mark.parametrize("num_heads", [1, 2, 7])
def test_foreign_heads_without_measured_accuracies(model: LlamaForCausalLM, num_heads: int) -> None:
    plain = tiny_engine(model)
    runner = plain.runner
    assert isinstance(runner, Runner)
    heads = ResBlockHeads(runner.backbone.lm_head_weight, num_heads=num_heads)
    options = EngineConfig("tiny", kv_cache_tokens=4096, num_nodes=63)
    foreign = Engine(options, Runner(runner.backbone, heads, options))
    assert outputs(foreign, SAMPLINGS["greedy"]) == outputs(plain, SAMPLINGS["greedy"])


def test_more_logprobs_than_the_vocabulary_has_tokens() -> None:
    deltas = run(tiny_engine(tiny_llama(VOCAB)), [submit("a", [1, 2], SamplingParams(2, logprobs=20, ignore_eos=True))])
    assert all(len(entry.top) == VOCAB for delta in deltas["a"] for entry in delta.logprobs)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"max_model_len": 10_000}, "exceeds the model's own 256 positions"),
        ({"kv_cache_tokens": 10**15}, "does not fit"),
        ({"kv_cache_tokens": 100, "max_model_len": 200}, "lower it, or raise --kv-cache-tokens"),
    ],
)
def test_limits_that_cannot_be_met_are_one_sentence(
    model: LlamaForCausalLM, config: dict[str, int], words: str
) -> None:
    with pytest.raises(StartupError, match=words):
        tiny_engine(model, **config)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (EngineConfig("/nowhere"), "no config.json"),
        (EngineConfig("/nowhere", dtype="int8"), "--dtype int8"),
        (EngineConfig("/nowhere", device="cuda"), "no CUDA device"),
    ],
)
def test_load_says_what_is_wrong(config: EngineConfig, words: str) -> None:
    if config.device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(StartupError, match=words):
        Runner.load(config)


def test_all_tree_sizes_together(model: LlamaForCausalLM) -> None:
    """Ragged trees of different sizes, and none, in one batch."""
    engine = tiny_engine(model)
    sampling = SAMPLINGS["greedy"]
    jobs = [submit(str(n), PROMPTS[n % 6], sampling, max_nodes=n) for n in (0, 1, 2, 5, 11, 30, 63)]
    found = run(engine, jobs)
    plain = outputs(tiny_engine(model), sampling, "off")
    for job, deltas in zip(jobs, found.values(), strict=True):
        assert tokens(deltas) == plain[int(job.request_id) % 6]
    assert len(list(itertools.chain(*found.values()))) < 24 * len(jobs)


def test_steps_that_cannot_be_recorded_are_launched(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = tiny_engine(model)
    runner = engine.runner
    assert isinstance(runner, Runner)
    asked: list[dict[str, int]] = []

    def record(_pool: object, **limits: int) -> int:
        asked.append(limits)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(runner.backbone, "record", record)
    runner.record(EngineConfig("tiny", enforce_eager=True))
    assert not asked
    runner.record(EngineConfig("tiny", max_num_batched_rows=70))
    assert asked == [{"most_rows": 70, "longest": runner.info.max_model_len}]
    assert "Not all steps can be recorded" in caplog.text
    assert len(outputs(engine, SAMPLINGS["greedy"])) == len(PROMPTS)


def test_what_steps_need_is_no_room_for_the_cache(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.memory.free_bytes", lambda *_: 2**20)
    fitting = tiny_engine(model, kv_cache_tokens=None).runner.info.kv_cache_tokens
    ran: list[int] = []

    def needed(_: torch.device, run: Callable[[], object]) -> int:
        run()
        ran.append(1)
        return 2**18

    monkeypatch.setattr("models.memory.needed_bytes", needed)
    assert tiny_engine(model, kv_cache_tokens=None).runner.info.kv_cache_tokens == fitting // 2
    assert ran
