"""Every architecture, tiny and random: our steps against plain transformers forwards of each path from the root."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stepping import CPU, GPT2, MODELS, WINDOW, plain, relative_errors, run, tiny
from transformers import GPT2Config, GPT2LMHeadModel

from models.backbone import Backbone, BackboneError
from models.batch import Segment, build_batch
from models.kv_pool import KVPool

IMPORT_WARNS = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
NAMES = [pytest.param(n, marks=IMPORT_WARNS) if n == "gpt_bigcode" else n for n in MODELS]


@pytest.mark.parametrize("name", NAMES)
def test_steps_equal_plain_forwards(name: str) -> None:
    model = tiny(name)
    expected = plain(model)
    for path, logits in run(Backbone(model)):
        torch.testing.assert_close(logits, expected(path), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "gpt2"])
def test_bfloat16(name: str) -> None:
    model = tiny(name).bfloat16()
    assert relative_errors(plain(model), run(Backbone(model))).median() < 0.03  # a row may go to another expert


@pytest.mark.parametrize("name", NAMES)
def test_every_model_runs_in_int8(name: str) -> None:
    model = tiny(name)
    expected = plain(model)
    backbone = Backbone(model)
    backbone.quantize()
    assert (backbone.quantization, backbone.kv_dtype) == ("int8", torch.float16)
    errors = relative_errors(expected, run(backbone))
    assert 1e-4 < errors.median() < 0.08  # a row may go to another expert


def test_hidden_is_what_enters_the_output_embedding() -> None:
    backbone = Backbone(tiny("cohere"))
    slots = torch.tensor([3, 1, 2])
    batch = build_batch([Segment(3, slots[:0], 3, ())], torch.arange(3), slots, CPU)
    pool = KVPool(backbone.kv_shapes, 3, dtype=torch.float32, device=CPU)
    logits, hidden = backbone.forward(torch.tensor([7, 8, 9]), batch, pool, torch.tensor([2, 0]))
    assert logits.shape == (2, 97)
    torch.testing.assert_close(hidden @ backbone.lm_head_weight.T * 0.3, logits)  # Cohere scales its logits


def test_no_logits_at_all() -> None:
    backbone = Backbone(tiny("llama"))
    slots = torch.tensor([3, 1, 2])
    batch = build_batch([Segment(3, slots[:0], 3, ())], torch.arange(3), slots, CPU)
    pool = KVPool(backbone.kv_shapes, 3, dtype=torch.float32, device=CPU)
    logits, hidden = backbone.forward(torch.tensor([7, 8, 9]), batch, pool, torch.empty(0, dtype=torch.int64))
    assert (logits.shape, hidden.shape) == ((0, 97), (0, 32))


def test_several_backbones_side_by_side() -> None:
    models = [tiny("llama", seed=1), tiny("llama", seed=2), tiny("mistral")]
    expected = [plain(model) for model in models]
    runs = [run(backbone, seed) for seed, backbone in enumerate([Backbone(model) for model in models])]
    for steps in zip(*runs, strict=True):
        for oracle, (path, logits) in zip(expected, steps, strict=True):
            torch.testing.assert_close(logits, oracle(path), atol=2e-5, rtol=1e-4)


def test_facts() -> None:
    backbone = Backbone(tiny("deepseek_v3", eos_token_id=[2, 5]))
    assert (backbone.vocab_size, backbone.hidden_size, backbone.num_layers) == (97, 32, 2)
    assert backbone.kv_shapes == [(4, 16, 12)] * 2
    assert backbone.lm_head_weight.shape == (97, 32)
    assert backbone.max_position_embeddings == 64
    assert backbone.eos_token_ids == (2, 5)
    assert Backbone(tiny("llama", eos_token_id=None)).eos_token_ids == ()


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 64),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 64),
        (
            {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
            | {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
            16,
        ),
    ],
)
def test_sequences_stay_where_rotary_embeddings_do_not_depend_on_the_batch(rope: dict[str, Any], limit: int) -> None:
    assert Backbone(tiny("llama", rope_parameters=rope)).max_position_embeddings == limit


HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 16}
SHARED = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.0] * 4,
}
TRAPS = {
    "shared keys and values": ("gemma3n_text", SHARED, "Gemma3nForCausalLM .* layers share keys and values"),
    "bloom": ("bloom", {"n_head": 4}, "BloomForCausalLM .* its attention is its own code"),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}, "MptForCausalLM .* its attention is its own code"),
    "gptj": ("gptj", GPT2 | {"rotary_dim": 4}, "GPTJForCausalLM .* its attention is its own code"),
    "mamba": ("mamba", {"state_size": 4}, "MambaForCausalLM .* 2 layers call the attention function 0 times"),
    "linear attention": ("qwen3_next", HYBRID, "Qwen3NextForCausalLM .* call the attention function 1 times"),
    "state beside attention": ("falcon_h1", MAMBA, "FalconH1ForCausalLM .* in steps its logits differ"),
    "chunked attention": ("llama4_text", {"attention_chunk_size": 6}, "Llama4ForCausalLM .* see each other"),
    "encoder": ("bert", {}, "BertLMHeadModel .* which tokens see each other"),
    "window without a word": (
        "qwen2_moe",
        WINDOW | {"use_sliding_window": True, "max_window_layers": 2, "moe_intermediate_size": 16, "num_experts": 4},
        "Qwen2MoeForCausalLM .* see each other",
    ),
    "unknown option": ("deepseek_v32", {}, "DeepseekV32ForCausalLM .* takes indices"),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_traps_are_refused(trap: str) -> None:
    name, options, message = TRAPS[trap]
    with pytest.raises(BackboneError, match=message):
        Backbone(tiny(name, **options))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path)
    return tmp_path


def load(path: Path, dtype: torch.dtype = torch.float32) -> Backbone:
    return Backbone.load(path, dtype=dtype, device=CPU)


def change_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def test_load(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    backbone = load(folder)
    expected = plain(tiny("llama"))
    for path, logits in run(backbone):
        torch.testing.assert_close(logits, expected(path), atol=2e-5, rtol=1e-4)
    assert backbone.eos_token_ids == (2,)
    assert capfd.readouterr() == ("", "")
    assert load(folder, torch.bfloat16).lm_head_weight.dtype == torch.bfloat16


def test_generation_config_has_the_first_word_on_eos(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert load(folder).eos_token_ids == (3, 4)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"is not a model folder: it has no config\.json"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "hal9000"}, "hal9000"),
        ({"model_type": "t5"}, "t5 is an encoder-decoder model"),
        ({"model_type": "bloom"}, "BloomForCausalLM .* its attention is its own code"),
        ({"model_type": "vit"}, "vit is not a causal language model"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized and cannot be read here"),
        ({"num_attention_heads": "many"}, "num_attention_heads"),
    ],
)
def test_refused_before_weights_are_read(folder: Path, changes: dict[str, Any], message: str) -> None:
    (folder / "model.safetensors").unlink()
    change_config(folder, **changes)
    with pytest.raises(BackboneError, match=message):
        load(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BackboneError, match=r"The weights in .* cannot be read"):
        load(folder)


def test_broken_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not a header")
    with pytest.raises(BackboneError, match=r"The weights in .* cannot be read"):
        load(folder)


def test_missing_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"1 missing keys, the first is model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)


def test_weight_of_another_shape(folder: Path) -> None:
    change_config(folder, intermediate_size=40)
    with pytest.raises(BackboneError, match="6 mismatched keys"):
        load(folder)


def test_end_tokens_outside_the_vocabulary_are_dropped() -> None:
    """Small configurations keep GPT-2's 50256; nothing could ever draw it."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, eos_token_id=[3, 50256]))
    assert Backbone(model).eos_token_ids == (3,)
