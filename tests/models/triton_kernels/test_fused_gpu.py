"""Models of the common shape as a GPU runs them, against transformers' own code."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from common_models import COMMON, FUSED, common
from stepping import Engine, OneByOne, Request, TokenPath, plain, relative_errors, tiny
from torch import Tensor
from transformers import PreTrainedModel

from models import fused_gpu
from models.backbone import Backbone
from models.fused import can_fuse, is_common

FEW = {name: FUSED[name] for name in ("llama bias", "llama 3", "mistral", "qwen3", "smollm3", "9 heads")}
PATH = (5, 6, 7)


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.backbone.runs_triton", lambda _: True)


def fused(model: PreTrainedModel, device: torch.device) -> Backbone:
    backbone = Backbone(model.to(device))
    assert isinstance(backbone._fused, fused_gpu.FusedOnGpu)
    return backbone


def run(backbone: Backbone) -> list[tuple[TokenPath, Tensor]]:
    """Two prompts, then trees: few rows, for Triton's interpreter is slow."""
    engine, requests = Engine(backbone), [Request([3, 1, 4, 1, 5, 9, 2, 6]), Request([2, 7])]
    rows = engine.step([(requests[0], 8, ()), (requests[1], 1, ())])
    return rows + engine.step([(requests[0], 1, (-1, 0, -1)), (requests[1], 1, (-1,))])


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize("name", FEW)
def test_it_is_the_model(name: str, device: torch.device) -> None:
    model = common(name)
    errors = relative_errors(plain(model), run(fused(model, device)))
    assert errors.max() < 1e-4


@pytest.mark.usefixtures("as_on_gpu")
def test_a_row_is_what_it_is_alone(device: torch.device) -> None:
    backbone = fused(common("qwen3"), device)
    beside = dict(run(backbone))[2,]  # the other request's first row
    torch.testing.assert_close(OneByOne(backbone)((2,))[0], beside, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("as_on_gpu")
def test_inner_layers_are_shown(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = fused(common("llama"), device)
    backbone.show((0, 1))
    logits, states = OneByOne(backbone)(PATH)
    monkeypatch.setattr(backbone, "_fused", None)
    backbone.show((0, 1))
    expected_logits, expected = OneByOne(backbone)(PATH)
    torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits, expected_logits, atol=1e-3, rtol=1e-3)


@pytest.mark.usefixtures("as_on_gpu")
def test_the_modules_share_the_weights_and_go_on_working(device: torch.device) -> None:
    model = common("llama")
    expected, size = plain(model), sum(p.nbytes for p in model.parameters())
    backbone = fused(model, device)
    layer: Any = model.model.layers[0]
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(held.values()) == size
    assert layer.mlp.up_proj.weight.data_ptr() == backbone._fused._layers[0].gate_up[0][96:].data_ptr()
    backbone._fused = None
    assert relative_errors(expected, run(backbone)).max() < 1e-4


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize("fault", ["is wrong", "fails"])
def test_layers_that_go_wrong_are_not_used(
    fault: str, device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(gate_up: torch.Tensor) -> torch.Tensor:
        if fault == "fails":
            raise RuntimeError("no such instruction")
        return gate_up.new_ones(len(gate_up), gate_up.shape[1] // 2)

    monkeypatch.setattr(fused_gpu.triton_layers, "gated", broken)
    model = common("llama")
    expected = plain(model)
    with caplog.at_level(logging.ERROR):
        backbone = Backbone(model.to(device))
    assert backbone._fused is None
    assert "its own code does" in caplog.text
    assert relative_errors(expected, run(backbone)).max() < 1e-4


def test_what_the_c_kernels_cannot_run_may_still_be_common() -> None:
    model = tiny("llama", **COMMON | {"hidden_size": 40})
    scorings = Backbone(model)._attention.scorings
    assert (is_common(model, scorings), can_fuse(model, scorings)) == (True, False)
