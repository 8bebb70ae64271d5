"""Tree decode on CUDA: work lists on the device, and the launcher of ``csrc/decode.cu``."""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

import patternkv_kernels.jit as jit
from patternkv_kernels.format import SlotFormat
from patternkv_kernels.plan import DecodePlan, Window
from patternkv_kernels.tables import LayerTables

DTYPES = (torch.bfloat16, torch.float16)
MAX_GROUP = 16
"""Most query heads per KV head."""

_CHUNK = 8192
"""Longest chunk of a segment in one work item, kMaxChunk of decode_params.cuh."""
_WORK_ITEM_WORDS = 8
_HEADER_WORDS = 4


class _Shape(NamedTuple):
    """What a plan's work list depends on besides its tensors."""

    b: int
    h_q: int
    h_kv: int
    num_patterns: int
    k_bits: int
    v_bits: int
    head_dim: int


class _Work(NamedTuple):
    """Device memory of one plan: its work list and the attention states that layers leave in it."""

    shape: _Shape
    items: torch.Tensor
    """int32: header, work items, state runs"""
    states: torch.Tensor
    """float32 ``[max_states * h_q * (d + 2)]``"""
    max_narrow: int
    max_wide: int
    max_states: int


_works: WeakKeyDictionary[DecodePlan, _Work] = WeakKeyDictionary()


def unsupported(
    q: torch.Tensor, fmt: SlotFormat, window: Window | None, plan: DecodePlan
) -> str | None:
    """Why the CUDA kernels cannot take these arguments, or None."""
    group = q.shape[1] // fmt.h_kv
    if q.dtype not in DTYPES:
        return f"q is {q.dtype}: the kernels take bfloat16 and float16"
    if group > MAX_GROUP:
        return f"{group} query heads per KV head: the kernels take at most {MAX_GROUP}"
    if window is not None and window.k.dtype != q.dtype:
        return f"the window is {window.k.dtype} and q {q.dtype}: they must be alike"
    if plan.req_to_token.device != q.device:
        return f"the plan is on {plan.req_to_token.device} and q on {q.device}"
    return None


def lower(plan: DecodePlan, fmt: SlotFormat, num_patterns: int, b: int, h_q: int) -> None:
    """Write the plan's work list with the present contents of its tensors, on the current stream.

    The memory is made at the first call and stays, so a captured CUDA graph that holds this call
    and layers after it follows whatever the plan's tensors contain when it is replayed.
    """
    shape = _Shape(b, h_q, fmt.h_kv, num_patterns, fmt.k_bits, fmt.v_bits, fmt.head_dim)
    module = jit.load("decode", fmt)
    work = _works.get(plan)
    if work is None or work.shape != shape:
        work = _works[plan] = _allocate(plan, shape, module)
    module.plan(
        plan.segments,
        plan.row_indptr,
        plan.rows,
        work.items,
        b,
        h_q // fmt.h_kv,
        fmt.h_kv,
        num_patterns,
        work.max_narrow,
        work.max_wide,
        work.max_states,
    )


def _allocate(plan: DecodePlan, shape: _Shape, module: jit.Module) -> _Work:
    device = plan.segments.device
    nnz = plan.rows.numel()
    narrow_extra, narrow_branches, wide_extra, wide_branches = module.limits(
        shape.num_patterns, shape.h_q // shape.h_kv, shape.h_kv, device.index or 0
    )
    # Branches' positions never overlap, so the tokens that all of them read bound the chunks that
    # the longest chunk forces.
    forced = shape.b * plan.req_to_token.shape[1] // _CHUNK
    max_narrow, max_wide = (nnz + forced + extra for extra in (narrow_extra, wide_extra))
    max_states = nnz + forced + narrow_extra * narrow_branches + wide_extra * wide_branches
    words = _HEADER_WORDS + _WORK_ITEM_WORDS * (max_narrow + max_wide) + 4 * nnz + shape.b + 1
    return _Work(
        shape,
        torch.empty(words, dtype=torch.int32, device=device),
        torch.empty(max_states * shape.h_q * (shape.head_dim + 2), device=device),
        max_narrow,
        max_wide,
        max_states,
    )


def tree_decode_cuda(
    q: torch.Tensor,
    fmt: SlotFormat,
    buffer: torch.Tensor,
    tables: LayerTables,
    plan: DecodePlan,
    window: Window | None,
    sm_scale: float,
    logit_cap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`~patternkv_kernels.decode.tree_decode_with_lse` of arguments that it has checked.

    A plan is lowered at its first use; :func:`lower` does it again.
    """
    b, h_q, d = q.shape
    # The kernels load up to 16 bytes of a query at once.
    aligned = q.data_ptr() % 16 == 0 and q.stride(0) % 8 == 0
    q = q if aligned and q.stride()[1:] == (d, 1) else q.contiguous()
    shape = _Shape(b, h_q, fmt.h_kv, tables.num_patterns, fmt.k_bits, fmt.v_bits, d)
    work = _works.get(plan)
    if work is None or work.shape != shape:
        lower(plan, fmt, tables.num_patterns, b, h_q)
        work = _works[plan]
    out = torch.empty(b, h_q, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h_q, dtype=torch.float32, device=q.device)
    if b == 0:
        return out, lse
    exact: tuple[torch.Tensor | None, ...] = (None,) * 5
    if window is not None and window.k.shape[1] > 0:
        exact = (window.k, window.v, window.ring, window.start, window.end)
    jit.load("decode", fmt).decode(
        q,
        buffer,
        fmt.page_size,
        tables.patterns,
        tables.channel_scale,
        plan.req_to_token,
        plan.rows,
        work.items,
        work.max_narrow,
        work.max_wide,
        work.states,
        work.max_states,
        out,
        lse,
        *exact,
        sm_scale,
        logit_cap,
    )
    return out, lse
