"""Records traces: the engine in this process decodes plainly, while its drafter is asked at every token.

Invariant: nothing that was guessed is verified, so the texts are those of plain decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from models.train.machine import this_machine
from server.engine.controller import Controller, Drafting
from server.engine.core import Engine
from server.engine.cost import Load
from server.engine.messages import ControllerState, EngineConfig, SamplingParams, Submit
from server.engine.request import Draft
from server.engine.runner import Runner
from server.engine.warmup import warm_up
from tests.bench.client import BenchError, Prompt
from tests.bench.traces import Step, Trace, Traces, right_path

AT_A_TIME = 4  # requests; in a crowd the engine would offer smaller trees


@dataclass(frozen=True, slots=True)
class _Noted:
    num_tokens: int  # of the text, when this was guessed
    draft: Draft


class _Recorder(Controller):
    """Asks for all that can be guessed, and takes nothing of it."""

    def __init__(self, engine: Engine, num_nodes: int) -> None:
        super().__init__(engine.cost, num_nodes)
        self.noted: dict[str, list[_Noted]] = {}

    def ask(self, load: Load, drafting: Drafting) -> list[float | None]:
        return [0.0 if room > 0 else None for room in drafting.rooms]

    def choose(self, load: Load, drafting: Drafting, drafts: Sequence[Draft], row_budget: int) -> list[int]:
        for request, draft in zip(drafting.requests, drafts, strict=True):
            self.noted.setdefault(request.id, []).append(_Noted(len(request.tokens), draft))
        return [0] * len(drafts)


def record(model: Path, heads: Path | None, prompts: Sequence[Prompt], num_nodes: int, max_tokens: int) -> Traces:
    """Load the model, measure what its steps cost, and decode. Raises BenchError if there is nobody who guesses."""
    config = EngineConfig(str(model), None if heads is None else str(heads), num_nodes=num_nodes, ngram=False)
    engine = Engine(config, Runner.load(config))
    warm_up(engine)
    return record_from(engine, encoded(model, prompts), num_nodes, max_tokens)


def encoded(model: Path, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    chats = [
        tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True, return_dict=True)
        for prompt in prompts
    ]
    return [tuple(chat["input_ids"]) for chat in chats]


def record_from(engine: Engine, prompts: Sequence[tuple[int, ...]], num_nodes: int, max_tokens: int) -> Traces:
    """The drafts of `engine`, whose cost curves are measured."""
    info = engine.runner.info
    if not info.num_heads:
        raise BenchError("the model has no heads, so nothing is guessed: name some with --heads")
    engine.controller = recorder = _Recorder(engine, num_nodes)
    texts = _decode(engine, prompts, max_tokens)
    about = {"model": info.path, "num_nodes": num_nodes, "machine": asdict(this_machine()), "device": info.device}
    drafts = [_trace(recorder.noted.get(str(i), []), text) for i, text in enumerate(texts)]
    return Traces({**about, "costs": costs_of(engine.controller_state())}, [draft for draft in drafts if draft])


def costs_of(state: ControllerState) -> dict[str, Any]:
    names = "run_curve", "draft_curve", "rest_curve", "tree_curve", "extra_seconds"
    return {name: asdict(state)[name] for name in names}


def _decode(engine: Engine, prompts: Sequence[tuple[int, ...]], max_tokens: int) -> list[list[int]]:
    """Each prompt with its greedy answer."""
    texts = [list(prompt) for prompt in prompts]
    for first in range(0, len(prompts), AT_A_TIME):
        for i, prompt in enumerate(prompts[first : first + AT_A_TIME], first):
            refused = engine.submit(Submit(str(i), prompt, SamplingParams(max_tokens, temperature=0)))
            if refused is not None:
                raise BenchError(f"a prompt was refused: {refused.error}")
        while engine.has_work:
            for delta in engine.step().deltas:
                if delta.error is not None:
                    raise BenchError(f"the engine failed: {delta.error}")
                texts[int(delta.request_id)] += delta.token_ids
    return texts


def _trace(noted: Sequence[_Noted], text: Sequence[int]) -> Trace:
    return [
        Step(
            each.num_tokens - 1,
            each.draft.parents,
            each.draft.values,
            right_path(each.draft.tokens, each.draft.parents, text[each.num_tokens :]),
        )
        for each in noted
    ]
