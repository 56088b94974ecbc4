"""Small checkpoints in Meta's layout, written here, against the model that they are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from models.backbone import Backbone
from models.drafters.mtp import own_heads
from models.meta import MetaFormatError, convert, halves_from_pairs
from models.mtp import MTPConfig, MTPForCausalLM
from models.source import ModelSourceError, has_own_heads, read_config, resolve
from models.train.byte_tokenizer import byte_tokenizer
from tests.models.test_sentence_pieces import write_pieces
from tests.small_models import small_mtp

TOKENS = torch.arange(2, 20)[None] * 3 % 64
NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
}


def in_metas_words(model: MTPForCausalLM) -> dict[str, Tensor]:
    """The state dict under Meta's names, rotary pairs side by side."""
    state = {"rope.freqs": torch.zeros(4)}
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
        for part, count in heads.items():
            if part in name:
                rows, columns = tensor.shape
                tensor = tensor.view(count, 2, rows // count // 2, columns).transpose(1, 2).reshape(rows, columns)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        state[name.removeprefix("model.")] = tensor.clone()
    return state


def write_meta(folder: Path, model: MTPForCausalLM, **params: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    usual = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "n_future_tokens": config.num_future_tokens,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": -1,
    }
    (folder / "params.json").write_text(json.dumps(usual | params))
    torch.save(in_metas_words(model), folder / "consolidated.pth")
    write_pieces(folder / "tokenizer.model")
    return folder


def every_head(model: Any) -> Tensor:
    out = model(TOKENS, use_cache=False)
    return torch.cat([out.logits[:, :, None], model.lm_head(out.head_states)], dim=2)


@torch.inference_mode()
def test_all_heads_say_the_same_after_the_round_trip(tmp_path: Path) -> None:
    model = small_mtp(rms_norm_eps=1e-3)
    folder = resolve(str(write_meta(tmp_path / "7B_200B_4", model)), cache_dir=tmp_path / "cache")
    assert has_own_heads(read_config(folder))
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert isinstance(loaded, MTPForCausalLM)
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id) == (1, 2)
    assert loaded.config.max_position_embeddings == 4096
    assert torch.equal(every_head(loaded), every_head(model))
    assert AutoTokenizer.from_pretrained(folder)("a b")["input_ids"][0] == 1


