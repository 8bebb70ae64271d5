"""Dequantize on CUDA: the launcher of ``csrc/dequantize.cu``."""

from __future__ import annotations

import torch

import patternkv_kernels.jit as jit
from patternkv_kernels.format import SlotFormat
from patternkv_kernels.launch import index_tensor, table_tensor
from patternkv_kernels.tables import LayerTables

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unsupported(tables: LayerTables, dtype: torch.dtype) -> str | None:
    """Why the CUDA kernel cannot take these arguments, or None."""
    if dtype not in DTYPES:
        return f"dtype={dtype}: the kernel makes bfloat16, float16 and float32"
    if not tables.is_contiguous():
        return "the tables are not contiguous"
    return None


def dequantize_cuda(
    fmt: SlotFormat,
    buffer: torch.Tensor,
    slots: torch.Tensor,
    tables: LayerTables,
    table_ids: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """:func:`~patternkv_kernels.dequantize.dequantize` of arguments that it has checked."""
    jit.load("dequantize", fmt).dequantize(
        buffer,
        fmt.page_size,
        index_tensor(slots),
        tables.patterns,
        tables.channel_scale,
        table_tensor(table_ids),
        *out,
    )
