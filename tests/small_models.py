"""Tiny random models of the common shape, for tests that need a real one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from models.kernels import reference
from models.mtp import MTPConfig, MTPForCausalLM


def small_llama(*, seed: int = 0, **sizes: object) -> LlamaForCausalLM:
    """Two layers, 64 tokens; weights large enough for outputs that differ. `sizes` are LlamaConfig's."""
    torch.manual_seed(seed)
    usual = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**(usual | sizes))).eval()


def small_mtp(*, num_future_tokens: int = 4, seed: int = 0, **sizes: object) -> MTPForCausalLM:
    """A trunk of one layer and so many heads, 64 tokens; `sizes` are MTPConfig's."""
    torch.manual_seed(seed)
    usual = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": num_future_tokens + 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    return MTPForCausalLM(MTPConfig(**(usual | {"num_future_tokens": num_future_tokens} | sizes))).eval()


def four_bits(weight: Tensor) -> Tensor:
    """A weight [outputs, inputs] near this one that four bits hold."""
    restored = reference.restored_int4(*reference.quantize_weight_int4(weight)).flatten(1)
    return restored[:, : weight.shape[1]].contiguous()


def four_bit_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Give every linear layer but the output embedding weights that four bits hold."""
    for module in model.modules():
        if type(module) is nn.Linear and module is not model.get_output_embeddings():
            module.weight.data = four_bits(module.weight.data)
    return model
