"""Tensors as the launchers of the CUDA kernels take them."""

from __future__ import annotations

import torch

DTYPES = (torch.bfloat16, torch.float16)
"""Of queries, keys and values."""


def index_tensor(slots: torch.Tensor) -> torch.Tensor:
    """``slots`` as contiguous int64 or int32."""
    slots = slots if slots.dtype in (torch.int32, torch.int64) else slots.long()
    return slots.contiguous()


def table_tensor(table_ids: torch.Tensor) -> torch.Tensor:
    """``table_ids`` as contiguous int32."""
    return table_ids.int().contiguous()


def aligned(x: torch.Tensor) -> torch.Tensor:
    """``x [n, heads, d]`` or a copy with contiguous vectors that start at multiples of 16 bytes."""
    token, head, dim = x.stride()
    if dim == 1 and token % 8 == 0 and head % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
