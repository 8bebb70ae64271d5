"""Tree decode in torch: the specification of
:func:`~patternkv_kernels.decode.tree_decode_with_lse`."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from patternkv_kernels.dequantize_reference import dequantize_runs
from patternkv_kernels.format import SlotFormat
from patternkv_kernels.plan import DecodePlan
from patternkv_kernels.tables import LayerTables
from patternkv_kernels.window import Window

_CHUNK = 256
"""Longest run of tokens in one work item."""
_BATCH_TOKENS = 4096
"""Tokens that one batch of work items dequantizes at a time."""
_LOWEST = torch.finfo(torch.float32).min

_State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Unmerged attention of ``n`` query rows, float32.

Unnormalised output ``[n, h_q, d]``, peak logit ``[n, h_q]``, softmax mass ``[n, h_q]``.
"""


@dataclass(frozen=True)
class _WorkBatch:
    """Work items with the same number of rows, padded to one length."""

    slots: torch.Tensor
    """int64 ``[w, length]``; the padding repeats the item's own last slot"""
    valid: torch.Tensor | None
    """bool ``[w, 1, 1, length]``; None when nothing is padded"""
    table_ids: torch.Tensor
    """int64 ``[w]``"""
    rows: torch.Tensor
    """int64 ``[w, num_rows]``"""


@dataclass(frozen=True)
class _Work:
    batches: list[_WorkBatch]
    states: torch.Tensor
    """int64 ``[num_rows, max_states]``: the states each row merges, padded with empty state 0"""


_lowered: WeakKeyDictionary[DecodePlan, _Work] = WeakKeyDictionary()
"""A plan is lowered once for all layers of its step."""


