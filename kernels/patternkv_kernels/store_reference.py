"""Store in torch: the specification of :func:`~patternkv_kernels.store.store_kv`.

The bytes of a token are a pure function of its own K, V and table, whatever it is batched with. Two
things see to that. The nearest pattern comes from a matrix product, whose rounding may depend on
the shapes, so its operands are put on grids coarse enough for float64 to hold every sum exactly.
All other sums are trees of additions in one fixed order, and everything else is elementwise IEEE
arithmetic.
"""

from __future__ import annotations

import torch

from patternkv_kernels.format import SlotFormat, centre, pack, write_slots
from patternkv_kernels.mining_reference import FLOAT16_MAX, sanitize
from patternkv_kernels.tables import LayerTables
from patternkv_kernels.window import WindowWrite

_SCALE_TRIALS = {4: (0.65, 0.75, 0.9, 1.0), 2: (0.4, 0.55, 0.7, 0.9)}
"""Tried scales, in units of the one that just covers the largest residual."""
_TOKEN_GRID_BITS = 22
_PATTERN_GRID_BITS = 20
_TINY = 2.0**-100
_BLOCK_TOKENS = 128
"""Tokens per step: what the scale search needs for them stays in a CPU core's cache."""


def store_kv_reference(
    fmt: SlotFormat,
    buffer: torch.Tensor,
    slots: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: LayerTables,
    table_ids: torch.Tensor,
    window: WindowWrite | None,
) -> None:
    """:func:`~patternkv_kernels.store.store_kv` of arguments that it has checked."""
    for first in range(0, len(slots), _BLOCK_TOKENS):
        block = slice(first, first + _BLOCK_TOKENS)
        rows = _quantize(fmt, k[block], v[block], tables, table_ids[block].long())
        write_slots(fmt, buffer, slots[block], rows)
    if window is not None:
        kept = (window.index >= 0).nonzero().squeeze(1)
        rows = window.index[kept].long()
        for ring, x in ((window.k, k), (window.v, v)):
            ring.flatten(0, 1)[rows] = x[kept]


def _quantize(
    fmt: SlotFormat,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: LayerTables,
    table_ids: torch.Tensor,
) -> torch.Tensor:
    """The bytes of the tokens, uint8 ``[n, h_kv, bytes_per_slot]``, as in pages of one slot and
    one head."""
    n, h_kv, d = k.shape
    x = sanitize(torch.cat([k, v], dim=1))
    ids = _assign(x, tables, table_ids)
    table_head = table_ids.unsqueeze(1) * (2 * h_kv) + torch.arange(2 * h_kv, device=x.device)
    pattern = (table_head * tables.num_patterns + ids).flatten()
    residual = x - tables.patterns.view(-1, d).index_select(0, pattern).view_as(x)

    def per_channel(of_tables: torch.Tensor) -> torch.Tensor:
        return of_tables.view(-1, d).index_select(0, table_head.flatten()).view_as(x).float()

    # Residual and step weighted alike: levels are the same, squared errors count by channel.
    weight = per_channel(tables.channel_weight)
    residual, channel_scale = residual * weight, per_channel(tables.channel_scale) * weight
    if fmt.k_bits == fmt.v_bits:
        codes, scale = fit(residual, channel_scale, fmt.k_bits)
        packed = pack(codes, fmt.k_bits)
        k_codes, v_codes = packed[:, :h_kv], packed[:, h_kv:]
    else:
        k_codes, k_scale = fit(residual[:, :h_kv], channel_scale[:, :h_kv], fmt.k_bits)
        v_codes, v_scale = fit(residual[:, h_kv:], channel_scale[:, h_kv:], fmt.v_bits)
        k_codes, v_codes = pack(k_codes, fmt.k_bits), pack(v_codes, fmt.v_bits)
        scale = torch.cat([k_scale, v_scale], dim=1)
    metadata = [
        ids.to(torch.uint8).view(n, 2, h_kv).transpose(1, 2),
        scale.view(n, 2, h_kv).transpose(1, 2).contiguous().view(torch.uint8),
    ]
    return torch.cat([k_codes, v_codes, *metadata], dim=2)


