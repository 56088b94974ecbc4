"""A multi-token model's own heads as its drafter: `resblock.ResBlockHeads` once more, for `models.mtp`.

The heads themselves are layers and have run in the model's forward, on the row drafted from and on all before it; here
their states only pass the model's unembedding.

Invariant: int8 if the model is, since the unembedding is the model's own module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.drafters.resblock import Accuracies
from models.mtp import MTPConfig

if TYPE_CHECKING:
    from models.backbone import Backbone


class MTPHeads:
    """What is kept of a row is the states of all extra heads, one after another: [heads * hidden]."""

    def __init__(
        self, unembedding: nn.Module, token_ids: Tensor, num_heads: int, accuracies: Accuracies | None
    ) -> None:
        self.num_heads, self.token_ids, self.accuracies = num_heads, token_ids, accuracies
        self._unembedding = unembedding

    def __call__(self, hidden: Tensor) -> Tensor:
        """[batch, heads * hidden], as `Backbone.forward` returns it -> [batch, heads, vocab] logits."""
        logits: Tensor = self._unembedding(hidden.view(len(hidden), self.num_heads, -1))
        return logits


def own_heads(backbone: Backbone) -> MTPHeads | None:
    """The heads that the model was trained with, once it is quantised if it will be; None if it has none."""
    config = backbone.config
    if not isinstance(config, MTPConfig) or not config.num_extra_heads:
        return None
    accuracies = None if config.head_accuracies is None else tuple(map(tuple, config.head_accuracies))
    token_ids = torch.arange(backbone.vocab_size, device=backbone.lm_head_weight.device)
    return MTPHeads(backbone.unembedding, token_ids, config.num_extra_heads, accuracies)