def tree_decode_reference(
    q: torch.Tensor,
    fmt: SlotFormat,
    buffer: torch.Tensor,
    tables: LayerTables,
    plan: DecodePlan,
    window: Window | None,
    sm_scale: float,
    logit_cap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`~patternkv_kernels.decode.tree_decode_with_lse` of arguments that it has checked."""
    b, h_q, d = q.shape
    work = _lowered.get(plan)
    if work is None:
        work = _lowered[plan] = _lower(plan)
    if work.states.shape[0] > b:
        raise ValueError(
            f"the plan lists batch row {work.states.shape[0] - 1}, but q has only {b} rows"
        )
    grouped = (q.float() * sm_scale).view(b, fmt.h_kv, h_q // fmt.h_kv, d)
    states = [_empty_state(h_q, d, q.device)]
    for batch in work.batches:
        k, v = dequantize_runs(fmt, buffer, batch.slots, tables, batch.table_ids).unbind(3)
        rows = grouped[batch.rows].transpose(1, 2)  # [w, h_kv, num_rows, group, d]
        states.append(_attend(rows, k, v, batch.valid, logit_cap))
    merged = work.states.new_zeros(b, work.states.shape[1] + 1)
    merged[: work.states.shape[0], 1:] = work.states
    if window is not None and window.k.shape[1] > 0:
        first = sum(state[0].shape[0] for state in states)
        merged[:, 0] = torch.arange(first, first + b, device=q.device)
        states.append(_attend_window(grouped, window, logit_cap))
        _keep_newest(window)
    out, lse = _merge(states, merged)
    return out.to(q.dtype), lse


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    valid: torch.Tensor | None,
    logit_cap: float,
) -> _State:
    """States of ``w * num_rows`` query rows.

    q: ``[w, h_kv, num_rows, group, d]``; k, v: ``[w, h_kv, length, d]``; valid: ``[w, 1, 1,
        length]``.
    """
    num_rows, group = q.shape[2:4]
    logits = q.flatten(2, 3) @ k.transpose(-1, -2)
    if logit_cap > 0:
        logits.div_(logit_cap).tanh_().mul_(logit_cap)
    if valid is not None:
        logits.masked_fill_(~valid, -torch.inf)
    peak = logits.amax(-1, keepdim=True)
    # A row that sees nothing has a peak of -inf, and -inf - -inf is NaN.
    p = logits.sub_(peak.clamp_min(_LOWEST)).exp_()
    out, mass = p @ v, p.sum(-1, keepdim=True)

    def by_row(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (num_rows, group)).transpose(1, 2).flatten(2, 3).flatten(0, 1)

    return by_row(out), by_row(peak).squeeze(2), by_row(mass).squeeze(2)


def _attend_window(q: torch.Tensor, window: Window, logit_cap: float) -> _State:
    """States of the ``b`` rows ``q [b, h_kv, group, d]`` over their exact recent tokens."""
    size = window.k.shape[1]
    position = window.start.unsqueeze(1) + torch.arange(size, device=q.device)
    valid = position < window.end.unsqueeze(1)
    index = (window.ring.unsqueeze(1) * size + position % size).flatten()
    unread = ~valid.view(-1, size, 1, 1)
    newest = (position == window.end.unsqueeze(1) - 1).view(-1, size, 1, 1)

    def read(ring: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        entries = ring.flatten(0, 1).index_select(0, index).unflatten(0, (-1, size))
        entries = torch.where(newest, new.unsqueeze(1), entries)
        # Entries outside [start, end) may hold anything, NaN included, and 0 * NaN is NaN.
        entries = entries.masked_fill_(unread, 0.0).transpose(1, 2)
        return entries.to(torch.float32, memory_format=torch.contiguous_format)

    mask = valid.view(-1, 1, 1, size)
    k, v = read(window.k, window.new_k), read(window.v, window.new_v)
    return _attend(q.unsqueeze(2), k, v, mask, logit_cap)


def _keep_newest(window: Window) -> None:
    """Put every row's newest token into its ring."""
    rows = (window.end > window.start).nonzero().squeeze(1)
    place = window.ring[rows], (window.end[rows] - 1) % window.k.shape[1]
    window.k[place], window.v[place] = window.new_k[rows], window.new_v[rows]


def _empty_state(h_q: int, d: int, device: torch.device) -> _State:
    nothing = torch.zeros(1, h_q, device=device)
    return torch.zeros(1, h_q, d, device=device), nothing - torch.inf, nothing


def _merge(states: list[_State], index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge states ``index[i]`` into row ``i`` by log-sum-exp (FlashInfer's ``merge_states``)."""
    out, peak, mass = (torch.cat(part)[index] for part in zip(*states, strict=True))
    top = peak.amax(1, keepdim=True).clamp_min(_LOWEST)
    weight = (peak - top).exp_()  # [b, max_states, h_q]
    total = (weight * mass).sum(1)
    merged = (out * weight.unsqueeze(3)).sum(1)
    # A row without tokens has total = 0 and merged = 0; any row with tokens has total >= 1.
    return merged / total.clamp_min(1.0).unsqueeze(2), top.squeeze(1) + total.log()


def _lower(plan: DecodePlan) -> _Work:
    """Cut segments into work items, batch items alike, and list each row's partials."""
    row_indptr = plan.row_indptr.tolist()
    rows = plan.rows[: row_indptr[-1]].tolist()
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
    states: list[list[int]] = [[] for _ in range(max(rows, default=-1) + 1)]
    count = 1
    for items in alike.values():
        items.sort(key=lambda item: -item[0])
        per_batch = max(1, _BATCH_TOKENS // items[0][0])
        for first in range(0, len(items), per_batch):
            batch = items[first : first + per_batch]
            batches.append(_batch(plan.req_to_token, batch))
            for *_, readers in batch:
                for row in readers:
                    states[row].append(count)
                    count += 1
    width = max(map(len, states), default=0)
    padded = [row + [0] * (width - len(row)) for row in states]
    index = torch.tensor(padded, dtype=torch.int64).view(len(states), width)
    return _Work(batches, index.to(plan.req_to_token.device))


def _batch(
    req_to_token: torch.Tensor, items: list[tuple[int, int, int, int, list[int]]]
) -> _WorkBatch:
    device = req_to_token.device
    lengths, reqs, starts, table_ids, rows = zip(*items, strict=True)
    fields = torch.tensor([lengths, reqs, starts, table_ids], device=device)
    length, req, start, table_id = fields.unsqueeze(2).unbind(0)
    column = torch.arange(max(lengths), device=device)
    slots = req_to_token[req, start + torch.minimum(column, length - 1)].long()
    padded = min(lengths) < max(lengths)
    valid = (column < length).view(len(items), 1, 1, -1) if padded else None
    return _WorkBatch(slots, valid, table_id.squeeze(1), torch.tensor(rows, device=device))
