"""Dequantize: packed slots back to vectors."""

from __future__ import annotations

import torch

from patternkv_kernels.dequantize_cuda import dequantize_cuda, unsupported
from patternkv_kernels.dequantize_reference import dequantize_reference
from patternkv_kernels.dispatch import Impl, use_cuda
from patternkv_kernels.format import SlotFormat
from patternkv_kernels.tables import LayerTables


def dequantize(
    fmt: SlotFormat,
    buffer: torch.Tensor,
    slots: torch.Tensor,
    tables: LayerTables,
    table_ids: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    impl: Impl = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stored K and V vectors of ``slots``.

    Parameters
    ----------
    buffer: uint8 ``[num_pages, page_bytes]``.
    slots: integer ``[n]``.
    table_ids: integer ``[n]``, the table each slot was stored with.
    dtype: of the result; the arithmetic is float32.
    out: contiguous memory for ``k`` and ``v``, of their shape and ``dtype``; None allocates it.

    Returns ``k, v``, both ``[n, h_kv, d]``.

    Raises ``ValueError`` for arguments whose shapes do not fit the format and each other.
    """
    fmt.check(buffer)
    tables.check(fmt.h_kv, fmt.head_dim)
    if slots.dim() != 1 or table_ids.shape != slots.shape:
        raise ValueError(
            f"slots is {list(slots.shape)}, table_ids {list(table_ids.shape)}: "
            "both need to be [n], one table for each slot"
        )
    shape = (len(slots), fmt.h_kv, fmt.head_dim)
    if out is None:
        k, v = (torch.empty(shape, dtype=dtype, device=buffer.device) for _ in range(2))
        out = k, v
    for x in out:
        if x.shape != shape or x.dtype != dtype or not x.is_contiguous():
            raise ValueError(
                f"out is {x.dtype} {list(x.shape)}: needs contiguous {dtype} {list(shape)}"
            )
    if use_cuda(impl, "dequantize", fmt, buffer.device, unsupported(tables, dtype)):
        dequantize_cuda(fmt, buffer, slots, tables, table_ids, out)
    else:
        k, v = dequantize_reference(fmt, buffer, slots, tables, table_ids, dtype)
        out[0].copy_(k)
        out[1].copy_(v)
    return out
