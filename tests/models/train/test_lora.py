"""Adapters: what they add, what they leave, and that merging changes no logit."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from models.train.lora import LoRALinear, add_lora, merge, switched_off
from models.train.trunk import TrunkError
from tests.small_models import small_llama

TOKENS = torch.arange(2, 20)[None] * 3 % 64


def scramble(adapters: Iterable[LoRALinear]) -> None:
    generator = torch.Generator().manual_seed(1)
    for adapter in adapters:
        adapter.b.data.normal_(0, 0.1, generator=generator)


@pytest.mark.parametrize("tied", [False, True])
@torch.inference_mode()
def test_fresh_and_switched_off_the_model_is_what_it_was(tied: bool) -> None:
    model = small_llama(tie_word_embeddings=tied)
    before = model(TOKENS).logits
    adapters = add_lora(model, 4, 8.0, 0.0, seed=0)
    assert len(adapters) == 2 * 7  # of two layers; the LM head has none
    assert torch.equal(model(TOKENS).logits, before)
    scramble(adapters.values())
    assert not torch.allclose(model(TOKENS).logits, before, atol=0.1)
    with switched_off(list(adapters.values())):
        assert torch.equal(model(TOKENS).logits, before)


@torch.inference_mode()
def test_merged_says_what_unmerged_said() -> None:
    model = small_llama()
    names = set(model.state_dict())
    head = model.lm_head.weight.clone()
    adapters = add_lora(model, 4, 8.0, 0.5, seed=0)
    for adapter in adapters.values():
        adapter.eval()
    scramble(adapters.values())
    unmerged = model(TOKENS).logits
    merge(model, adapters)
    torch.testing.assert_close(model(TOKENS).logits, unmerged, atol=1e-4, rtol=1e-4)
    assert set(model.state_dict()) == names
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert torch.equal(model.lm_head.weight, head)


def test_the_product_is_scaled_and_dropout_is_before_it() -> None:
    base = nn.Linear(4, 3)
    adapter = LoRALinear(base, rank=2, alpha=6.0, dropout=0.5).eval()
    adapter.b.data.fill_(1.0)
    x = torch.randn(5, 4)
    torch.testing.assert_close(adapter(x), base(x) + 3.0 * (x @ adapter.a.T @ adapter.b.T))
    adapter.train()
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    torch.manual_seed(0)
    torch.testing.assert_close(adapter(x), base(x) + 3.0 * (dropped @ adapter.a.T @ adapter.b.T))


def test_only_the_adapters_learn() -> None:
    model = small_llama().requires_grad_(False)
    adapters = add_lora(model, 4, 8.0, 0.0, seed=0)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(learning) == 2 * len(adapters)


def test_a_model_of_other_layers_is_refused() -> None:
    with pytest.raises(TrunkError, match="no linear layers"):
        add_lora(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8)), 4, 8.0, 0.0, seed=0)
