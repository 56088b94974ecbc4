"""How well a multi-token model's extra heads guess what the model itself says: on text that it writes greedily.

Invariant: the model is left as it was; it is measured in a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from models.backbone import Backbone
from models.drafters.mtp import MTPHeads, own_heads
from models.mtp import MTPForCausalLM
from models.train.acceptance import Text, rank_text
from models.train.self_speculation import Decoded, SelfSpeculation, chain

_TOKENS_PER_FORWARD = 8192


def backbone_of(model: MTPForCausalLM) -> tuple[Backbone, MTPHeads | None]:
    """A copy of `model` as our engine runs it."""
    backbone = Backbone(copy.deepcopy(model))
    return backbone, own_heads(backbone)


def write_text(model: MTPForCausalLM, prompts: Sequence[Sequence[int]], num_tokens: int) -> Decoded:
    """The model's greedy continuations, drafted with all of its heads as a chain."""
    backbone, heads = backbone_of(model)
    count = 0 if heads is None else heads.num_heads
    return SelfSpeculation(backbone, heads).decode(prompts, num_tokens, chain(count), count)


@torch.inference_mode()
def rank_continuations(
    model: MTPForCausalLM, prompts: Sequence[Sequence[int]], said: Sequence[Sequence[int]]
) -> list[Text]:
    """Ranks under each extra head of the tokens of `said`, which continue `prompts`; all of equal length."""
    _, heads = backbone_of(model)
    if heads is None:
        return []
    tokens = torch.tensor([[*before, *after] for before, after in zip(prompts, said, strict=True)])
    counts: NDArray[np.bool_] = np.arange(tokens.shape[1]) >= len(prompts[0])
    texts: list[Text] = []
    for part in torch.split(tokens, max(1, _TOKENS_PER_FORWARD // tokens.shape[1])):
        states = model.eval()(part.to(model.device), use_cache=False).head_states.flatten(2)  # [batch, tokens, ...]
        for row, hidden in zip(part, states, strict=True):
            texts += rank_text(heads, hidden, row.numpy(), counts)
    return texts
