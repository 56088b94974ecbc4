"""Weights of eight or four bits for a model on a CPU: which it is given, and its linear layers where it is not of the
common shape (see `models.fused`). The output embedding has eight always."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.kernels.cpu import PACKED_AT_A_TIME, PackedLinear
from models.kernels.reference import is_int4

Quantization = Literal["int8", "int4"]


class NarrowLinear(nn.Module):
    """`nn.Linear` with int8 or int4 weights: [..., inputs] -> [..., outputs]."""

    def __init__(self, linear: nn.Linear, bits: int = 8) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = linear.in_features, linear.out_features, bits
        self._packed = PackedLinear(linear.weight, linear.bias, bits)

    def forward(self, x: Tensor) -> Tensor:
        return self._packed(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)


def default_quantization(model: PreTrainedModel) -> Quantization:
    """int4 if four bits hold every layer's weights as they are, as they do those of a GGUF file of Q4_1; else int8."""
    head = model.get_output_embeddings()
    weights = [module.weight for module in model.modules() if type(module) is nn.Linear and module is not head]
    parts = (part for weight in weights for part in torch.split(weight.detach(), PACKED_AT_A_TIME))
    return "int4" if weights and all(map(is_int4, parts)) else "int8"


def quantize_linears(model: PreTrainedModel, bits: int = 8) -> None:
    """Replace every `nn.Linear` of `model`, float32 on a CPU, by a `NarrowLinear` of `bits`."""
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, NarrowLinear(module, 8 if module is head else bits))
