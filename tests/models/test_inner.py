"""What inner layers put out: every architecture against transformers' own hidden states, and the fused model too."""

from __future__ import annotations

import copy

import pytest
import torch
from stepping import CPU, GPT2, MODELS, Engine, OneByOne, Request, run, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.backbone import Backbone, BackboneError
from models.inner import InnerLayersError, InnerStates, check_layers, decoder_layers, low_and_middle, normed
from tests.small_models import small_mtp

DEEP = {"num_hidden_layers": 4}
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_hidden_layers": 4}
SHOWN = (2, 0)


def of_layers(model: PreTrainedModel, path: tuple[int, ...]) -> Tensor:
    """Outputs of SHOWN at the last token of `path`, by transformers itself: [layers * hidden]."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        states = model(torch.tensor([path]), output_hidden_states=True, use_cache=False).hidden_states
    return torch.cat([states[layer + 1][0, -1] for layer in SHOWN])


def engine_of(backbone: Backbone) -> Engine:
    engine = Engine(backbone)
    engine.step([(Request([5, 6, 7, 8, 9]), 5, (-1, 0, -1)), (Request([3, 4]), 2, ())])
    return engine


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt_neox", "stablelm", "mixtral", "cohere"])
def test_shown_layers_come_before_the_last_state(name: str) -> None:
    model = tiny(name, **({"n_layer": 4} if MODELS[name][1] is GPT2 else DEEP))
    backbone = Backbone(copy.deepcopy(model))
    plain = engine_of(backbone).hidden
    backbone.show(SHOWN)
    shown = engine_of(backbone).hidden
    for path, hidden in shown.items():
        inner, last = hidden.split([2 * len(hidden) // 3, len(hidden) // 3])
        torch.testing.assert_close(last, plain[path])
        torch.testing.assert_close(inner, of_layers(model, path), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("is_early", [True, False])
def test_a_fused_model_shows_them_too(is_early: bool) -> None:
    """Whether they are asked for before or after its weights are packed."""
    model = tiny("llama", **WIDE)
    backbone = Backbone(copy.deepcopy(model))
    if is_early:
        backbone.show(SHOWN)
    backbone.quantize()
    assert backbone._fused is not None
    if not is_early:
        backbone.show(SHOWN)
    hidden = engine_of(backbone).hidden
    errors = []
    for path, found in hidden.items():
        expected = of_layers(model, path)
        errors.append((found[: len(expected)] - expected).norm() / expected.norm())
    assert 1e-4 < torch.stack(errors).median() < 0.06


@pytest.mark.usefixtures("threads")
def test_a_fused_models_inner_states_are_bitwise_what_they_are_alone() -> None:
    backbone = Backbone(tiny("llama", **WIDE))
    backbone.quantize()
    backbone.show(SHOWN)
    alone = OneByOne(backbone)
    for path, hidden in engine_of(backbone).hidden.items():
        assert torch.equal(hidden, alone(path)[1])


def test_int8_layers_of_other_models_show_them() -> None:
    model = tiny("gpt2", n_layer=4)
    backbone = Backbone(copy.deepcopy(model))
    backbone.quantize()
    backbone.show(SHOWN)
    found = engine_of(backbone).hidden[(5, 6, 7)]
    expected = of_layers(model, (5, 6, 7))
    assert (found[: len(expected)] - expected).norm() < 0.06 * expected.norm()


def test_layers_can_be_hidden_again() -> None:
    for is_fused in (False, True):
        backbone = Backbone(tiny("llama", **WIDE))
        if is_fused:
            backbone.quantize()
        expected = dict(run(backbone))
        backbone.show(SHOWN)
        backbone.show(())
        assert all(torch.equal(logits, expected[path]) for path, logits in run(backbone))
        assert engine_of(backbone).hidden[(5, 6)].shape == (64,)


def test_layers_that_are_not_there_are_refused() -> None:
    backbone = Backbone(tiny("llama"))
    with pytest.raises(BackboneError, match="look at the layers 0, 2 of a model that has 2"):
        backbone.show((0, 2))
    with pytest.raises(BackboneError, match="not as wide as its last one"):
        Backbone(tiny("opt")).show((0,))
    with pytest.raises(BackboneError, match="use its own heads"):
        Backbone(small_mtp()).show((0,))
    with pytest.raises(InnerLayersError, match="give heads"):
        check_layers((-1,), 2)
    with pytest.raises(InnerLayersError, match="keeps no list"):
        decoder_layers(nn.Linear(1, 1), 2)


def test_low_and_middle_layers() -> None:
    assert [low_and_middle(count) for count in (3, 4, 12, 30)] == [(0, 1), (0, 1), (1, 5), (3, 14)]
    with pytest.raises(InnerLayersError, match="give --features last"):
        low_and_middle(2)


def test_nothing_is_listened_to_after_close() -> None:
    model = tiny("llama")
    states = InnerStates(model, 2, (0, 1, 0))
    states.close()
    assert not any(module._forward_hooks for module in model.modules())


def test_normed_inner_states_have_an_rms_of_one() -> None:
    torch.manual_seed(0)
    hidden = torch.cat([1e5 * torch.randn(4, 16), torch.randn(4, 16), 3 * torch.randn(4, 16)], dim=1)
    low, middle, last = normed(hidden, 2).split(16, dim=1)
    for found, given in ((low, hidden[:, :16]), (middle, hidden[:, 16:32])):
        torch.testing.assert_close(found, given / given.square().mean(1, keepdim=True).sqrt())
    assert torch.equal(last, hidden[:, 32:])
    assert torch.equal(normed(last, 0), last)
    torch.testing.assert_close(normed(normed(hidden, 2), 2), normed(hidden, 2))
    assert normed(hidden.to(CPU, torch.bfloat16), 2).dtype == torch.bfloat16
