"""The truth in torch: what the C kernels compute, written to be read.

Both operands of a product are int8 with a scale per group of GROUP inputs, weights per output and rows per row; sums
are exact within a group. The truth of attention is `models.attention.tree_attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP = 32  # inputs that share a scale
MOST = 127


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[outputs, inputs] -> int8 [outputs, groups, GROUP] and its scales, bfloat16 [outputs, groups].

    The last group is filled with zeros. Values are rounded relative to the rounded scale, so bfloat16 costs nothing.
    """
    groups = _in_groups(weight)
    scales = (groups.abs().amax(-1) / MOST).bfloat16()
    return _rounded(groups, scales.float()), scales


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, inputs] -> int8 [rows, groups, GROUP] and its scales, float32 [rows, groups]."""
    groups = _in_groups(x)
    scales = groups.abs().amax(-1) / MOST
    return _rounded(groups, scales), scales


def _in_groups(x: Tensor) -> Tensor:
    """[n, inputs] -> [n, groups, GROUP] float32."""
    padded = pad(x.float(), (0, -x.shape[1] % GROUP))
    return padded.view(len(x), padded.shape[1] // GROUP, GROUP)


def _rounded(groups: Tensor, scales: Tensor) -> Tensor:
    inverse = torch.where(scales > 0, 1 / scales, 0)
    return (groups * inverse[..., None]).round().clamp(-MOST, MOST).to(torch.int8)


def linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """[rows, inputs] times a weight as `quantize_weight` gives it: [rows, outputs] float32."""
    values, row_scales = quantize_rows(x)
    sums = torch.einsum("rgk,ogk->rog", values.float(), weight.float())  # exact: below 2^24
    out = (sums * scales.float() * row_scales[:, None]).sum(-1)
    return out if bias is None else out + bias
