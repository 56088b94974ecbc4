"""int8 or int4 weights for the linear layers of a model that is not of the common shape (see `models.fused`), on a CPU."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from models.kernels.cpu import PackedLinear


class NarrowLinear(nn.Module):
    """`nn.Linear` with int8 or int4 weights: [..., inputs] -> [..., outputs]."""

    def __init__(self, linear: nn.Linear, bits: int = 8) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._packed = PackedLinear(linear.weight, linear.bias, bits)

    def forward(self, x: Tensor) -> Tensor:
        return self._packed(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)


def quantize_linears(model: PreTrainedModel, bits: int = 8) -> None:
    """Replace every `nn.Linear` of `model`, float32 on a CPU, by a `NarrowLinear` of `bits`, the output embedding's of 8."""
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, NarrowLinear(module, 8 if module is head else bits))
