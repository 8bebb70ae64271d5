"""Tree decode on CUDA: work lists on the device, and the launcher of ``csrc/decode.cu``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

import patternkv_kernels.jit as jit
from patternkv_kernels.dispatch import missing
from patternkv_kernels.format import SlotFormat
from patternkv_kernels.launch import DTYPES, aligned
from patternkv_kernels.plan import DecodePlan
from patternkv_kernels.tables import LayerTables
from patternkv_kernels.window import Window

MAX_GROUP = 16
"""Most query heads per KV head."""

_GROUP_LIMIT = f"{{}} query heads per KV head: the kernels take at most {MAX_GROUP}"
_CHUNK = 8192
"""Longest chunk of a segment in one work item, kMaxChunk of decode_params.cuh."""
_WORK_ITEM_WORDS = 8
_HEADER_WORDS = 8


@dataclass(frozen=True)
class DecodeShape:
    """The batches that a workspace is for."""

    fmt: SlotFormat
    num_patterns: int
    h_q: int
    max_rows: int
    max_entries: int
    """segments, each counted once for every row that reads it, the empty ones too"""
    max_tokens: int
    """tokens that all rows read together, shared ones counted for each row"""


@dataclass(frozen=True, eq=False)
class DecodeWorkspace:
    """Device memory for the work list of one step and the attention states that a layer leaves.

    Its addresses and sizes never change, so captured CUDA graphs of any batch size share one, as
    long as they run one after the other.
    """

    shape: DecodeShape
    items: torch.Tensor
    """int32: header, work items, state runs"""
    states: torch.Tensor
    """float32 ``[(max_states + max_rows) * h_q * (d + 2)]``"""
    max_narrow: int
    max_wide: int
    max_states: int

    @classmethod
    def allocate(cls, shape: DecodeShape, device: torch.device) -> DecodeWorkspace:
        """Memory for every batch within ``shape``, on a CUDA ``device``."""
        sizes = _sizes(shape, device)
        return cls(
            shape,
            torch.empty(sizes.words, dtype=torch.int32, device=device),
            torch.empty(sizes.floats, device=device),
            sizes.max_narrow,
            sizes.max_wide,
            sizes.max_states,
        )

    @staticmethod
    def nbytes(shape: DecodeShape, device: torch.device) -> int:
        """Bytes that :meth:`allocate` takes."""
        sizes = _sizes(shape, device)
        return 4 * (sizes.words + sizes.floats)

    def check(self, fmt: SlotFormat, num_patterns: int, h_q: int) -> None:
        """Raises ``ValueError`` unless layers of ``fmt`` can use this memory: bits and pages may
        differ."""
        needed = h_q, fmt.h_kv, fmt.head_dim, num_patterns
        own = self.shape.h_q, self.shape.fmt.h_kv, self.shape.fmt.head_dim, self.shape.num_patterns
        if needed != own:
            raise ValueError(
                f"the workspace is for {own} query heads, KV heads, head dims and patterns, these "
                f"are {needed}: allocate one for them"
            )

    @property
    def capacities(self) -> tuple[int, int, int, int]:
        return self.shape.max_rows, self.shape.max_entries, self.max_narrow, self.max_wide


class _Sizes(NamedTuple):
    words: int
    floats: int
    max_narrow: int
    max_wide: int
    max_states: int


def _sizes(shape: DecodeShape, device: torch.device) -> _Sizes:
    fmt = shape.fmt
    narrow_extra, narrow_branches, wide_extra, wide_branches, *_ = _limits(shape, device)
    # Chunks that the longest chunk forces.
    forced = shape.max_entries + shape.max_tokens // _CHUNK
    max_narrow, max_wide = forced + narrow_extra, forced + wide_extra
    max_states = forced + narrow_extra * narrow_branches + wide_extra * wide_branches
    words = _HEADER_WORDS + _WORK_ITEM_WORDS * (max_narrow + max_wide)
    words += 3 * shape.max_entries + shape.max_rows + 1
    # A state of the window of each row, too.
    floats = (max_states + shape.max_rows) * shape.h_q * (fmt.head_dim + 2)
    return _Sizes(words, floats, max_narrow, max_wide, max_states)


def _limits(shape: DecodeShape, device: torch.device) -> list[int]:
    """Of the planner's items, then of the kernels' rows, see ``csrc/decode.cu``."""
    fmt = shape.fmt
    limits = jit.load("decode", fmt).limits(
        shape.num_patterns, shape.h_q // fmt.h_kv, fmt.h_kv, device.index or 0
    )
    return [int(limit) for limit in limits]


def plans_are_alike(shape: DecodeShape, fmt: SlotFormat, device: torch.device) -> bool:
    """Whether kernels of ``fmt`` can read what :func:`plan_decode` writes for ``shape``."""
    rows = (_limits(one, device)[4:] for one in (shape, replace(shape, fmt=fmt)))
    return len({tuple(limits) for limits in rows}) == 1


def unsupported(
    q: torch.Tensor,
    fmt: SlotFormat,
    tables: LayerTables,
    window: Window | None,
    plan: DecodePlan,
) -> str | None:
    """Why the CUDA kernels cannot take these arguments, or None."""
    group = q.shape[1] // fmt.h_kv
    if q.dtype not in DTYPES:
        return f"q is {q.dtype}: the kernels take bfloat16 and float16"
    if group > MAX_GROUP:
        return _GROUP_LIMIT.format(group)
    if window is not None and window.k.dtype != q.dtype:
        return f"the window is {window.k.dtype} and q {q.dtype}: they must be alike"
    if not tables.is_contiguous():
        return "the tables are not contiguous"
    if plan.req_to_token.device != q.device:
        return f"the plan is on {plan.req_to_token.device} and q on {q.device}"
    return None


def decode_unavailable(shape: DecodeShape, device: torch.device) -> str | None:
    """Why the CUDA kernels cannot decode batches of ``shape`` on ``device``, or None.

    Builds them at the first use.
    """
    group = shape.h_q // shape.fmt.h_kv
    if group > MAX_GROUP:
        return _GROUP_LIMIT.format(group)
    return missing("decode", shape.fmt, device)


@dataclass(frozen=True, eq=False)
class SlotSource:
    """Where the slots of a plan's segments are before :func:`plan_decode` lists them.

    The segments of such a plan follow each other in row 0 of its ``req_to_token``, which is the
    list.
    """

    req_to_token: torch.Tensor
    """int32, contiguous, of any shape"""
    sources: torch.Tensor
    """int64 ``[num_segments]``: place of a segment's slots in it, less their place in the list"""
    num_tokens: int
    """of all segments"""


