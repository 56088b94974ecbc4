"""Every architecture, tiny and random: our steps against plain transformers forwards of each path from the root."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from models.backbone import Backbone, BackboneError
from models.batch import Segment, build_batch
from models.kv_pool import KVPool

TokenPath = tuple[int, ...]  # token ids from the start of a sequence
CPU = torch.device("cpu")
BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"sliding_window": 6}
GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 97,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GEMMA = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", BASE),
    "llama-mha-bias": ("llama", BASE | {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", BASE | WINDOW),
    "mixtral": ("mixtral", BASE | WINDOW | EXPERTS),
    "qwen2": ("qwen2", BASE),
    "qwen2-window": ("qwen2", BASE | WINDOW | {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("qwen3", BASE),
    "qwen3_moe": ("qwen3_moe", BASE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "gemma2": ("gemma2", BASE | GEMMA | {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 30.0}),
    "gemma3_text": ("gemma3_text", BASE | GEMMA),
    "phi": ("phi", BASE | {"partial_rotary_factor": 0.5, "num_key_value_heads": 4}),
    "phi3": ("phi3", BASE | WINDOW),
    "gpt_neox": ("gpt_neox", BASE | {"rotary_pct": 0.5}),
    "gpt2": ("gpt2", GPT2),
    "gpt_bigcode": ("gpt_bigcode", GPT2 | {"multi_query": True}),
    "opt": ("opt", BASE | {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "stablelm": ("stablelm", BASE | {"partial_rotary_factor": 0.5}),
    "smollm3": ("smollm3", BASE | {"no_rope_layers": [1, 0]}),
    "olmo2": ("olmo2", BASE),
    "granite": ("granite", BASE | {"attention_multiplier": 0.2, "logits_scaling": 3.0, "residual_multiplier": 0.5}),
    "cohere": ("cohere", BASE | {"logit_scale": 0.3}),
    "cohere2": ("cohere2", BASE | GEMMA | {"logit_scale": 0.3}),
    "starcoder2": ("starcoder2", BASE | WINDOW),
    "gpt_oss": ("gpt_oss", BASE | EXPERTS | {"sliding_window": 6, "layer_types": GEMMA["layer_types"]}),
    "deepseek_v3": (
        "deepseek_v3",
        BASE
        | {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
        }
        | {"v_head_dim": 12, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16, "first_k_dense_replace": 1},
    ),
}


def tiny(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model whose attention matters: weights ten times as large as at the start of training."""
    model_type, options = MODELS.get(name, (name, BASE))
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **options | {"initializer_range": 0.2, "use_cache": False} | changes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@dataclass
class Plain:
    """The oracle: transformers by itself."""

    model: PreTrainedModel
    known: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @torch.inference_mode()
    def __call__(self, path: tuple[int, ...]) -> Tensor:
        """The logits after the last token of `path`: [vocab]."""
        if path not in self.known:
            logits = self.model(input_ids=torch.tensor([path]), use_cache=False).logits[0].float()
            self.known |= {path[: n + 1]: row for n, row in enumerate(logits)}
        return self.known[path]


def plain(model: PreTrainedModel) -> Plain:
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    return Plain(model)


@dataclass
class Request:
    """A sequence, and the slots of its computed tokens."""

    tokens: list[int]
    slots: list[int] = field(default_factory=list)

    def rows(self, chain: int, parents: tuple[int, ...], source: random.Random) -> list[TokenPath]:
        """The path from the start of the sequence to each row of the next step."""
        start = len(self.slots)
        while len(self.tokens) < start + chain:
            self.tokens.append(source.randrange(97))
        paths = [tuple(self.tokens[: start + n + 1]) for n in range(chain)]
        for parent in parents:
            paths.append((*paths[chain - 1 if parent < 0 else chain + parent], source.randrange(97)))
        return paths

    def commit(self, path: TokenPath, slot_of: dict[TokenPath, int], used: list[int]) -> list[int]:
        """Keep `path`: its slots are now the sequence's. Returns the slots that are free again."""
        self.slots += [slot_of[path[: n + 1]] for n in range(len(self.slots), len(path))]
        self.tokens[: len(path)] = path
        return [slot for slot in used if slot not in self.slots]


