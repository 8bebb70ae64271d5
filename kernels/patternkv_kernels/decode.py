"""Tree decode: one query token per branch over shared and private segments of packed KV."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

import torch

from patternkv_kernels.dequantize import dequantize_runs
from patternkv_kernels.format import SlotFormat
from patternkv_kernels.tables import LayerTables

_CHUNK = 256
"""Longest run of tokens in one work item."""
_BATCH_TOKENS = 8192
"""Tokens that one batch of work items dequantizes at a time."""


@dataclass(frozen=True)
class _WorkBatch:
    """Work items of one number of rows, padded to one length."""

    slots: torch.Tensor  # int64 [w, length], padding repeats the item's own last slot
    valid: torch.Tensor | None  # bool [w, 1, 1, length]; None when nothing is padded
    table_ids: torch.Tensor  # int64 [w]
    rows: torch.Tensor  # int64 [w, num_rows]


@dataclass(frozen=True)
class _Work:
    batches: list[_WorkBatch]
    parts: torch.Tensor | None
    """int64 [b, max_parts]: the partials of every row, ``num_partials`` where a row has fewer."""


@dataclass(frozen=True)
class DecodePlan:
    """What each row of a decode batch reads: a snapshot of one step, used by all layers.

    A segment is a run of positions whose slots were all quantized with one table. Shared segments list several
    rows (branches), private ones a single row; a segment without tokens or rows is legal.
    """

    req_to_token: torch.Tensor
    """int32 ``[max_reqs, max_context]``: slot of each position (SGLang's ``ReqToTokenPool.req_to_token``)"""
    segments: torch.Tensor
    """int32 ``[num_segments, 4]``: ``req_pool_idx, start, end, table_id``; the slots are
    ``req_to_token[req_pool_idx, start:end]``"""
    row_indptr: torch.Tensor
    """int32 ``[num_segments + 1]``"""
    rows: torch.Tensor
    """int32 ``[nnz]``: the batch rows that read segment ``i`` are ``rows[row_indptr[i]:row_indptr[i + 1]]``"""

    @cached_property
    def _work(self) -> _Work:
        return _lower(self)


@dataclass(frozen=True)
class Window:
    """The exact recent tokens of every batch row, for one layer.

    Row ``i`` reads positions ``[start[i], end[i])``; position ``p`` is at index ``p % window`` of ring ``ring[i]``.
    ``start == end`` means none; ``end - start <= window``.
    """

    k: torch.Tensor
    """model dtype ``[num_rings, window, h_kv, d]``"""
    v: torch.Tensor
    """model dtype ``[num_rings, window, h_kv, d]``"""
    ring: torch.Tensor
    """int64 ``[b]``"""
    start: torch.Tensor
    """int64 ``[b]``"""
    end: torch.Tensor
    """int64 ``[b]``"""


def tree_decode(
    q: torch.Tensor,
    fmt: SlotFormat,
    buffer: torch.Tensor,
    tables: LayerTables,
    plan: DecodePlan,
    *,
    window: Window | None,
    sm_scale: float,
    logit_cap: float = 0.0,
) -> torch.Tensor:
    """Attention output of every row, ``[b, h_q, d]`` in ``q.dtype``; see :func:`tree_decode_with_lse`."""
    return tree_decode_with_lse(
        q, fmt, buffer, tables, plan, window=window, sm_scale=sm_scale, logit_cap=logit_cap
    )[0]


def tree_decode_with_lse(
    q: torch.Tensor,
    fmt: SlotFormat,
    buffer: torch.Tensor,
    tables: LayerTables,
    plan: DecodePlan,
    *,
    window: Window | None,
    sm_scale: float,
    logit_cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode attention over the segments of ``plan`` and the exact tokens of ``window``.

    Parameters
    ----------
    q: ``[b, h_q, d]``, any float dtype; query head ``i`` reads KV head ``i // (h_q // h_kv)``.
    buffer: uint8 ``[num_pages, h_kv, page_bytes]``.
    sm_scale: factor on ``q @ k``.
    logit_cap: ``cap * tanh(logit / cap)`` when positive, as SGLang's attention backends do.

    Returns ``out [b, h_q, d]`` in ``q.dtype`` and ``lse [b, h_q]`` float32, natural logarithm. A row without any
    token has ``out = 0`` and ``lse = -inf``.
    """
    b, h_q, d = q.shape
    h_kv = buffer.shape[1]
    grouped = (q.float() * sm_scale).view(b, h_kv, h_q // h_kv, d)
    partials = _Partials(b, h_q, d, q.device)
    work = plan._work
    for batch in work.batches:
        k, v = dequantize_runs(fmt, buffer, batch.slots, tables, batch.table_ids).unbind(3)
        num_items, num_rows = batch.rows.shape
        rows = grouped[batch.rows].transpose(1, 2).flatten(2, 3)  # [w, h_kv, rows * group, d]
        out, peak, mass = _partial_attention(rows, k, v, batch.valid, logit_cap)
        partials.add(
            out.unflatten(2, (num_rows, -1)).transpose(1, 2).reshape(-1, h_q, d),
            peak.unflatten(2, (num_rows, -1)).transpose(1, 2).reshape(-1, h_q),
            mass.unflatten(2, (num_rows, -1)).transpose(1, 2).reshape(-1, h_q),
        )
    parts = work.parts
    window_parts = None
    if window is not None:
        window_parts = partials.count
        partials.add(*_window_attention(grouped, window, logit_cap))
    out, lse = partials.merge(parts, window_parts)
    return out.to(q.dtype), lse


def _partial_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    valid: torch.Tensor | None,
    logit_cap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unnormalised attention ``[w, h, r, d]`` with the peak and the mass of its softmax, both ``[w, h, r]``."""
    logits = q @ k.transpose(-1, -2)
    if logit_cap > 0:
        logits.div_(logit_cap).tanh_().mul_(logit_cap)
    if valid is not None:
        logits.masked_fill_(~valid, float("-inf"))
    peak = logits.amax(-1, keepdim=True)
    p = logits.sub_(peak.clamp_min(torch.finfo(torch.float32).min)).exp_()
    return p @ v, peak.squeeze(-1), p.sum(-1)


def _window_attention(
    q: torch.Tensor, window: Window, logit_cap: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    b, h_kv, group, d = q.shape
    size = window.k.shape[1]
    position = window.start.unsqueeze(1) + torch.arange(size, device=q.device)
    valid = position < window.end.unsqueeze(1)
    index = (window.ring.unsqueeze(1), position % size)
    unread = ~valid.view(b, size, 1, 1)
    # Entries outside [start, end) may hold anything, NaN included, and 0 * NaN is NaN.
    k = window.k[index].float().masked_fill_(unread, 0.0).transpose(1, 2)
    v = window.v[index].float().masked_fill_(unread, 0.0).transpose(1, 2)
    out, peak, mass = _partial_attention(q, k, v, valid.view(b, 1, 1, size), logit_cap)
    return out.reshape(b, -1, d), peak.reshape(b, -1), mass.reshape(b, -1)


class _Partials:
    """Partial softmax states, merged per row as FlashInfer's ``merge_states`` does."""

    def __init__(self, b: int, h_q: int, d: int, device: torch.device) -> None:
        self.b = b
        self.out = [torch.zeros(1, h_q, d, device=device)]
        self.peak = [torch.full((1, h_q), float("-inf"), device=device)]
        self.mass = [torch.zeros(1, h_q, device=device)]
        self.count = 1

    def add(self, out: torch.Tensor, peak: torch.Tensor, mass: torch.Tensor) -> None:
        self.out.append(out)
        self.peak.append(peak)
        self.mass.append(mass)
        self.count += out.shape[0]

    def merge(
        self, parts: torch.Tensor | None, window_parts: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.out[0].device
        columns = [] if parts is None else [parts]
        if window_parts is not None:
            columns.append(torch.arange(window_parts, window_parts + self.b, device=device)[:, None])
        columns.append(torch.zeros(self.b, 1, dtype=torch.int64, device=device))
        index = torch.cat(columns, 1)
        index = torch.nn.functional.pad(index, (0, 0, 0, self.b - index.shape[0]))
        out = torch.cat(self.out)[index]
        peak = torch.cat(self.peak)[index]
        mass = torch.cat(self.mass)[index]
        top = peak.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
        weight = (peak - top).exp()
        total = (weight * mass).sum(1)
        merged = (weight.unsqueeze(-1) * out).sum(1) / total.clamp_min(1e-30).unsqueeze(-1)
        return merged, top.squeeze(1) + total.log()


def _lower(plan: DecodePlan) -> _Work:
    """Cut segments into work items, batch items alike, and list each row's partials."""
    device = plan.req_to_token.device
    row_indptr = plan.row_indptr.tolist()
    rows = plan.rows.tolist()
    alike: dict[tuple[int, int], list[tuple[int, int, int, int, list[int]]]] = defaultdict(list)
    for i, (req, start, end, table_id) in enumerate(plan.segments.tolist()):
        readers = rows[row_indptr[i] : row_indptr[i + 1]]
        if start >= end or not readers:
            continue
        num_chunks = -(-(end - start) // _CHUNK)
        chunk = -(-(end - start) // num_chunks)
        kind = (len(readers), max(chunk, 64).bit_length())
        for first in range(start, end, chunk):
            last = min(first + chunk, end)
            alike[kind].append((last - first, req, first, table_id, readers))
    batches: list[_WorkBatch] = []
    parts: dict[int, list[int]] = defaultdict(list)
    count = 1
    for items in alike.values():
        items.sort(key=lambda item: -item[0])
        per_batch = max(1, _BATCH_TOKENS // items[0][0])
        for first in range(0, len(items), per_batch):
            batch = items[first : first + per_batch]
            batches.append(_batch(plan.req_to_token, batch, device))
            for *_, readers in batch:
                for row in readers:
                    parts[row].append(count)
                    count += 1
    if not parts:
        return _Work(batches, None)
    width = max(map(len, parts.values()))
    padded = [
        parts[row] + [0] * (width - len(parts[row])) for row in range(max(parts) + 1)
    ]
    return _Work(batches, torch.tensor(padded, device=device))


def _batch(
    req_to_token: torch.Tensor,
    items: list[tuple[int, int, int, int, list[int]]],
    device: torch.device,
) -> _WorkBatch:
    lengths, reqs, starts, table_ids, rows = zip(*items, strict=True)
    fields = torch.tensor([lengths, reqs, starts, table_ids], device=device)
    length, req, start, table_id = fields.unsqueeze(2).unbind(0)
    column = torch.arange(max(lengths), device=device)
    slots = req_to_token[req, start + torch.minimum(column, length - 1)].long()
    padded = min(lengths) < max(lengths)
    valid = (column < length).view(len(items), 1, 1, -1) if padded else None
    return _WorkBatch(slots, valid, table_id.squeeze(1), torch.tensor(rows, device=device))
