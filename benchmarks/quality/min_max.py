"""Asymmetric min-max rounding, which int4/int2 caches, KIVI, OTT and PatternKV share."""

from __future__ import annotations

import torch

PARAMETER_BITS = 32
"""Bits of a group's scale and minimum, float16 each."""


def round_min_max(x: torch.Tensor, bits: int, dim: int, group: int) -> torch.Tensor:
    """``x`` through ``2**bits`` even levels between the extremes of each group.

    Groups are runs of ``group`` along ``dim``, whose size is a multiple of it. Scale and minimum
    are float16; the level is chosen with these rounded values. A constant group keeps its value.
    """
    grouped = x.unflatten(dim, (-1, group))
    axis = dim if dim < 0 else dim + 1
    low, high = grouped.amin(axis, keepdim=True), grouped.amax(axis, keepdim=True)
    levels = 2**bits - 1
    scale = ((high - low) / levels).half().float()
    low = low.half().float()
    safe = torch.where(scale > 0, scale, 1.0)
    codes = ((grouped - low) / safe).round().clamp(0, levels)
    return (codes * scale + low).reshape(x.shape)
