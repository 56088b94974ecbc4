"""From the heads' logits to candidates: the best tokens of each depth, for all drafting requests in one call.

Parallel heads see the hidden state of the accepted row only, so every depth is answered at once. With temperature the
candidates are ranked with the verifier's own noise (`log q / T + g`), which makes them the likelier samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.drafters.mtp import MTPHeads
from models.drafters.packed import PackedHeads
from models.drafters.resblock import ResBlockHeads
from models.masks import Mask
from models.sampling import Params, gumbel_from_keys, noise_key

Heads = ResBlockHeads | PackedHeads | MTPHeads


@dataclass(frozen=True, slots=True)
class DraftRow:
    """One drafting request. `position` is the index, in prompt + output, of the first token to be guessed."""

    params: Params
    position: int
    mask: Mask | None = None


@dataclass(frozen=True, slots=True)
class Candidates:
    """The best tokens of each depth, best first, and what the heads themselves give them: [rows, depths, ranks]."""

    tokens: np.ndarray[Any, np.dtype[np.int64]]
    given: np.ndarray[Any, np.dtype[np.float64]]


def propose(heads: Heads, hidden: Tensor, rows: Sequence[DraftRow], num_ranks: int) -> Candidates:
    """The best `num_ranks` tokens of each depth, and their share of the softmax over the (perturbed) scores.

    hidden: [rows, hidden] of each request's last accepted row.
    """
    logits = heads(hidden).float()  # [rows, heads, draft_vocab]
    for own, row in zip(logits, rows, strict=True):
        if row.mask is not None:
            own += row.mask.always[heads.token_ids]
    noisy = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if noisy:
        index = torch.tensor(noisy, device=logits.device)
        in_c = isinstance(heads, PackedHeads)
        logits[index] = _perturbed(logits[index], [rows[i] for i in noisy], heads.token_ids, in_c)
    scores, best = logits.topk(min(num_ranks, logits.shape[-1]), dim=-1)
    given = (scores - logits.logsumexp(-1, keepdim=True)).exp()
    return Candidates(heads.token_ids[best].cpu().numpy(), given.double().cpu().numpy())


def _perturbed(logits: Tensor, rows: Sequence[DraftRow], token_ids: Tensor, in_c: bool) -> Tensor:
    """log q / T + g, for each depth with the noise of the position that it guesses."""
    num_heads = logits.shape[1]
    keys = [noise_key(r.params.seed, r.params.choice, r.position + depth) for r in rows for depth in range(num_heads)]
    noise = gumbel_from_keys(keys, token_ids, in_c=in_c).view(len(rows), num_heads, -1)
    temperature = torch.tensor([row.params.temperature for row in rows], device=logits.device).view(-1, 1, 1)
    return logits.log_softmax(-1) / temperature + noise
