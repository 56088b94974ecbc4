"""The truth in torch: what the C kernels compute, written to be read.

Both operands of a product are int8 with a scale per group of GROUP inputs, weights per output and rows per row; sums
are exact within a group. Weights may be int4 instead, with a scale and a least value per group. The truth of attention
is `models.attention.tree_attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP = 32  # inputs that share a scale
MOST = 127
INT4_TOLERANCE = 1e-3  # of a group's largest weight


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[outputs, inputs] -> int8 [outputs, groups, GROUP] and its scales, bfloat16 [outputs, groups].

    The last group is filled with zeros. Values are rounded relative to the rounded scale, so bfloat16 costs nothing.
    """
    groups = _in_groups(weight)
    scales = (groups.abs().amax(-1) / MOST).bfloat16()
    return _rounded(groups, scales.float()).to(torch.int8), scales


def quantize_weight_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[outputs, inputs] -> 0 to 15 as uint8 [outputs, groups, GROUP], and binary16 [2, outputs, groups].

    A value times the first of these plus the second is the weight: GGUF's Q4_1, whose weights come out as they went in.
    The last group is filled with its last weight, which its range has anyway.
    """
    groups = _filled_groups(weight)
    least, most = groups.aminmax(dim=-1)
    scales, least = ((most - least) / 15).half(), least.half()
    values = _rounded(groups - least.float()[..., None], scales.float(), 0, 15)
    return values.to(torch.uint8), torch.stack((scales, least))


def restored_int4(values: Tensor, scales: Tensor) -> Tensor:
    """The weight that `quantize_weight_int4` took, as far as it was kept: [outputs, groups, GROUP] float32."""
    scale, least = scales.float()[..., None]
    restored: Tensor = values * scale + least
    return restored


def is_int4(weight: Tensor) -> bool:
    """Whether four bits hold `weight` [outputs, inputs], up to the rounding of whoever made it of four bits."""
    groups = _filled_groups(weight)
    error = (restored_int4(*quantize_weight_int4(weight)) - groups).abs().amax(-1)
    return bool((error <= INT4_TOLERANCE * groups.abs().amax(-1)).all())


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, inputs] -> int8 [rows, groups, GROUP] and its scales, float32 [rows, groups]."""
    groups = _in_groups(x)
    scales = groups.abs().amax(-1) / MOST
    return _rounded(groups, scales).to(torch.int8), scales


def _in_groups(x: Tensor) -> Tensor:
    """[n, inputs] -> [n, groups, GROUP] float32."""
    padded = pad(x.float(), (0, -x.shape[1] % GROUP))
    return padded.view(len(x), padded.shape[1] // GROUP, GROUP)


def _filled_groups(weight: Tensor) -> Tensor:
    missing = -weight.shape[1] % GROUP
    return _in_groups(torch.cat((weight, weight[:, -1:].expand(-1, missing)), 1) if missing else weight)


def _rounded(groups: Tensor, scales: Tensor, least: int = -MOST, most: int = MOST) -> Tensor:
    inverse = torch.where(scales > 0, 1 / scales, 0)
    return (groups * inverse[..., None]).round().clamp(least, most)


def linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """[rows, inputs] times a weight as `quantize_weight` gives it: [rows, outputs] float32."""
    values, row_scales = quantize_rows(x)
    sums = torch.einsum("rgk,ogk->rog", values.float(), weight.float())  # exact: below 2^24
    out = (sums * scales.float() * row_scales[:, None]).sum(-1)
    return out if bias is None else out + bias


def linear_int4(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same with a weight as `quantize_weight_int4` gives it."""
    values, row_scales = quantize_rows(x)
    wide = values.float() * row_scales[..., None]  # [rows, groups, GROUP]
    out = torch.einsum("rgk,ogk->ro", wide, restored_int4(weight, scales))
    return out if bias is None else out + bias
