"""The multi-token model against plain Llama, through transformers, disk, cache and our pool."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from models.backbone import Backbone
from models.mtp import MTPConfig, MTPForCausalLM, without_extra_heads
from tests.models.stepping import Engine, run, run_engine
from tests.small_models import small_mtp

TOKENS = torch.arange(2, 20)[None] * 3 % 64


def as_llama(model: MTPForCausalLM, head: int) -> LlamaForCausalLM:
    """The trunk with one head on top, as transformers' own Llama."""
    config, state = model.config, model.state_dict()
    trunk = len(model.model.layers) - 1
    sizes = {key: value for key, value in config.to_dict().items() if key in LlamaConfig().to_dict()}
    llama = LlamaForCausalLM(LlamaConfig(**(sizes | {"num_hidden_layers": trunk + 1})))
    top = f"model.layers.{trunk}." if head == 0 else f"model.extra_heads.{head - 1}."
    kept = {
        name: value for name, value in state.items() if not name.startswith(("model.extra", f"model.layers.{trunk}."))
    }
    kept |= {name.replace(top, f"model.layers.{trunk}."): state[name] for name in state if name.startswith(top)}
    llama.load_state_dict(kept)
    return llama.eval()


def every_head(model: MTPForCausalLM, tokens: Tensor) -> Tensor:
    """Logits of all heads: [heads, tokens, vocab]."""
    out = model(tokens, use_cache=False)
    extra = model.lm_head(out.head_states)[0].transpose(0, 1)
    return torch.cat([out.logits, extra])


@pytest.mark.parametrize("tied", [False, True])
@torch.inference_mode()
def test_each_head_is_a_llama_on_the_shared_trunk(tied: bool) -> None:
    model = small_mtp(tie_word_embeddings=tied, num_hidden_layers=6)
    assert (len(model.model.layers), len(model.model.extra_heads)) == (3, 3)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    logits = every_head(model, TOKENS)
    for head in range(4):
        torch.testing.assert_close(logits[head], as_llama(model, head)(TOKENS).logits[0])


def test_more_heads_are_fewer_trunk_layers_and_as_many_parameters() -> None:
    counts = {small_mtp(num_future_tokens=n, num_hidden_layers=6).num_parameters() for n in (1, 2, 6)}
    assert len(counts) == 1


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_by_the_auto_classes(tied: bool, tmp_path: Path) -> None:
    model = small_mtp(tie_word_embeddings=tied)
    model.config.head_accuracies = [[0.5, 0.25], [0.4, 0.1], [0.3, 0.1]]
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).head_accuracies == model.config.head_accuracies
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(every_head(loaded, TOKENS), every_head(model, TOKENS))


@torch.inference_mode()
def test_a_cache_of_all_layers_changes_nothing() -> None:
    model = small_mtp()
    whole = every_head(model, TOKENS)
    first = model(TOKENS[:, :7])
    rest = model(TOKENS[:, 7:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1)[0], whole[0])
    states = torch.cat([first.head_states, rest.head_states], 1)
    torch.testing.assert_close(model.lm_head(states)[0].transpose(0, 1), whole[1:])


@pytest.mark.parametrize("int8", [False, True])
def test_our_pool_holds_the_heads_layers_too(int8: bool) -> None:
    """Chunks, chains and trees: logits and the extra heads' states are those of the whole sequence."""
    model = small_mtp(vocab_size=97, max_position_embeddings=64)
    backbone = Backbone(small_mtp(vocab_size=97, max_position_embeddings=64))
    assert backbone.num_layers == 5
    if int8:
        backbone.quantize()
    tolerance = 0.2 if int8 else 1e-4
    engine = Engine(backbone)
    for path, logits in run_engine(engine):
        with torch.inference_mode():
            out = model(torch.tensor([path]), use_cache=False)
        assert (logits - out.logits[0, -1]).norm() < tolerance * out.logits[0, -1].norm()
        expected = out.head_states[0, -1].flatten()
        assert (engine.hidden[path] - expected).norm() < tolerance * expected.norm()


def test_without_extra_heads_they_are_not_even_read(tmp_path: Path) -> None:
    model = small_mtp(vocab_size=97, max_position_embeddings=64)
    model.save_pretrained(tmp_path)
    read = {"dtype": torch.float32, "device": torch.device("cpu")}
    alone = Backbone.load(tmp_path, **read, extra_heads=False)
    assert alone.num_layers == 2
    assert Backbone.load(tmp_path, **read).num_layers == 5
    for path, logits in run(alone):
        with torch.inference_mode():
            torch.testing.assert_close(logits, model(torch.tensor([path])).logits[0, -1])
    llama = LlamaConfig(num_hidden_layers=3)
    assert without_extra_heads(llama).num_hidden_layers == 3


@pytest.mark.parametrize("heads", [0, 4])
def test_there_are_as_many_layers_as_heads_at_least(heads: int) -> None:
    with pytest.raises(Exception, match="each head is one of the 3 layers"):
        MTPConfig(num_hidden_layers=3, num_future_tokens=heads)
