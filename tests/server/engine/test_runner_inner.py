"""Heads that see inner layers, served: the text is the model's own, and the heads get what they were trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import PREDICTABLE, run, submit, tokens

from models.backbone import Backbone
from models.checkpoint import save_heads
from models.drafters.packed import PackedHeads
from models.drafters.parallel import ParallelDrafter
from models.drafters.resblock import ResBlockHeads
from server.engine.core import Engine
from server.engine.messages import EngineConfig, SamplingParams
from server.engine.runner import Runner
from server.errors import StartupError
from tests.small_models import small_llama

GREEDY = SamplingParams(24, temperature=0, ignore_eos=True)
PROMPT = [5, 9, 3, 17]


def write(folder: Path, layers: tuple[int, ...]) -> EngineConfig:
    """A model of four layers and untrained heads that see some of them."""
    small_llama(num_hidden_layers=4).save_pretrained(folder / "model")
    backbone = Backbone.load(folder / "model", dtype=torch.float32, device=torch.device("cpu"))
    heads = ResBlockHeads(backbone.lm_head_weight, num_heads=3, inner_layers=layers)
    assert heads.fusion is not None
    torch.nn.init.normal_(heads.fusion, std=0.1)
    torch.nn.init.normal_(heads.weight, std=0.1)
    save_heads(folder / "heads", heads, base_model="tiny", vocab_size=64, card="")
    options = {**PREDICTABLE, "device": "cpu", "num_nodes": 8, "ngram": False}
    return EngineConfig(str(folder / "model"), heads=str(folder / "heads"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("quantization", ["int8", "none"])
def test_the_text_is_that_of_plain_decoding(quantization: str, tmp_path: Path) -> None:
    config = write(tmp_path, (0, 2))
    runner = Runner.load(replace(config, quantization=quantization))
    drafter = runner.drafter
    assert isinstance(drafter, ParallelDrafter)
    assert isinstance(drafter.heads, PackedHeads) == (quantization == "int8")
    widths: set[int] = set()
    remember = drafter.remember

    def noted(request: str, start: int, states: torch.Tensor) -> None:
        widths.add(states.shape[1])
        remember(request, start, states)

    drafter.remember = noted  # type: ignore[method-assign]
    engine = Engine(config, runner)
    plain = tokens(run(engine, [submit("plain", PROMPT, GREEDY, "off")])["plain"])
    deltas = run(engine, [submit("medusa", PROMPT, GREEDY)])["medusa"]
    assert tokens(deltas) == plain
    assert widths == {3 * 32}
    stats = deltas[-1].stats
    assert stats is not None
    assert stats.speculation.num_draft_tokens > 0


def test_layers_that_the_model_has_not_are_refused_at_load(tmp_path: Path) -> None:
    config = write(tmp_path, (0, 7))
    with pytest.raises(StartupError, match="look at the layers 0, 7 of a model that has 4"):
        Runner.load(config)