class Engine:
    """Steps of chains and trees with slots in no order."""

    def __init__(self, backbone: Backbone, num_slots: int = 300, seed: int = 0) -> None:
        self.backbone = backbone
        self.random = random.Random(seed)
        self.free = self.random.sample(range(1, num_slots + 1), num_slots)
        self.pool = KVPool(backbone.kv_shapes, num_slots, dtype=backbone.lm_head_weight.dtype, device=CPU)

    def step(self, work: list[tuple[Request, int, tuple[int, ...]]]) -> list[tuple[TokenPath, Tensor]]:
        """Run (request, chain length, parents of nodes), nodes being random guesses: path and logits of every row.

        Then the path to the last node of each tree is committed, and the slots of the others are given back.
        """
        own = [request.rows(chain, parents, self.random) for request, chain, parents in work]
        own_slots = [[self.free.pop() for _ in paths] for paths in own]
        segments = [
            Segment(len(paths), torch.tensor(request.slots, dtype=torch.int64), chain, parents)
            for (request, chain, parents), paths in zip(work, own, strict=True)
        ]
        paths = [path for some in own for path in some]
        positions = torch.tensor([len(path) - 1 for path in paths])
        batch = build_batch(segments, positions, torch.tensor([slot for some in own_slots for slot in some]), CPU)
        tokens = torch.tensor([path[-1] for path in paths])
        logits, hidden = self.backbone.forward(tokens, batch, self.pool, torch.arange(len(paths)))
        assert logits.shape == (len(paths), self.backbone.vocab_size)
        assert logits.dtype == torch.float32
        assert hidden.shape == (len(paths), self.backbone.hidden_size)
        for (request, *_), its_paths, its_slots in zip(work, own, own_slots, strict=True):
            self.free += request.commit(its_paths[-1], dict(zip(its_paths, its_slots, strict=True)), its_slots)
        return list(zip(paths, logits, strict=True))


TREES = [(-1, -1, 0, 0, 2), (), (-1, 0, 1, 2, 3, -1, -1), (-1,), (-1, -1, -1, 1, 3, 3)]


def run(backbone: Backbone, seed: int = 0) -> Iterator[tuple[TokenPath, Tensor]]:
    """Three requests: prompts in chunks, chunk and tree in one step, then trees of all sizes on committed paths."""
    engine = Engine(backbone, seed=seed)
    a, b, c = (Request([engine.random.randrange(97) for _ in range(n)]) for n in (19, 11, 7))
    yield from engine.step([(a, 9, ()), (b, 10, ())])
    yield from engine.step([(c, 7, ()), (b, 1, TREES[0]), (a, 10, ())])
    for trees in zip(TREES, TREES[1:] + TREES[:1], TREES[2:] + TREES[:2], strict=True):
        yield from engine.step([(request, 1, tree) for request, tree in zip((a, b, c), trees, strict=True)])


IMPORT_WARNS = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


@pytest.mark.parametrize("name", [pytest.param(n, marks=IMPORT_WARNS) if n == "gpt_bigcode" else n for n in MODELS])
def test_steps_equal_plain_forwards(name: str) -> None:
    model = tiny(name)
    expected = plain(model)
    for path, logits in run(Backbone(model)):
        torch.testing.assert_close(logits, expected(path), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "gpt2"])
def test_bfloat16(name: str) -> None:
    model = tiny(name).bfloat16()
    expected = plain(model)
    errors = [(logits - expected(path)).norm() / expected(path).norm() for path, logits in run(Backbone(model))]
    assert torch.stack(errors).median() < 0.03  # a row may go to another expert


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
