"""Drawing tokens with shared noise in Triton: for GPUs. The noise of a row's whole vocabulary is never in memory.

The truth is `models.sampling`: the argmax of logits / temperature and Gumbel noise, which is a hash of the row's key
and the token. Invariant: of equals the first is drawn.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS_AT_A_TIME: Final = 1024


@triton.jit
def _best(
    scaled,  # [rows, vocab]
    keys,  # [rows] int64
    values,  # [rows, parts]: each part's best value
    tokens,  # [rows, parts] int64: whose it is
    vocab,
    scaled_row,  # stride
    TOKENS: tl.constexpr,
):
    row, part, num_parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    token = part * TOKENS + tl.arange(0, TOKENS)
    is_token = token < vocab
    scores = tl.load(scaled + row.to(tl.int64) * scaled_row + token, mask=is_token, other=float("-inf")).to(tl.float32)
    bits = token.to(tl.int64) * -7046029254386353131 + tl.load(keys + row)  # splitmix64, as in models.sampling
    bits = (bits ^ ((bits >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    bits = (bits ^ ((bits >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    bits = bits ^ ((bits >> 31) & 0x1FFFFFFFF)
    uniform = ((bits >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float32) * 1.1102230246251565e-16 + 5.551115123125783e-17
    uniform = tl.minimum(uniform, 0.99999994)
    left = 1.0 - uniform
    lost = tl.where(left == 1.0, 1.0, 1.0 - left)  # -log1p(-uniform) by Kahan's way: exact where uniform is small
    exponential = tl.where(left == 1.0, uniform, -tl.log(left) * (uniform / lost))
    noisy = scores - tl.log(exponential)
    value, index = tl.max(noisy, 0, return_indices=True)
    tl.store(values + row * num_parts + part, value)
    tl.store(tokens + row * num_parts + part, part * TOKENS + index.to(tl.int64))


def draw(scaled: Tensor, keys: Tensor) -> Tensor:
    """scaled: [rows, vocab], logits / temperature; keys: [rows] int64, `models.sampling.noise_key`s. Returns [rows]."""
    rows, vocab = scaled.shape
    scaled = scaled if scaled.stride(1) == 1 else scaled.contiguous()
    parts = -(-vocab // TOKENS_AT_A_TIME)
    values = scaled.new_empty(rows, parts, dtype=torch.float32)
    tokens = torch.empty(rows, parts, dtype=torch.int64, device=scaled.device)
    _best[rows, parts](scaled, keys, values, tokens, vocab, scaled.stride(0), TOKENS=TOKENS_AT_A_TIME)
    return tokens.gather(1, values.argmax(1, keepdim=True))[:, 0]
