"""Store on CUDA: the launcher of ``csrc/store.cu``."""

from __future__ import annotations

import torch

import patternkv_kernels.jit as jit
from patternkv_kernels.format import SlotFormat
from patternkv_kernels.tables import LayerTables
from patternkv_kernels.window import WindowWrite

DTYPES = (torch.bfloat16, torch.float16)


def unsupported(k: torch.Tensor, v: torch.Tensor, tables: LayerTables) -> str | None:
    """Why the CUDA kernels cannot take these arguments, or None."""
    if k.dtype not in DTYPES or v.dtype != k.dtype:
        return f"k is {k.dtype} and v {v.dtype}: the kernels take bfloat16 or float16, both alike"
    if not tables.is_contiguous():
        return "the tables are not contiguous"
    return None


def store_kv_cuda(
    fmt: SlotFormat,
    buffer: torch.Tensor,
    slots: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: LayerTables,
    table_ids: torch.Tensor,
    window: WindowWrite | None,
) -> None:
    """:func:`~patternkv_kernels.store.store_kv` of arguments that it has checked.

    ``k`` and ``v`` may be slices of a fused projection: any strides of tokens and heads that are
    multiples of 8.
    """
    jit.load("store", fmt).store_kv(
        buffer,
        fmt.page_size,
        index_tensor(slots),
        aligned(k),
        aligned(v),
        tables.patterns,
        tables.channel_scale,
        tables.channel_weight,
        table_ids.int(),
        None if window is None else window.k,
        None if window is None else window.v,
        None if window is None else window.index.contiguous(),
    )


def store_windows_cuda(
    fmt: SlotFormat,
    layers: torch.Tensor,
    num_patterns: int,
    dtype: torch.dtype,
    slots: torch.Tensor,
    index: torch.Tensor,
    table_ids: torch.Tensor,
) -> None:
    """:func:`~patternkv_kernels.windowed_layers.store_windows` of arguments that it has checked.

    ``layers`` are ``WindowedLayers.addresses``, whose windows are ``dtype``.
    """
    jit.load("store", fmt).store_windows(
        layers,
        fmt.page_size,
        fmt.h_kv,
        num_patterns,
        dtype == torch.bfloat16,
        index_tensor(slots),
        index_tensor(index),
        table_ids.int(),
    )


def index_tensor(slots: torch.Tensor) -> torch.Tensor:
    """``slots`` as the kernels take them: contiguous int64 or int32."""
    slots = slots if slots.dtype in (torch.int32, torch.int64) else slots.long()
    return slots.contiguous()


def aligned(x: torch.Tensor) -> torch.Tensor:
    """``x`` or a copy with contiguous vectors that start at multiples of 16 bytes."""
    token, head, dim = x.stride()
    if dim == 1 and token % 8 == 0 and head % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
