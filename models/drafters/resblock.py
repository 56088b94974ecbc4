"""Medusa's heads: head d guesses the token d + 1 places after the row whose hidden state it sees.

    state_d = block_n(... block_1(hidden)),  block(x) = x + SiLU(W x + b)
    logits_d = LM head (state_d)

They may see inner layers of the model, too (`models.inner`). Then hidden above is

    W_f [normed(inner state 1); ...; last state],  normed(x) = x / RMS(x)

Invariants:
- every block is its own (the reference implementation shares one block among the layers of a head);
- weights and biases start at zero, and W_f at the identity on the last state, so an untrained head says what the base
  model says;
- the LM head is frozen: the base model's, or a foreign checkpoint's own, cut to the rows of the draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from models.inner import normed

Accuracies = tuple[tuple[float, ...], ...]  # [heads][rank]

DEFAULT_ACCURACIES: Accuracies = (
    (0.560, 0.112, 0.055, 0.033, 0.020),
    (0.316, 0.108, 0.061, 0.043, 0.035),
    (0.201, 0.087, 0.060, 0.035, 0.034),
    (0.147, 0.078, 0.049, 0.037, 0.029),
    (0.118, 0.069, 0.048, 0.037, 0.028),
)
"""For heads that come without measurements: Medusa-1 on Vicuna 7B, differences of the top-1 to top-5 accuracies in the
Medusa repository's assets/medusa_acc.csv."""


class ResBlockHeads(nn.Module):
    """All heads of one model, evaluated together.

    `lm_head` is [draft_vocab, hidden] shared by all heads, or [heads, draft_vocab, hidden] with one for each.
    `token_ids` are the draft vocabulary's ids in the model's vocabulary (default: all, in order).
    `accuracies[d][r]` is the probability that exactly the token ranked r by head d is the model's own, as measured
    after training; None if nobody measured it. `inner_layers` are those that they see besides the last state.
    """

    token_ids: Tensor  # [draft_vocab] int64
    lm_head: Tensor
    fusion: nn.Parameter | None  # [hidden, (inner layers + 1) * hidden]

    def __init__(
        self,
        lm_head: Tensor,
        *,
        num_heads: int,
        num_layers: int = 1,
        token_ids: Tensor | None = None,
        accuracies: Accuracies | None = None,
        inner_layers: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        draft_vocab, hidden_size = lm_head.shape[-2:]
        self.num_heads = num_heads
        self.num_layers = num_layers
        self.hidden_size = hidden_size
        self.accuracies = accuracies
        self.inner_layers = inner_layers
        self.weight = nn.Parameter(lm_head.new_zeros(num_layers, num_heads, hidden_size, hidden_size))
        self.bias = nn.Parameter(lm_head.new_zeros(num_layers, num_heads, 1, hidden_size))
        self.register_parameter("fusion", nn.Parameter(last_of(lm_head, len(inner_layers))) if inner_layers else None)
        ids = torch.arange(draft_vocab, device=lm_head.device) if token_ids is None else token_ids.to(lm_head.device)
        self.register_buffer("token_ids", ids, persistent=False)
        self.register_buffer("lm_head", lm_head.detach(), persistent=False)

    def states(self, hidden: Tensor) -> Tensor:
        """What enters the LM head: [batch, (inner layers + 1) * hidden] -> [heads, batch, hidden]."""
        x = self._fused(hidden).expand(self.num_heads, -1, -1)
        for weight, bias in zip(self.weight, self.bias, strict=True):
            x = x + silu(torch.baddbmm(bias, x, weight.transpose(1, 2)))
        return x

    def state_of(self, head: int, hidden: Tensor) -> Tensor:
        """`states` of one head alone: [batch, (inner layers + 1) * hidden] -> [batch, hidden]."""
        x = self._fused(hidden)
        for weight, bias in zip(self.weight[:, head], self.bias[:, head, 0], strict=True):
            x = x + silu(linear(x, weight, bias))
        return x

    def _fused(self, hidden: Tensor) -> Tensor:
        """[batch, (inner layers + 1) * hidden] -> [batch, hidden]."""
        return hidden if self.fusion is None else normed(hidden, len(self.inner_layers)) @ self.fusion.T

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, hidden], as it enters the model's output embedding -> [batch, heads, draft_vocab] logits.

        With inner layers: [batch, (inner layers + 1) * hidden], theirs first.
        """
        logits = self.states(hidden).to(self.lm_head.dtype) @ self.lm_head.mT
        return logits.to(hidden.dtype).transpose(0, 1)


def last_of(like: Tensor, num_inner: int) -> Tensor:
    """The fusion that takes the last state and nothing else: [hidden, (num_inner + 1) * hidden]."""
    hidden_size = like.shape[-1]
    identity = torch.eye(hidden_size, dtype=like.dtype, device=like.device)
    return torch.cat([identity.new_zeros(hidden_size, num_inner * hidden_size), identity], dim=1)
