"""Tiny random models of the common shape (`models.fused`)."""

from __future__ import annotations

from typing import Any

import torch
from stepping import BASE, WINDOW, tiny
from transformers import PreTrainedModel

COMMON = BASE | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_hidden_layers": 3}
WIDE = COMMON | {"hidden_size": 288, "num_hidden_layers": 2, "initializer_range": 0.03}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16}
FUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", COMMON),
    "llama bias": ("llama", COMMON | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "llama tied": ("llama", COMMON | {"tie_word_embeddings": True, "head_dim": 64, "num_key_value_heads": 1}),
    "llama 3": ("llama", COMMON | {"rope_parameters": LLAMA3 | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}}),
    "llama yarn": ("llama", COMMON | {"rope_parameters": LLAMA3 | {"rope_type": "yarn"}, "head_dim": 96}),
    "llama linear": ("llama", COMMON | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "mistral": ("mistral", COMMON | WINDOW),
    "qwen2": ("qwen2", COMMON),
    "qwen2 window": ("qwen2", COMMON | WINDOW | {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("qwen3", COMMON | {"head_dim": 64}),
    "smollm3": ("smollm3", COMMON | {"no_rope_layers": [1, 0, 1]}),
    "9 heads": (
        "llama",
        WIDE | {"num_attention_heads": 9, "num_key_value_heads": 3},
    ),
}


def common(name: str) -> PreTrainedModel:
    """With norms and biases that matter, too."""
    model_type, options = FUSED[name]
    model = tiny(model_type, **options)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model