def test_the_heads_become_the_drafter(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert(write_meta(tmp_path / "in", small_mtp()), tmp_path / "out")
    backbone = Backbone.load(tmp_path / "out", dtype=torch.float32, device=torch.device("cpu"))
    drafter = own_heads(backbone)
    assert drafter is not None
    assert drafter.num_heads == 3


def test_rotary_pairs_are_moved_as_metas_code_turns_them() -> None:
    """Attention scores by complex numbers on neighbouring pairs, and by transformers' halves on the moved rows."""
    generator = torch.Generator().manual_seed(0)
    heads, dim, hidden, length = 2, 8, 16, 5
    weights = [torch.randn(heads * dim, hidden, generator=generator) for _ in range(2)]
    x = torch.randn(length, hidden, generator=generator)
    frequencies = 1.0 / 10_000.0 ** (torch.arange(0, dim, 2) / dim)
    turns = torch.polar(torch.ones(length, dim // 2), torch.outer(torch.arange(length), frequencies))
    turned = []
    for weight in weights:
        pairs = torch.view_as_complex((x @ weight.T).view(length, heads, dim // 2, 2))
        turned.append(torch.view_as_real(pairs * turns[:, None]).flatten(2))
    metas = torch.einsum("ihd,jhd->hij", *turned)

    config = MTPConfig(hidden_size=hidden, num_attention_heads=heads, head_dim=dim)
    cos, sin = LlamaRotaryEmbedding(config=config)(x[None], torch.arange(length)[None])
    q, k = ((x @ halves_from_pairs(weight, heads).T).view(1, length, heads, dim).transpose(1, 2) for weight in weights)
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    torch.testing.assert_close((q @ k.mT)[0], metas)


def test_a_tokenizer_above_the_folder_is_found(tmp_path: Path) -> None:
    source = write_meta(tmp_path / "release" / "7B_1T_4", small_mtp())
    (source / "tokenizer.model").rename(source.parent / "tokenizer.model")
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_tokenizer_json_is_taken_as_it_is(tmp_path: Path) -> None:
    source = write_meta(tmp_path / "in", small_mtp(vocab_size=300))
    byte_tokenizer().save_pretrained(source)
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab")["input_ids"] == [97, 98]


def test_one_head_is_a_plain_llama(tmp_path: Path) -> None:
    model = small_mtp(num_future_tokens=1)
    folder = resolve(str(write_meta(tmp_path / "in", model, n_future_tokens=1)), cache_dir=tmp_path / "cache")
    assert not has_own_heads(read_config(folder))
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_another_checkpoint_is_converted_anew(tmp_path: Path) -> None:
    source = write_meta(tmp_path / "in", small_mtp())
    first = resolve(str(source), cache_dir=tmp_path / "cache")
    assert resolve(str(source), cache_dir=tmp_path / "cache") == first
    write_meta(source, small_mtp(), rope_theta=500_000.0)
    second = resolve(str(source), cache_dir=tmp_path / "cache")
    assert second != first
    assert read_config(second)["rope_parameters"]["rope_theta"] == 500_000.0


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"n_future_tokens": 2}, "n_future_tokens = 2, but the weights have 4"),
        ({"n_layers": 9}, "n_layers = 9, but the weights have 5"),
        ({"n_heads": 3}, "3 heads do not divide"),
        ({"n_heads": "four"}, "does not describe a model"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(tmp_path: Path, params: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MetaFormatError, match=sentence):
        convert(write_meta(tmp_path / "in", small_mtp(), **params), tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda state: state.pop("extra_heads.1.ffn_norm.weight"), "extra_heads.1.post_attention_layernorm"),
        (lambda state: state.pop("output.weight"), "lm_head.weight"),
        (lambda state: state.pop("tok_embeddings.weight"), "no matrix tok_embeddings"),
        (lambda state: state.update({"vision.weight": torch.zeros(2)}), "a tensor named vision.weight"),
        (lambda state: state.update({"norm.weight": torch.zeros(2)}), r"model.norm.weight has the shape \(2,\)"),
        (lambda state: state.update({"extra_heads.5.ffn_norm.weight": torch.zeros(32)}), "leaves some out"),
        (lambda state: state.update({"norm.weight": 3}), "holds no named tensors"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, change: Any, sentence: str) -> None:
    source = write_meta(tmp_path / "in", small_mtp())
    state = torch.load(source / "consolidated.pth", weights_only=True)
    change(state)
    torch.save(state, source / "consolidated.pth")
    with pytest.raises(MetaFormatError, match=sentence):
        convert(source, tmp_path)


class Malicious:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("this must not run",)


def test_a_pickle_with_code_is_refused_in_a_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = write_meta(tmp_path / "in", small_mtp())
    torch.save({"norm.weight": Malicious()}, source / "consolidated.pth")
    with pytest.raises(ModelSourceError, match=r"cannot be read as tensors.*fetch it again") as caught:
        resolve(str(source), cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert "must not run" not in capfd.readouterr().out
    (source / "consolidated.pth").rename(source / "consolidated.00.pth")
    (source / "consolidated.01.pth").touch()
    with pytest.raises(ModelSourceError, match="has 2 files"):
        resolve(str(source), cache_dir=tmp_path / "cache")


def test_without_a_tokenizer_there_is_no_model(tmp_path: Path) -> None:
    source = write_meta(tmp_path / "release" / "in", small_mtp())
    (source / "tokenizer.model").unlink()
    with pytest.raises(MetaFormatError, match=r"no tokenizer\.model"):
        convert(source, tmp_path)