def _assign(x: torch.Tensor, tables: LayerTables, table_ids: torch.Tensor) -> torch.Tensor:
    """Ids of the patterns nearest by channel weight, int64 ``[n, 2 * h_kv]``, of ``x`` alike."""
    used, member = table_ids.unique(return_inverse=True)
    tokens = x.transpose(0, 1)

    def nearest(table_id: int, tokens: torch.Tensor) -> torch.Tensor:
        weight = tables.channel_weight[table_id].flatten(0, 1).unsqueeze(1).float()
        patterns = tables.patterns[table_id].flatten(0, 1)
        return nearest_pattern(tokens * weight, patterns * weight).t()

    if used.numel() == 1:
        return nearest(int(used), tokens)
    ids = torch.empty(x.shape[:2], dtype=torch.int64, device=x.device)
    for i, table_id in enumerate(used.tolist()):
        rows = (member == i).nonzero().squeeze(1)
        ids[rows] = nearest(table_id, tokens[:, rows])
    return ids


def nearest_pattern(x: torch.Tensor, patterns: torch.Tensor) -> torch.Tensor:
    """Ids of the nearest patterns, int64 ``[h, n]``; the lowest of equally near ones.

    ``x`` is float32 ``[h, n, d]`` and ``patterns`` is ``[h, num_patterns, d]``.

    Token components are rounded to ``2**-22`` and pattern components to ``2**-20`` of the power of
    two below the largest one of the token and of the head's table. Their products are then
    multiples of one unit, at most ``2**44`` of them each, and the sum of up to 256 is below
    ``2**53``: exact in float64 in any order.
    """
    p = _on_grid(patterns.float(), (1, 2), _PATTERN_GRID_BITS)
    half_norm = p.square().sum(2).mul_(0.5).unsqueeze(1)
    tokens = _on_grid(x, (2,), _TOKEN_GRID_BITS)
    dot = torch.bmm(tokens, p.transpose(1, 2))
    return torch.sub(half_norm, dot, out=dot).argmin(2)


def _on_grid(x: torch.Tensor, dims: tuple[int, ...], bits: int) -> torch.Tensor:
    """``x`` in float64, rounded to ``2**-bits`` of the power of two below its largest magnitude.

    The largest magnitude is taken over ``dims``.
    """
    largest = x.abs().amax(dims, keepdim=True).clamp_min(_TINY)
    power = (largest.view(torch.int32) & 0x7F800000).view(torch.float32).double()
    # Adding and subtracting 1.5 * 2**52 steps leaves a multiple of the step.
    shift = power * (1.5 * 2.0 ** (52 - bits))
    return x.double().add_(shift).sub_(shift)


def fit(
    residual: torch.Tensor, channel_scale: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scale of (nearly) least squared error.

    ``residual`` and ``channel_scale`` are float32 ``[n, h, d]``.

    For every trial scale the codes are rounded, and given codes the best scale is the least-squares
    one, ``(residual . s) / (s . s)`` with ``s = channel_scale * (code - centre)``; the trial that
    explains most of the residual wins, and codes are rounded once more with its refitted scale.

    Returns ``codes`` uint8 ``[n, h, d]`` and ``scale`` float16 ``[n, h]``, 0 where the residual is
    0.
    """
    n, h, d = residual.shape
    trials = torch.tensor(_SCALE_TRIALS[bits], device=residual.device).unsqueeze(1)
    # The leading dim is the one that sums run over.
    r = residual.flatten(0, 1).t().contiguous()
    cs = channel_scale.flatten(0, 1).t().contiguous()
    white = r / cs
    cover = (white.abs().amax(0) / centre(bits)).clamp_min_(_TINY)
    step = _codes(white.unsqueeze(1) * (cover * trials).reciprocal_(), bits)
    step.sub_(centre(bits)).mul_(cs.unsqueeze(1))  # [d, trials, n * h]
    dot = _sum_leading(step * r.unsqueeze(1))
    norm = _sum_leading(step.square_())
    best = (dot.square() / norm).argmax(0, keepdim=True)
    scale = (dot.gather(0, best) / norm.gather(0, best)).squeeze(0).clamp_(0, FLOAT16_MAX).half()
    codes = _codes(white / torch.where(scale > 0, scale.float(), 1.0), bits)
    return codes.to(torch.uint8).t().reshape(n, h, d), scale.view(n, h)


def _codes(levels: torch.Tensor, bits: int) -> torch.Tensor:
    """Levels (multiples of the scale) to codes, still in float32; in place."""
    return levels.add_(centre(bits)).round_().clamp_(0, 2**bits - 1)


def _sum_leading(x: torch.Tensor) -> torch.Tensor:
    """Sum over dim 0 as a tree of additions that the other dims cannot change."""
    while x.shape[0] > 1:
        half, odd = divmod(x.shape[0], 2)
        total = x[:half] + x[half : 2 * half]
        x = torch.cat([total, x[-1:]]) if odd else total
    return x[0]
