"""Low-rank adapters (Hu et al., arXiv 2106.09685) on the linear layers of a transformers model.

    y = W x + alpha / rank * B A dropout(x),   B starts at zero

Invariants:
- switched off, or fresh, the model says bit for bit what it said before;
- the output embedding has no adapter: Medusa's heads share it, and tied models have only one matrix for both ends;
- after `merge` the model has its own layers again and nothing of this module in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear
from transformers import PreTrainedModel

from models.train.trunk import TrunkError


class LoRALinear(nn.Module):
    """A frozen linear layer and its adapter, whose weights are float32."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.scale, self.dropout, self.is_on = alpha / rank, dropout, True
        device = base.weight.device
        self.a = nn.Parameter(torch.empty(rank, base.in_features, dtype=torch.float32, device=device))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    @property
    def weight(self) -> Tensor:
        """The frozen layer's: models look at dtype and device of their layers."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        y: Tensor = self.base(x)
        if not self.is_on:
            return y
        low = linear(dropout(x, self.dropout, self.training), self.a.to(x.dtype))  # [..., rank]
        return y + self.scale * linear(low, self.b.to(x.dtype))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The layer alone, with the adapter's product added to its weight."""
        weight = self.base.weight
        weight.copy_((weight.float() + self.scale * (self.b @ self.a)).to(weight.dtype))
        return self.base


def add_lora(model: PreTrainedModel, rank: int, alpha: float, dropout: float, seed: int) -> dict[str, LoRALinear]:
    """Put an adapter on every linear layer but the output embedding; they are returned by their layers' names.

    Raises TrunkError if the model has no such layers.
    """
    head = model.get_output_embeddings()
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear and layer is not head}
    if not layers:
        raise TrunkError("This model has no linear layers of torch's own class, so --joint cannot adapt it.")
    torch.manual_seed(seed)
    adapters = {name: LoRALinear(layer, rank, alpha, dropout) for name, layer in layers.items()}
    for name, adapter in adapters.items():
        model.set_submodule(name, adapter)
    return adapters


@contextmanager
def switched_off(adapters: Sequence[LoRALinear]) -> Iterator[None]:
    """The model as it was."""
    for adapter in adapters:
        adapter.is_on = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.is_on = True


def merge(model: PreTrainedModel, adapters: dict[str, LoRALinear]) -> None:
    """Add all adapters to their layers' weights and take them out."""
    for name, adapter in adapters.items():
        model.set_submodule(name, adapter.merged())
