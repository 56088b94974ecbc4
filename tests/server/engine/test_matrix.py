"""The equivalence matrix: every sampling parameter, with trees and without, alone and among seven others.

The reference is decoding token by token, one request at a time, with nothing cached.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import fields, replace

import pytest
from llguidance import LLMatcher
from tiny import run, submit, tiny_engine, tiny_llama, tokens
from transformers import LlamaForCausalLM

from models.grammar import Grammars
from server.engine.controller import Controller, Drafting
from server.engine.core import Engine
from server.engine.cost import CostModel, Load
from server.engine.messages import Delta, SamplingParams
from server.engine.request import Draft, Outcome, Work
from tests.models.json_tokens import EOS, json_tokenizer

BASE = SamplingParams(20, temperature=0.9, seed=11, ignore_eos=True)
EVEN = tuple(range(0, 64, 2))
PARAMETERS = {
    "temperature": replace(BASE, temperature=1.4),
    "greedy": replace(BASE, temperature=0),
    "top_p": replace(BASE, top_p=0.8),
    "top_k": replace(BASE, top_k=7),
    "min_p": replace(BASE, min_p=0.1),
    "presence_penalty": replace(BASE, presence_penalty=1.2),
    "frequency_penalty": replace(BASE, frequency_penalty=-0.8),
    "repetition_penalty": replace(BASE, repetition_penalty=1.4),
    "greedy repetition_penalty": replace(BASE, temperature=0, repetition_penalty=1.4),
    "logit_bias": replace(BASE, logit_bias=((3, 2.5), (9, -100.0))),
    "stop_token_ids": replace(BASE, stop_token_ids=tuple(range(10, 20))),
    "end of sequence": replace(BASE, ignore_eos=False, logit_bias=((0, 3.0),)),
    "min_tokens": replace(BASE, min_tokens=9, stop_token_ids=tuple(range(10, 30))),
    "max_tokens": replace(BASE, max_tokens=5),
    "seed": replace(BASE, seed=-(2**63)),
    "choice": replace(BASE, choice=3),
    "logprobs": replace(BASE, logprobs=4),
    "prompt_logprobs": replace(BASE, prompt_logprobs=2),
    "allowed_token_ids": replace(BASE, allowed_token_ids=EVEN),
    "greedy allowed_token_ids": replace(BASE, temperature=0, allowed_token_ids=EVEN),
    "bad_words": replace(BASE, bad_words=(*itertools.product(EVEN, range(1, 40)), (5,), (3, 3, 8))),
    "nothing left to say": replace(BASE, allowed_token_ids=(4, 6, 8), bad_words=((4, 4), (6,), (8, 8), (4, 8, 4))),
    "all masks": replace(
        BASE,
        min_tokens=8,
        stop_token_ids=(20, 22, 24),
        logit_bias=((20, 4.0), (26, 1.0)),
        allowed_token_ids=EVEN,
        bad_words=((26, 26), (28, 26), (30,)),
        frequency_penalty=0.3,
    ),
    "grammar": replace(BASE, grammar=LLMatcher.grammar_from_regex("[A-K]{3,40}"), ignore_eos=False),
    "grammar and masks": replace(
        BASE,
        grammar=LLMatcher.grammar_from_regex("[A-K]{9,40}!"),
        bad_words=tuple(itertools.product(range(33, 40), repeat=2)),
        presence_penalty=0.4,
        top_p=0.9,
        logprobs=1,
    ),
    "all truncations": replace(BASE, top_p=0.9, top_k=20, min_p=0.01, repetition_penalty=1.1),
}
HOW = [("off", "heads"), ("lossless", "heads"), ("lossless", "sequential")]
PROMPT = [5, 9, 33, 7, 9, 12]
Answer = tuple[list[int], str | None, int | None]  # tokens, finish, what it stopped at


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama(64, scale=2.0)


@pytest.fixture(scope="module")
def plain(model: LlamaForCausalLM) -> dict[str, Answer]:
    return answers(engine_of(model, prefix_cache=False), "off", batch=1)


def engine_of(model: LlamaForCausalLM, *, drafter: str = "heads", **config: object) -> Engine:
    """Its first 64 tokens are the end and the characters from `!` on."""
    engine = tiny_engine(model, drafter=drafter, **config)
    engine.runner.grammars = Grammars(json_tokenizer().to_str(), [EOS])
    return engine


def answers(engine: Engine, mode: str, *, batch: int) -> dict[str, Answer]:
    """What each parameter's request says, `batch` of them at a time; the parameters of a batch are far apart."""
    names = list(PARAMETERS)
    num_batches = -(-len(names) // batch)
    found: dict[str, list[Delta]] = {}
    for first in range(num_batches):
        jobs = [submit(name, PROMPT, PARAMETERS[name], mode) for name in names[first::num_batches]]
        found |= run(engine, jobs)
    return {name: answer(found[name]) for name in names}


def answer(deltas: list[Delta]) -> Answer:
    return tokens(deltas), deltas[-1].finish, deltas[-1].stop_token_id


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(("mode", "drafter"), HOW)
def test_same_tokens(model: LlamaForCausalLM, plain: dict[str, Answer], mode: str, drafter: str, batch: int) -> None:
    assert answers(engine_of(model, drafter=drafter, num_nodes=12), mode, batch=batch) == plain


class RandomController(Controller):
    """Asks whom it likes, and takes what it likes."""

    def __init__(self, cost: CostModel, seed: int) -> None:
        super().__init__(cost, 40, control_share=0.1, seed=seed)
        self.source = random.Random(seed)

    def ask(self, load: Load, drafting: Drafting) -> list[float | None]:
        return [self.source.random() / 4 if room and self.source.random() < 0.7 else None for room in drafting.rooms]

    def choose(self, load: Load, drafting: Drafting, drafts: Sequence[Draft], row_budget: int) -> list[int]:
        counts = []
        for draft in drafts:
            counts.append(self.source.randint(0, max(min(len(draft.values), row_budget), 0)))
            row_budget -= counts[-1]
        return counts


@pytest.mark.parametrize("drafter", ["heads", "sequential"])
@pytest.mark.parametrize("config", [{}, {"kv_cache_tokens": 90, "max_num_batched_rows": 24}], ids=["", "preemption"])
def test_same_tokens_whatever_the_controller_does(
    model: LlamaForCausalLM, plain: dict[str, Answer], drafter: str, config: dict[str, object]
) -> None:
    for seed, batch in enumerate((1, 4, 9)):
        engine = engine_of(model, drafter=drafter, static_trees=False, ngram=True, **config)
        engine.controller = RandomController(engine.cost, seed)
        assert answers(engine, "lossless", batch=batch) == plain


@pytest.mark.parametrize(("mode", "drafter"), HOW)
def test_same_tokens_through_preemption(
    model: LlamaForCausalLM, plain: dict[str, Answer], mode: str, drafter: str
) -> None:
    engine = engine_of(model, drafter=drafter, kv_cache_tokens=70, max_num_batched_rows=24)
    assert answers(engine, mode, batch=8) == plain
    crowd = [submit(str(i), PROMPT, replace(BASE, seed=i), mode) for i in range(8)]
    ends = [deltas[-1].stats for deltas in run(engine, crowd).values()]
    assert sum(end.num_preemptions for end in ends if end) > 0


def test_every_parameter_is_in_the_matrix_and_matters(plain: dict[str, Answer]) -> None:
    for field in fields(SamplingParams):
        assert len({getattr(params, field.name) for params in PARAMETERS.values()}) > 1, field.name
    unchanged = [name for name, said in plain.items() if said == plain["logprobs"]]
    assert unchanged == ["logprobs", "prompt_logprobs"]


def test_the_masks_hold(plain: dict[str, Answer]) -> None:
    said = plain["bad_words"][0]
    pairs = set(itertools.pairwise(said))
    assert not pairs & set(PARAMETERS["bad_words"].bad_words)
    assert 5 not in said
    assert set(plain["allowed_token_ids"][0]) <= set(EVEN)
    assert set(plain["all masks"][0][:7]) <= set(EVEN) - {20, 22, 24, 30}
    assert plain["all masks"][1] == "stop"


def test_a_text_that_cannot_go_on_ends(plain: dict[str, Answer]) -> None:
    said, finish, stop_token_id = plain["nothing left to say"]
    assert (finish, stop_token_id) == ("stop", None)
    assert said in ([4], [8], [8, 4], [4, 8], [8, 4, 8])


def test_typical_acceptance_obeys_the_masks(model: LlamaForCausalLM) -> None:
    """Also at nodes after which nothing may follow, whose distribution is none."""
    engine = engine_of(model, num_nodes=12)
    for name in ("nothing left to say", "all masks", "bad_words"):
        params = PARAMETERS[name]
        jobs = [submit(str(seed), PROMPT, replace(params, seed=seed), "typical") for seed in range(20)]
        for deltas in run(engine, jobs).values():
            said = tuple(tokens(deltas))
            assert params.allowed_token_ids is None or set(said) <= set(params.allowed_token_ids)
            assert not any(contains(said, word) for word in params.bad_words)


def contains(said: tuple[int, ...], word: tuple[int, ...]) -> bool:
    return any(said[i : i + len(word)] == word for i in range(len(said)))


def test_drafts_are_tokens_that_may_be_said(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(model, num_nodes=3)
    drafted: set[int] = set()

    def watched(works: list[Work]) -> list[Outcome]:
        drafted.update(token for work in works for token in work.node_tokens)
        return unwatched(works)

    unwatched = engine.runner.run
    monkeypatch.setattr(engine.runner, "run", watched)
    run(engine, [submit("a", PROMPT, replace(BASE, allowed_token_ids=EVEN, bad_words=((8,),)))])
    assert len(drafted) > 3
    assert drafted <= set(EVEN) - {8}
