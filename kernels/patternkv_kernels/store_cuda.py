"""Store on CUDA: the launcher of ``csrc/store.cu``."""

from __future__ import annotations

import torch

import patternkv_kernels.jit as jit
from patternkv_kernels.format import SlotFormat
from patternkv_kernels.launch import DTYPES, aligned, index_tensor, table_tensor
from patternkv_kernels.tables import LayerTables
from patternkv_kernels.window import WindowWrite


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
        table_tensor(table_ids),
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
        table_tensor(table_ids),
    )
