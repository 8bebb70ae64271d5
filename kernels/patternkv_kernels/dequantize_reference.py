"""Dequantize in torch: the specification of :func:`~patternkv_kernels.dequantize.dequantize`."""

from __future__ import annotations

import torch

from patternkv_kernels.format import SlotFormat, centre, read_slots, unpack
from patternkv_kernels.tables import LayerTables


def dequantize_reference(
    fmt: SlotFormat,
    buffer: torch.Tensor,
    slots: torch.Tensor,
    tables: LayerTables,
    table_ids: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`~patternkv_kernels.dequantize.dequantize` of arguments that it has checked."""
    x = dequantize_runs(fmt, buffer, slots.unsqueeze(1), tables, table_ids).squeeze(2).to(dtype)
    return x[:, :, 0], x[:, :, 1]


def dequantize_runs(
    fmt: SlotFormat,
    buffer: torch.Tensor,
    slots: torch.Tensor,
    tables: LayerTables,
    table_ids: torch.Tensor,
) -> torch.Tensor:
    """The stored vectors of runs of slots, every run with one table, head-major.

    Parameters
    ----------
    slots: int64 ``[num_runs, length]``.
    table_ids: integer ``[num_runs]``.

    Returns float32 ``[num_runs, h_kv, length, 2, d]``: K, then V, of every token.
    """
    h_kv, d = fmt.h_kv, fmt.head_dim
    rows = read_slots(fmt, buffer, slots)
    codes, ids, scale = rows.split([fmt.code_bytes, 2, 4], dim=3)
    device = buffer.device
    table = table_ids.long().view(-1, 1, 1, 1)
    kv_head = torch.arange(2 * h_kv, device=device).view(2, h_kv).t().unsqueeze(1)
    table_head = table * (2 * h_kv) + kv_head  # [num_runs, h_kv, 1, 2]
    x = _centred_codes(fmt, codes)
    x.mul_(scale.view(torch.float16).float().unsqueeze(4))
    channel_scale = tables.channel_scale.view(-1, d).index_select(0, table_head.flatten())
    x.mul_(channel_scale.float().view(*table_head.shape, d))
    pattern = (table_head * tables.num_patterns + ids).flatten()
    return x.add_(tables.patterns.view(-1, d).index_select(0, pattern).view_as(x))


def _centred_codes(fmt: SlotFormat, codes: torch.Tensor) -> torch.Tensor:
    """``code - (2**bits - 1) / 2``, float32 ``[..., 2, d]``, of the code bytes of K and V."""
    if fmt.k_bits == fmt.v_bits:
        x = unpack(codes, fmt.k_bits).float().sub_(centre(fmt.k_bits))
    else:
        k, v = codes.split([fmt.k_code_bytes, fmt.v_code_bytes], dim=-1)
        x = torch.cat(
            [
                unpack(k, fmt.k_bits).float().sub_(centre(fmt.k_bits)),
                unpack(v, fmt.v_bits).float().sub_(centre(fmt.v_bits)),
            ],
            dim=-1,
        )
    return x.unflatten(-1, (2, fmt.head_dim))