def plan_decode(
    plan: DecodePlan, workspace: DecodeWorkspace, b: int, source: SlotSource | None = None
) -> None:
    """Write the work list of a batch of ``b`` rows into ``workspace``, on the current stream, and
    the list of slots with a ``source``.

    Layers that follow with this workspace read what the plan's tensors contain now. No memory is
    allocated and nothing is read on the host, so a CUDA graph may capture it.
    """
    shape = workspace.shape
    listing: tuple[torch.Tensor | None, ...] = (None,) * 3
    if source is not None:
        listing = source.sources, source.req_to_token, plan.req_to_token
    jit.load("decode", shape.fmt).plan(
        plan.segments,
        plan.row_indptr,
        plan.rows,
        workspace.items,
        b,
        shape.h_q // shape.fmt.h_kv,
        shape.fmt.h_kv,
        shape.num_patterns,
        *workspace.capacities,
        workspace.max_states,
        *listing,
        0 if source is None else source.num_tokens,
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
    workspace: DecodeWorkspace | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`~patternkv_kernels.decode.tree_decode_with_lse` of arguments that it has checked."""
    b, h_q, d = q.shape
    q = _rows(q)
    out = torch.empty(b, h_q, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h_q, dtype=torch.float32, device=q.device)
    if b == 0:
        return out, lse
    if workspace is None:
        nnz, context = plan.rows.numel(), plan.req_to_token.shape[1]
        shape = DecodeShape(fmt, tables.num_patterns, h_q, b, nnz, b * context)
        workspace = DecodeWorkspace.allocate(shape, q.device)
        plan_decode(plan, workspace, b)
    else:
        workspace.check(fmt, tables.num_patterns, h_q)
    exact: tuple[torch.Tensor | None, ...] = (None,) * 7
    if window is not None and window.k.shape[1] > 0:
        exact = (window.k, window.v, window.ring, window.start, window.end)
        exact += (_rows(window.new_k), _rows(window.new_v))
    jit.load("decode", fmt).decode(
        q,
        buffer,
        fmt.page_size,
        tables.patterns,
        tables.channel_scale,
        plan.req_to_token,
        plan.rows,
        workspace.items,
        *workspace.capacities,
        workspace.states,
        workspace.max_states,
        out,
        lse,
        *exact,
        sm_scale,
        logit_cap,
    )
    return out, lse


def _rows(x: torch.Tensor) -> torch.Tensor:
    """``x [b, heads, d]`` as the kernels read it: a row's heads side by side, 16 bytes at once."""
    return aligned(x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous())
