"""Medusa's heads with int8 weights, run by the C kernels: `resblock.ResBlockHeads` once more, for serving on a CPU.

Invariant: a row's logits are bitwise the same whatever rows are drafted for beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from models.drafters.resblock import ResBlockHeads, last_of
from models.inner import normed
from models.kernels.cpu import PackedLinear


class PackedHeads:
    """Takes what it needs of `heads`, float32 on a CPU, and answers as they do."""

    def __init__(self, heads: ResBlockHeads) -> None:
        self.num_heads, self.accuracies, self.token_ids = heads.num_heads, heads.accuracies, heads.token_ids
        self.inner_layers, self._hidden_size = heads.inner_layers, heads.hidden_size
        fusion = None if heads.fusion is None else heads.fusion - last_of(heads.fusion.T, len(heads.inner_layers))
        self._fusion = None if fusion is None else PackedLinear(fusion)  # the last state itself is added exactly
        weights, biases = heads.weight, heads.bias[:, :, 0]
        self._first = PackedLinear(weights[0].flatten(0, 1), biases[0].flatten())  # all heads see the same state
        self._others = [
            [PackedLinear(weight, bias) for weight, bias in zip(*layer, strict=True)]
            for layer in zip(weights[1:], biases[1:], strict=True)
        ]
        shared = heads.lm_head.dim() == 2
        self._lm_heads = [PackedLinear(rows) for rows in ([heads.lm_head] if shared else heads.lm_head)]

    def __call__(self, hidden: Tensor) -> Tensor:
        """[batch, (inner layers + 1) * hidden], as heads see it -> [batch, heads, draft_vocab] logits."""
        batch = len(hidden)
        if self._fusion is not None:
            last = hidden[:, -self._hidden_size :]
            hidden = last + self._fusion(normed(hidden, len(self.inner_layers)))
        first = self._first(hidden).view(batch, self.num_heads, -1).transpose(0, 1)
        states = hidden + silu(first)  # [heads, batch, hidden]
        for layer in self._others:
            states = torch.stack([x + silu(block(x)) for block, x in zip(layer, states, strict=True)])
        if len(self._lm_heads) == 1:
            logits = self._lm_heads[0](states.flatten(0, 1)).view(self.num_heads, batch, -1)
        else:
            logits = torch.stack([head(x) for head, x in zip(self._lm_heads, states, strict=True)])
        return logits.transpose(0, 1)
