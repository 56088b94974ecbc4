"""A small GGUF file, written here, as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from models.gguf import UnknownFormatError, byte_level_tokenizer, convert, read_metadata

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|unk|>", "<|start|>", "<|end|>", *ALPHABET, "12", "▁"]
TYPES = [3, 3, 3, *[1] * len(ALPHABET), 1, 4]
TEMPLATE = "{{ messages[0].content }}"
CONFIG = LlamaConfig(
    vocab_size=len(TOKENS),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of rotary dimensions: pairs side by side."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path, model: LlamaForCausalLM) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_freq_base(CONFIG.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types(TYPES)
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(1)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    for layer in range(CONFIG.num_hidden_layers):
        for ours, theirs in NAMES.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            heads = {"attn_q": CONFIG.num_attention_heads, "attn_k": CONFIG.num_key_value_heads}.get(theirs)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", weight if heads is None else interleaved(weight, heads))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


@pytest.fixture(scope="module")
def folder(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("converted")
    convert(write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model), target)
    return target


def test_the_converted_model_computes_the_same(model: LlamaForCausalLM, folder: Path) -> None:
    converted = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(converted(ids).logits, model(ids).logits)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_every_end_token_ends_a_text(folder: Path) -> None:
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, [1, 2])
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 2


def test_the_converted_tokenizer_has_the_files_special_tokens_and_template(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<|start|>", "<|end|>", "<|unk|>")
    assert tokenizer.chat_template == TEMPLATE
    text = "a▁b <|end|>12 €"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == "a▁b 12 €"


def tokenizer_of(pre: str, **more: Any) -> Tokenizer:
    metadata = {"tokens": TOKENS, "token_type": TYPES, "merges": ["1 2"], "pre": pre, "bos_token_id": 1, **more}
    return byte_level_tokenizer({f"tokenizer.ggml.{key}": value for key, value in metadata.items()})


@pytest.mark.parametrize(
    ("pre", "tokens"),
    [
        ("smollm", ["1", "2", "Ġ", "1"]),
        ("gpt-2", ["12", "Ġ", "1"]),
        ("llama-bpe", ["12", "Ġ", "1"]),
        ("qwen2", ["1", "2", "Ġ", "1"]),
    ],
)
def test_digits_are_split_as_the_file_says(pre: str, tokens: list[str]) -> None:
    assert tokenizer_of(pre).encode("12 1").tokens == tokens


def test_a_begin_token_is_added_where_the_file_says() -> None:
    assert tokenizer_of("llama-bpe", add_bos_token=True).encode("a").tokens == ["<|start|>", "a"]


def test_an_unknown_kind_of_tokenizer_is_refused() -> None:
    with pytest.raises(UnknownFormatError, match="'tekken' is not known here: serve the model's original folder"):
        tokenizer_of("tekken")


def test_metadata_holds_arrays_and_scalars(model: LlamaForCausalLM, tmp_path: Path) -> None:
    metadata = read_metadata(write_gguf(tmp_path / "tiny.gguf", model))
    assert metadata["tokenizer.ggml.tokens"] == TOKENS
    assert metadata["llama.block_count"] == 2
