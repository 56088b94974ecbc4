"""Log-probabilities of given tokens, by the model's own logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from server.engine.messages import TokenLogprobs


def score(logits: Tensor, tokens: Sequence[int], count: int, *, ranked: bool = False) -> tuple[TokenLogprobs, ...]:
    """logits: [tokens, vocab], raw. The log-probability of each token, and of the `count` likeliest.

    With `ranked` each token is told its rank, too; of equals, all have the best.
    """
    if not tokens:
        return ()
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(-1, torch.tensor(tokens, device=logits.device).unsqueeze(-1))  # [tokens, 1]
    values, ids = logprobs.topk(min(count, logprobs.shape[-1]), dim=-1)
    tops = [tuple(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    ranks = ((logprobs > own).sum(-1) + 1).tolist() if ranked else [None] * len(tokens)
    return tuple(TokenLogprobs(*entry) for entry in zip(tokens, own.flatten().tolist(), tops, ranks, strict=True))
